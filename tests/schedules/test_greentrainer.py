"""What is special to GreenTrainer."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from torch import Tensor, nn

from tests.contracts.test_schedules import Trainer, arguments, rows
from tests.zoo import batch, checkpoint, same, tiny
from tunesmith import catalog
from tunesmith.core.meters import flops
from tunesmith.errors import CheckpointError, RecipeError, TunesmithError
from tunesmith.objectives.sft import SFT
from tunesmith.optimizers.galore import GaLore
from tunesmith.recipe import load
from tunesmith.schedules.greentrainer import GreenTrainer

Make = Callable[[Any], torch.optim.Optimizer]


def begin(schedule: GreenTrainer, step: int, model: nn.Module, given: dict[str, Tensor]) -> None:
    def measure() -> float:
        with torch.no_grad():
            return float(model(**given).loss)

    schedule.begin_step(step, measure, lambda: model(**given).loss.backward())


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def attached(model: nn.Module, make: Make = adamw, **options: Any) -> GreenTrainer:
    schedule = GreenTrainer(**{"rho": 0.7, "interval": 1, "every": "steps", **options})
    schedule.attach(model, make([p for p in model.parameters() if p.requires_grad]))
    return schedule


def training(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


class Chain(nn.Module):
    """A stack of layers whose loss is a mean square."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
        )
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g) / 2
        self.wanted = torch.randn(5, 3, generator=g)

    def forward(self, x: Tensor) -> Any:
        return T.modeling_outputs.ModelOutput(loss=(self.body(x) - self.wanted).square().mean())


X = {"x": torch.randn(5, 4, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("rho", [0.45, 0.6, 0.75, 0.9, 1.0])
def test_the_choice_is_the_best_of_all_sets(rho: float) -> None:
    model = Chain()
    schedule = attached(model, rho=rho)
    begin(schedule, 0, model, X)
    costs, worth = schedule.costs, {row["tensor"]: float(row["importance"]) for row in schedule.report()}
    budget = rho * (costs.forward + costs.full) - costs.forward
    best = max(
        (
            sum(worth[n] for n in chosen)
            for size in range(1, len(costs.names) + 1)
            for chosen in itertools.combinations(costs.names, size)
            if costs.bound(chosen) <= budget
        ),
    )
    assert sum(worth[n] for n in schedule.selected) == pytest.approx(best, abs=1e-9)
    assert costs.bound(schedule.selected) <= budget
    assert schedule.share() <= rho
    assert training(model) == schedule.selected
    assert max(abs(v) for v in worth.values()) == 1


def test_importance_by_its_definition() -> None:
    """-sum(g1 dw): g1 at the weights after the step, dw of the optimizer's own rule, weight decay included."""
    model = Chain()
    schedule = attached(model, lambda p: torch.optim.SGD(p, lr=0.3, weight_decay=0.2), rho=1.0)
    begin(schedule, 0, model, X)
    twin = copy.deepcopy(model).requires_grad_(True)
    twin(**X).loss.backward()
    moves = {n: -0.3 * (p.grad + 0.2 * p.detach()) for n, p in twin.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for n, p in twin.named_parameters():
            p.add_(moves[n])
            p.grad = None
    twin(**X).loss.backward()
    drops = {n: -float((p.grad * moves[n]).sum()) for n, p in twin.named_parameters() if p.grad is not None}
    largest = max(map(abs, drops.values()))
    for n, drop in drops.items():
        assert schedule.importance[n] == pytest.approx(drop / largest, abs=1e-5), n


class Counting(torch.optim.SGD):
    """Counts its steps in its settings, in place."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=1e-2)
        self.param_groups[0]["made"] = [0]

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.param_groups[0]["made"][0] += 1


OPTIMIZERS: dict[str, Make] = {
    "counting": Counting,
    "adamw": adamw,
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adafactor": lambda p: T.Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False),
    "galore": lambda p: GaLore(p, lr=1e-2, rank=2, period=3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_probe_leaves_nothing_behind(name: str, dtype: torch.dtype) -> None:
    model, given = tiny("llama", attention_dropout=0.2).to(dtype).train(), batch("llama")
    schedule = attached(model, OPTIMIZERS[name], interval=4, rho=0.9)
    optimizer = schedule.optimizer
    assert optimizer is not None
    for step in range(3):
        begin(schedule, step, model, given)
        model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights, state = checkpoint(model), {p: copy.deepcopy(value) for p, value in optimizer.state.items()}
    held = dict(optimizer.state)
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    random = torch.get_rng_state()
    schedule.turn = None
    schedule.active(3)
    assert same(checkpoint(model), weights)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups
    assert optimizer.state.keys() == state.keys()
    for p, value in optimizer.state.items():
        assert value is held[p], "the very same tensors"
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(state[p][k])) for k, v in value.items())
    assert schedule.importance


def test_an_error_in_the_probe_leaves_nothing_behind() -> None:
    model = Chain()
    schedule = attached(model)
    before = checkpoint(model)
    calls = []

    def backward() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("out of memory, say")
        model(**X).loss.backward()

    with pytest.raises(ValueError, match="out of memory"):
        schedule.begin_step(0, lambda: float(model(**X).loss.detach()), backward)
    assert same(checkpoint(model), before)
    assert schedule.optimizer is not None
    assert not schedule.optimizer.state


def test_a_warm_up_that_begins_at_zero_is_probed_at_its_peak() -> None:
    found = []
    for warm in (False, True):
        model = Chain()
        schedule = attached(model)
        assert schedule.optimizer is not None
        if warm:
            torch.optim.lr_scheduler.LambdaLR(schedule.optimizer, lambda step: step / 10)
            assert schedule.optimizer.param_groups[0]["lr"] == 0
        begin(schedule, 0, model, X)
        found.append(schedule.importance)
        assert schedule.optimizer.param_groups[0]["lr"] == (0 if warm else 1e-2)
    assert found[0] == found[1]


def test_a_probe_that_shows_nothing_is_a_clear_error() -> None:
    model = Chain()
    still = attached(model, lambda p: torch.optim.SGD(p, lr=0.0))
    with pytest.raises(TunesmithError, match=r"a step of SGD was to show .* the largest change .* is 0"):
        begin(still, 0, model, X)
    inside = attached(model, lambda p: GaLore(p, lr=1e-2, rank=2, per_layer=True))
    before = checkpoint(model)
    with pytest.raises(TunesmithError, match=r"an optimizer that updates inside of it \(`per_layer`\)"):
        begin(inside, 0, model, X)
    assert same(checkpoint(model), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_a_step_costs_no_more_than_rho(family: str) -> None:
    """Counted by torch in real steps: its products alone, of which a share of rho is left."""
    model, given = tiny(family), batch(family)
    whole = flops(lambda: model(**given).loss.backward())
    model.zero_grad()
    for rho in (0.5, 0.7):
        schedule = attached(model, rho=rho)
        begin(schedule, 0, model, given)
        assert flops(lambda: model(**given).loss.backward()) <= 1.01 * rho * whole
        model.zero_grad()
        schedule.detach()


def test_rho_below_the_forward_pass_is_raised_with_a_warning() -> None:
    model = Chain()
    schedule = attached(model, rho=0.05)
    with pytest.warns(UserWarning, match=r"rho=0.05 does not pay for the forward pass.* gets 5% of its full cost"):
        begin(schedule, 0, model, X)
    assert schedule.costs.bound(schedule.selected) <= 0.05 * schedule.costs.full
    assert training(model)


def test_a_budget_in_which_nothing_fits_says_which_rho_would() -> None:
    model = Chain()
    for name, p in model.named_parameters():
        p.requires_grad_("body.0" in name)
    schedule = attached(model, rho=0.6)
    with pytest.raises(TunesmithError, match=r"the cheapest tensor, .* rho must be 0\.\d+ or more") as raised:
        begin(schedule, 0, model, X)
    least = float(str(raised.value).split("rho must be ")[1].split()[0])
    enough = attached(model, rho=least + 1e-3)
    begin(enough, 0, model, X)
    assert len(training(model)) == 1


def test_only_what_the_budget_allows_is_probed() -> None:
    model, given = tiny("llama", num_hidden_layers=4), batch("llama")
    schedule = attached(model, rho=0.45)
    asked: list[set[str]] = []

    def backward() -> None:
        asked.append(training(model))
        model(**given).loss.backward()

    def measure() -> float:
        with torch.no_grad():
            return float(model(**given).loss)

    schedule.begin_step(0, measure, backward)
    assert asked == [set(schedule.importance)] * 2
    assert "model.embed_tokens.weight" not in schedule.importance
    assert "lm_head.weight" in schedule.importance
    rows = {row["tensor"]: row for row in schedule.report()}
    assert rows["model.embed_tokens.weight"]["importance"] == 0
    assert {name for name, row in rows.items() if row["trains"]} == training(model)


def test_adapters_are_chosen_among_themselves() -> None:
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(tiny("llama"), config)
    schedule = attached(model, rho=0.75)
    begin(schedule, 0, model, batch("llama"))
    assert 0 < len(training(model)) < len(schedule.eligible)
    assert all("lora_" in name for name in training(model))


def test_what_never_runs_never_trains() -> None:
    model = Chain()
    model.idle = nn.Linear(4, 4)
    schedule = attached(model, rho=1.0)
    begin(schedule, 0, model, X)
    assert not any("idle" in name for name in training(model))


@pytest.mark.parametrize("every", ["steps", "epochs"])
def test_it_chooses_anew_every_interval(every: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps are an epoch here; a resumed run chooses when the one that was not stopped would have."""
    at: list[int] = []
    real = GreenTrainer._select

    def run(save: str = "no", **changes: Any) -> dict[str, Tensor]:
        schedule = GreenTrainer(rho=0.7, interval=2, every=every)  # type: ignore[arg-type]
        # 8 rows, 4 to an optimizer step.
        given = {"train_dataset": rows(8), "callbacks": [schedule], "objective": SFT()}
        settings = arguments(tmp_path / every, max_steps=6, save_strategy=save, save_steps=3)
        trainer = Trainer(model=tiny("llama", num_hidden_layers=1), args=settings, **given)
        monkeypatch.setattr(GreenTrainer, "_select", lambda self: (at.append(trainer.state.global_step), real(self))[1])
        trainer.train(**changes)
        return checkpoint(trainer.model)

    through = run(save="steps")
    assert at == ([0, 2, 4] if every == "steps" else [0, 4])
    at.clear()
    resumed = run(resume_from_checkpoint=str(tmp_path / every / "checkpoint-3"))
    assert at == [4]
    assert same(resumed, through)


def test_epochs_in_a_loop_of_ones_own() -> None:
    model = Chain()
    schedule = attached(model, every="epochs", interval=2)
    turns = []
    for epoch in range(5):
        schedule.epoch = epoch
        begin(schedule, 10 * epoch, model, X)
        turns.append(schedule.turn)
    assert turns == [0, 0, 1, 1, 2]


def test_a_checkpoint_of_another_model_is_refused() -> None:
    model, other = Chain(), Chain()
    schedule, second = attached(model), attached(other)
    begin(schedule, 3, model, X)
    kept = schedule.training_state()
    second.load_training_state(kept)
    assert (second.selected, second.turn) == (schedule.selected, 3)
    other.body[0].weight.requires_grad_(False)
    third = attached(other)
    with pytest.raises(CheckpointError, match=r"chosen among \d tensors, but \d can train here"):
        third.load_training_state(kept)


def test_processes_take_the_choice_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    model = Chain()
    schedule = attached(model, rho=0.95)
    sent: list[list[int]] = []

    def broadcast(flags: Tensor, src: int) -> None:
        assert src == 0
        sent.append(flags.tolist())
        if len(sent) == 1:
            flags[:2] = 0  # the first process cannot afford these
        else:
            flags.zero_()
            flags[-1] = 1

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "broadcast", broadcast)
    begin(schedule, 0, model, X)
    assert all(sent[0])
    assert schedule.importance.keys() == set(list(schedule.eligible)[2:]), "processes probe the same tensors"
    assert 0 < sum(sent[1]) < len(sent[1])
    assert training(model) == {"body.5.bias"}


def test_without_gradients_of_the_step_it_says_what_to_do() -> None:
    model = Chain()
    schedule = attached(model)
    with pytest.raises(TunesmithError, match="GreenTrainer looks at the loss of a step's batches"):
        schedule.begin_step(0)
    with pytest.raises(TunesmithError, match="GreenTrainer looks at the gradients of a step's batches"):
        schedule.begin_step(0, lambda: float(model(**X).loss.detach()))


def test_what_cannot_be_combined() -> None:
    for fields, reason in (
        ({"optimizer": "mezo", "train": {"max_grad_norm": 0}}, "there is no backward pass"),
        ({"train": {"fsdp": True}}, "cannot change from step to step"),
    ):
        with pytest.raises(RecipeError, match=reason):
            load({"schedule": "greentrainer", **fields}).check()
    for options in ({"rho": 0}, {"rho": 1.2}, {"interval": 0}, {"every": "hours"}):
        with pytest.raises(RecipeError, match=next(iter(options))):
            catalog.get("greentrainer").validate(options)
