"""The numbers behind the pictures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.report import Plot
from tunesmith.report.curves import Curve, curves, smooth, thin, ticks, x_axis, y_axis
from tunesmith.report.heatmap import MOST_CELLS, shrink


def curve(xs: object, ys: object) -> Curve:
    return Curve("c", "line", np.array(xs, float), np.array(ys, float))


def test_the_average_of_a_line_is_the_line() -> None:
    ys = np.linspace(3.0, 1.0, 500)
    np.testing.assert_allclose(smooth(ys)[60:-60], ys[60:-60], atol=1e-12)
    np.testing.assert_allclose(smooth(np.full(7, 2.5)), 2.5, atol=1e-12)


def test_the_average_leaves_gaps_out() -> None:
    ys = np.ones(200)
    ys[50:60] = np.nan
    found = smooth(ys)
    assert np.isnan(found[50:60]).all()
    np.testing.assert_allclose(np.delete(found, np.s_[50:60]), 1.0, atol=1e-12)


def test_the_average_calms_noise() -> None:
    noise = np.random.default_rng(0).normal(size=1000)
    assert smooth(noise).std() < 0.2 * noise.std()


@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=30, max_size=60), st.integers(2, 8))
def test_thinning_keeps_ends_and_extremes(ys: list[float], buckets: int) -> None:
    whole = curve(range(len(ys)), ys)
    found = thin(whole, buckets)
    assert len(found.xs) <= 4 * buckets
    assert set(found.xs) <= set(whole.xs)
    if whole.finite.any():
        assert np.nanmin(found.ys) == np.nanmin(whole.ys)
        assert np.nanmax(found.ys) == np.nanmax(whole.ys)
        known = whole.xs[whole.finite]
        assert found.xs[found.finite][[0, -1]].tolist() == known[[0, -1]].tolist()


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 8))
def test_ticks_are_round_and_inside(low: float, span: float, count: int) -> None:
    high = low + span
    if high - low < 1e-9 * abs(low):
        return
    found = ticks(low, high, count)
    assert 1 <= len(found) <= 2.5 * count + 1
    assert all(low - 1e-6 * span <= value <= high + 1e-6 * span for value in found)


def test_ticks() -> None:
    assert ticks(0, 400, 8) == [0, 50, 100, 150, 200, 250, 300, 350, 400]
    assert ticks(-1, 1, 4) == [-1.0, -0.5, 0.0, 0.5, 1.0]


def labels(values: object, unit: str = "", scale: str = "auto") -> list[str]:
    return [label for _, label in y_axis([curve(range(len(values)), values)], scale, unit, 4).ticks]


@pytest.mark.parametrize(
    ("values", "unit", "expected"),
    [
        ([0.4, 3.2], "", ["0", "1", "2", "3"]),
        ([0.0, 5e-4], "", ["0", "0.0001", "0.0002", "0.0003", "0.0004", "0.0005"]),
        ([0.1, 0.9], "share", ["0 %", "20 %", "40 %", "60 %", "80 %"]),
        ([0, 8e6], "bytes", ["0 B", "2 MB", "4 MB", "6 MB", "8 MB"]),
        ([0, 45_000], "", ["0", "10k", "20k", "30k", "40k"]),
        ([1e-5, 1.0], "", ["1e-5", "0.0001", "0.001", "0.01", "0.1", "1"]),
    ],
)
def test_labels(values: list[float], unit: str, expected: list[str]) -> None:
    assert labels(values, unit) == expected


def test_a_scale_is_logarithmic_where_the_range_asks_for_it() -> None:
    assert y_axis([curve([0, 1], [1e-4, 1.0])], "auto", "", 4).log
    assert not y_axis([curve([0, 1], [1e-4, 1.0])], "linear", "", 4).log
    assert not y_axis([curve([0, 1], [0.0, 1.0])], "auto", "", 4).log
    assert not y_axis([curve([0, 1], [0.1, 3.0])], "auto", "", 4).log
    ranks = x_axis([curve([1, 2, 4, 8, 16, 32, 64], range(7))], [], "auto", 5)
    assert ranks.log
    assert [label for _, label in ranks.ticks] == ["1", "2", "4", "8", "16", "32", "64"]
    assert not x_axis([curve(range(10, 1000, 10), range(99))], [], "auto", 5).log


@given(st.lists(st.floats(), min_size=1, max_size=20))
def test_values_lie_on_their_axis(values: list[float]) -> None:
    held = curve(range(len(values)), values)
    for scale in ("auto", "linear", "log"):
        axis = y_axis([held], scale, "", 5)
        assert axis.low < axis.high
        places = axis.place(held.ys[held.finite])
        assert ((places >= 0) & (places <= 1)).all()
        assert all(0 <= axis.place(np.array(value)) <= 1.001 for value, _ in axis.ticks)


def test_points_are_put_in_order_and_words_are_places() -> None:
    (found,), names = curves(Plot("p", "line", series={"s": ([3, 1, 2], [30, 10, 20])}))
    assert (found.xs.tolist(), found.ys.tolist(), names) == ([1, 2, 3], [10, 20, 30], [])
    (found,), names = curves(Plot("p", "line", series={"s": (["b", "a"], [1, 2])}))
    assert (found.xs.tolist(), found.ys.tolist(), names) == ([0, 1], [1, 2], ["b", "a"])


def test_a_large_map_is_averaged() -> None:
    matrix = np.arange(400.0 * 3).reshape(400, 3)
    values, rows, columns = shrink(Plot("p", "heatmap", matrix=matrix.tolist()))
    assert values.shape == (MOST_CELLS, 3)
    assert (len(rows), columns) == (MOST_CELLS, ["0", "1", "2"])
    assert values[0, 0] == matrix[:5, 0].mean()
    assert values[-1, -1] == matrix[-4:, -1].mean()
