"""From a loaded base model, checked rows and a recipe to a model and its trainer; for a run, and for what parts of the
room `data` train on the way to one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from tunesmith import inputs
from tunesmith.core import packing, side
from tunesmith.core.initialise import initialise
from tunesmith.core.objective import ModelLoss, Objective
from tunesmith.core.optimizer import Optimizer
from tunesmith.core.part import Use
from tunesmith.core.prompt import Prompt
from tunesmith.core.steps import callbacks as adapter_callbacks
from tunesmith.core.trainer import TrainerMixin
from tunesmith.engine import arguments as engine_arguments
from tunesmith.engine import sharding
from tunesmith.engine.attach import attach
from tunesmith.errors import DataError, TunesmithError
from tunesmith.models.loader import ADAPTER_CONFIG, Task
from tunesmith.objectives.sft import SFT
from tunesmith.recipe import Recipe

STATISTICS_ROWS = 64
"""Training rows, taken evenly, that adapters which start from statistics of the data are given."""

Uses = Mapping[str, Sequence[Use]]


class Trainer(TrainerMixin, transformers.Trainer):
    """transformers' Trainer with what our parts need."""


@dataclass
class Built:
    """A model with every part of the recipe on it, and the rows as its tokens.

    Attributes:
        model: PEFT-wrapped if the recipe names an adapter or prompt.
        data: Encoded, with the collator that model and parts allow.
        notes: What the report should say of it.
    """

    model: nn.Module
    data: inputs.Encoded
    notes: list[str] = field(default_factory=list)


def build(
    base: nn.Module,
    recipe: Recipe,
    uses: Uses,
    gathered: inputs.Gathered,
    *,
    config: Any,
    processor: Any,
    start: bool = True,
) -> Built:
    """Put the parts on the base model and encode the rows for it.

    Args:
        base: Changed in place.
        recipe: Of the run.
        uses: Its parts by field.
        gathered: Its rows.
        config: Of the base.
        processor: Tokenizer or image processor.
        start: Give adapters that start from statistics their start; False where a checkpoint brings it.

    Raises:
        ModelError, DataError: as `attach` and `inputs.encode`.
    """
    uses = _with_groups(uses, gathered)
    model = attach(base, recipe, uses, gathered.task)
    prompts = [module for module in model.modules() if isinstance(module, Prompt)]
    data = inputs.encode(
        gathered,
        recipe.data,
        config=config,
        processor=processor,
        reserved=sum(prompt.length for prompt in prompts),
        longest=min((prompt.longest for prompt in prompts if prompt.longest is not None), default=None),
    )
    if data.pad_token is not None:
        base.config.pad_token_id = data.pad_token
    for use in uses.get("inference", []):
        use.part.target(**use.options).attach(model)
    built = _laid_out(Built(model, data), recipe, uses)
    known = side.groups_of(model)
    if known is not None:
        built = replace(built, data=replace(built.data, collator=side.Grouped(built.data.collator, known)))
    if start:
        initialise(built.model, statistics_batches(built, recipe.train.batch_size))
    return built


def as_arranged(recipe: Recipe, checkpoint: Path) -> Recipe:
    """The recipe with the ranks that its adapters shared out among their layers before the checkpoint was written."""
    file = checkpoint / ADAPTER_CONFIG
    parts = json.loads(file.read_text(encoding="utf-8")).get("parts", []) if file.exists() else []
    specs = [
        spec.model_copy(update={"ranks": entry["ranks"], "target_modules": None, "exclude_modules": None})
        if entry.get("ranks")
        else spec
        for spec, entry in zip(recipe.adapters, parts, strict=False)
    ]
    return recipe.model_copy(update={"adapters": [*specs, *recipe.adapters[len(specs) :]]})


def _with_groups(uses: Uses, gathered: inputs.Gathered) -> Uses:
    """The parts, those that tell groups of rows apart with the groups that the training rows have.

    Raises:
        DataError: the rows name no groups.
    """
    adapters = []
    for use in uses.get("adapters", []):
        if side.GROUP in getattr(use.part.target, "side", ()) and use.options.get("groups") is None:
            rows = gathered.train.dataset
            if side.GROUP not in rows.column_names:
                raise DataError(
                    f"{use.part.slug} tells groups of rows apart (tasks, languages), and the rows name none. Say which "
                    "column does: `data.columns: {family: YOUR_COLUMN}`."
                )
            named = sorted({str(name) for name in rows.unique(side.GROUP)})
            use = Use(use.part, {**use.options, "groups": named})
        adapters.append(use)
    return {**uses, "adapters": adapters} if adapters else uses


def _laid_out(built: Built, recipe: Recipe, uses: Uses) -> Built:
    """Rows end to end where the model and the parts allow it, padded where they do not."""
    spec = recipe.data
    if built.data.task != "causal-lm" or spec.padding_free is False:
        return built
    required = spec.padding_free is True or spec.packing
    blockers = [u for group in uses.values() for u in group if "padding-free" in u.part.refusals(u.options)]
    if blockers and not required:
        reason = blockers[0].part.refusals(blockers[0].options)["padding-free"]
        return replace(built, notes=[f"rows are padded, for {blockers[0].part.slug}: {reason}"])
    try:
        packing.enable(built.model)
    except TunesmithError as error:
        if required:
            raise
        return replace(built, notes=[f"rows are padded: {error}"])
    return replace(built, data=replace(built.data, collator=packing.Flatten()))


def statistics_batches(built: Built, size: int) -> list[dict[str, Any]]:
    """Training batches for what starts from statistics of the data, on the model's device."""
    count = len(built.data.train)
    chosen = (
        range(count) if count <= STATISTICS_ROWS else (i * count // STATISTICS_ROWS for i in range(STATISTICS_ROWS))
    )
    rows = [built.data.train[i] for i in chosen]
    batches = [built.data.collator(rows[i : i + size]) for i in range(0, len(rows), size)]
    device = next(built.model.parameters()).device
    return [packing.to_device(batch, device) for batch in batches]


def trainer(
    built: Built,
    recipe: Recipe,
    uses: Uses,
    args: TrainingArguments,
    *,
    processor: Any,
    callbacks: Sequence[TrainerCallback] = (),
    evaluate: bool = True,
    start: bool = True,
) -> Trainer:
    """The trainer of a built model, with the recipe's schedule, optimizer, objective and regularisers.

    Args:
        built: From `build`; its model is sharded here where torch does it, and a note says so.
        recipe: Of the run.
        uses: Its parts by field.
        args: From `engine.arguments`.
        processor: Tokenizer or image processor.
        callbacks: Further ones.
        evaluate: Whether it gets the evaluation rows.
        start: Show schedules the statistics that they want; False where a checkpoint brings what they learnt.
    """
    model, own = built.model, uses.get("optimizer", [])
    schedules = [use.part.target(**use.options) for use in uses.get("schedule", [])]
    for schedule in schedules:
        if schedule.statistics and start:
            schedule.calibrate(model, statistics_batches(built, recipe.train.batch_size))
    sharded_here = recipe.train.fsdp and sharding.by_torch()
    if sharded_here:
        built.notes.append("weights are sharded by torch, without a GPU: no checkpoints are written")
        sharding.shard(model)
    made = Trainer(
        model=model,
        args=args,
        train_dataset=built.data.train,
        eval_dataset=built.data.eval if evaluate else None,
        data_collator=built.data.collator,
        processing_class=processor,
        callbacks=[*schedules, *adapter_callbacks(model), *callbacks],
        optimizers=(_optimizer(own[0], model, recipe), None) if own else (None, None),
        objective=_objective(uses, built.data.task),
        regularisers=_regularisers(recipe, uses),
    )
    made.remove_callback(transformers.PrinterCallback)
    if sharded_here:
        sharding.leave_alone(made)
    return made


def _optimizer(use: Use, model: nn.Module, recipe: Recipe) -> Optimizer:
    cls = use.part.target
    groups = cls.groups(model, weight_decay=recipe.train.weight_decay, **use.options)
    return cls(groups, engine_arguments.learning_rate(recipe), **use.options)


def _objective(uses: Uses, task: Task) -> Objective | None:
    chosen = uses.get("objective", [])
    if chosen:
        return chosen[0].part.target(**chosen[0].options)
    if task == "causal-lm":
        return SFT()
    return ModelLoss() if uses.get("regularisers") else None


def _regularisers(recipe: Recipe, uses: Uses) -> list[tuple[Objective, float]]:
    return [
        (use.part.target(**use.options), float(spec.options.get("weight", 1.0)))
        for spec, use in zip(recipe.regularisers, uses.get("regularisers", []), strict=True)
    ]
