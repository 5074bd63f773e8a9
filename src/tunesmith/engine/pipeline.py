"""Running a pipeline in its folder.

pipeline.yaml          what was asked; a folder belongs to one pipeline
rows/                  the checked rows, the same for every training
stages/                what was decided between the trainings
NAME/                  a training, a run folder each
report.json, .html     what came of it
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tunesmith import catalog
from tunesmith import report as reports
from tunesmith.core.files import remove_staging, write_text
from tunesmith.core.part import PIPELINE_ROOMS, ROOMS
from tunesmith.core.report import Report
from tunesmith.engine.workshop import Bench, check_task
from tunesmith.errors import CheckpointError, RecipeError
from tunesmith.recipe import Recipe

_NAME = "pipeline.yaml"


def run_pipeline(
    slug: str,
    recipe: Recipe,
    options: Mapping[str, Any],
    run: Callable[..., Report],
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
) -> Report:
    """Do a pipeline's whole job in the recipe's `output`.

    Args:
        slug: A part of the rooms `recipes` and `systems`.
        recipe: Of a single training.
        options: Of the part.
        run: `tunesmith.run`.
        resume: Go on where the same pipeline stopped.
        overwrite: Replace the pipeline that is in the folder.
        quiet: No progress.

    Raises:
        RecipeError: no such part, a wrong option, parts that cannot be combined, another task.
        CheckpointError: the folder holds something else.
    """
    part = catalog.get(slug)
    if part.room not in PIPELINE_ROOMS:
        rooms = " and ".join(f"{room} ({ROOMS[room]})" for room in PIPELINE_ROOMS)
        raise RecipeError(f"{slug!r} is in the room {part.room} ({ROOMS[part.room]}); pipelines are in {rooms}.")
    checked = part.validate(dict(options))
    recipe.check()
    folder = Path(recipe.output)
    content = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"output"})
    asked = {"pipeline": slug, "options": {k: v for k, v in checked.items() if v is not None}, "recipe": content}
    _claim(folder, asked, resume=resume, overwrite=overwrite)
    bench = Bench(folder, recipe, run, quiet=quiet)
    check_task(slug, part.target.tasks, bench.task)
    found: Report = part.target(**checked).run(bench)
    reports.save(found, folder)
    return found


def _claim(folder: Path, asked: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    file, text = folder / _NAME, yaml.safe_dump(asked, sort_keys=True)
    if file.exists() and overwrite:
        for entry in folder.iterdir():  # the name goes last: it tells that the rest is ours, should this be interrupted
            if entry != file:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        file.unlink()
    elif file.exists():
        if file.read_text(encoding="utf-8") != text:
            raise CheckpointError(
                f"{folder} holds another pipeline ({file} says which); name another --output, or replace it by "
                "--overwrite"
            )
        if not resume:
            raise CheckpointError(
                f"{folder} holds this pipeline already. Go on with it by --resume, replace it by --overwrite, or name "
                "another --output."
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty and not the folder of a pipeline; name another --output")
    elif resume:
        raise CheckpointError(f"there is no pipeline to resume in {folder}; leave out --resume to begin one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written to ({error.strerror}); name another --output") from None
    remove_staging(folder)
