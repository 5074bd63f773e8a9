"""What is special to PiSSA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import tunesmith
from tests.zoo import batch, checkpoint, logits, same, tiny
from tunesmith.adapters.pissa import PiSSA
from tunesmith.core.adapter import stacked
from tunesmith.core.bridge import TunesmithLayer
from tunesmith.core.layer import describe
from tunesmith.errors import ModelError


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prepared(W: Tensor, **options: Any) -> PiSSA:
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(W)
    made = PiSSA(describe(layer, "layer"), **{"rank": 2, "alpha": 3.0, **options})
    made.prepare(layer.weight.detach(), {})
    return made


def falling(out: int, into: int, seed: int = 0) -> Tensor:
    """With singular values 2 x 0.7^i."""
    n = min(out, into)
    U, V = (torch.linalg.qr(random(m, m, seed=seed + m))[0][:, :n] for m in (out, into))
    return U * (2 * 0.7 ** torch.arange(n)) @ V.T


@given(
    out=st.integers(3, 20),
    into=st.integers(3, 20),
    rank=st.integers(1, 3),
    alpha=st.floats(0.5, 32),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_the_start_is_the_best_of_its_rank_whatever_alpha(
    out: int, into: int, rank: int, alpha: float, seed: int
) -> None:
    W = falling(out, into, seed)
    made = prepared(W, rank=rank, alpha=alpha)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    start = (made.scaling * made.B @ made.A).detach()
    assert torch.allclose(start, U[:, :rank] * S[:rank] @ Vh[:rank], atol=1e-5)
    assert torch.allclose(made.weight(W), W, atol=1e-5)
    balanced = torch.diag(S[:rank]) * rank / alpha
    assert torch.allclose(made.A @ made.A.T, balanced, atol=1e-5 * float(balanced.max()) + 1e-6)
    assert torch.allclose(made.B.T @ made.B, balanced, atol=1e-5 * float(balanced.max()) + 1e-6)


def test_a_whole_weight_can_train() -> None:
    """At full rank nothing of the weight is left behind, and one more is an error that names the layer."""
    W = random(6, 4)
    made = prepared(W, rank=4)
    assert torch.allclose(made.scaling * made.B @ made.A, W, atol=1e-5)
    with pytest.raises(ModelError, match=r"PiSSA of rank 5 .* 'layer' of shape \(6, 4\) has 4"):
        prepared(W, rank=5)


@pytest.mark.parametrize("iterations", [0, 16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_is_pefts_on_linear_and_conv1d_layers(family: str, iterations: int) -> None:
    """Factors up to the signs of singular vectors, and the logits after training."""
    start = f"pissa_niter_{iterations}" if iterations else "pissa"
    names = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "down_proj"]
    base, given = tiny(family, initializer_range=0.3), batch(family)
    # Weights whose spectrum falls, so that a randomised SVD is close to the exact one.
    with torch.no_grad():
        for name, p in base.named_parameters():
            if any(n in name for n in names) and p.dim() == 2:
                p.copy_(falling(*p.shape))
    ours = get_peft_model(
        copy.deepcopy(base), tunesmith.adapter("pissa", rank=4, alpha=8.0, target_modules=names, iterations=iterations)
    )
    options = {"fan_in_fan_out": True} if family == "gpt2" else {}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=start, **options)
    theirs = get_peft_model(copy.deepcopy(base), config)
    held = {name: m for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    layers = {name: m.active()[0] for name, m in ours.named_modules() if isinstance(m, TunesmithLayer)}
    assert held.keys() == layers.keys()
    for name, made in layers.items():
        A, B = held[name].lora_A["default"].weight, held[name].lora_B["default"].weight
        assert made.scaling == held[name].scaling["default"] == 2
        signs = torch.sign((made.A * A).sum(1))
        assert torch.allclose(made.A, signs[:, None] * A, atol=2e-3 if iterations else 1e-4)
        assert torch.allclose(made.B, signs * B, atol=2e-3 if iterations else 1e-4)
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            model.train()(**given).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = logits(theirs, given)
    assert float((expected - logits(base, given)).abs().max()) > 0.1
    assert torch.allclose(logits(ours, given), expected, atol=(2e-2 if iterations else 1e-3))


def test_the_base_stays_and_so_does_the_checkpoint(tmp_path: Path) -> None:
    """What is saved are A and B and their start, for the original checkpoint."""
    base, given = tiny("llama"), batch("llama")
    before = checkpoint(base)
    model = get_peft_model(base, tunesmith.adapter("pissa", rank=2))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    expected = logits(model, given)
    model.save_pretrained(tmp_path)
    assert same(checkpoint(model.unload()), before)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert torch.equal(logits(loaded, given), expected)


def test_a_start_in_bf16_is_the_base_where_pefts_is_rounded() -> None:
    """PEFT writes W - s B A back in bf16; here W stays as it is."""
    base, given = tiny("llama", initializer_range=0.3).to(torch.bfloat16), batch("llama")
    expected = logits(base, given).float()
    ours = get_peft_model(copy.deepcopy(base), tunesmith.adapter("pissa", rank=8))
    theirs = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=8, target_modules="all-linear", init_lora_weights="pissa")
    )
    far = [float((logits(model, given).float() - expected).abs().max()) for model in (ours, theirs)]
    assert far[0] <= 0.25 * far[1]
    made = [m for m in ours.modules() if isinstance(m, PiSSA)]
    assert {p.dtype for m in made for p in (*m.parameters(), *m.buffers())} == {torch.float32}


def test_the_randomised_svd_has_its_own_seed() -> None:
    W = random(40, 30)
    state = torch.random.get_rng_state()
    first = prepared(W, iterations=2, seed=5)
    torch.random.set_rng_state(state)
    made = PiSSA(describe(nn.Linear(30, 40), "layer"), rank=2, iterations=2)
    before = torch.random.get_rng_state()
    made.prepare(W, {})
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.A, prepared(W, iterations=2, seed=5).A)
    assert not torch.equal(first.A, prepared(W, iterations=2, seed=6).A)


def test_start_is_the_base_under_dropout() -> None:
    """What is subtracted sees the same dropout mask."""
    layer = nn.Linear(10, 12, bias=False)
    made = PiSSA(describe(layer, "layer"), rank=2, dropout=0.5)
    made.prepare(layer.weight.detach(), {})
    x = random(5, 10)
    assert torch.allclose(made.train()(x, stacked(layer, made.layer, [])), layer(x), atol=1e-6)
    with torch.no_grad():
        made.B.add_(1.0)
    below = stacked(layer, made.layer, [])
    assert not torch.allclose(made.train()(x, below), made.eval()(x, below), atol=1e-3)


def test_a_kernel_is_flattened_into_its_inputs() -> None:
    layer = nn.Conv2d(4, 8, 3)
    made = PiSSA(describe(layer, "layer"), rank=3)
    made.prepare(layer.weight.detach(), {})
    S = torch.linalg.svdvals(layer.weight.detach().flatten(1))
    rest = layer.weight.flatten(1) - made.scaling * made.B @ made.A
    assert float(rest.norm().detach()) == pytest.approx(float(S[3:].norm()), rel=1e-5)
    x = random(2, 4, 6, 6)
    assert torch.allclose(made(x, stacked(layer, made.layer, [])), layer(x), atol=1e-5)


def test_exported_rank_is_2r_on_the_original_weight() -> None:
    W = random(12, 10)
    made = prepared(W)
    with torch.no_grad():
        made.A.add_(random(2, 10, seed=4))
        made.B.add_(random(12, 2, seed=5))
    B, A = made.to_lora()
    assert (B.shape, A.shape) == ((12, 4), (4, 10))
    wanted = made.scaling * (made.B @ made.A - made.B0 @ made.A0)
    assert torch.allclose(B @ A, wanted, atol=1e-5)
    assert torch.allclose(made.weight(W) - W, wanted, atol=1e-5)
    assert sum(p.numel() for p in made.parameters()) == made.trainable_count() == 2 * (12 + 10)


def test_two_of_them_start_from_the_same_weight() -> None:
    """Whatever the first has learnt and whether it is merged, the second sees the original weight."""
    model = get_peft_model(tiny("llama"), tunesmith.adapter("pissa", rank=2))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    model.merge_adapter()
    model.add_adapter("second", tunesmith.adapter("pissa", rank=2))
    for layer in (m for m in model.modules() if isinstance(m, TunesmithLayer)):
        first, second = (layer.tunesmith_adapters[name][0] for name in ("default", "second"))
        assert torch.allclose(first.A0, second.A0, atol=1e-5)
        assert torch.allclose(first.B0, second.B0, atol=1e-5)
        assert not torch.allclose(first.A, second.A)
