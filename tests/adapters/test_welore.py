"""What is special to WeLore."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import tunesmith
from tests.contracts.test_adapters import move
from tests.zoo import batch, tiny
from tunesmith.adapters.welore import WeLore, normalised, summary, threshold_for
from tunesmith.core.adapter import Base
from tunesmith.core.layer import describe, read_weight
from tunesmith.core.meters import flops, state_bytes
from tunesmith.core.modelmap import block_linears
from tunesmith.errors import ModelError, RecipeError


def held(model: nn.Module) -> dict[str, WeLore]:
    return {m.layer.name: m for m in model.modules() if isinstance(m, WeLore)}


def compressed(base: nn.Module, **options: Any) -> Any:
    return get_peft_model(copy.deepcopy(base), tunesmith.adapter("welore", **options)).eval()


def weights(base: nn.Module) -> dict[str, Tensor]:
    """The canonical weights of the layers in the blocks."""
    found = {name: base.get_submodule(name) for name in block_linears(base)}
    return {name: read_weight(m, describe(m, name)).detach() for name, m in found.items()}


def decaying(base: nn.Module, fast: tuple[str, ...], rate: float = 0.6) -> nn.Module:
    """Give the layers of these names spectra rate^i."""
    for name, W in weights(base).items():
        if name.endswith(fast):
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            W.copy_(U * rate ** torch.arange(len(S)) @ Vh)
    return base


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ranks_are_those_of_a_bisection(family: str) -> None:
    base = decaying(tiny(family), ("down_proj", "mlp.c_proj", "q_proj"))
    spectra = {name: normalised(torch.linalg.svdvals(W)) for name, W in weights(base).items()}
    total, low, high = sum(map(len, spectra.values())), 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        below = sum(int((v < middle).sum()) for v in spectra.values())
        low, high = (low, middle) if below >= 0.5 * total else (middle, high)
    lost = {name: int((v < high).sum()) for name, v in spectra.items()}
    expected = {n: len(spectra[n]) - k if k / len(spectra[n]) > 0.4999 else 0 for n, k in lost.items()}
    assert {name: made.rank for name, made in held(compressed(base)).items()} == expected
    assert 0 < sum(r > 0 for r in expected.values()) < len(expected)
    assert abs(sum(lost.values()) - 0.5 * total) <= 1


def test_decaying_layers_become_factors_and_flat_ones_stay() -> None:
    base = decaying(tiny("llama", hidden_size=64, intermediate_size=64), ("up_proj", "v_proj"))
    found = held(compressed(base))
    assert {name for name, made in found.items() if made.rank} == {
        n for n in found if n.endswith(("up_proj", "v_proj"))
    }
    assert all(sum(made.layer.shape) * made.rank < made.layer.shape[0] * made.layer.shape[1] for made in found.values())


def test_the_published_threshold_and_the_ratio_are_two_ways_to_say_k() -> None:
    base = decaying(tiny("llama"), ("down_proj",))
    values = {name: normalised(torch.linalg.svdvals(W)) for name, W in weights(base).items()}
    k = threshold_for(values, 0.7)
    ranks = [[m.rank for m in held(compressed(base, **how)).values()] for how in ({"ratio": 0.7}, {"threshold": k})]
    assert ranks[0] == ranks[1]
    # A threshold of 1 and more leaves the largest value all the same.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert {m.rank for m in held(compressed(base, threshold=1.5)).values()} == {1}


def test_equal_singular_values_leave_nothing_out() -> None:
    assert torch.equal(normalised(torch.full((5,), 3.0)), torch.ones(5, dtype=torch.float64))
    base = tiny("llama")
    for name, W in weights(base).items():
        if name.endswith("q_proj"):
            W.copy_(torch.linalg.qr(W)[0])
        if name.endswith("k_proj"):
            W.zero_()
    found = held(compressed(base, min_ratio=0.0))
    assert all(made.rank == 0 for name, made in found.items() if name.endswith("k_proj"))
    # An orthogonal matrix is flat up to rounding alone, which the normalisation blows up: it must not decide.
    assert all(made.rank == 0 for name, made in found.items() if name.endswith("q_proj"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["conv1d", "linear"])
def test_factors_are_the_best_approximation_and_the_bias_stays(kind: str, dtype: torch.dtype) -> None:
    base = tiny("gpt2" if kind == "conv1d" else "opt").to(dtype)
    name = "transformer.h.0.mlp.c_fc" if kind == "conv1d" else "model.decoder.layers.0.fc1"
    module: Any = base.get_submodule(name)
    with torch.no_grad():
        module.bias.normal_()
    W = weights(base)[name].float()
    made = held(compressed(base, rank=5))[name]
    assert made.U is not None
    assert made.V is not None
    U, S, Vh = torch.linalg.svd(W)
    assert torch.allclose(made.weight(W), (U[:, :5] * S[:5]) @ Vh[:5], atol=1e-5)
    assert torch.allclose(made.U.T @ made.U, S[:5].diag(), atol=1e-5)  # the size is shared out between the two
    assert torch.allclose(made.V @ made.V.T, S[:5].diag(), atol=1e-5)
    x = torch.randn(3, W.shape[1], dtype=dtype)
    y = made(x, Base(module, describe(module, name)))
    expected = x.float() @ made.weight(W).T + module.bias.float()
    assert torch.allclose(y.float(), expected, atol=1e-5)


def test_gradients_are_those_of_the_product_in_both_ways_through() -> None:
    base = tiny("llama")
    made: Any = held(compressed(base, rank=4))["model.layers.0.mlp.up_proj"]
    module = base.get_submodule("model.layers.0.mlp.up_proj")
    below = Base(module, describe(module, "up"))
    x = torch.randn(6, 32, requires_grad=True)
    found = []
    for way in range(3):
        for t in (x, made.U, made.V):
            t.grad = None
        given = x.double() if way == 1 else x
        y = below.apply(x, made.weight(below.weight), None) if way == 2 else made(given, below)
        y.double().square().sum().backward()
        found.append([t.grad.clone() for t in (x, made.U, made.V)])
    for other in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found[0], other, strict=True))


def test_cost_is_that_of_the_factors() -> None:
    base = decaying(tiny("llama", hidden_size=64, intermediate_size=64), ("up_proj", "down_proj"))
    model = compressed(base)
    found = held(model)
    numbers = sum(made.rank * sum(made.layer.shape) for made in found.values())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == numbers > 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    given = batch("llama")
    model.train()(**given).loss.backward()
    optimizer.step()
    assert state_bytes(optimizer) - 4 * 2 * sum(m.rank > 0 for m in found.values()) == 8 * numbers
    assert all(p.grad is None for n, p in model.named_parameters() if "tunesmith_" not in n)
    tokens = given["input_ids"].numel()
    saved = sum(m.layer.shape[0] * m.layer.shape[1] - m.rank * sum(m.layer.shape) for m in found.values() if m.rank)
    with torch.no_grad():
        assert flops(lambda: base(**given)) - flops(lambda: model.eval()(**given)) == 2 * tokens * saved


def test_one_value_far_above_the_others_is_warned_of() -> None:
    base = tiny("llama")
    W = weights(base)["model.layers.0.mlp.up_proj"]
    u, v = torch.ones(len(W)) / len(W) ** 0.5, torch.ones(W.shape[1]) / W.shape[1] ** 0.5
    W.add_(0.9 * torch.outer(u, v))
    with pytest.warns(UserWarning, match=r"leaves 1 layers with rank 1 .*layers.0.mlp.up_proj"):
        model = compressed(base, ratio=0.7)
    assert held(model)["model.layers.0.mlp.up_proj"].rank == 1
    W.add_(torch.outer(u, v), alpha=100)  # now it is all there is, and leaving out the rest is harmless
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compressed(base, ratio=0.7)


def test_a_saved_rank_wins_over_the_one_found_again(tmp_path: Path) -> None:
    base = decaying(tiny("llama"), ("down_proj",))
    model = move(compressed(base, ratio=0.6))
    model.save_pretrained(tmp_path)
    # Nearly the same base, as another machine's rounding would have it: layers gain, lose and change factors.
    for W in weights(base).values():
        W.add_(0.01 * torch.randn(W.shape, generator=torch.Generator().manual_seed(3)))
    assert {n: m.rank for n, m in held(compressed(base, ratio=0.6)).items()} != {
        n: m.rank for n, m in held(model).items()
    }
    loaded: Any = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert {n: m.rank for n, m in held(loaded).items()} == {n: m.rank for n, m in held(model).items()}
    was, now = model.state_dict(), loaded.state_dict()
    factors = [name for name in was if name.endswith((".U", ".V"))]
    assert factors
    assert all(torch.equal(was[name], now[name]) for name in factors)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_a_table_of_ranks() -> None:
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    model = compressed(tiny("llama"), ranks={names[0]: 3, names[1]: 7})
    assert {n: m.rank for n, m in held(model).items()} == {names[0]: 3, names[1]: 7}


def test_summary_counts_values_and_numbers() -> None:
    model = compressed(tiny("llama"), ranks={"model.layers.0.mlp.up_proj": 3, "model.layers.0.mlp.down_proj": 32})
    report = summary(model)
    assert report.tables[0].rows[0] == ["model.layers.0.mlp.up_proj", 32, 3, 32 * 48, 3 * 80]
    assert report.figure("singular values left out").value == 29
    assert report.figure("numbers saved").value == 2 * 32 * 48 - 35 * 80
    assert report.figure("numbers that train").value == 35 * 80
    with pytest.raises(ModelError, match="no welore adapter"):
        summary(tiny("llama"))


def test_errors() -> None:
    base = tiny("llama")
    with pytest.raises(ModelError, match=r"no layer compresses.*min_ratio=0.9 asks for more"):
        compressed(base, min_ratio=0.9)
    with pytest.raises(RecipeError, match="ratio"):
        tunesmith.adapter("welore", ratio=1.0)
    with pytest.raises(ModelError, match=r"name `welore` first"):
        get_peft_model(tiny("llama"), tunesmith.stack(tunesmith.adapter("dylora"), tunesmith.adapter("welore")))
    get_peft_model(tiny("llama"), tunesmith.stack(tunesmith.adapter("welore"), tunesmith.adapter("dylora")))
    with pytest.raises(ModelError, match="load the model first"):
        compressed(tiny("llama").to("meta"))
    weights(base)["model.layers.0.mlp.up_proj"].fill_(float("nan"))
    with pytest.raises(ModelError, match=r"'model.layers.0.mlp.up_proj' has values that are not finite"):
        compressed(base)
    with pytest.raises(ModelError, match="changes linear layers"):
        WeLore(describe(nn.Conv2d(4, 8, 3), "layer"))
