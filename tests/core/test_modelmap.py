"""Blocks and roles, discovered, for every family."""

from __future__ import annotations

import pytest
from peft import get_peft_model

import tunesmith
from tests.zoo import FAMILIES, tiny
from tunesmith.core import modelmap
from tunesmith.errors import ModelError

STACKS = {
    "llama": {"model.layers": 2},
    "qwen2": {"model.layers": 2},
    "gpt2": {"transformer.h": 2},
    "opt": {"model.decoder.layers": 2},
    "bert": {"bert.encoder.layer": 2},
    "t5": {"encoder.block": 2, "decoder.block": 2},
    "vit": {"vit.layers": 2},
}
ROLES = {
    "llama": {"model.layers.1.self_attn.q_proj.weight": "q", "model.layers.0.mlp.gate_proj.weight": "gate"},
    "qwen2": {"model.layers.0.self_attn.v_proj.bias": "v", "lm_head.weight": "head", "model.norm.weight": "norm"},
    "gpt2": {
        "transformer.h.0.attn.c_attn.weight": "qkv",
        "transformer.h.0.attn.c_proj.weight": "o",
        "transformer.h.0.mlp.c_fc.weight": "up",
        "transformer.h.0.mlp.c_proj.weight": "down",
        "transformer.wpe.weight": "position",
        "transformer.h.0.ln_1.bias": "norm",
    },
    "opt": {"model.decoder.layers.0.fc2.weight": "down", "model.decoder.layers.0.self_attn.out_proj.weight": "o"},
    "bert": {
        "bert.encoder.layer.0.attention.self.query.weight": "q",
        "bert.encoder.layer.0.attention.output.dense.weight": "o",
        "bert.encoder.layer.0.attention.output.LayerNorm.weight": "norm",
        "bert.encoder.layer.0.intermediate.dense.weight": "up",
        "bert.encoder.layer.0.output.dense.weight": "down",
        "bert.embeddings.word_embeddings.weight": "embedding",
        "bert.pooler.dense.weight": "other",
        "classifier.weight": "head",
    },
    "t5": {
        "encoder.block.0.layer.0.SelfAttention.o.weight": "o",
        "decoder.block.0.layer.2.DenseReluDense.wo.weight": "down",
        "decoder.block.0.layer.2.DenseReluDense.wi.weight": "up",
        "decoder.block.1.layer.0.layer_norm.weight": "norm",
        "shared.weight": "embedding",
    },
    "vit": {
        "vit.layers.0.attention.k_proj.weight": "k",
        "vit.layers.0.mlp.fc1.bias": "up",
        "vit.embeddings.patch_embeddings.projection.weight": "embedding",
        "vit.embeddings.position_embeddings": "position",
        "classifier.bias": "head",
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks(family: str) -> None:
    found = modelmap.blocks(tiny(family))
    assert {stack: len(blocks) for stack, blocks in found.items()} == STACKS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_from_the_model_and_from_its_names_alone(family: str) -> None:
    model = tiny(family)
    by_model = modelmap.roles(model)
    by_name = modelmap.roles_from_names(n for n, _ in model.named_parameters())
    for name, kind in ROLES[family].items():
        assert by_model[name].kind == kind, name
    assert {n: (r.kind, r.depth) for n, r in by_model.items()} == {n: (r.kind, r.depth) for n, r in by_name.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_block_has_a_role(family: str) -> None:
    roles = modelmap.roles(tiny(family))
    unknown = [n for n, r in roles.items() if r.depth is not None and r.kind == "other"]
    assert not unknown


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_survives_a_peft_wrapper(family: str) -> None:
    plain = modelmap.blocks(tiny(family))
    wrapped = get_peft_model(tiny(family), tunesmith.adapter("ssf"))
    found = modelmap.blocks(wrapped)
    assert [s.removeprefix("base_model.model.") for s in found] == list(plain)
    assert [len(b) for b in found.values()] == [len(b) for b in plain.values()]


def test_the_outermost_number_is_the_depth() -> None:
    names = [f"blocks.{i}.mlp.{j}.weight" for i in range(3) for j in (0, 2)]
    found = modelmap.depths(names)
    assert found["blocks.2.mlp.0.weight"] == modelmap.Depth("blocks", 2, 3)


def test_numbers_with_gaps_are_no_blocks() -> None:
    assert modelmap.depths(["head.0.weight", "head.2.weight"]) == {"head.0.weight": None, "head.2.weight": None}


def test_a_model_without_blocks_is_named() -> None:
    import torch

    with pytest.raises(ModelError, match="Linear has no numbered blocks"):
        modelmap.blocks(torch.nn.Linear(2, 2))
