"""From a user's model and file to a tuned model and a report: every task, and everything that stops a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTImageProcessor,
)

from tests.train.conftest import write_rows
from tests.zoo import tiny
from tunesmith import report as rendering
from tunesmith.engine import attach, save
from tunesmith.errors import DataError, ModelError, RecipeError, TunesmithError
from tunesmith.train import run

Recipe = Callable[..., dict[str, Any]]


def final(report: Any, name: str = "loss") -> tuple[float, float]:
    figure = report.figure(name)
    return figure.before, figure.value


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2"])
def test_a_causal_model_learns_its_rows(family: str, model_folder: Callable[[str], Path], recipe: Recipe) -> None:
    fields = recipe(model=str(model_folder(family)), method="full", **{"train.steps": 30})
    found = run(None, **fields)
    before, after = final(found)
    assert after < before / 2
    folder = Path(fields["output"])
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert AutoTokenizer.from_pretrained(folder / "model").eos_token
    assert {p.name for p in folder.iterdir()} >= {"model", "recipe.yaml", "report.json", "report.html"}
    again = rendering.load(folder)
    assert again.figure("loss").value == after
    assert sum(p.numel() for p in loaded.parameters()) == found.figure("trainable parameters").value


def test_an_adapter_folder_loads_in_peft(recipe: Recipe, model_folder: Callable[[str], Path]) -> None:
    fields = recipe(method="lora", **{"train.steps": 30})
    found = run(None, **fields)
    assert final(found)[1] < final(found)[0]
    base = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    model = PeftModel.from_pretrained(base, str(Path(fields["output"], "model")))
    assert model.peft_config["default"].base_model_name_or_path == str(model_folder("llama").resolve())
    moved = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert moved
    assert all(bool(p.any()) for p in moved)


def test_sequence_to_sequence(recipe: Recipe, model_folder: Callable[[str], Path]) -> None:
    fields = recipe(model=str(model_folder("t5")), method="full", **{"train.steps": 30})
    found = run(None, **fields)
    assert final(found)[1] < final(found)[0]
    assert found.samples
    AutoModelForSeq2SeqLM.from_pretrained(Path(fields["output"], "model"))


def test_text_classification(recipe: Recipe, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    content = [{"text": f"{'good' if i % 2 else 'bad'} number {i}", "label": ["no", "yes"][i % 2]} for i in range(40)]
    data = write_rows(tmp_path / "reviews.jsonl", content)
    changes = {"data.train": str(data), "train.steps": 40, "task": "text-classification"}
    found = run(None, **recipe(model=str(model_folder("bert")), method="full", **changes))
    assert final(found, "accuracy")[1] == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.id2label == {0: "no", 1: "yes"}


@pytest.mark.parametrize("method", ["full", "lora", "ssf"])
def test_image_classification_from_folders(recipe: Recipe, tmp_path: Path, method: str) -> None:
    tiny("vit").save_pretrained(tmp_path / "vit")
    size = tiny("vit").config.image_size
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(tmp_path / "vit")
    for name, shade in (("dark", 30), ("light", 220)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(16):
            Image.new("L", (size, size), shade + i).convert("RGB").save(tmp_path / "images" / name / f"{i}.png")
    changes = {"data.train": str(tmp_path / "images"), "train.steps": 30, "train.learning_rate": 5e-3}
    found = run(None, **recipe(model=str(tmp_path / "vit"), method=method, **changes))
    assert final(found, "accuracy")[1] == 1.0
    if method == "full":
        AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model")
    assert final(found)[1] < final(found)[0]


def test_rows_laid_end_to_end_train_as_padded_ones(recipe: Recipe, tmp_path: Path) -> None:
    one = run(None, **recipe(method="full", output=str(tmp_path / "free"), **{"data.padding_free": True}))
    two = run(None, **recipe(method="full", output=str(tmp_path / "padded"), **{"data.padding_free": False}))
    losses = [[entry["loss"] for entry in r.details["history"] if "loss" in entry] for r in (one, two)]
    assert len(losses[0]) == 8
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert one.figure("loss").value == pytest.approx(two.figure("loss").value, abs=1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_accumulated_micro_batches_are_one_batch(recipe: Recipe, tmp_path: Path, accumulation: int) -> None:
    plain = run(None, **recipe(method="full", output=str(tmp_path / "plain")))
    split = {"train.batch_size": 4 // accumulation, "train.gradient_accumulation": accumulation}
    parts = run(None, **recipe(method="full", output=str(tmp_path / "parts"), **split))
    assert parts.figure("loss").value == pytest.approx(plain.figure("loss").value, abs=1e-5)


def test_the_report_tells_everything(recipe: Recipe) -> None:
    fields = recipe(method="lora")
    found = run(None, **fields)
    data = json.loads(Path(fields["output"], "report.json").read_text())
    wanted = {"loss", "perplexity", "knew before, loss", "trainable parameters", "optimizer state", "peak memory"}
    assert wanted | {"speed", "training time"} <= set(data["figures"])
    trained = data["figures"]["trainable parameters"]
    # Two factors in float32, two moments in float32 each; Adam's step counters beside them.
    state = data["figures"]["optimizer state"]["value"]
    assert 0 < state - 8 * trained["value"] <= 8 * 4 * 2 * 7
    page = Path(fields["output"], "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page
    assert found.samples[0].expected in page


# What stops a run -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops(recipe: Recipe) -> None:
    fields = recipe(method="full", **{"train.learning_rate": 1e30, "train.max_grad_norm": 0})
    with pytest.raises(TunesmithError, match=r"the loss is (nan|inf) at step \d+: training diverged. Lower train\."):
        run(None, **fields)


def test_nothing_that_trains_stops(recipe: Recipe) -> None:
    with pytest.raises(ModelError, match=r"no layer.*'nowhere'|nowhere.*match"):
        run(None, **recipe(adapters=[{"name": "dylora", "target_modules": ["nowhere"]}]))


def test_lora_that_matches_no_layer_stops(recipe: Recipe) -> None:
    with pytest.raises(TunesmithError, match="nowhere"):
        run(None, **recipe(adapters=[{"name": "lora", "target_modules": ["nowhere"]}]))


def test_zero_trainable_parameters_stop(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach.meters, "trainable", lambda model: (0, 20000))
    with pytest.raises(ModelError, match="nothing trains: all 20,000 numbers"):
        run(None, **recipe(method="lora"))


def test_an_unknown_method_is_refused_before_loading(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="dylora"):
        run(None, **recipe(method="dylaro", model="there-is-no-such-folder"))


def test_what_cannot_be_combined_is_refused_before_loading(recipe: Recipe) -> None:
    fields = recipe(method="lora", model="there-is-no-such-folder", optimizer={"name": "galore"})
    with pytest.raises(RecipeError, match=r"galore.*lora|lora.*galore"):
        run(None, **fields)


def test_no_such_model(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no-such-folder"):
        run(None, **recipe(model=str(tmp_path / "no-such-folder")))
    assert not Path(recipe()["output"], "model").exists()


def test_bad_rows_stop_and_can_be_skipped(recipe: Recipe, tmp_path: Path) -> None:
    content: list[dict[str, Any]] = [{"prompt": f"{i}: ", "completion": "yes"} for i in range(20)]
    content[6] = {"prompt": "7: ", "completion": ["yes"]}
    data = write_rows(tmp_path / "some.jsonl", content)
    with pytest.raises(DataError, match=r"some\.jsonl:7: field 'completion': expected text, found a list"):
        run(None, **recipe(**{"data.train": str(data)}))
    found = run(None, overwrite=True, **recipe(**{"data.train": str(data), "data.skip_bad_rows": True}))
    assert any("1 bad row" in note and "some.jsonl:7" in note for note in found.notes)


def test_the_loss_counts_labels_not_rows(recipe: Recipe) -> None:
    """The Trainer's own evaluation averages batches; ours divides once by all labels."""
    found = run(None, **recipe(method="full"))
    last = [entry["eval_loss"] for entry in found.details["history"] if "eval_loss" in entry][-1]
    assert last == pytest.approx(found.figure("loss").value, rel=1e-5)


def test_a_run_is_repeatable(recipe: Recipe, tmp_path: Path) -> None:
    found = [run(None, **recipe(method="dylora", output=str(tmp_path / str(i)))) for i in range(2)]
    assert found[0].figure("loss").value == found[1].figure("loss").value


def test_an_interrupted_save_keeps_the_old_folder(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = recipe(method="full", **{"train.steps": 2})
    run(None, **fields)
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(save, "versions", broken)
    # A resumed run trains nothing anew here: what fails is the saving of the result.
    with pytest.raises(OSError, match="the disk is full"):
        run(None, resume=True, **fields)
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before
    assert not list((tmp_path / "run").rglob(".partial-*"))
