"""The traced cost of a backward pass, against the FLOPs that torch counts in a real one."""

from __future__ import annotations

import random
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tunesmith
from tests.zoo import FAMILIES, batch, tiny
from tunesmith.core.backward_cost import BackwardCosts, trace
from tunesmith.core.meters import flops


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def forward(model: nn.Module, given: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return model(**given)


def traced(model: nn.Module, given: dict[str, Tensor]) -> BackwardCosts:
    return trace(lambda: forward(model, given), trainable(model))


def counted(model: nn.Module, given: dict[str, Tensor], chosen: set[str]) -> int:
    """What torch counts in the backward pass when these train."""
    everything = trainable(model)
    for name, p in everything.items():
        p.requires_grad_(name in chosen)
    both = flops(lambda: model(**given).loss.backward())
    only = flops(lambda: forward(model, given))
    for p in everything.values():
        p.requires_grad_(True)
        p.grad = None
    return both - only


def sets(names: list[str], count: int) -> list[set[str]]:
    rng = random.Random(0)
    picked = [set(rng.sample(names, rng.choice([1, 2, 5, len(names) // 2]))) for _ in range(count)]
    return [set(names), *picked]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_exactly_those_of_torch(family: str, attention: str) -> None:
    """Linear layers, Conv1D, attention, a tied head, patches by convolution; whatever trains."""
    model, given = tiny(family, attn_implementation=attention), batch(family)
    costs = traced(model, given)
    assert set(costs.names) == set(trainable(model))
    for chosen in sets(costs.names, 6):
        assert costs.exact(chosen, products_only=True) == counted(model, given, chosen)
        assert costs.exact(chosen) <= costs.bound(chosen)
    assert costs.bound(costs.names) == costs.exact(costs.names) == costs.full
    assert costs.exact(set()) == costs.bound(set()) == 0


@pytest.mark.parametrize("kind", ["lora", "ssf"])
def test_adapters(kind: str) -> None:
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(tiny("llama"), config if kind == "lora" else tunesmith.adapter("ssf"))
    costs = traced(model, batch("llama"))
    for chosen in sets(costs.names, 6):
        assert costs.exact(chosen, products_only=True) == counted(model, batch("llama"), chosen)


def test_the_order_is_that_of_execution() -> None:
    class Crossed(nn.Module):
        """Its layers are registered in another order than they run."""

        def __init__(self) -> None:
            super().__init__()
            self.last, self.first, self.unused = nn.Linear(3, 5), nn.Linear(2, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    model = Crossed()
    costs = trace(lambda: model(torch.ones(7, 2)), trainable(model))
    assert [name.split(".")[0] for name in costs.names] == ["first", "first", "last", "last"]


def test_costs_by_hand() -> None:
    """N = 7 tokens through 2 -> 3 (bias) -> norm -> 5 (no bias), in multiply-adds times two."""
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 5, bias=False))
    with torch.no_grad():
        costs = trace(lambda: model(torch.ones(7, 2)), trainable(model))
    at = {name: i for i, name in enumerate(costs.names)}
    own = {name: costs.own[i] for name, i in at.items()}
    assert own["0.weight"] == 2 * 7 * 2 * 3
    assert own["0.bias"] == 2 * 7 * 3
    assert own["1.weight"] == own["1.bias"] == 2 * 7 * 3
    assert own["2.weight"] == 2 * 7 * 3 * 5
    # To the norm's output through the last layer; from there to the first layer's through the norm.
    assert [costs.passing[at[n]] for n in ("0.weight", "0.bias")] in ([2 * 7 * 3, 0], [0, 2 * 7 * 3])
    assert costs.passing[at["1.weight"]] + costs.passing[at["1.bias"]] == 2 * 7 * 3 * 5
    assert costs.passing[at["2.weight"]] == 0
    assert costs.forward == 2 * 7 * (2 * 3 + 3 + 3 + 3 * 5)
    assert costs.bound(["2.weight"]) == own["2.weight"], "the last layer's gradient has no way to go"


def test_a_tied_head_counts_as_the_deepest_tensor_and_its_two_gradients_are_added() -> None:
    table = nn.Embedding(11, 4)
    ids = torch.arange(6)

    def run() -> Tensor:
        x = table(ids)
        return F.linear(x, table.weight)

    with torch.no_grad():
        costs = trace(run, trainable(table))
    assert costs.names == ["weight"]
    product = 2 * 6 * 4 * 11
    # Its gradient as a head; the gradient of its look-ups, which must come through the head; their sum.
    assert costs.own == [2 * product + 2 * 6 * 4 + 2 * 11 * 4]


def test_several_batches_add_up() -> None:
    model, given = tiny("bert"), batch("bert")
    once, twice = traced(model, given), trace(lambda: [forward(model, given) for _ in range(2)], trainable(model))
    assert once.names == twice.names
    assert twice.forward == 2 * once.forward
    assert twice.exact(twice.names, products_only=True) == 2 * once.exact(once.names, products_only=True)


def test_frozen_parameters_cost_nothing() -> None:
    model = tiny("llama")
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    costs = traced(model, batch("llama"))
    assert all("layers.1" in name for name in costs.names)
    assert costs.exact(costs.names, products_only=True) == counted(model, batch("llama"), set(costs.names))


def test_autocast_weights_are_still_those_parameters() -> None:
    model, given = tiny("llama"), batch("llama")

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            forward(model, given)

    costs = trace(run, trainable(model))
    assert costs.exact(costs.names, products_only=True) == counted(model, given, set(costs.names))
    layer = nn.Linear(3, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        alone = trace(lambda: layer(torch.ones(7, 3)), trainable(layer))
    assert alone.own[alone.names.index("bias")] == 2 * 7 * 5
