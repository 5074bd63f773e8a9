"""Tasks of a stream: which rows they are, how they become batches, and how well a model does them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, Literal

import torch
from datasets import ClassLabel, Dataset, concatenate_datasets

from tunesmith.core.loss import IGNORED, labelled, model_inputs
from tunesmith.core.pipeline import Opened
from tunesmith.errors import RecipeError

By = Literal["auto", "family", "label", "order"]
AT_ONCE = 1024
"""Rows that are encoded at a time."""


def split(train: Dataset, held_out: Dataset, by: By, tasks: int) -> dict[str, Any]:
    """Rows of each task.

    Returns:
        `by`, what a task is; `names` of the tasks; `train`, row numbers by task; `eval`, row numbers by the task's
        name, of tasks that have any, or all of them under `all` where tasks are parts of the training rows.

    Raises:
        RecipeError: fewer than two tasks, or the rows have no such column.
    """
    kind = train.features.get("label")
    if by == "auto":
        by = "family" if "family" in train.column_names else "label" if isinstance(kind, ClassLabel) else "order"
    if by == "order":
        _at_least_two(tasks, len(train), "rows")
        cuts = [len(train) * i // tasks for i in range(tasks + 1)]
        names = [f"part {i + 1}" for i in range(tasks)]
        parts = [list(range(a, b)) for a, b in pairwise(cuts)]
        return {"by": by, "names": names, "train": parts, "eval": {"all": list(range(len(held_out)))}}
    if by == "label":
        if not isinstance(kind, ClassLabel):
            raise RecipeError("fpf: by=label divides classes, and the rows have no `label`; use `family` or `order`")
        count = len(kind.names)
        _at_least_two(tasks, count, "classes")
        task_of: dict[Any, int] = {c: c * tasks // count for c in range(count)}
        members = [[c for c in range(count) if task_of[c] == t] for t in range(tasks)]
        names = [", ".join(kind.names[c] for c in part) for part in members]
        return {"by": by, "names": names, **_divided(train, held_out, "label", task_of, names)}
    if "family" not in train.column_names:
        raise RecipeError(
            "fpf: by=family needs rows with a family (`data.columns: {family: YOUR_COLUMN}`); use `label` or `order`"
        )
    names = [str(name) for name in dict.fromkeys(train["family"])]
    _at_least_two(len(names), len(train), "families")
    task_of = {name: i for i, name in enumerate(dict.fromkeys(train["family"]))}
    return {"by": by, "names": names, **_divided(train, held_out, "family", task_of, names)}


def _at_least_two(tasks: int, most: int, what: str) -> None:
    if not 2 <= tasks <= most:
        raise RecipeError(f"fpf: a stream has 2 or more tasks, found {tasks} of {most} {what}")


def _divided(
    train: Dataset, held_out: Dataset, column: str, task_of: Mapping[Any, int], names: Sequence[str]
) -> dict[str, Any]:
    parts: list[list[int]] = [[] for _ in names]
    for i, value in enumerate(train[column]):
        parts[task_of[value]].append(i)
    held: dict[str, list[int]] = {}
    for i, value in enumerate(held_out[column] if column in held_out.column_names else ()):
        if value in task_of:
            held.setdefault(names[task_of[value]], []).append(i)
    found = {name: held[name] for name in names if name in held}
    return {"train": parts, "eval": found or {"all": list(range(len(held_out)))}}


def check(recipe: Mapping[str, Any], task: str, distillation: float) -> None:
    """Raise `RecipeError` for what the stream's own loop does not do."""
    model, train = recipe["model"], recipe["train"]
    if model["quantization"] != "none" or model["adapter"] or recipe["prompts"]:
        raise RecipeError(
            "fpf trains the weights of a plain model: run it unquantised, merge model.adapter into it first, and leave "
            "prompts out"
        )
    others = [spec["name"] for spec in recipe["adapters"] if spec["name"] != "lora"]
    others += [recipe[name]["name"] for name in ("schedule", "objective") if recipe[name]]
    others += [spec["name"] for spec in (*recipe["regularisers"], *recipe["inference"], *recipe["data"]["select"])]
    if recipe["optimizer"]["name"] not in ("adamw_torch", "sgd"):
        others.append(recipe["optimizer"]["name"])
    if others:
        raise RecipeError(f"fpf has a loop of its own, by SGD on the model's loss; leave out {', '.join(others)}")
    wrong = {
        "gradient_accumulation": train["gradient_accumulation"] > 1,
        "gradient_checkpointing": train["gradient_checkpointing"],
        "fsdp": train["fsdp"],
        "torch_compile": train["torch_compile"],
        "precision": train["precision"] == "fp16",
        "epochs": train["epochs"] is not None,
    }
    if found := [f"train.{name} {train[name]}" for name, bad in wrong.items() if bad]:
        raise RecipeError(
            f"fpf's loop does not do {', '.join(found)}; leave it out (passes over a task are its option `epochs`)"
        )
    if distillation and not task.endswith("classification"):
        raise RecipeError(f"fpf keeps logits of whole rows, which {task} does not have; leave `distillation` out")


def witnesses(rows: Dataset) -> Dataset | None:
    """Two rows of different classes, or None where rows have no classes."""
    if not isinstance(rows.features.get("label"), ClassLabel):
        return None
    labels = rows["label"]
    return rows.select([0, next(i for i, label in enumerate(labels) if label != labels[0])])


def chunks(
    opened: Opened, rows: Dataset, wanted: Sequence[Sequence[int]], beside: Dataset | None
) -> Iterator[dict[str, Any]]:
    """A batch for each sequence of row numbers, encoded some at a time.

    Args:
        opened: Whose batches they are.
        rows: That the numbers are of.
        wanted: Row numbers of each batch.
        beside: From `witnesses`: rows of one class alone cannot be encoded, and a task may have one.
    """
    for size, run in groupby(wanted, key=len):
        same = list(run)
        most = max(1, AT_ONCE // size)
        for start in range(0, len(same), most):
            some = same[start : start + most]
            chosen = rows.select([row for batch in some for row in batch])
            given = chosen if beside is None else concatenate_datasets([chosen, beside])
            yield from opened.batches(given, size)[: len(some)]


@torch.no_grad()
def accuracy(
    opened: Opened, rows: Dataset, which: Sequence[int], task: str, beside: Dataset | None, size: int = 32
) -> float:
    """Share of right labels: of rows where they have classes, else of tokens, given those before."""
    model = opened.model
    was = model.training
    model.eval()
    right = total = 0
    wanted = [which[a : a + size] for a in range(0, len(which), size)]
    for batch in chunks(opened, rows, wanted, beside):
        if task == "causal-lm":
            found = labelled(model, batch)
            guesses, labels = found.logits.argmax(-1), found.labels
        else:
            given = batch if task == "seq2seq" else model_inputs(batch)  # a decoder's inputs are made of its labels
            guesses, labels = model(**given).logits.argmax(-1), batch["labels"]
        known = labels != IGNORED
        right += int((guesses == labels)[known].sum())
        total += int(known.sum())
    model.train(was)
    return right / max(total, 1)
