"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.report.strategies import units, values
from tunesmith.core.report import Figure
from tunesmith.report.units import Change, alike, change, exact, number, part_of


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1234, "", "1,234"),
        (1234, "count", "1,234"),
        (999_999, "count", "999,999"),
        (5_270_000, "count", "5.27 M"),
        (110_000_000, "count", "110 M"),
        (7_241_732_096, "count", "7.24 B"),
        (0, "bytes", "0 B"),
        (999, "bytes", "999 B"),
        (999_600, "bytes", "1.00 MB"),
        (12_400_000, "bytes", "12.4 MB"),
        (50_700_000_000, "bytes", "50.7 GB"),
        (0, "seconds", "0 s"),
        (0.35, "seconds", "350 ms"),
        (3.2, "seconds", "3.2 s"),
        (59.97, "seconds", "1 min 00 s"),
        (250, "seconds", "4 min 10 s"),
        (3599.7, "seconds", "1 h 00 min"),
        (7322, "seconds", "2 h 02 min"),
        (200_000, "seconds", "2 d 7 h"),
        (0.453, "share", "45.3 %"),
        (0, "share", "0 %"),
        (1.0, "share", "100 %"),
        (0.9999, "share", "99.99 %"),
        (0.0004, "share", "0.04 %"),
        (1.4234, "", "1.423"),
        (9.9999, "", "10.00"),
        (0.4231, "nats", "0.423 nats"),
        (2e-5, "", "2.00e-5"),
        (15234.2, "tokens/s", "15,234 tokens/s"),
        (10**400, "count", "1.00e400"),
        (math.nan, "share", "NaN"),
        (-math.inf, "bytes", "-inf"),
        (True, "", "yes"),
        (None, "share", "–"),
        ("bfloat16", "bytes", "bfloat16"),
    ],
)
def test_number(value: object, unit: str, text: str) -> None:
    assert number(value, unit) == text


@pytest.mark.parametrize(
    ("before", "after", "unit", "better", "expected"),
    [
        (3.2, 1.4, "", "lower", Change("-56.2 %", "down", "better")),
        (3.2, 1.4, "", "higher", Change("-56.2 %", "down", "worse")),
        (3.2, 1.4, "", None, Change("-56.2 %", "down", "")),
        (0.1, 0.475, "share", "higher", Change("+37.5 points", "up", "better")),
        (0.849, 0.828, "share", "higher", Change("-2.1 points", "down", "worse")),
        (0.5, 0.4999, "share", "higher", Change("no change", "same", "")),
        (1.0, 1.0001, "", "lower", Change("no change", "same", "")),
        (2, 50, "", "higher", Change("25 times as much", "up", "better")),
        (0, 3, "", "lower", Change("+3", "up", "worse")),
        (-2.0, -1.0, "", "higher", Change("+1.000", "up", "better")),
        (3.2, math.nan, "", "lower", Change("now NaN", "lost", "worse")),
        (math.inf, 2.0, "", "lower", Change("was inf", "lost", "")),
    ],
)
def test_change(before: float, after: float, unit: str, better: object, expected: Change) -> None:
    assert change(Figure(after, before, unit, better)) == expected


@pytest.mark.parametrize(("before", "after"), [(None, 1.0), (1.0, None), ("a", 1.0), (True, False)])
def test_no_change_without_two_numbers(before: object, after: object) -> None:
    assert change(Figure(after, before)) is None


def test_part_of() -> None:
    assert part_of(Figure(5_270_000, of=110_000_000, unit="count")) == "of 110 M (4.8 %)"
    assert part_of(Figure(3, of=0)) == "of 0"
    assert part_of(Figure(3)) == ""


def test_alike() -> None:
    assert alike([0.97, 0.5, -0.001, math.nan], "", 2) == ["0.97", "0.50", "0.00", "NaN"]
    assert alike([64.0, 128.0], "", 3) == ["64", "128"]
    assert alike([-4.5, 12.0], "", 3) == ["-4.5", "12.0"]
    assert alike([0.5], "share", 3) == ["50.0 %"]


@given(values, units)
def test_every_value_has_a_text(value: object, unit: str) -> None:
    text = number(value, unit)
    # A text stays as it is; a number never loses its unit nor grows beyond what a card holds.
    assert text == value if isinstance(value, str) else len(text) <= 24 + len(unit)
    assert isinstance(exact(value), str)


@given(values, values, units, st.sampled_from(["higher", "lower"]))
def test_a_verdict_follows_the_direction(before: object, after: object, unit: str, better: str) -> None:
    found = change(Figure(after, before, unit, better))
    if found is None or found.direction == "lost":
        return
    assert found.direction == ("same" if found.text == "no change" else "up" if after > before else "down")
    if found.direction != "same":
        assert (found.verdict == "better") == ((found.direction == "up") == (better == "higher"))


@given(st.floats(1e-3, 1e14))
def test_a_number_is_right_to_three_digits(value: float) -> None:
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=5.1e-3)
