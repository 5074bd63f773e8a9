"""Every part that trains, in a user's own code: transformers' Trainer, TRL's SFTTrainer and a plain loop agree.

The trainers are the libraries' own. The mixin is put before them only for what `docs/python.md` says needs it: an
objective, an optimizer without a backward pass, learning rates of a prompt's own. Nothing of `tunesmith.run` is here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
import trl
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn

import tunesmith
from tests.contracts.test_objectives import padded, rows
from tests.contracts.test_optimizers import build
from tests.contracts.test_prompts import small
from tests.contracts.test_schedules import brisk
from tests.zoo import checkpoint, tiny
from tunesmith import catalog
from tunesmith.core.objective import Objective
from tunesmith.core.optimizer import set_lr_ratios
from tunesmith.core.part import Part
from tunesmith.core.schedule import Schedule
from tunesmith.models import embedded
from tunesmith.objectives.sft import SFT

ROOMS = ("adapters", "prompts", "schedules", "optimizers", "objectives")
# One worker has all tests of a part, so that its search for a rate is done once.
PARTS = pytest.mark.parametrize(
    "slug",
    [pytest.param(p.slug, marks=pytest.mark.xdist_group(p.slug)) for room in ROOMS for p in catalog.in_room(room)],
)
STEPS = 6
RATES, FURTHER = (1e-4, 1e-3, 1e-2, 1e-1), (1.0, 3.0)
SHARP = {"greentrainer", "slimfit", "welore", "lift"}
"""TRL's own loss kernel costs and rounds otherwise than a model's loss: what counts the FLOPs of a step, rounds what it
keeps or chooses entries by rank ends elsewhere with it, and so do the large steps of factors. They train on `sft`."""
ROWS = [rows()[i] for i in (0, 1, 4)]
"""Prompts and answers of three lengths. A row that begins with its answer is another matter: a prompt before it gives
its first token a prediction, which transformers' count of labels does not know of."""


def together() -> dict[str, Tensor]:
    """The rows as the trainers' collators lay them: what looks at padding, or counts it as work, sees the same."""
    batch = padded(ROWS, "right")
    width = int(batch["attention_mask"].sum(1).max())
    return {name: values[:, :width] for name, values in batch.items()}


class MixedTrainer(tunesmith.TrainerMixin, T.Trainer):
    pass


class MixedSFTTrainer(tunesmith.TrainerMixin, trl.SFTTrainer):
    pass


@dataclass
class Setting:
    """A model with one part on it or beside it, ready to train.

    Where the part is no optimizer, SGD with momentum: unlike Adam's, its steps show a gradient of another size.
    """

    part: Part
    model: nn.Module
    optimizer: Any
    schedule: Schedule | None = None
    objective: Objective | None = None
    regularisers: tuple[tuple[Objective, float], ...] = ()

    @property
    def forward_only(self) -> bool:
        return getattr(self.optimizer, "forward_only", False)

    @property
    def needs_mixin(self) -> bool:
        asks = self.schedule is not None and self.schedule.measures
        own_rates = any(hasattr(m, "lr_ratios") and m.lr_ratios() for m in self.model.modules())
        return self.objective is not None or self.forward_only or own_rates or asks

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        if self.objective is None:
            return self.model(**batch).loss
        with ExitStack() as watching:
            for term, _ in self.regularisers:
                watching.enter_context(term.watching(self.model))
            loss, _ = self.objective(self.model, batch)
        return loss + sum(weight * term(self.model, batch)[0] for term, weight in self.regularisers)


def setting(slug: str, rate: float) -> Setting:
    """In float64: what is left between two ways is then no rounding, which Adam and forward differences enlarge."""
    part = catalog.get(slug)
    torch.manual_seed(0)
    model: nn.Module = tiny("llama", num_hidden_layers=4, initializer_range=0.3).double().train()
    if part.room in ("adapters", "prompts"):
        fixed = {"rank": 2, "dropout": 0.0}
        options = small(part) if part.room == "prompts" else {k: v for k, v in fixed.items() if k in part.options}
        model = get_peft_model(model, tunesmith.adapter(slug, task_type="CAUSAL_LM", **options))
        tunesmith.initialise(model, [together()])
        return Setting(part, model, sgd(model.double(), rate), objective=SFT() if slug in SHARP else None)
    if part.room == "schedules":
        if part.target.adapters_only:
            model = get_peft_model(model, tunesmith.adapter("lora", rank=2, task_type="CAUSAL_LM")).double().train()
        schedule = brisk(part)
        if schedule.statistics:
            schedule.calibrate(model, [together()])
        objective = SFT() if slug in SHARP else None
        return Setting(part, model, sgd(model, rate), schedule=schedule, objective=objective)
    model.model.layers[0].requires_grad_(False)
    if part.room == "optimizers":
        return Setting(part, model, build(part, model, rate), objective=SFT() if slug in SHARP else None)
    if "regulariser" in part.tags:
        return Setting(part, model, sgd(model, rate), objective=SFT(), regularisers=((part.target(), 1.0),))
    return Setting(part, model, sgd(model, rate), objective=part.target())


def sgd(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate, momentum=0.9)


@dataclass
class Outcome:
    """Losses before and after, weights before and after, and which of them trained at any step."""

    before: float
    start: dict[str, Tensor]
    parameters: set[str]
    trained: set[str] = field(default_factory=set)
    after: float = float("nan")
    end: dict[str, Tensor] = field(default_factory=dict)


def measured(made: Setting) -> float:
    was = made.model.training
    made.model.eval()
    with torch.no_grad():
        found = float(made.loss(together()))
    made.model.train(was)
    return found


def gradients(made: Setting) -> None:
    was = made.model.training
    made.model.eval()
    made.loss(together()).backward()
    made.model.train(was)


def trained(slug: str, rate: float, way: Callable[[Setting, Outcome], None]) -> Outcome:
    made = setting(slug, rate)
    outcome = Outcome(measured(made), checkpoint(made.model), {name for name, _ in made.model.named_parameters()})
    way(made, outcome)
    outcome.after, outcome.end = measured(made), checkpoint(made.model)
    return outcome


# The three ways ----------------------------------------------------------------------------------------------------


def loop(made: Setting, outcome: Outcome) -> None:
    """As a user writes it: docs/python.md, "A loop of your own"."""
    model, optimizer, batch = made.model, made.optimizer, together()
    set_lr_ratios(optimizer, model)
    if made.schedule is not None:
        made.schedule.attach(model, optimizer)
    for number in range(STEPS):
        if made.schedule is not None:
            made.schedule.begin_step(number, measure=lambda: measured(made), backward=lambda: gradients(made))
        outcome.trained |= {name for name, p in model.named_parameters() if p.requires_grad}
        if made.forward_only:
            model.eval()
            optimizer.step(lambda: made.loss(batch))
            continue
        with tunesmith.step(model, number, STEPS, optimizer=optimizer):
            made.loss(batch).backward()
            optimizer.step()
        optimizer.zero_grad()
    if made.schedule is not None:
        made.schedule.detach()


class Watch(T.TrainerCallback):
    """Notes what trains at each step."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def on_step_begin(self, *args: Any, model: nn.Module, **_: Any) -> None:
        self.outcome.trained |= {name for name, p in model.named_parameters() if p.requires_grad}


def in_trainer(plain: type, mixed: type, config: type, folder: Path) -> Callable[[Setting, Outcome], None]:
    """Training in a library's trainer; the mixin goes before it only where the part needs it."""

    def way(made: Setting, outcome: Outcome) -> None:
        args = config(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=len(ROWS),
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        )
        tokenizer = T.AutoTokenizer.from_pretrained(embedded.path("tokenizer"), padding_side="right")
        schedules = [] if made.schedule is None else [made.schedule]
        trainer = (mixed if made.needs_mixin else plain)(
            model=made.model,
            args=args,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
            data_collator=None if config is trl.SFTConfig else T.DataCollatorForSeq2Seq(tokenizer),
            callbacks=[*schedules, *tunesmith.callbacks(made.model), Watch(outcome)],
            optimizers=(made.optimizer, None),
            **({"objective": made.objective, "regularisers": made.regularisers} if made.objective else {}),
        )
        trainer.train()
        assert trainer.state.global_step == STEPS

    return way


def transformers_trainer(folder: Path) -> Callable[[Setting, Outcome], None]:
    return in_trainer(T.Trainer, MixedTrainer, T.TrainingArguments, folder)


def trl_trainer(folder: Path) -> Callable[[Setting, Outcome], None]:
    return in_trainer(trl.SFTTrainer, MixedSFTTrainer, trl.SFTConfig, folder)


@lru_cache
def in_a_loop(slug: str) -> tuple[float, Outcome]:
    """The rate with which a plain loop gets furthest, and what it gets."""
    outcomes = [(rate, trained(slug, rate, loop)) for rate in RATES]
    if all(outcome.after > outcome.before - 0.1 for _, outcome in outcomes):  # few numbers take large steps
        outcomes += [(rate, trained(slug, rate, loop)) for rate in FURTHER]
    return min(outcomes, key=lambda pair: pair[1].after if pair[1].after == pair[1].after else float("inf"))


# Tests -------------------------------------------------------------------------------------------------------------


def check(outcome: Outcome) -> None:
    assert outcome.after < outcome.before - 0.05
    assert {n for n, t in outcome.end.items() if not t.isfinite().all()} == set()
    frozen = outcome.parameters - outcome.trained
    assert frozen, "a setting in which everything trains says nothing about what does not"
    moved = {name for name in frozen if not torch.equal(outcome.start[name], outcome.end[name])}
    assert not moved
    assert any(not torch.equal(outcome.start[name], outcome.end[name]) for name in outcome.trained)


@PARTS
def test_a_loop_of_ones_own(slug: str) -> None:
    check(in_a_loop(slug)[1])


@pytest.mark.parametrize("way", [transformers_trainer, trl_trainer])
@PARTS
def test_a_trainer_ends_where_the_loop_ends(slug: str, way: Callable[[Path], Any], tmp_path: Path) -> None:
    rate, expected = in_a_loop(slug)
    if way is trl_trainer and "whole-model" in catalog.get(slug).tags:
        with pytest.raises(ValueError, match="lm_head"):  # TRL takes no adapter on the head
            trained(slug, rate, way(tmp_path))
        return
    own_loss = setting(slug, rate).objective is None
    found = trained(slug, rate, way(tmp_path))
    check(found)
    assert found.trained == expected.trained
    assert found.end.keys() == expected.end.keys()
    # TRL computes the loss by a kernel of its own, in float32, which adaptive and forward-only steps enlarge.
    allowed = 1e-3 * far(expected.end, expected.start)[0] if way is trl_trainer and own_loss else 1e-6
    assert far(found.end, expected.end) <= (allowed, "")
    assert found.after == pytest.approx(expected.after, abs=1e-4)


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference between two sets of weights, and where."""
    return max((float((a[name].double() - b[name].double()).abs().max()), name) for name in a if a[name].numel())
