"""A helper model says what it would say alone, whatever `generate` does with the sequences."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from tests.speech import BOS, EOS, PAD, lively, prompts, tokenizer
from tests.zoo import DECODERS, VOCABULARY, tiny
from tunesmith.core.sidemodel import SideModel, check_vocabulary, pad_left, prompt_mask, reworded
from tunesmith.errors import ModelError

ON = pytest.mark.parametrize("family", DECODERS)


@torch.no_grad()
def alone(model: nn.Module, row: Tensor) -> Tensor:
    """Logits after one unpadded sequence, by one plain forward pass."""
    return model(input_ids=row[None], use_cache=False).logits[0, -1].float()


def grown(ids: Tensor, steps: int, seed: int = 5) -> Tensor:
    """`steps` random tokens appended to each row."""
    g = torch.Generator().manual_seed(seed)
    return torch.cat([ids, torch.randint(3, VOCABULARY, (ids.shape[0], steps), generator=g)], dim=1)


def agrees(side: SideModel, model: nn.Module, ids: Tensor, mask: Tensor) -> bool:
    """Whether the helper's logits are those of its rows alone; `mask` is of the prompt."""
    found = side.logits(ids)
    starts = mask.shape[1] - mask.sum(1)
    expected = torch.stack([alone(model, row[start:]) for row, start in zip(ids, starts, strict=True)])
    return torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


@ON
def test_every_step_equals_each_row_alone(family: str) -> None:
    model = lively(family)
    side = SideModel(model, pad_token_id=PAD)
    ids, mask = prompts()
    whole = grown(ids, 4)
    for length in range(7, 12):
        assert agrees(side, model, whole[:, :length], mask)
    assert side.forwards == 5
    assert side.tokens == int(mask.sum()) + 4 * 3


def test_pad_tokens_behind_the_first_token_are_tokens() -> None:
    model = lively("llama")
    side = SideModel(model, pad_token_id=PAD)
    ids, mask = prompts()
    ids[0, 4] = PAD
    assert agrees(side, model, ids, mask)
    ended = torch.cat([ids, torch.tensor([[EOS, PAD], [9, 8], [7, 6]])], dim=1)
    assert agrees(side, model, ended[:, :8], mask)
    assert agrees(side, model, ended, mask)


@given(st.lists(st.lists(st.sampled_from([PAD, 3, 4]), min_size=6, max_size=6), min_size=1, max_size=4))
def test_prompt_mask_is_the_leading_run(rows: list[list[int]]) -> None:
    found = prompt_mask(torch.tensor(rows), PAD)
    for row, mask in zip(rows, found.tolist(), strict=True):
        leading = next((i for i, token in enumerate(row) if token != PAD), len(row) - 1)
        assert mask == [i >= leading for i in range(len(row))]
    assert bool(prompt_mask(torch.tensor(rows), None).all())


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_pad_left_keeps_each_row_in_order(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    mask[:, 2] = True
    ids = torch.arange(1, 6).expand_as(mask)
    moved, moved_mask = pad_left(ids, mask)
    assert moved.shape[1] == int(mask.sum(1).max())
    for before, kept, after, where in zip(ids, mask, moved, moved_mask, strict=True):
        assert after[where].tolist() == before[kept].tolist()
        assert where.tolist() == sorted(where.tolist())


def test_a_given_mask_tells_padding_from_a_first_token_of_the_same_id() -> None:
    model = lively("gpt2")
    side = SideModel(model, pad_token_id=BOS)
    ids, mask = prompts((4, 3))
    ids[0, 0] = ids[1, 0] = ids[1, 1] = BOS
    expected = torch.stack([alone(model, ids[0]), alone(model, ids[1, 1:])])
    assert torch.allclose(side.logits(ids, mask), expected, atol=1e-4)
    assert not torch.allclose(SideModel(model, pad_token_id=BOS).logits(ids), expected, atol=1e-2)


def test_another_mask_for_the_same_tokens_is_another_sequence() -> None:
    side = SideModel(MODEL)
    ids, _ = prompts((4,))
    side.logits(ids, torch.tensor([[1, 1, 1, 1]]))
    longer = grown(ids, 1)
    found = side.logits(longer, torch.tensor([[0, 1, 1, 1]]))
    assert torch.allclose(found[0], alone(MODEL, longer[0, 1:]), atol=1e-4)


def test_a_prompt_of_one_pad_token_is_a_token() -> None:
    model = lively("gpt2")
    only = torch.tensor([[PAD]])
    assert torch.allclose(SideModel(model, pad_token_id=PAD).logits(only)[0], alone(model, only[0]), atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.permutations(range(3)), min_size=3, max_size=5), st.integers(0, 100))
def test_exchanged_rows_cost_one_token_each(orders: list[list[int]], seed: int) -> None:
    model = MODEL
    side = SideModel(model, pad_token_id=PAD)
    ids, mask = prompts((4, 4, 4))
    ids[1:] = ids[0]
    side.logits(ids)
    before = side.tokens
    for step, order in enumerate(orders):
        ids = grown(ids[order], 1, seed + step)
        assert agrees(side, model, ids, mask)
    assert side.tokens - before == 3 * len(orders)


MODEL = lively("llama")


def test_columns_taken_back_are_cut_off() -> None:
    side = SideModel(MODEL, pad_token_id=PAD)
    ids, mask = prompts()
    draft = grown(ids, 5)
    for length in range(7, 13):
        assert agrees(side, MODEL, draft[:, :length], mask)
    before = side.tokens
    other = draft[:, :9].clone()
    other[:, 8] = (other[:, 8] + 1) % VOCABULARY
    assert agrees(side, MODEL, other, mask)
    assert side.tokens - before == 3
    assert agrees(side, MODEL, grown(other, 1), mask)


def test_other_batches_begin_anew() -> None:
    side = SideModel(MODEL, pad_token_id=PAD)
    for lengths, seed in (((7, 3, 5), 0), ((7, 3, 5), 1), ((2, 6), 2), ((6,), 3)):
        ids, mask = prompts(lengths, seed)
        before = side.tokens
        assert agrees(side, MODEL, ids, mask)
        assert side.tokens - before == sum(lengths)
        assert agrees(side, MODEL, grown(ids, 1), mask)


def test_the_same_prompt_again_sees_changed_weights() -> None:
    model = copy.deepcopy(MODEL)
    side = SideModel(model, pad_token_id=PAD)
    ids, mask = prompts()
    side.logits(ids)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.add_(1.0)
    assert agrees(side, model, ids, mask)


def test_a_sliding_window_is_cut_back_rightly() -> None:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = T.MistralConfig(vocab_size=64, num_key_value_heads=2, sliding_window=3, pad_token_id=PAD, **size)
    model = T.MistralForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.dim() > 1 else 1)
    side = SideModel(model, pad_token_id=PAD)
    ids, mask = prompts((8, 8))
    draft = grown(ids, 6)
    for length in (8, 9, 10, 11, 12, 10, 11):
        draft[:, 9] = (draft[:, 9] + (length == 10)) % VOCABULARY
        assert agrees(side, model, draft[:, :length], mask)


def test_a_longer_head_is_cut_and_a_shorter_one_refused() -> None:
    ids, _ = prompts()
    assert SideModel(MODEL, vocabulary=50).logits(ids).shape == (3, 50)
    with pytest.raises(ModelError, match=r"scores 64 tokens.*vocabulary has 70"):
        SideModel(MODEL, vocabulary=70).logits(ids)


def test_float32_without_gradient_and_modes_kept() -> None:
    model = lively("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).to(torch.bfloat16).train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    ids, _ = prompts()
    found = SideModel(model, pad_token_id=PAD).logits(ids)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert torch.equal(found, SideModel(model, pad_token_id=PAD).logits(ids)), "dropout is off"
    assert [module.training for module in model.modules()] == before


def tuned(seed: int = 0) -> nn.Module:
    """A PEFT model with two LoRA adapters that do something."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(MODEL), config)
    model.add_adapter("other", config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.add_(torch.randn_like(p))
    return model.eval()


def state(model: nn.Module) -> list:
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    return [flags, [(list(m.active_adapters), m.disable_adapters) for m in layers], model.active_adapter]


@pytest.mark.parametrize("found_disabled", [False, True])
def test_one_peft_model_is_several_helpers(found_disabled: bool) -> None:
    model = tuned()
    ids, _ = prompts((6, 6))
    whole = grown(ids, 2)
    expected: dict[str | bool, Tensor] = {}
    with torch.no_grad():
        for name in ("default", "other"):
            model.set_adapter(name)
            expected[name] = model(input_ids=whole).logits[:, -1]
        with model.disable_adapter():
            expected[False] = model(input_ids=whole).logits[:, -1]
    model.set_adapter("default")
    if found_disabled:
        model.base_model.disable_adapter_layers()
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad_(found_disabled)
    assert not torch.allclose(expected["default"], expected[False])
    before = state(model)
    sides = {wanted: SideModel(model, adapter=wanted) for wanted in expected}
    for length in (6, 7, 8):
        found = {wanted: side.logits(whole[:, :length]) for wanted, side in sides.items()}
        assert state(model) == before
    for wanted, logits in found.items():
        assert torch.allclose(logits, expected[wanted], atol=1e-4), wanted
    as_it_is = expected[False] if found_disabled else expected["default"]
    assert torch.allclose(SideModel(model).logits(whole), as_it_is, atol=1e-4)


def test_the_generating_model_may_be_the_helper() -> None:
    model = tuned().train()
    ids, mask = prompts()
    given = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6}
    model.eval()
    plain = model.generate(input_ids=ids, **given)
    seen: list[Tensor] = []
    side = SideModel(model, pad_token_id=PAD, adapter=False)

    class Listen(T.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(side.logits(input_ids))
            return scores

    assert torch.equal(model.generate(input_ids=ids, logits_processor=[Listen()], **given), plain)
    with model.disable_adapter():
        expected = torch.stack([alone(model, row[start:-1]) for row, start in zip(plain, 7 - mask.sum(1), strict=True)])
    assert torch.allclose(seen[-1], expected, atol=1e-3)
    assert side.tokens == int(mask.sum()) + 5 * 3


def test_a_prompt_in_other_words() -> None:
    words = tokenizer()
    side = SideModel(MODEL, pad_token_id=PAD, retarget=reworded(words, lambda text: f"w9 w8 {text.upper().lower()} w7"))
    ids, mask = prompts()
    whole = grown(ids, 3)
    for length in (7, 8, 9, 8, 10):
        found = side.logits(whole[:, :length])
        for row, start, got in zip(whole, 7 - mask.sum(1), found, strict=True):
            said = torch.cat([torch.tensor([9, 8]), row[start:7], torch.tensor([7]), row[7:length]])
            assert torch.allclose(got, alone(MODEL, said), atol=1e-4)


def test_row_lengths_that_change_are_padded_anew() -> None:
    words = tokenizer()

    def longer_when_short(text: str) -> str:
        return "w4 " * 6 + text if len(text.split()) == 3 else text

    side = SideModel(MODEL, pad_token_id=PAD, retarget=reworded(words, longer_when_short))
    ids, mask = prompts()
    found = side.logits(ids)
    expected = [
        alone(MODEL, torch.cat([torch.full((6 * (n == 3),), 4), row[7 - n :]]))
        for row, n in zip(ids, (7, 3, 5), strict=True)
    ]
    assert torch.allclose(found, torch.stack(expected), atol=1e-4)
    right = SideModel(MODEL, pad_token_id=PAD, retarget=lambda ids, mask: (ids.flip(1), mask.flip(1)))
    expected = [alone(MODEL, row[7 - n :].flip(0)) for row, n in zip(ids, (7, 3, 5), strict=True)]
    assert torch.allclose(right.logits(ids), torch.stack(expected), atol=1e-4)
    with pytest.raises(ModelError, match="became empty"):
        SideModel(MODEL, retarget=reworded(words, lambda text: "")).logits(ids, mask)


def test_another_turn_is_a_new_prompt() -> None:
    words = tokenizer()
    side = SideModel(MODEL, retarget=reworded(words, lambda text: f"{text} w9"))
    ids, _ = prompts((5,))
    side.logits(ids)
    turn = grown(ids, 4)
    assert torch.allclose(side.logits(turn)[0], alone(MODEL, torch.cat([turn[0], torch.tensor([9])])), atol=1e-4)


def test_too_many_positions_are_named() -> None:
    side = SideModel(MODEL)
    ids = torch.full((1, 65), 5)
    with pytest.raises(ModelError, match=r"has 64 positions.*need 65"):
        side.logits(ids)


@pytest.mark.parametrize("family", ["bert", "t5", "vit"])
def test_other_models_are_refused(family: str) -> None:
    with pytest.raises(ModelError, match="causal language model"):
        SideModel(tiny(family))


def test_wrong_adapters_are_refused() -> None:
    ids, _ = prompts()
    for model, wanted in ((MODEL, False), (MODEL, "a"), (tuned(), "a"), (tuned(), True)):
        with pytest.raises(ModelError, match="adapter"):
            SideModel(model, adapter=wanted)
    learned = get_peft_model(copy.deepcopy(MODEL), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match="learned prompts"):
        SideModel(learned, adapter=False)
    merged = tuned()
    merged.merge_adapter()
    with pytest.raises(ModelError, match="merged"):
        SideModel(merged, adapter=False).logits(ids)


def test_vocabularies_are_compared_not_their_sizes() -> None:
    check_vocabulary(tokenizer(), tokenizer(), "expert")
    check_vocabulary(tokenizer(60), tokenizer(64), "expert")
    with pytest.raises(ModelError, match=r"expert.*61 of 64 tokens differ \('w3' is 3 and missing"):
        check_vocabulary(tokenizer(), tokenizer(first="v"), "expert")
    with pytest.raises(ModelError, match=r"4 of 64 tokens differ \('w60' is 60 and missing"):
        check_vocabulary(tokenizer(64), tokenizer(60), "expert")
