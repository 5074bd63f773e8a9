"""The rules of the house, kept by reading the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith import catalog, docs
from tunesmith.core.part import ROOMS
from tunesmith.evidence import table

HOUSE = Path(catalog.__file__).parent
FILES = sorted(HOUSE.rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    """Every `tunesmith.*` module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tunesmith":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "tunesmith")


def top(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("room", [r for r in ROOMS if r not in ("recipes", "systems")])
def test_a_part_imports_core_and_nothing_of_another_room(room: str) -> None:
    for file in (HOUSE / room).glob("*.py"):
        for module in imported(file):
            assert top(module) in ("core", "errors", room), f"{file.name} imports {module}"


def test_core_imports_no_room_and_nothing_above_it() -> None:
    for file in (HOUSE / "core").glob("*.py"):
        for module in imported(file):
            assert top(module) in ("core", "errors", "catalog", "__version__"), f"{file.name} imports {module}"


def test_nothing_but_the_command_line_imports_evidence() -> None:
    for file in FILES:
        if file.parent.name not in ("cli", *ROOMS) and "evidence" not in file.relative_to(HOUSE).parts:
            assert all(top(m) != "evidence" for m in imported(file)), file


def test_rooms_do_not_import_what_puts_them_together() -> None:
    for room in ROOMS:
        for file in (HOUSE / room).glob("*.py"):
            assert not {"train", "recipe", "cli", "engine"} & {top(m) for m in imported(file)}, file


def test_no_file_is_over_400_lines() -> None:
    long = {str(f.relative_to(HOUSE)): n for f in FILES if (n := len(f.read_text().splitlines())) > 400}
    assert not long


def test_only_safe_loads() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("weights_only") == "True", f"{file}:{node.lineno}"


def test_no_stubs() -> None:
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        assert not [word for word in ("NotImplementedError", "TODO", "FIXME", "XXX") if word in text], file


def loaded_by(code: str) -> set[str]:
    """Top-level modules in `sys.modules` after running `code` in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    return set(
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    )


HEAVY = {"torch", "transformers", "peft", "datasets", "numpy", "matplotlib", "pydantic"}


def test_import_is_light() -> None:
    assert not loaded_by("import tunesmith") & (HEAVY | {"typer", "rich", "yaml"})


def test_help_is_light() -> None:
    code = "import sys\nsys.argv = ['tunesmith', '--help']\nfrom tunesmith.cli.main import app\n"
    code += "try:\n    app()\nexcept SystemExit:\n    pass\nsys.stdout.flush()"
    script = f"{code}\nprint('MODULES', ' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert "Usage" in out
    assert not set(out.rpartition("MODULES")[2].split()) & HEAVY


def test_listing_the_catalogue_imports_no_part() -> None:
    assert not loaded_by("from tunesmith import catalog\nassert catalog.parts()") & {"torch", "transformers", "peft"}


def test_the_example_of_contributing_is_the_real_part() -> None:
    source = (HOUSE / "adapters" / "ssf.py").read_text()
    assert source[source.index("@part(") :].strip() in (HOUSE.parents[1] / "CONTRIBUTING.md").read_text()


def test_the_generated_pages_are_fresh() -> None:
    assert docs.main(["--check"]) == 0


def test_the_evidence_page_is_what_the_results_say() -> None:
    assert table.DOCUMENT.read_text(encoding="utf-8") == table.render(), "run `tunesmith evidence table`"
