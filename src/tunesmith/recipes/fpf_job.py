"""The stages of FPF: steps of the stream and fine-tuning phases, each going on from the state of the one before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.core.pipeline import Opened, Workshop
from tunesmith.core.seeds import forked
from tunesmith.errors import CheckpointError, RecipeError
from tunesmith.recipes.fpf_learn import (
    Loop,
    Meter,
    Movement,
    finetune,
    select,
    sensitivity,
    sgd,
    sizes,
    switched,
    usual,
)
from tunesmith.recipes.fpf_stream import Step, slots
from tunesmith.recipes.fpf_tasks import accuracy, chunks, witnesses
from tunesmith.schedules.prone_modules import tracking

if TYPE_CHECKING:
    from tunesmith.recipes.fpf import FPF

RATE, ITERATIONS = 0.05, 60
Found = Sequence[Mapping[str, Any]]
"""What the stages so far have left as plain data."""


class Job:
    """The stages: each opens the model, takes up the state of the one before, and leaves its own."""

    def __init__(self, options: FPF, workshop: Workshop, divided: Mapping[str, Any], train: Mapping[str, Any]) -> None:
        self.options, self.workshop, self.divided = options, workshop, divided
        self.rate, self.decay = train["learning_rate"] or RATE, train["weight_decay"]
        self.iterations = options.iterations or train["steps"] or ITERATIONS
        self.loop = Loop(clip=train["max_grad_norm"], bf16=train["precision"] == "bf16", seed=workshop.seed)
        self.beside = witnesses(workshop.rows)
        self.opened: Opened | None = None
        self.at = ""
        """The stage whose state the model has."""
        self.optimizer: torch.optim.Optimizer
        self.moved: Movement
        self.logits: Tensor | None = None

    # State ------------------------------------------------------------------------------------------------------------

    def _model(self) -> Opened:
        if self.opened is None:
            with forked(self.workshop.seed, "fpf"):  # a new head is drawn while the model is loaded
                self.opened = self.workshop.open()
            model = self.opened.model
            self.optimizer = sgd(model, self.rate, self.options.momentum, self.decay)
            self.moved = Movement(model)
        return self.opened

    def before(self) -> dict[str, Any]:
        """What is known before the stream begins."""
        return {"stage": "", "steps": 0, "accuracy": self._scores(), "known": {}, "changes": [], "total": {}}

    def stage(self, name: str, found: Found, work: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        """A stage that is done once; its tensors are kept until the next one is done."""
        last = found[-1]["stage"]

        def whole() -> dict[str, Any]:
            self._take_up(last)
            meter = Meter(dict(found[-1]["known"]), Counter())
            numbers = work(meter, found)
            self.workshop.tensors(name, self._state)
            self.at = name
            return {"stage": name, **numbers, "known": meter.known, "total": dict(meter.total)}

        made = self.workshop.do(name, whole)
        if last:
            (self.workshop.folder / "stages" / f"{last}.safetensors").unlink(missing_ok=True)
        return made

    def _state(self) -> dict[str, Tensor]:
        model = self._model().model
        state = {f"model.{n}": t.clone() for n, t in model.state_dict().items()}  # tied tensors share their memory
        for name, p in model.named_parameters():
            if (kept := self.optimizer.state.get(p, {}).get("momentum_buffer")) is not None:
                state[f"momentum.{name}"] = kept
        state |= {f"reference.{n}": t for n, t in self.moved.reference.items()}
        return state | ({} if self.logits is None else {"logits": self.logits})

    def _take_up(self, name: str) -> None:
        model = self._model().model
        if name == self.at:
            return

        def gone() -> dict[str, Tensor]:
            raise CheckpointError(f"fpf: the tensors of stage {name} are not there any more; begin anew by --overwrite")

        state = self.workshop.tensors(name, gone)

        def of(kind: str) -> dict[str, Tensor]:
            return {n.removeprefix(f"{kind}."): t for n, t in state.items() if n.startswith(f"{kind}.")}

        model.load_state_dict(of("model"))
        named = dict(model.named_parameters())
        device = next(model.parameters()).device
        for n, t in of("momentum").items():
            self.optimizer.state[named[n]]["momentum_buffer"] = t.to(device)
        self.moved.reference = {n: t.to(device) for n, t in of("reference").items()}
        self.logits, self.at = state.get("logits"), name

    def save(self, last: Mapping[str, Any], place: Path) -> None:
        """The model as it is after the last stage, as transformers saves it."""
        self._take_up(last["stage"])
        opened = self._model()
        opened.model.save_pretrained(place)
        opened.processor.save_pretrained(place)

    def sizes(self) -> dict[str, int]:
        """Numbers in each group."""
        return self.workshop.do("sizes", lambda: sizes(self._model().model))

    # Work -------------------------------------------------------------------------------------------------------------

    def _scores(self) -> dict[str, float]:
        opened = self._model()
        return {
            name: accuracy(opened, self.workshop.held_out, rows, self.workshop.task, self.beside)
            for name, rows in self.divided["eval"].items()
        }

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[dict[str, Any]]:
        return chunks(self._model(), self.workshop.rows, rows, self.beside)

    def learn(self, steps: Sequence[Step], meter: Meter, found: Found) -> dict[str, Any]:
        """Steps of the stream."""
        model = self._model().model
        model.train()
        if not self.moved.reference:
            self.moved.begin()
        changes = []
        title = f"task {steps[-1].task + 1}"
        batches = self._batches([(*step.rows, *step.replay) for step in steps])
        for step, batch in self.workshop.track(zip(steps, batches, strict=True), title):

            def one(step: Step = step, batch: Mapping[str, Any] = batch) -> None:
                logits = self.loop.step(model, batch, self.optimizer, "stream", step.number)
                if self.options.distillation:
                    self._keep(logits, step)

            meter.run("stream", "", batch, one)
            if step.ends_epoch:
                changes.append({"epoch": step.epoch, "groups": self.moved.end()})
                self.moved.begin()
        ended = steps[-1]
        scores = self._scores() if ended.ends_task or ended.phase else {}
        return {"steps": ended.number + 1, "task": ended.task, "accuracy": scores, "changes": changes}

    def _keep(self, logits: Tensor, step: Step) -> None:
        if self.logits is None:
            self.logits = torch.zeros(self.options.buffer, logits.shape[-1])
        for slot, position in step.taken.items():
            self.logits[slot] = logits[position].float().cpu()

    def phase(self, step: Step, meter: Meter, found: Found) -> dict[str, Any]:
        """A fine-tuning phase."""
        opened, options = self._model(), self.options
        modules, sensitive = self._modules(found)
        drawn = slots(
            len(step.buffer),
            iterations=self.iterations,
            batch=options.phase_batch,
            seed=self.workshop.seed,
            phase=step.phase,
        )
        before = self.moved.copy()
        stored = None if self.logits is None else [self.logits[chosen] for chosen in drawn]
        finetune(
            opened.model,
            modules,
            self._batches([[step.buffer[slot] for slot in chosen] for chosen in drawn]),
            lr=options.learning_rate or self.rate,
            weight_decay=self.decay,
            loop=self.loop,
            meter=meter,
            keys=("phase", step.phase),
            logits=stored,
            distillation=options.distillation,
        )
        self.moved.skip(before)
        about = {"modules": modules, "sensitivity": sensitive, "phase": step.phase}
        return {"steps": step.number + 1, "task": step.task, "accuracy": self._scores(), "changes": [], **about}

    def _modules(self, found: Found) -> tuple[list[str], dict[str, float]]:
        model, options = self._model().model, self.options
        sensitive = measured(found, options.epochs)
        if options.modules is not None:
            return options.modules, sensitive
        start = usual(model, domain=self.divided["by"] != "label")
        if options.choose == "usual" and tracking(model):
            return start, sensitive
        numbers = sizes(model)
        if options.choose == "usual" or not sensitive:
            return select(sensitive, numbers, options.budget, start), sensitive
        chosen = select(sensitive, numbers, options.budget)
        if not chosen:
            least = min(numbers[label] for label in sensitive) / sum(numbers.values())
            raise RecipeError(f"fpf: no group fits budget {options.budget}; the smallest has a share of {least:.4f}")
        return chosen, sensitive


def measured(found: Found, epochs: int) -> dict[str, float]:
    """S_l of the epochs so far, `epochs` per task."""
    every = [change for stage in found for change in stage["changes"]]
    switches = [switched(change["epoch"], epochs) for change in every]
    return sensitivity([change["groups"] for change in every], switches)
