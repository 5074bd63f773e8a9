"""Entries of a weight as a space: edges that no optimizer reaches by itself; and deltas of tied models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.zoo import checkpoint, same, tiny
from tunesmith.core.entries import largest
from tunesmith.core.entryspace import EntrySpace, largest_places, task_head
from tunesmith.core.sparse import SparseDelta
from tunesmith.core.statedict import Checkpoint
from tunesmith.errors import CheckpointError, TunesmithError


class _Some(EntrySpace):
    places = (5, 1)

    def choose(self, p: nn.Parameter, state: dict, name: str) -> torch.Tensor:
        return torch.tensor(self.places)


def test_a_space_is_a_gather_and_a_scatter() -> None:
    p = nn.Parameter(torch.arange(6.0).view(2, 3))
    space, state = _Some(p, 2, 32), {"step": 0}
    assert space.needs_refresh(state)
    space.refresh(p, state, "W")
    assert not space.needs_refresh(state)
    assert space.project(p.detach(), state).tolist() == [1.0, 5.0]
    assert space.back(torch.tensor([7.0, 8.0]), state).tolist() == [[0, 7, 0], [0, 0, 8]]
    with torch.no_grad():
        space.move(p, torch.tensor([1.0, 2.0]), state, 0.5)
        assert p.tolist() == [[0, 0.5, 2], [3, 4, 4]]
        space.decay(p, state, 0.5)
    assert p.tolist() == [[0, 0.25, 2], [3, 4, 2]]
    space.places = (1, 2, 3)
    with pytest.raises(TunesmithError, match="2 entries of W were to be chosen, found 3"):
        space.refresh(p, state, "W")


def test_all_of_equal_scores_can_be_asked_for() -> None:
    assert largest_places(torch.zeros(2, 3), 4).tolist() == [0, 1, 2, 3]
    assert largest_places(torch.tensor([1.0, float("inf"), 2.0]), 1).tolist() == [1]


def test_heads_are_those_made_for_a_task() -> None:
    assert task_head(tiny("bert")) == {"classifier.weight", "classifier.bias"}
    assert task_head(tiny("llama")) == task_head(tiny("gpt2")) == task_head(tiny("t5")) == set()


def test_scores_of_half_precision_are_compared_as_what_they_are() -> None:
    """In bfloat16 the sixth of these would equal the least of those before it."""
    first = torch.tensor([1.0040, 1.0041, 1.0042, 1.0043])
    found = largest([("a", first), ("b", torch.tensor([0.5, 1.0078125], dtype=torch.bfloat16))], 4)
    assert {name: places.tolist() for name, places in found.items()} == {"a": [1, 2, 3], "b": [1]}


def test_a_tied_tensor_of_a_state_dict_counts_once() -> None:
    model = tiny("gpt2")
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.transformer.wte.weight.add_(0.5)
    found = SparseDelta.between(Checkpoint(model.state_dict()), Checkpoint(tuned.state_dict()))
    assert found.count == model.lm_head.weight.numel()
    assert not found.whole
    found.add_(model)
    torch.testing.assert_close(model.lm_head.weight, tuned.lm_head.weight)


def test_what_cannot_be_applied_for_a_while_is_refused_before() -> None:
    model, other = tiny("gpt2"), tiny("bert")
    tuned = {n: t + 0.5 for n, t in checkpoint(model).items()}
    found = SparseDelta.between(Checkpoint(checkpoint(model)), Checkpoint(tuned), keep=10)
    before = checkpoint(other)
    with pytest.raises(CheckpointError, match="lacks the tensor"), found.applied(other):
        pass
    headed = SparseDelta(found.entries, found.base, {"classifier.weight": torch.zeros(3, 32)})
    with pytest.raises(CheckpointError, match=r"brings a whole 'classifier.weight'"), headed.applied(model):
        pass
    assert same(before, checkpoint(other))
