"""Streamed statistics against the same computed at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import batch, tiny
from tunesmith.core.stats import collect
from tunesmith.errors import ModelError, TunesmithError

LAYERS = {
    "llama": "model.layers.1.mlp.up_proj",
    "gpt2": "transformer.h.0.attn.c_attn",
    "bert": "bert.encoder.layer.0.intermediate.dense",
    "vit": "vit.layers.0.attention.q_proj",
}


def inputs_of(model: nn.Module, name: str, given: dict[str, Tensor]) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    model(**given)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", LAYERS)
def test_gradient_is_the_mean_over_batches_in_canonical_shape(family: str) -> None:
    model, name = tiny(family), LAYERS[family]
    batches = [batch(family, seed=s) for s in range(3)]
    found = collect(model, [name], batches, want=("gradient",))[name]["gradient"]
    weight = model.get_submodule(name).weight
    grads = []
    for given in batches:
        model.zero_grad()
        model(**given).loss.backward()
        grads.append(weight.grad.T if family == "gpt2" else weight.grad)
    assert torch.allclose(found, torch.stack(grads).mean(0), atol=1e-7)


def test_several_passes_give_the_same() -> None:
    model = tiny("llama")
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkv"]
    batches = [batch("llama", seed=s) for s in range(2)]
    once = collect(model, names, batches, want=("gradient",))
    twice = collect(model, names, batches, want=("gradient",), layers_per_pass=2)
    assert all(torch.equal(once[n]["gradient"], twice[n]["gradient"]) for n in names)


def test_input_statistics_leave_padding_out() -> None:
    model, name = tiny("llama"), LAYERS["llama"]
    given = batch("llama", rows=3, length=8)
    given["attention_mask"][0, 5:] = 0
    given["attention_mask"][2, :3] = 0
    x = inputs_of(model, name, given)[given["attention_mask"].bool()]
    want = ("input_mean", "input_variance", "input_square", "tokens")
    found = collect(model, [name], [given], want=want)[name]
    assert found["tokens"] == len(x) == 18
    assert torch.allclose(found["input_mean"], x.mean(0), atol=1e-6)
    assert torch.allclose(found["input_variance"], x.var(0, correction=0), atol=1e-7)
    assert torch.allclose(found["input_square"], (x**2).sum(0), rtol=1e-5)


def test_input_statistics_pool_batches_of_unequal_size() -> None:
    model, name = tiny("llama"), LAYERS["llama"]
    batches = [batch("llama", rows=n, seed=n) for n in (1, 4)]
    x = torch.cat([inputs_of(model, name, b).flatten(0, 1) for b in batches])
    found = collect(model, [name], batches, want=("input_variance", "input_mean"))[name]
    assert torch.allclose(found["input_mean"], x.mean(0), atol=1e-6)
    assert torch.allclose(found["input_variance"], x.var(0, correction=0), atol=1e-7)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama").train()
    model.model.embed_tokens.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    collect(model, [LAYERS["llama"]], [batch("llama")], want=("gradient", "input_mean"))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_errors() -> None:
    model = tiny("llama")
    with pytest.raises(TunesmithError, match="unknown statistics"):
        collect(model, [], [batch("llama")], want=("hessian",))
    with pytest.raises(TunesmithError, match="at least one batch"):
        collect(model, [], [], want=("gradient",))
    empty = batch("llama")
    empty["attention_mask"][:] = 0
    with pytest.raises(ModelError, match="saw no tokens"):
        collect(model, [LAYERS["llama"]], [empty], want=("input_mean",))


def test_a_loss_that_does_not_reach_a_layer_is_an_error() -> None:
    model = tiny("llama")

    def loss(m: nn.Module, b: dict) -> Tensor:
        return m.lm_head.weight.sum()

    with pytest.raises(ModelError, match="got no gradient"):
        collect(model, [LAYERS["llama"]], [batch("llama")], want=("gradient",), loss=loss)


def test_gradients_do_not_depend_on_how_rows_are_batched() -> None:
    model, whole = tiny("llama"), batch("llama")
    whole["labels"] = whole["input_ids"].clone()
    whole["labels"][0, :-2] = -100  # rows with unequal numbers of labels
    rows = [{key: value[i : i + 1] for key, value in whole.items()} for i in range(len(whole["input_ids"]))]
    at_once, singly = (collect(model, [LAYERS["llama"]], b, want=("gradient",)) for b in ([whole], rows))
    torch.testing.assert_close(at_once, singly, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("together", [True, False], ids=["one batch", "row by row"])
def test_covariance_and_gram_are_those_of_the_real_tokens(family: str, together: bool) -> None:
    layers = {**LAYERS, "opt": "model.decoder.layers.1.fc2"}
    model, name = tiny(family), layers[family]
    given = batch(family, rows=3, length=8)
    given["attention_mask"][1, 5:] = 0
    rows = [{k: v[i : i + 1] for k, v in given.items()} for i in range(3)]
    flat = [inputs_of(model, name, row).reshape(-1, row["input_ids"].shape[1], _width(model, name)) for row in rows]
    tokens = [x[0][row["attention_mask"][0].bool()].double() for x, row in zip(flat, rows, strict=True)]
    found = collect(model, [name], [given] if together else rows, want=("input_covariance", "input_gram"))[name]
    covariance = torch.cov(torch.cat(tokens).T, correction=0)
    gram = torch.stack([(x / x.max().abs()).T @ (x / x.max().abs()) for x in tokens]).mean(0)
    assert torch.allclose(found["input_covariance"].double(), covariance, atol=1e-5 * float(covariance.abs().max()))
    assert torch.allclose(found["input_gram"].double(), gram, rtol=1e-4, atol=1e-4 * float(gram.abs().max()))


def _width(model: nn.Module, name: str) -> int:
    module = model.get_submodule(name)
    return module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
