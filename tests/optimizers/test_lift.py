"""What is special to LIFT: which entries it chooses, and that nothing else moves."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.contracts.test_optimizers import advance, loss_of
from tests.zoo import FAMILIES, batch, checkpoint, same, tiny
from tunesmith.core.entryspace import EntrySpace, carried, change_, largest_places, task_head
from tunesmith.core.meters import grad_bytes, state_bytes
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.optimizers.lift import LIFT


def weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def gradients(p: Tensor, steps: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(7)
    return [torch.randn(p.shape, generator=g).to(p.dtype) for _ in range(steps)]


def brute(W: Tensor, r: int, K: int) -> list[int]:
    """Places of the K largest |W_r|, one comparison after another; of equal ones the first."""
    U, S, Vh = torch.linalg.svd(W.detach().flatten(1).float(), full_matrices=False)
    sizes = sum(
        (S[i] * torch.outer(U[:, i], Vh[i]) for i in range(min(r, len(S)))), torch.zeros(U.shape[0], Vh.shape[1])
    )
    listed = sizes.abs().flatten().tolist()
    return sorted(sorted(range(len(listed)), key=lambda i: (-listed[i], i))[:K])


def reference(W: Tensor, grads: list[Tensor], R: int, r: int, T: int, lr: float, decay: float) -> Tensor:
    """Algorithm in dense matrices of zeros and ones, float64."""
    W = W.detach().double().clone()
    K = min(R * sum(W.shape), W.numel())
    first, second, mask = torch.zeros_like(W), torch.zeros_like(W), None
    for k, grad in enumerate(grads):
        if mask is None or (k + 1) % T == 0:
            mask = torch.zeros(W.numel(), dtype=torch.float64)
            mask[brute(W.float(), r, K)] = 1
            mask = mask.view(W.shape)
            first, second = first * mask, second * mask
        G = grad.double() * mask
        first, second = 0.9 * first + 0.1 * G, 0.95 * second + 0.05 * G**2
        size = lr * (1 - 0.95 ** (k + 1)) ** 0.5 / (1 - 0.9 ** (k + 1))
        W = W - size * first / (second.sqrt() + 1e-6)
        W = W - lr * decay * W * mask
    return W


def run(p: nn.Parameter, grads: list[Tensor], **options: Any) -> LIFT:
    optimizer = LIFT([p], **options)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return optimizer


# Choosing -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 30))
def test_the_largest_are_exactly_so_many_and_of_equal_ones_the_first(values: list[int], count: int) -> None:
    count = min(count, len(values))
    found = largest_places(torch.tensor(values, dtype=torch.float32), count)
    assert found.tolist() == sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9), (6, 3, 2, 2)])
def test_the_mask_is_the_top_k_of_the_low_rank_weight(shape: tuple[int, ...]) -> None:
    for seed in range(5):
        p = weight(*shape, seed=seed)
        optimizer = run(p, [torch.zeros(shape)], rank=1, filter_rank=2)
        K = shape[0] + p[0].numel()
        assert optimizer.state[p]["indices"].dtype == torch.int32
        assert optimizer.state[p]["indices"].tolist() == brute(weight(*shape, seed=seed), 2, K)


def test_the_released_setting_would_take_the_smallest() -> None:
    """`lift_sparse` asks topk for the largest only if "largest" is in its name: the two masks share nothing here."""
    p = weight(20, 30)
    ours = set(run(p, [torch.zeros(20, 30)], rank=2, filter_rank=4).state[p]["indices"].tolist())
    U, S, Vh = torch.linalg.svd(p.detach(), full_matrices=False)
    sizes = (U[:, :4] * S[:4] @ Vh[:4]).abs().flatten()
    released = set(torch.topk(sizes, 100, largest="largest" in "lift_sparse").indices.tolist())
    assert len(ours) == len(released) == 100
    assert not ours & released
    assert sizes[list(ours)].min() > sizes[list(released)].max()


def test_nothing_filtered_is_choosing_by_magnitude() -> None:
    p = weight(12, 20)
    for filter_rank in (12, 500):
        found = run(p, [torch.zeros(12, 20)], rank=2, filter_rank=filter_rank).state[p]["indices"]
        assert found.tolist() == p.detach().abs().flatten().topk(64).indices.sort().values.tolist()


def test_the_randomised_svd_finds_the_same_weights_and_leaves_the_random_numbers_alone() -> None:
    g = torch.Generator().manual_seed(0)
    decaying = torch.linalg.qr(torch.randn(60, 40, generator=g))[0] * 0.5 ** torch.arange(40.0)
    W = decaying @ torch.linalg.qr(torch.randn(40, 40, generator=g))[0]
    before = torch.get_rng_state()
    found = []
    for svd in ("exact", "randomised", "randomised"):
        p = nn.Parameter(W.clone())
        found.append(run(p, [torch.zeros(60, 40)], rank=3, filter_rank=6, svd=svd).state[p]["indices"])
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(found[1], found[2])
    assert torch.isin(found[0], found[1]).float().mean() > 0.99
    # One that did not reduce the rank would find others.
    unfiltered = W.abs().flatten().topk(300).indices.int()
    assert torch.isin(found[0], unfiltered).float().mean() < 0.99


def test_more_than_there_are_is_all() -> None:
    p = weight(4, 6)
    optimizer = run(p, gradients(p, 1), rank=50, filter_rank=2)
    assert optimizer.state[p]["indices"].tolist() == list(range(24))
    with pytest.raises(TunesmithError, match=r"25 entries .* expected 1 to 24"):
        EntrySpace(p, 25, 32)


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = tiny("llama")
    optimizer = LIFT(LIFT.groups(model), **LIFT.brisk)
    name = "model.layers.1.mlp.up_proj.weight"
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = float("nan")
    with pytest.raises(TunesmithError, match=f"{name}.*not finite at step 0"):
        optimizer.step()


# Steps ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 10), st.integers(3, 10), st.integers(1, 3), st.integers(1, 4))
def test_follows_the_algorithm(m: int, n: int, r: int, period: int) -> None:
    p = weight(m, n, seed=m * n)
    grads = gradients(p, 7)
    expected = reference(p, grads, 1, r, period, 0.03, 0.1)
    run(p, grads, rank=1, filter_rank=r, period=period, lr=0.03, weight_decay=0.1)
    assert torch.allclose(p.double(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_entries_keep_their_bits_until_they_are_chosen(dtype: torch.dtype) -> None:
    p = weight(24, 16, dtype=dtype)
    start = p.detach().clone()
    optimizer = LIFT([p], rank=2, filter_rank=3, period=4, lr=0.1, weight_decay=0.1)
    for step, grad in enumerate(gradients(p, 3)):
        p.grad = grad
        optimizer.step()
        outside = torch.ones(p.numel(), dtype=torch.bool)
        outside[optimizer.state[p]["indices"].long()] = False
        assert torch.equal(p.flatten()[outside], start.flatten()[outside]), step
        assert (p.flatten()[~outside] != start.flatten()[~outside]).float().mean() > 0.9
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32


def test_moments_are_carried_over_where_the_masks_overlap() -> None:
    """Planted: between two steps the weight is replaced, so that half of the chosen entries stay."""
    p = nn.Parameter(torch.diag(torch.tensor([9.0, 8.0, 7.0, 6.0])) + 1e-3)
    optimizer = LIFT([p], lr=0.0, rank=1, filter_rank=4, period=2)
    p.grad = torch.arange(1.0, 17.0).view(4, 4)
    optimizer.step()
    state = optimizer.state[p]
    was = dict(zip(state["indices"].tolist(), state["exp_avg"].tolist(), strict=True))
    squares = dict(zip(state["indices"].tolist(), state["exp_avg_sq"].tolist(), strict=True))
    assert len(was) == 8
    with torch.no_grad():
        p.copy_(p.flip(1))
    p.grad = torch.zeros(4, 4)
    optimizer.step()
    assert state["step"] == 2
    new = state["indices"].tolist()
    assert 0 < len(set(new) & set(was)) < 8
    for place, mean, square in zip(new, state["exp_avg"].tolist(), state["exp_avg_sq"].tolist(), strict=True):
        assert mean == pytest.approx(0.9 * was.get(place, 0.0))
        assert square == pytest.approx(0.95 * squares.get(place, 0.0))


def test_carried_values_by_hand() -> None:
    old, new = torch.tensor([1, 4, 7], dtype=torch.int32), torch.tensor([0, 4, 5, 7, 9], dtype=torch.int32)
    assert carried(torch.tensor([1.0, 2.0, 3.0]), old, new).tolist() == [0, 2, 0, 3, 0]


def test_a_tensor_of_any_layout_is_changed_in_place() -> None:
    p = weight(2, 3, 4, 4).detach().to(memory_format=torch.channels_last)
    expected = p.clone(memory_format=torch.contiguous_format)
    expected.view(-1)[[5, 90]] += 1
    change_(p, torch.tensor([5, 90], dtype=torch.int32), lambda values: values + 1)
    assert not p.is_contiguous()
    assert torch.equal(p, expected)


# State ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 8])
def test_state_is_12_bytes_per_entry_and_4_more_or_6_less(bits: int) -> None:
    p = weight(300, 200)
    optimizer = run(p, gradients(p, 3), rank=10, filter_rank=8, period=2, bits=bits)
    K = 10 * 500
    moments = 8 * K if bits == 32 else 2 * (K + 4 * -(-K // 256))
    assert state_bytes(optimizer) == optimizer.state_formula() == moments + 4 * K


@pytest.mark.parametrize("bits", [32, 8])
def test_goes_on_bitwise_across_a_refresh(bits: int) -> None:
    p = weight(300, 200)
    options: dict[str, Any] = {"rank": 10, "filter_rank": 8, "period": 3, "bits": bits, "svd": "randomised"}
    grads = gradients(p, 6)
    optimizer = run(p, grads[:2], lr=0.1, **options)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    q = nn.Parameter(p.detach().clone())
    resumed = LIFT([q], lr=0.1, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for grad in grads[2:]:
        p.grad, q.grad = grad.clone(), grad.clone()
        optimizer.step()
        resumed.step()
    assert torch.equal(p, q)
    assert torch.equal(optimizer.state[p]["indices"], resumed.state[q]["indices"])


def test_per_layer_gives_the_same_weights_and_holds_one_gradient() -> None:
    given_, results = batch("llama"), []
    for per_layer in (False, True):
        model = tiny("llama")
        with grad_bytes(model) as peak:
            optimizer = LIFT(LIFT.groups(model), lr=1e-2, per_layer=per_layer, **LIFT.brisk)
            for _ in range(4):
                advance(optimizer, loss_of(model, given_))
        results.append((checkpoint(model), peak.bytes))
        optimizer.detach()
    assert same(results[0][0], results[1][0])
    assert results[1][1] == 32 * 48 * 4  # the largest that trains
    assert results[0][1] == 10 * results[1][1]  # of all that train; the frozen rest has none
    assert LIFT.refusals({"per_layer": True}).keys() == {"gradient-accumulation", "ddp", "gradient-clipping"}
    assert not LIFT.refusals({})


# On models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_only_linears_of_blocks_train_and_a_classifier(family: str) -> None:
    model = tiny(family)
    masked, *rest = LIFT.groups(model, weight_decay=0.1)
    outside = {name for group in rest for name, _ in group["params"]}
    assert (
        outside
        == ({"classifier.weight", "classifier.bias"} if family in ("bert", "vit") else set())
        == task_head(model)
    )
    assert {n for n, p in model.named_parameters() if p.requires_grad} == outside | {n for n, _ in masked["params"]}
    words = ("embed", "norm", "wte", "wpe", "lm_head", "ln_", "shared", "bias", "relative", "pooler")
    assert not [name for name, _ in masked["params"] if any(word in name for word in words)]
    everything = tiny(family)
    LIFT(LIFT.groups(everything, train_rest=True), **LIFT.brisk)
    assert all(p.requires_grad for p in everything.parameters())


def test_frozen_blocks_have_nothing_to_choose() -> None:
    model = tiny("llama")
    for name, p in model.named_parameters():
        p.requires_grad_("embed" in name)
    with pytest.raises(ModelError, match="none of them trains"):
        LIFT.groups(model)


def test_a_group_may_choose_otherwise() -> None:
    a, b, c, d = weight(8, 8), weight(8, 8), weight(8, 8), weight(8)
    groups = [{"params": [a, d]}, {"params": [b], "rank": 2}, {"params": [c], "rank": None}]
    optimizer = LIFT(groups, rank=1, filter_rank=2)
    for p in (a, b, c, d):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [optimizer.state[p]["exp_avg"].shape for p in (a, b, c, d)] == [(16,), (32,), (8, 8), (8,)]
