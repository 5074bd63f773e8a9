"""A recipe becomes a tuned model and a report: the one place where parts meet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from torch import nn
from transformers import set_seed

from tunesmith import inputs
from tunesmith.core import packing
from tunesmith.core.bridge import initialise
from tunesmith.core.meters import peak_memory, trainable
from tunesmith.core.objective import Objective
from tunesmith.core.optimizer import Optimizer
from tunesmith.core.part import Use
from tunesmith.core.prompt import Prompt
from tunesmith.core.report import Report
from tunesmith.core.steps import callbacks as adapter_callbacks
from tunesmith.core.trainer import TrainerMixin
from tunesmith.engine import arguments as engine_arguments
from tunesmith.engine import reporting, retain, select, sharding
from tunesmith.engine.attach import attach
from tunesmith.engine.callbacks import Meters, Progress, StopCleanly
from tunesmith.engine.measure import Measurer
from tunesmith.engine.run_folder import RunFolder
from tunesmith.engine.save import save_result
from tunesmith.errors import TunesmithError
from tunesmith.models import loader
from tunesmith.objectives.sft import SFT
from tunesmith.recipe import Recipe, load

STATISTICS_BATCHES = 8
"""Batches that adapters which start from statistics of the data are given."""


class InterruptedRunError(TunesmithError):
    """A signal stopped the run after a checkpoint."""


class Trainer(TrainerMixin, transformers.Trainer):
    """transformers' Trainer with what our parts need."""


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
    show: bool = False,
    **overrides: Any,
) -> Report:
    """Train as the recipe says; everything that a run leaves is in its folder (`engine.run_folder`).

    Args:
        recipe: A YAML file, a mapping, a `Recipe`, or nothing for the embedded default.
        resume: Go on from the last checkpoint of the same recipe in `output`.
        overwrite: Replace the run in `output`.
        quiet: No progress bar.
        show: Print the report on the terminal.
        overrides: Fields by dotted name, such as `**{"train.steps": 100}`.

    Raises:
        RecipeError: something that does not exist or cannot be combined; nothing was loaded.
        DataError, ModelError: the rows or the model are not what the task needs.
        CheckpointError: `output` holds another run.
        InterruptedRunError: a signal stopped it; a checkpoint was written.
    """
    asked = load(recipe, overrides)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    uses = asked.check(processes)
    state = PartialState(cpu=not torch.cuda.is_available())
    if asked.train.threads:
        torch.set_num_threads(asked.train.threads)
    folder = RunFolder(asked.output)
    checkpoint = None
    if state.is_main_process:
        checkpoint = folder.open(asked, resume=resume, overwrite=overwrite)
    state.wait_for_everyone()
    if resume and not state.is_main_process:
        checkpoint = folder.latest()
    return _Run(asked, uses, folder, checkpoint, quiet=quiet, show=show).go()


class _Run:
    """One run, in the order in which things happen."""

    def __init__(
        self,
        recipe: Recipe,
        uses: dict[str, list[Use]],
        folder: RunFolder,
        checkpoint: Path | None,
        *,
        quiet: bool,
        show: bool,
    ) -> None:
        self.recipe, self.uses, self.folder, self.checkpoint = recipe, uses, folder, checkpoint
        self.quiet, self.show = quiet, show
        self.state = PartialState()
        self.notes: list[str] = []
        self.retained: retain.Retained | None = None

    def go(self) -> Report:
        set_seed(self.recipe.train.seed)
        self._load()
        measurer = Measurer(self.recipe, self.data, self.retained, self.processor, self.task)
        before = self._before(measurer)
        trainer, meters, stop = self._trainer()
        with peak_memory() as peak:
            trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        if stop.signal is not None:
            raise InterruptedRunError(
                f"stopped at step {trainer.state.global_step}; a checkpoint is in {self.folder.checkpoints}. Go on "
                "with --resume."
            )
        after = measurer.measure(trainer.model)
        trained, parameters = trainable(self.model)
        cost = reporting.Cost(
            trained,
            parameters,
            meters.state_bytes,
            peak.bytes,
            trainer.tokens_seen * self.state.num_processes,
            meters.seconds,
            trainer.state.global_step,
        )
        self._save(trainer)
        history = trainer.state.log_history
        report = reporting.build(self.recipe, self.data, self.retained, before, after, cost, history, self.notes)
        if self.state.is_main_process:
            from tunesmith import report as rendering

            rendering.save(report, self.folder.path)
            if self.show:
                rendering.show(report)
        return report

    def _load(self) -> None:
        """Rows, processor and model; the parts that go onto the model; rows as tokens."""
        recipe, spec = self.recipe, self.recipe.data
        source = loader.resolve(recipe.model.name)
        config = loader.read_config(source, recipe.model.trust_remote_code)
        gathered = inputs.gather(spec, config=config, task=recipe.task)
        self.task = gathered.task
        self.processor = loader.load_processor(source, self.task, recipe.model.trust_remote_code)
        base: nn.Module = loader.load_base(
            source,
            self.task,
            dtype=recipe.model.dtype,
            quantization=recipe.model.quantization,
            labels=gathered.labels,
            trust_remote_code=recipe.model.trust_remote_code,
        )
        if recipe.model.adapter:
            base = loader.attach_adapter(base, recipe.model.adapter).merge_and_unload()
        gathered = select.apply(gathered, self.uses.get("select", []), recipe, base, self.processor)
        set_seed(recipe.train.seed)
        self.model = attach(base, recipe, self.uses, self.task)
        prompts = [m for m in self.model.modules() if isinstance(m, Prompt)]
        reserved = sum(prompt.length for prompt in prompts)
        self.data = inputs.encode(gathered, spec, config=config, processor=self.processor, reserved=reserved)
        if self.data.pad_token is not None:
            base.config.pad_token_id = self.data.pad_token
        if recipe.report.forgetting:
            self.retained = retain.rows(recipe, self.data, self.processor, config)
        for use in self.uses.get("inference", []):
            use.part.target(**use.options).attach(self.model)
        self._lay_out_batches()
        if self.checkpoint is None:
            self._initialise()

    def _lay_out_batches(self) -> None:
        """Rows end to end where the model and the parts allow it, padded where they do not."""
        spec = self.recipe.data
        if self.task != "causal-lm" or spec.padding_free is False:
            return
        required = spec.padding_free is True or spec.packing
        blockers = [u for uses in self.uses.values() for u in uses if "padding-free" in u.part.refusals(u.options)]
        if blockers and not required:
            reason = blockers[0].part.refusals(blockers[0].options)["padding-free"]
            self.notes.append(f"rows are padded, for {blockers[0].part.slug}: {reason}")
            return
        try:
            packing.enable(self.model)
        except TunesmithError as error:
            if required:
                raise
            self.notes.append(f"rows are padded: {error}")
            return
        self.data = replace(self.data, collator=packing.Flatten())

    def _initialise(self) -> None:
        size = self.recipe.train.batch_size
        rows = [self.data.train[i] for i in range(min(size * STATISTICS_BATCHES, len(self.data.train)))]
        batches = [self.data.collator(rows[i : i + size]) for i in range(0, len(rows), size)]
        device = next(self.model.parameters()).device
        initialise(self.model, [packing.to_device(batch, device) for batch in batches])

    def _before(self, measurer: Measurer) -> dict[str, Any]:
        held = self.folder.load_before()
        if held is not None and self.checkpoint is not None:
            return held
        self.model.to(self.state.device)
        measured = measurer.measure(self.model)
        if self.state.is_main_process:
            self.folder.save_before(measured)
        return measured

    def _trainer(self) -> tuple[Trainer, Meters, StopCleanly]:
        recipe = self.recipe
        steps = engine_arguments.total_steps(recipe, len(self.data.train), self.state.num_processes)
        own = self.uses.get("optimizer", [])
        args = engine_arguments.arguments(
            recipe,
            self.folder.checkpoints,
            steps=steps,
            own_optimizer=bool(own),
            unused_parameters=bool(self.uses.get("schedule")),
        )
        meters, stop = Meters(), StopCleanly()
        sharded_here = recipe.train.fsdp and sharding.by_torch()
        if sharded_here:
            self.notes.append("weights are sharded by torch, without a GPU: no checkpoints are written")
            sharding.shard(self.model)
        schedules = [use.part.target(**use.options) for use in self.uses.get("schedule", [])]
        trainer = Trainer(
            model=self.model,
            args=args,
            train_dataset=self.data.train,
            eval_dataset=self.data.eval,
            data_collator=self.data.collator,
            processing_class=self.processor,
            callbacks=[*schedules, *adapter_callbacks(self.model), meters, stop, Progress(self.quiet)],
            optimizers=(self._optimizer(own[0]), None) if own else (None, None),
            objective=self._objective(),
            regularisers=self._regularisers(),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        if sharded_here:
            sharding.leave_alone(trainer)
        return trainer, meters, stop

    def _optimizer(self, use: Use) -> Optimizer:
        cls = use.part.target
        groups = cls.groups(self.model, weight_decay=self.recipe.train.weight_decay, **use.options)
        return cls(groups, engine_arguments.learning_rate(self.recipe), **use.options)

    def _objective(self) -> Objective | None:
        chosen = self.uses.get("objective", [])
        if chosen:
            return chosen[0].part.target(**chosen[0].options)
        return SFT() if self.task == "causal-lm" else None

    def _regularisers(self) -> Sequence[tuple[Objective, float]]:
        specs = self.recipe.regularisers
        uses = self.uses.get("regularisers", [])
        return [
            (use.part.target(**use.options), float(spec.options.get("weight", 1.0)))
            for spec, use in zip(specs, uses, strict=True)
        ]

    def _save(self, trainer: Trainer) -> None:
        weights = sharding.gathered(trainer.model) if self.recipe.train.fsdp else None
        if self.state.is_main_process:
            model = trainer.accelerator.unwrap_model(trainer.model)
            save_result(model, self.processor, self.folder.model, self.recipe, self.data.labels, weights)
        self.state.wait_for_everyone()
