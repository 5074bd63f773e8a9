"""Every adapter on a base in 4 and 8 bits: it trains, and merges in both of the ways that the docs name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tunesmith
from tests.contracts.test_adapters import move
from tests.zoo import batch, logits, tiny
from tunesmith import catalog
from tunesmith.core import layer as layers
from tunesmith.core.part import Part

OURS = [p for p in catalog.in_room("adapters") if "own-tuner" not in p.tags]
MERGING = [p for p in OURS if "mergeable" in p.tags and "quantized-base" not in p.refuses]
CONFIG = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
# Of the largest logit: bitsandbytes' int8 rounds activations as well, which a dequantised model does not.
DEQUANTISED = {"nf4": 1e-4, "int8": 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base")
    tiny("llama", hidden_size=64, intermediate_size=64).save_pretrained(place)
    return place


def base(folder: Path, kind: str) -> Any:
    made = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIG[kind], dtype=torch.float32)
    layers.keep_codes_readable(made)
    return made


def adapted(part: Part, model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    made = get_peft_model(model, tunesmith.adapter(part.slug))
    tunesmith.initialise(made, [batch("llama")])
    return move(made.eval(), 0.02)


@pytest.mark.parametrize("kind", CONFIG)
@pytest.mark.parametrize("part", MERGING, ids=lambda p: p.slug)
def test_merged_into_the_dequantised_base_is_the_adapter_on_the_codes(part: Part, kind: str, folder: Path) -> None:
    quantised, given = base(folder, kind), batch("llama")
    plain = logits(quantised, given)
    model = adapted(part, copy.deepcopy(quantised))
    expected = logits(model, given)
    assert not torch.allclose(expected, plain, atol=1e-3), "the adapter must change the output"
    float_base = base(folder, kind).dequantize()
    merged = get_peft_model(float_base, tunesmith.adapter(part.slug))
    tunesmith.initialise(merged, [given])
    merged.load_state_dict({n: t for n, t in model.state_dict().items() if "tunesmith_" in n}, strict=False)
    found = logits(merged.merge_and_unload(), given)
    assert (found - expected).abs().max() <= DEQUANTISED[kind] * expected.abs().max()


@pytest.mark.parametrize("part", MERGING, ids=lambda p: p.slug)
def test_merged_into_the_codes_and_out_again(part: Part, folder: Path) -> None:
    quantised, given = base(folder, "nf4"), batch("llama")
    model = adapted(part, quantised)
    expected = logits(model, given)
    model.merge_adapter()
    assert not torch.equal(logits(model, given), expected), "the sum is rounded to codes"
    model.unmerge_adapter()
    assert torch.allclose(logits(model, given), expected, atol=1e-6)


@pytest.mark.parametrize("kind", CONFIG)
@pytest.mark.parametrize("part", [p for p in OURS if "quantized-base" not in p.refuses], ids=lambda p: p.slug)
def test_gradients_reach_the_adapter_through_codes(part: Part, kind: str, folder: Path) -> None:
    model = adapted(part, base(folder, kind))
    codes = {n: p.detach().clone() for n, p in model.named_parameters() if not p.is_floating_point()}
    with tunesmith.step(model.train(), 0, 10):
        model(**batch("llama")).loss.backward()
    reached = [n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert reached
    assert all("tunesmith_" in n for n in reached)
    assert all(torch.equal(p, codes[n]) for n, p in model.named_parameters() if n in codes)
