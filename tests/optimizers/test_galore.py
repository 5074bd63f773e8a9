"""What is special to GaLore, and to the AdamW with a gradient space that it is built on."""

from __future__ import annotations

import gc
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.contracts.test_optimizers import train
from tests.zoo import batch, checkpoint, same, tiny
from tunesmith import catalog
from tunesmith.core import gradspace
from tunesmith.core.meters import grad_bytes, state_bytes
from tunesmith.core.part import Use, check_combination
from tunesmith.core.schedule import Schedule
from tunesmith.errors import ModelError, RecipeError, TunesmithError
from tunesmith.optimizers.galore import GaLore

PROJECTIONS = ("std", "reverse_std", "left", "right", "full")


def weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def gradients(p: Tensor, steps: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(7)
    return [torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype) for _ in range(steps)]


def reference(
    W: Tensor, grads: list[Tensor], kind: str, rank: int, period: int, scale: float, lr: float, decay: float
) -> Tensor:
    """The released formulas in float64, side by side with nothing of ours."""
    W, (m, n) = W.detach().double().clone(), W.shape
    wide = m < n
    uses_left = {"std": wide, "reverse_std": not wide, "left": True, "right": False, "full": True}[kind]
    uses_right = {"std": not wide, "reverse_std": wide, "left": False, "right": True, "full": True}[kind]
    first = second = P = Q = None
    for k, grad in enumerate(grads):
        G = grad.double()
        if k % period == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            P = U[:, :rank] if uses_left else torch.eye(m, dtype=torch.float64)
            Q = Vh[:rank] if uses_right else torch.eye(n, dtype=torch.float64)
        R = P.T @ G @ Q.T
        first = 0.1 * R if first is None else 0.9 * first + 0.1 * R
        second = 0.001 * R**2 if second is None else 0.999 * second + 0.001 * R**2
        size = lr * (1 - 0.999 ** (k + 1)) ** 0.5 / (1 - 0.9 ** (k + 1))
        W = W - size * scale * (P @ (first / (second.sqrt() + 1e-6)) @ Q)
        W = W - lr * decay * W
    return W


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 12), st.integers(1, 4), st.sampled_from(PROJECTIONS))
def test_follows_the_published_formulas(m: int, n: int, rank: int, period: int, kind: Any) -> None:
    p, rank = weight(m, n, dtype=torch.float64), min(rank, m, n)
    grads = gradients(p, 6)
    expected = reference(p, grads, kind, rank, period, 0.25, 0.03, 0.1)
    optimizer = GaLore([p], lr=0.03, rank=rank, period=period, scale=0.25, proj_type=kind, weight_decay=0.1)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    assert torch.allclose(p, expected, atol=1e-10)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_state_has_the_shapes_of_the_side(shape: tuple[int, int], kind: Any) -> None:
    p, r = weight(*shape), 4
    optimizer = GaLore([p], rank=r, proj_type=kind)
    p.grad = gradients(p, 1)[0]
    optimizer.step()
    (m, n), state = shape, optimizer.state[p]
    left = {"std": m < n, "reverse_std": m >= n, "left": True, "right": False, "full": True}[kind]
    right = {"std": m >= n, "reverse_std": m < n, "left": False, "right": True, "full": True}[kind]
    assert ("left" in state, "right" in state) == (left, right)
    assert state["exp_avg"].shape == (r if left else m, r if right else n)
    assert state_bytes(optimizer) == optimizer.state_formula()


def test_the_side_is_not_guessed_from_the_projected_shape() -> None:
    """The released rule for reverse_std takes the left side when the projected gradient is no taller than wide."""
    p = weight(6, 10)
    optimizer = GaLore([p], lr=1.0, rank=6, scale=1.0, proj_type="reverse_std")
    p.grad = gradients(p, 1)[0]
    optimizer.step()
    state = optimizer.state[p]
    low = state["exp_avg"]
    assert low.shape[0] <= low.shape[1], "so the released rule would multiply the basis from the left"
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        state["right"] @ low
    assert torch.allclose(low, 0.1 * p.grad @ state["right"].T, atol=1e-6)


def test_a_rank_above_the_smaller_side_is_clipped_and_said() -> None:
    p = weight(6, 10)
    with pytest.warns(UserWarning, match=r"1 weights \(the first: \(6, 10\) with rank 50\)"):
        optimizer = GaLore([p], rank=50)
    p.grad = gradients(p, 1)[0]
    optimizer.step()
    assert optimizer.state[p]["left"].shape == (6, 6)


@pytest.mark.parametrize(("value", "word"), [(0.0, "zero"), (float("nan"), "not finite"), (float("inf"), "not finite")])
def test_a_bad_gradient_at_a_refresh_is_named(value: float, word: str) -> None:
    model = tiny("llama")
    optimizer = GaLore(GaLore.groups(model), rank=4)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    name = "model.layers.1.mlp.up_proj.weight"
    model.get_parameter(name).grad = torch.full_like(model.get_parameter(name), value)
    with pytest.raises(TunesmithError, match=f"{name}.*{word}"):
        optimizer.step()
    unnamed = weight(4, 4)
    unnamed.grad = torch.full_like(unnamed, value)
    with pytest.raises(TunesmithError, match="parameter 0 of group 0"):
        GaLore([unnamed], rank=2).step()


def test_a_sparse_gradient_is_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TunesmithError, match="sparse=False"):
        GaLore(embedding.parameters(), rank=2).step()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit"])
def test_only_weights_of_linear_layers_in_blocks_are_projected(family: str) -> None:
    model = tiny(family)
    projected, *rest = GaLore.groups(model, weight_decay=0.1)
    names = [name for name, _ in projected["params"]]
    assert names
    assert all(p.dim() == 2 for _, p in projected["params"])
    outside = [name for group in rest for name, _ in group["params"]]
    words = ("embed", "norm", "wte", "wpe", "lm_head", "classifier", "ln_", "shared", "bias", "relative")
    assert not [name for name in names if any(word in name for word in words)]
    linear = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert {f"{n}.weight" for n in linear} & set(outside) <= {
        "lm_head.weight",
        "classifier.weight",
        "bert.pooler.dense.weight",
    }
    assert all(group["rank"] is None for group in rest)
    assert projected["weight_decay"] == 0.1


def test_frozen_blocks_have_nothing_to_project() -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    for name, p in model.named_parameters():
        p.requires_grad_("embed" in name)
    with pytest.raises(ModelError, match="none of them trains"):
        GaLore.groups(model)


def test_a_group_may_have_its_own_rank() -> None:
    a, b, c = weight(8, 8), weight(8, 8), weight(8, 8)
    groups = [{"params": [a]}, {"params": [b], "rank": 2}, {"params": [c], "rank": None}]
    optimizer = GaLore(groups, rank=4)
    for p in (a, b, c):
        p.grad = gradients(p, 1)[0]
    optimizer.step()
    assert [optimizer.state[p]["exp_avg"].shape[1] for p in (a, b, c)] == [4, 2, 8]


def test_plain_groups_are_plain_adamw() -> None:
    """Against torch's AdamW with its eps where ours has it: negligible, and decay after the update."""
    p, q = weight(6, 5, dtype=torch.float64), weight(6, 5, dtype=torch.float64)
    ours = GaLore([{"params": [p], "rank": None}], lr=0.01, eps=0.0, weight_decay=0.0)
    torchs = torch.optim.AdamW([q], lr=0.01, eps=0.0, weight_decay=0.0)
    for grad in gradients(p, 5):
        p.grad, q.grad = grad.clone(), grad.clone()
        ours.step()
        torchs.step()
    assert torch.allclose(p, q, atol=1e-12)


def test_a_saved_state_has_no_more_than_the_bases() -> None:
    p = weight(256, 128)
    optimizer = GaLore([p], rank=4)
    p.grad = gradients(p, 1)[0]
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert len(file.getvalue()) < optimizer.state_formula() + 4000


def test_bf16_weights_keep_float32_moments_through_a_checkpoint() -> None:
    p, q = weight(64, 32, dtype=torch.bfloat16), weight(64, 32, dtype=torch.bfloat16)
    first, second = GaLore([p], rank=4), GaLore([q], rank=4)
    p.grad = gradients(p, 1)[0]
    first.step()
    second.load_state_dict(first.state_dict())
    for key, dtype in (("exp_avg", torch.float32), ("exp_avg_sq", torch.float32), ("right", torch.bfloat16)):
        assert second.state[q][key].dtype == dtype
        assert torch.equal(second.state[q][key], first.state[p][key])


class Alternate(Schedule):
    """The first layer trains at even steps, the second at odd ones."""

    def active(self, step: int) -> list[str]:
        return [name for name in self.eligible if f"layers.{step % 2}." in name]


def test_a_weight_that_comes_back_from_a_schedule_gets_a_fresh_projection() -> None:
    model, inputs = tiny("llama"), batch("llama")
    optimizer = GaLore(GaLore.groups(model), rank=4, period=100)
    schedule = Alternate()
    schedule.attach(model, optimizer)
    for step in range(4):
        schedule.begin_step(step)
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        held = [name for name, p in model.named_parameters() if p in optimizer.state]
        assert held
        assert all(f"layers.{step % 2}." in name for name in held)
        assert all(state["step"] == 1 for state in optimizer.state.values())


# Per layer ------------------------------------------------------------------------------------------------------------


def both_ways(**options: Any) -> tuple[nn.Module, nn.Module, GaLore, GaLore, dict[str, Any]]:
    plain, hooked = tiny("gpt2"), tiny("gpt2")
    first = GaLore(GaLore.groups(plain, weight_decay=0.1), lr=1e-2, rank=4, period=2, **options)
    second = GaLore(GaLore.groups(hooked, weight_decay=0.1), lr=1e-2, rank=4, period=2, per_layer=True, **options)
    return plain, hooked, first, second, batch("gpt2")


def test_per_layer_makes_the_same_steps_under_a_scheduler() -> None:
    plain, hooked, first, second, inputs = both_ways()
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)) for o in (first, second)]
    for _ in range(4):
        for model, optimizer in ((plain, first), (hooked, second)):
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
    assert same(checkpoint(plain), checkpoint(hooked))


def test_per_layer_frees_every_gradient_at_once() -> None:
    model, inputs = tiny("gpt2"), batch("gpt2")
    with grad_bytes(model) as peak:
        optimizer = GaLore(GaLore.groups(model), rank=4, per_layer=True)
        model(**inputs).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert peak.bytes == max(p.numel() for p in model.parameters()) * 4
    moved = checkpoint(model)
    optimizer.step()
    assert same(moved, checkpoint(model))


def test_per_layer_goes_on_after_loading_a_state() -> None:
    plain, hooked, first, second, inputs = both_ways()
    for model, optimizer in ((plain, first), (hooked, second)):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    second.load_state_dict(first.state_dict())
    second.param_groups[0]["lr"] = 0.0
    before = checkpoint(hooked)
    hooked(**inputs).loss.backward()
    projected = {name for name, _ in GaLore.groups(hooked)[0]["params"]}
    for name, tensor in checkpoint(hooked).items():
        assert torch.equal(tensor, before[name]) == (name in projected), name


def test_a_dropped_or_detached_optimizer_no_longer_trains() -> None:
    for drop in (True, False):
        model, inputs = tiny("llama"), batch("llama")
        optimizer: GaLore | None = GaLore(GaLore.groups(model), rank=4, per_layer=True)
        if drop:
            optimizer = None
            gc.collect()
        else:
            optimizer.detach()
        before = checkpoint(model)
        model(**inputs).loss.backward()
        assert same(before, checkpoint(model)), drop
    assert all(p.grad is not None for p in model.parameters()), "detached, gradients stay"


@pytest.mark.parametrize("setting", ["gradient-accumulation", "ddp", "fsdp", "gradient-clipping"])
def test_per_layer_refuses_what_needs_all_gradients(setting: str) -> None:
    part = catalog.get("galore")
    with pytest.raises(RecipeError, match=f"galore cannot run here \\(because {setting}\\)"):
        check_combination([Use(part, part.validate({"per_layer": True}))], {setting: f"because {setting}"})
    if setting != "fsdp":
        check_combination([Use(part, part.validate({}))], {setting: "x"})


def test_adapters_are_refused_before_a_model_is_loaded() -> None:
    galore, lora = (Use(part, part.validate({})) for part in (catalog.get("galore"), catalog.get("lora")))
    with pytest.raises(RecipeError, match="galore cannot be combined with lora: the weights under an adapter"):
        check_combination([galore, lora], {})


def test_per_layer_inside_the_trainer_follows_its_scheduler(tmp_path: Path) -> None:
    part, results = catalog.get("galore"), []
    for per_layer in (False, True):
        model = tiny("llama")
        options = {"per_layer": per_layer}
        train(part, model, tmp_path / str(per_layer), 3, options=options, lr_scheduler_type="linear")
        results.append(checkpoint(model))
    assert same(*results)


# 8-bit moments --------------------------------------------------------------------------------------------------------


def test_8_bit_moments_have_the_formulas_bytes_and_follow_the_32_bit_ones() -> None:
    p, q = weight(256, 128), weight(256, 128)
    full, coarse = GaLore([p], lr=1e-2, rank=32), GaLore([q], lr=1e-2, rank=32, bits=8)
    start = p.detach().clone()
    for grad in gradients(p, 5):
        p.grad, q.grad = grad.clone(), grad.clone()
        full.step()
        coarse.step()
    numbers = 256 * 32
    assert state_bytes(coarse) == coarse.state_formula() == 4 * 32 * 128 + 2 * (numbers + 4 * numbers // 256)
    assert coarse.state[q]["exp_avg"]["codes"].dtype == torch.uint8
    moved, apart = (p - start).norm(), (p - q).norm()
    assert 0 < apart < 0.05 * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_moments_go_on_bitwise_after_a_checkpoint(dtype: torch.dtype) -> None:
    p = weight(256, 128, dtype=dtype)
    optimizer = GaLore([p], rank=32, bits=8, period=3)
    grads = gradients(p, 6)
    for grad in grads[:3]:
        p.grad = grad
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    q = nn.Parameter(p.detach().clone())
    resumed = GaLore([q], rank=32, bits=8)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for grad in grads[3:]:
        p.grad, q.grad = grad, grad
        optimizer.step()
        resumed.step()
    assert torch.equal(p, q)


def test_8_bit_moments_without_bitsandbytes_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    gradspace._code.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(TunesmithError, match=r"tunesmith\[quant\]"):
        GaLore([weight(4, 4)], rank=2, bits=8)
