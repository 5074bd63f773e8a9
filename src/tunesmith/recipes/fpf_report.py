"""The report of FPF: accuracy after each task, what was forgotten, what is sensitive, FLOPs of everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.core.report import Figure, Plot, Report, Table
from tunesmith.recipes.fpf_learn import sensitivity, switched
from tunesmith.recipes.fpf_stream import Stream

Stages = Sequence[Mapping[str, Any]]


def mean(scores: Mapping[str, float]) -> float:
    """Over tasks, each with the same weight."""
    return sum(scores.values()) / len(scores)


def after_tasks(found: Stages) -> list[Mapping[str, Any]]:
    """The last stage with scores at the end of each task; the first entry is the model before the stream."""
    held: dict[int, Mapping[str, Any]] = {}
    ends = {}
    for stage in found[1:]:
        ends[stage["task"]] = stage["steps"]
    for stage in found[1:]:
        if stage["accuracy"] and stage["steps"] == ends[stage["task"]]:
            held[stage["task"]] = stage
    return [found[0], *held.values()]


def forgotten(rows: Stages, names: Sequence[str]) -> float | None:
    """The mean over all tasks but the last of the best accuracy after any earlier task, minus the final one."""
    learnt = [stage["accuracy"] for stage in rows[1:]]
    lost = [
        max(scores[name] for scores in learnt[i:-1]) - learnt[-1][name]
        for i, name in enumerate(names[:-1])
        if name in learnt[-1]
    ]
    return sum(lost) / len(lost) if lost else None


def report(
    found: Stages,
    divided: Mapping[str, Any],
    stream: Stream,
    held: Sequence[int],
    model: Path,
    numbers: Mapping[str, int],
) -> Report:
    """What came of the stages, the first of which is the model before the stream."""
    names, rows = divided["names"], after_tasks(found)
    phases = [stage for stage in found if "modules" in stage]
    final, group = found[-1], "evaluation"
    figures: dict[str, Any] = {
        "accuracy": Figure(
            mean(final["accuracy"]), mean(found[0]["accuracy"]), "share", "higher", group=group, help="Mean over tasks."
        )
    }
    if phases and "modules" in final:
        last = mean(found[-2]["accuracy"])
        figures["accuracy before the last phase"] = Figure(last, None, "share", "higher", group=group)
    if (lost := forgotten(rows, names)) is not None:
        figures["forgetting"] = Figure(
            lost, None, "share", "lower", group="forgetting", help="Best accuracy after any task minus the last one."
        )
    spent = {kind: sum(stage["total"].get(kind, 0) for stage in found) for kind in ("stream", "phases")}
    figures["FLOPs"] = Figure(sum(spent.values()), None, "FLOP", "lower", group="cost", help="Products, convolutions.")
    figures["FLOPs of the phases"] = Figure(spent["phases"], None, "FLOP", "lower", group="cost")
    if phases:
        tuned = sum(n for label, n in numbers.items() if _is_in(label, phases[-1]["modules"]))
        figures["numbers that a phase tunes"] = Figure(
            tuned, None, "count", "lower", of=sum(numbers.values()), group="cost"
        )
    figures["rows in the buffer"] = Figure(len(held), None, "count", group="cost")
    tables = [_accuracies(rows, found, names), *_sensitive(found, stream, phases, numbers), _costs(found)]
    return Report(
        f"FPF: {len(names)} tasks, {len(phases)} phases",
        figures,
        tables,
        _plots(rows, found, names),
        summary=f"The model is in {model}, the rows of the buffer in {model.parent / 'buffer'}.",
        details={"tasks": list(names), "by": divided["by"], "buffer": list(held), "model": str(model)},
    )


def _is_in(label: str, modules: Sequence[str]) -> bool:
    return any(f"{label}.".startswith(f"{module}.") for module in modules)


def _moment(stage: Mapping[str, Any]) -> str:
    if not stage["stage"]:
        return "before"
    return f"phase {stage['phase']}" if "phase" in stage else f"task {stage['task'] + 1}"


def _accuracies(rows: Stages, found: Stages, names: Sequence[str]) -> Table:
    columns = list(found[0]["accuracy"])
    table = Table("accuracy", ["steps", "after", *columns, "mean"], units=["", "", *["share"] * (len(columns) + 1)])
    table.note = "Rows of all tasks, also of those that have not come yet."
    for stage in found:
        if stage["accuracy"]:
            scores = stage["accuracy"]
            table.rows.append([stage["steps"], _moment(stage), *(scores[c] for c in columns), mean(scores)])
    return table


def _sensitive(found: Stages, stream: Stream, phases: Stages, numbers: Mapping[str, int]) -> list[Table]:
    every = [change for stage in found for change in stage["changes"]]
    switches = [switched(change["epoch"], stream.epochs) for change in every]
    scores = sensitivity([change["groups"] for change in every], switches)
    last = phases[-1]["modules"] if phases else []
    table = Table("sensitivity to a change of task", ["group", "S", "numbers", "tuned in the last phase"])
    table.note = "S: mean change in the epochs right after a switch of task, over its mean in the others but the first."
    table.rows = [[label, score, numbers[label], _is_in(label, last)] for label, score in scores.items()]
    chosen = Table("phases", ["phase", "after steps", "groups"], collapsed=True)
    chosen.rows = [[stage["phase"], stage["steps"], ", ".join(stage["modules"])] for stage in phases]
    return [table, *([chosen] if phases else [])]


def _costs(found: Stages) -> Table:
    table = Table("FLOPs", ["after", "steps of the stream so far", "FLOPs"], units=["", "", "FLOP"], collapsed=True)
    table.rows = [[_moment(stage), stage["steps"], sum(stage["total"].values())] for stage in found[1:]]
    return table


def _plots(rows: Stages, found: Stages, names: Sequence[str]) -> list[Plot]:
    scored = [stage for stage in found if stage["accuracy"]]
    x = [stage["steps"] for stage in scored]
    columns = list(found[0]["accuracy"])
    series = {name: (x, [stage["accuracy"][name] for stage in scored]) for name in columns}
    series = {"mean": (x, [mean(stage["accuracy"]) for stage in scored]), **(series if len(columns) > 1 else {})}
    plots = [Plot("accuracy over the stream", "line", "steps of the stream", "accuracy", series, unit="share")]
    if len(columns) > 1:
        matrix = [[stage["accuracy"][name] for name in columns] for stage in rows[1:]]
        labels = [f"after {stage['task'] + 1}" for stage in rows[1:]]
        plots.append(
            Plot(
                "accuracy after each task",
                "heatmap",
                "task",
                "",
                matrix=matrix,
                row_labels=labels,
                column_labels=columns,
                unit="share",
            )
        )
    return plots
