"""What our parts need from a Trainer, as a mixin for transformers' and TRL's.

    class MyTrainer(tunesmith.TrainerMixin, trl.SFTTrainer): ...
    MyTrainer(model=model, objective=IntuitiveFineTuning(), optimizers=(MeZO(groups), None), ...)

It adds, through methods that the Trainer means to be overridden: an objective with the right divisor under gradient
accumulation and several processes, regularisers, forward-only optimizers, an evaluation loss that is exact over
tokens, checkpoints that appear under their name only when they are complete, and in them what schedules and adapters
keep from step to step.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tunesmith.core.adapter import Adapter
from tunesmith.core.files import STAGING_PREFIX, replace_folder
from tunesmith.core.objective import Objective
from tunesmith.core.optimizer import Optimizer, set_lr_ratios
from tunesmith.core.packing import count_tokens
from tunesmith.core.schedule import Schedule
from tunesmith.core.tangents import reduced
from tunesmith.core.trace import Trace
from tunesmith.errors import CheckpointError, TunesmithError

STATE_FILE = "tunesmith_state.safetensors"
"""In a checkpoint: what parts keep from step to step beyond parameters."""
TRACE_FILE = "trace.safetensors"
"""In a checkpoint that holds no weights: what makes them from those that the run began with."""


class TrainerMixin:
    """Put before a Trainer class in a class statement.

    Args:
        objective: What is minimised; None leaves the loss to the Trainer and the model.
        regularisers: Objectives whose losses are added, each with its weight.
    """

    def __init__(
        self,
        *args: Any,
        objective: Objective | None = None,
        regularisers: Sequence[tuple[Objective, float]] = (),
        **kwargs: Any,
    ) -> None:
        if regularisers and objective is None:
            raise TunesmithError("regularisers are added to an objective; give one, `SFT()` for plain fine-tuning")
        self.objective = objective
        self.regularisers = list(regularisers)
        self._scalars: dict[str, list[Tensor]] = {}
        self._pending: list[tuple[dict[str, Any], Any]] = []
        self._staging: Path | None = None
        self._totals: Sequence[Tensor] = ()
        self.tokens_seen = 0
        """Real tokens that this process trained on, padding left out."""
        super().__init__(*args, **kwargs)
        if objective is not None:
            self.loss_is_scaled_for_ga = True

    # The objective ------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        if self.objective is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        terms = [self.objective, *(term for term, _ in self.regularisers)]
        none = torch.zeros((), dtype=torch.long, device=device)
        # Each term is divided by the total of what it counts itself: labels, rows, pairs.
        totals = torch.stack([sum((t.count(b).to(device) for b in batch_samples), none) for t in terms])
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        self._totals = totals.unbind()
        return self._totals[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        if self.objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with ExitStack() as watching:
            for term, _ in self.regularisers:
                watching.enter_context(term.watching(model))
            loss, scalars = self.objective(model, inputs, num_items_in_batch)
        for i, (term, weight) in enumerate(self.regularisers, 1):
            extra, more = term(model, inputs, None if num_items_in_batch is None else self._totals[i])
            loss, scalars = loss + weight * extra, {**scalars, **more}
        for name, value in scalars.items():
            self._scalars.setdefault(name, []).append(value.detach())
        # Data-parallel wrappers average gradients over processes; the total is over all of them already.
        if model.training:
            loss = loss * self.args.world_size
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._scalars:
            logs.update({name: float(torch.stack(values).mean()) for name, values in self._scalars.items()})
            self._scalars.clear()
        super().log(logs, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.tokens_seen += sum(count_tokens(batch) for batch in batches)
        for schedule in self._schedules():
            if schedule.measures:
                schedule._measure = lambda: self._loss_of(batches)
                schedule._backward = lambda: self._gradients_of(batches, items)
        return batches, items

    # What parts ask and keep --------------------------------------------------------------------------------------

    def _schedules(self) -> list[Schedule]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, Schedule)]

    @torch.no_grad()
    def _loss_of(self, batches: Sequence[dict[str, Any]]) -> float:
        """The loss of a step's batches in evaluation mode, the mean over processes; no scalars are logged."""
        model, scalars = self.model, self._scalars
        was = model.training
        model.eval()
        self._scalars = {}
        try:
            with self.compute_loss_context_manager():
                given = [self._prepare_inputs(batch) for batch in batches]
                losses = [self.compute_loss(model, b) for b in given]
        finally:
            model.train(was)
            self._scalars = scalars
        mean = torch.stack([loss.detach().float() for loss in losses]).mean()
        return float(self.accelerator.reduce(mean, "mean"))

    def _gradients_of(self, batches: Sequence[dict[str, Any]], items: Any) -> None:
        """Gradients of a step's loss, evaluation mode, averaged over processes; no scalars are logged."""
        # Not the wrapper of several processes: it would take these gradients for those of the step.
        model, scalars = self.accelerator.unwrap_model(self.model), self._scalars
        was = model.training
        model.eval()
        self._scalars = {}
        try:
            self._step_loss(model, [(self._prepare_inputs(batch), items) for batch in batches], backward=True)
        finally:
            model.train(was)
            self._scalars = scalars
        self._reduce_gradients(model)

    def _reduce_gradients(self, model: nn.Module) -> None:
        """After `_step_loss` with a backward pass: make the gradients those of all processes."""
        for p in model.parameters():
            if p.grad is not None:
                p.grad.copy_(self.accelerator.reduce(p.grad, self._over_processes))

    @property
    def _over_processes(self) -> str:
        """How losses of `_step_loss` in all processes become one: the objective has divided by the total of all."""
        return "mean" if self.objective is None else "sum"

    def _step_loss(self, model: nn.Module, batches: Sequence[tuple[Any, Any]], *, backward: bool = False) -> Tensor:
        """The loss of a whole optimizer step in this process, () without a graph, in evaluation mode.

        Args:
            batches: Prepared micro-batches, each with the number of items in the step.
            backward: Also add its gradient to the parameters.
        """
        # Without the count of the whole step the model divides by the labels of each micro-batch.
        shares = self.objective is None and not (self.model_accepts_loss_kwargs and batches[0][1] is not None)
        losses = []
        for batch, items in batches:
            with torch.set_grad_enabled(backward), self.compute_loss_context_manager():
                loss = self.compute_loss(model, batch, num_items_in_batch=items)
            loss = loss / len(batches) if shares else loss
            if backward:
                _add_gradients(loss, model)
            losses.append(loss.detach() if backward else loss)  # to detach would take a forward-mode tangent too
        return torch.stack(losses).sum()

    def _training_state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for i, schedule in enumerate(self._schedules()):
            found |= {f"schedule/{i}/{key}": value for key, value in schedule.training_state().items()}
        for name, module in self.accelerator.unwrap_model(self.model).named_modules():
            if isinstance(module, Adapter):
                found |= {f"adapter/{name}/{key}": value for key, value in module.training_state().items()}
        return {key: value.detach().cpu().contiguous() for key, value in found.items()}

    def log_of_run(self) -> Trace | None:
        """What the optimizer keeps instead of weights, if it does."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer.log() if isinstance(optimizer, Optimizer) else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        log = self.log_of_run() if self._staging and output_dir else None
        if log is None:
            super().save_model(output_dir, _internal_call)
            return
        if self.args.load_best_model_at_end:
            raise TunesmithError(
                "load_best_model_at_end=True needs checkpoints with weights, and these hold the optimizer's trace; set "
                "it to False, or let the optimizer keep weights"
            )
        if self.args.should_save and output_dir:
            log.save(Path(output_dir) / TRACE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not (Path(resume_from_checkpoint) / TRACE_FILE).exists():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (trace := Path(checkpoint) / TRACE_FILE).exists():
            Trace.load(trace).replay_(self.optimizer.param_groups)
        if checkpoint is None or not (file := Path(checkpoint) / STATE_FILE).exists():
            return
        owners: dict[str, Any] = {f"schedule/{i}": schedule for i, schedule in enumerate(self._schedules())}
        for name, module in self.accelerator.unwrap_model(self.model).named_modules():
            if isinstance(module, Adapter):
                owners[f"adapter/{name}"] = module
        held: dict[str, dict[str, Tensor]] = {}
        for key, value in load_file(file, device=str(self.args.device)).items():
            owner = next((name for name in owners if key.startswith(f"{name}/")), None)
            if owner is None:
                raise CheckpointError(f"{file}: {key!r} belongs to no part of this run; resume it by its own recipe")
            held.setdefault(owner, {})[key.removeprefix(f"{owner}/")] = value
        for name, state in held.items():
            owner = owners[name]
            owner.restore(state) if isinstance(owner, Schedule) else owner.load_training_state(state)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        set_lr_ratios(getattr(made, "optimizer", made), self.model)
        return made

    # Forward-only optimizers --------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if not getattr(optimizer, "forward_only", False):
            loss = super().training_step(model, inputs, num_items_in_batch)
            if not bool(loss.isfinite()):
                raise TunesmithError(self._diverged(float(loss)))
            return loss
        self._pending.append((self._prepare_inputs(inputs), num_items_in_batch))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._pending = self._pending, []
        model.eval()  # the two sides of a finite difference must see the same function: no dropout

        def closure() -> Tensor:
            backward = torch.is_grad_enabled()
            # Not the wrapper of several processes: it would wait for gradients of all that trains.
            inner = self.accelerator.unwrap_model(model) if backward else model
            loss = self._step_loss(inner, batches, backward=backward)
            if backward:
                self._reduce_gradients(inner)
            return reduced(loss, lambda value: self.accelerator.reduce(value, self._over_processes))

        with torch.no_grad():
            loss = optimizer.estimate(closure)
        model.train()
        return loss

    def _diverged(self, loss: float) -> str:
        return (
            f"the loss is {loss} at step {self.state.global_step + 1}: training diverged. Lower train.learning_rate "
            f"(now {self.args.learning_rate:g}), add warm-up, or train in float32. Finished checkpoints are kept in "
            f"{self.args.output_dir}."
        )

    # Evaluation ---------------------------------------------------------------------------------------------------

    def evaluation_loss(self, dataloader: Any) -> float:
        """The objective over a whole data set, divided once by the whole count; over all processes.

        Regularisers are left out: they shape training, and are not what is to be good.
        """
        assert self.objective is not None
        model = self.model
        was = model.training
        model.eval()
        weighted = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, _ = self.objective(model, batch)
            count = self.objective.count(batch)
            weighted += torch.stack([loss.double() * count, count.double()]).to(weighted.device)
        model.train(was)
        weighted = self.accelerator.reduce(weighted, "sum")
        return float(weighted[0] / weighted[1].clamp_min(1))

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        if self.objective is None:
            return super().evaluation_loop(dataloader, description, *args, **kwargs)
        from transformers.trainer_utils import EvalLoopOutput

        prefix = kwargs.get("metric_key_prefix", "eval")
        loss = self.evaluation_loss(dataloader)
        metrics = {f"{prefix}_loss": loss, f"{prefix}_perplexity": math.exp(min(loss, 700.0))}
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))

    # Checkpoints --------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's, but into a folder that takes its name only when every process has written its part."""
        final = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._staging = final / f"{STAGING_PREFIX}{name}"
        try:
            super()._save_checkpoint(model, trial)
            state = self._training_state()
            if state and self.args.should_save:
                save_file(state, self._staging / name / STATE_FILE)
        finally:
            staging, self._staging = self._staging, None
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            replace_folder(staging / name, final / name)
            os.rmdir(staging)
            from transformers.trainer_utils import rotate_checkpoints

            rotate_checkpoints(
                output_dir=str(final),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()


def _add_gradients(loss: Tensor, model: nn.Module) -> None:
    """`loss.backward()`, past the hooks on parameters: to several processes' wrapper, what passes those is a step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p, found in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
        if found is not None:
            p.grad = found if p.grad is None else p.grad.add_(found)
