"""Structure masks: what a factor does, exactly, to a head, to a neuron and to the weights that it folds into."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.adapters.structure_masks import StructureMasks
from tunesmith.core.bridge import adapter
from tunesmith.core.seeds import generator
from tunesmith.evidence import kit_digits
from tunesmith.evidence.claim import Check, Claim

CLAIM = Claim(
    "structure-masks",
    says="Masks, set to 1 at first, on the output of each attention head and on each neuron of the feed-forward layers "
    "tell in a short estimation which of them a task does not need.",
    where="section 3.2",
    ran="Identities on a Llama of 2 blocks with 8 heads in 4 groups that share keys. What the masks find, and what "
    "tuning without it costs, is the claim of `light-peft`.",
)


def _model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=32,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    return kit_digits.seeded(lambda: LlamaForCausalLM(config).eval(), 0)


def _masked(moved: bool = True) -> Any:
    model = get_peft_model(_model(), adapter("structure-masks"))
    g = generator(0, "factors")
    if moved:
        with torch.no_grad():
            for made in _masks(model).values():
                made.factors.copy_(1.5 * torch.randn(made.factors.shape, generator=g))
    return model


def _masks(model: nn.Module) -> dict[str, StructureMasks]:
    return {m.layer.name: m for m in model.modules() if isinstance(m, StructureMasks)}


def _ids() -> Tensor:
    return torch.randint(3, 64, (4, 16), generator=generator(0, "ids"))


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return model(input_ids=_ids()).logits


@contextmanager
def _by_definition(model: LlamaForCausalLM, factors: dict[str, Tensor]) -> Iterator[None]:
    """The paper's form: the factor on what a head or a neuron gives, before the projection reads it."""
    handles = []
    for name, m in factors.items():
        layer = model.get_submodule(name)

        def scale(module: nn.Module, args: tuple, m: Tensor = m) -> tuple:
            x = args[0].unflatten(-1, (len(m), -1)) * m[:, None]
            return (x.flatten(-2),)

        handles.append(layer.register_forward_pre_hook(scale))
    yield
    for handle in handles:
        handle.remove()


@CLAIM.exact
def a_factor_scales_its_head_or_neuron() -> list[Check]:
    """Logits equal those with each head's and neuron's output scaled; ones leave them as they are, to the bit."""
    plain, model = _model(), _masked()
    with _by_definition(plain, {name: made.factors.detach() for name, made in _masks(model).items()}):
        expected = _logits(plain)
    before = _logits(plain)
    return [
        Check("largest difference", float((_logits(model) - expected).abs().max()), "<=", 1e-4),
        Check("largest change of a logit", float((before - expected).abs().max()), ">=", 1),
        Check("largest difference at ones", float((_logits(_masked(moved=False)) - before).abs().max()), "==", 0),
    ]


@CLAIM.exact
def folded_equals_unfolded() -> Check:
    """Folded into the weights, the logits stay."""
    model = _masked()
    expected = _logits(model)
    return Check("largest difference", float((_logits(model.merge_and_unload()) - expected).abs().max()), "<=", 1e-4)


@CLAIM.exact
def one_number_per_unit() -> list[Check]:
    """There is one trainable number per group of heads that shares keys and per neuron, and no other."""
    model = _masked()
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    heads = sum(made.factors.numel() for made in _masks(model).values() if made.of == "heads")
    return [Check("groups of heads", heads, "==", 2 * 4), Check("numbers that train", counted, "==", 2 * (4 + 96))]


@CLAIM.exact
def its_gradient_is_the_first_order_importance() -> list[Check]:
    """At ones, a factor's gradient is the slope of the loss as its head or neuron is turned down."""
    model = _masked(moved=False).double()
    ids = _ids()
    model(input_ids=ids, labels=ids).loss.backward()
    worst, largest = 0.0, 0.0
    for made in _masks(model).values():
        for unit in range(0, len(made.factors), 1 if made.of == "heads" else 24):
            losses = []
            for value in (1.01, 0.99):
                with torch.no_grad():
                    made.factors[unit] = value
                    losses.append(float(model(input_ids=ids, labels=ids).loss))
            with torch.no_grad():
                made.factors[unit] = 1.0
            assert made.factors.grad is not None
            worst = max(worst, abs((losses[0] - losses[1]) / 0.02 - float(made.factors.grad[unit])))
            largest = max(largest, abs(float(made.factors.grad[unit])))
    return [Check("largest difference", worst, "<=", 1e-3), Check("largest gradient", largest, ">=", 0.1)]
