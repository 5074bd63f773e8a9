"""The command line as a user meets it: arguments in; status, output and errors out."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.train.conftest import data_file, model_folder, recipe
from tunesmith.cli import main
from tunesmith.train import run

__all__ = ["adapter", "data_file", "model_folder", "recipe", "tunesmith"]


@dataclass(frozen=True)
class Said:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The message of a refused command, on one line: status 2, nothing on standard output, no traceback."""
        assert self.status == 2, self
        assert "Traceback" not in self.err
        return " ".join(self.err.replace("│", " ").split())


@pytest.fixture
def tunesmith(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Said]]:
    """`(*arguments, stdin="") -> Said`, through the entry point; what is no refusal propagates."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    verbosity = transformers.utils.logging.get_verbosity()

    def call(*arguments: Any, stdin: str = "") -> Said:
        monkeypatch.setattr(sys, "argv", ["tunesmith", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main.main()
        found = capsys.readouterr()
        return Said(int(stopped.value.code or 0), found.out, found.err)

    yield call
    transformers.utils.logging.set_verbosity(verbosity)


@pytest.fixture(scope="session")
def adapter(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path], data_file: Path
) -> Callable[[str, str], Path]:
    """`(family, method) -> folder` of a short run, trained once for all tests."""
    root = tmp_path_factory.mktemp("runs")

    def make(family: str, method: str) -> Path:
        folder = root / f"{family}-{method}"
        if not folder.exists():
            fields = {
                "model": str(model_folder(family)),
                "data.train": str(data_file),
                "output": str(folder),
                "method": method,
                "train.steps": 3,
                "train.batch_size": 4,
                "train.learning_rate": 1e-2,
                "report.generate_rows": 0,
                "report.forgetting": False,
            }
            run(None, **fields)
        return folder

    return make
