"""Sparse deltas: which entries, what applying them gives, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.zoo import checkpoint, same, tiny
from tunesmith.core import statedict
from tunesmith.core.entries import Entries, digest, index_dtype, largest
from tunesmith.core.sparse import SparseDelta
from tunesmith.core.statedict import Checkpoint
from tunesmith.errors import CheckpointError

SHAPES = {"a": (4, 6), "b.weight": (3, 5), "c": (7,)}


def base(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in SHAPES.items()}


def changed(start: dict[str, Tensor], seed: int, share: float = 0.2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: t + (torch.randn(t.shape, generator=g) * (torch.rand(t.shape, generator=g) < share)).to(t.dtype)
        for name, t in start.items()
    }


def delta(seed: int, **options: object) -> SparseDelta:
    return SparseDelta.between(Checkpoint(base()), Checkpoint(changed(base(), seed)), **options)  # type: ignore[arg-type]


def dense(of: SparseDelta) -> dict[str, Tensor]:
    return {n: of[n].dense().double() if n in of else torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()}


class Plain(nn.Module):
    """Parameters of the names and shapes above."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.a = nn.Parameter(tensors["a"].clone())
        self.b = nn.Linear(5, 3, bias=False)
        self.b.weight = nn.Parameter(tensors["b.weight"].clone())
        self.c = nn.Parameter(tensors["c"].clone())


# Choosing -------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), min_size=1, max_size=4),
    st.integers(1, 20),
)
def test_largest_is_the_top_k_with_ties_to_the_first(scores: list[list[int]], count: int) -> None:
    named = [(str(i), torch.tensor(row, dtype=torch.float32)) for i, row in enumerate(scores)]
    every = [(-value, i, j) for i, row in enumerate(scores) for j, value in enumerate(row) if value > 0]
    expected: dict[str, list[int]] = {}
    for _, i, j in sorted(every)[:count]:
        expected.setdefault(str(i), []).append(j)
    found = {name: places.tolist() for name, places in largest(named, count).items()}
    assert found == {name: sorted(places) for name, places in expected.items()}


def test_between_finds_every_difference_and_keep_the_largest_of_all() -> None:
    start, end = base(), changed(base(), 1, share=1.0)
    whole = SparseDelta.between(Checkpoint(start), Checkpoint(end))
    assert whole.count == sum(t.numel() for t in start.values())
    few = SparseDelta.between(Checkpoint(start), Checkpoint(end), keep=10)
    sizes = torch.cat([(end[n] - start[n]).abs().flatten() for n in sorted(SHAPES)])
    assert few.count == 10
    kept = torch.cat([e.values.abs() for e in few.values()])
    assert sorted(kept.tolist()) == pytest.approx(sorted(sizes.tolist())[-10:])
    share = SparseDelta.between(Checkpoint(start), Checkpoint(end), keep=0.25)
    assert share.count == round(0.25 * 46)


def test_only_differences_above_a_size() -> None:
    start = base()
    end = {name: t.clone() for name, t in start.items()}
    end["a"][0, 0] += 1e-3
    end["a"][3, 5] += 1.0
    found = SparseDelta.between(Checkpoint(start), Checkpoint(end), above=0.01)
    assert found["a"].indices.tolist() == [23]
    assert list(found) == ["a"]


def test_a_head_of_another_shape_or_a_new_one_is_kept_whole() -> None:
    start, end = base(), changed(base(), 2)
    end["c"] = torch.arange(9.0)
    end["head"] = torch.ones(2, 2)
    found = SparseDelta.between(Checkpoint(start), Checkpoint(end))
    assert sorted(found.whole) == ["c", "head"]
    result = found.on(Checkpoint(start))
    assert sorted(result) == ["a", "b.weight", "c", "head"]
    assert len(result) == 4
    assert torch.equal(result["c"], end["c"])
    assert result.describe("head") == ((2, 2), torch.float32)


# Applying -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_applied_gives_the_tuned_model_and_goes_back_bit_for_bit(dtype: torch.dtype) -> None:
    start = base(dtype=dtype)
    end = changed(start, 3)
    found = SparseDelta.between(Checkpoint(start), Checkpoint(end))
    model = Plain(start)
    with found.applied(model):
        for name, t in end.items():
            torch.testing.assert_close(model.state_dict()[name], t)
        assert not same(checkpoint(model), start)
    assert same(checkpoint(model), start)


def test_add_then_remove_comes_back_to_rounding_and_only_from_the_right_model() -> None:
    found, model = delta(4), Plain(base())
    found.add_(model)
    found.remove_(model)
    for name, t in base().items():
        torch.testing.assert_close(model.state_dict()[name], t, atol=1e-6, rtol=0)
    other = Plain(base(9))
    with pytest.raises(CheckpointError, match="not the base"):
        found.remove_(other)
    for name, t in base(9).items():
        torch.testing.assert_close(other.state_dict()[name], t, atol=1e-6, rtol=0)


def test_the_wrong_base_is_refused_and_left_alone() -> None:
    found, wrong = delta(5), Plain(base(1))
    with pytest.raises(CheckpointError, match="Plain is not the base of this delta: 'a' holds other numbers"):
        found.add_(wrong)
    assert same(checkpoint(wrong), base(1))
    with pytest.raises(CheckpointError, match="not the base"):
        found.on(Checkpoint(base(1)))
    with pytest.raises(CheckpointError, match="lacks the tensor 'a'"):
        found.add_(nn.Linear(2, 2))
    applied = Plain(base())
    found.add_(applied)
    with pytest.raises(CheckpointError, match="deltas of one base are added to one another first"):
        found.add_(applied)


def test_a_base_loaded_in_half_precision_is_the_same_base() -> None:
    found = delta(6)
    half = Plain(base()).to(torch.bfloat16)
    found.add_(half)
    expected = Plain(changed(base(), 6)).to(torch.bfloat16)
    for name, t in checkpoint(expected).items():
        torch.testing.assert_close(checkpoint(half)[name], t, atol=2e-2, rtol=2e-2)


def test_tied_tensors_move_together_once() -> None:
    torch.manual_seed(0)
    model = tiny("gpt2")
    state = checkpoint(model)
    tuned = {n: t + 0.5 if n == "transformer.wte.weight" else t for n, t in state.items() if n != "lm_head.weight"}
    begun = {n: t for n, t in state.items() if n != "lm_head.weight"}
    SparseDelta.between(Checkpoint(begun), Checkpoint(tuned)).add_(model)
    torch.testing.assert_close(model.lm_head.weight, state["transformer.wte.weight"] + 0.5)


# Algebra --------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.integers(0, 50), st.floats(-2, 2))
def test_deltas_are_vectors(one: int, two: int, factor: float) -> None:
    a, b = delta(one), delta(two)
    x, y = dense(a), dense(b)
    for name in SHAPES:
        torch.testing.assert_close(dense(a + b)[name], x[name] + y[name], atol=1e-6, rtol=0)
        torch.testing.assert_close(dense(a - b)[name], x[name] - y[name], atol=1e-6, rtol=0)
        torch.testing.assert_close(dense(factor * a)[name], factor * x[name], atol=1e-6, rtol=0)
        torch.testing.assert_close(dense(a + b)[name], dense(b + a)[name], atol=0, rtol=0)
        both = (x[name] != 0) & (y[name] != 0)
        assert torch.equal(dense(a.at(b))[name], torch.where(both, x[name], 0.0))
    assert a.overlap(a) == 1
    shared = sum(int(((x[n] != 0) & (y[n] != 0)).sum()) for n in SHAPES)
    assert a.overlap(b) == pytest.approx(shared / b.count)
    assert a.norm() == pytest.approx(float(torch.cat([t.flatten() for t in x.values()]).norm()), rel=1e-6)


def test_order_of_composition_does_not_matter_to_a_model() -> None:
    a, b = delta(7), delta(8)
    one, two = Plain(base()), Plain(base())
    (a + b).add_(one)
    (b + a).add_(two)
    assert same(checkpoint(one), checkpoint(two))


def test_deltas_of_different_bases_do_not_add_up() -> None:
    elsewhere = SparseDelta.between(Checkpoint(base(1)), Checkpoint(changed(base(1), 3)))
    with pytest.raises(CheckpointError, match="different bases"):
        delta(3) + elsewhere
    one, two = delta(3), delta(4)
    first = SparseDelta(one.entries, one.base, {"head": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="whole 'head'"):
        first + SparseDelta(two.entries, two.base, {"head": torch.ones(2)})


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_holds_all_of_it_in_eight_bytes_an_entry(tmp_path: Path) -> None:
    found = delta(9, about={"method": "test"})
    found = SparseDelta(found.entries, found.base, {"head": torch.arange(3.0)}, found.about)
    read = SparseDelta.load(found.save(tmp_path / "delta.safetensors"))
    assert found.nbytes == 8 * found.count + 12
    assert read.about == {"method": "test"}
    assert read.base == found.base
    assert torch.equal(read.whole["head"], found.whole["head"])
    for name, entries in found.items():
        assert read[name].shape == entries.shape
        assert torch.equal(read[name].indices, entries.indices)
        assert torch.equal(read[name].values, entries.values)
    assert found.to(torch.bfloat16).nbytes == 6 * found.count + 12


def test_streamed_to_a_folder_it_gives_the_tuned_checkpoint(tmp_path: Path) -> None:
    start, end = base(), changed(base(), 10)
    statedict.write(tmp_path / "base", start.items())
    found = SparseDelta.between(Checkpoint(tmp_path / "base"), Checkpoint(end))
    statedict.write(tmp_path / "tuned", found.on(Checkpoint(tmp_path / "base")).items())
    read = Checkpoint(tmp_path / "tuned")
    for name, t in end.items():
        torch.testing.assert_close(read[name], t, atol=1e-7, rtol=0)


@pytest.mark.parametrize("what", ["missing", "truncated", "another", "places"])
def test_a_file_that_is_no_delta_is_a_clear_error(what: str, tmp_path: Path) -> None:
    file = tmp_path / "delta.safetensors"
    if what == "truncated":
        delta(1).save(file)
        file.write_bytes(file.read_bytes()[:-20])
    elif what == "another":
        save_file({"a": torch.zeros(2)}, file)
    elif what == "places":
        found = delta(1)
        object.__setattr__(found["a"], "indices", found["a"].indices + 1000)
        found.save(file)
    with pytest.raises(CheckpointError, match=r"delta\.safetensors"):
        SparseDelta.load(file)


@pytest.mark.parametrize(
    ("indices", "values"),
    [([3, 1], [1.0, 2.0]), ([1, 1], [1.0, 2.0]), ([-1, 2], [1.0, 2.0]), ([0, 6], [1.0, 2.0]), ([0], [1.0, 2.0])],
)
def test_entries_that_are_none_are_refused(indices: list[int], values: list[float]) -> None:
    with pytest.raises(CheckpointError, match="indices"):
        Entries((2, 3), torch.tensor(indices), torch.tensor(values))


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CheckpointError, match="finite"):
        Entries((2, 3), torch.tensor([0]), torch.tensor([float("nan")]))
    start = base()
    broken = {**start, "a": start["a"] / 0}
    with pytest.raises(CheckpointError, match="'a' differs by a value that is not finite"):
        SparseDelta.between(Checkpoint(start), Checkpoint(broken))


def test_indices_are_as_wide_as_they_must_be() -> None:
    assert index_dtype(2**31 - 1) is torch.int32
    assert index_dtype(2**31) is torch.int64


def test_a_digest_sees_shape_and_numbers_and_no_sign_of_zero() -> None:
    t = torch.randn(300, generator=torch.Generator().manual_seed(0))
    assert digest(t) != digest(t.view(3, 100))
    assert digest(t) != digest(t + 0.1)
    assert digest(t) == digest(t.clone().to(torch.bfloat16))
    assert digest(torch.zeros(4)) == digest(-torch.zeros(4))
