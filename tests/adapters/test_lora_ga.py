"""What is special to LoRA-GA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import tunesmith
from tests.zoo import batch, logits, tiny
from tunesmith.adapters.lora_ga import LoRAGA
from tunesmith.core.adapter import stacked
from tunesmith.core.layer import describe
from tunesmith.errors import ModelError

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prepared(G: Tensor, W: Tensor | None = None, **options: Any) -> LoRAGA:
    layer = nn.Linear(G.shape[1], G.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(random(*G.shape, seed=9) if W is None else W)
    made = LoRAGA(describe(layer, "layer"), **{"rank": 2, "alpha": 3.0, "svd": "exact", **options})
    made.prepare(layer.weight.detach(), {"gradient": G})
    return made


def layers(model: nn.Module) -> list[LoRAGA]:
    return [m for m in model.modules() if isinstance(m, LoRAGA)]


@given(
    out=st.integers(6, 20),
    into=st.integers(6, 20),
    rank=st.integers(1, 3),
    direction=st.sampled_from(DIRECTIONS),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_one_step_of_sgd_follows_the_gradient(out: int, into: int, rank: int, direction: str, seed: int) -> None:
    """By autograd and a real step: the change is -lr s^2 c^2 times the best rank-2r part, up to order lr^2."""
    U, V = torch.linalg.qr(random(out, out, seed=seed))[0], torch.linalg.qr(random(into, into, seed=seed + 1))[0]
    n = min(out, into)
    sigma = 2 * 0.8 ** torch.arange(n)
    G = U[:, :n] * sigma @ V[:, :n].T
    made = prepared(G, rank=rank, direction=direction, seed=seed).double()
    G, W, lr = G.double(), random(out, into, seed=9).double(), 1e-6
    assert torch.allclose(made.weight(W), W, rtol=0, atol=1e-12)
    (made.weight(W) * G).sum().backward()
    torch.optim.SGD([made.A, made.B], lr=lr).step()
    k = made.scaling**2 * (out**0.25 / made.gamma**0.5) ** 2
    best = (U[:, :n] * (sigma * (torch.arange(n) < 2 * rank)) @ V[:, :n].T).double()
    change = (made.weight(W) - W).detach() / -lr
    assert torch.allclose(change, k * best, atol=1e-4 * float((k * best).abs().max()))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_factors_are_orthonormal_and_share_no_direction(direction: str) -> None:
    G = random(12, 10)
    made = prepared(G, direction=direction, scale="unit")
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    eye = torch.eye(2)
    assert torch.allclose(made.A @ made.A.T, eye, atol=1e-5)
    assert torch.allclose(made.B.T @ made.B, eye, atol=1e-5)
    used = [(Vh @ made.A.T).abs().sum(1) > 0.5, (U.T @ made.B).abs().sum(1) > 0.5]
    right, left = ({int(i) for i in mask.nonzero()} for mask in used)
    assert right | left == {0, 1, 2, 3}
    assert not right & left
    expected = {"ArB2r": {0, 1}, "A2rBr": {2, 3}, "ArBr": {0, 2}}
    assert right == expected.get(direction, right)


def test_scales() -> None:
    G, W = random(16, 10), random(16, 10, seed=3)
    factor = {name: prepared(G, W, scale=name).A.norm(dim=1)[0].item() for name in ("stable", "unit", "gd", "weight")}
    s = 3 / 2**0.5
    assert factor["stable"] == pytest.approx(16**0.25 / 16**0.5)
    assert factor["unit"] == pytest.approx(1)
    assert factor["gd"] == pytest.approx(1 / s)
    assert factor["weight"] == pytest.approx(float((torch.linalg.svdvals(W)[:2] / s).sqrt().mean()))
    assert prepared(G, rslora=False).scaling == pytest.approx(3 / 2)
    assert prepared(G, gamma=4.0).A.norm(dim=1)[0].item() == pytest.approx(1)


@pytest.mark.parametrize(("size", "shrinks"), [(1e-3, True), (1e3, False)])
def test_clip_bounds_the_start(size: float, shrinks: bool) -> None:
    G, W = random(12, 10), size * random(12, 10, seed=3)
    free, clipped = prepared(G, W), prepared(G, W, clip=True)
    largest = (clipped.scaling * clipped.B0 @ clipped.A0).abs().max()
    assert largest <= W.abs().max() * (1 + 1e-5)
    assert torch.equal(free.A, clipped.A) != shrinks
    assert torch.allclose(clipped.A.norm(dim=1), clipped.B.norm(dim=0)), "both factors shrink alike"


def test_randomised_svd_has_its_own_seed() -> None:
    G = random(40, 30)
    state = torch.random.get_rng_state()
    first, second = (prepared(G, svd="randomised", seed=5) for _ in range(2))
    # Creating a layer draws from the global generator; preparing must not.
    torch.random.set_rng_state(state)
    made = LoRAGA(describe(nn.Linear(30, 40), "layer"), rank=2, svd="randomised")
    before = torch.random.get_rng_state()
    made.prepare(torch.zeros(40, 30), {"gradient": G})
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.A, second.A)
    assert not torch.equal(first.A, prepared(G, svd="randomised", seed=6).A)


def test_too_high_a_rank_is_a_clear_error() -> None:
    with pytest.raises(ModelError, match=r"rank 4 needs 8 singular directions; 'layer' of shape \(10, 7\) has 7"):
        LoRAGA(describe(nn.Linear(7, 10), "layer"), rank=4)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_gradient_that_says_nothing_is_a_clear_error(value: float) -> None:
    with pytest.raises(ModelError, match="gradient of 'layer' is zero or not finite"):
        prepared(torch.full((8, 8), value))


def test_training_before_initialise_is_a_clear_error_and_evaluation_gives_the_base() -> None:
    base, inputs = tiny("llama"), batch("llama")
    model = get_peft_model(copy.deepcopy(base), tunesmith.adapter("lora-ga", rank=2))
    assert torch.equal(logits(model, inputs), logits(base, inputs))
    with pytest.raises(ModelError, match=r"tunesmith\.initialise"):
        model.train()(**inputs)


def test_output_features_of_conv1d_set_the_scale() -> None:
    """GPT-2 stores the transpose: `c_attn` has 96 outputs, 32 inputs."""
    inputs = batch("gpt2")
    model = get_peft_model(tiny("gpt2"), tunesmith.adapter("lora-ga", rank=2, target_modules=["c_attn"]))
    tunesmith.initialise(model, [inputs])
    for made in layers(model):
        assert made.A.shape == (2, 32)
        assert torch.allclose(made.A.norm(dim=1), torch.tensor(96**0.25 / 4), rtol=1e-4)


def test_start_is_the_base_under_dropout() -> None:
    """What is subtracted sees the same dropout mask."""
    layer = nn.Linear(10, 12, bias=False)
    made = LoRAGA(describe(layer, "layer"), rank=2, dropout=0.5)
    made.prepare(layer.weight.detach(), {"gradient": random(12, 10)})
    x = random(5, 10)
    assert torch.allclose(made.train()(x, stacked(layer, made.layer, [])), layer(x), atol=1e-6)


def test_exported_rank_is_2r_on_the_original_weight() -> None:
    made, W = prepared(random(12, 10)), random(12, 10, seed=9)
    with torch.no_grad():
        made.A.add_(random(2, 10, seed=4))
        made.B.add_(random(12, 2, seed=5))
    B, A = made.to_lora()
    assert (B.shape, A.shape) == ((12, 4), (4, 10))
    wanted = made.scaling * (made.B @ made.A - made.B0 @ made.A0)
    assert torch.allclose(B @ A, wanted, atol=1e-5)
    assert torch.allclose(made.weight(W) - W, wanted, atol=1e-5)


def test_a_loaded_adapter_is_prepared(tmp_path: Path) -> None:
    base, inputs = tiny("llama"), batch("llama")
    model = get_peft_model(copy.deepcopy(base), tunesmith.adapter("lora-ga", rank=2))
    assert tunesmith.initialise(model, [inputs]) == len(layers(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    kept = [made.A0.clone() for made in layers(loaded)]
    assert all(bool(A0.any()) for A0 in kept)
    assert tunesmith.initialise(loaded, [batch("llama", seed=1)]) == 0, "a second start would lose what was learned"
    assert all(torch.equal(made.A0, A0) for made, A0 in zip(layers(loaded), kept, strict=True))
    loaded.train()(**inputs).loss.backward()
