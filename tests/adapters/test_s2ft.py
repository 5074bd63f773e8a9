"""S2FT: which heads and channels, the slice's gradient, what is kept, exports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import tunesmith
from tests.zoo import batch, checkpoint, logits, tiny
from tunesmith.adapters.s2ft import S2FT
from tunesmith.core.meters import saved_bytes, state_bytes
from tunesmith.core.sparse_export import sparse_delta
from tunesmith.core.tuner_layer import TunesmithLayer
from tunesmith.errors import ModelError

ALL = {"o_ratio": 0.5, "d_ratio": 0.25, "v_ratio": 0.5, "u_ratio": 0.25}


def sliced(family: str = "llama", **options: Any) -> nn.Module:
    return get_peft_model(tiny(family), tunesmith.adapter("s2ft", **options))


def made(model: nn.Module) -> dict[str, S2FT]:
    return {m.layer.name: m for m in model.modules() if isinstance(m, S2FT) and m.D is not None}


def test_counts_are_of_the_whole_model_and_heads_are_whole() -> None:
    """Two blocks of 4 heads of size 8, 2 of keys and values, and 48 channels."""
    found = made(sliced(**ALL))
    columns = {
        kind: [m for n, m in found.items() if n.endswith(kind)] for kind in ("o_proj", "down_proj", "v_proj", "up_proj")
    }
    sizes = {kind: sum(len(m.indices) for m in held) for kind, held in columns.items()}
    assert sizes == {"o_proj": 4 * 8, "down_proj": 24, "v_proj": 2 * 8, "up_proj": 24}
    for m in (*columns["o_proj"], *columns["v_proj"]):
        heads = m.indices.view(-1, 8)
        assert torch.equal(heads, heads[:, :1] + torch.arange(8))
        assert bool((heads[:, 0] % 8 == 0).all())
    assert {tuple(m.D.shape) for m in columns["v_proj"]} <= {(8, 32), (16, 32)}


def test_layers_get_different_numbers_and_seeds_other_ones() -> None:
    one, again, other = (made(sliced(d_ratio=0.3, o_ratio=0.0, seed=s)) for s in (0, 0, 1))
    counts = [len(m.indices) for m in one.values()]
    assert sum(counts) == int(0.3 * 96)
    assert len(set(counts)) > 1
    assert all(torch.equal(one[n].indices, again[n].indices) for n in one)
    assert any(n not in other or not torch.equal(one[n].indices, other[n].indices) for n in one)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "t5", "vit"])
def test_the_slice_gets_its_part_of_the_full_gradient(family: str) -> None:
    model, given = sliced(family, o_ratio=0.5, d_ratio=0.25).eval(), batch(family)
    model(**given).loss.backward()
    full = tiny(family)
    full(**given).loss.backward()
    assert made(model)
    for name, m in made(model).items():
        dense = full.get_parameter(f"{name}.weight").grad
        dense = dense.T if tuple(dense.shape) != m.layer.shape or family == "gpt2" else dense
        torch.testing.assert_close(m.D.grad, dense[:, m.indices], atol=1e-6, rtol=1e-4)


def test_rows_of_values_and_up_projections_get_theirs() -> None:
    model, given = sliced(**{**ALL, "o_ratio": 0.0, "d_ratio": 0.0}).eval(), batch("llama")
    model(**given).loss.backward()
    full = tiny("llama")
    full(**given).loss.backward()
    for name, m in made(model).items():
        assert m.by_rows
        torch.testing.assert_close(m.D.grad, full.get_parameter(f"{name}.weight").grad[m.indices], atol=1e-6, rtol=1e-4)


def test_a_row_parallel_slice_keeps_its_columns_of_the_input() -> None:
    torch.manual_seed(0)
    model = sliced(d_ratio=0.25, o_ratio=0.0)
    name, m = next(iter(made(model).items()))
    layer = next(x for x in model.modules() if isinstance(x, TunesmithLayer) and x.spec.name == name).eval()
    x = torch.randn(10, 48, requires_grad=True)
    with saved_bytes(model) as kept:
        layer(x)
    k = len(m.indices)
    assert kept.bytes == 10 * k * 4


def test_state_is_eight_bytes_a_trained_number() -> None:
    model = sliced(**ALL)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(**batch("llama")).loss.backward()
    optimizer.step()
    assert state_bytes(optimizer) == sum(8 * p.numel() + 4 for p in trained)


def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    for m in made(model).values():
        with torch.no_grad():
            m.D.copy_(0.1 * torch.randn(m.D.shape, generator=g))
    return model


def test_two_on_disjoint_channels_add_without_interference() -> None:
    base, given = tiny("llama"), batch("llama")
    both: dict[str, Tensor] = {}
    deltas = []
    for selection in ("large", "small"):
        model = moved(sliced(selection=selection, d_ratio=0.2, o_ratio=0.25))
        deltas.append(sparse_delta(model))
        for name, t in checkpoint(model.merge_and_unload()).items():
            both[name] = both.get(name, tiny("llama").state_dict()[name]) + t - tiny("llama").state_dict()[name]
    total = deltas[0] + deltas[1]
    assert deltas[0].overlap(deltas[1]) == 0
    assert total.count == deltas[0].count + deltas[1].count
    with total.applied(base):
        found = logits(base, given)
    joint = tiny("llama")
    joint.load_state_dict(both)
    torch.testing.assert_close(found, logits(joint, given), atol=1e-5, rtol=1e-5)


def test_by_norm_the_largest_are_taken() -> None:
    base = tiny("llama")
    with torch.no_grad():
        base.get_parameter("model.layers.1.mlp.down_proj.weight")[:, 7] *= 100
    found = made(get_peft_model(base, tunesmith.adapter("s2ft", o_ratio=0.0, d_ratio=0.02, selection="large")))
    assert {n: m.indices.tolist() for n, m in found.items()} == {"model.layers.1.mlp.down_proj": [7]}


def test_what_cannot_be_chosen_is_a_clear_error() -> None:
    with pytest.raises(ModelError, match="choose no head and no channel"):
        sliced(o_ratio=0.01, d_ratio=0.001)
    with pytest.raises(ModelError, match=r"q_proj' neither reads nor makes any"):
        get_peft_model(tiny("llama"), tunesmith.adapter("s2ft", target_modules=["q_proj"]))


def test_fused_values_are_left_alone() -> None:
    assert not any("c_attn" in name for name in made(sliced("gpt2", **ALL)))
