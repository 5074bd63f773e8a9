"""report.json: what is written is read back, is JSON, and what is wrong is named."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given

from tests.report.example import odd_report, training_report
from tests.report.strategies import LARGE, reports
from tunesmith import report
from tunesmith.core import report as core
from tunesmith.core.report import Figure, Plot, Report, Sample, Table
from tunesmith.errors import TunesmithError
from tunesmith.report.document import clean, write


def refuse(constant: str) -> float:
    raise AssertionError(f"bare {constant} in JSON")


def stored(content: dict, folder: Path) -> Path:
    path = folder / "report.json"
    path.write_text(json.dumps({"schema_version": 1, "title": "x", **content}), encoding="utf-8")
    return path


@LARGE
@given(reports)
def test_what_is_written_is_read_back(made: Report) -> None:
    written = write(made.to_json())
    content = json.loads(written, parse_constant=refuse)
    assert content == made.to_json()
    again = clean(made)
    assert write(again.to_json()) == write(clean(again).to_json())
    # Whole numbers among y values become floats, nothing else changes.
    assert again.to_json() == content


@pytest.mark.parametrize("make", [training_report, odd_report])
def test_save_and_load(tmp_path: Path, make: object) -> None:
    paths = report.save(make(), tmp_path / "run")
    assert {name: path.name for name, path in paths.items()} == {"json": "report.json", "html": "report.html"}
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["report.html", "report.json"]
    loaded = report.load(paths["json"])
    assert loaded.to_json() == report.load(tmp_path / "run").to_json() == clean(make()).to_json()
    again = report.save(loaded, tmp_path / "again")
    assert paths["json"].read_bytes() == again["json"].read_bytes()
    assert paths["html"].read_bytes() == again["html"].read_bytes()


def test_a_curve_is_whole_and_on_one_line(tmp_path: Path) -> None:
    xs = list(range(10_000))
    plot = Plot("loss", "line", series={"training": (xs, [x / 7 for x in xs])})
    path = report.save(Report("t", plots=[plot]), tmp_path)["json"]
    assert report.load(path).plots[0].series["training"] == (xs, [x / 7 for x in xs])
    assert len(path.read_text().splitlines()) < 60


def test_numbers_that_are_not_finite() -> None:
    made = Report("t", {"a": Figure(math.nan, -math.inf), "b": math.inf}, [Table("t", ["c"], [[math.nan]])])
    made.plots = [Plot("p", "line", series={"s": ([1, 2], [math.nan, math.inf])})]
    content = made.to_json()
    assert content["figures"]["a"]["value"] == "NaN"
    assert content["figures"]["a"]["before"] == "-Infinity"
    assert content["plots"][0]["series"]["s"][1] == ["NaN", "Infinity"]
    again = clean(made)
    assert math.isnan(again.figure("a").value)
    assert again.figure("a").before == -math.inf
    assert again.figure("b").value == math.inf
    assert math.isnan(again.tables[0].rows[0][0])
    assert math.isnan(again.plots[0].series["s"][1][0])


def test_scalars_and_arrays_of_numpy_and_torch() -> None:
    plot = Plot("p", "line", series={"s": (np.arange(2), torch.tensor([0.5, 1.5]))})
    made = Report("t", {"a": np.float32(0.5), "b": torch.tensor(3), "c": np.bool_(True)}, plots=[plot])
    again = clean(made)
    assert [again.figure(name).value for name in "abc"] == [0.5, 3, True]
    assert [type(again.figure(name).value) for name in "abc"] == [float, int, bool]
    assert again.plots[0].series["s"] == ([0, 1], [0.5, 1.5])


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    made = Report("a\ud800b", {"\udfff": 1}, details={"\ud800": ["\ud800"]})
    loaded = report.load(report.save(made, tmp_path)["json"])
    assert loaded.title == "a\ufffdb"
    assert list(loaded.figures) == ["\ufffd"]
    assert loaded.details == {"\ufffd": ["\ufffd"]}


@pytest.mark.parametrize(
    ("details", "said"),
    [
        ({"run": {"folder": Path("x")}}, "details.run.folder is a PosixPath"),
        ({"rows": [1, {2}]}, "details.rows.1 is a set"),
        ({"data": b"x"}, "details.data is a bytes"),
    ],
)
def test_what_json_cannot_hold_is_named(tmp_path: Path, details: dict, said: str) -> None:
    with pytest.raises(TunesmithError, match=said):
        report.save(Report("t", details=details), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"title": 3}, "title should be a valid string, found 3"),
        ({"titel": "y"}, "there is no field titel. Did you mean 'title'?"),
        ({"figures": {"loss": {"value": 1, "units": "s"}}}, "no field figures.loss.units. Did you mean 'unit'?"),
        ({"figures": {"loss": {"value": [1]}}}, "figures.loss.value should be a valid number or a valid integer or"),
        ({"figures": {"loss": {"value": 1, "better": "up"}}}, "figures.loss.better should be 'higher' or 'lower'"),
        ({"tables": [{"title": "t", "columns": ["a"], "rows": [[1, 2]]}]}, "row 0 has 2 cells under 1 columns"),
        ({"tables": [{"title": "t", "columns": ["a"], "units": ["s", "s"]}]}, "has 1 columns and 2 units"),
        ({"tables": [{"title": "t", "columns": ["a"], "rows": [[{"value": 1, "of": "all"}]]}]}, "tables.0.rows.0.0.of"),
        ({"plots": [{"title": "p", "kind": "pie"}]}, "plots.0.kind should be 'line', 'bar' or 'heatmap', found 'pie'"),
        (
            {"plots": [{"title": "p", "kind": "line", "series": {"a": [[1, 2], [1]]}}]},
            r"plots.0 \('p'\): series 'a' has 2 x values and 1 y values",
        ),
        (
            {"plots": [{"title": "p", "kind": "line", "series": {"a": [[1], [0]]}, "y_scale": "log"}]},
            "y_scale is log, and series 'a' has y <= 0",
        ),
        ({"plots": [{"title": "p", "kind": "heatmap", "matrix": [[1], [1, 2]]}]}, "row 1 of the matrix has 2 cells"),
        (
            {"plots": [{"title": "p", "kind": "heatmap", "matrix": [[1]], "row_labels": ["a", "b"]}]},
            "2 row labels for 1 rows",
        ),
        (
            {"plots": [{"title": "p", "kind": "bar", "below": {"title": "q", "kind": "line"}}]},
            "only a line plot can stand below a line plot",
        ),
        (
            {
                "plots": [
                    {
                        "title": "p",
                        "kind": "line",
                        "series": {"s": [["a"], [1]]},
                        "below": {"title": "q", "kind": "line"},
                    }
                ]
            },
            "needs numbers as x values",
        ),
        ({"samples": [{"prompt": "p", "expected": ""}]}, "samples.0.outputs is missing"),
        (
            {"samples": [{"prompt": "p", "expected": "", "outputs": {"a": "b"}, "correct": {"after": True}}]},
            "`correct` judges 'after', which is not among the outputs",
        ),
        ({"schema_version": 2}, "`schema_version` is 2, and this Tunesmith reads 1"),
        ({"schema_version": None}, "`schema_version` is missing"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: dict, said: str) -> None:
    path = stored(content, tmp_path)
    with pytest.raises(TunesmithError, match=said) as caught:
        report.load(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"title": NaN}', "not JSON: found the bare word NaN"),
        (b'{"title": ', "not JSON: .*line 1 column"),
        (b"[]", "a report is a JSON object, found a list"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_file_that_is_no_report(tmp_path: Path, text: bytes, said: str) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(text)
    with pytest.raises(TunesmithError, match=said):
        report.load(path)
    with pytest.raises(TunesmithError, match="there is no report at"):
        report.load(tmp_path / "elsewhere")


def test_a_report_that_contradicts_itself_is_neither_shown_nor_saved(tmp_path: Path) -> None:
    wrong = Report("t", samples=[Sample("p", "e", {}, {"after": True})])
    for call in (report.show, report.to_html, lambda made: report.save(made, tmp_path)):
        with pytest.raises(TunesmithError, match="which is not among the outputs"):
            call(wrong)
    assert not list(tmp_path.iterdir())


def test_the_schema_describes_every_field() -> None:
    schema = report.schema()
    assert schema["properties"]["schema_version"]["const"] == core.SCHEMA_VERSION
    assert schema["required"] == ["schema_version", "title"]
    for name, section in [("Report", schema), *schema["$defs"].items()]:
        properties = [key for key in section["properties"] if key != "schema_version"]
        assert properties == [f.name for f in fields(getattr(core, name))]
        assert section["additionalProperties"] is False
        assert section["description"]
        undescribed = [key for key in properties if not section["properties"][key].get("description")]
        assert undescribed in ([], ["title"], ["title", "text"]), name
    number = schema["$defs"]["Plot"]["properties"]["matrix"]["items"]["items"]
    assert number == {"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]}


def test_the_schema_names_every_key_of_a_report() -> None:
    schema = report.schema()
    content = odd_report().to_json()
    assert set(content) == set(schema["properties"])
    for key, name in (("tables", "Table"), ("plots", "Plot"), ("samples", "Sample"), ("listings", "Listing")):
        assert set(content[key][0]) == set(schema["$defs"][name]["properties"])


def test_the_example_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = Path(__file__).parents[2] / "docs" / "report.md"
    _, example = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert report.load("runs/mine").figure("exact match").before == 0.047


def test_importing_is_light() -> None:
    heavy = "torch matplotlib rich numpy jinja2 pydantic"
    code = f"import sys, tunesmith.report; print([m for m in '{heavy}'.split() if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    using = "tunesmith.report.to_html(tunesmith.report.Report('t')); print({'torch', 'matplotlib'} & set(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", f"import sys, tunesmith.report; {using}"], capture_output=True, text=True
    )
    assert out.stdout.strip() == "set()"
