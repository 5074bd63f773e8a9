"""FPF: the stream by its numbers, sensitivity by hand, phases without a leak, and the pipeline on pictures and text."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image, Value
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ViTImageProcessor

from tests.contracts.test_recipes import recipe  # noqa: F401
from tests.schedules.test_prone_modules import resnet
from tests.train.conftest import data_file, model_folder, write_rows  # noqa: F401
from tests.zoo import checkpoint, same
from tunesmith.core.meters import flops
from tunesmith.engine.pipeline import run_pipeline
from tunesmith.engine.workshop import Bench
from tunesmith.errors import RecipeError, TunesmithError
from tunesmith.models.loader import load_model
from tunesmith.recipe import Recipe
from tunesmith.recipes.fpf_job import Job, measured
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
from tunesmith.recipes.fpf_report import after_tasks, forgotten
from tunesmith.recipes.fpf_stream import Reservoir, Step, Stream, slots
from tunesmith.recipes.fpf_tasks import check, split
from tunesmith.schedules.prone_modules import groups
from tunesmith.train import run

Make = Callable[..., Recipe]


class Small(nn.Module):
    """Two layers around a batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.bn, self.drop, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.b(self.drop(self.bn(self.a(x))))
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, labels))


def small() -> Small:
    with torch.random.fork_rng(devices=[]):
        return Small().train()


def batches(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(6, 3, generator=g), "labels": torch.randint(2, (6,), generator=g)} for _ in range(count)]


# The stream -----------------------------------------------------------------------------------------------------------


TASKS = [list(range(21)), list(range(30, 46)), list(range(50, 60))]


def test_a_stream_is_every_task_in_turn_and_every_row_once_per_epoch() -> None:
    steps = list(Stream(TASKS, epochs=3, batch=5, buffer=8, seed=1))
    assert [s.number for s in steps] == list(range(len(steps)))
    assert [s.task for s in steps] == sorted(s.task for s in steps)
    orders = {}
    for task, rows in enumerate(TASKS):
        for epoch in range(3 * task, 3 * task + 3):
            seen = [r for s in steps if s.epoch == epoch for r in s.rows]
            assert sorted(seen) == rows
            orders[epoch] = tuple(seen)
    assert len(set(orders.values())) == 9
    assert orders[0] != tuple(TASKS[0])
    ends = [s for s in steps if s.ends_epoch]
    assert [s.epoch for s in ends] == list(range(9))
    assert [s.epoch for s in ends if s.ends_task] == [2, 5, 8]
    # A single row that is left goes with the batch before it.
    assert [len(s.rows) for s in steps if s.epoch == 0] == [5, 5, 5, 6]
    assert [len(s.rows) for s in steps if s.epoch == 3] == [5, 5, 6]
    assert steps == list(Stream(TASKS, epochs=3, batch=5, buffer=8, seed=1))
    assert steps != list(Stream(TASKS, epochs=3, batch=5, buffer=8, seed=2))


def test_the_buffer_is_what_was_taken_and_replay_is_of_what_was_there_before() -> None:
    stream = Stream(TASKS, epochs=2, batch=5, buffer=8, replay=3, phases=2)
    held: dict[int, int] = {}
    for step in stream:
        assert len(step.replay) == (0 if step.number == 0 else 3)
        assert len(set(step.replay)) <= 3
        assert set(step.replay) <= set(held.values())
        for slot, position in step.taken.items():
            held[slot] = step.rows[position]
        if step.buffer:
            assert list(step.buffer) == [held[slot] for slot in range(8)]
        assert bool(step.buffer) == bool(step.phase or step.ends_task)


def test_items_are_in_the_reservoir_with_equal_probability() -> None:
    counts = np.zeros(12)
    for seed in range(1500):
        held = Reservoir(4, seed)
        taken = [held.add(i) for i in range(12)]
        assert taken[:4] == [0, 1, 2, 3]
        counts[held.rows] += 1
    sigma = (1500 * (1 / 3) * (2 / 3)) ** 0.5
    assert np.abs(counts - 500).max() < 3.5 * sigma


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_phases_are_spaced_equally_and_cut_the_stream(k: int) -> None:
    stream = Stream(TASKS, epochs=2, batch=4, buffer=8, phases=k)
    steps = list(stream)
    assert [s.phase for s in steps if s.phase] == list(range(1, k + 1))
    done = [s.number + 1 for s in steps if s.phase]
    assert done == stream.moments
    assert done[-1] == stream.steps == len(steps)
    gaps = [b - a for a, b in pairwise([0, *done])]
    assert max(gaps) - min(gaps) <= 1
    segments = list(stream.segments())
    assert [s for segment in segments for s in segment] == steps
    assert all(segment[-1].phase or segment[-1].ends_task for segment in segments)
    with pytest.raises(RecipeError, match="99 phases in a stream of"):
        Stream(TASKS, epochs=1, batch=5, buffer=8, phases=99)


def test_batches_of_a_phase_are_of_different_rows() -> None:
    drawn = slots(10, iterations=50, batch=4, seed=0, phase=1)
    assert all(len(set(chosen)) == 4 for chosen in drawn)
    assert {slot for chosen in drawn for slot in chosen} == set(range(10))
    assert drawn != slots(10, iterations=50, batch=4, seed=0, phase=2)
    assert slots(3, iterations=2, batch=4, seed=0, phase=1) == [[0, 1, 2]] * 2


# Movement and choice --------------------------------------------------------------------------------------------------


def test_movement_is_the_mean_difference_without_that_of_phases() -> None:
    model = small()
    moved = Movement(model)
    moved.begin()
    with torch.no_grad():
        model.a.weight.add_(0.25)
        before = moved.copy()
        model.a.weight.add_(5.0)
        model.bn.running_var.add_(7.0)
        moved.skip(before)
        model.b.bias[0] -= 3.0
        model.bn.running_var.sub_(1.0)
    found = moved.end()
    # `first` is a: 12 entries of the weight moved by 1 / 4, 4 of the bias did not; `last` is b, 10 entries.
    expected = {"first": 3 / 16, "last": 0.3, "norm.weight": 0, "norm.bias": 0, "norm.mean": 0, "norm.var": 1}
    assert found == pytest.approx(expected, abs=1e-6)
    moved.begin()
    assert set(moved.end().values()) == {0.0}


def test_sensitivity_is_the_ratio_of_means() -> None:
    changes = [{"a": x, "b": 1.0, "c": 0.0} for x in (1.0, 2.0, 9.0, 3.0, 5.0, 2.5)]
    switches = [switched(epoch, 2) for epoch in range(6)]
    assert switches == [None, False, True, False, True, False]
    assert sensitivity(changes, switches) == {"a": 7 / 2.5, "b": 1.0}
    assert list(sensitivity(changes, switches)) == ["a", "b"]
    assert sensitivity(changes[:2], switches[:2]) == {} == sensitivity([], [])
    assert sensitivity(changes, [switched(epoch, 1) for epoch in range(6)]) == {}
    epochs = [{"epoch": e, "groups": c} for e, c in enumerate(changes)]
    assert measured([{"changes": epochs[:1]}, {"changes": []}, {"changes": epochs[1:]}], 2) == {"a": 7 / 2.5, "b": 1.0}


def test_the_budget_holds_the_most_sensitive_groups_that_fit() -> None:
    numbers = {"a": 60, "b": 5, "c": 20, "d": 15}
    order = {"b": 4.0, "a": 3.0, "c": 2.0, "d": 1.0}
    assert select(order, numbers, 0.25) == ["b", "c"]
    assert select(order, numbers, 0.25, ["d"]) == ["d", "b"]
    assert select(order, numbers, 1.0) == ["b", "a", "c", "d"]
    assert select({}, numbers, 0.5, ["d"]) == ["d"]
    assert usual(small(), domain=False) == ["last", "norm.bias", "norm.mean", "norm.var", "norm.weight"]
    assert usual(small(), domain=True)[-1] == "first"
    assert sizes(small()) == {"first": 16, "last": 10, **dict.fromkeys(usual(small(), domain=False)[1:], 4)}


# A phase --------------------------------------------------------------------------------------------------------------


def test_a_phase_is_sgd_on_the_chosen_alone() -> None:
    model, given = small(), batches(3)
    by_hand = copy.deepcopy(model)
    finetune(model, ["last"], given, lr=0.1, weight_decay=0.5, loop=Loop(seed=7), keys=("p",))
    by_hand.bn.eval()
    chosen = [by_hand.b.weight, by_hand.b.bias]
    optimizer = torch.optim.SGD(
        [{"params": chosen[:1], "weight_decay": 0.5}, {"params": chosen[1:]}], lr=0.1, weight_decay=0.0
    )
    for i, batch in enumerate(given):
        optimizer.zero_grad()
        Loop(seed=7).step(by_hand, batch, optimizer, "p", i)
    assert torch.equal(model.b.weight, by_hand.b.weight)
    assert torch.equal(model.b.bias, by_hand.b.bias)
    assert torch.equal(model.a.weight, by_hand.a.weight)
    assert not torch.equal(model.b.weight, small().b.weight)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_momentum_of_the_stream_stays_out_of_a_phase_and_is_kept() -> None:
    model, given = small(), batches(8)
    stream = sgd(model, 0.1, 0.9)
    for i, batch in enumerate(given[:4]):
        Loop().step(model, batch, stream, i)
    momentum = {n: stream.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
    fresh = small()
    fresh.load_state_dict(model.state_dict())
    for each in (model, fresh):
        finetune(each, ["norm", "last"], given[4:], lr=0.1)
    assert same(checkpoint(model), checkpoint(fresh))
    assert all(torch.equal(stream.state[p]["momentum_buffer"], momentum[n]) for n, p in model.named_parameters())


def test_distillation_adds_the_squared_distance_to_the_stored_logits() -> None:
    model, (given,) = small(), batches(1)
    model.drop.p = 0.0
    stored = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    other = copy.deepcopy(model)
    finetune(model, ["norm", "last"], [given], lr=0.1, logits=[stored], distillation=0.3)
    out = other(**given)
    (out.loss + 0.3 * (out.logits - stored).square().mean()).backward()
    for name in ("bn.weight", "bn.bias", "b.weight", "b.bias"):
        start, moved = other.get_parameter(name), model.get_parameter(name)
        assert torch.allclose(moved, start - 0.1 * start.grad, atol=1e-7), name


def test_dropout_is_of_the_step_and_the_norm_is_bounded() -> None:
    (given,) = batches(1)
    found = []
    for keys in (("x", 1), ("x", 1), ("x", 2)):
        model = small()
        torch.rand(len(found))
        found.append(Loop().step(model, given, sgd(model, 0.1), *keys))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    model = small()
    before = checkpoint(model)
    Loop(clip=1e-3).step(model, given, sgd(model, 1.0), 0)
    moved = sum(float((p.detach() - before[n]).square().sum()) for n, p in model.named_parameters()) ** 0.5
    assert moved == pytest.approx(1e-3, rel=1e-2)
    with pytest.raises(TunesmithError, match="the loss is nan"):
        Loop().step(model, {**given, "x": given["x"] * float("nan")}, sgd(model, 1.0), 0)


def test_flops_are_counted_once_for_each_shape_and_added_for_every_step() -> None:
    model, meter = small(), Meter()
    given = [*batches(3), {k: v[:4] for k, v in batches(1)[0].items()}]
    finetune(model, ["last"], given, lr=0.1, meter=meter)
    model.requires_grad_(False)
    model.b.requires_grad_(True)
    assert meter.total["phases"] == sum(flops(lambda b=b: model(**b).loss.backward()) for b in given)
    assert len(meter.known) == 2
    again = Meter(dict(meter.known))
    model.requires_grad_(True)
    finetune(model, ["last"], given[:1], lr=0.1, meter=again)
    assert again.total["phases"] * 3 < meter.total["phases"]
    finetune(model, ["norm", "last"], given[:1], lr=0.1, meter=again)
    assert len(again.known) == 3, "other groups cost something else"


# Tasks and report -----------------------------------------------------------------------------------------------------


def labelled(labels: list[int], **more: list[Any]) -> Dataset:
    kinds = Features({"label": ClassLabel(names=list("abcde")), **{n: Value("string") for n in more}})
    return Dataset.from_dict({"label": labels, **more}, features=kinds)


def test_what_a_task_is() -> None:
    train, held = labelled([4, 0, 1, 3, 2, 0]), labelled([3, 3, 0])
    found = split(train, held, "auto", 2)
    assert found["names"] == ["a, b, c", "d, e"]
    assert found["train"] == [[1, 2, 4, 5], [0, 3]]
    assert found["eval"] == {"a, b, c": [2], "d, e": [0, 1]}
    found = split(train, held, "order", 3)
    assert found["train"] == [[0, 1], [2, 3], [4, 5]]
    assert found["eval"] == {"all": [0, 1, 2]}
    named = labelled([0, 1, 2, 3], family=["y", "x", "y", "z"])
    found = split(named, labelled([0, 1], family=["x", "w"]), "auto", 5)
    assert (found["by"], found["names"], found["train"]) == ("family", ["y", "x", "z"], [[0, 2], [1], [3]])
    assert found["eval"] == {"x": [0]}
    for by, tasks, message in (
        ("label", 9, "found 9 of 5 classes"),
        ("order", 1, "found 1 of 6 rows"),
        ("family", 2, "rows with a family"),
    ):
        with pytest.raises(RecipeError, match=message):
            split(train, held, by, tasks)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="by=label divides classes"):
        split(Dataset.from_dict({"text": ["a", "b"]}), held, "label", 2)


def test_forgetting_is_from_the_best_moment_of_each_task_but_the_last() -> None:
    def stage(task: int, steps: int, *scores: float) -> dict[str, Any]:
        return {"task": task, "steps": steps, "accuracy": dict(zip("abc", scores, strict=False)), "stage": "s"}

    found = [
        {"stage": "", "accuracy": dict.fromkeys("abc", 0.0), "steps": 0},
        stage(0, 3, 0.9, 0, 0),
        stage(1, 5, 0.1, 0.2, 0),  # a phase in the middle of a task
        stage(1, 6, 0.4, 0.8, 0),
        stage(1, 6, 0.5, 0.7, 0),  # a phase at its end
        stage(2, 9, 0.3, 0.9, 0.6),
    ]
    rows = after_tasks(found)
    assert [row["accuracy"]["a"] for row in rows[1:]] == [0.9, 0.5, 0.3]
    assert forgotten(rows, list("abc")) == pytest.approx(((0.9 - 0.3) + (0.7 - 0.9)) / 2)


def plain_recipe(**changes: Any) -> dict[str, Any]:
    train = dict.fromkeys(("gradient_checkpointing", "fsdp", "torch_compile"), False)
    train |= {"gradient_accumulation": 1, "precision": "float32", "epochs": None}
    fields: dict[str, Any] = {
        "model": {"quantization": "none", "adapter": None},
        **{name: [] for name in ("prompts", "regularisers", "inference")},
        "adapters": [{"name": "lora"}],
        "schedule": None,
        "objective": None,
        "optimizer": {"name": "adamw_torch"},
        "data": {"select": []},
        "train": train,
    }
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        (fields[section] if section else fields)[field] = value
    return fields


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__quantization": "nf4"}, "unquantised"),
        ({"prompts": [{"name": "dept"}]}, "leave prompts out"),
        ({"adapters": [{"name": "dylora"}]}, "leave out dylora"),
        ({"schedule": {"name": "lisa"}, "optimizer": {"name": "galore"}}, "leave out lisa, galore"),
        ({"train__gradient_accumulation": 2}, "train.gradient_accumulation 2"),
        ({"train__precision": "fp16"}, "train.precision fp16"),
        ({"train__epochs": 3.0}, "its option `epochs`"),
    ],
)
def test_recipes_that_the_loop_does_not_do(changes: dict[str, Any], message: str) -> None:
    check(plain_recipe(), "causal-lm", 0.0)
    with pytest.raises(RecipeError, match=message):
        check(plain_recipe(**changes), "causal-lm", 0.0)


def test_distillation_needs_classes() -> None:
    check(plain_recipe(), "image-classification", 0.5)
    with pytest.raises(RecipeError, match="logits of whole rows, which causal-lm does not have"):
        check(plain_recipe(), "causal-lm", 0.5)


# The pipeline ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small ResNet, and pictures of four classes that differ in brightness."""
    root = tmp_path_factory.mktemp("fpf")
    model = resnet()
    model.save_pretrained(root / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(root / "model")
    g = np.random.default_rng(0)
    images = [g.integers(60 * (i % 3), 60 * (i % 3) + 60, (8, 8, 3), dtype=np.uint8) for i in range(45)]
    kinds = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    rows = Dataset.from_dict({"image": images, "label": [i % 3 for i in range(45)]}, features=kinds)
    rows.save_to_disk(str(root / "rows"))
    return {"model": str(root / "model"), "data.train": str(root / "rows"), "train.batch_size": 6}


OPTIONS = {"tasks": 3, "epochs": 3, "buffer": 12, "phases": 2, "phase_batch": 8, "iterations": 5, "replay": 4}


def test_pictures_class_by_class(recipe: Make, pictures: dict[str, Any]) -> None:  # noqa: F811
    asked = recipe(method="full", **pictures)
    options = {**OPTIONS, "distillation": 0.5, "momentum": 0.5}
    report = run_pipeline("fpf", asked, options, run)
    folder = Path(asked.output)
    stages = {f.stem: json.loads(f.read_text()) for f in (folder / "stages").glob("*.json")}
    phases = [stages["phase-1"], stages["phase-2"]]
    steps = max(s["steps"] for n, s in stages.items() if n.startswith(("stream", "phase")))
    assert [p["steps"] for p in phases] == [steps // 2, steps]
    assert phases[1]["modules"] == ["last", "norm.bias", "norm.mean", "norm.var", "norm.weight"]
    assert report.details["by"] == "label"
    # What the last phase left, and what it began with, differ in the chosen groups alone.
    model = load_model(str(folder / "model")).model
    assert set(report.figures) >= {"accuracy", "accuracy before the last phase", "forgetting", "FLOPs"}
    spent = [s["total"].get("phases", 0) for s in phases]
    assert report.figure("FLOPs of the phases").value == sum(spent)
    assert spent[0] == spent[1] > 0
    streamed = sum(s["total"].get("stream", 0) for s in stages.values() if isinstance(s, dict) and "total" in s)
    assert report.figure("FLOPs").value == sum(spent) + streamed
    table = next(t for t in report.tables if t.title.startswith("sensitivity"))
    assert {row[0] for row in table.rows} == set(groups(model))
    assert [row[1] for row in table.rows] == sorted((row[1] for row in table.rows), reverse=True)
    assert {row[0] for row in table.rows if row[3]} == set(phases[1]["modules"])
    held = Dataset.load_from_disk(str(folder / "buffer"))
    assert len(held) == report.figure("rows in the buffer").value == 12
    assert set(held["label"]) == {0, 1, 2}
    kept = [f.name for f in (folder / "stages").glob("*.safetensors")]
    assert kept == ["phase-2.safetensors"], "only the last state stays"
    state = load_file(folder / "stages" / "phase-2.safetensors")
    assert state["logits"].shape == (12, 3)
    assert state["logits"].abs().sum(1).min() > 0
    assert {k for k in state if k.startswith("momentum.")}
    assert same({k: state[f"model.{k}"] for k in model.state_dict()}, checkpoint(model))


def test_the_last_phase_changes_the_chosen_groups_alone(recipe: Make, pictures: dict[str, Any]) -> None:  # noqa: F811
    without, once = (recipe(name, method="full", **pictures) for name in ("without", "once"))
    for asked, more in ((without, {"phases": 0}), (once, {"phases": 1, "modules": ["norm.mean", "last"]})):
        run_pipeline("fpf", asked, {**OPTIONS, "replay": 0, **more}, run)
    first, second = (load_model(str(Path(asked.output) / "model")).model for asked in (without, once))
    before, after = checkpoint(first), checkpoint(second)
    changed = {n for n, t in before.items() if not torch.equal(t, after[n]) and not n.endswith("tracked")}
    found = groups(second)
    assert changed == {*found["norm.mean"], *found["last"]}


def test_families_of_text_and_measured_groups(recipe: Make, tmp_path: Path) -> None:  # noqa: F811
    rows = [{"prompt": f"{'xyz'[i // 16]}{i} ", "completion": "yes", "task": "xyz"[i // 16]} for i in range(48)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    asked = recipe(**{"data.train": str(data), "data.columns": {"family": "task"}, "data.eval_fraction": 0.3})
    options = {**OPTIONS, "choose": "measured", "budget": 0.03, "epochs": 2, "phases": 2}
    report = run_pipeline("fpf", asked, options, run)
    chosen = json.loads((Path(asked.output) / "stages" / "phase-2.json").read_text())
    model = load_model(str(Path(asked.output) / "model")).model
    numbers, scores = sizes(model), chosen["sensitivity"]
    assert chosen["modules"] == select(dict(sorted(scores.items(), key=lambda s: -s[1])), numbers, 0.03)
    assert 0 < sum(numbers[m] for m in chosen["modules"]) <= 0.03 * sum(numbers.values())
    assert report.details["tasks"] == ["x", "y", "z"]
    assert report.details["by"] == "family"
    assert report.figure("accuracy").value > report.figure("accuracy").before
    assert {s.kind for s in report.plots} == {"line", "heatmap"}


def test_stopped_in_a_task_it_goes_on_with_momentum_and_logits(
    recipe: Make,  # noqa: F811
    pictures: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {**OPTIONS, "tasks": 2, "epochs": 2, "phases": 4, "distillation": 0.5, "momentum": 0.9}
    whole, stopped = (recipe(name, method="full", **pictures) for name in ("whole", "stopped"))
    run_pipeline("fpf", whole, options, run)
    real = Bench.do

    def until(self: Bench, name: str, *given: Any) -> Any:
        if name == "phase-3":
            raise KeyError(name)
        return real(self, name, *given)

    monkeypatch.setattr(Bench, "do", until)
    with pytest.raises(KeyError):
        run_pipeline("fpf", stopped, options, run)
    monkeypatch.undo()
    run_pipeline("fpf", stopped, options, run, resume=True)
    first, second = (load_file(Path(a.output) / "stages" / "phase-4.safetensors") for a in (whole, stopped))
    assert same(first, second)
    one, two = ({f.name: f.read_text() for f in Path(a.output).glob("stages/*.json")} for a in (whole, stopped))
    assert one == two


def test_logits_are_kept_in_the_slot_of_their_row() -> None:
    job = Job.__new__(Job)
    job.logits, job.options = None, SimpleNamespace(buffer=4)  # type: ignore[assignment]
    logits = torch.arange(6.0).view(3, 2)
    job._keep(logits, Step(0, 0, 0, (7, 8, 9), taken={2: 1, 0: 2}))
    job._keep(logits + 10, Step(1, 0, 0, (4, 5, 6), taken={2: 0}))
    assert job.logits is not None
    assert job.logits.tolist() == [[4.0, 5.0], [0.0, 0.0], [10.0, 11.0], [0.0, 0.0]]
