"""LoRA folders: read exactly as PEFT applies them, and merged exactly."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from tests.zoo import batch, logits, tiny
from tunesmith.core.lora_folder import LoRAFolder, adapted, merge_adapters
from tunesmith.core.merging import Judges, Merge, merged
from tunesmith.core.statedict import Checkpoint, load_into
from tunesmith.errors import CheckpointError
from tunesmith.merging.lines import Lines
from tunesmith.merging.model_soups import ModelSoups

ALL = {
    "llama": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "dense"],
    "t5": ["q", "wo"],
    "vit": ["q_proj", "fc1", "projection"],
}


def move(model: nn.Module, seed: int) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model


def adapter(folder: Path, family: str, seed: int, **config: Any) -> Path:
    """A saved LoRA away from its start."""
    config = {"target_modules": ALL[family], "r": 4, "lora_alpha": 6, **config}
    model = get_peft_model(tiny(family), LoraConfig(**config))
    move(model, seed).save_pretrained(folder, save_embedding_layers=False)
    return folder


def base_of(family: str) -> Checkpoint:
    return Checkpoint(tiny(family).state_dict(), "base")


def merged_by_peft(folder: Path, family: str) -> dict[str, torch.Tensor]:
    return PeftModel.from_pretrained(tiny(family), folder).merge_and_unload().state_dict()


@pytest.mark.parametrize("family", list(ALL))
def test_a_base_with_an_adapter_is_what_peft_merges(family: str, tmp_path: Path) -> None:
    pattern = {ALL[family][0]: 2}
    adapter(tmp_path, family, 1, use_rslora=True, rank_pattern=pattern, alpha_pattern={ALL[family][1]: 11})
    made, expected = adapted(base_of(family), tmp_path), merged_by_peft(tmp_path, family)
    assert set(made) == set(expected)
    for name in made:
        assert torch.allclose(made[name], expected[name], atol=1e-6), name
    assert len(LoRAFolder(tmp_path).modules) >= 4


def test_whole_tensors_of_an_adapter_replace_the_bases(tmp_path: Path) -> None:
    adapter(tmp_path, "bert", 1, modules_to_save=["classifier"], bias="lora_only")
    made, expected = adapted(base_of("bert"), tmp_path), merged_by_peft(tmp_path, "bert")
    assert not torch.equal(made["classifier.weight"], tiny("bert").classifier.weight)
    assert not torch.equal(made["bert.pooler.dense.bias"], tiny("bert").bert.pooler.dense.bias)
    assert all(torch.allclose(made[name], expected[name], atol=1e-6) for name in made)


def test_averaging_the_factors_apart_is_another_model(tmp_path: Path) -> None:
    """mean(B) mean(A) against mean(B A), and the exact way: laid side by side, and cut back to the rank."""
    folders = [adapter(tmp_path / str(i), "llama", i + 1) for i in range(3)]
    base, name = base_of("llama"), "model.layers.0.mlp.down_proj.weight"
    loras = [LoRAFolder(folder) for folder in folders]
    exact = torch.stack([lora.delta(name, (32, 48)) for lora in loras]).mean(0)
    B, A = (torch.stack(list(parts)).mean(0) for parts in zip(*(lora.factors(name) for lora in loras), strict=True))
    assert (B @ A - exact).norm() > 0.3 * exact.norm()

    soup = merge_adapters(ModelSoups(), folders, tmp_path / "soup", base)
    assert (LoRAFolder(soup).delta(name, (32, 48)) - exact).norm() < 1e-6 * exact.norm()
    assert LoRAFolder(soup).factors(name)[1].shape == (12, 48)

    cut = LoRAFolder(merge_adapters(ModelSoups(), folders, tmp_path / "cut", base, rank=4))
    U, S, Vh = torch.linalg.svd(exact)
    assert torch.allclose(cut.delta(name, (32, 48)), (U[:, :4] * S[:4]) @ Vh[:4], atol=1e-6)
    assert cut.factors(name)[1].shape == (4, 48)


@pytest.mark.parametrize("family", list(ALL))
def test_the_merged_adapter_loads_in_peft_and_is_the_merge_of_the_models(family: str, tmp_path: Path) -> None:
    """Of different rank, scale and targets, against merging the whole models."""
    targets = ALL[family]
    folders = [
        adapter(tmp_path / "a", family, 1),
        adapter(tmp_path / "b", family, 2, r=2, use_rslora=True, target_modules=targets[:1]),
        adapter(tmp_path / "c", family, 3, lora_alpha=32, target_modules=targets[1:], rank_pattern={targets[-1]: 3}),
    ]
    output = merge_adapters(ModelSoups(), folders, tmp_path / "soup", base_of(family))
    expected = tiny(family)
    whole = [Checkpoint(merged_by_peft(folder, family)) for folder in folders]
    load_into(expected, merged(ModelSoups(), whole))
    model, given = PeftModel.from_pretrained(tiny(family), output), batch(family)
    assert torch.allclose(logits(model, given), logits(expected, given), atol=1e-5)
    assert not torch.allclose(logits(model, given), logits(tiny(family), given), atol=1e-3)


def test_it_agrees_with_pefts_own_concatenation(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / str(i), "llama", i + 1, target_modules=["q_proj", "v_proj"]) for i in range(2)]
    model = PeftModel.from_pretrained(tiny("llama"), folders[0], adapter_name="a")
    model.load_adapter(folders[1], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "soup", combination_type="cat")
    model.set_adapter("soup")
    ours = PeftModel.from_pretrained(
        tiny("llama"), merge_adapters(ModelSoups(), folders, tmp_path / "soup", base_of("llama"))
    )
    assert torch.allclose(logits(ours, batch("llama")), logits(model, batch("llama")), atol=1e-6)


def test_lines_scales_the_product_of_each_layer_once(tmp_path: Path) -> None:
    folder, base = adapter(tmp_path / "a", "llama", 1), base_of("llama")
    method = Lines(gamma=0.25)
    output = LoRAFolder(merge_adapters(method, [folder], tmp_path / "out", base))
    for name in output.modules:
        shape = base.describe(name)[0]
        factor = 1.0 if ".layers.1." in name else 0.25
        assert torch.allclose(output.delta(name, shape), factor * LoRAFolder(folder).delta(name, shape), atol=1e-7)
        assert method.scale(name) == factor


def test_whole_tensors_are_merged_and_a_judge_sees_whole_models(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / str(i), "bert", i + 1, modules_to_save=["classifier"]) for i in range(3)]
    base, name = base_of("bert"), "classifier.weight"
    held = [LoRAFolder(folder).replacement(name) for folder in folders]
    wanted = (held[0] + held[2]) / 2
    soup = ModelSoups(kind="greedy")

    def score(state: Any) -> float:
        assert set(state) == set(base)
        return -float((state[name] - wanted).norm())

    output = merge_adapters(soup, folders, tmp_path / "out", base, Judges(score=score))
    assert soup.record()["kept"] == [0, 2]
    assert torch.allclose(LoRAFolder(output).replacement(name), wanted, atol=1e-7)
    assert json.loads((output / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    assert all(t.dtype == torch.float32 for t in load_file(output / "adapter_model.safetensors").values())
    model = PeftModel.from_pretrained(tiny("bert"), output)
    assert torch.allclose(model.get_submodule("base_model.model.classifier").weight, wanted, atol=1e-7)


class Other(Merge):
    def tensor(self, name: str, base: Any, models: Any) -> Any:
        return models[0]


def test_what_is_no_plain_lora_is_refused(tmp_path: Path) -> None:
    good, base = adapter(tmp_path / "good", "llama", 1), base_of("llama")
    with pytest.raises(CheckpointError, match=r"Other is not a weighted sum"):
        merge_adapters(Other(), [good], tmp_path / "out", base)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"expected adapter_model\.safetensors and adapter_config\.json"):
        merge_adapters(ModelSoups(), [good, tmp_path / "nowhere"], tmp_path / "out", base)
    dora = adapter(tmp_path / "dora", "llama", 1, use_dora=True, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match="`use_dora` is set"):
        LoRAFolder(dora)
    config = json.loads((good / "adapter_config.json").read_text())
    for change, says in (({"init_lora_weights": "pissa"}, "pissa changes the base"), ({"peft_type": "IA3"}, "IA3")):
        (good / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=says):
            LoRAFolder(good)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_named(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", "llama", 1, target_modules=["down_proj"])
    held = dict(base_of("llama"))
    wide = copy.copy(held)
    wide["model.layers.1.mlp.down_proj.weight"] = torch.zeros(32, 50)
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.down_proj.weight' by a matrix of shape \(32, 48\)"):
        dict(adapted(Checkpoint(wide), folder))
    del held["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(CheckpointError, match=r"changes 'model.layers.1.mlp.down_proj.weight', which base lacks"):
        adapted(Checkpoint(held, "base"), folder)
