"""Counted bytes and FLOPs against hand counts and the reference numbers of a four-layer model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.core import meters

LAYER = 2 * 128 * (4 * 64 * 64 + 3 * 64 * 160)
"""FLOPs of one layer's projections on 128 tokens."""
HEAD = 2 * 128 * 64 * 256
ATTENTION = 2 * 2 * 4 * 32 * 32 * 64
"""q k^T and p v of one layer, four rows of 32 tokens."""


def model(attention: str = "eager") -> LlamaForCausalLM:
    size = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4}
    config = LlamaConfig(**size, num_attention_heads=4, attn_implementation=attention, tie_word_embeddings=False)
    made = LlamaForCausalLM(config)
    made.model.embed_tokens.requires_grad_(False)
    made.model.norm.requires_grad_(False)
    return made


IDS = torch.arange(128).view(4, 32)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_count_fused_attention_too(attention: str) -> None:
    made = model(attention)
    assert meters.flops(lambda: made(input_ids=IDS)) == 4 * (LAYER + ATTENTION) + HEAD == 56_623_104


def test_backward_flops_depend_on_the_lowest_trainable_layer() -> None:
    counted = []
    for frozen in range(5):
        made = model()
        for layer in made.model.layers[:frozen]:
            layer.requires_grad_(False)
        loss = made(input_ids=IDS, labels=IDS).loss
        counted.append(meters.flops(loss.backward))
    # Nothing below the lowest trainable layer needs a gradient: not even its own inputs.
    assert [round(n / 1e6, 1) for n in counted] == [113.2, 87.0, 60.8, 34.6, 4.2]


@pytest.mark.parametrize(("frozen", "expected"), [(0, 3_056_644), (2, 1_612_804), (4, 164_868)])
def test_saved_bytes_of_the_reference_model(frozen: int, expected: int) -> None:
    made = model()
    for layer in made.model.layers[:frozen]:
        layer.requires_grad_(False)
    with meters.saved_bytes(made) as saved:
        loss = made(input_ids=IDS, labels=IDS).loss
    assert loss.requires_grad
    assert saved.bytes == expected


def test_saved_bytes_count_a_storage_once_and_parameters_never() -> None:
    layer = nn.Linear(8, 4, bias=False)
    x = torch.randn(16, 8)
    with meters.saved_bytes(layer) as saved:
        y = layer(x)
        z = (y * y).sum() + y.exp().sum()
    assert z.requires_grad
    # The linear keeps x, the square keeps y (twice the same storage), exp keeps its output.
    assert saved.bytes == 4 * (16 * 8 + 16 * 4 + 16 * 4)


def test_state_bytes_of_adam_and_of_nested_helpers() -> None:
    weight = nn.Parameter(torch.randn(10, 6))
    optimizer = torch.optim.Adam([weight])
    assert meters.state_bytes(optimizer) == 0
    weight.sum().backward()
    optimizer.step()
    assert meters.state_bytes(optimizer) == 2 * 4 * 60 + 4

    class Projector:
        def __init__(self) -> None:
            self.basis = torch.zeros(6, 2)
            self.counter = 7

    optimizer.state[weight]["projector"] = [Projector(), {"extra": torch.zeros(3, dtype=torch.float64)}]
    assert meters.state_bytes(optimizer) == 2 * 4 * 60 + 4 + 4 * 12 + 8 * 3


def test_grad_bytes_is_the_peak() -> None:
    layers = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    x = torch.randn(3, 4)
    with meters.grad_bytes(layers) as peak:
        layers(x).sum().backward()
        layers.zero_grad(set_to_none=True)
    assert peak.bytes == 2 * 4 * 16


def test_trainable_counts() -> None:
    made = model()
    trained, whole = meters.trainable(made)
    assert whole - trained == 256 * 64 + 64
    assert whole == sum(p.numel() for p in made.parameters())


def test_peak_memory_sees_an_allocation() -> None:
    with meters.peak_memory() as before:
        pass
    with meters.peak_memory() as after:
        held = torch.ones(30_000_000)
    assert after.bytes - before.bytes > 100_000_000
    assert held.numel()
