"""The claim contract: what a paper says, and the experiment that shows it or does not.

A claim has an exact part (identities, counts, optimalities: seconds, run by the tests) and, where the paper compares,
a comparison over at least three seeds against a baseline in the same run (minutes, run by `tunesmith evidence run`).
Thresholds stand in the claim's source and were fixed before the run. A claim that does not hold is published with its
figures and an explanation.

    CLAIM = Claim("ssf", says="...", where="Table 1", ran="...")

    @CLAIM.exact
    def merged_equals_unmerged() -> Check:
        \"\"\"Merged logits equal unmerged ones.\"\"\"
        return Check("largest difference", error, "<=", 1e-5)

    @CLAIM.comparison
    def digits(seed: int) -> dict[str, float]: ...

    @CLAIM.verdict
    def verdict(figures: Figures) -> list[Check]:
        return [Check("SSF - probe, points", figures.median("ssf") - figures.median("probe"), ">=", 8)]
"""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Operator = Literal["<=", ">=", "=="]


@dataclass(frozen=True)
class Check:
    """One figure against its threshold.

    Attributes:
        name: What was measured, with its unit.
        value: The figure.
        operator: How it must stand to `threshold`.
        threshold: Fixed before the run.
    """

    name: str
    value: float
    operator: Operator
    threshold: float

    @property
    def held(self) -> bool:
        """Whether the figure passes; a figure that is not a number never does."""
        value = float(self.value)
        if math.isnan(value):
            return False
        if self.operator == "==":
            return value == self.threshold
        return value <= self.threshold if self.operator == "<=" else value >= self.threshold

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "value": float(self.value), "held": self.held}


@dataclass(frozen=True)
class Figures:
    """The figures of a comparison, `{name: one value per seed}`."""

    values: Mapping[str, Sequence[float]]

    def __getitem__(self, name: str) -> Sequence[float]:
        return self.values[name]

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])

    def spread(self, name: str) -> float:
        """Largest minus smallest."""
        return max(self.values[name]) - min(self.values[name])

    def seeds(self) -> int:
        return len(next(iter(self.values.values()), ()))


Exact = Callable[[], Check | Sequence[Check]]
Comparison = Callable[[int], Mapping[str, float]]
Verdict = Callable[[Figures], Sequence[Check]]


@dataclass
class Claim:
    """One paper's claim.

    Args:
        slug: The part's name in the catalogue.
        says: What the paper says, in one or two sentences.
        where: Table, figure, section or "abstract".
        ran: What is run here instead, on what data and model, with the baseline and the searches each side got.
        seeds: Of the comparison.
        not_held: The best explanation of what did not hold; shown only if something did not.
    """

    slug: str
    says: str
    where: str
    ran: str
    seeds: Sequence[int] = (0, 1, 2)
    not_held: str = ""
    exacts: dict[str, Exact] = field(default_factory=dict)
    compare: Comparison | None = None
    judge: Verdict | None = None

    def exact(self, run: Exact) -> Exact:
        """Register a check that takes seconds; its docstring's first line is what it shows."""
        self.exacts[run.__name__] = run
        return run

    def comparison(self, run: Comparison) -> Comparison:
        """Register the comparison: all figures of one seed, the baseline's included."""
        self.compare = run
        return run

    def verdict(self, run: Verdict) -> Verdict:
        """Register the thresholds on the comparison's figures."""
        self.judge = run
        return run

    def run_exact(self) -> dict[str, list[Check]]:
        """Every exact check, by what it shows."""
        done: dict[str, list[Check]] = {}
        for name, run in self.exacts.items():
            found = run()
            title = (inspect.getdoc(run) or name).split("\n")[0].rstrip(".")
            done[title] = [found] if isinstance(found, Check) else list(found)
        return done

    def figures(self, rows: Sequence[Mapping[str, float]]) -> Figures:
        """The comparison's figures from one row per seed."""
        return Figures({name: [float(row[name]) for row in rows] for name in rows[0]})
