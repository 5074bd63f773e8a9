"""What a search of AutoPEFT found, as a report: the Pareto set, every trial, how the hypervolume grew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.core.pipeline import Workshop
from tunesmith.core.report import Figure, Plot, Report, Table
from tunesmith.recipes.autopeft_space import Space, words
from tunesmith.recipes.pareto import Code, Trial, Values, hypervolume, pareto


@dataclass(frozen=True)
class Kept:
    """The trials of a search.

    Attributes:
        trials: In their order; values are (share of the model, loss or accuracy with a minus).
        space: Of their codes.
        start: How many were random.
        reference: Share and metric; None for the worst of the random trials.
        parameters: Of the model.
        metric: `loss` or `accuracy`.
    """

    trials: Sequence[Trial]
    space: Space
    start: int
    reference: tuple[float, float] | None
    parameters: int
    metric: str

    @property
    def sign(self) -> float:
        """What the metric was multiplied by to be minimised."""
        return -1.0 if self.metric == "accuracy" else 1.0

    def points(self, first: int | None = None) -> list[Values]:
        """The finite values of all trials, or of the first ones."""
        return [trial.values for trial in self.trials[:first] if trial.values is not None]

    def reference_point(self) -> Values:
        """With both values to be minimised."""
        if self.reference is not None:
            return self.reference[0], self.sign * self.reference[1]
        random = self.points(self.start) or self.points()
        return max(p[0] for p in random), max(p[1] for p in random)

    def report(self, workshop: Workshop, final: Figure, code: Code, *, within: bool, budget: float | None) -> Report:
        """The report of the pipeline; `final` is the metric of the configuration `code` trained in full."""
        points, reference, name = self.points(), self.reference_point(), self.metric
        front = pareto(points)
        areas = [hypervolume(points[: i + 1], reference) for i in range(len(points))]
        random = hypervolume(self.points(self.start), reference)
        at = f"{reference[0]:.4%} of the model and a {name} of {self.sign * reference[1]:.4g}"
        made = words(self.space.decode(code), len(self.space.blocks))
        failed, total = len(self.trials) - len(points), len(self.trials)
        warnings = [f"{failed} trials gave no finite {name} and were left out"] if failed else []
        if not within:
            warnings.append(f"no trial trains at most {budget or 0:.2%} of the model; the smallest was chosen")
        return Report(
            f"{workshop.recipe['model']['name']}, autopeft",
            {
                name: final,
                "trainable parameters": Figure(self.space.count(code), unit="count", of=self.parameters),
                "chosen": made,
                "trials": Figure(total, unit="count"),
                "hypervolume": Figure(
                    areas[-1], random, better="higher", help=f"Before: of the random trials. Better than {at}."
                ),
            },
            self._tables(front),
            self._plots(points, areas),
            warnings=warnings,
            summary=f"{total} configurations of {self.space.points:,} were tried; {len(front)} are in the Pareto set. "
            f"The chosen one, {made}, was trained again in full: {workshop.folder / 'final'}.",
            details={"trials": [{**asdict(t), "options": self.space.decode(t.code)} for t in self.trials]},
        )

    def _tables(self, front: Sequence[int]) -> list[Table]:
        done = [trial for trial in self.trials if trial.values is not None]
        modules = self.space.modules
        columns = ["trial", "blocks", *modules, "share of the model", self.metric]
        units = ["", "", *("" for _ in modules), "share", "share" if self.metric == "accuracy" else ""]

        def row(trial: Trial) -> list[Any]:
            made, (share, value) = self.space.decode(trial.code), trial.values or (0.0, 0.0)
            blocks = ", ".join(map(str, made["layers"]))
            return [trial.number, blocks, *(made[m] or "off" for m in modules), share, self.sign * value]

        return [
            Table("Pareto set", columns, [row(done[i]) for i in front], units=units),
            Table("all trials", columns, [row(trial) for trial in done], units=units, collapsed=True),
        ]

    def _plots(self, points: Sequence[Values], areas: Sequence[float]) -> list[Plot]:
        def line(of: Sequence[Values]) -> tuple[list[float], list[float]]:
            kept = [of[i] for i in pareto(of)]
            return [100 * x for x, _ in kept], [self.sign * y for _, y in kept]

        series = {"random trials alone": line(self.points(self.start)), "all trials": line(points)}
        x = "trained share of the model, %"
        grown = {"all trials": (list(range(1, len(areas) + 1)), areas)}
        return [
            Plot("Pareto set", "line", x, self.metric, series, styles=dict.fromkeys(series, "points")),
            Plot("hypervolume", "line", "trial", f"share x {self.metric}", grown),
        ]
