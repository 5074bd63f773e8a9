"""STAR: label the rows that base and adapter are unsure of, in rounds, and keep the adapter from being too sure.

Zhang, Wu, Zhou and He, "STAR: Constraint LoRA with Dynamic Active Learning for Data-Efficient Fine-Tuning of Large
Language Models", Findings of ACL 2024.

    round t trains a new LoRA on all labelled rows, then scores the others:
    u = (1 - w_t) u_0 + w_t u_t,   w_t = min((t + 1) / 10, 1)                                     (section 3.2)

u_0 is the uncertainty of the base model, u_t that of the adapted one, the mean of K passes under dropout; the rows with
the largest u are labelled next. LoRA's factor B decays strongly and A not at all (`factor-decay`), section 3.3.

Where we differ from the released code. Its model is in evaluation mode when it is scored, so that the K passes are one;
here dropout is on. It sums -log p of the gold answer, which an unlabelled row has not: here of the model's own greedy
answer (`use_gold` for theirs). It brings u_0 to [0, 1] and leaves u_t as it is, so that u_t decides alone; here both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from datasets import Dataset
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from tunesmith.core.part import part
from tunesmith.core.pipeline import Opened, Pipeline, Trained, Workshop
from tunesmith.core.report import Figure, Plot, Report, Table
from tunesmith.core.seeds import subset
from tunesmith.core.selection import with_answer
from tunesmith.core.uncertainty import Kind, scores, under_dropout
from tunesmith.errors import RecipeError

_PAPER = {"name": "lora", "rank": 64, "alpha": 16.0, "dropout": 0.1}
_SHOWN = ("accuracy", "exact match", "loss")


@part(paper="arXiv:2403.01165")
class STAR(Pipeline):
    """Active learning in rounds.

    Args:
        rounds: Trainings, each on more rows.
        start: Rows of the first, drawn at random.
        per_round: Rows added after each.
        uncertainty: `predictive`, -log p of the answer; or `entropy`, of the predictions.
        mode: `dynamic` as above; `plain` has u_t alone, `subtract` u_t - u_0, `random` chooses by lot (the baseline).
        passes: K.
        use_gold: Score the rows' own answers, as the released code does, instead of the model's.
        normalise: Bring both scores to [0, 1] before they are mixed; the released code does so with u_0 alone.
        decay_b: Weight decay of the factor B.
    """

    brisk: ClassVar[Mapping[str, object]] = {"rounds": 2, "start": 8, "per_round": 4, "passes": 2}
    tasks: ClassVar[tuple[str, ...]] = ("causal-lm", "seq2seq", "text-classification")

    def __init__(
        self,
        *,
        rounds: PositiveInt = 10,
        start: PositiveInt = 500,
        per_round: PositiveInt = 500,
        uncertainty: Kind = "predictive",
        mode: Literal["dynamic", "plain", "subtract", "random"] = "dynamic",
        passes: PositiveInt = 3,
        use_gold: bool = False,
        normalise: bool = True,
        decay_b: NonNegativeFloat = 0.5,
    ) -> None:
        self.rounds, self.start, self.per_round = rounds, start, per_round
        self.uncertainty, self.mode, self.passes = uncertainty, mode, passes
        self.use_gold, self.normalise, self.decay_b = use_gold, normalise, decay_b

    def run(self, workshop: Workshop) -> Report:
        pool = len(workshop.rows)
        needed = self.start + self.per_round * (self.rounds - 1)
        if needed > pool:
            raise RecipeError(
                f"star: {self.rounds} rounds from {self.start} rows by {self.per_round} need {needed} rows; the data "
                f"has {pool}. Lower --option rounds, start or per_round."
            )
        labelled = subset(pool, self.start, workshop.seed, "star")
        trained: list[Trained] = []
        for t in range(self.rounds):
            trained.append(
                workshop.train(f"round-{t:02d}", workshop.choose(sorted(labelled)), **self._fields(workshop))
            )
            if t + 1 < self.rounds:
                last = trained[-1]
                labelled = labelled + workshop.do(
                    f"chosen-{t:02d}",
                    lambda t=t, known=frozenset(labelled), last=last: self._choose(workshop, t, known, last),
                )
        return self._report(workshop, trained)

    def _fields(self, workshop: Workshop) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        given = workshop.recipe["adapters"]
        if [{k: v for k, v in spec.items() if v is not None} for spec in given] in ([], [{"name": "lora"}]):
            fields["adapters"] = [dict(_PAPER)]
        if workshop.recipe["optimizer"] == {"name": "adamw_torch"}:
            fields["optimizer"] = {"name": "factor-decay", "decay_b": self.decay_b}
        return fields

    def _choose(self, workshop: Workshop, t: int, known: frozenset[int], trained: Trained) -> list[int]:
        rest = [i for i in range(len(workshop.rows)) if i not in known]
        if self.mode == "random":
            return [rest[i] for i in subset(len(rest), self.per_round, workshop.seed, "star random", t)]
        rows = workshop.rows.select(rest)
        now = self._scores(workshop.open(trained.model), rows, workshop, t)
        if self.mode == "plain":
            return top(rest, now, self.per_round)
        base = workshop.tensors("base-scores", lambda: {"u": self._base_scores(workshop)})["u"][rest]
        base = unit(base)
        now = unit(now) if self.normalise else now
        mixed = now - base if self.mode == "subtract" else blend(base, now, t)
        return top(rest, mixed, self.per_round)

    def _base_scores(self, workshop: Workshop) -> Tensor:
        opened = workshop.open()
        rows = self._asked(opened, workshop.rows, workshop.task)
        return scores(opened.model, opened.batches(rows, _rows(workshop)), self.uncertainty)

    def _scores(self, opened: Opened, rows: Dataset, workshop: Workshop, t: int) -> Tensor:
        """u_t, (rows,)."""
        batches = opened.batches(self._asked(opened, rows, workshop.task), _rows(workshop))
        return under_dropout(opened.model, batches, self.uncertainty, self.passes, workshop.seed, "star", t).mean(0)

    def _asked(self, opened: Opened, rows: Dataset, task: str) -> Dataset:
        """The rows with the model's own answers, where they have answers and theirs may not be looked at.

        A row that the model answers by nothing is scored by a full stop, which it then finds unlikely.
        """
        if self.use_gold or task.endswith("classification"):
            return rows
        answers = opened.answers(rows)
        return rows.map(
            lambda row, i: with_answer(row, answers[i] if answers[i].strip() else "."),
            with_indices=True,
            load_from_cache_file=False,
        )

    def _report(self, workshop: Workshop, trained: list[Trained]) -> Report:
        sizes = [self.start + self.per_round * t for t in range(self.rounds)]
        names = [name for name in _SHOWN if name in trained[-1].report.figures]
        curves = {name: [run.figure(name) for run in trained] for name in names}
        table = Table(
            "rounds", ["rows", *names], [[n, *(curves[name][t] for name in names)] for t, n in enumerate(sizes)]
        )
        found = Report(
            f"STAR: {self.rounds} rounds on {sizes[-1]} of {len(workshop.rows)} rows",
            summary=f"The model of the last round is in {trained[-1].model}.",
            tables=[table],
            details={"rounds": [str(run.folder) for run in trained], "rows": sizes, "curves": curves},
        )
        for name, values in curves.items():
            last = trained[-1].report.figure(name)
            found.figures[name] = Figure(
                values[-1], before=values[0], unit=last.unit, better=last.better, help=last.help
            )
            found.plots.append(Plot(name, "line", x="labelled rows", y=name, series={name: (sizes, values)}))
        return found


def _rows(workshop: Workshop) -> int:
    return int(workshop.recipe["train"]["batch_size"])


def blend(base: Tensor, now: Tensor, t: int) -> Tensor:
    """(1 - w) u_0 + w u_t with w = (t + 1) / 10, 1 at most."""
    w = min(0.1 * (t + 1), 1.0)
    return (1 - w) * base + w * now


def unit(values: Tensor) -> Tensor:
    """Brought to [0, 1]; all 0 where they are all alike."""
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else torch.zeros_like(values)


def top(indices: list[int], values: Tensor, count: int) -> list[int]:
    """The `count` indices of the largest values, the largest first; the earlier of equal ones."""
    order = torch.sort(values, descending=True, stable=True).indices[:count]
    return [indices[i] for i in order.tolist()]
