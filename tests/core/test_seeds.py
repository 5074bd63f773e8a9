"""Random numbers addressed by keys."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core import seeds

KEYS = st.lists(st.one_of(st.integers(), st.text(max_size=8)), min_size=1, max_size=4)


@given(KEYS)
def test_same_keys_same_numbers_whatever_was_drawn_before(keys: list) -> None:
    first = seeds.integer(0, 10**9, *keys)
    torch.rand(3)
    assert seeds.integer(0, 10**9, *keys) == first


def test_the_global_generator_is_not_touched() -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    seeds.integer(1, 8, 3)
    seeds.subset(10, 3, 3)
    assert torch.equal(torch.rand(4), expected)


def test_keys_of_other_type_or_grouping_differ() -> None:
    assert seeds.seed_of(1, 2) != seeds.seed_of("1", "2")
    assert seeds.seed_of("ab", "c") != seeds.seed_of("a", "bc")


def test_integers_are_uniform_and_reach_both_ends() -> None:
    drawn = torch.tensor([seeds.integer(1, 4, "uniform", i) for i in range(4000)])
    counts = drawn.bincount(minlength=5)[1:].float()
    assert counts.sum() == 4000
    assert (counts - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5


def test_subset_is_sorted_and_without_repeats() -> None:
    chosen = seeds.subset(9, 4, "x")
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 4
