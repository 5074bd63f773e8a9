"""Structure masks: one factor per head, per group of heads that shares keys, and per neuron."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import tunesmith
from tests.zoo import FAMILIES, batch, checkpoint, logits, same, tiny
from tunesmith.adapters.structure_masks import StructureMasks
from tunesmith.core.optimizer import set_lr_ratios
from tunesmith.core.surgery import Structure, prune, sites

WIDE = {"initializer_range": 0.3}


def masks(model: nn.Module) -> dict[str, StructureMasks]:
    return {m.layer.name: m for m in model.modules() if isinstance(m, StructureMasks)}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_factor_per_unit(family: str) -> None:
    base = tiny(family)
    known = sites(base)
    model = get_peft_model(base, tunesmith.adapter("structure-masks"))
    found = masks(model)
    assert list(found) == list(known)
    for name, made in found.items():
        assert made.of == known[name].kind
        assert made.factors.shape == (known[name].units,)
        assert made.factors.requires_grad
        assert made.columns().shape == (made.layer.shape[1],)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(s.units for s in known.values())
    assert sites(model.get_base_model()) == known


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "t5"])
def test_a_factor_of_zero_is_a_head_or_neuron_that_is_gone(family: str) -> None:
    """A factor multiplies what its head or neuron adds; at 0, the layers that make it might as well be cut away."""
    model = get_peft_model(tiny(family, **WIDE), tunesmith.adapter("structure-masks"))
    given, kept = batch(family), {"heads": {}, "neurons": {}}
    with torch.no_grad():
        for name, made in masks(model).items():
            gone = 1 if made.of == "heads" else 5
            made.factors[gone] = 0
            share = sites(model.get_base_model())[name].share
            units = [u for u in range(len(made.factors)) if u != gone]
            kept[made.of][name] = [u * share + i for u in units for i in range(share)]
    expected = logits(model, given)
    assert torch.allclose(logits(model.merge_and_unload(), given), expected, atol=1e-5)
    plain = tiny(family, **WIDE)
    assert (logits(plain, given) - expected).abs().max() > 0.1
    assert torch.allclose(logits(prune(plain, Structure(**kept)), given), expected, atol=1e-5)


def test_a_factor_on_a_head_is_one_on_its_attention_probabilities() -> None:
    model, given = tiny("bert", **WIDE), batch("bert")
    attention = model.bert.encoder.layer[1].attention.self
    wrapped = get_peft_model(tiny("bert", **WIDE), tunesmith.adapter("structure-masks"))
    made = masks(wrapped)["bert.encoder.layer.1.attention.output.dense"]
    factors = torch.tensor([0.5, 1.0, -2.0, 0.0])
    with torch.no_grad():
        made.factors.copy_(factors)

    def scaled(module: nn.Module, args: tuple, out: tuple) -> tuple:  # sum_k m p_k v_k = m sum_k p_k v_k
        return (out[0] * factors.repeat_interleave(8), *out[1:])

    attention.register_forward_hook(scaled)
    assert torch.allclose(logits(model, given), logits(wrapped, given), atol=1e-5)


def test_above_a_low_rank_adapter_it_masks_what_that_reads() -> None:
    config = tunesmith.stack(tunesmith.adapter("qlora", rank=4), tunesmith.adapter("structure-masks"))
    model = get_peft_model(tiny("llama", **WIDE), config)
    given = batch("llama")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
        for made in masks(model).values():
            made.factors[0] = 0
    expected = logits(model, given)
    with torch.no_grad():  # what a masked head or neuron is does not matter
        for name, made in masks(model).items():
            low = model.get_base_model().get_submodule(name).active()[0]
            low.A[:, : made.width] += 1.0
    assert torch.allclose(logits(model, given), expected, atol=1e-5)


def test_saved_and_loaded_with_its_shape(tmp_path: Path) -> None:
    model, given = get_peft_model(tiny("llama", **WIDE), tunesmith.adapter("structure-masks")), batch("llama")
    with torch.no_grad():
        for made in masks(model).values():
            made.factors.uniform_(0.2, 1.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama", **WIDE), tmp_path, is_trainable=True)
    assert same(checkpoint(loaded), checkpoint(model))
    assert torch.equal(logits(loaded, given), logits(model, given))
    assert all(made.factors.requires_grad for made in masks(loaded).values())


def test_heads_and_neurons_learn_at_their_own_rates() -> None:
    model = get_peft_model(tiny("llama"), tunesmith.adapter("structure-masks", head_lr=100.0, neuron_lr=50.0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    set_lr_ratios(optimizer, model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for made in masks(model).values():
        assert rates[id(made.factors)] == pytest.approx(0.1 if made.of == "heads" else 0.05)
    plain = get_peft_model(tiny("gpt2"), tunesmith.adapter("structure-masks"))
    assert all(not made.lr_ratios() for made in masks(plain).values())


def test_on_any_other_layer_there_is_a_factor_per_input() -> None:
    model = get_peft_model(tiny("llama"), tunesmith.adapter("structure-masks", target_modules=["q_proj", "o_proj"]))
    assert {(m.of, len(m.factors)) for m in masks(model).values()} == {("inputs", 32), ("heads", 2)}
