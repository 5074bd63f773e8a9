"""Aged AdamW: torch's AdamW where all entries are of one age, and its own age for each where they are not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tunesmith.optimizers.aged_adamw import AgedAdamW


def gradients(steps: int, shape: tuple[int, ...]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g) for _ in range(steps)]


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_of_one_age_it_is_adamw(decay: float) -> None:
    ours, theirs = (nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    one = AgedAdamW([ours], lr=0.1, weight_decay=decay)
    other = torch.optim.AdamW([theirs], lr=0.1, weight_decay=decay)
    for grad in gradients(6, (3, 4)):
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        one.step()
        other.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_an_entry_that_begins_anew_goes_as_one_that_just_began() -> None:
    old, new = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    one, other = AgedAdamW([old], lr=0.1), AgedAdamW([new], lr=0.1)
    grads = gradients(5, (2,))
    for grad in grads[:3]:
        old.grad = grad
        one.step()
    state = one.state[old]
    state["step"] = torch.tensor([3.0, 0.0])
    state["exp_avg"][1], state["exp_avg_sq"][1], old.data[1] = 0.0, 0.0, 0.0
    for grad in grads[3:]:
        old.grad, new.grad = grad.clone(), grad[1:].clone()
        one.step()
        other.step()
    assert torch.equal(old[1:], new)
    assert state["step"].tolist() == [5.0, 2.0]


def test_a_loaded_state_goes_on_bit_for_bit_also_for_bfloat16() -> None:
    def fresh() -> tuple[nn.Parameter, AgedAdamW]:
        p = nn.Parameter(torch.ones(300, dtype=torch.bfloat16))
        return p, AgedAdamW([p], lr=0.1)

    p, through = fresh()
    q, stopped = fresh()
    for grad in gradients(3, (300,)):
        p.grad, q.grad = grad.bfloat16(), grad.bfloat16()
        through.step()
        stopped.step()
    for state in (through.state[p], stopped.state[q]):
        state["step"] = torch.arange(300.0) + 257
    r, resumed = fresh()
    r.data.copy_(q)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    assert torch.equal(resumed.state[r]["step"], torch.arange(300.0) + 257)
    for grad in gradients(2, (300,)):
        p.grad, r.grad = grad.bfloat16(), grad.bfloat16()
        through.step()
        resumed.step()
    assert torch.equal(p, r)
