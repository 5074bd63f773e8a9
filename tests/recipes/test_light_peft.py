"""Light-PEFT: scores by hand, cuts with ties and broken scores, the cut model, and the pipeline on three tasks."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from peft import get_peft_model
from torch import nn

import tunesmith
from tests.train.conftest import data_file, model_folder, write_rows  # noqa: F401
from tests.zoo import batch, logits, tiny
from tunesmith.adapters.structure_masks import StructureMasks
from tunesmith.core.lowrank import LowRank
from tunesmith.core.surgery import recorded, sites
from tunesmith.core.tuner_layer import TunesmithLayer
from tunesmith.engine.pipeline import run_pipeline
from tunesmith.errors import ModelError, RecipeError
from tunesmith.models.loader import load_model
from tunesmith.recipe import load
from tunesmith.recipes.light_peft import LightPEFT
from tunesmith.recipes.light_peft_cuts import Cuts, decide, reduce, score, staying
from tunesmith.train import run

FAMILIES = ("llama", "gpt2", "opt", "bert", "vit")


def estimated(family: str, part: str = "qlora", **options: Any) -> nn.Module:
    """A model with masks above a low-rank adapter, both moved off their start."""
    low = tunesmith.adapter(part, rank=4, alpha=8.0, **options)
    model = get_peft_model(
        tiny(family, initializer_range=0.3), tunesmith.stack(low, tunesmith.adapter("structure-masks"))
    )
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=g))
    return model.eval()


def layers(model: nn.Module) -> dict[str, TunesmithLayer]:
    return {m.spec.name: m for m in model.modules() if isinstance(m, TunesmithLayer)}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_formulas(family: str) -> None:
    """One batch with padding, the inputs of each layer caught by hooks, the gradient by `backward`."""
    model, given = estimated(family), batch(family)
    if "attention_mask" in given:
        given["attention_mask"][0, 6:] = 0
    caught: dict[str, torch.Tensor] = {}
    held = layers(model)
    handles = [
        layer.register_forward_pre_hook(lambda m, args, name=name: caught.update({name: args[0].detach()}))
        for name, layer in held.items()
    ]
    model(**given).loss.backward()
    for handle in handles:
        handle.remove()
    found = score(model, [given])
    for name, layer in held.items():
        low = next(made for made in layer.active() if isinstance(made, LowRank))
        masks = next((made for made in layer.active() if isinstance(made, StructureMasks)), None)
        x = caught[name]
        if masks is not None:
            x = x * masks.factors.repeat_interleave(masks.width)
            assert torch.equal(found[f"{masks.of}/{name}"], masks.factors.detach().abs())
        change = 2.0 * x @ low.A.T @ low.B.T
        ratio = change.norm(dim=-1) / layer.get_base_layer()(x).norm(dim=-1)
        if "attention_mask" in given:
            ratio = ratio.flatten()[given["attention_mask"].bool().flatten()]
        assert found[f"module/{name}"].item() == pytest.approx(ratio.mean().item(), rel=1e-4)
        of_A, of_B = (low.A * low.A.grad).mean(1), (low.B * low.B.grad).mean(0)
        assert torch.allclose(found[f"rank/{name}"], of_A.abs() + of_B.abs(), atol=1e-6)
        # Both halves are the same slope, once over the inputs and once over the outputs.
        assert torch.allclose(of_A * low.A.shape[1], of_B * low.B.shape[0], atol=1e-4, rtol=1e-3)


def test_scores_are_means_over_batches() -> None:
    model, given = estimated("bert"), [batch("bert", seed=s) for s in (0, 1)]
    both, single = score(model, given), [score(model, [one]) for one in given]
    for name, value in both.items():
        assert torch.allclose(value.float(), (single[0][name].float() + single[1][name].float()) / 2, rtol=1e-4)
    handles = [m for m in model.modules() if m._forward_pre_hooks]
    assert not [m for m in handles if isinstance(m, TunesmithLayer)]


@pytest.mark.parametrize(
    ("scores", "share", "stays"),
    [
        ([0.1, 0.2, 0.3], 1 / 3, [1, 2]),
        ([3.0, 1.0, 2.0, 0.5], 0.5, [0, 2]),
        ([1.0] * 6, 1 / 3, [0, 1, 2, 3]),
        ([1.0, 1.0, 0.5, 1.0], 0.5, [0, 1]),
        ([math.nan, 0.1, math.inf, 0.2], 0.5, [1, 3]),
        ([1.0, 2.0], 1 / 3, [0, 1]),
        ([float(i) for i in range(16)], 1 / 3, list(range(5, 16))),
    ],
)
def test_exactly_the_share_goes(scores: list[float], share: float, stays: list[int]) -> None:
    assert staying(torch.tensor(scores), share).nonzero()[:, 0].tolist() == stays


def planned(**changes: Any) -> dict[str, Any]:
    scores = {
        "heads/a.o": torch.tensor([3.0, 1.0, 2.0]),
        "share/a.o": torch.tensor(2.0),
        "heads/b.o": torch.tensor([0.3, 0.2, 0.1]),
        "share/b.o": torch.tensor(2.0),
        "neurons/a.down": torch.tensor([5.0, 6.0, 7.0, 8.0]),
        "neurons/b.down": torch.tensor([1.0, 2.0]),
        **{f"module/{n}": torch.tensor(v) for n, v in {"w": 1.0, "x": 4.0, "y": 3.0, "z": 2.0}.items()},
        **{f"rank/{n}": torch.tensor([0.1, 0.2]) * k for k, n in enumerate("wxyz", 1)},
        **changes,
    }
    return decide(scores, Cuts(1 / 3, 1 / 2, 1 / 2, 1 / 2))


def test_what_stays() -> None:
    """Heads within each layer and by groups that share keys; neurons over all, one left in each layer; the adapters of
    the largest scores; of their ranks the larger half, so that one may lose all."""
    plan = planned()
    assert plan["heads"] == {"a.o": [0, 1, 4, 5], "b.o": [0, 1, 2, 3]}
    assert plan["neurons"] == {"a.down": [1, 2, 3], "b.down": [1]}
    assert plan["ranks"] == {"x": [1], "y": [1]}
    assert plan["counts"] == {"heads": 12, "neurons": 6, "modules": 4, "ranks": 8}
    assert planned(**{"rank/x": torch.tensor([0.1, 0.1])})["ranks"] == {"y": [0, 1]}
    assert planned(**{"module/x": torch.tensor(math.nan)})["ranks"].keys() == {"y", "z"}
    json.dumps(plan)


def test_equal_scores_go_from_all_layers_alike() -> None:
    plan = planned(**{"neurons/a.down": torch.ones(4), "neurons/b.down": torch.ones(2)})
    assert plan["neurons"] == {"a.down": [0, 1], "b.down": [0]}


@pytest.mark.parametrize("folding", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cut_model_is_the_estimated_one_with_the_rest_masked(family: str, folding: bool) -> None:
    model, given = estimated(family), batch(family)
    cuts = Cuts(heads=0.5, neurons=0.3, modules=0.5, ranks=0.5)
    plan = decide(score(model, [given]), cuts)
    assert 0 < sum(map(len, plan["ranks"].values())) < plan["counts"]["ranks"] / 2
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in layers(reference).items():
            for made in layer.active():
                if isinstance(made, LowRank):
                    made.A[[j for j in range(4) if j not in plan["ranks"].get(name, [])]] = 0
                if isinstance(made, StructureMasks):
                    share = sites(reference.get_base_model())[name].share if made.of == "heads" else 1
                    kept = torch.zeros(len(made.factors))
                    kept[[i // share for i in plan[made.of][name]]] = 1
                    made.factors.copy_(kept * (made.factors if folding else 1.0))
    expected = logits(reference, given)
    small = reduce(model, plan, folding=folding)
    assert torch.allclose(logits(small, given), expected, atol=1e-4 * float(expected.abs().max()))
    assert recorded(small.config) is not None
    assert not any(isinstance(m, TunesmithLayer) for m in small.modules())


def test_adapters_that_are_more_than_their_factors_are_refused() -> None:
    config = tunesmith.stack(tunesmith.adapter("pissa", rank=4), tunesmith.adapter("structure-masks"))
    with pytest.raises(ModelError, match=r"PiSSA on .* is more than the product of its factors"):
        score(get_peft_model(tiny("bert"), config), [batch("bert")])
    only = get_peft_model(tiny("bert"), tunesmith.adapter("structure-masks"))
    with pytest.raises(ModelError, match="needs a low-rank adapter"):
        score(only, [batch("bert")])


# The pipeline -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fields(model_folder: Any, data_file: Path, tmp_path: Path) -> dict[str, Any]:  # noqa: F811
    return {
        "model": str(model_folder("llama")),
        "data.train": str(data_file),
        "output": str(tmp_path / "run"),
        "train.steps": 3,
        "train.batch_size": 4,
        "train.learning_rate": 1e-2,
        "report.generate_rows": 0,
        "report.forgetting": False,
    }


def pictures(folder: Path) -> Path:
    g = np.random.default_rng(0)
    images = [g.integers(0, 255, (8, 8, 3), dtype=np.uint8) for _ in range(24)]
    kinds = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    Dataset.from_dict({"image": images, "label": [i % 3 for i in range(24)]}, features=kinds).save_to_disk(str(folder))
    return folder


def test_text_classification(fields: dict[str, Any], model_folder: Any, tmp_path: Path) -> None:  # noqa: F811
    data = write_rows(
        tmp_path / "c.jsonl", [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": str(i % 2)} for i in range(24)]
    )
    fields |= {"model": str(model_folder("bert")), "data.train": str(data)}
    options = {**LightPEFT.brisk, "neurons": 0.4, "folding": True}
    report = run_pipeline("light-peft", load(None, fields), options, run)
    assert report.figure("heads removed").value == pytest.approx(0.5)
    assert report.figure("neurons removed").value == pytest.approx(0.4, abs=0.011)
    assert report.figure("adapters removed").value >= 0.75
    assert report.figure("ranks of adapters removed").value >= 0.87
    assert report.figure("parameters").value < report.figure("parameters").before
    assert report.figure("trainable parameters").value < report.figure("trainable parameters").before
    assert "accuracy" in report.figures
    folder = Path(fields["output"])
    pruned, tuned = load_model(str(folder / "pruned")), load_model(str(folder / "tuned"))
    assert tuned.source == str(folder / "pruned")
    plan = report.details["plan"]
    for name, site in sites(pruned.model).items():
        assert site.count == len(plan[site.kind][name])
    lows = {m.layer.name: m for m in tuned.model.modules() if isinstance(m, LowRank)}
    assert {name: low.rank for name, low in lows.items()} == {name: len(kept) for name, kept in plan["ranks"].items()}
    assert [float(low.scaling) for low in lows.values()] == pytest.approx([16 / 4] * len(lows))
    # The head that the estimation trained is the one that the tuning starts from.
    first, second = (load_model(str(folder / n)).model.state_dict() for n in ("estimation", "pruned"))
    assert torch.equal(first["base_model.model.classifier.modules_to_save.default.weight"], second["classifier.weight"])


def test_image_classification(fields: dict[str, Any], tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    folder = tmp_path / "vit"
    tiny("vit").save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    fields |= {"model": str(folder), "data.train": str(pictures(tmp_path / "pictures"))}
    report = run_pipeline("light-peft", load(None, fields), dict(LightPEFT.brisk), run)
    assert report.figure("heads removed").value == 0.5


def test_tuning_starts_at_the_estimated_function(fields: dict[str, Any]) -> None:
    """With nothing cut and factors folded, the loss before tuning is that after the estimation."""
    nothing = {"heads": 0.0, "neurons": 0.0, "modules": 0.0, "ranks": 0.0, "folding": True}
    report = run_pipeline("light-peft", load(None, fields), {**LightPEFT.brisk, **nothing}, run)
    quality = next(table for table in report.tables if table.title == "quality")
    for _, first, estimation, cut, _ in quality.rows:
        assert cut == pytest.approx(estimation, rel=1e-4)
        assert first != pytest.approx(estimation, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapters": ["dylora"]}, "brings its own adapter; give its option `adapter` instead of dylora"),
        ({"model.quantization": "nf4", "adapters": ["lora"]}, "cuts weights, and model.quantization is nf4"),
        ({"prompts": [{"name": "dept"}], "adapters": []}, "leave prompts out"),
    ],
)
def test_recipes_that_cannot_be_cut(changes: dict[str, Any], message: str) -> None:
    from tunesmith.recipes.light_peft import _check

    with pytest.raises(RecipeError, match=message):
        _check(load(None, changes).model_dump(mode="json"))
