"""A user's model folders and data files, tiny."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.zoo import tiny
from tunesmith.models import embedded

LETTERS = "abcdefghij"


def rows(count: int) -> list[dict[str, str]]:
    """Prompts with one right answer each: the next two letters."""
    found = []
    for i in range(count):
        word = "".join(LETTERS[(i * 3 + j * (1 + i % 4)) % 10] for j in range(3 + i % 5))
        found.append({"prompt": f"{word}: ", "completion": word[::-1]})
    return found


def write_rows(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`family -> folder` of a tiny random model with a tokenizer, as transformers saves it."""
    root = tmp_path_factory.mktemp("models")

    def make(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            tokenizer = AutoTokenizer.from_pretrained(embedded.path("tokenizer"))
            ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
            limit = {"n_positions": 256} if family == "gpt2" else {"max_position_embeddings": 256}
            changes = {} if family == "t5" else limit
            tiny(family, vocab_size=len(tokenizer), **ids, **changes).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows(40))


@pytest.fixture
def recipe(model_folder: Callable[[str], Path], data_file: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A small run on the tiny Llama; nested fields by dotted name."""

    def make(**overrides: Any) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "model": str(model_folder("llama")),
            "data.train": str(data_file),
            "output": str(tmp_path / "run"),
            "train.steps": 8,
            "train.batch_size": 4,
            "train.save_every": 2,
            "train.eval_every": 4,
            "train.keep_checkpoints": 9,
            "train.learning_rate": 1e-2,
            "report.generate_rows": 2,
            "report.retain_rows": 2,
            "report.max_new_tokens": 4,
        }
        return {**fields, **overrides}

    return make
