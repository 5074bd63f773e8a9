"""The prompt contract, for every part of the room on decoders, an encoder and an encoder-decoder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

import tunesmith
from tests.zoo import DECODERS, VOCABULARY, batch, checkpoint, logits, same, tiny
from tunesmith import catalog
from tunesmith.core.packing import Flatten
from tunesmith.core.part import Part
from tunesmith.core.prompt import Prompt
from tunesmith.errors import ModelError

OURS = [p for p in catalog.in_room("prompts") if "own-tuner" not in p.tags]
PROMPTS = pytest.mark.parametrize("part", OURS, ids=lambda p: p.slug)
TEXT = (*DECODERS, "bert", "t5")
ON = pytest.mark.parametrize("family", TEXT)
ON_DECODERS = pytest.mark.parametrize("family", DECODERS)
SIDES = pytest.mark.parametrize("side", ["left", "right"])
LENGTHS = (9, 5, 2)
WIDE = {"initializer_range": 0.3}
"""Weights large enough that different contexts give different tokens."""


def small(part: Part, **options: Any) -> dict[str, Any]:
    return {**({"num_virtual_tokens": 3} if "num_virtual_tokens" in part.options else {}), **options}


def prompted(part: Part, base: nn.Module, **options: Any) -> nn.Module:
    """The base with the prompt moved off its start, in evaluation mode."""
    return move(get_peft_model(copy.deepcopy(base), tunesmith.adapter(part.slug, **small(part, **options)))).eval()


def move(model: nn.Module, size: float = 0.3) -> nn.Module:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=g))
    return model


def rows() -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randint(3, VOCABULARY, (n,), generator=g) for n in LENGTHS]


def padded(side: str) -> dict[str, Tensor]:
    """The rows as one batch, padded with id 0."""
    width = max(LENGTHS)
    ids = torch.zeros(len(LENGTHS), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows()):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def endless(model: nn.Module) -> nn.Module:
    """Without an end token, so that every row is generated to the full length."""
    model.generation_config.eos_token_id = None
    return model


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> bool:
    return torch.allclose(a, b, atol=tolerance * float(b.abs().max()), rtol=0)


@ON
@PROMPTS
def test_zero_tokens_equal_the_base(part: Part, family: str) -> None:
    base, given = tiny(family), batch(family)
    model = get_peft_model(copy.deepcopy(base), tunesmith.adapter(part.slug, **part.target.neutral)).eval()
    assert torch.equal(logits(model, given), logits(base, given))
    if family in DECODERS:
        left = padded("left")
        assert torch.equal(logits(model, left), logits(base, left))


@ON
@PROMPTS
def test_logits_have_the_shape_of_the_input_and_change(part: Part, family: str) -> None:
    base, given = tiny(family), batch(family)
    found, expected = logits(prompted(part, base), given), logits(base, given)
    assert found.shape == expected.shape
    assert not close(found, expected, 1e-3)


@SIDES
@ON_DECODERS
@PROMPTS
def test_a_padded_batch_equals_its_rows_one_by_one(part: Part, family: str, side: str) -> None:
    model = prompted(part, tiny(family, **WIDE))
    given = padded(side)
    together = logits(model, given)
    for row, mask, alone in zip(together, given["attention_mask"], rows(), strict=True):
        assert close(row[mask.bool()], logits(model, {"input_ids": alone[None]})[0])


@PROMPTS
def test_a_padded_batch_of_an_encoder_equals_its_rows(part: Part) -> None:
    given = padded("right")
    bert = prompted(part, tiny("bert", **WIDE))
    t5 = prompted(part, tiny("t5", initializer_factor=1.0))
    start = torch.zeros(len(LENGTHS), 3, dtype=torch.long)
    together, targets = logits(bert, given), logits(t5, {**given, "decoder_input_ids": start})
    for i, alone in enumerate(rows()):
        assert close(together[i], logits(bert, {"input_ids": alone[None]})[0])
        assert close(targets[i], logits(t5, {"input_ids": alone[None], "decoder_input_ids": start[:1]})[0])
    with pytest.raises(ModelError, match="pad on the right"):
        logits(t5, {**padded("left"), "decoder_input_ids": start})


@ON_DECODERS
@PROMPTS
def test_generation_with_a_cache_equals_greedy_decoding_without(part: Part, family: str) -> None:
    model = endless(prompted(part, tiny(family, **WIDE)))
    given = padded("left")
    out = model.generate(
        **given, do_sample=False, max_new_tokens=8, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    ids, mask = given["input_ids"], given["attention_mask"]
    for step in range(8):
        scores = logits(model, {"input_ids": ids, "attention_mask": mask})[:, -1]
        assert close(out.logits[step], scores, 1e-4)
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    assert torch.equal(out.sequences, ids)
    assert len(set(ids[:, -8:].flatten().tolist())) > 3, "a model that repeats one token says nothing"


@ON_DECODERS
@PROMPTS
def test_a_batch_generates_what_its_rows_generate(part: Part, family: str) -> None:
    model = endless(prompted(part, tiny(family, **WIDE)))
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    together = model.generate(**padded("left"), **settings)
    for row, alone in zip(together, rows(), strict=True):
        assert torch.equal(row[-6:], model.generate(input_ids=alone[None], **settings)[0, -6:])
    beams = model.generate(**padded("left"), **settings, num_beams=3)
    assert beams.shape == together.shape


@PROMPTS
def test_an_encoder_decoder_generates_with_the_prompt_in_its_encoder(part: Part) -> None:
    base = tiny("t5")
    model = endless(prompted(part, base))
    given = padded("right")
    out = model.generate(**given, do_sample=False, max_new_tokens=6, output_logits=True, return_dict_in_generate=True)
    ids = torch.zeros(len(LENGTHS), 1, dtype=torch.long)
    for step in range(6):
        scores = logits(model, {**given, "decoder_input_ids": ids})[:, -1]
        assert close(out.logits[step], scores, 1e-4)
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(out.sequences, ids)
    decoder = [n for n, m in model.named_modules() if isinstance(m, Prompt) and ".decoder." in n]
    assert not decoder


@ON_DECODERS
@PROMPTS
def test_labels_are_those_of_the_input(part: Part, family: str) -> None:
    model = prompted(part, tiny(family))
    given = padded("left")
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    labels[:, :-2] = -100
    out = model(**given, labels=labels)
    expected = F.cross_entropy(out.logits[:, -3:-1].flatten(0, 1), labels[:, -2:].flatten())
    assert torch.allclose(out.loss, expected, atol=1e-6)


@ON
@PROMPTS
def test_gradients_reach_every_trainable_tensor_and_no_base_tensor(part: Part, family: str) -> None:
    model = prompted(part, tiny(family)).train()
    model(**batch(family)).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("tunesmith_prompts" in name for name in trained)
    assert {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())} == trained


@PROMPTS
def test_it_learns(part: Part) -> None:
    model = get_peft_model(tiny("llama"), tunesmith.adapter(part.slug, **small(part))).train()
    given = batch("llama")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(30):
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


@ON
@PROMPTS
def test_saved_and_reloaded_is_exact_and_holds_the_prompt_alone(part: Part, family: str, tmp_path: Path) -> None:
    base, given = tiny(family), batch(family)
    model = prompted(part, base)
    expected = logits(model, given)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), given), expected)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all("tunesmith_prompts" in name for name in saved)
    again = get_peft_model(copy.deepcopy(base), tunesmith.adapter(part.slug, **small(part))).eval()
    set_peft_model_state_dict(again, get_peft_model_state_dict(model))
    assert torch.equal(logits(again, given), expected)


@ON
@PROMPTS
def test_disabled_equals_base_and_unloaded_is_the_original(part: Part, family: str) -> None:
    base, given = tiny(family), batch(family)
    model = prompted(part, base)
    with model.disable_adapter():
        assert torch.equal(logits(model, given), logits(base, given))
    unloaded = model.unload()
    assert same(checkpoint(unloaded), checkpoint(base))
    assert torch.equal(logits(unloaded, given), logits(base, given))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in unloaded.modules())


@PROMPTS
def test_merging_is_refused(part: Part) -> None:
    with pytest.raises(ModelError, match="cannot be merged into weights"):
        prompted(part, tiny("llama")).merge_and_unload()


@PROMPTS
def test_two_prompts_are_switched(part: Part) -> None:
    model, given = prompted(part, tiny("llama")), batch("llama")
    first = logits(model, given)
    model.add_adapter("second", tunesmith.adapter(part.slug, **small(part)))
    model.set_adapter("second")
    second = logits(move(model, 1.0), given)
    assert not close(first, second, 1e-3)
    model.set_adapter("default")
    assert torch.equal(logits(model, given), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model, given), first)


@PROMPTS
def test_beside_an_adapter(part: Part) -> None:
    base, given = tiny("llama"), batch("llama")
    both = tunesmith.stack(tunesmith.adapter("ssf", std=0.0), tunesmith.adapter(part.slug, **small(part)))
    torch.manual_seed(3)
    stacked = get_peft_model(copy.deepcopy(base), both).eval()
    torch.manual_seed(3)
    alone = get_peft_model(copy.deepcopy(base), tunesmith.adapter(part.slug, **small(part))).eval()
    assert close(logits(stacked, given), logits(alone, given))


@PROMPTS
def test_deepcopy_is_independent(part: Part) -> None:
    model, given = prompted(part, tiny("t5")), batch("t5")
    before = logits(model, given)
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone, given), before)
    move(clone, 1.0)
    assert torch.equal(logits(model, given), before)
    assert not torch.equal(logits(clone, given), before)
    assert not any(m._forward_hooks for m in clone.unload().modules())
    assert torch.equal(logits(model, given), before)


@PROMPTS
def test_bf16_autocast_and_bf16_weights(part: Part) -> None:
    for cast in (False, True):
        base, given = tiny("llama"), batch("llama")
        model = prompted(part, base if cast else base.to(torch.bfloat16)).train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            loss = model(**given).loss
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in trained)


@PROMPTS
def test_activation_checkpointing_gives_the_same_gradients(part: Part) -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = prompted(part, tiny("llama")).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**batch("llama")).loss.backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-6)


@PROMPTS
def test_too_long_an_input_is_a_clear_error(part: Part) -> None:
    model = endless(prompted(part, tiny("gpt2", n_positions=12)))
    length = sum(m.length for m in model.modules() if isinstance(m, Prompt))
    fits = torch.full((1, 12 - length), 5)
    assert logits(model, {"input_ids": fits}).shape[1] == 12 - length
    with pytest.raises(ModelError, match=f"need 13 positions, {length} of them"):
        logits(model, {"input_ids": torch.full((1, 13 - length), 5)})
    with pytest.raises(ModelError, match="need 13 positions"):
        model.generate(input_ids=fits, max_new_tokens=3, do_sample=False, pad_token_id=0)


@PROMPTS
def test_trainable_count_is_what_trains(part: Part) -> None:
    model = prompted(part, tiny("llama"))
    counted = sum(m.trainable_count() for m in model.modules() if isinstance(m, Prompt))
    assert counted == model.get_nb_trainable_parameters()[0] > 0


@PROMPTS
def test_rates_name_own_parameters(part: Part) -> None:
    for made in (m for m in prompted(part, tiny("llama")).modules() if isinstance(m, Prompt)):
        assert set(made.lr_ratios()) <= {name for name, _ in made.named_parameters()}


@PROMPTS
def test_rows_laid_end_to_end_are_refused(part: Part) -> None:
    flat = Flatten()([{"input_ids": r.tolist(), "labels": r.tolist()} for r in rows()])
    assert "padding-free" in part.refuses
    with pytest.raises(ModelError, match="laid end to end"):
        prompted(part, tiny("llama"))(**flat)


@PROMPTS
def test_a_model_without_token_embedding_is_refused(part: Part) -> None:
    with pytest.raises(ModelError, match="ViTForImageClassification embeds none"):
        get_peft_model(tiny("vit"), tunesmith.adapter(part.slug, **small(part)))


@PROMPTS
def test_modules_to_save_train_and_are_saved(part: Part, tmp_path: Path) -> None:
    base, given = tiny("bert"), batch("bert")
    model = prompted(part, base)
    model = get_peft_model(
        copy.deepcopy(base), tunesmith.adapter(part.slug, modules_to_save=["classifier"], **small(part))
    )
    expected = logits(move(model), given)
    assert any("classifier" in n for n, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path), given), expected)
