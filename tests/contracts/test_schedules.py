"""The schedule contract, for every part of the room: in a plain loop and in a real Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from torch import Tensor, nn

from tests.zoo import FAMILIES, VOCABULARY, batch, checkpoint, same, tiny
from tunesmith import catalog
from tunesmith.core.optimizer import Optimizer
from tunesmith.core.part import Part
from tunesmith.core.schedule import Schedule
from tunesmith.core.trainer import TrainerMixin
from tunesmith.errors import TunesmithError
from tunesmith.objectives.sft import SFT

SCHEDULES = pytest.mark.parametrize("part", catalog.in_room("schedules"), ids=lambda p: p.slug)
STEPS = 8


class Trainer(TrainerMixin, T.Trainer):
    pass


def brisk(part: Part) -> Schedule:
    return part.target(**part.validate(part.target.brisk))


def ready(part: Part, model: nn.Module, family: str = "llama") -> Schedule:
    """With what it wants to know of the data, which an engine tells it by itself."""
    schedule = brisk(part)
    if schedule.statistics:
        schedule.calibrate(model, [batch(family)])
    return schedule


def begin(schedule: Schedule, step: int, model: nn.Module, given: dict[str, Tensor]) -> None:
    """As a loop of one's own does."""

    def measure() -> float:
        with torch.no_grad():
            return float(model(**given).loss)

    def backward() -> None:
        model(**given).loss.backward()

    schedule.begin_step(step, *((measure, backward) if schedule.measures else ()))


def fitting(part: Part, model: nn.Module) -> nn.Module:
    """With adapters on it, if the part governs nothing else."""
    if not part.target.adapters_only:
        return model
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


def deep(family: str) -> nn.Module:
    """Four blocks, so that a choice leaves something out; two for each side of an encoder-decoder."""
    changes = {"gpt2": {"n_layer": 4}, "t5": {}}.get(family, {"num_hidden_layers": 4})
    return tiny(family, **changes).train()


def lora(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(deep(family), config).train()


GOVERNED = [
    pytest.param(part, make, id=f"{part.slug}-{make.__name__}")
    for part in catalog.in_room("schedules")
    for make in (deep, lora)
    if (make is lora or not part.target.adapters_only) and (make is deep or "adapters" not in part.refuses)
]


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1, **options)


def rows(n: int = 24) -> list[dict[str, list[int]]]:
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(3, VOCABULARY, (n, 7), generator=g).tolist()
    return [{"input_ids": row, "attention_mask": [1] * 7, "labels": row} for row in ids]


def arguments(folder: Path, **changes: Any) -> T.TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 4,
        "optim": "adamw_torch",
    }
    return T.TrainingArguments(output_dir=str(folder), **{**settings, **changes})


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("part", "make"), GOVERNED)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_frozen_does_not_change_and_holds_no_state(part: Part, make: Any, family: str) -> None:
    """Gradients are zeroed, not dropped: one left behind by a frozen parameter would decay it."""
    model, given = make(family), batch(family)
    optimizer, schedule, eligible = adamw(model), ready(part, model, family), named(model)
    schedule.attach(model, optimizer)
    left_out, entered = 0, dict.fromkeys(eligible, 0)
    for step in range(STEPS):
        begin(schedule, step, model, given)
        active = set(named(model))
        assert active <= set(eligible)
        left_out += len(eligible) - len(active)
        before = {n: p.detach().clone() for n, p in eligible.items()}
        resting = {
            n: copy.deepcopy(optimizer.state[p])
            for n, p in eligible.items()
            if n not in active and p in optimizer.state
        }
        assert schedule.keeps_state or not resting
        model(**given).loss.backward()
        assert {n for n, p in eligible.items() if p.grad is not None} <= active
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        changed = {n for n, p in eligible.items() if not torch.equal(p, before[n])}
        holding = {n for n, p in eligible.items() if p in optimizer.state}
        assert changed == holding - resting.keys() <= active
        assert changed
        for name, kept in resting.items():
            state = optimizer.state[eligible[name]]
            assert all(torch.equal(state[key], value) for key, value in kept.items())
        for name in eligible:
            if name in resting:
                continue
            entered[name] = entered[name] + 1 if name in holding else 0
            if name in holding:
                assert int(optimizer.state[eligible[name]]["step"]) == entered[name], "state is fresh on entry"
    assert left_out, "a schedule that leaves nothing out says nothing here"
    schedule.detach()
    assert set(named(model)) == set(eligible)


@pytest.mark.parametrize(
    "part", [p for p in catalog.in_room("schedules") if not p.target.measures], ids=lambda p: p.slug
)
def test_the_choice_depends_on_the_step_alone(part: Part) -> None:
    model = deep("llama")
    choices = []
    for order in (range(STEPS), reversed(range(STEPS))):
        schedule = ready(part, model)
        schedule.attach(model, adamw(model))
        seen = {}
        for step in order:
            torch.rand(3)
            schedule.begin_step(step)
            seen[step] = set(named(model))
        schedule.detach()
        choices.append(seen)
    assert choices[0] == choices[1]


@SCHEDULES
@pytest.mark.parametrize("objective", [None, SFT()], ids=["model's loss", "sft"])
@pytest.mark.parametrize("stop", [3, 4])
def test_resuming_gives_the_same_bits(part: Part, stop: int, objective: SFT | None, tmp_path: Path) -> None:
    def trainer(folder: Path, resumes: bool = False, **changes: Any) -> Trainer:
        model = fitting(part, tiny("llama", num_hidden_layers=4, attention_dropout=0.1))
        schedule = brisk(part) if resumes else ready(part, model)
        given = {"train_dataset": rows(), "callbacks": [schedule], "objective": objective}
        return Trainer(model=model, args=arguments(folder, **changes), **given)

    through = trainer(tmp_path / "through")
    through.train()
    first = trainer(tmp_path / "stopped", save_strategy="steps", save_steps=stop)
    first.train()
    assert same(checkpoint(first.model), checkpoint(through.model))
    resumed = trainer(tmp_path / "stopped", resumes=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / f"checkpoint-{stop}"))
    assert resumed.state.global_step == STEPS
    assert same(checkpoint(resumed.model), checkpoint(through.model))


@SCHEDULES
def test_the_micro_batches_of_a_step_see_one_choice(part: Part, tmp_path: Path) -> None:
    seen: list[tuple[int, frozenset[str]]] = []

    class Watching(Trainer):
        def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(model, *args, **kwargs)
            grads = frozenset(n for n, p in model.named_parameters() if p.grad is not None)
            assert grads <= set(named(model))
            seen.append((self.state.global_step, frozenset(named(model))))
            return loss

    model = fitting(part, deep("llama"))
    schedule = ready(part, model)
    Watching(model=model, args=arguments(tmp_path), train_dataset=rows(), callbacks=[schedule], objective=SFT()).train()
    assert len(seen) == 2 * STEPS
    assert len(set(seen)) == STEPS
    if not schedule.measures:
        schedule.attach(model, adamw(model))
        for step, choice in dict(seen).items():
            schedule.begin_step(step)
            assert set(named(model)) == choice, "steps count from 0"
    assert len({choice for _, choice in seen}) > 1 or not part.target.brisk


@SCHEDULES
def test_an_optimizer_over_too_little_is_a_clear_error(part: Part) -> None:
    model = fitting(part, deep("gpt2"))
    few = torch.optim.AdamW([p for n, p in model.named_parameters() if ".h.3." not in n])
    with pytest.raises(TunesmithError, match=r"not '.*transformer\.h\.3.* build it over all of them first"):
        brisk(part).attach(model, few)


@SCHEDULES
def test_a_new_run_governs_what_an_interrupted_one_left_frozen(part: Part) -> None:
    model = fitting(part, deep("llama"))
    schedule = ready(part, model)
    eligible = set(named(model))
    schedule.attach(model, adamw(model))
    begin(schedule, 0, model, batch("llama"))
    every = [p for p in model.parameters()]
    schedule.attach(model, torch.optim.AdamW(every))
    assert set(schedule.eligible) == eligible


class Probe(Optimizer):
    """A forward-only optimizer of the simplest kind: two-sided differences in one random direction."""

    forward_only = True

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3})
        self.moved: list[int] = []

    def _shift(self, scale: float) -> None:
        g = torch.Generator().manual_seed(len(self.moved))
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    p.data.add_(scale * torch.randn(p.shape, generator=g))

    def estimate(self, closure: Any) -> Tensor:
        self._shift(1e-2)
        up = closure()
        self._shift(-2e-2)
        down = closure()
        self._shift(1e-2)
        self.slope = float(up - down) / 2e-2
        return (up + down) / 2

    def step(self, closure: Any = None) -> None:
        self._shift(-1e-3 * self.slope)
        self.moved.append(1)


@SCHEDULES
def test_forward_only_optimizers_move_what_is_chosen(part: Part, tmp_path: Path) -> None:
    model = fitting(part, deep("llama"))
    schedule = ready(part, model)
    before = checkpoint(model)
    touched: list[tuple[set[str], set[str]]] = []

    class Watch(T.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            before.update(checkpoint(model))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            changed = {n for n, t in checkpoint(model).items() if not torch.allclose(t, before[n], atol=1e-6)}
            touched.append((changed, set(named(model))))

    Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=rows(),
        callbacks=[schedule, Watch()],
        objective=SFT(),
        optimizers=(Probe(model.parameters()), None),
    ).train()
    assert len(touched) == STEPS
    assert all(changed == chosen for changed, chosen in touched)


@SCHEDULES
def test_one_schedule_serves_one_model_after_another(part: Part) -> None:
    schedule = brisk(part)
    for family in ("llama", "bert", "llama"):
        model = fitting(part, copy.deepcopy(deep(family)))
        if schedule.statistics:
            schedule.calibrate(model, [batch(family)])
        schedule.attach(model, adamw(model))
        begin(schedule, 0, model, batch(family))
        assert set(named(model)) <= set(schedule.eligible)
        schedule.detach()
