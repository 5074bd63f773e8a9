"""LT-SFT: fine-tune all, keep the entries that moved most, rewind, fine-tune these alone; the differences add up.

Ansell, Ponti, Korhonen and Vulic, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022, section 3.

    full      theta1 = all parameters of theta0 tuned by the recipe
    choose    the K entries of all maskable tensors together with the largest |theta1 - theta0|
    sparse    theta2 = theta0 with these entries tuned by the recipe, by `sparse-adamw`
    phi       theta2 - theta0, K places and values; and the head whole                              (Algorithm 1)
    compose   theta0 + phi_language + phi_task                                                      (section 3.2)

With n iterations each adds K / n entries that were not chosen yet, and begins, both times, where the last one ended.
To train phi_task for a source language, give that language's file as `on`: the result is still relative to theta0.
Maskable is everything but a head that is made for the task, which trains in both phases, and, as in the paper's
experiments, the normalisation layers, of which no entries are chosen.

Where we differ from the released code: K is exact, where its `>=` takes all that are equal at the threshold, and of the
right size for any n; weight decay of the recipe stays in the mask; the file is safetensors, holds K entries whatever
their size (theirs leaves out those below 1e-7) and knows its base. Its scripts freeze the normalisation layers in the
first phase too; here they train there and are rewound. Their L1 term is the distance from theta0 in all iterations,
here from where each begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from tunesmith.core.entries import Entries, digest, largest
from tunesmith.core.entryspace import task_head
from tunesmith.core.modelmap import roles
from tunesmith.core.part import part
from tunesmith.core.pipeline import Pipeline, Trained, Workshop
from tunesmith.core.report import Figure, Report, Table
from tunesmith.core.seeds import forked
from tunesmith.core.sparse import SparseDelta
from tunesmith.errors import RecipeError, TunesmithError

FILE = "delta.safetensors"
Density = Annotated[float, Field(gt=0, lt=1)]


@part(paper="arXiv:2110.07560")
class LotterySFT(Pipeline):
    """Lottery-ticket sparse fine-tuning.

    Args:
        density: K as a share of the maskable entries.
        count: K itself, instead.
        iterations: n, of both phases.
        full_steps: Optimizer steps of the first phase; None: those of the recipe, as the second has.
        l1: Weight of the mean distance from the start, in both phases; 0.1 for the paper's languages, 0 for its tasks.
        norms: Whether entries of normalisation layers may be chosen.
        on: A difference of this pipeline (a language's), file or folder, to apply to the model before anything else.
    """

    brisk: ClassVar[Mapping[str, object]] = {"density": 0.05, "iterations": 2, "full_steps": 2}
    tasks: ClassVar[tuple[str, ...]] = ("causal-lm", "seq2seq", "text-classification", "image-classification")

    def __init__(
        self,
        *,
        density: Density = 0.01,
        count: PositiveInt | None = None,
        iterations: PositiveInt = 1,
        full_steps: PositiveInt | None = None,
        l1: NonNegativeFloat = 0.0,
        norms: bool = False,
        on: str | None = None,
    ) -> None:
        self.density, self.count, self.iterations = density, count, iterations
        self.full_steps, self.l1, self.norms, self.on = full_steps, l1, norms, on

    def run(self, workshop: Workshop) -> Report:
        _check(workshop.recipe, self.l1)
        below = None if self.on is None else _read(self.on)
        start = None if below is None else workshop.files("start", partial(_apply, workshop, below))
        plan = workshop.do("plan", lambda: self._plan(workshop, start))
        stages: list[Trained] = []
        last: Path | None = start
        for i in range(self.iterations):
            full = workshop.train(f"full-{i + 1}", **self._full(last))
            mask = workshop.files(f"mask-{i + 1}", partial(self._choose, workshop, plan, start, full.model, i))
            spec = {"name": "sparse-adamw", "mask": str((mask / FILE).absolute()), "l1": self.l1}
            sparse = workshop.train(f"sparse-{i + 1}", **_on(last), optimizer=spec, schedule=None)
            stages += [full, sparse]
            last = sparse.model
        made = workshop.files("delta", partial(self._difference, workshop, start, stages[-1].model))
        return self._report(workshop, stages, SparseDelta.load(made / FILE))

    def _full(self, model: Path | None) -> dict[str, Any]:
        fields = _on(model)
        if self.l1:
            fields["optimizer"] = {"name": "sparse-adamw", "l1": self.l1}
        return fields | ({"train.steps": self.full_steps} if self.full_steps else {})

    def _plan(self, workshop: Workshop, start: Path | None) -> dict[str, Any]:
        """Names of the maskable tensors and of the head, how many entries the former have, and K."""
        model = workshop.open(start).model
        head, kinds = task_head(model), roles(model)
        chosen = {n for n, role in kinds.items() if n not in head and (self.norms or role.kind != "norm")}
        maskable = {n: p.numel() for n, p in model.named_parameters() if n in chosen}
        total = sum(maskable.values())
        K = self.count or int(self.density * total)
        if not self.iterations <= K <= total:
            raise RecipeError(
                f"lottery-sft: {K} entries of {total} are to train, in {self.iterations} iterations; expected "
                f"{self.iterations} to {total}. Change --option density or count."
            )
        return {"maskable": list(maskable), "head": sorted(head), "total": total, "K": K}

    def _choose(
        self, workshop: Workshop, plan: Mapping[str, Any], start: Path | None, tuned: Path, i: int, place: Path
    ) -> None:
        """Write the mask of iteration `i`: the entries of the last one, and those that moved most of all others."""
        base, moved = _tensors(workshop, start), _tensors(workshop, tuned)
        last = workshop.folder / f"mask-{i}" / FILE
        before = {n: e.indices.long() for n, e in SparseDelta.load(last).items()} if i else {}
        chosen = most_moved(base, moved, plan["maskable"], before, plan["K"] * (i + 1) // self.iterations)
        entries = {n: Entries.of(moved[n] - base[n], places) for n, places in chosen.items()}
        about = {"method": "lottery-sft", "iteration": i + 1, "maskable": plan["total"], "on": self.on}
        SparseDelta(entries, _digests(base, entries), {n: moved[n] for n in plan["head"]}, about).save(place / FILE)

    def _difference(self, workshop: Workshop, start: Path | None, tuned: Path, place: Path) -> None:
        """Write phi: what the entries of the last mask became, relative to the model without `on`."""
        mask = SparseDelta.load(workshop.folder / f"mask-{self.iterations}" / FILE)
        base, end = _tensors(workshop, start), _tensors(workshop, tuned)
        entries = {n: Entries.of(end[n] - base[n], e.indices.long()) for n, e in mask.items()}
        digests = mask.base if start is None else _digests(_tensors(workshop, None), mask)
        SparseDelta(entries, digests, {n: end[n] for n in mask.whole}, mask.about).save(place / FILE)

    def _report(self, workshop: Workshop, stages: list[Trained], delta: SparseDelta) -> Report:
        final, first = stages[-1].report, stages[0].report
        columns = [stage.folder.name for stage in stages]
        table = Table("quality", ["figure", "at first", *columns])
        figures: dict[str, Any] = {}
        for name, figure in final.figures.items():
            then = first.figures.get(name)
            if isinstance(figure, Figure) and isinstance(then, Figure) and figure.group in ("evaluation", "forgetting"):
                table.rows.append([name, then.before, *(stage.figure(name) for stage in stages)])
                figures[name] = replace(figure, before=then.before)
        whole = sum(t.numel() for t in delta.whole.values())
        figures["entries that train"] = Figure(
            delta.count, unit="count", better="lower", of=delta.about["maskable"], group="cost"
        )
        figures["size of the difference"] = Figure(delta.nbytes, None, "bytes", "lower", group="cost")
        file = workshop.folder / "delta" / FILE
        per = Table("where", ["tensor", "entries", "share"], collapsed=True)
        per.rows = [[n, len(e), len(e) / torch.Size(e.shape).numel()] for n, e in delta.items()]
        head = f", and a head of {whole}" if whole else ""
        return Report(
            f"LT-SFT: {delta.count} of {delta.about['maskable']} entries{head}",
            figures,
            summary=f"The difference is in {file}, the tuned model in {stages[-1].model}.",
            tables=[table, per],
            details={"delta": str(file), "model": str(stages[-1].model), **delta.about},
        )


def most_moved(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    maskable: list[str],
    before: Mapping[str, Tensor],
    count: int,
) -> dict[str, Tensor]:
    """Places by tensor, (k,) int64 ascending, `count` in all: those of `before`, and the most moved of the others.

    Raises:
        TunesmithError: a value is not finite, or fewer moved.
    """

    def sizes() -> Iterator[tuple[str, Tensor]]:
        for name in maskable:
            size = (tuned[name] - base[name]).abs()
            if not bool(size.isfinite().all()):
                raise TunesmithError(f"lottery-sft: {name!r} is not finite after the full fine-tuning; lower its rate")
            if name in before:
                size.view(-1)[before[name]] = 0
            yield name, size

    missing = count - sum(map(len, before.values()))
    found = largest(sizes(), missing)
    if (moved := sum(map(len, found.values()))) < missing:
        raise TunesmithError(
            f"lottery-sft: {missing} more entries were to be chosen, and only {moved} moved in the full fine-tuning; "
            "train it for longer, or lower `density`"
        )
    names = [name for name in maskable if name in found or name in before]
    empty = torch.empty(0, dtype=torch.int64)
    return {n: torch.cat([before.get(n, empty), found.get(n, empty)]).sort().values for n in names}


def _read(name: str) -> SparseDelta:
    path = Path(name)
    return SparseDelta.load(path / FILE if path.is_dir() else path)


def _on(model: Path | None) -> dict[str, Any]:
    fields: dict[str, Any] = {"method": "full", "adapters": []}
    return fields if model is None else {**fields, "model.name": str(model.absolute())}


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters in float32 or wider, tied ones once."""
    wide = {n: torch.promote_types(p.dtype, torch.float32) for n, p in model.named_parameters()}
    return {n: p.detach().to("cpu", wide[n]) for n, p in model.named_parameters()}


def _tensors(workshop: Workshop, model: Path | None) -> dict[str, Tensor]:
    return _named(workshop.open(model).model)


def _digests(base: Mapping[str, Tensor], names: Mapping[str, Any]) -> dict[str, int]:
    return {name: digest(base[name]) for name in names}


def _apply(workshop: Workshop, below: SparseDelta, place: Path) -> None:
    with forked(workshop.seed, "lottery-sft"):  # a new head is drawn while the model is loaded
        opened = workshop.open()
    below.add_(opened.model)
    opened.model.save_pretrained(place)
    opened.processor.save_pretrained(place)


def _check(recipe: Mapping[str, Any], l1: float) -> None:
    """Raise `RecipeError` for what has no weights that train, or two optimizers."""
    model = recipe["model"]
    if model["quantization"] != "none":
        raise RecipeError(
            f"lottery-sft trains the weights themselves, and model.quantization is {model['quantization']}; run it "
            "unquantised"
        )
    if model["adapter"] or recipe["prompts"] or any(spec["name"] != "lora" for spec in recipe["adapters"]):
        raise RecipeError(
            "lottery-sft trains the weights of a plain model; merge model.adapter into it first, and leave out "
            "adapters and prompts"
        )
    if l1 and recipe["optimizer"]["name"] not in ("adamw_torch", "sparse-adamw"):
        raise RecipeError(
            f"lottery-sft: l1 is a term of sparse-adamw, and the recipe names {recipe['optimizer']['name']}; leave "
            "optimizer or l1 out"
        )
