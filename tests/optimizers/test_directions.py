"""Directions addressed by seeds, probes along them, and traces that replay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith.core.directions import Directions, descend_
from tunesmith.core.trace import Trace
from tunesmith.errors import CheckpointError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, size: float = 0.02) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(3)
    return [nn.Parameter((size * torch.randn(s, generator=g)).to(dtype)) for s in shapes]


def direction(seed: int, *shapes: tuple[int, ...], **options: int) -> list[Tensor]:
    """z itself: what is added to zeros."""
    zeros = [nn.Parameter(torch.zeros(s)) for s in shapes]
    Directions([{"params": zeros}], **options).add_(seed, 1.0)
    return [p.detach() for p in zeros]


def values(tensors: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in tensors]


def zero() -> Tensor:
    return torch.zeros(())


def test_a_direction_is_standard_normal_and_has_no_repeats() -> None:
    a, b = direction(1, (300, 100), (300, 100), block_size=1000)
    both = torch.cat([a.flatten(), b.flatten()])
    assert abs(float(both.mean())) < 0.02
    assert abs(float(both.std()) - 1) < 0.02
    assert abs(float((both**4).mean()) - 3) < 0.15
    assert len(both.unique()) > 0.99 * len(both)
    blocks = a.flatten().split(1000)
    assert abs(float(torch.corrcoef(torch.stack(blocks)).fill_diagonal_(0).abs().max())) < 0.2


def test_a_direction_depends_on_seed_and_place_alone() -> None:
    shapes = ((5, 4), (7,), (3, 2, 2))
    state = torch.get_rng_state()
    first, again, other = direction(1, *shapes), direction(1, *shapes), direction(2, *shapes)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    tensors = [nn.Parameter(torch.zeros(s)) for s in shapes]
    tensors[0].requires_grad_(False)
    Directions([{"params": tensors[:1]}, {"params": tensors[1:]}]).add_(1, 1.0)
    assert not bool(tensors[0].any()), "what does not train is not moved"
    assert all(torch.equal(a, b) for a, b in zip(first[1:], values(tensors)[1:], strict=True))


def test_groups_have_their_own_scale_and_a_tied_tensor_moves_once() -> None:
    a, b = parameters((4, 3), (4, 3))
    tied = nn.Parameter(a.detach())
    before = values([a, b])
    z = direction(5, (4, 3), (4, 3))
    Directions([{"params": [a]}, {"params": [b, tied]}]).add_(5, [0.5, 2.0])
    assert torch.allclose(a, before[0] + 0.5 * z[0])
    assert torch.allclose(b, before[1] + 2.0 * z[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    (p,), (z,) = parameters((40, 30), dtype=dtype), direction(4, (40, 30))
    expected = (p.detach().float() + 1e-3 * z).to(dtype)
    Directions([{"params": [p]}]).add_(4, 1e-3)
    assert torch.equal(p, expected)


def test_a_tensor_that_is_not_contiguous_moves_in_place() -> None:
    p = nn.Parameter(torch.zeros(4, 6).T)
    assert not p.is_contiguous()
    Directions([{"params": [p]}], block_size=5).add_(1, 1.0)
    assert bool(p.all())
    before = p.detach().clone()
    Directions([{"params": [p]}]).probe(zero, 1, 1e-3, exact=True)
    assert torch.equal(p, before)


def test_an_empty_and_a_scalar_tensor() -> None:
    empty, scalar = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(()))
    Directions([{"params": [empty, scalar]}]).add_(1, 1.0)
    assert float(scalar.detach()) != 0


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.floats(1e-6, 10.0),
    st.floats(1e-5, 1.0),
    st.integers(1, 50),
    st.integers(0, 1000),
)
def test_an_exact_probe_gives_every_bit_back(
    dtype: torch.dtype, size: float, eps: float, block: int, seed: int
) -> None:
    tensors = parameters((9, 7), (5,), dtype=dtype, size=size)
    with torch.no_grad():
        tensors[0][0, 0], tensors[0][0, 1] = 0.0, -0.0
    before = values(tensors)
    Directions([{"params": tensors}], block_size=block).probe(zero, seed, eps, exact=True)
    for p, start in zip(tensors, before, strict=True):
        assert torch.equal(p, start)
        assert torch.equal(p.signbit(), start.signbit())


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("broken", [1, 2])
def test_a_closure_that_raises_leaves_the_parameters_in_place(exact: bool, broken: int) -> None:
    (p,), calls = parameters((50, 10)), []
    before = p.detach().clone()

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == broken:
            raise ValueError("from the closure")
        return zero()

    with pytest.raises(ValueError, match="from the closure"):
        Directions([{"params": [p]}]).probe(closure, 1, 1e-3, exact=exact)
    assert torch.equal(p, before) or (not exact and torch.allclose(p, before, atol=1e-8))


def test_equal_steps_close_the_way_better_than_a_double_one() -> None:
    """In bf16, after 20 probes, the drift is under a third of the one of + 2 +."""
    drift = []
    for equal in (True, False):
        (p,) = parameters((200, 100), dtype=torch.bfloat16, size=0.05)
        start, directions = p.detach().clone(), Directions([{"params": [p]}])
        for seed in range(20):
            if equal:
                directions.probe(zero, seed, 1e-3)
            else:
                for scale in (1e-3, -2e-3, 1e-3):
                    directions.add_(seed, scale)
        drift.append(float((p.detach().float() - start.float()).norm()))
    assert drift[0] < drift[1] / 3


def test_a_probe_measures_both_sides() -> None:
    (p,) = parameters((6, 5), dtype=torch.float64)
    before, (z,) = p.detach().clone(), direction(9, (6, 5))
    points = []

    def closure() -> Tensor:
        points.append(p.detach().clone())
        return (p.detach() ** 3).sum()

    probe = Directions([{"params": [p]}]).probe(closure, 9, 1e-3)
    assert torch.allclose(points[0], before + 1e-3 * z)
    assert torch.allclose(points[1], before - 1e-3 * z)
    slope = float((3 * before**2 * z).sum() + 1e-6 * (z**3).sum())
    assert probe.coefficient == pytest.approx(slope, rel=1e-6)
    assert probe.coefficient == float(torch.tensor(probe.coefficient, dtype=torch.float32)), "as a trace keeps it"
    assert float(probe.plus - probe.minus) == pytest.approx(2e-3 * probe.coefficient)


def test_noise_from_the_cpu_is_the_noise_of_a_cpu() -> None:
    a, b = parameters((8, 8), (8, 8))
    b.data.copy_(a.data)
    Directions([{"params": [a]}], noise="cpu").add_(1, 1.0)
    Directions([{"params": [b]}], noise="device").add_(1, 1.0)
    assert torch.equal(a, b)


def recorded(groups: list[dict], steps: int = 12) -> Trace:
    """A run of two probes a step, whose rates change after the fifth, and its trace."""
    directions = Directions(groups, block_size=16)
    trace = Trace(directions.fingerprint())
    for step in range(steps):
        moves = [(2 * step, 0.25 * step), (2 * step + 1, -0.5)]
        lr, decay = ([0.1, 0.2], [0.01, 0.0]) if step < 5 else ([0.05, 0.1], [0.005, 0.0])
        trace.record(moves, lr, decay)
        descend_(directions, moves, lr, decay)
    return trace


def groups() -> list[dict]:
    a, b = parameters((8, 5), (6,))
    return [{"params": [a]}, {"params": [b]}]


def test_a_saved_trace_replays_the_run_bitwise(tmp_path: Path) -> None:
    run, replayed = groups(), groups()
    trace = recorded(run)
    path = trace.save(tmp_path / "run.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]
    assert path.stat().st_size < 2000
    Trace.load(path).replay_(replayed)
    for a, b in zip(run, replayed, strict=True):
        assert torch.equal(a["params"][0], b["params"][0])
    assert len(trace.columns["rates"]) == 2


def test_an_empty_trace_can_be_saved(tmp_path: Path) -> None:
    start = groups()
    trace = Trace(Directions(start).fingerprint())
    Trace.load(trace.save(tmp_path / "t")).replay_(start)
    assert torch.equal(start[0]["params"][0], groups()[0]["params"][0])


def test_a_trace_of_other_tensors_is_refused() -> None:
    trace = recorded(groups())
    with pytest.raises(CheckpointError, match=r"tensors 2 .* 1"):
        trace.replay_([{"params": parameters((8, 5))}])
    with pytest.raises(CheckpointError, match="digest"):
        trace.replay_([{"params": parameters((5, 8), (6,))}])
    trace.fingerprint["drawn_on"] = "cuda"
    with pytest.raises(CheckpointError, match=r"drawn_on 'cuda'.*noise='cpu'"):
        trace.replay_(groups())


def test_a_file_that_is_no_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.*cannot be read"):
        Trace.load(tmp_path / "nowhere")
    (tmp_path / "text").write_text("not a trace")
    with pytest.raises(CheckpointError, match=r"text.*cannot be read"):
        Trace.load(tmp_path / "text")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"other.*found the format None"):
        Trace.load(tmp_path / "other")
