"""A finished run as a Report: what changed, what it cost, what was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.core.report import Figure, Listing, Plot, Report, Sample, Table
from tunesmith.engine.evaluate import EVERYTHING, is_right
from tunesmith.engine.retain import Retained
from tunesmith.engine.save import versions
from tunesmith.inputs import Encoded
from tunesmith.models.loader import Task
from tunesmith.recipe import Recipe

Measured = Mapping[str, Any]
_UNITS: dict[str, tuple[str, str, Any]] = {
    "loss": ("loss", "", "lower"),
    "perplexity": ("perplexity", "", "lower"),
    "accuracy": ("accuracy", "share", "higher"),
    "match": ("exact match", "share", "higher"),
}


@dataclass(frozen=True)
class Cost:
    """What training took.

    Attributes:
        trainable: Numbers that train.
        parameters: All numbers of the model, adapters included.
        state_bytes: The largest optimizer state.
        peak_bytes: Peak memory of this process while training.
        tokens: Real tokens trained on, over all processes.
        seconds: Spent in optimizer steps, evaluation and saving left out.
        steps: Optimizer steps.
    """

    trainable: int
    parameters: int
    state_bytes: int
    peak_bytes: int
    tokens: int
    seconds: float
    steps: int


def build(
    recipe: Recipe,
    data: Encoded,
    retained: Retained | None,
    before: Measured,
    after: Measured,
    cost: Cost,
    history: Sequence[Mapping[str, float]],
    notes: Sequence[str],
) -> Report:
    """The report of a run.

    Args:
        recipe: What was asked.
        data: What was read.
        retained: What forgetting was measured on.
        before: From `Measurer.measure`, before training.
        after: The same afterwards.
        cost: What it took.
        history: The Trainer's log.
        notes: Sentences from setting up.
    """
    figures: dict[str, Any] = {
        **_quality(before, after),
        **_forgetting(before, after, retained),
        **_costs(cost, data.task),
    }
    tables = [_by_group("on the evaluation rows", before, after)]
    if retained is not None:
        known = _by_group("what the model knew before", before["retained"], after["retained"])
        known.note = f"Measured on {retained.what}."
        tables.append(known)
    tables += [_rows_read(data), _environment()]
    return Report(
        title=f"{recipe.model.name}, {method_name(recipe)}",
        summary=f"{recipe.model.name} tuned with {method_name(recipe)} on {_source(recipe)}: {cost.steps:,} steps.",
        figures=figures,
        tables=tables,
        plots=_curves(history),
        samples=_samples(before, after, data, recipe.report.samples),
        notes=[*notes, *data.report["notes"], *_left_out(data)],
        listings=[Listing("recipe.yaml", recipe.to_yaml())],
        details={"history": list(history), "data": data.report, "before": before, "after": after},
    )


def method_name(recipe: Recipe) -> str:
    """What trains, in a few words: `dylora + lisa`, or `full fine-tuning`."""
    parts = [spec.name for spec in (*recipe.adapters, *recipe.prompts)]
    words = parts or ["full fine-tuning"]
    words += [spec.name for spec in (recipe.schedule, recipe.objective) if spec is not None]
    if not recipe.optimizer.name.startswith("adamw"):
        words.append(recipe.optimizer.name)
    return " + ".join([*words, *(spec.name for spec in (*recipe.regularisers, *recipe.inference, *recipe.data.select))])


def _source(recipe: Recipe) -> str:
    return recipe.data.train or "the embedded data"


def _quality(before: Measured, after: Measured) -> dict[str, Figure]:
    """The metrics of each group; a group's exact match is shown only where something was or is right."""
    found: dict[str, Figure] = {}
    groups = list(after["metrics"])
    for group in groups:
        suffix = "" if group == EVERYTHING else f", {group}"
        values, earlier = dict(after["metrics"][group]), dict(before["metrics"][group])
        if group in after["match"]:
            values["match"], earlier["match"] = after["match"][group], before["match"][group]
        for name in ("match", "accuracy", "loss", "perplexity"):
            if name in values and not (name == "match" and not values[name] and not earlier[name]):
                label, unit, better = _UNITS[name]
                found[f"{label}{suffix}"] = Figure(values[name], earlier[name], unit, better, group="evaluation")
    return found


def _forgetting(before: Measured, after: Measured, retained: Retained | None) -> dict[str, Figure]:
    if retained is None:
        return {}
    old, new = before["retained"], after["retained"]
    what = f"Measured on {retained.what}; lower than before is forgotten."
    if new["match"]:
        value, earlier = _mean(new["match"]), _mean(old["match"])
        return {"knew before, exact match": Figure(value, earlier, "share", "higher", help=what, group="forgetting")}
    value, earlier = (_mean({g: m["loss"] for g, m in side["metrics"].items()}) for side in (new, old))
    return {"knew before, loss": Figure(value, earlier, "", "lower", help=what, group="forgetting")}


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / max(len(values), 1)


def _costs(cost: Cost, task: Task) -> dict[str, Figure]:
    unit = "pictures/s" if task == "image-classification" else "tokens/s"
    speed = cost.tokens / cost.seconds if cost.seconds else 0.0
    named = {
        "trainable parameters": Figure(cost.trainable, unit="count", of=cost.parameters),
        "optimizer state": Figure(cost.state_bytes, unit="bytes", help="The largest during the run."),
        "peak memory": Figure(cost.peak_bytes, unit="bytes", help="Of this process while training."),
        "speed": Figure(round(speed), unit=unit, help="Padding not counted."),
        "training time": Figure(cost.seconds, unit="seconds", help="Evaluation and saving not counted."),
    }
    for figure in named.values():
        figure.group = "cost"
    return named


def _by_group(title: str, before: Measured, after: Measured) -> Table:
    # A loss of nearly nothing becomes many times as much without anything being lost; its exponential tells.
    names = list(dict.fromkeys(name for metrics in after["metrics"].values() for name in metrics))
    names = [name for name in names if name != "loss" or "perplexity" not in names]
    names = [*names, *(["match"] if after["match"] else [])]
    table = Table(title, ["group", *(_UNITS[name][0] for name in names)])
    for group, metrics in after["metrics"].items():
        row: list[Any] = [group]
        for name in names:
            now = after["match"].get(group) if name == "match" else metrics.get(name)
            then = before["match"].get(group) if name == "match" else before["metrics"][group].get(name)
            row.append(None if now is None else Figure(now, then, _UNITS[name][1], _UNITS[name][2]))
        table.rows.append(row)
    return table


def _rows_read(data: Encoded) -> Table:
    table = Table("rows", ["use", "source", "read", "bad", "too long", "kept", "tokens"])
    for use, source in data.report["sources"].items():
        counted = data.report[use]
        bad = source["bad_rows"]["count"]
        table.rows.append(
            [
                use,
                source["name"],
                source["rows_read"],
                bad,
                counted.get("dropped_too_long", 0),
                counted["rows"],
                counted.get("tokens"),
            ]
        )
    return table


def _left_out(data: Encoded) -> list[str]:
    """Rows that were not used, with reasons: nobody should have to look for them."""
    found = []
    for use, source in data.report["sources"].items():
        counted, bad = data.report[use], source["bad_rows"]
        if bad["count"]:
            first = "; ".join(f"{row['where']}: {row['reason']}" for row in bad["first"][:3])
            found.append(f"{bad['count']} bad rows of {source['name']} were left out: {first}")
        if counted.get("dropped_too_long"):
            limit = data.report["limit"]
            found.append(
                f"{counted['dropped_too_long']} rows of {source['name']} are longer than {limit['tokens']} tokens "
                f"({limit['from']}) and were left out; the longest has {counted['longest_found']}"
            )
        if counted.get("truncated"):
            found.append(f"{counted['truncated']} rows of {source['name']} ({use}) were cut to the limit")
    return found


def _environment() -> Table:
    table = Table("versions", ["what", "version"], collapsed=True)
    table.rows = [[name, value] for name, value in versions().items()]
    return table


def _curves(history: Sequence[Mapping[str, float]]) -> list[Plot]:
    def series(key: str) -> tuple[list[float], list[float]]:
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        return [x for x, _ in points], [y for _, y in points]

    train, evaluation, rate = series("loss"), series("eval_loss"), series("learning_rate")
    if not train[0]:
        return []
    lines = {"training": train, **({"evaluation": evaluation} if evaluation[0] else {})}
    below = Plot("learning rate", "line", "step", "learning rate", {"learning rate": rate})
    styles: dict[str, Any] = {"training": "smooth", "evaluation": "points"}
    return [Plot("loss", "line", "step", "loss", lines, styles=styles, below=below)]


def _samples(before: Measured, after: Measured, data: Encoded, count: int) -> list[Sample]:
    """Examples spread over the groups, in the order of the rows."""
    groups = data.eval["group"] if "group" in data.eval.column_names else None
    found: dict[str, list[Sample]] = {}
    for then, now in zip(before["answers"], after["answers"], strict=True):
        group = "" if groups is None else str(groups[now["row"]] or "")
        outputs = {"before": then["text"], "after": now["text"]}
        correct = {name: is_right(text, now["expected"]) for name, text in outputs.items()}
        found.setdefault(group, []).append(Sample(now["prompt"], now["expected"], outputs, correct, group))
    picked: list[Sample] = []
    while len(picked) < count and any(found.values()):
        for samples in found.values():
            if samples and len(picked) < count:
                picked.append(samples.pop(0))
    return picked
