"""A run's folder: whose it is, what is refused, and where a killed run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.engine.run_folder import RunFolder
from tunesmith.errors import CheckpointError, RecipeError
from tunesmith.recipe import Recipe, load


def opened(path: Path, resume: bool = False, overwrite: bool = False, **fields: Any) -> Path | None:
    return RunFolder(path).open(Recipe.model_validate(fields), resume=resume, overwrite=overwrite)


def checkpoint(path: Path, name: str) -> Path:
    folder = path / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    return folder


def test_a_new_folder_is_claimed(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "first"
    assert opened(path, method="ssf", train={"steps": 3}) is None
    assert load(path / "recipe.yaml") == Recipe(method="ssf", train={"steps": 3})
    assert (path / "checkpoints").is_dir()


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    assert opened(tmp_path) is None


def test_a_begun_run_is_not_begun_again(tmp_path: Path) -> None:
    opened(tmp_path)
    checkpoint(tmp_path, "checkpoint-2")
    with pytest.raises(CheckpointError, match=r"holds a run of this recipe already\. Go on with it by --resume"):
        opened(tmp_path)


def test_a_run_that_came_to_nothing_is_in_nobodys_way(tmp_path: Path) -> None:
    opened(tmp_path)
    assert opened(tmp_path, method="full") is None
    assert load(tmp_path / "recipe.yaml") == Recipe(method="full")
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match="holds a run of this recipe already"):
        opened(tmp_path, method="full")


def test_the_checkpoint_with_the_most_steps_is_resumed_from(tmp_path: Path) -> None:
    opened(tmp_path)
    assert opened(tmp_path, resume=True) is None, "killed before the first checkpoint: begin"
    for step in (2, 10, 9):
        last = checkpoint(tmp_path, f"checkpoint-{step}")
    assert last.name == "checkpoint-9"
    assert opened(tmp_path, resume=True) == tmp_path / "checkpoints" / "checkpoint-10"
    assert RunFolder(tmp_path).latest() == tmp_path / "checkpoints" / "checkpoint-10"


def test_half_written_checkpoints_are_ignored_and_cleared(tmp_path: Path) -> None:
    opened(tmp_path)
    checkpoint(tmp_path, "checkpoint-4")
    half = checkpoint(tmp_path, ".partial-12ab34cd-checkpoint-6")
    checkpoint(tmp_path, "checkpoint-best")
    assert RunFolder(tmp_path).latest() == tmp_path / "checkpoints" / "checkpoint-4"
    assert half.exists()
    assert opened(tmp_path, resume=True) == tmp_path / "checkpoints" / "checkpoint-4"
    assert not half.exists()
    assert (tmp_path / "checkpoints" / "checkpoint-best").exists()


def test_a_result_that_was_moved_aside_is_put_back(tmp_path: Path) -> None:
    opened(tmp_path)
    aside = tmp_path / ".partial-12ab34cd-old-model"
    aside.mkdir()
    (aside / "weights").touch()
    opened(tmp_path, resume=True)
    assert (tmp_path / "model" / "weights").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "tiny-lm-s"}, "its model is .*tiny-lm-m.*, this recipe's is .*tiny-lm-s"),
        ({"data": {"max_length": 5}}, "its data is"),
        ({"adapters": ["dylora"]}, "its adapters is .*lora"),
        ({"prompts": ["dept"], "adapters": ["lora"]}, "its prompts is"),
        ({"schedule": "lisa", "adapters": ["lora"]}, "its schedule is None"),
        ({"optimizer": "mezo", "adapters": ["lora"]}, "its optimizer is"),
        ({"objective": "sft"}, "its objective is None"),
        ({"inference": [{"name": "skipdecode", "n_min": 2}]}, "its inference is"),
        ({"task": "causal-lm"}, "its task is None"),
        ({"method": "full"}, "its method is None, this recipe's is full"),
        ({"train": {"seed": 1}}, "its train.seed is 0, this recipe's is 1"),
        ({"train": {"steps": 5}}, "its train.steps is None"),
        ({"train": {"precision": "bf16"}}, "its train.precision is float32"),
    ],
)
@pytest.mark.parametrize("resume", [True, False])
def test_another_run_is_refused_with_what_differs(
    tmp_path: Path, fields: dict[str, Any], message: str, resume: bool
) -> None:
    opened(tmp_path)
    checkpoint(tmp_path, "checkpoint-2")
    with pytest.raises(CheckpointError, match=rf"holds another run: {message}.* or replace that run by --overwrite"):
        opened(tmp_path, resume=resume, **fields)
    assert load(tmp_path / "recipe.yaml") == Recipe(), "the recipe that is there stays"


def test_what_changes_no_weight_may_change(tmp_path: Path) -> None:
    opened(tmp_path)
    changed = {"report": {"samples": 1}, "output": "elsewhere", "train": {"save_every": 3, "eval_every": 2}}
    assert opened(tmp_path, resume=True, **changed) is None
    assert load(tmp_path / "recipe.yaml").report.samples == 1


def test_overwriting_clears_what_a_run_left_and_nothing_else(tmp_path: Path) -> None:
    opened(tmp_path)
    checkpoint(tmp_path, "checkpoint-4")
    for name in ("before.json", "report.json", "report.html", "notes.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model").mkdir()
    assert opened(tmp_path, overwrite=True, method="full") is None
    assert {p.name for p in tmp_path.iterdir()} == {"recipe.yaml", "checkpoints", "notes.txt"}
    assert not any((tmp_path / "checkpoints").iterdir())
    assert load(tmp_path / "recipe.yaml").full


def test_resuming_does_not_overwrite(tmp_path: Path) -> None:
    opened(tmp_path)
    checkpoint(tmp_path, "checkpoint-4")
    assert opened(tmp_path, resume=True, overwrite=True) == tmp_path / "checkpoints" / "checkpoint-4"


def test_a_clearing_that_was_interrupted_can_be_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tmp_path)
    checkpoint(tmp_path, "checkpoint-4")
    for name in ("before.json", "report.json"):
        (tmp_path / name).write_text("{}")
    real, left = Path.unlink, [1]

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        real(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path, overwrite=True)
    monkeypatch.undo()
    assert (tmp_path / "recipe.yaml").exists()
    assert opened(tmp_path, overwrite=True) is None


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(CheckpointError, match=r"not empty and not the folder of a run \(thesis.tex\)"):
            opened(tmp_path, **flags)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no run to resume in"):
        opened(tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file cannot be written to \(.*\); name another --output"):
        opened(tmp_path / "file")


@pytest.mark.parametrize("content", ["train: {stps: 3}", "train: [", "- a"])
def test_a_held_recipe_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    opened(tmp_path)
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        opened(tmp_path, resume=True)


def test_what_was_measured_before_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.load_before() is None
    folder.save_before({"metrics": {"all": {"loss": 1.5}}})
    assert folder.load_before() == {"metrics": {"all": {"loss": 1.5}}}
