"""What is special to sparse AdamW: the mask, in whatever form it is given, and that nothing outside of it moves."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.contracts.test_optimizers import advance, loss_of, train
from tests.zoo import FAMILIES, batch, checkpoint, same, tiny
from tunesmith import catalog
from tunesmith.core.entries import Entries
from tunesmith.core.entryspace import task_head
from tunesmith.core.meters import state_bytes
from tunesmith.core.part import Use, check_combination
from tunesmith.core.sparse import SparseDelta
from tunesmith.errors import CheckpointError, ModelError, RecipeError, TunesmithError
from tunesmith.optimizers.sparse_adamw import SparseAdamW


def mask_of(model: nn.Module, folder: Path, share: float = 0.1, only: str = "", seed: int = 0) -> Path:
    """A random mask over all weights but the head, which is whole; some tensors have no entry."""
    g, head = torch.Generator().manual_seed(seed), task_head(model)
    entries = {}
    for name, p in model.named_parameters():
        chosen = (torch.rand(p.numel(), generator=g) < share).nonzero()[:, 0]
        if name not in head and only in name and len(chosen):
            entries[name] = Entries.of(torch.zeros(p.shape), chosen)
    whole = {name: model.get_parameter(name).detach() for name in head}
    return SparseDelta(entries, dict.fromkeys(entries, 0), whole).save(folder / f"mask-{seed}.safetensors")


def build(model: nn.Module, mask: Path | None, lr: float = 1e-2, weight_decay: float = 0.0, **more: Any) -> SparseAdamW:
    given = {"mask": None if mask is None else str(mask), **more}
    return SparseAdamW(SparseAdamW.groups(model, weight_decay=weight_decay, **given), lr, **given)


@pytest.mark.parametrize("family", FAMILIES)
def test_outside_of_the_mask_no_bit_changes(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    before, mask = checkpoint(model), mask_of(model, tmp_path)
    delta = SparseDelta.load(mask)
    optimizer = build(model, mask, weight_decay=0.5)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(delta) | set(delta.whole)
    for _ in range(3):
        advance(optimizer, loss_of(model, batch(family)))
    after, moved, used = checkpoint(model), 0, 0
    for name, p in model.named_parameters():
        changed = (after[name] != before[name]).flatten()
        if name in delta.whole:
            assert changed.float().mean() > 0.9
            continue
        inside = torch.zeros(p.numel(), dtype=torch.bool)
        if name in delta:
            inside[delta[name].indices.long()] = True
        assert not (changed & ~inside).any(), name
        moved, used = moved + int((changed & inside).sum()), used + int(inside.sum())
    assert moved > 0.5 * used


def test_is_adamw_with_masked_gradients_and_masked_decay(tmp_path: Path) -> None:
    """Against dense matrices of zeros and ones, in float64."""
    model = tiny("llama")
    mask = mask_of(model, tmp_path, only="mlp")
    delta = SparseDelta.load(mask)
    grids = {n: Entries(e.shape, e.indices, torch.ones(len(e))).dense().double() for n, e in delta.items()}
    W = {n: model.get_parameter(n).detach().double().clone() for n in delta}
    M, V = ({n: torch.zeros_like(w) for n, w in W.items()} for _ in range(2))
    optimizer = build(model, mask, lr=0.01, weight_decay=0.3)
    for k in range(1, 5):
        loss_of(model, batch("llama", seed=k))().backward()
        for name in delta:
            G = model.get_parameter(name).grad.double() * grids[name]
            M[name], V[name] = 0.9 * M[name] + 0.1 * G, 0.999 * V[name] + 0.001 * G**2
            size = 0.01 * (1 - 0.999**k) ** 0.5 / (1 - 0.9**k)
            W[name] = W[name] - size * M[name] / (V[name].sqrt() + 1e-8)
            W[name] = W[name] - 0.01 * 0.3 * W[name] * grids[name]
        optimizer.step()
        optimizer.zero_grad()
    for name, expected in W.items():
        assert torch.allclose(model.get_parameter(name).double(), expected, atol=1e-5), name


def test_a_mask_of_everything_is_plain_adamw(tmp_path: Path) -> None:
    plain, masked = tiny("llama"), tiny("llama")
    optimizers = [build(plain, None), build(masked, mask_of(masked, tmp_path, share=1.1))]
    for _ in range(3):
        for model, optimizer in zip((plain, masked), optimizers, strict=True):
            advance(optimizer, loss_of(model, batch("llama")))
    for name, p in plain.named_parameters():
        assert torch.allclose(masked.get_parameter(name), p, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("l1", [0.0, 0.5])
def test_state_is_12_bytes_per_entry(dtype: torch.dtype, l1: float, tmp_path: Path) -> None:
    model = tiny("llama").to(dtype)
    mask = mask_of(model, tmp_path)
    optimizer = build(model, mask, l1=l1)
    advance(optimizer, loss_of(model, batch("llama")))
    k = SparseDelta.load(mask).count
    assert state_bytes(optimizer) == optimizer.state_formula() == (12 + (dtype.itemsize if l1 else 0)) * k


@pytest.mark.parametrize("masked", [True, False])
def test_l1_pulls_back_to_the_start(masked: bool, tmp_path: Path) -> None:
    """Against the gradient of l1 / N sum |theta - theta_0| by autograd, of a frozen-in loss gradient."""
    model = tiny("llama", torch_dtype=torch.float32)
    mask = mask_of(model, tmp_path, only="mlp") if masked else None
    numbers = sum(p.numel() for p in model.parameters())
    optimizer = build(model, mask, l1=numbers * 0.01)
    start = checkpoint(model)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    for step in range(3):
        given = {n: torch.randn(start[n].shape, generator=torch.Generator().manual_seed(step)) for n in names}
        for name, grad in given.items():
            model.get_parameter(name).grad = grad.clone()
        values = {n: model.get_parameter(n).detach().clone().requires_grad_() for n in names}
        (0.01 * sum((v - start[n]).abs().sum() for n, v in values.items())).backward()
        optimizer.step()
        for name, p in ((n, model.get_parameter(n)) for n in names):
            expected = given[name] + values[name].grad
            places = optimizer.state[p].get("indices")
            expected = expected.flatten() if places is None else expected.flatten()[places.long()]
            found = p.grad.flatten() if places is None else p.grad.flatten()[places.long()]
            assert torch.allclose(found, expected, atol=1e-6), (step, name)
    strong, weak = tiny("llama"), tiny("llama")
    for other, l1 in ((strong, numbers * 1.0), (weak, 0.0)):
        optimizer = build(other, None, l1=l1)
        for _ in range(10):
            advance(optimizer, loss_of(other, batch("llama")))
    distance = [sum(float((t - start[n]).abs().sum()) for n, t in checkpoint(m).items()) for m in (strong, weak)]
    assert distance[0] < 0.7 * distance[1]


def test_a_bound_on_the_norm_is_of_the_masks_gradient(tmp_path: Path) -> None:
    model, plain = tiny("llama"), tiny("llama")
    mask = mask_of(model, tmp_path)
    delta = SparseDelta.load(mask)
    optimizer = build(model, mask)
    for each in (model, plain):
        for _ in range(2):  # two micro-batches
            loss_of(each, batch("llama"))().backward()
    inside = torch.cat([plain.get_parameter(n).grad.flatten()[e.indices.long()] for n, e in delta.items()])
    found = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1e9)
    assert float(found) == pytest.approx(float(inside.norm()), rel=1e-5)
    del optimizer
    gc.collect()
    model.zero_grad()
    loss_of(model, batch("llama"))().backward()
    assert all((p.grad != 0).float().mean() > 0.5 for n, p in model.named_parameters() if "proj" in n)


def test_per_layer_and_trainer_give_the_same_weights(tmp_path: Path) -> None:
    results = []
    for per_layer in (False, True):
        model = tiny("llama")
        options = {"mask": str(mask_of(model, tmp_path)), "per_layer": per_layer}
        train(catalog.get("sparse-adamw"), model, tmp_path / str(per_layer), 3, options=options)
        results.append(checkpoint(model))
    assert same(*results)


@pytest.mark.parametrize("l1", [0.0, 100.0])
def test_a_resumed_trainer_with_a_mask_gives_the_same_bits(l1: float, tmp_path: Path) -> None:
    part, models = catalog.get("sparse-adamw"), [tiny("llama") for _ in range(3)]
    options = {"mask": str(mask_of(models[0], tmp_path)), "l1": l1}
    train(part, models[0], tmp_path / "whole", 4, options=options)
    train(part, models[1], tmp_path / "parts", 2, options=options)
    train(part, models[2], tmp_path / "parts", 4, resume=True, options=options)
    assert same(checkpoint(models[0]), checkpoint(models[2]))


def test_a_state_of_another_mask_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    other = copy.deepcopy(model)
    first = build(model, mask_of(model, tmp_path, only="mlp"))
    advance(first, loss_of(model, batch("llama")))
    second = build(other, mask_of(other, tmp_path, only="mlp", seed=1))
    with pytest.raises(TunesmithError, match=r"other entries of 'model.layers.0.mlp"):
        second.load_state_dict(first.state_dict())


def test_a_tied_tensor_may_go_by_either_name(tmp_path: Path) -> None:
    model = tiny("gpt2")
    before = model.lm_head.weight.detach().clone()
    entries = {"lm_head.weight": Entries.of(torch.zeros(before.shape), torch.tensor([5, 9]))}
    mask = SparseDelta(entries, {"lm_head.weight": 0}).save(tmp_path / "mask.safetensors")
    optimizer = build(model, mask)
    advance(optimizer, loss_of(model, batch("gpt2")))
    assert (model.transformer.wte.weight != before).flatten().nonzero()[:, 0].tolist() == [5, 9]


def test_masks_that_do_not_fit(tmp_path: Path) -> None:
    model = tiny("llama")
    mask = mask_of(model, tmp_path, only="mlp")
    with pytest.raises(ModelError, match=r"'model.layers.0.mlp.*has no such tensor"):
        build(tiny("gpt2"), mask)
    with pytest.raises(ModelError, match=r"shape \(48, 32\).*has \(64, 32\)"):
        build(tiny("llama", intermediate_size=64), mask)
    with pytest.raises(ModelError, match="has a frozen one"):
        build(tiny("llama").requires_grad_(False), mask)
    with pytest.raises(TunesmithError, match=r"parameter 0 of group 0.*give named parameters"):
        SparseAdamW(tiny("llama").parameters(), mask=str(mask))
    with pytest.raises(CheckpointError, match="nowhere"):
        build(tiny("llama"), tmp_path / "nowhere")


def test_adapters_and_shards_are_refused() -> None:
    use = Use(catalog.get("sparse-adamw"), {"per_layer": True})
    for setting in ("fsdp", "ddp", "gradient-accumulation", "gradient-clipping"):
        with pytest.raises(RecipeError, match="sparse-adamw cannot run here"):
            check_combination([use], {setting: "it is on"})
    with pytest.raises(RecipeError, match="weights under an adapter are frozen"):
        check_combination([use, Use(catalog.get("dylora"), {})], {})


def test_masked_parameters_can_be_asked_for(tmp_path: Path) -> None:
    model = tiny("llama")
    mask = mask_of(model, tmp_path, only="mlp")
    found: dict[nn.Parameter, Tensor] = dict(build(model, mask).masked())
    assert {id(p) for p in found} == {id(model.get_parameter(n)) for n in SparseDelta.load(mask)}
