"""Intruder dimensions: planted ones are found, counted once and taken out; degenerate spectra are told apart."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.zoo import tiny
from tunesmith.analysis.intruder_dimensions import effective_rank, intruder_dimensions, repair
from tunesmith.core.analysis import Subjects
from tunesmith.core.report import Report
from tunesmith.core.statedict import Checkpoint, write
from tunesmith.errors import ModelError

NAME = "blocks.0.up_proj.weight"


def orthonormal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).double())[0]


def spectrum(rows: int, columns: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W of that rank with well separated singular values, and its U, S, V."""
    U, V = orthonormal(rows, seed), orthonormal(columns, seed + 1)
    S = torch.linspace(2, 1, rank).double()
    return (U[:, :rank] * S) @ V[:, :rank].T, U, S, V


def look(W0: Tensor, W1: Tensor, name: str = NAME, **options: object) -> Report:
    return intruder_dimensions(Subjects(Checkpoint({name: W1}), Checkpoint({name: W0})), **options)


def found(report: Report) -> int:
    return report.figures["intruder dimensions"]


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 99), planted=st.integers(1, 4), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_planted_directions_are_counted_and_taken_out(seed: int, planted: int, dtype: torch.dtype) -> None:
    W0, U, S, V = spectrum(96, 32, 24, seed)
    strength = 2 * S[0] + torch.arange(planted).double()
    W1 = W0 + (U[:, 30 : 30 + planted] * strength) @ V[:, 25 : 25 + planted].T
    W0, W1 = W0.to(dtype), W1.to(dtype)
    report = look(W0, W1)
    assert found(report) == planted
    similarity = report.details["similarity"][NAME]
    assert all(s < 1e-3 for s in similarity[:planted])
    assert all(s > 0.99 for s in similarity[planted:])
    assert report.tables[0].rows[0][6] == pytest.approx(effective_rank(W1.float() - W0.float()), abs=1e-4)
    subjects = Subjects(Checkpoint({NAME: W1}), Checkpoint({NAME: W0}))
    assert torch.allclose(repair(subjects)[NAME], W0, atol=1e-5)
    half = repair(subjects, scale=0.5)[NAME]
    assert torch.allclose(half, (W0 + W1) / 2, atol=1e-5)
    assert half.dtype == dtype
    assert torch.allclose(repair(subjects, scale=1.0)[NAME], W1, atol=1e-6)


def test_only_the_strongest_k_are_looked_at() -> None:
    W0, U, _, V = spectrum(96, 32, 24)
    weak = W0 + 1.5 * torch.outer(U[:, 30], V[:, 28])
    assert found(look(W0, weak, k=10)) == 0
    assert found(look(W0, weak, k=20)) == 1


def test_the_threshold_is_a_similarity() -> None:
    """A direction at 60 degrees from the base's column space has similarity at most 0.5."""
    W0, U, S, V = spectrum(96, 32, 1)
    for angle, expected in ((59.0, 0), (61.0, 1)):
        u = math.cos(math.radians(angle)) * U[:, 0] + math.sin(math.radians(angle)) * U[:, 5]
        assert found(look(W0, 9 * S[0] * torch.outer(u, V[:, 3]))) == expected


def test_directions_are_those_of_the_output_also_for_conv1d() -> None:
    """A rank-one change along a known output direction is no intruder; read the wrong way round it is one."""
    W0, U, S, V = spectrum(96, 32, 24)
    W1 = W0 + 8 * S[0] * torch.outer(U[:, 2], V[:, 28])
    assert found(look(W0, W1)) == 0
    assert found(look(W0.T, W1.T)) == 1
    bias = {"blocks.0.up_proj.bias": torch.zeros(96)}
    stored = [Checkpoint({NAME: W.T.contiguous(), **bias}) for W in (W1, W0)]
    assert found(intruder_dimensions(Subjects(*stored))) == 0
    W2 = W0 + 8 * S[0] * torch.outer(U[:, 40], V[:, 28])
    stored[0] = Checkpoint({NAME: W2.T.contiguous(), **bias})
    assert found(intruder_dimensions(Subjects(*stored))) == 1
    assert torch.allclose(repair(Subjects(*stored))[NAME], W0.T, atol=1e-5)


def test_a_degenerate_spectrum_shows_in_the_baseline_and_in_a_note() -> None:
    Q = orthonormal(64, 0).float()
    g = torch.Generator().manual_seed(0)
    report = look(Q, Q + 1e-3 * torch.randn(64, 64, generator=g))
    assert found(report) > 0
    assert report.figures["in the jitter baseline"] > 0
    assert "nearly coincide" in report.notes[0]
    W0, U, _, V = spectrum(96, 32, 24)
    clean = look(W0, W0 + 9 * torch.outer(U[:, 30], V[:, 28]))
    assert clean.figures["in the jitter baseline"] == 0
    assert not clean.notes
    assert look(Q, Q, jitter=0.0).figures["in the jitter baseline"] is None


def test_numerically_zero_directions_are_left_out() -> None:
    W0, *_ = spectrum(96, 32, 3)
    assert found(look(W0, 2 * W0)) == 0
    zero = torch.zeros(16, 8)
    assert found(look(zero, zero)) == 0
    assert found(look(zero, torch.eye(16, 8) * torch.arange(1, 9).flip(0))) == 8


@pytest.mark.parametrize(
    ("S", "expected"),
    [([1.0, 1, 1, 1], 4.0), ([3.0, 0, 0, 0], 1.0), ([0.0, 0, 0, 0], 0.0), ([0.5, 0.25, 0.25, 0], 2**1.5)],
)
def test_effective_rank(S: list[float], expected: float) -> None:
    W = orthonormal(6, 0)[:, :4] @ torch.diag(torch.tensor(S).double()) @ orthonormal(4, 1)
    assert effective_rank(W) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_chosen_layers_and_a_name_that_is_none() -> None:
    tuned, base = Checkpoint(tiny("llama", seed=1).state_dict()), Checkpoint(tiny("llama").state_dict())
    report = intruder_dimensions(Subjects(tuned, base), target_modules=["q_proj", "mlp.up_proj"])
    assert {row[0].split(".")[-2] for row in report.tables[0].rows} == {"q_proj", "up_proj"}
    assert report.figures["matrices"] == 4
    with pytest.raises(ModelError, match=r"ends in 'q_prj'\. Did you mean 'q_proj'\?"):
        intruder_dimensions(Subjects(tuned, base), target_modules=["q_prj"])
    with pytest.raises(ModelError, match="no linear layers"):
        look(torch.ones(3, 3), torch.ones(3, 3), name="lm_head.weight")


def test_a_repaired_model_is_written_and_only_intruders_change(tmp_path: Path) -> None:
    base = {n: t.clone() for n, t in tiny("llama").state_dict().items()}
    name = "model.layers.1.mlp.up_proj.weight"
    U, S, Vh = torch.linalg.svd(base[name])
    tuned = {
        **base,
        name: base[name] + 5 * S[0] * torch.outer(U[:, 40], Vh[0]),
        "lm_head.weight": base["lm_head.weight"] + 1,
    }
    subjects = Subjects(Checkpoint(tuned), Checkpoint(base))
    made = repair(subjects)
    written = Checkpoint(write(tmp_path / "m", made.items()))
    assert {n for n in written if not torch.equal(written[n], tuned[n])} == {name}
    assert found(intruder_dimensions(Subjects(written, Checkpoint(base)))) == 0
    assert found(intruder_dimensions(subjects)) == 1
