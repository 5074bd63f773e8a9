"""The adapter contract, for every part of the room on every family of models that it applies to."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import tunesmith
from tests.zoo import FAMILIES, batch, checkpoint, logits, same, tiny
from tunesmith import catalog
from tunesmith.core.adapter import Adapter, stacked
from tunesmith.core.layer import describe
from tunesmith.core.part import Part
from tunesmith.core.sparse_export import sparse_delta
from tunesmith.core.tuner_layer import TunesmithLayer
from tunesmith.errors import ModelError

OURS = [p for p in catalog.in_room("adapters") if "own-tuner" not in p.tags]
ADAPTERS = pytest.mark.parametrize("part", OURS, ids=lambda p: p.slug)
MERGING = pytest.mark.parametrize("part", [p for p in OURS if "mergeable" in p.tags], ids=lambda p: p.slug)
APART = pytest.mark.parametrize("part", [p for p in OURS if "mergeable" not in p.tags], ids=lambda p: p.slug)
ON = pytest.mark.parametrize("family", FAMILIES)


def adapted(part: Part, family: str, **options: object) -> tuple[nn.Module, nn.Module, dict]:
    """A base model, the same with the adapter prepared and moved off its start, and inputs."""
    base, given = tiny(family), batch(family)
    model = get_peft_model(copy.deepcopy(base), tunesmith.adapter(part.slug, **options))
    tunesmith.initialise(model, [given])
    return base, model.eval(), given


def move(model: nn.Module, size: float = 0.05) -> nn.Module:
    """Change every trainable tensor, as training would."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=g))
    return model


def ours(model: nn.Module) -> list[Adapter]:
    return [m for m in model.modules() if isinstance(m, Adapter)]


@ON
@ADAPTERS
def test_starts_at_the_base(part: Part, family: str) -> None:
    base, model, given = adapted(part, family, **part.target.neutral)
    expected = logits(base, given)
    assert torch.allclose(logits(model, given), expected, atol=1e-5 * float(expected.abs().max()))


@ON
@MERGING
def test_merged_equals_unmerged_and_keeps_names(part: Part, family: str) -> None:
    base, model, given = adapted(part, family)
    expected = logits(move(model), given)
    changed = (expected - logits(base, given)).abs().max()
    assert changed > 1e-3 * expected.std(), "the adapter must change the output for this test to say anything"
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged, given), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-5)
    new = set(merged.state_dict()) - set(base.state_dict())
    assert all(name.endswith("bias") for name in new), "merging may create biases and nothing else"


@APART
def test_what_cannot_be_merged_says_why(part: Part) -> None:
    base, model, given = adapted(part, "llama")
    expected = logits(move(model), given)
    assert not torch.equal(expected, logits(base, given))
    with pytest.raises(ModelError, match=r"cannot be merged: \w+"):
        model.merge_adapter()
    assert torch.equal(logits(model, given), expected)


@MERGING
def test_merge_and_unmerge_is_bit_exact(part: Part) -> None:
    base, model, _ = adapted(part, "gpt2")
    move(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert same(checkpoint(model.unload()), checkpoint(base))


@ON
@ADAPTERS
def test_saved_and_reloaded_is_exact(part: Part, family: str, tmp_path: Path) -> None:
    base, model, given = adapted(part, family)
    expected = logits(move(model), given)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded, given), expected)


@ON
@ADAPTERS
def test_disabled_equals_base_and_unloaded_is_the_original(part: Part, family: str) -> None:
    base, model, given = adapted(part, family)
    move(model)
    with model.disable_adapter():
        assert torch.equal(logits(model, given), logits(base, given))
    assert same(checkpoint(model.unload()), checkpoint(base))


@ON
@ADAPTERS
def test_gradients_reach_every_trainable_tensor_and_no_base_tensor(part: Part, family: str) -> None:
    _, model, given = adapted(part, family)
    seen: set[str] = set()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    # A method that trains a part of its tensors at a step reaches all of them over some steps.
    for number in range(40):
        with tunesmith.step(move(model, 0.01).train(), number, 40, optimizer):
            model(**given).loss.backward()
        seen |= {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        model.zero_grad()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert seen == trained
    assert trained, "an adapter has something to train"
    assert all("tunesmith_" in name for name in trained)


@ADAPTERS
def test_bf16_autocast_and_bf16_weights(part: Part) -> None:
    for cast in (False, True):
        base, given = tiny("llama"), batch("llama")
        base = base if cast else base.to(torch.bfloat16)
        model = get_peft_model(base, tunesmith.adapter(part.slug))
        tunesmith.initialise(model, [given])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast), tunesmith.step(model.train(), 0, 40):
            loss = model(**given).loss
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert grads
        assert all(bool(g.isfinite().all()) for g in grads)
        assert all(p.dtype == torch.float32 for a in ours(model) for p in a.parameters())


@ADAPTERS
def test_activation_checkpointing_gives_the_same_gradients(part: Part) -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        _, model, given = adapted(part, "llama")
        move(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        with tunesmith.step(model.train(), 3, 40):
            model(**given).loss.backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*results, strict=True):
        assert (plain is None) == (recomputed is None)
        assert plain is None or torch.allclose(plain, recomputed, atol=1e-6)


@ADAPTERS
def test_deepcopy_is_independent(part: Part) -> None:
    _, model, given = adapted(part, "llama")
    before = logits(model, given)
    clone = copy.deepcopy(model)
    move(clone)
    assert torch.equal(logits(model, given), before)
    assert not torch.equal(logits(clone, given), before)


@ADAPTERS
def test_two_adapters_are_switched(part: Part) -> None:
    _, model, given = adapted(part, "llama")
    first = logits(move(model), given)
    model.add_adapter("second", tunesmith.adapter(part.slug))
    model.set_adapter("second")
    tunesmith.initialise(model, [given])
    second = logits(move(model, 0.1), given)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model, given), first)


@ADAPTERS
def test_trainable_count_is_what_trains(part: Part) -> None:
    _, model, _ = adapted(part, "llama")
    counted = sum(a.trainable_count() for a in ours(model))
    assert counted == model.get_nb_trainable_parameters()[0] > 0


@MERGING
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(12, 8), (3, 12)),
        (nn.Linear(12, 8, bias=False), (2, 5, 12)),
        (nn.Conv2d(4, 8, 3, padding=1, stride=2), (2, 4, 8, 8)),
        (nn.Conv2d(4, 8, 3, groups=2), (2, 4, 8, 8)),
        (nn.Embedding(12, 8), None),
        (nn.LayerNorm(12), (3, 12)),
    ],
    ids=["linear", "linear without bias", "conv", "grouped conv", "embedding", "norm"],
)
def test_forward_agrees_with_weight_or_the_layer_is_refused(part: Part, module: nn.Module, shape: tuple | None) -> None:
    spec = describe(module, "layer")
    if spec.kind not in part.target.kinds:
        with pytest.raises(ModelError, match="layer"):
            part.target(spec, **_small(part))
        return
    adapter = part.target(spec, **_small(part))
    move(adapter, 0.3)
    adapter.eval()
    x = torch.randint(0, 12, (3, 4)) if shape is None else torch.randn(shape)
    below = stacked(module, spec, [])
    by_weight = below.apply(x, adapter.weight(below.weight), adapter.bias(below.bias))
    assert torch.allclose(adapter(x, below), by_weight, atol=1e-5)


def _small(part: Part) -> dict:
    options = {"rank": 2} if "rank" in part.options else {}
    return part.validate(options)


@ADAPTERS
def test_to_lora_is_the_change_of_the_original_weight(part: Part) -> None:
    _, model, _ = adapted(part, "gpt2")
    move(model)
    for layer in (m for m in model.modules() if isinstance(m, TunesmithLayer)):
        adapter = layer.active()[0]
        exported = adapter.to_lora()
        assert (exported is not None) == ("low-rank" in part.tags)
        if exported is not None:
            W = stacked(layer.get_base_layer(), layer.spec, []).weight
            B, A = exported
            assert torch.allclose(adapter.weight(W), W + B @ A, atol=1e-5)


@ON
@ADAPTERS
def test_a_sparse_change_exports_as_a_delta(part: Part, family: str) -> None:
    base, model, given = adapted(part, family)
    if "sparse" not in part.tags:
        with pytest.raises(ModelError, match="more than few entries"):
            sparse_delta(model)
        return
    expected = logits(move(model), given)
    size = float(expected.abs().max())
    assert not torch.allclose(expected, logits(base, given), atol=1e-4 * size)
    delta = sparse_delta(model)
    with delta.applied(base):
        assert torch.allclose(logits(base, given), expected, atol=1e-5 * size)
    assert 0 < delta.count < 0.5 * sum(p.numel() for p in base.parameters())


@ADAPTERS
def test_no_matching_layer_is_a_clear_error(part: Part) -> None:
    with pytest.raises(ModelError, match=r"nowhere.*q_proj"):
        get_peft_model(tiny("llama"), tunesmith.adapter(part.slug, target_modules=["nowhere"]))


@ADAPTERS
def test_modules_to_save_train_and_are_saved(part: Part, tmp_path: Path) -> None:
    base, given = tiny("bert"), batch("bert")
    config = tunesmith.adapter(part.slug, modules_to_save=["classifier"])
    model = get_peft_model(copy.deepcopy(base), config)
    tunesmith.initialise(model, [given])
    expected = logits(move(model), given)
    assert any("classifier" in n for n, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path), given), expected)
