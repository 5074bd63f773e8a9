"""`tunesmith train`: flags, what is left behind, resuming, and everything that is refused with a message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train.conftest import write_rows
from tunesmith.engine.callbacks import Meters
from tunesmith.recipe import load
from tunesmith.recipe_fields import DataSpec, ReportSpec, TrainSpec

QUICK = ("--set", "report.generate_rows=2", "--set", "report.retain_rows=2", "--set", "report.max_new_tokens=3")


@pytest.fixture
def basics(model_folder: Callable[[str], Path], data_file: Path, tmp_path: Path) -> list[Any]:
    """A run of four steps on the tiny Llama."""
    named = ("--model", model_folder("llama"), "--data", data_file, "--output", tmp_path / "run")
    return [*named, "--steps", 4, *QUICK, "--set", "train.batch_size=4", "--quiet"]


def test_flags_become_a_recipe_and_a_run(tunesmith: Callable[..., Any], basics: list[Any], tmp_path: Path) -> None:
    said = tunesmith("train", *basics, "--method", "dylora", "--set", "train.learning_rate=1e-3")
    assert said.status == 0, said.err
    assert "dylora" in said.out
    assert "trainable parameters" in said.out
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        "recipe.yaml", "before.json", "checkpoints", "model", "report.json", "report.html",
    }  # fmt: skip
    recipe = load(run / "recipe.yaml")
    assert ([spec.name for spec in recipe.adapters], recipe.train.steps) == (["dylora"], 4)
    assert recipe.train.learning_rate == 1e-3
    assert (run / "model" / "adapter_config.json").exists()
    held = json.loads((run / "report.json").read_text())
    assert "4 steps" in held["summary"]


def test_a_recipe_file_and_flags_on_top(
    tunesmith: Callable[..., Any], basics: list[Any], tmp_path: Path, data_file: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    eval_file = write_rows(tmp_path / "eval.jsonl", [{"prompt": "ab: ", "completion": "ba"}])
    file.write_text(yaml.safe_dump({"method": "full", "train": {"steps": 99, "lr_schedule": "constant"}}))
    said = tunesmith("train", file, *basics, "--eval", eval_file, "--task", "causal-lm")
    assert said.status == 0, said.err
    recipe = load(tmp_path / "run" / "recipe.yaml")
    assert (recipe.full, recipe.train.steps, recipe.train.lr_schedule) == (True, 4, "constant")
    assert (recipe.data.eval, recipe.data.train, recipe.task) == (str(eval_file), str(data_file), "causal-lm")
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_set_wins_over_flags(tunesmith: Callable[..., Any], basics: list[Any], tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    said = tunesmith("train", *basics, "--set", f"output={other}", "--set", "train.steps=2")
    assert said.status == 0, said.err
    assert load(other / "recipe.yaml").train.steps == 2
    assert not (tmp_path / "run").exists()


def test_columns_are_mapped_as_the_help_says(tunesmith: Callable[..., Any], basics: list[Any], tmp_path: Path) -> None:
    file = write_rows(tmp_path / "qa.jsonl", [{"question": f"{i}: ", "answer": "b" * (i % 3 + 1)} for i in range(20)])
    mapped = "data.columns={prompt: question, completion: answer}"
    said = tunesmith("train", *basics, "--data", file, "--set", mapped, "--method", "full")
    assert said.status == 0, said.err


def test_quiet_and_not(
    tunesmith: Callable[..., Any], basics: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tunesmith("train", *basics, "--method", "full")
    assert "step " not in said.err
    loud = [word for word in basics if word != "--quiet"]
    said = tunesmith("train", *loud, "--method", "full", "--overwrite")
    assert said.status == 0
    assert "step 4/4" in said.err


def test_overwrite_and_resume(
    tunesmith: Callable[..., Any], basics: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [*basics, "--method", "full", "--set", "train.save_every=1", "--set", "train.keep_checkpoints=9"]
    assert "there is no run to resume in" in tunesmith("train", *many, "--resume").error
    real = Meters.on_step_end

    def on_step_end(self: Meters, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        real(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Meters, "on_step_end", on_step_end)
    # click turns the interrupt into its own way of leaving.
    assert tunesmith("train", *many).status != 0
    monkeypatch.setattr(Meters, "on_step_end", real)
    assert not (tmp_path / "run" / "model").exists()
    assert "holds a run of this recipe already. Go on with it by --resume" in tunesmith("train", *many).error
    other = tunesmith("train", *many, "--resume", "--set", "train.batch_size=2")
    assert "holds another run: its train.batch_size is 4, this recipe's is 2" in other.error
    said = tunesmith("train", *many, "--resume")
    assert said.status == 0, said.err
    steps = [
        entry["step"] for entry in json.loads((tmp_path / "run" / "report.json").read_text())["details"]["history"]
    ]
    assert steps[-1] == 4
    assert tunesmith("train", *many, "--overwrite", "--steps", 2).status == 0
    assert load(tmp_path / "run" / "recipe.yaml").train.steps == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "there is no recipe file nowhere.yaml"),
        (["--method", "dylra"], "there is no part 'dylra'. Did you mean 'dylora'?"),
        (["--method", "model-soups"], "is in the room merging, which has its own command"),
        (["--task", "causal"], "task: Input should be 'causal-lm'"),
        (["--model", "./nowhere"], "there is no model folder ./nowhere"),
        (["--model", "tiny-lm-x"], "Did you mean 'tiny-lm-s'?"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--set", "train.stps=3"], "there is no field 'train.stps'. Did you mean 'steps'?"),
        (["--set", "train.steps"], "expected NAME=VALUE, such as --set train.steps=200"),
        (["--set", "train.batch_size=0"], "train.batch_size: Input should be greater than 0, found 0."),
        (["--set", "train.precision=fp8"], "train.precision: Input should be 'float32', 'bf16' or 'fp16'"),
        (["--method", "lora", "--set", "optimizer=galore"], "galore cannot be combined with lora"),
        (["--set", "optimizer={name: adamw_torch, beta: 1}"], "adamw_torch has no option 'beta'"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    tunesmith: Callable[..., Any], basics: list[Any], tmp_path: Path, arguments: list[str], message: str
) -> None:
    said = tunesmith("train", *basics, *arguments)
    assert message in said.error
    assert not (tmp_path / "run" / "model").exists()


def test_a_bad_row_is_named_and_can_be_left_out(
    tunesmith: Callable[..., Any], basics: list[Any], tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "bad.jsonl", [{"prompt": f"{i}: ", "completion": "ab"} for i in range(20)])
    lines = file.read_text().splitlines()
    lines[6] = '{"prompt": 3}'
    file.write_text("\n".join(lines))
    bad = [*basics, "--data", file, "--method", "full"]
    said = tunesmith("train", *bad)
    assert "bad.jsonl:7" in said.error
    said = tunesmith("train", *bad, "--skip-bad-rows", "--overwrite")
    assert said.status == 0, said.err
    assert "bad.jsonl:7" in (tmp_path / "run" / "report.json").read_text()


def test_an_output_that_cannot_be_a_run_is_refused(
    tunesmith: Callable[..., Any], basics: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("precious")
    for place in ("file", "file/below"):
        said = tunesmith("train", *basics, "--output", tmp_path / place)
        assert f"{place} cannot be written to (Not a directory); name another --output" in said.error
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").touch()
    said = tunesmith("train", *basics, "--output", tmp_path / "folder", "--overwrite")
    assert "not empty and not the folder of a run (precious)" in said.error
    assert (tmp_path / "folder" / "precious").exists()
    assert (tmp_path / "file").read_text() == "precious"


def test_fields_lists_every_field_of_a_recipe(tunesmith: Callable[..., Any]) -> None:
    said = tunesmith("train", "--fields")
    assert said.status == 0
    for section, kind in (("train", TrainSpec), ("data", DataSpec), ("report", ReportSpec)):
        for name, field in kind.model_fields.items():
            assert f"{section}.{name} " in said.out, name
            assert field.description
    for name in ("model.name", "adapters", "schedule", "optimizer", "objective", "regularisers", "output"):
        assert f"{name} " in said.out
    assert "adamw_torch" in said.out
    assert "{prompt: question, completion: answer}" in " ".join(said.out.replace("│", " ").split())
