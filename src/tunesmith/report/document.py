"""`report.json`: its schema, made from the dataclasses of `tunesmith.core.report`, and the checks on what is in it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import CoreSchema

from tunesmith.core import report as core
from tunesmith.core.part import argument_help
from tunesmith.core.report import SCHEMA_VERSION, Figure, Plot, Report
from tunesmith.errors import TunesmithError, did_you_mean

NON_FINITE = ("NaN", "Infinity", "-Infinity")
_ADAPTER = TypeAdapter(Report)


class _Numbers(GenerateJsonSchema):
    """A float is a number, or the name of one that JSON cannot write."""

    def float_schema(self, schema: CoreSchema) -> dict[str, Any]:
        return {"anyOf": [{"type": "number"}, {"enum": list(NON_FINITE)}]}


def build() -> dict[str, Any]:
    """The JSON schema of `report.json`, descriptions taken from the docstrings."""
    made = _ADAPTER.json_schema(schema_generator=_Numbers)
    for name, section in [("Report", made), *made["$defs"].items()]:
        _describe(section, inspect.getdoc(getattr(core, name)) or "")
    version = {"const": SCHEMA_VERSION, "description": "Of this layout; a reader refuses one that it does not know."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **made,
        "properties": {"schema_version": version, **made["properties"]},
        "required": ["schema_version", *made["required"]],
    }


def _describe(section: dict[str, Any], doc: str) -> None:
    section["description"] = " ".join(doc.partition("Attributes:")[0].split())
    help_ = argument_help(doc.replace("Attributes:", "Args:"))
    for name, entry in section["properties"].items():
        if name in help_:
            entry["description"] = help_[name]


def clean(report: Report) -> Report:
    """The report as `load` would give it back: plain data, checked.

    Raises:
        TunesmithError: names the field, what was expected and what was found.
    """
    return _parse(report.to_json(), "report")


def write(value: Any, indent: str = "") -> str:
    """JSON for people and programs: an entry per line, but a row or a curve on one."""
    deeper = indent + " "
    if isinstance(value, dict) and value:
        lines = [f"{json.dumps(key, ensure_ascii=False)}: {write(entry, deeper)}" for key, entry in value.items()]
        opened, closed = "{", "}"
    elif isinstance(value, list) and any(isinstance(entry, dict | list) for entry in value):
        lines = [write(entry, deeper) for entry in value]
        opened, closed = "[", "]"
    else:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    return f"{opened}\n" + ",\n".join(deeper + line for line in lines) + f"\n{indent}{closed}"


def read(path: Path) -> Report:
    """Read and check a `report.json`, or the one in the folder `path`.

    Raises:
        TunesmithError: names the file and field, what was expected and what was found.
    """
    path = path / "report.json" if path.is_dir() else path
    if not path.is_file():
        raise TunesmithError(f"there is no report at {path}; give a report.json or the folder that it is in")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise TunesmithError(f"{path} is not a report: it is not UTF-8 text ({error})") from None
    except ValueError as error:
        raise TunesmithError(f"{path} is not JSON: {error}") from None
    return _parse(content, str(path))


def _refuse(constant: str) -> Any:
    raise ValueError(f"found the bare word {constant}; numbers that are not finite are written as text, {constant!r}")


def _parse(content: Any, name: str) -> Report:
    if not isinstance(content, dict):
        raise TunesmithError(f"{name}: a report is a JSON object, found a {type(content).__name__}")
    content = dict(content)
    version = content.pop("schema_version", None)
    if version is None:
        raise TunesmithError(f"{name}: `schema_version` is missing, so this is not a report that Tunesmith wrote")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise TunesmithError(
            f"{name}: `schema_version` is {version!r}, and this Tunesmith reads {SCHEMA_VERSION}; "
            "read it with the Tunesmith that wrote it"
        )
    try:
        report = _ADAPTER.validate_python(content)
    except ValidationError as error:
        raise TunesmithError(f"{name}: {_explain(error, content)}") from None
    _revive(report)
    _check(report, name)
    return report


def _explain(error: ValidationError, content: dict[str, Any]) -> str:
    # A union reports once per member, and the deepest place is in the member that was meant. A name that does not
    # exist says more than one that is missing: it is often the same, misspelt.
    errors = [(_place(e["loc"], content), e) for e in error.errors()]
    place, first = max(errors, key=lambda pair: (len(pair[0]), pair[1]["type"] == "unexpected_keyword_argument"))
    where = ".".join(str(key) for key in place)
    if first["type"] == "unexpected_keyword_argument":
        owner = _owner(place)
        known = list(owner.__dataclass_fields__)
        return f"there is no field {where}.{did_you_mean(str(place[-1]), known)} Fields there: {', '.join(known)}."
    if first["type"] == "missing":
        return f"{where} is missing"
    expected = dict.fromkeys(e["msg"].removeprefix("Input should be ") for other, e in errors if other == place)
    return f"{where} should be {' or '.join(expected)}, found {first['input']!r:.80}"


def _place(loc: Sequence[int | str], content: Any) -> list[int | str]:
    """The keys of `loc` that are in the data; pydantic puts the names of union members between them."""
    place: list[int | str] = []
    here = content
    for i, key in enumerate(loc):
        if (isinstance(here, dict) and key in here) or (isinstance(here, list) and isinstance(key, int)):
            place.append(key)
            here = here[key] if isinstance(here, dict) or key < len(here) else None
        elif i == len(loc) - 1 and isinstance(here, dict):
            place.append(key)
    return place


def _owner(place: Sequence[int | str]) -> Any:
    """The dataclass that the last key of `place` was to be a field of."""
    sections = {"figures": Figure, "rows": Figure, "tables": core.Table, "plots": Plot, "below": Plot}
    sections |= {"samples": core.Sample, "listings": core.Listing}
    return next((sections[key] for key in reversed(place[:-1]) if key in sections), Report)


def _revive(report: Report) -> None:
    """Turn the names of non-finite numbers back into numbers where a value may be text or number."""

    def number(value: Any) -> Any:
        return float(value) if isinstance(value, str) and value in NON_FINITE else value

    def figure(value: Any) -> Any:
        if isinstance(value, Figure):
            value.value, value.before = number(value.value), number(value.before)
            return value
        return number(value)

    report.figures = {name: figure(value) for name, value in report.figures.items()}
    for table in report.tables:
        table.rows = [[figure(cell) for cell in row] for row in table.rows]
    for plot in [p for top in report.plots for p in (top, top.below) if p and p.kind == "line"]:
        # Beside words as x values, `NaN` is one of them.
        if not any(isinstance(number(x), str) for xs, _ in plot.series.values() for x in xs):
            plot.series = {label: ([number(x) for x in xs], ys) for label, (xs, ys) in plot.series.items()}


def _check(report: Report, name: str) -> None:
    """What types cannot say: lengths that have to agree, and names that have to exist."""

    def need(holds: bool, problem: str) -> None:
        if not holds:
            raise TunesmithError(f"{name}: {problem}")

    for i, table in enumerate(report.tables):
        at, wide = f"tables.{i} ({table.title!r})", len(table.columns)
        need(
            len(table.units) in (0, wide), f"{at} has {wide} columns and {len(table.units)} units; give one per column"
        )
        for j, row in enumerate(table.rows):
            need(len(row) == wide, f"{at}: row {j} has {len(row)} cells under {wide} columns")
    for i, plot in enumerate(report.plots):
        at = f"plots.{i} ({plot.title!r})"
        _check_plot(plot, at, need)
        if plot.below is not None:
            need(
                plot.kind == "line" and plot.below.kind == "line", f"{at}: only a line plot can stand below a line plot"
            )
            words = any(isinstance(x, str) for p in (plot, plot.below) for xs, _ in p.series.values() for x in xs)
            need(not words, f"{at}: a plot with another below it needs numbers as x values, and so does that one")
            need(plot.below.below is None, f"{at}: the plot below has one below itself; make it a plot of its own")
            _check_plot(plot.below, f"{at}.below", need)
    for i, sample in enumerate(report.samples):
        for key in sample.correct:
            need(key in sample.outputs, f"samples.{i}: `correct` judges {key!r}, which is not among the outputs")


def _check_plot(plot: Plot, at: str, need: Any) -> None:
    for label, (xs, ys) in plot.series.items():
        need(len(xs) == len(ys), f"{at}: series {label!r} has {len(xs)} x values and {len(ys)} y values")
        for axis, scale, values in (("x", plot.x_scale, xs), ("y", plot.y_scale, ys)):
            positive = all(not isinstance(v, str) and not v <= 0 for v in values)
            need(scale != "log" or positive, f"{at}: {axis}_scale is log, and series {label!r} has {axis} <= 0 or text")
    for j, row in enumerate(plot.matrix):
        wide = len(plot.matrix[0])
        need(len(row) == wide, f"{at}: row {j} of the matrix has {len(row)} cells, row 0 has {wide}")
    shape = {"row": len(plot.matrix), "column": len(plot.matrix[0]) if plot.matrix else 0}
    for side, labels in (("row", plot.row_labels), ("column", plot.column_labels)):
        need(len(labels) in (0, shape[side]), f"{at}: {len(labels)} {side} labels for {shape[side]} {side}s")
