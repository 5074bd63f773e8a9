"""What is special to FLoRA."""

from __future__ import annotations

import copy
import math
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
from tunesmith.adapters.flora import FLoRA
from tunesmith.core.adapter import stacked
from tunesmith.core.layer import describe
from tunesmith.errors import ModelError
from tunesmith.evidence.kit_bytes import LiveBytes


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(layer: nn.Module, **options: Any) -> FLoRA:
    made = FLoRA(describe(layer, "layer"), **{"rank": 3, "dropout": 0.0, **options})
    with torch.no_grad():
        made.core.copy_(random(*made.ranks, seed=1))
    return made


def by_hand(made: FLoRA) -> Tensor:
    """The change, one entry of the core at a time."""
    total = torch.zeros(made.layer.shape)
    for index in torch.ones(made.ranks).nonzero().tolist():
        term = made.core[tuple(index)]
        for U, r in zip(made.factors, index, strict=True):
            term = term[..., None] * U[:, r]
        total = total + made.scale * term
    return total.detach()


def both(layer: nn.Module, made: FLoRA, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and that of the layer with the change added to its weight by hand."""
    changed = copy.deepcopy(layer)
    with torch.no_grad():
        changed.weight += by_hand(made)
        return made(x, stacked(layer, made.layer, [])), changed(x)


CONVOLUTIONS = [
    (nn.Conv1d(6, 8, 5, padding=2), (2, 6, 9)),
    (nn.Conv2d(6, 8, 1), (2, 6, 4, 4)),
    (nn.Conv2d(6, 8, (1, 3), stride=(2, 1)), (2, 6, 5, 6)),
    (nn.Conv2d(6, 8, 3, padding="same", padding_mode="reflect", bias=False), (2, 6, 5, 5)),
    (nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2, groups=2), (2, 6, 9, 9)),
    (nn.Conv2d(6, 12, 3, groups=6), (2, 6, 5, 5)),
    (nn.Conv3d(4, 6, 2, dilation=2), (2, 4, 5, 5, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda v: v.extra_repr() if hasattr(v, "weight") else "")
def test_convolutions(layer: nn.Module, shape: tuple[int, ...]) -> None:
    made = moved(layer)
    out, wanted = both(layer, made, random(*shape))
    assert torch.allclose(out, wanted, atol=1e-4 * float(wanted.abs().max()))
    without_batch = made(random(*shape)[0], stacked(layer, made.layer, []))
    assert torch.allclose(without_batch, out[0], atol=1e-5 * float(wanted.abs().max()))


@given(out=st.integers(1, 9), into=st.integers(1, 9), rank=st.integers(1, 12), out_rank=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_linear_layers_and_their_export(out: int, into: int, rank: int, out_rank: int) -> None:
    layer = nn.Linear(into, out)
    made = moved(layer, rank=rank, out_rank=out_rank, scale=0.5)
    assert made.ranks == (min(out, out_rank), min(into, rank))
    got, wanted = both(layer, made, random(4, into))
    assert torch.allclose(got, wanted, atol=1e-4)
    B, A = made.to_lora()
    assert (B.shape, A.shape) == ((out, min(made.ranks)), (min(made.ranks), into))
    assert torch.allclose(B @ A, by_hand(made), atol=1e-4)


class Scaled(nn.Embedding):
    """Gemma's: what is looked up is multiplied."""

    def forward(self, x: Tensor) -> Tensor:
        return 3.0 * super().forward(x)


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize(("rank", "out_rank"), [(2, 5), (5, 2)])
def test_embeddings(kind: type[nn.Embedding], rank: int, out_rank: int) -> None:
    layer = kind(9, 6)
    made = moved(layer, rank=rank, out_rank=out_rank)
    assert made.ranks == (rank, out_rank)
    got, wanted = both(layer, made, torch.tensor([[0, 8, 3], [3, 1, 1]]))
    assert torch.allclose(got, wanted, atol=1e-4)
    B, A = made.to_lora()
    assert (B.shape, A.shape) == ((6, 2), (2, 9))
    assert torch.allclose((B @ A).T, by_hand(made), atol=1e-4)


def test_ranks_stand_in_the_order_of_the_weight_and_are_cut_to_it() -> None:
    made = FLoRA(describe(nn.Conv2d(3, 64, (1, 7)), "layer"), rank=16, out_rank=5, kernel_rank=2)
    assert made.ranks == (5, 3, 1, 2)
    assert [tuple(U.shape) for U in made.factors] == [(64, 5), (3, 3), (1, 1), (7, 2)]
    assert made.trainable_count() == 5 * 3 * 2 + 64 * 5 + 3 * 3 + 1 + 7 * 2
    depthwise = FLoRA(describe(nn.Conv2d(8, 8, 3, groups=8), "layer"), rank=4)
    assert depthwise.ranks == (4, 1, 2, 2), "the input dimension of a grouped convolution is in / groups"


@pytest.mark.parametrize(("init", "std"), [("kaiming", math.sqrt(0.5 / 8)), ("normal", 0.02)])
def test_starts(init: str, std: float) -> None:
    made = FLoRA(describe(nn.Linear(2000, 3000), "layer"), rank=8, init=init)
    assert not bool(made.core.any())
    for U in made.factors:
        assert float(U.detach().std()) == pytest.approx(std, rel=0.05)


def test_kaiming_is_torchs() -> None:
    wanted = nn.init.kaiming_normal_(torch.empty(4000, 8), a=math.sqrt(3)).std()
    made = FLoRA(describe(nn.Linear(4000, 4000), "layer"), rank=8)
    assert float(made.factors[1].detach().std()) == pytest.approx(float(wanted), rel=0.05)


@pytest.mark.parametrize("groups", [1, 2])
def test_dropout_acts_on_the_input_of_the_change_alone(groups: int) -> None:
    layer = nn.Conv2d(4, 6, 1, groups=groups)
    made = moved(layer, dropout=0.5)
    x, below = torch.ones(1, 4, 40, 40), stacked(layer, made.layer, [])
    change = (made.train()(x, below) - layer(x)).detach()
    whole = (made.eval()(x, below) - layer(x)).detach()
    assert not torch.allclose(change, whole, atol=1e-2)
    assert torch.allclose(change.mean((2, 3)), whole.mean((2, 3)), atol=0.15 * float(change.std()))
    idle = FLoRA(describe(layer, "layer"), dropout=0.5).train()
    assert torch.equal(idle(x, below), layer(x)), "the layer's own input is not dropped"


def test_exported_it_is_pefts_lora(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    config = tunesmith.adapter("flora", rank=4, out_rank=3, target_modules=["0", "3"])
    model = get_peft_model(copy.deepcopy(base), config).eval()
    for made in (m for m in model.modules() if isinstance(m, FLoRA)):
        made.core.data.copy_(random(*made.ranks))
    x = random(2, 3, 8, 8)
    expected = model(x)
    tunesmith.export_lora(model, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    assert torch.allclose(loaded(x), expected, atol=1e-4 * float(expected.detach().abs().max()))


def test_a_grouped_convolution_is_not_exported(tmp_path: Path) -> None:
    model = get_peft_model(
        nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), tunesmith.adapter("flora", target_modules=["0"])
    )
    with pytest.raises(ModelError, match="no low-rank change of '0'"):
        tunesmith.export_lora(model, tmp_path / "lora")


def test_no_tensor_of_the_size_of_the_weight() -> None:
    for layer, x in ((nn.Linear(1000, 1000), random(2, 1000)), (nn.Conv2d(200, 200, 3), random(1, 200, 4, 4))):
        layer.requires_grad_(False)
        made = moved(layer, rank=4)
        below = stacked(layer, made.layer, [])
        with LiveBytes() as meter:
            made(x, below).sum().backward()
        assert meter.peak < layer.weight.nbytes / 10  # type: ignore[operator]


def test_bf16_layers_keep_their_type_and_learn_in_float32() -> None:
    layer = nn.Conv2d(4, 6, 3).to(torch.bfloat16)
    made = moved(layer)
    x = random(1, 4, 6, 6).to(torch.bfloat16)
    out = made(x, stacked(layer, made.layer, []))
    assert out.dtype == torch.bfloat16
    wanted = nn.functional.conv2d(x.float(), layer.weight.float() + by_hand(made), layer.bias.float()).detach()
    assert torch.allclose(out.float(), wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in made.parameters())


def test_the_first_step_moves_the_core_alone() -> None:
    model, inputs = get_peft_model(tiny("vit"), tunesmith.adapter("flora", rank=2)), batch("vit")
    start = logits(model, inputs)
    model.train()(**inputs).loss.backward()
    for made in (m for m in model.modules() if isinstance(m, FLoRA)):
        assert bool(made.core.grad.any())
        assert not any(bool(U.grad.any()) for U in made.factors)
    torch.optim.Adam(model.parameters(), lr=1e-2).step()
    assert not torch.allclose(logits(model, inputs), start, atol=1e-4)
