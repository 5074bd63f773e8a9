"""SkipDecode: its schedule, its caches, and the same numbers however they are computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.speech import PAD, lively, prompts
from tests.zoo import DECODERS, VOCABULARY
from tunesmith.errors import ModelError
from tunesmith.inference.skipdecode import SkipDecode

ON = pytest.mark.parametrize("family", DECODERS)
PROMPT = pytest.mark.parametrize("prompt", ["position", "max"])
BLOCKS = 6


def skip(**options: Any) -> SkipDecode:
    return SkipDecode(**{"n_min": 2, "n_max": 5, "max_length": 12, **options})


def rows(count: int, length: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=g)


def generate(model: nn.Module, ids: Tensor, mask: Tensor | None = None, **given: Any) -> Any:
    size = {"max_new_tokens": 9, "min_new_tokens": 9, **given}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **size)


@given(st.integers(2, 40), st.integers(1, 5), st.integers(1, 300), st.data())
def test_schedule(count: int, warmup: int, horizon: int, data: st.DataObject) -> None:
    assume(warmup < count)
    least = data.draw(st.integers(warmup + 1, count))
    most = data.draw(st.integers(least, count))
    method = SkipDecode(n_min=least, n_max=most, warmup=warmup, max_length=horizon)
    method.check(count)
    before = set(range(count))
    for t in range(horizon + 3):
        active = set(method.active(t))
        linear = most - (most - least) * min(t, horizon) / horizon
        assert abs(len(active) - linear) <= 0.5
        assert method.blocks_at(t) == len(active)
        assert active == {*range(warmup), *range(count - (len(active) - warmup), count)}
        assert active <= before
        before = active
    assert method.blocks_at(0) == most
    assert method.blocks_at(horizon) == least


@pytest.mark.parametrize(
    ("options", "found"),
    [({"n_min": 1}, "n_min 1"), ({"n_max": 7}, "n_max 7"), ({"n_min": 5, "n_max": 4}, "n_min 5"), ({"warmup": 2}, "2")],
)
def test_numbers_of_blocks_that_do_not_fit(options: dict[str, int], found: str) -> None:
    model = lively("llama", blocks=BLOCKS)
    with pytest.raises(ModelError, match=rf"warmup \+ 1 <= n_min <= n_max <= the model's 6 blocks; found.*{found}"):
        skip(**options).attach(model)
    assert "forward" not in model.model.layers[0].__dict__


@torch.no_grad()
def by_masks(model: T.LlamaForCausalLM, method: SkipDecode, ids: Tensor, prompt: int) -> Tensor:
    """Logits with every block run on all tokens, its inactive ones masked as keys and put back as queries."""
    body, length = model.model, ids.shape[1]
    hidden = body.embed_tokens(ids)
    positions = torch.arange(length)[None]
    rotary = body.rotary_emb(hidden, positions)
    for index, block in enumerate(body.layers):
        active = torch.tensor([index in method.active(0 if t < prompt else t) for t in range(length)])
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & (active[None] | torch.eye(length).bool())
        out = block(hidden, attention_mask=allowed[None, None], position_embeddings=rotary, position_ids=positions)
        hidden = torch.where(active[None, :, None], out, hidden)
    return model.lm_head(body.norm(hidden))


@PROMPT
def test_equals_a_reference_that_masks_instead_of_skipping(prompt: Any) -> None:
    model, method, ids = lively("llama", blocks=BLOCKS), skip(prompt=prompt), rows(2, 16)
    method.check(BLOCKS)
    first = 5 if prompt == "max" else 0
    expected = by_masks(model, method, ids, first)
    with method.on(model), method.prompts(torch.full((2,), 5)), torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


@ON
@PROMPT
def test_cached_decoding_equals_recomputation_and_layers_hold_what_ran(family: str, prompt: Any) -> None:
    model, method, ids = lively(family, blocks=BLOCKS), skip(prompt=prompt), rows(3, 5)
    with method.on(model):
        out = generate(model, ids, return_dict_in_generate=True, output_logits=True)
        spent = method.cost()
        with method.prompts(torch.full((3,), 5)), torch.no_grad():
            whole = model(input_ids=out.sequences, use_cache=False).logits
        found = torch.stack(out.logits, dim=1)
        assert torch.allclose(found, whole[:, 4:-1], atol=1e-5 * float(whole.abs().max()))
        ran = [method.active(0 if prompt == "max" and t < 5 else t) for t in range(13)]
        for index, layer in enumerate(out.past_key_values.layers):
            assert layer.columns.tolist() == [t for t in range(13) if index in ran[t]]
            assert layer.seen == 13
            assert layer.keys is None or layer.keys.shape[-2] == len(layer.columns)
        assert spent.done == 3 * sum(len(active) for active in ran)
        assert spent.full == 3 * 13 * BLOCKS


@ON
@PROMPT
def test_a_batch_padded_on_the_left_equals_its_rows_alone(family: str, prompt: Any) -> None:
    model, method = lively(family, blocks=BLOCKS), skip(prompt=prompt)
    ids, mask = prompts()
    kept = {"return_dict_in_generate": True, "output_logits": True}
    with method.on(model):
        together = generate(model, ids, mask, **kept)
        for number, (row, keep) in enumerate(zip(ids, mask, strict=True)):
            alone = generate(model, row[keep.bool()][None], **kept)
            assert torch.equal(alone.sequences[0, -9:], together.sequences[number, -9:])
            for ours, theirs in zip(alone.logits, together.logits, strict=True):
                assert torch.allclose(ours[0], theirs[number], atol=1e-3)


@ON
def test_a_batch_padded_on_the_right_equals_its_rows_alone(family: str) -> None:
    model, method = lively(family, blocks=BLOCKS), skip()
    ids, mask = rows(2, 14), torch.ones(2, 14, dtype=torch.long)
    ids[1, 6:], mask[1, 6:] = PAD, 0
    with method.on(model), torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
        assert torch.allclose(found[1, :6], model(input_ids=ids[1:, :6]).logits[0], atol=1e-3)
        assert torch.allclose(found[0], model(input_ids=ids[:1]).logits[0], atol=1e-3)


@ON
def test_beams_and_assisted_decoding_equal_what_they_compute(family: str) -> None:
    model, method = lively(family, blocks=BLOCKS), skip()
    ids, mask = prompts()
    with method.on(model):
        for beams in (1, 3):
            cached = generate(model, ids, mask, num_beams=beams)
            assert torch.equal(cached, generate(model, ids, mask, num_beams=beams, use_cache=False))
        only = ids[:1]
        greedy = generate(model, only, max_new_tokens=14)
        kept = {"return_dict_in_generate": True, "max_new_tokens": 14, "min_new_tokens": None}
        assisted = generate(model, only, assistant_model=lively(family, seed=0, blocks=1), **kept)
        assert torch.equal(assisted.sequences, greedy)
        length = assisted.past_key_values.get_seq_length()
        for index, layer in enumerate(assisted.past_key_values.layers):
            assert layer.columns.tolist() == [t for t in range(length) if index in method.active(t)]


def test_a_prompt_in_chunks_and_a_second_turn() -> None:
    model, ids = lively("llama", blocks=BLOCKS), rows(2, 9)
    with skip().on(model):
        kept = {"return_dict_in_generate": True, "output_logits": True}
        whole = generate(model, ids, **kept)
        chunked = generate(model, ids, prefill_chunk_size=4, **kept)
        for ours, theirs in zip(chunked.logits, whole.logits, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()))
        again = torch.cat([whole.sequences, rows(2, 3, seed=1)], dim=1)
        fresh = generate(model, again, max_new_tokens=3, min_new_tokens=3)
        longer = generate(model, again, past_key_values=whole.past_key_values, max_new_tokens=3, min_new_tokens=3)
        assert torch.equal(longer, fresh)
    with skip(prompt="max").on(model), pytest.raises(ModelError, match="cannot tell prompt from answer"):
        generate(model, ids, prefill_chunk_size=4)


@ON
@PROMPT
def test_it_trains_with_the_same_sets_and_checkpointing_changes_nothing(family: str, prompt: Any) -> None:
    model, method, ids = lively(family, blocks=BLOCKS), skip(n_max=4, prompt=prompt), rows(2, 14)
    labels = ids.clone()
    labels[0, :5] = labels[1, :3] = -100
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with method.on(model.train()):
            model(input_ids=ids, labels=labels).loss.backward()
        results.append({n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()})
        model.zero_grad()
    for name, plain in results[0].items():
        other = results[1][name]
        assert (plain is None) == (other is None)
        assert plain is None or torch.allclose(plain, other, atol=1e-5 * float(plain.abs().max().clamp_min(1)))
    still = {name for name, grad in results[0].items() if grad is None or not bool(grad.any())}
    never = {name for name in results[0] if any(f".{index}." in name for index in (1, 2))}
    assert never <= still, "blocks 1 and 2 of 6 run at no position when n_max is 4"
    assert any(".5." in name for name in set(results[0]) - still)


def test_prompts_of_training_are_the_tokens_before_the_first_label() -> None:
    model, method, ids = lively("llama", blocks=BLOCKS), skip(prompt="max"), rows(2, 14)
    labels = ids.clone()
    labels[0, :5] = labels[1, :9] = -100
    with method.on(model), torch.no_grad():
        found = model(input_ids=ids, labels=labels, use_cache=False).logits
        with method.prompts(torch.tensor([5, 9])):
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, found)
        for row, length in ((0, 5), (1, 9)):
            generated = model(input_ids=ids[row : row + 1, :length], use_cache=True)
            for t in range(length, 14):
                generated = model(
                    input_ids=ids[row : row + 1, t : t + 1],
                    position_ids=torch.tensor([[t]]),
                    past_key_values=generated.past_key_values,
                )
            assert torch.allclose(generated.logits[0, 0], found[row, -1], atol=1e-3)
        said = generate(model, ids[:, :5])
        with method.prompts(torch.tensor([5, 5])):
            assert torch.equal(generate(model, ids[:, :5]), said)
        with pytest.raises(ModelError, match="cannot tell prompt from answer"):
            model(input_ids=ids, use_cache=False)
    with method.on(model), pytest.raises(ModelError, match="cannot tell prompt from answer"):
        model(input_ids=ids)


def test_with_an_adapter_on_top() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(lively("llama", blocks=BLOCKS), config)
    ids, mask = prompts()
    plain = generate(model, ids, mask)
    method = skip()
    with method.on(model):
        cheap = generate(model, ids, mask)
        assert torch.equal(cheap, generate(model, ids, mask, use_cache=False))
        assert not torch.equal(cheap, plain)
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        assert any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)
    assert torch.equal(generate(model, ids, mask), plain)


def test_eager_attention_equals_sdpa() -> None:
    model = lively("llama", blocks=BLOCKS)
    ids, mask = prompts()
    with skip().on(model):
        expected = generate(model, ids, mask)
        model.set_attn_implementation("eager")
        assert torch.equal(generate(model, ids, mask), expected)


def test_what_it_cannot_run_is_named() -> None:
    model, ids = lively("llama", blocks=BLOCKS), rows(2, 6)
    with skip().on(model):
        with pytest.raises(ModelError, match="begin anew in the middle"):
            model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
        with pytest.raises(ModelError, match="of another kind"):
            generate(model, ids, cache_implementation="static")
        T.AttentionInterface.register(
            "test_flat_mask", lambda m, q, k, v, _, **kw: sdpa_attention_forward(m, q, k, v, None)
        )
        T.AttentionMaskInterface.register("test_flat_mask", lambda *args, **kwargs: torch.ones(2, 6))
        model.set_attn_implementation("test_flat_mask")
        with pytest.raises(ModelError, match="mask that cannot be cut"):
            generate(model, ids)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    sliding = T.MistralForCausalLM(T.MistralConfig(vocab_size=64, num_key_value_heads=2, sliding_window=3, **size))
    with pytest.raises(ModelError, match=r"full attention.*DynamicSlidingWindowLayer"):
        skip(n_max=4).attach(sliding)
