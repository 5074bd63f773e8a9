"""Parts of different rooms in one run: pairs that go together, and pairs that are refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.zoo import batch, logits
from tunesmith import catalog
from tunesmith.core.report import Report
from tunesmith.engine.pipeline import run_pipeline
from tunesmith.engine.save import save_merged
from tunesmith.errors import RecipeError
from tunesmith.models.loader import load_model
from tunesmith.recipe import load
from tunesmith.train import run

GIVEN = {k: v for k, v in batch("llama").items() if k != "labels"}


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model" / "adapter_model.safetensors")


def better(report: Report) -> bool:
    figure = report.figure("loss")
    return float(figure.value) < float(figure.before)  # type: ignore[arg-type]


def test_ist_on_dylora(recipe: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.schedules.ist import IST

    held: list[IST] = []
    real = IST.on_attach
    monkeypatch.setattr(IST, "on_attach", lambda self: (held.append(self), real(self))[1])
    fields = recipe(method="dylora", schedule={"name": "ist", "interval": 2, "score_lr": 1e4, "fraction": 0.5})
    assert better(run(None, **fields))
    assert len({row["score"] for row in held[0].importance()}) > 1, "the scores have moved"


def test_ranks_of_eva_under_ist(recipe: Callable[..., dict[str, Any]]) -> None:
    fields = recipe(adapters=[{"name": "eva", "rank": 8}], schedule={"name": "ist", "interval": 2, "fraction": 0.5})
    assert better(run(None, **fields))
    ranks = {t.shape[0] for n, t in weights(fields["output"]).items() if n.endswith(".A")}
    assert len(ranks) > 1, "layers got different ranks"
    expected = logits(load_model(fields["output"]).model, GIVEN)
    assert not torch.equal(expected, logits(load_model(fields["model"]).model, GIVEN))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_lora_ga_on_a_quantised_base(kind: str, recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    fields = recipe(adapters=[{"name": "lora-ga", "rank": 2}], model={"name": recipe()["model"], "quantization": kind})
    assert better(run(None, **fields))
    unmerged = logits(load_model(fields["output"], dtype="float32", quantization=kind).model, GIVEN)  # type: ignore
    found = logits(load_model(str(save_merged(fields["output"], tmp_path / "merged"))).model, GIVEN)
    assert (found - unmerged).abs().max() <= {"nf4": 1e-4, "int8": 0.05}[kind] * unmerged.abs().max()


def test_ba_lora_with_ssf(recipe: Callable[..., dict[str, Any]]) -> None:
    plain, held = recipe(method="ssf"), recipe(method="ssf", regularisers=[{"name": "ba-lora", "lambda1": 1000.0}])
    plain["output"] += "-plain"
    run(None, **plain)
    run(None, **held)
    base = logits(load_model(plain["model"]).model, GIVEN).log_softmax(-1)
    apart = [
        float((base.exp() * (base - logits(load_model(fields["output"]).model, GIVEN).log_softmax(-1))).sum())
        for fields in (plain, held)
    ]
    assert apart[1] < 0.75 * apart[0], "the consistency term keeps the model near the original"


def test_adalora_with_accumulated_gradients(recipe: Callable[..., dict[str, Any]]) -> None:
    """Two micro-batches of 2 are one batch of 4, sensitivities and budget included; two processes: test_processes."""
    results = []
    for i, (size, accumulated) in enumerate(((4, 1), (2, 2))):
        options = {"train.batch_size": size, "train.gradient_accumulation": accumulated, "train.learning_rate": 1e-3}
        brisk = catalog.get("adalora").target.brisk
        fields = recipe(adapters=[{"name": "adalora", **brisk}], **options)
        fields["output"] += f"-{i}"
        run(None, **fields)
        results.append(weights(fields["output"]))
    apart = max(float((results[0][n].double() - results[1][n].double()).abs().max()) for n in results[0])
    assert apart < 1e-5


@pytest.mark.slow
def test_light_peft_then_merge(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    fields = recipe(**{"report.forgetting": False, "train.steps": 4})
    asked = load(None, fields)
    run_pipeline("light-peft", asked, catalog.get("light-peft").target.brisk, run)
    adapters = [
        p.parent for p in Path(fields["output"]).rglob("adapter_model.safetensors") if "checkpoints" not in p.parts
    ]
    final = max(adapters, key=lambda p: p.stat().st_mtime)
    expected = logits(load_model(str(final)).model, GIVEN)
    found = logits(load_model(str(save_merged(str(final), tmp_path / "merged"))).model, GIVEN)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


REFUSED = {
    "multi-head routing and packed rows": (
        {"method": "multi-head-routing", "data": {"packing": True}},
        r"multi-head-routing cannot run here \(data.padding_free or data.packing",
    ),
    "QLoRA on plain weights": (
        {"method": "qlora", "model": {"name": "m", "quantization": "none"}},
        r"qlora cannot run here \(model.quantization is none\): .*take `lora`",
    ),
    "BA-LoRA without a reference": (
        {"method": "full", "regularisers": ["ba-lora"]},
        r"ba-lora cannot run here .*the base weights train",
    ),
    "AdaLoRA over sharded weights": (
        {"method": "adalora", "train": {"fsdp": True}},
        r"adalora cannot run here \(train.fsdp is true\)",
    ),
    "IST without adapters": (
        {"method": "full", "schedule": "ist"},
        r"ist cannot run here .*the base weights train",
    ),
    "two tuners": (
        {"adapters": ["lora", "eva"]},
        r"lora cannot be combined with eva: .*one tuner per model",
    ),
    "a rank table for what has no rank": (
        {"adapters": [{"name": "ssf", "ranks": {"a": 1}}]},
        r"ssf has no `rank`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_together_is_refused_before_loading(name: str, tmp_path: Path) -> None:
    fields, says = REFUSED[name]
    with pytest.raises(RecipeError, match=says):
        run({**fields, "output": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()
