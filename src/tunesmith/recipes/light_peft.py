"""Light-PEFT: find the heads, neurons and adapter ranks that are not needed, cut them out early, tune what is left.

Gu, Fu, Liu, Shen, Lin, Wang, Hu and Wang, "Light-PEFT: Lightening Parameter-Efficient Fine-Tuning via Early Pruning",
Findings of ACL 2024.

    estimate   loss + 1e-4 sum |m|, training a low-rank adapter and factors m of heads and neurons  (structure-masks)
    score      heads and neurons by |m|
               adapters by the mean over tokens of |s B A x| / |W x + b|
               ranks by |mean_k A_jk dL/dA_jk| + |mean_k B_kj dL/dB_kj|
    cut        a third of the heads of each layer, a third of all neurons, 75 % of the adapters, half of the ranks left
    tune       the smaller model with the smaller adapter

Where this differs from the paper and its code:

- Scores are averages over batches of training rows once the estimation has ended, not over its second half: they are
  of the factors that are cut.
- The estimated factors that stay are folded into the cut model, and adapters of the ranks that are left begin anew
  there: tuning starts at the estimated function, with as many trainable numbers, and needs no estimated start in the
  adapter. What is cut of the adapter is gone. The scale alpha / r stays that of the estimation.
- Exactly the asked share goes, rounded down, of equals from the ends of all layers alike; the released quantile with a
  strict `>` removes 6 of 16 heads, and all of them where all are equal. Every layer keeps a head and a neuron. Scores
  that are no finite numbers count as 0. |m| decides; the released code sorts by m, so a large negative factor goes.
- Factors that stay are dropped as in the paper (`folding: false`) or folded into the weights.

The sum before the absolute value in a rank's score is no cancellation by accident: sum_k A_jk dL/dA_jk equals
sum_k B_kj dL/dB_kj, the slope of the loss along that component's size, so that the score is that slope times
1/in + 1/out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn

from tunesmith.core.part import part
from tunesmith.core.pipeline import Pipeline, Trained, Workshop
from tunesmith.core.report import Figure, Report, Table
from tunesmith.errors import RecipeError
from tunesmith.recipes.light_peft_cuts import Cuts, decide, reduce, score

Share = Annotated[float, Field(ge=0, lt=1)]


@part(paper="arXiv:2406.03792")
class LightPEFT(Pipeline):
    """Early pruning of model and adapter, then tuning.

    Args:
        adapter: The low-rank adapter of both stages, one that other adapters can stand on (`lora` cannot).
        adapter_options: Of it; for `eva`, `{rho: 1}` gives every layer the same rank, as LoRA has.
        rank: r of the estimation.
        alpha: The factor in front is alpha / r, in both stages.
        estimation_steps: Optimizer steps of the estimation; those of the recipe are the tuning's.
        sparsity: Weight of sum |m|.
        head_lr: Learning rate of heads' factors as a multiple of the recipe's.
        neuron_lr: The same of neurons' factors.
        score_batches: Training batches that adapters and ranks are scored on.
        heads: Share of each layer's heads that goes, rounded down; heads that share keys count as one.
        neurons: Share of all neurons that goes.
        modules: Share of the adapters that goes.
        ranks: Share of the ranks of the adapters left that goes.
        folding: Fold the factors of what stays into the weights instead of dropping them.
    """

    brisk: ClassVar[Mapping[str, object]] = {"estimation_steps": 2, "score_batches": 1, "heads": 0.5, "rank": 4}
    tasks: ClassVar[tuple[str, ...]] = ("causal-lm", "text-classification", "image-classification")

    def __init__(
        self,
        *,
        adapter: str = "eva",
        adapter_options: dict[str, Any] | None = None,
        rank: PositiveInt = 8,
        alpha: PositiveFloat = 16.0,
        estimation_steps: PositiveInt = 800,
        sparsity: NonNegativeFloat = 1e-4,
        head_lr: PositiveFloat = 1.0,
        neuron_lr: PositiveFloat = 1.0,
        score_batches: PositiveInt = 32,
        heads: Share = 1 / 3,
        neurons: Share = 1 / 3,
        modules: Share = 0.75,
        ranks: Share = 0.5,
        folding: bool = False,
    ) -> None:
        own = {"rho": 1} if adapter == "eva" and adapter_options is None else adapter_options or {}
        self.low_rank = {"name": adapter, **own}
        self.rank, self.alpha, self.steps, self.sparsity = rank, alpha, estimation_steps, sparsity
        self.masks = {"name": "structure-masks", "head_lr": head_lr, "neuron_lr": neuron_lr}
        self.score_batches, self.folding = score_batches, folding
        self.cuts = Cuts(heads, neurons, modules, ranks)

    def run(self, workshop: Workshop) -> Report:
        _check(workshop.recipe)
        first = {**self.low_rank, "rank": self.rank, "alpha": self.alpha}
        term = {"name": "mask-sparsity", "weight": self.sparsity}
        estimated = workshop.train(
            "estimation",
            method=None,
            adapters=[first, self.masks],
            regularisers=[*workshop.recipe["regularisers"], term],
            **{"train.steps": self.steps},
        )
        size = workshop.recipe["train"]["batch_size"]
        rows = workshop.choose(range(min(len(workshop.rows), size * self.score_batches)))

        def scored() -> dict[str, torch.Tensor]:
            opened = workshop.open(estimated.model)
            workshop.say("scoring heads, neurons, adapters and ranks")
            return score(opened.model, opened.batches(rows, size))

        scores = workshop.tensors("scores", scored)
        plan = workshop.do("plan", lambda: decide(scores, self.cuts))

        def smaller(folder: Path) -> None:
            opened = workshop.open(estimated.model)
            reduce(opened.model, plan, folding=self.folding).save_pretrained(folder)
            opened.processor.save_pretrained(folder)

        pruned = workshop.files("pruned", smaller)
        some = workshop.choose(range(min(len(workshop.rows), size)))
        models = {"before": None, "after": pruned}
        sizes = workshop.do("sizes", lambda: {n: _size(workshop.open(m), some, size) for n, m in models.items()})
        left = {name: len(kept) for name, kept in plan["ranks"].items()}
        second = [  # one entry per rank, so that alpha / r is the same for all
            {**self.low_rank, "alpha": self.alpha * r / self.rank, "ranks": {n: k for n, k in left.items() if k == r}}
            for r in sorted(set(left.values()))
        ]
        tuned = workshop.train("tuned", method=None, adapters=second, **{"model.name": str(pruned.absolute())})
        return _report(estimated, tuned, plan, sizes)


def _check(recipe: Mapping[str, Any]) -> None:
    """Raise `RecipeError` for what a cut model cannot be made from."""
    model, named = recipe["model"], [spec["name"] for spec in recipe["adapters"]]
    if model["quantization"] != "none":
        raise RecipeError(
            f"light-peft cuts weights, and model.quantization is {model['quantization']}; run it unquantised. Its cut "
            "model can then be loaded with a quantisation."
        )
    if model["adapter"] or recipe["prompts"]:
        raise RecipeError("light-peft cuts a plain model; merge model.adapter into it first, and leave prompts out")
    if any(name != "lora" for name in named):
        raise RecipeError(f"light-peft brings its own adapter; give its option `adapter` instead of {', '.join(named)}")


def _size(opened: Any, rows: Any, size: int) -> dict[str, float]:
    """Parameters of a model, and the median seconds of its forward pass on a batch."""
    batch = opened.batches(rows, size)[0]
    return {"parameters": sum(p.numel() for p in opened.model.parameters()), "seconds": seconds(opened.model, batch)}


@torch.no_grad()
def seconds(model: nn.Module, batch: Mapping[str, Any], times: int = 7) -> float:
    """The median of some forward passes, after one that does not count."""
    taken = []
    for _ in range(times + 1):
        began = time.perf_counter()
        model(**batch)
        if next(model.parameters()).is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def _report(estimated: Trained, tuned: Trained, plan: Mapping[str, Any], sizes: Mapping[str, Any]) -> Report:
    left = {kind: sum(map(len, plan[kind].values())) for kind in ("heads", "neurons", "ranks")}
    left["modules"] = len(plan["ranks"])
    names = {"heads": "heads", "neurons": "neurons", "modules": "adapters", "ranks": "ranks of adapters"}
    figures: dict[str, Any] = {
        f"{names[kind]} removed": Figure(1 - left[kind] / max(count, 1), unit="share", group="cut")
        for kind, count in plan["counts"].items()
    }
    for name, key, unit in (("parameters", "parameters", "count"), ("forward pass", "seconds", "seconds")):
        after, before = sizes["after"][key], sizes["before"][key]
        figures[name] = Figure(after, before, unit, "lower", group="cost", help="Of the model without adapter.")
    columns = ["figure", "at first", "estimated", "cut", "tuned"]
    quality: dict[str, Figure] = {}
    table = Table("quality", columns, note="`cut` is the estimated model right after everything was cut out.")
    for name, figure in tuned.report.figures.items():
        then = estimated.report.figures.get(name)
        if isinstance(figure, Figure) and isinstance(then, Figure) and figure.group in ("evaluation", "forgetting"):
            table.rows.append([name, then.before, then.value, figure.before, figure.value])
            quality[name] = replace(figure, before=then.before)
    trained = [t.figure("trainable parameters") for t in (estimated, tuned)]
    figures["trainable parameters"] = Figure(trained[1], trained[0], "count", "lower", group="cost")
    kept = Table("what stays", ["layer", "heads", "neurons", "ranks"], collapsed=True)
    for name in dict.fromkeys([*plan["heads"], *plan["neurons"], *plan["ranks"]]):
        kept.rows.append([name, *(len(plan[k][name]) if name in plan[k] else None for k in kept.columns[1:])])
    return Report(
        "light-peft",
        {**quality, **figures},
        [table, kept],
        summary=f"A smaller model in {tuned.folder.parent / 'pruned'} and its adapter in {tuned.model}.",
        details={"plan": dict(plan)},
    )
