"""AutoPEFT: a search for which adapter modules, of which sizes, in which blocks, that keeps every good trade-off.

Zhou, Wan, Vulic and Korhonen, "AutoPEFT: Automatic Configuration Search for Parameter-Efficient Fine-Tuning", TACL
2024.

A configuration has one bit per block and one size for each of three modules (section 2; the part `bottleneck`), from
the model's width down by halves to 1, or off: 11^3 2^12 for BERT-base. Both of (trainable share of the model, metric)
are optimised: half of the trials at random, the others suggested in batches by Gaussian processes with expected
hypervolume improvement (section 3). What no other trial beats in both is the Pareto set; one of it is trained in full.

Differences: the surrogate is optuna's (a Matern kernel with fitted scales per dimension) instead of NUTS over a sparse
prior, and values are standardised instead of ranked. The cost is what trains, biases included (0.1 % of a bottleneck of
size 768, a third of one of size 1); the paper's count leaves out biases and the MLP of its prefixes. Sizes and bits
follow the model at hand. Every draw has a seed; the released restarts depend on the clock.
"""

from __future__ import annotations

import copyreg
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt

from tunesmith.adapters.bottleneck import Block, blocks_of
from tunesmith.core.part import part
from tunesmith.core.pipeline import Pipeline, Workshop
from tunesmith.core.report import Report
from tunesmith.core.seeds import subset
from tunesmith.errors import DataError, RecipeError
from tunesmith.recipes import autopeft_report as reporting
from tunesmith.recipes.autopeft_space import MODULES, Module, Space, words
from tunesmith.recipes.pareto import Code, Search, Trial, pareto


@part(paper="arXiv:2301.12132", extras=("search",))
class AutoPEFT(Pipeline):
    """Search over `bottleneck`; it replaces the adapters of the recipe.

    Args:
        trials: Trainings of the search.
        start: Of them with random configurations.
        batch: Trials suggested at once, before any of them is evaluated.
        workers: Processes that train them, one thread each; the result does not depend on it.
        sampler: `gp`, or `tpe` (tree-structured Parzen estimators), or `random`.
        metric: Of the evaluation rows; `auto` is accuracy for classification and loss otherwise.
        modules: That may be used, of `serial`, `parallel` and `prefix`.
        scale: Factor of the parallel bottleneck.
        trial_steps: Optimizer steps of a trial; None is the recipe's own length.
        trial_rows: Training rows of a trial, the same in all; None is all.
        reference: Share of the model and metric that a trial must be better than to add to the hypervolume, such as
            (0.26, 0.7); None takes the worst of the random trials.
        budget: Largest share of the model that the chosen configuration may train; None is any.
    """

    brisk: ClassVar[Mapping[str, object]] = {"trials": 3, "start": 2, "batch": 2, "trial_steps": 2}

    def __init__(
        self,
        *,
        trials: PositiveInt = 200,
        start: PositiveInt = 100,
        batch: PositiveInt = 4,
        workers: PositiveInt = 1,
        sampler: Literal["gp", "tpe", "random"] = "gp",
        metric: Literal["auto", "accuracy", "loss"] = "auto",
        modules: tuple[Module, ...] = MODULES,
        scale: PositiveFloat = 4.0,
        trial_steps: PositiveInt | None = None,
        trial_rows: PositiveInt | None = None,
        reference: tuple[PositiveFloat, float] | None = None,
        budget: PositiveFloat | None = None,
    ) -> None:
        if start < 2 or start > trials:
            raise RecipeError(f"autopeft: `start` is {start} of {trials} trials; at least 2 and at most all are random")
        if not modules or len(set(modules)) < len(modules):
            raise RecipeError(f"autopeft: `modules` is {list(modules)}; name each of {', '.join(MODULES)} at most once")
        self.trials, self.start, self.batch, self.workers, self.sampler = trials, start, batch, workers, sampler
        self.metric, self.modules, self.scale = metric, tuple(m for m in MODULES if m in modules), scale
        self.trial_steps, self.trial_rows = trial_steps, trial_rows
        self.reference, self.budget = reference, budget

    def run(self, workshop: Workshop) -> Report:
        data = workshop.recipe["data"]
        if "prefix" in self.modules and (data["padding_free"] is True or data["packing"]):
            raise RecipeError(
                "autopeft: a prefix needs padded rows, and data.padding_free or data.packing is true; leave prefix out "
                "of `modules`, or change the recipe"
            )
        name = self.metric
        if name == "auto":
            name = "accuracy" if workshop.task.endswith("classification") else "loss"
        sign = -1.0 if name == "accuracy" else 1.0
        base = workshop.do("space", lambda: _space(workshop))
        space = Space(tuple(Block(**block) for block in base["blocks"]), self.modules)
        search = Search(
            space.coordinates,
            space.valid,
            total=self.trials,
            start=self.start,
            batch=self.batch,
            sampler=self.sampler,
            seed=workshop.seed,
            points=space.points,
            file=workshop.folder / "search" / "journal.log",
        )
        self._search(workshop, search, space, base["parameters"], name, sign)
        done = [trial for trial in search.done() if trial.values is not None]
        if not done:
            raise DataError(f"autopeft: no trial gave a finite {name}; lower train.learning_rate")
        chosen = workshop.do("chosen", lambda: self._choose(done))
        code = next(trial.code for trial in done if trial.number == chosen["number"])
        workshop.say(f"chosen: {words(space.decode(code), len(space.blocks))}")
        final = workshop.train("final", adapters=[self._adapter(space, code)])
        kept = reporting.Kept(search.done(), space, self.start, self.reference, base["parameters"], name)
        return kept.report(workshop, final.report.figure(name), code, within=chosen["within"], budget=self.budget)

    # The search ---------------------------------------------------------------------------------------------------

    def _search(
        self, workshop: Workshop, search: Search, space: Space, parameters: int, name: str, sign: float
    ) -> None:
        progress = iter(workshop.track(range(self.trials), "trials"))
        for _ in range(len(search.done())):
            next(progress, None)
        while todo := search.next():
            for trial, value in zip(todo, self._evaluate(workshop, space, todo, name), strict=True):
                share = space.count(trial.code) / parameters
                search.tell(trial, None if value is None else (share, sign * value))
                shown = "no finite value" if value is None else f"{value:.4f}"
                made = words(space.decode(trial.code), len(space.blocks))
                workshop.say(f"trial {trial.number}: {made}: {share:.2%} of the model, {name} {shown}")
                next(progress, None)

    def _evaluate(self, workshop: Workshop, space: Space, todo: Sequence[Trial], name: str) -> list[float | None]:
        """The metric of each trial, None where it is not finite."""
        jobs = [(f"trial-{t.number:03d}", self._adapter(space, t.code)) for t in todo]
        work = partial(_train, workshop, steps=self.trial_steps, rows=self.trial_rows, metric=name)
        if self.workers == 1 or len(jobs) == 1:
            return [work(*job) for job in jobs]
        from joblib import Parallel, delayed, parallel_config
        from rich.console import Console

        copyreg.pickle(Console, _silent)  # a terminal does not go to another process
        with parallel_config(backend="loky", inner_max_num_threads=1):
            return Parallel(n_jobs=min(self.workers, len(jobs)))(delayed(work)(*job, alone=False) for job in jobs)

    def _adapter(self, space: Space, code: Code) -> dict[str, Any]:
        return {"name": "bottleneck", "scale": self.scale, **space.decode(code)}

    def _choose(self, done: Sequence[Trial]) -> dict[str, Any]:
        """The best metric within the budget; the smallest share if none is."""
        points = [trial.values or (math.inf, math.inf) for trial in done]
        front = pareto(points)
        within = [i for i in front if self.budget is None or points[i][0] <= self.budget]
        best = min(within, key=lambda i: points[i][1]) if within else front[0]
        return {"number": done[best].number, "within": bool(within)}


def _space(workshop: Workshop) -> dict[str, Any]:
    model = workshop.open().model
    return {
        "blocks": [asdict(block) for block in blocks_of(model)],
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _train(
    workshop: Workshop,
    name: str,
    adapter: Mapping[str, Any],
    *,
    steps: int | None,
    rows: int | None,
    metric: str,
    alone: bool = True,
) -> float | None:
    """The metric of one trial; also what another process runs."""
    if not alone:
        import torch

        torch.set_num_threads(1)
    # Trials are compared by one figure: nothing else is measured in them.
    overrides: dict[str, Any] = {"report.forgetting": False, "report.generate_rows": 0, "report.samples": 0}
    if steps is not None:
        overrides["train.steps"] = steps
    few = None
    if rows is not None and rows < len(workshop.rows):
        few = workshop.choose(subset(len(workshop.rows), rows, workshop.seed, "autopeft"))
    trained = workshop.train(name, few, **{"adapters": [dict(adapter)], **overrides})
    for left in (trained.folder / "checkpoints", workshop.folder / f"rows-{name}"):
        shutil.rmtree(left, ignore_errors=True)  # the report is what a trial was for
    value = trained.report.figure(metric).value
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _silent(_: object) -> tuple[Any, tuple]:
    from rich.console import Console

    return partial(Console, quiet=True), ()
