"""The best set of tensors under a budget, against every set there is."""

from __future__ import annotations

import itertools
import random

import pytest

from tunesmith.core.knapsack import best_subset


def cost(chosen: list[int], own: list[int], passing: list[int]) -> int:
    return sum(own[k] for k in chosen) + sum(passing[min(chosen) :])


def brute_force(values: list[float], own: list[int], passing: list[int], budget: int) -> float | None:
    sets = [
        list(chosen)
        for size in range(1, len(values) + 1)
        for chosen in itertools.combinations(range(len(values)), size)
        if cost(list(chosen), own, passing) <= budget
    ]
    return max((sum(values[k] for k in chosen) for chosen in sets), default=None)


def instances(count: int, largest: int) -> list[tuple[list[float], list[int], list[int], int]]:
    rng = random.Random(0)
    found = []
    for _ in range(count):
        n = rng.randint(1, 9)
        own, passing = ([rng.randint(0, largest) for _ in range(n)] for _ in range(2))
        values = [rng.uniform(-0.3, 1) for _ in range(n)]
        found.append((values, own, passing, int(rng.random() * (sum(own) + sum(passing)))))
    return found


@pytest.mark.parametrize("largest", [3, 20, 10**12])
def test_as_good_as_every_set(largest: int) -> None:
    for values, own, passing, budget in instances(80, largest):
        chosen = best_subset(values, own, passing, budget)
        expected = brute_force(values, own, passing, budget)
        assert bool(chosen) == (expected is not None)
        if chosen:
            assert cost(chosen, own, passing) <= budget
            assert chosen == sorted(set(chosen))
            # The largest costs do not fit the table and are rounded; random values hardly ever tell.
            assert sum(values[k] for k in chosen) == pytest.approx(expected, abs=1e-9)


def test_few_states_keep_the_budget() -> None:
    for values, own, passing, budget in instances(80, 1000):
        chosen = best_subset(values, own, passing, budget, states=16)
        assert not chosen or cost(chosen, own, passing) <= budget
        expected = brute_force(values, own, passing, budget)
        assert bool(chosen) == (expected is not None), "one tensor alone is never rounded away"


def test_the_deepest_tensor_that_fits_is_tried() -> None:
    """The released search stops one short of it and finds 3."""
    assert best_subset([7, 1, 3], [1, 4, 4], [1, 2, 0], 8) == [0, 2]


def test_a_set_that_leaves_part_of_the_budget_can_be_extended() -> None:
    """The released search extends only sets whose cost is exactly that of the state, and finds 8 of 13."""
    assert best_subset([8, 7, 6, 8], [3, 0, 1, 2], [0, 1, 1, 3], 6) == [1, 2]


def test_without_a_value_above_zero_the_best_single_tensor() -> None:
    assert best_subset([-3, -1, -2], [1, 1, 1], [1, 1, 1], 9) == [1]
    assert best_subset([-3, -1, -2], [1, 1, 1], [1, 1, 1], 2) == [2], "the best does not fit"
    assert best_subset([-3.0, 0.0, -2.0], [1, 1, 1], [1, 1, 1], 9) == [1]
    assert best_subset([5, 5], [2, 2], [1, 1], 2) == [], "nothing fits"
    assert best_subset([float("-inf"), 1.0], [1, 1], [0, 0], 2) == [1]


def test_what_is_of_no_use_is_not_chosen() -> None:
    assert best_subset([1, 0, -1, 2], [1, 0, 0, 1], [0, 0, 0, 0], 9) == [0, 3]


def test_costs_need_not_be_small_to_be_exact() -> None:
    """Multiples of a large number are counted in it."""
    scale = 10**15 + 7
    assert best_subset([3, 4, 5], [2 * scale, 3 * scale, 4 * scale], [0, 0, 0], 5 * scale) == [0, 1]
