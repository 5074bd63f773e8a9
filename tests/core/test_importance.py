"""Scores of importance: their formulas, their state, and the completeness of a path's attribution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

from tunesmith.core.importance import Smoothed, path_attribution, sensitivity
from tunesmith.errors import TunesmithError


def test_sensitivity_is_the_weight_times_its_gradient() -> None:
    p = nn.Parameter(torch.tensor([2.0, -3.0]))
    (p.square().sum()).backward()
    assert sensitivity(p).tolist() == [8.0, 18.0]
    with pytest.raises(TunesmithError, match="between the backward pass and zero_grad"):
        sensitivity(nn.Parameter(torch.ones(1)))


def test_smoothing_is_that_of_peft() -> None:
    """peft's `RankAllocator` has the official formulas; it looks for parameters called lora_..."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A = nn.ParameterDict({"default": nn.Parameter(torch.randn(3, 4))})

    model, ours = Model(), Smoothed(0.85, 0.7)
    allocator = RankAllocator.__new__(RankAllocator)
    allocator.adapter_name, allocator.beta1, allocator.beta2 = "default", 0.85, 0.7
    allocator.reset_ipt()
    p = model.lora_A["default"]
    for _ in range(5):
        p.grad = torch.randn(3, 4)
        allocator.update_ipt(model)
        found = ours.update("A", sensitivity(p))
    assert torch.allclose(found, allocator._element_score("lora_A.default"), rtol=1e-6)


def test_smoothing_goes_on_from_its_state() -> None:
    values = [torch.rand(4) for _ in range(6)]
    whole, half = Smoothed(), Smoothed()
    for value in values:
        expected = whole.update("x", value)
    for value in values[:3]:
        half.update("x", value)
    again = Smoothed()
    again.load(half.state())
    for value in values[3:]:
        found = again.update("x", value)
    assert torch.equal(found, expected)


def loss(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(given["x"]), given["y"])


def test_attributions_add_up_to_the_change_of_the_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    stop = {n: p + 0.3 * torch.randn_like(p) for n, p in start.items()}
    batches = [{"x": torch.randn(8, 5), "y": torch.randn(8, 2)} for _ in range(2)]

    def at(weights: dict[str, Tensor]) -> float:
        found = [torch.func.functional_call(model, weights, (b["x"],)) for b in batches]
        return sum(float(F.mse_loss(y, b["y"])) for y, b in zip(found, batches, strict=True)) / 2

    total = at(stop) - at(start)
    errors = []
    for points in (10, 100):
        parts = path_attribution(model, start, stop, batches, loss=loss, points=points)
        assert {n: p.shape for n, p in parts.items()} == {n: p.shape for n, p in start.items()}
        errors.append(abs(float(sum(p.sum() for p in parts.values())) - total) / abs(total))
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 5, "the error falls with the number of points"
    assert all(torch.equal(p, start[n]) for n, p in model.named_parameters())
    assert model.training


def test_what_does_not_change_has_no_part_in_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    stop = {n: p + (0.1 if n.startswith("1.") else 0.0) for n, p in start.items()}
    parts = path_attribution(model, start, stop, [{"x": torch.randn(4, 3), "y": torch.ones(4, 1)}], loss=loss)
    assert not any(parts[n].any() for n in parts if n.startswith("0."))
    assert parts["1.weight"].any()


def test_nothing_to_attribute_to_is_a_clear_error() -> None:
    with pytest.raises(TunesmithError, match="at least one batch"):
        path_attribution(nn.Linear(1, 1), {}, {}, [])
    with pytest.raises(TunesmithError, match="different parameters"):
        path_attribution(nn.Linear(1, 1), {"a": torch.ones(1)}, {}, [{}])
