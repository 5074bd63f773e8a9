"""QLoRA as a recipe: what it implies, what it refuses, and a merged model that is what was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.train.conftest import data_file, model_folder, recipe  # noqa: F401
from tests.zoo import batch, logits
from tunesmith.engine.save import quantization_of, save_lora, save_merged
from tunesmith.errors import RecipeError
from tunesmith.models.loader import load_model
from tunesmith.recipe import load
from tunesmith.train import run


def test_what_it_implies_is_left_to_the_recipe_where_that_says_otherwise() -> None:
    plain = load({"method": "qlora"})
    assert plain.model.quantization == "nf4"
    assert plain.optimizer.name == "paged_adamw_32bit"
    assert (plain.train.max_grad_norm, plain.train.lr_schedule) == (0.3, "constant")
    assert plain.train.gradient_checkpointing
    said = load({"method": "qlora", "train": {"max_grad_norm": 1.0}, "optimizer": "adamw_torch", "model": "m"})
    assert (said.train.max_grad_norm, said.optimizer.name) == (1.0, "adamw_torch")
    assert said.model.quantization == "nf4"
    listed = load({"adapters": [{"name": "qlora", "rank": 8}], "model": {"name": "m", "quantization": "int8"}})
    assert listed.model.quantization == "int8"
    assert load({"method": "dylora"}).model.quantization == "none"


def test_a_saved_recipe_is_the_same() -> None:
    asked = load({"method": "qlora"})
    assert load(yaml.safe_load(asked.to_yaml())) == asked


def test_a_plain_base_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"qlora cannot run here \(model.quantization is none\).*take `lora`"):
        load({"method": "qlora", "model": {"name": "tiny-lm-s", "quantization": "none"}}).check()


@pytest.fixture
def trained(recipe: Callable[..., dict[str, Any]]) -> str:  # noqa: F811
    fields = recipe(method="qlora", adapters=[{"name": "qlora", "rank": 4}])
    report = run(None, **fields)
    if not torch.cuda.is_available():
        assert any("here is no GPU" in note for note in report.notes)
    return str(fields["output"])


def test_merged_is_what_was_trained_and_not_the_original_weights(trained: str, tmp_path: Path) -> None:
    assert quantization_of(trained) == "nf4"
    unmerged = load_model(trained, dtype="float32", quantization="nf4").model
    given = {k: v for k, v in batch("llama").items() if k != "labels"}
    expected = logits(unmerged, given)
    found = logits(load_model(str(save_merged(trained, tmp_path / "merged"))).model, given)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    original = logits(load_model(trained, dtype="float32").model, given)
    assert not torch.allclose(original, expected, atol=1e-2 * float(expected.abs().max()))
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()


def test_exported_it_is_a_lora_for_the_quantised_base(trained: str, tmp_path: Path) -> None:
    given = {k: v for k, v in batch("llama").items() if k != "labels"}
    expected = logits(load_model(trained, dtype="float32", quantization="nf4").model, given)
    save_lora(trained, tmp_path / "lora")
    loaded = load_model(str(tmp_path / "lora"), dtype="float32", quantization="nf4").model
    assert torch.allclose(logits(loaded, given), expected, atol=1e-5 * float(expected.abs().max()))
