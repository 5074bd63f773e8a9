"""Stable fine-tuning: which stabiliser keeps a training on few rows from failing, by a grid of them over seeds.

Tinn, Cheng, Gu, Usuyama, Liu, Naumann, Gao and Poon, "Fine-tuning large neural language models for biomedical natural
language processing", Patterns 2023. On few rows the same training ends well with one seed and at the majority class
with another. What they compare, and what is trained here, each with every seed:

    plain         AdamW with bias correction, as the recipe says
    uncorrected   without bias correction, as BERT's own optimizer (`layer-decay` with delta 1)
    longer        more steps, and a tenth of them warm-up
    freeze        embedding and bottom blocks rest (`telly`)
    decay         a learning rate that falls from layer to layer (`layer-decay`)
    fresh         top blocks and pooler begin anew (`fresh-top`)
    freeze+decay  any of them together

Failed is a run whose score is at most that of a constant answer plus a margin: the share of the commonest class; for a
language model, its loss before training. The study's rules: freeze the bottom of base-sized models, layer decay for
large ones and ELECTRA, fresh top blocks for the smallest data. The recommendation here is of what was measured: of the
stabilisers with the fewest failed runs, the one with the best mean. Rules and figures are shown beside it.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from tunesmith.core.freezing import bottom
from tunesmith.core.modelmap import blocks
from tunesmith.core.part import part
from tunesmith.core.pipeline import Pipeline, Trained, Workshop
from tunesmith.core.report import Figure, Plot, Report, Table
from tunesmith.errors import DataError, RecipeError, did_you_mean

PLAIN = "plain"
KNOWN = (PLAIN, "uncorrected", "longer", "freeze", "decay", "fresh")
LARGE, FEW = 24, 100
Run = dict[str, Any]


@part(paper="arXiv:2112.07869")
class StableFinetuning(Pipeline):
    """A grid of stabilisers and seeds.

    Args:
        stabilisers: What to compare, `plain` among them; joined by `+` they are used together.
        seeds: Trainings of each; the first has the recipe's seed, and so on upwards.
        margin: A run fails if it is better than a constant answer by no more, in units of the metric.
        metric: `auto` is accuracy for classification and the loss for language models.
        frozen: Blocks that rest with `freeze`; None for half of them.
        layer_decay: delta of `decay`.
        fresh_blocks: Blocks that begin anew with `fresh`.
        longer: Multiple of the recipe's steps or epochs.
        warmup: Share of the steps, of `longer`.
        keep: Whether every run keeps its model; otherwise only the best run of the recommended stabiliser does.
    """

    brisk: ClassVar[Mapping[str, object]] = {"stabilisers": ("plain", "freeze+fresh", "decay+uncorrected"), "seeds": 1}
    tasks: ClassVar[tuple[str, ...]] = ("causal-lm", "seq2seq", "text-classification", "image-classification")

    def __init__(
        self,
        *,
        stabilisers: tuple[str, ...] = KNOWN,
        seeds: PositiveInt = 5,
        margin: NonNegativeFloat = 0.01,
        metric: Literal["auto", "accuracy", "loss"] = "auto",
        frozen: NonNegativeInt | None = None,
        layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.9,
        fresh_blocks: PositiveInt = 1,
        longer: PositiveFloat = 4.0,
        warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        keep: bool = False,
    ) -> None:
        self.stabilisers, self.seeds, self.margin, self.metric = stabilisers, seeds, margin, metric
        self.frozen, self.layer_decay, self.fresh_blocks = frozen, layer_decay, fresh_blocks
        self.longer, self.warmup, self.keep = longer, warmup, keep
        for stabiliser in stabilisers:
            for word in stabiliser.split("+"):
                if word not in KNOWN or (word == PLAIN and stabiliser != PLAIN):
                    raise RecipeError(
                        f"stable-finetuning: {stabiliser!r} is no stabiliser.{did_you_mean(word, KNOWN)} There are "
                        f"{', '.join(KNOWN)}, and all but plain together, such as freeze+decay."
                    )
        if PLAIN not in stabilisers or len(set(stabilisers)) < len(stabilisers):
            raise RecipeError(
                f"stable-finetuning: `stabilisers` is {list(stabilisers)}; name each once, and plain, which the others "
                "are compared with"
            )

    def run(self, workshop: Workshop) -> Report:
        _check(workshop.recipe)
        name = self.metric
        if name == "auto":
            name = "accuracy" if workshop.task.endswith("classification") else "loss"
        if name == "accuracy" and not workshop.task.endswith("classification"):
            raise RecipeError(f"stable-finetuning: there is no accuracy for {workshop.task}; metric=loss")
        plan = workshop.do("plan", lambda: _plan(workshop, self.frozen))
        every = [(s, workshop.seed + i) for s in self.stabilisers for i in range(self.seeds)]
        runs: list[Run] = []
        for stabiliser, seed in workshop.track(every, "trainings"):
            stage = f"{stabiliser.replace('+', '-')}-{seed}"
            trained = workshop.train(stage, **self.overrides(stabiliser, seed, workshop.recipe, plan["blocks"]))
            shutil.rmtree(trained.folder / "checkpoints", ignore_errors=True)
            runs.append({"stabiliser": stabiliser, "seed": seed, "stage": stage, **_measured(trained, name)})
        constant = plan["majority"] if name == "accuracy" else min(_before(run) for run in runs)
        sign = 1.0 if name == "accuracy" else -1.0
        for run in runs:
            run["failed"] = not (run["score"] is not None and sign * (run["score"] - constant) > self.margin)
        rows = [_row(s, [r for r in runs if r["stabiliser"] == s], sign) for s in self.stabilisers]
        chosen = workshop.do("chosen", lambda: _choose(rows, runs, sign))
        if not self.keep:
            for run in runs:
                if run["stage"] != chosen["stage"]:
                    shutil.rmtree(workshop.folder / run["stage"] / "model", ignore_errors=True)
        return self._report(workshop, rows, runs, chosen, constant, name, plan)

    def overrides(self, stabiliser: str, seed: int, recipe: Mapping[str, Any], depth: int) -> dict[str, Any]:
        """Fields of the recipe of one training.

        Args:
            stabiliser: One or several, joined by `+`.
            seed: Of the run, and of what begins anew.
            recipe: As plain data.
            depth: Blocks of the model.

        Raises:
            RecipeError: the bottom and the top that were asked for overlap.
        """
        words = stabiliser.split("+")
        frozen = depth // 2 if self.frozen is None else self.frozen
        fields: dict[str, Any] = {"method": "full", "adapters": [], "prompts": [], "train.seed": seed}
        fields |= {"report.forgetting": False, "report.generate_rows": 0, "report.samples": 0}
        if "fresh" in words:
            if self.fresh_blocks + (frozen if "freeze" in words else 0) > depth:
                raise RecipeError(
                    f"stable-finetuning: {stabiliser} needs {self.fresh_blocks} blocks at the top and {frozen} at the "
                    f"bottom, and the model has {depth}; change --option fresh_blocks or frozen"
                )
            rest = frozen if "freeze" in words else None
            fields["schedule"] = {"name": "fresh-top", "blocks": self.fresh_blocks, "frozen": rest, "seed": seed}
        elif "freeze" in words:
            fields["schedule"] = {"name": "telly", "blocks": frozen}
        if "decay" in words or "uncorrected" in words:
            delta = self.layer_decay if "decay" in words else 1.0
            corrected = "uncorrected" not in words
            fields["optimizer"] = {"name": "layer-decay", "layer_decay": delta, "bias_correction": corrected}
        if "longer" in words:
            train = recipe["train"]
            fields["train.warmup"] = self.warmup
            if train["steps"] is not None:
                fields["train.steps"] = round(self.longer * train["steps"])
            else:
                fields["train.epochs"] = self.longer * (train["epochs"] or 3.0)
        return fields

    def _report(
        self, workshop: Workshop, rows: list[Run], runs: list[Run], chosen: Run, constant: float, name: str, plan: Run
    ) -> Report:
        unit = "share" if name == "accuracy" else ""
        better: Literal["higher", "lower"] = "higher" if name == "accuracy" else "lower"
        plain, best = (next(r for r in rows if r["stabiliser"] == s) for s in (PLAIN, chosen["stabiliser"]))
        columns = [
            "stabiliser",
            "mean",
            "standard deviation",
            "worst",
            "best",
            "failed runs",
            "trains",
            "state",
            "time",
        ]
        table = Table("stabilisers", columns, units=["", unit, unit, unit, unit, "count", "count", "bytes", "seconds"])
        keys = ("stabiliser", "mean", "std", "worst", "best", "failed", "trains", "state", "seconds")
        for row in rows:
            row["trains"] = plan["above" if "freeze" in row["stabiliser"].split("+") else "all"]
            table.rows.append([row[key] for key in keys])
        every = Table("all runs", ["stabiliser", "seed", name, "failed", "folder"], collapsed=True)
        every.rows = [[r["stabiliser"], r["seed"], r["score"], r["failed"], r["stage"]] for r in runs]
        lines: dict[str, tuple[list[str], list[float]]] = {s: ([], []) for s in self.stabilisers}
        for r in runs:
            if r["score"] is not None:
                x, y = lines[r["stabiliser"]]
                x.append(str(r["seed"]))
                y.append(r["score"])
        labels = [row["stabiliser"] for row in rows]
        failed = {"failed": (labels, [row["failed"] for row in rows])}
        spread = {"standard deviation": (labels, [row["std"] or 0.0 for row in rows])}
        return Report(
            f"{workshop.recipe['model']['name']}, stable-finetuning",
            {
                "recommended": chosen["stabiliser"],
                f"mean {name}": Figure(best["mean"], plain["mean"], unit, better, help="Before: of plain."),
                "standard deviation": Figure(
                    best["std"], plain["std"], unit, "lower", help="Over seeds; before: plain."
                ),
                "failed runs": Figure(best["failed"], plain["failed"], "count", "lower", of=self.seeds),
                "constant answer": Figure(constant, unit=unit),
            },
            [table, every],
            [
                Plot("every run", "line", "seed", name, lines, unit=unit, styles=dict.fromkeys(lines, "points")),
                Plot("spread over seeds", "bar", "stabiliser", f"standard deviation of {name}", spread, unit=unit),
                Plot("failed runs", "bar", "stabiliser", f"of {self.seeds}", failed, unit="count"),
            ],
            notes=[plan["rule"]],
            warnings=[] if best["failed"] < self.seeds else ["All runs failed, with every stabiliser."],
            summary=f"{len(runs)} trainings. Of those with the fewest failed runs, {chosen['stabiliser']} has the best "
            f"mean; its best run is {workshop.folder / chosen['stage']}.",
            details={"runs": runs, "model": str(workshop.folder / chosen["stage"] / "model")},
        )


def _plan(workshop: Workshop, frozen: int | None) -> Run:
    """Blocks of the shortest stack, parameters, the share of the commonest class of the evaluation rows, the rule."""
    model = workshop.open().model
    depth = min(len(held) for held in blocks(model).values())
    held = workshop.held_out
    labels = Counter(held["label"]).most_common(1) if "label" in held.column_names and len(held) else []
    rows = len(workshop.rows)
    kind = str(getattr(model.config, "model_type", ""))
    if rows <= FEW:
        said = f"few rows ({rows}): fresh"
    elif kind == "electra" or depth >= LARGE:
        said = f"{'ELECTRA' if kind == 'electra' else f'{depth} blocks'}: decay"
    else:
        said = f"{depth} blocks: freeze"
    rule = f"The rule of the study for {said}. Its models are BERTs of 12 and 24 blocks, its smallest data 100 rows."
    rests = bottom(model, depth // 2 if frozen is None else frozen)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    above = sum(size for name, size in sizes.items() if name not in rests)
    majority = labels[0][1] / len(held) if labels else 0.0
    return {"blocks": depth, "all": sum(sizes.values()), "above": above, "majority": majority, "rule": rule}


def _measured(trained: Trained, name: str) -> Run:
    """The score, None where it is not finite; its value before training, and what the run cost."""
    found = trained.report.figures.get(name)
    if not isinstance(found, Figure):
        raise DataError(f"stable-finetuning: {trained.folder} has no {name}; give evaluation rows")
    value, before = (
        x if isinstance(x, int | float) and math.isfinite(x) else None for x in (found.value, found.before)
    )
    costs = {key: trained.figure(label) for key, label in _COSTS.items()}
    return {"score": value, "before": before, **costs}


_COSTS = {"state": "optimizer state", "seconds": "training time"}


def _before(run: Run) -> float:
    return math.inf if run["before"] is None else float(run["before"])


def _row(stabiliser: str, runs: Sequence[Run], sign: float) -> Run:
    """Mean, standard deviation (of a sample; None of fewer than two), worst and best of the finite scores; costs."""
    scores = [r["score"] for r in runs if r["score"] is not None]
    return {
        "stabiliser": stabiliser,
        "mean": mean(scores) if scores else None,
        "std": stdev(scores) if len(scores) > 1 else None,
        "worst": min(scores, key=lambda x: sign * x) if scores else None,
        "best": max(scores, key=lambda x: sign * x) if scores else None,
        "failed": sum(r["failed"] for r in runs),
        **{key: mean(r[key] for r in runs) for key in _COSTS},
    }


def _choose(rows: Sequence[Run], runs: Sequence[Run], sign: float) -> Run:
    """The stabiliser with the fewest failed runs, of these the best mean, of equal ones the first; its best run."""

    def value(score: float | None) -> float:
        return -math.inf if score is None else sign * score

    best = min(rows, key=lambda row: (row["failed"], -value(row["mean"])))
    own = [r for r in runs if r["stabiliser"] == best["stabiliser"]]
    return {"stabiliser": best["stabiliser"], "stage": max(own, key=lambda r: value(r["score"]))["stage"]}


def _check(recipe: Mapping[str, Any]) -> None:
    """Raise `RecipeError` where the fields that the stabilisers set are taken, or no weights train."""
    model, optimizer = recipe["model"], recipe["optimizer"]["name"]
    if model["quantization"] != "none" or model["adapter"] or recipe["prompts"]:
        raise RecipeError(
            "stable-finetuning trains the weights of a plain, unquantised model; merge model.adapter first, and leave "
            "out prompts"
        )
    if any(spec["name"] != "lora" for spec in recipe["adapters"]):
        raise RecipeError("stable-finetuning trains the weights themselves; leave out adapters")
    if recipe["schedule"] is not None or optimizer != "adamw_torch":
        raise RecipeError(
            "stable-finetuning compares schedules and optimizers, and the recipe names "
            f"{optimizer if recipe['schedule'] is None else recipe['schedule']['name']}; leave both out"
        )
