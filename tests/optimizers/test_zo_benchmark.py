"""What is special to the zeroth-order benchmark: estimators, updates, masks, units and the hybrid."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.contracts.test_optimizers import train
from tests.zoo import FAMILIES, batch, checkpoint, same, tiny
from tunesmith import catalog
from tunesmith.core.directions import Directions
from tunesmith.core.masks import Mask, smaller_shares
from tunesmith.core.meters import saved_bytes, state_bytes
from tunesmith.core.optimizer import Closure
from tunesmith.core.seeds import seed_of
from tunesmith.core.tangents import derivative, reduced
from tunesmith.core.units import standings
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.optimizers.mezo import MeZO
from tunesmith.optimizers.zo_benchmark import ZOBenchmark

ESTIMATORS = ("central", "one-sided", "forward-gradient")
UPDATES = ("sgd", "sign", "scalar-sign", "momentum", "adam", "conservative")


def loss_of(model: nn.Module, inputs: dict[str, Any]) -> Closure:
    return lambda: model(**inputs).loss


def direction(seed: int, *shapes: tuple[int, ...], **options: Any) -> list[Tensor]:
    """z itself: what is added to zeros."""
    zeros = [nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in shapes]
    Directions([{"params": zeros}], noise="cpu", **options).add_(seed, 1.0)
    return [p.detach() for p in zeros]


# Estimators and updates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_is_mezo_bit_for_bit(dtype: torch.dtype) -> None:
    results = []
    for kind in (MeZO, ZOBenchmark):
        model = tiny("llama").to(dtype)
        optimizer = kind(kind.groups(model, weight_decay=0.1), lr=1e-2, eps=1e-2, samples=2, seed=3)
        losses = [float(optimizer.step(loss_of(model, batch("llama")))) for _ in range(3)]
        results.append((losses, checkpoint(model)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


def height(x: Tensor, y: Tensor) -> Tensor:
    return (x**3).sum() + (2 * y).sin().prod()


def slope_of(estimator: str, x: Tensor, y: Tensor, z: list[Tensor], eps: float) -> float:
    here, ahead = height(x, y), height(x + eps * z[0], y + eps * z[1])
    behind = height(x - eps * z[0], y - eps * z[1])
    if estimator == "central":
        return float(ahead - behind) / (2 * eps)
    if estimator == "one-sided":
        return float(ahead - here) / eps
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    grads = torch.autograd.grad(height(x, y), (x, y))
    return float(sum((g * d).sum() for g, d in zip(grads, z, strict=True)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("update", UPDATES)
def test_steps_are_the_published_ones(estimator: Any, update: Any) -> None:
    """Three steps of two directions in float64 against the equations, with z taken from the keys of the run."""
    g = torch.Generator().manual_seed(1)
    at = [torch.randn(3, 4, generator=g, dtype=torch.float64), torch.rand(5, generator=g, dtype=torch.float64) + 0.2]
    a, b = (nn.Parameter(t.clone()) for t in at)
    decay = 0.0 if update == "conservative" else 0.1
    lr, eps = 0.01, 1e-3
    optimizer = ZOBenchmark(
        [{"params": [a], "weight_decay": decay}, {"params": [b], "lr": 0.02}],
        lr=lr,
        estimator=estimator,
        update=update,
        samples=2,
        seed=5,
        momentum=0.8,
        betas=(0.7, 0.95),
        adam_eps=1e-4,
        block_size=5,
    )
    first, second = ([torch.zeros_like(t) for t in at] for _ in range(2))
    for step in range(3):
        returned = optimizer.step(lambda: height(a, b).detach() if estimator != "forward-gradient" else height(a, b))
        assert returned is not None
        assert float(returned) == pytest.approx(float(height(*at)), abs=0.05)
        zs = [direction(seed_of(5, "mezo", step, sample), (3, 4), (5,), block_size=5) for sample in range(2)]
        slopes = [slope_of(estimator, *at, z, eps) for z in zs]
        if update == "scalar-sign":
            slopes = [math.copysign(1.0, s) for s in slopes]
        mean = [sum(c * z[i] for c, z in zip(slopes, zs, strict=True)) / 2 for i in range(2)]
        rates, moved = (lr, 0.02), []
        if update == "conservative":
            tried = [[t - s * r * m for t, r, m in zip(at, rates, mean, strict=True)] for s in (0, 1, -1)]
            at = min(tried, key=lambda pair: float(height(*pair)))
            moved = at
        for i, (t, m, rate) in enumerate(zip(at, mean, rates, strict=True)):
            if update == "conservative":
                break
            if update == "sign":
                m = m.sign()
            if update == "momentum":
                m = first[i] = 0.8 * first[i] + m
            if update == "adam":
                first[i] = 0.7 * first[i] + 0.3 * m
                second[i] = 0.95 * second[i] + 0.05 * m**2
                m = first[i] / (1 - 0.7 ** (step + 1))
                m = m / ((second[i] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-4)
            moved.append((1 - rate * (decay if i == 0 else 0.0)) * t - rate * m)
        at = moved
        tolerance = 1e-4 if update == "adam" else 1e-5
        assert torch.allclose(a, at[0], atol=tolerance)
        assert torch.allclose(b, at[1], atol=tolerance)
        with torch.no_grad():  # a difference loses digits; do not let steps amplify it
            a.copy_(at[0])
            b.copy_(at[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_gradient_is_the_gradients_slope(family: str) -> None:
    """Through fused attention and tied weights, one pass, and nothing is left behind."""
    model, inputs = tiny(family), batch(family)
    directions = Directions([{"params": list(model.parameters())}])
    model(**inputs).loss.backward()
    z = nn.ParameterList(torch.zeros_like(p) for p in model.parameters())
    Directions([{"params": list(z)}]).add_(7, 1.0)
    pairs = [(p.grad, d) for p, d in zip(model.parameters(), z, strict=True) if p.grad is not None]
    expected = float(sum((g.double() * d.detach().double()).sum() for g, d in pairs))
    before, noise, calls = checkpoint(model), torch.get_rng_state(), []

    def closure() -> Tensor:
        calls.append(1)
        return model(**inputs).loss

    loss, slope = directions.derivative(closure, 7)
    assert slope == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert len(calls) == 1
    assert float(loss) == pytest.approx(model(**inputs).loss.item(), rel=1e-5)
    assert same(before, checkpoint(model))
    assert torch.equal(noise, torch.get_rng_state())
    with forward_ad.dual_level():
        assert all(forward_ad.unpack_dual(p).tangent is None for p in model.parameters())


def test_tensors_that_share_memory_share_their_tangent() -> None:
    a = nn.Parameter(torch.ones(4))
    b = nn.Parameter(a.detach())
    (z,) = direction(3, (4,))
    _, slope = Directions([{"params": [a, b]}]).derivative(lambda: (a * b**2).sum(), 3)
    assert slope == pytest.approx(3 * float(z.sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_forward_gradient_in_other_dtypes_and_blocks(dtype: torch.dtype) -> None:
    p, q = nn.Parameter(torch.ones(7, 5, dtype=dtype)), nn.Parameter(torch.ones(6, 4, dtype=dtype).T)
    z = [nn.Parameter(torch.zeros(7, 5)), nn.Parameter(torch.zeros(6, 4).T)]
    Directions([{"params": z}], block_size=3).add_(2, 1.0)
    _, slope = Directions([{"params": [p, q]}], block_size=3).derivative(lambda: p.sum() + 2 * q.sum(), 2)
    assert slope == pytest.approx(float(z[0].sum() + 2 * z[1].sum()), abs=0.2 if dtype is torch.bfloat16 else 1e-5)


class NoTangent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * 2


def test_what_has_no_forward_derivative_is_said() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = ZOBenchmark([p], estimator="forward-gradient")
    with pytest.raises(TunesmithError, match=r"forward-mode derivative.*missing.*eager"):
        optimizer.step(lambda: NoTangent.apply(p).sum())
    with pytest.raises(TunesmithError, match="take a finite difference"):
        optimizer.step(lambda: (p > 0.5).float().mean())
    with pytest.raises(RuntimeError, match="must match the size"):
        optimizer.step(lambda: (p + torch.ones(4)).sum())
    assert torch.equal(p, torch.ones(3))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_loss_that_is_not_finite_is_left_out_and_counted(estimator: Any) -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = ZOBenchmark([p], lr=0.1, weight_decay=0.5, estimator=estimator, update="adam")
    with pytest.warns(UserWarning, match=r"step 0.*1 so far"):
        optimizer.step(lambda: p.sum() * math.nan)
    assert torch.allclose(p, torch.ones(4), atol=1e-6)
    assert optimizer.skipped == 1
    optimizer.step(lambda: p.sum())
    assert not torch.allclose(p, torch.ones(4), atol=1e-3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_restore_keeps_every_bit(estimator: Any, dtype: torch.dtype) -> None:
    model, inputs = tiny("llama").to(dtype), batch("llama")
    before = checkpoint(model)
    for update in ("sgd", "conservative"):
        optimizer = ZOBenchmark(
            model.parameters(), lr=0.0, eps=1e-2, samples=2, estimator=estimator, update=update, restore="exact"
        )
        for _ in range(2):
            optimizer.step(loss_of(model, inputs))
        for group in optimizer.param_groups:  # the tries move and come back
            group["lr"] = 1e-3
        optimizer.estimate(loss_of(model, inputs))
        assert same(before, checkpoint(model))


def test_exact_restore_keeps_few_numbers() -> None:
    p = nn.Parameter(0.02 * torch.randn(20_000, generator=torch.Generator().manual_seed(0)))
    directions = Directions([{"params": [p]}])
    for path in ([(1, 1e-3), (1, -1e-3)], [(1, 1e-3), (1, -1e-3), (1, -1e-3), (1, 1e-3)]):
        assert 0 < sum(len(values) for _, _, values in directions._astray(path)) < 0.2 * len(p)


def test_conservative_never_raises_the_loss_where_sgd_does() -> None:
    reached = {}
    for update in ("sgd", "conservative"):
        model, inputs = tiny("llama"), batch("llama")
        optimizer = ZOBenchmark(model.parameters(), lr=3e-2, update=update, restore="exact")
        losses = []
        for _ in range(12):
            optimizer.step(loss_of(model, inputs))
            losses.append(model(**inputs).loss.item())
        reached[update] = max(after - before for before, after in itertools.pairwise(losses))
    assert reached["conservative"] <= 1e-6
    assert reached["sgd"] > 1e-2


def test_conservative_takes_the_opposite_way_or_stays() -> None:
    p = nn.Parameter(torch.ones(4))
    start, seen = p.detach().clone(), []

    def closure(best: str) -> Closure:
        def run() -> Tensor:
            seen.append(p.detach().clone())
            # The estimate's two sides say that the loss rises along z, whatever is true afterwards.
            tried = {"stay": (0, 1, 1), "opposite": (1, 1, 0), "nan": (math.nan, 1, 2)}[best]
            return torch.tensor([1.0, 0.999, *tried][len(seen) - 1])

        return run

    for best in ("stay", "opposite", "nan"):
        seen.clear()
        with torch.no_grad():
            p.copy_(start)
        ZOBenchmark([p], lr=0.1, update="conservative").step(closure(best))
        ahead, behind = seen[3] - start, seen[4] - start
        assert torch.allclose(ahead, -behind, atol=1e-6)
        expected = {"stay": torch.zeros(4), "opposite": behind, "nan": ahead}[best]
        assert torch.allclose(p - start, expected, atol=1e-6)


def test_conservative_refuses_what_would_break_its_promise() -> None:
    model = tiny("llama")
    for options in ({"weight_decay": 0.1}, {"first_order": 1}):
        with pytest.raises(TunesmithError, match="no step raises the loss"):
            ZOBenchmark(ZOBenchmark.groups(model, **options), update="conservative", **options)


# Masks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_as_much_is_masked_as_was_asked(share: float) -> None:
    (z,), (full,) = direction(1, (400, 300), mask=Mask(5, share)), direction(1, (400, 300))
    assert float((z == 0).double().mean()) == pytest.approx(share, abs=0.01)
    assert torch.equal(z[z != 0], full[z != 0])
    (other,) = direction(1, (400, 300), mask=Mask(6, share))
    both = float(((z == 0) & (other == 0)).double().mean())
    assert both == pytest.approx(share**2, abs=0.01), "masks of other seeds are independent"
    (again,) = direction(2, (400, 300), mask=Mask(5, share))
    assert torch.equal(again == 0, z == 0), "the mask does not depend on the direction"
    kept = full[z != 0]
    assert abs(float(kept.std()) - 1) < 0.02, "nor on its numbers"
    twins = direction(1, (400, 300), (400, 300), mask=Mask(5, share), block_size=60_000)
    pieces = [half == 0 for twin in twins for half in twin.view(2, -1)]
    for one, two in itertools.combinations(pieces, 2):
        assert float((one & two).double().mean()) == pytest.approx(share**2, abs=0.01), "no two blocks are alike"


def test_a_masked_run_moves_the_same_numbers_until_it_is_resampled() -> None:
    p = nn.Parameter(torch.zeros(2000))
    optimizer = ZOBenchmark([p], lr=1e-3, sparsity=0.7, resample_steps=3, restore="exact")
    moved = []
    for _ in range(7):
        before = p.detach().clone()
        optimizer.step(lambda: (p.detach() + 1).square().sum())
        moved.append(p.detach() != before)
    assert all(torch.equal(moved[0], m) for m in moved[1:3])
    assert all(torch.equal(moved[3], m) for m in moved[4:6])
    assert not torch.equal(moved[0], moved[3])
    assert not torch.equal(moved[3], moved[6])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.floats(0, 0.999), st.booleans(), st.integers(0, 99))
def test_shares_of_the_smallest_are_exact(sizes: list[int], share: float, coarse: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(n, generator=g) * 10.0 ** (3 * i - 4) for i, n in enumerate(sizes)]
    if coarse:
        tensors = [t.round() for t in tensors]
    every = torch.cat(tensors).abs().sort().values
    expected = {i: 0.0 for i in range(len(sizes))}
    if len(every):
        quantile = every[int(share * len(every))]
        expected = {i: float((t.abs() < quantile).double().sum()) / max(len(t), 1) for i, t in enumerate(tensors)}
    found = smaller_shares({i: t.split(13) for i, t in enumerate(tensors)}, share)
    assert found == pytest.approx(expected)


def test_masks_by_magnitude_leave_out_small_tensors_and_keep_the_total() -> None:
    small, large = (
        nn.Parameter(torch.full((3000,), 1e-3)),
        nn.Parameter(torch.randn(3000, generator=torch.Generator().manual_seed(0))),
    )
    zero = nn.Parameter(torch.zeros(10))
    optimizer = ZOBenchmark([small, large, zero], lr=1e-3, sparsity=0.6, sparsity_by="magnitude", restore="exact")
    starts = [p.detach().clone() for p in (small, large, zero)]

    def closure() -> Tensor:
        return sum((p.detach() + 1).square().sum() for p in (small, large, zero))

    with pytest.warns(UserWarning, match="2 of 3 tensors"):
        optimizer.step(closure)
    still = [float((p.detach() == s).double().mean()) for p, s in zip((small, large, zero), starts, strict=True)]
    assert still[0] == still[2] == 1.0
    assert still[1] == pytest.approx(0.2, abs=0.03)
    saved = optimizer.state_dict()
    resumed = ZOBenchmark([small, large, zero], sparsity=0.6, sparsity_by="magnitude", resample_steps=5)
    resumed.load_state_dict(saved)
    assert resumed.state["run"]["shares"] == optimizer.state["run"]["shares"]


# Units ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unit", ["block", "module", "linear"])
def test_units_divide_every_model(family: str, unit: Any) -> None:
    model = tiny(family)
    names = {name: standing.unit for name, standing in standings(model, unit).items()}
    inside = {u for n, u in names.items() if ".0." in n or ".1." in n} - {"below", "above"}
    stacks = 2 if family == "t5" else 1
    if unit != "linear":
        assert len(inside) == 2 * stacks * (2 if unit == "module" else 1)
    layers = {n.removesuffix(".weight") for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    if unit == "linear":
        assert {u for u in names.values() if u in layers} == {n for n in layers if f"{n}.weight" in names}
        assert all(names[f"{n}.bias"] == n for n in layers if f"{n}.bias" in names and f"{n}.weight" in names)
    groups = ZOBenchmark.groups(model, unit=unit)
    optimizer = ZOBenchmark(groups, unit=unit, lr=1e-4)
    assert len(optimizer._sweep()) == len(set(names.values()))
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        return model(**batch(family)).loss

    before = checkpoint(model)
    optimizer.step(closure)
    assert len(calls) == optimizer.passes() == 2 * len(set(names.values()))
    after = checkpoint(model)
    assert all(
        not torch.equal(before[n], after[n]) for n, p in model.named_parameters() if p.grad is None and p.dim() > 1
    )


def test_an_adapters_layer_is_one_unit() -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    groups = ZOBenchmark.groups(model, unit="linear")
    assert [len(group["params"]) for group in groups] == [2] * 4
    assert [group["unit"].split(".")[-1] for group in groups] == ["q_proj", "v_proj"] * 2
    with pytest.raises(ModelError, match="no numbered blocks"):
        ZOBenchmark.groups(nn.Linear(3, 3), unit="block")
    for options in ({"unit": "block"}, {"first_order": 1}):
        with pytest.raises(TunesmithError, match=r"ZOBenchmark\.groups"):
            ZOBenchmark(model.parameters(), **options)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("update", ["sgd", "conservative"])
def test_each_unit_is_measured_alone_where_the_one_before_has_gone(estimator: Any, update: Any) -> None:
    parts = [nn.Parameter(torch.ones(6, dtype=torch.float64)) for _ in range(3)]
    groups = [{"params": [p], "unit": str(i)} for i, p in enumerate(parts)]
    optimizer = ZOBenchmark(
        groups, lr=0.01, estimator=estimator, update=update, samples=2, unit="block", restore="exact"
    )
    seen: list[list[Tensor]] = []

    def closure() -> Tensor:
        seen.append([p.detach().clone() for p in parts])
        return sum((p**2).sum() for p in parts)

    optimizer.estimate(closure)
    assert len(seen) == optimizer.passes()
    each = len(seen) // 3
    for number in range(3):
        for point in seen[number * each : (number + 1) * each]:
            changed = [not torch.equal(t, torch.ones(6, dtype=torch.float64)) for t in point]
            assert all(changed[:number])
            assert not any(changed[number + 1 :])
    assert torch.equal(parts[2], torch.ones(6, dtype=torch.float64)), "the last one waits for step()"
    optimizer.step()
    moves = [1 - p.detach() for p in parts]
    assert all(bool(m.any()) for m in moves)
    cosine = torch.cosine_similarity(moves[0], moves[1], dim=0)
    assert abs(float(cosine)) < 0.999, "units of equal shape have directions of their own"


# Hybrid ---------------------------------------------------------------------------------------------------------------


def test_the_top_blocks_follow_their_gradient_and_the_rest_does_not() -> None:
    for family in ("llama", "gpt2", "t5"):
        model, inputs = tiny(family), batch(family)
        names = {name for name, standing in standings(model, "model", 1).items() if standing.top}
        stack = {"llama": "model.layers.1", "gpt2": "transformer.h.1", "t5": "decoder.block.1"}[family]
        assert {n for n in names if ".0." in n or ".1." in n} == {n for n, _ in model.named_parameters() if stack in n}
        assert not {n for n in names if "embed" in n or "wte" in n or "shared" in n or "encoder" in n}
        assert any("norm" in n or "ln_f" in n for n in names)
        model(**inputs).loss.backward()
        expected = {n: p.detach() - 0.5 * 0.02 * p.grad for n, p in model.named_parameters() if n in names}
        model.zero_grad()
        optimizer = ZOBenchmark(
            ZOBenchmark.groups(model, first_order=1), lr=0.02, first_order=1, first_order_ratio=0.5, block_size=100
        )
        before = checkpoint(model)
        optimizer.step(loss_of(model, inputs))
        for name, p in model.named_parameters():
            if name in names:
                assert torch.allclose(p, expected[name], atol=1e-7), name
            elif p.dim() > 1:
                assert not torch.equal(p, before[name]), name
            assert p.requires_grad
            assert p.grad is None


def test_a_hybrid_keeps_activations_of_the_top_alone() -> None:
    model, inputs = tiny("llama", num_hidden_layers=4), batch("llama")
    kept = []
    for top in (1, 2, 3):
        optimizer = ZOBenchmark(ZOBenchmark.groups(model, first_order=top), lr=0.0, first_order=top)
        with saved_bytes(model) as saved:
            optimizer.step(loss_of(model, inputs))
        kept.append(saved.bytes)
    with saved_bytes(model) as whole:
        model(**inputs).loss.backward()
    assert kept[0] < kept[1] < kept[2] < whole.bytes
    assert optimizer.passes() == 3


def test_a_hybrid_says_where_it_cannot_be() -> None:
    model, inputs = tiny("llama"), batch("llama")
    with pytest.raises(ModelError, match="has 2 blocks"):
        ZOBenchmark.groups(model, first_order=2)
    optimizer = ZOBenchmark(ZOBenchmark.groups(model, first_order=1), first_order=1)

    def closure() -> Tensor:
        with torch.no_grad():
            return model(**inputs).loss

    with pytest.raises(TunesmithError, match="switched gradients off"):
        optimizer.step(closure)
    assert all(p.requires_grad for p in model.parameters())
    plain = ZOBenchmark(ZOBenchmark.groups(model, first_order=1), lr=1e-2, first_order=1)
    with pytest.warns(UserWarning, match="gives no slope"):
        plain.step(lambda: model(**inputs).loss * math.nan)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


# State and Trainer ----------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "momentum": {"update": "momentum", "estimator": "one-sided"},
    "adam": {"update": "adam", "samples": 2},
    "forward": {"estimator": "forward-gradient", "unit": "block"},
    "sparse": {"sparsity": 0.5, "sparsity_by": "magnitude", "resample_steps": 2, "unit": "linear"},
    "hybrid": {"first_order": 1, "update": "adam", "first_order_ratio": 0.1},
    "conservative": {"update": "conservative"},
}


@pytest.mark.parametrize(
    ("update", "numbers"), [("sgd", 0), ("sign", 0), ("conservative", 0), ("momentum", 1), ("adam", 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_counted_and_goes_on_bitwise(update: Any, numbers: int, dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).to(dtype))
    q = nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(dtype).T)
    optimizer = ZOBenchmark([p, q], lr=1e-3, update=update, block_size=40, restore="exact")

    def loss(a: Tensor, b: Tensor) -> Closure:
        return lambda: a.detach().float().square().sum() + b.detach().float().square().sum()

    for _ in range(3):
        optimizer.step(loss(p, q))
    assert state_bytes(optimizer) == optimizer.state_formula() == 4 * numbers * (150 + 24)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    a, b = nn.Parameter(p.detach().clone()), nn.Parameter(q.detach().clone())
    resumed = ZOBenchmark([a, b], lr=1.0, update=update, block_size=40, restore="exact")
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        optimizer.step(loss(p, q))
        resumed.step(loss(a, b))
    assert torch.equal(p, a)
    assert torch.equal(q, b)


@pytest.mark.parametrize("name", ["forward", "sparse", "hybrid"])
def test_a_resumed_trainer_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    part, options = catalog.get("zo-benchmark"), VARIANTS[name]
    models = [tiny("llama") for _ in range(3)]
    for model, folder, steps, resume in zip(models, "abb", (3, 2, 3), (False, False, True), strict=True):
        train(part, model, tmp_path / folder, steps, resume=resume, options=options)
    assert same(checkpoint(models[0]), checkpoint(models[2]))
    assert not same(checkpoint(models[1]), checkpoint(models[2]))


@pytest.mark.parametrize("name", ["forward", "hybrid"])
def test_accumulated_batches_give_the_step_of_one_large_batch(name: str, tmp_path: Path) -> None:
    part, large, small = catalog.get("zo-benchmark"), tiny("llama"), tiny("llama")
    options = {**VARIANTS[name], "update": "sgd"}
    train(part, large, tmp_path / "large", 2, rows_per_batch=4, options=options)
    train(part, small, tmp_path / "small", 2, gradient_accumulation_steps=2, options=options)
    assert all(torch.allclose(p, q, atol=1e-4) for p, q in zip(large.parameters(), small.parameters(), strict=True))


def test_a_loss_reduced_over_processes_keeps_its_slope() -> None:
    p = nn.Parameter(torch.ones(3))
    doubled = lambda value: 2 * value.detach()  # noqa: E731  as a collective: it knows of no tangent
    loss, slope = derivative(lambda: reduced((p**2).sum(), doubled), [(p, torch.tensor([1.0, 0.0, 0.0]))])
    assert (float(loss), slope) == (6.0, 4.0)
    assert float(reduced(torch.tensor(3.0), doubled)) == 6.0


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)
    torch.save(_trained(rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _trained(rank: int, world: int) -> list[Tensor]:
    """Five steps of each variant over eight rows, every process with its own."""
    rows = torch.arange(1.0, 9.0, dtype=torch.float64).view(8, 1)[rank::world]
    found = []

    def mean(value: Tensor) -> Tensor:
        value = value.detach().clone()
        if world > 1:
            dist.all_reduce(value)
        return value / world

    for options in VARIANTS.values():
        if "first_order" in options:
            continue  # tests/train: its gradients are averaged by the Trainer
        p = nn.Parameter(torch.linspace(-1, 1, 30, dtype=torch.float64))
        groups = [{"params": [p], "unit": "0"}]
        optimizer = ZOBenchmark(groups, lr=1e-4, restore="exact", **options)

        def closure(p: nn.Parameter = p) -> Tensor:
            return reduced(((rows * p).sum(1) - rows[:, 0]).square().mean(), mean)

        for _ in range(5):
            optimizer.step(closure)
        found.append(p.detach())
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_make_the_steps_of_one(tmp_path: Path) -> None:
    mp.spawn(_process, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    torch.manual_seed(9)
    for a, b, alone in zip(first, second, _trained(0, 1), strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, alone, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(a, torch.linspace(-1, 1, 30, dtype=torch.float64), atol=1e-6)
