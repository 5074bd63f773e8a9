"""`tunesmith delta`: from a tuned model to a file and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.zoo import batch, logits, tiny
from tunesmith.core.sparse import SparseDelta


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, tuned): the second differs in 7 entries."""
    folder = tmp_path_factory.mktemp("pair")
    model = tiny("llama")
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")
        weight[3, :6] += torch.arange(1.0, 7.0)
        model.get_parameter("model.norm.weight")[4] += 0.5
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def test_extract_info_apply(tunesmith: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    file = tmp_path / "delta.safetensors"
    said = tunesmith("delta", "extract", tuned, "--base", base, "--output", file)
    assert "7 entries of 2 tensors" in said.out
    said = tunesmith("delta", "info", file)
    assert "model.layers.1.mlp.up_proj.weight" in said.out
    assert "7 entries" in said.out
    tunesmith("delta", "apply", file, "--base", base, "--output", tmp_path / "again")
    expected, found = (load_file(folder / "model.safetensors") for folder in (tuned, tmp_path / "again"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    assert (tmp_path / "again" / "config.json").exists()


def test_the_largest_only_and_what_two_have_in_common(tunesmith: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    few, all_ = tmp_path / "few.safetensors", tmp_path / "all.safetensors"
    tunesmith("delta", "extract", tuned, "--base", base, "--output", few, "--keep", 2)
    tunesmith("delta", "extract", tuned, "--base", base, "--output", all_)
    held = SparseDelta.load(few)
    assert held["model.layers.1.mlp.up_proj.weight"].values.tolist() == pytest.approx([5.0, 6.0])
    said = tunesmith("delta", "info", few, all_)
    assert "28.6%" in said.out
    tunesmith("delta", "apply", few, all_, "--base", base, "--output", tmp_path / "sum", "--scale", 0.5)
    found = load_file(tmp_path / "sum" / "model.safetensors")["model.norm.weight"]
    assert float(found[4]) == pytest.approx(1.25)


def test_an_adapter_of_another_kind_says_what_to_do(tunesmith: Any, adapter: Any, tmp_path: Path) -> None:
    said = tunesmith("delta", "extract", adapter("llama", "pissa"), "--output", tmp_path / "x.safetensors")
    assert "changes more than few entries" in said.error
    assert "--as merged" in said.error


@pytest.mark.parametrize("mistake", ["base", "wrong", "missing", "another", "folder", "keep"])
def test_mistakes_are_named_and_nothing_is_written(
    mistake: str, tunesmith: Any, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = pair
    file, output = tmp_path / "delta.safetensors", tmp_path / "output"
    tunesmith("delta", "extract", tuned, "--base", base, "--output", file)
    if mistake == "base":
        assert (
            "name the one that it was tuned from as --base"
            in tunesmith("delta", "extract", tuned, "--output", output).error
        )
    elif mistake == "wrong":
        tiny("llama", seed=1).save_pretrained(tmp_path / "wrong")
        error = tunesmith("delta", "apply", file, "--base", tmp_path / "wrong", "--output", output).error
        assert "is not the base of this delta" in error
    elif mistake == "missing":
        assert (
            "cannot be read"
            in tunesmith("delta", "apply", tmp_path / "no.safetensors", "--base", base, "--output", output).error
        )
    elif mistake == "another":
        save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
        assert "found the format None" in tunesmith("delta", "info", tmp_path / "a.safetensors").error
    elif mistake == "folder":
        output.mkdir()
        assert (
            "is a folder; name a file" in tunesmith("delta", "extract", tuned, "--base", base, "--output", output).error
        )
        output.rmdir()
    else:
        error = tunesmith("delta", "extract", tuned, "--base", base, "--output", output, "--keep", 1e12).error
        assert "expected 1 to" in error
    assert not output.exists()


def test_what_comes_out_of_a_delta_runs(pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    import transformers as T

    from tunesmith.core.statedict import Checkpoint

    delta = SparseDelta.between(Checkpoint(base), Checkpoint(tuned))
    model = T.AutoModelForCausalLM.from_pretrained(base)
    expected = logits(T.AutoModelForCausalLM.from_pretrained(tuned), batch("llama"))
    with delta.applied(model):
        torch.testing.assert_close(logits(model, batch("llama")), expected)
