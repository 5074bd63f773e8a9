"""SpIEL: which entries drop and grow, with which moments, and that nothing else moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import tunesmith
from tests.zoo import batch, tiny
from tunesmith.adapters.spiel import SpIEL
from tunesmith.core.adapter import Step, stacked
from tunesmith.core.layer import describe
from tunesmith.core.meters import grad_bytes, state_bytes
from tunesmith.errors import RecipeError, TunesmithError
from tunesmith.optimizers.aged_adamw import AgedAdamW

WIDTH, TOTAL = 8, 40


class Problem:
    """One linear layer with SpIEL, a loss, and the dense gradient by autograd beside it."""

    def __init__(self, optimizer: Any = AgedAdamW, **options: Any) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.W = self.module.weight.clone()
        self.made = SpIEL(describe(self.module, "layer"), **{"density": 0.25, "interval": 4, "window": 2, **options})
        self.layer = stacked(self.module, self.made.layer, [self.made])
        self.optimizer = optimizer([self.made.values], lr=0.05, weight_decay=0.0)
        self.gradients: list[Tensor] = []

    def step(self, number: int, micro: int = 1) -> None:
        here = Step(number, TOTAL, self.optimizer)
        SpIEL.begin([self.made], here)
        dense = torch.zeros_like(self.W)
        for part in range(micro):
            g = torch.Generator().manual_seed(100 * number + part)
            x, y = torch.randn(5, WIDTH, generator=g), torch.randn(5, WIDTH, generator=g)
            (self.layer(x) - y).square().mean().backward()
            changed = self.made.weight(self.W).detach().requires_grad_(True)
            (x @ changed.T - y).square().mean().backward()
            dense += changed.grad
        self.gradients.append(dense.flatten())
        self.optimizer.step()
        SpIEL.end([self.made], here)
        self.optimizer.zero_grad()


def reference(problem: Problem, share: float) -> tuple[set[int], set[int], set[int]]:
    """(kept, left unchanged though dropped, grown), by brute force from the dense gradients; the state before."""
    values = dict(zip(problem.made.indices.tolist(), problem.made.values.tolist(), strict=True))
    dropped = set(sorted(values, key=lambda i: (abs(values[i]), i))[: int(share * len(values))])
    first, second = problem.gradients[-2:]
    candidates = sorted(range(len(first)), key=lambda i: (-abs(float(first[i])), i))[: len(values)]
    total = first + second
    eligible = [i for i in candidates if i not in values or i in dropped]
    grown = set(sorted(eligible, key=lambda i: -abs(float(total[i])))[: len(dropped)])
    return set(values) - dropped, dropped & grown, grown - dropped


@pytest.mark.parametrize("first", [1.0, 0.5])
def test_drops_the_smallest_and_grows_where_the_gradient_is(first: float) -> None:
    problem = Problem(first=first)
    for number in range(3):
        problem.step(number)
    frozen = Problem(first=first, interval=100, window=2)  # the same run without a choice
    for number in range(4):
        frozen.step(number)
    before = dict(zip(frozen.made.indices.tolist(), frozen.made.values.tolist(), strict=True))
    kept, unchanged, grown = reference(frozen, first)
    problem.step(3)
    after = dict(zip(problem.made.indices.tolist(), problem.made.values.tolist(), strict=True))
    assert grown <= after.keys()
    assert kept | unchanged <= after.keys()
    assert len(after) == 16
    assert all(after[i] == 0.0 for i in grown)
    assert all(after[i] == before[i] for i in after.keys() - grown), "kept bit for bit"
    assert problem.made.indices.tolist() == sorted(problem.made.indices.tolist())


def test_a_place_that_dropped_is_the_base_again() -> None:
    problem = Problem()
    for number in range(9):
        problem.step(number)
    changed = problem.made.weight(problem.W)
    outside = torch.ones(WIDTH * WIDTH, dtype=torch.bool)
    outside[problem.made.indices.long()] = False
    assert torch.equal(changed.flatten()[outside], problem.W.flatten()[outside])


def test_grown_entries_begin_with_the_means_of_the_window() -> None:
    problem = Problem(first=0.5)
    for number in range(4):
        problem.step(number)
    first, second = problem.gradients[-2:]
    state = problem.optimizer.state[problem.made.values]
    new = (problem.made.values == 0).nonzero()[:, 0]
    assert len(new)
    places = problem.made.indices[new].long()
    assert torch.equal(state["step"][new], torch.full((len(new),), 2.0))
    old = (problem.made.values != 0).nonzero()[:, 0]
    assert torch.equal(state["step"][old], torch.full((len(old),), 4.0))
    mean = (first + second)[places] / 2
    square = (first.square() + second.square())[places] / 2
    torch.testing.assert_close(state["exp_avg"][new] / (1 - 0.9**2), mean, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(state["exp_avg_sq"][new] / (1 - 0.999**2), square, atol=1e-6, rtol=1e-3)


def test_kept_entries_take_their_moments_along() -> None:
    problem, still = Problem(first=0.5), Problem(interval=100)
    for number in range(4):
        problem.step(number)
        still.step(number)
    ours = dict(
        zip(problem.made.indices.tolist(), problem.optimizer.state[problem.made.values]["exp_avg"], strict=True)
    )
    theirs = dict(zip(still.made.indices.tolist(), still.optimizer.state[still.made.values]["exp_avg"], strict=True))
    kept = [i for i, v in zip(problem.made.indices.tolist(), problem.made.values.tolist(), strict=True) if v]
    assert kept
    assert all(torch.equal(ours[i], theirs[i]) for i in kept)


def test_micro_batches_name_the_candidates_by_the_first_and_sum_all() -> None:
    one, several = Problem(), Problem()
    for number in range(3):
        one.step(number)
        several.step(number, micro=2)
    first = one.made.sums["first"]
    both = several.made.sums["first"]
    assert first.shape == both.shape
    assert not torch.allclose(first, both)
    assert not torch.equal(one.made.candidates, torch.arange(16))


def test_with_torchs_adamw_the_bias_correction_gives_the_same_means() -> None:
    problem = Problem(torch.optim.AdamW, first=0.5)
    for number in range(4):
        problem.step(number)
    state = problem.optimizer.state[problem.made.values]
    new = (problem.made.values == 0).nonzero()[:, 0]
    mean = sum(problem.gradients[-2:])[problem.made.indices[new].long()] / 2
    torch.testing.assert_close(state["exp_avg"][new] / (1 - 0.9**4), mean, atol=1e-6, rtol=1e-4)


def test_the_share_decays_to_nothing_and_no_choice_falls_on_the_last_step() -> None:
    made = Problem().made
    shares = [made._share(Step(n, TOTAL)) for n in range(3, TOTAL, 4)]
    assert shares[0] == 1.0
    assert shares[1:] == pytest.approx([0.2 * (1 - n / TOTAL) for n in range(7, TOTAL, 4)])
    cosine = Problem(decay="cosine").made
    assert cosine._share(Step(20, 40)) == pytest.approx(0.1)
    problem = Problem(interval=2, window=1)
    for number in (36, 37, 38):
        problem.step(number)
    held = problem.made.indices.clone()
    problem.step(39)
    assert torch.equal(problem.made.indices, held)


def test_an_optimizer_is_needed_and_a_strange_one_is_named() -> None:
    problem = Problem(interval=1, window=1)
    SpIEL.begin([problem.made], Step(0, TOTAL))
    problem.layer(torch.ones(2, WIDTH)).sum().backward()
    with pytest.raises(TunesmithError, match="optimizer=optimizer"):
        SpIEL.end([problem.made], Step(0, TOTAL))
    strange = Problem(lambda p, lr, weight_decay: torch.optim.RMSprop(p, lr=lr), interval=1, window=1)
    with pytest.raises(TunesmithError, match="what RMSprop keeps of its entries"):
        strange.step(0)
    with pytest.raises(RecipeError, match="window=5"):
        Problem(interval=4, window=5)


def test_state_is_twelve_bytes_an_entry_and_no_dense_gradient_lives_on() -> None:
    model = get_peft_model(tiny("llama"), tunesmith.adapter("spiel", density=0.1, interval=2, window=1))
    values = [p for p in model.parameters() if p.requires_grad]
    optimizer = AgedAdamW(values)
    for number in range(3):
        with grad_bytes(model) as peak, tunesmith.step(model.train(), number, 10, optimizer):
            model(**batch("llama")).loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    k = sum(p.numel() for p in values)
    assert state_bytes(optimizer) == 12 * k
    assert peak.bytes == 4 * k
    assert all(p.grad is None for p in model.parameters())
