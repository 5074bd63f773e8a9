"""What is special to LoLDU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import tunesmith
from tests.contracts.test_adapters import move
from tests.zoo import batch, checkpoint, logits, same, tiny
from tunesmith.adapters.loldu import LoLDU, ldu
from tunesmith.core.adapter import stacked
from tunesmith.core.layer import describe
from tunesmith.errors import ModelError

SHAPES = [(12, 12), (20, 9), (9, 20)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prepared(module: nn.Module, **options: Any) -> LoLDU:
    made = LoLDU(describe(module, "layer"), **{"rank": 4, **options}).eval()
    made.prepare(stacked(module, made.layer, []).weight.detach(), {})
    return made


def layers(model: nn.Module) -> list[LoLDU]:
    return [m for m in model.modules() if isinstance(m, LoLDU)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_factors_are_the_first_of_a_whole_decomposition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W, most = random(*shape).to(dtype), min(shape)
    before = W.clone()
    P, L, U = torch.linalg.lu(W.double())
    D = U.diagonal()
    for rank in (1, 4, most):
        left, diagonal, right, rows = ldu(W, rank)
        assert torch.allclose(left, (P @ L)[:, :rank])
        assert torch.allclose(diagonal, D[:rank])
        assert torch.allclose(right, (U[:most] / D[:, None])[:rank])
        assert torch.equal(rows, P.argmax(0)[:rank])
        assert torch.equal(W, before)
    assert torch.allclose(left * diagonal @ right, W.double()), "at full rank they are the weight"


def test_columns_without_a_pivot() -> None:
    W = random(10, 8)
    W[:, 2] = 0
    W[:, 4] = 3 * W[:, 1] - W[:, 3]
    left, diagonal, right, rows = ldu(W, 8)
    assert (diagonal == 0).nonzero().flatten().tolist() == [2, 4]
    assert len(set(rows.tolist())) == 8, "no row is a pivot twice"
    assert torch.equal(left[:, [2, 4]], nn.functional.one_hot(rows[[2, 4]], 10).T.double()), "noise is no direction"
    assert float(right.abs().max()) < 100
    assert torch.equal(right.diagonal(), torch.ones(8, dtype=torch.float64))
    assert torch.equal(left[rows].diagonal(), torch.ones(8, dtype=torch.float64))
    assert ldu(torch.zeros(6, 6), 6)[3].tolist() == [0, 1, 2, 3, 4, 5]
    for given in (torch.zeros(6, 6), W):
        module = nn.Linear(given.shape[1], given.shape[0], bias=False)
        module.weight.data.copy_(given)
        made, x = prepared(module, rank=6), random(3, given.shape[1])
        out = made(x, stacked(module, made.layer, []))
        assert torch.equal(out, module(x))
        out.square().sum().backward()
        assert made.z.grad is not None
        assert bool(made.z.grad.isfinite().all())


@pytest.mark.parametrize("alpha", [1.0, 16.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_and_weight_are_those_of_the_formula(shape: tuple[int, int], alpha: float) -> None:
    module = nn.Linear(shape[1], shape[0])
    made, x = prepared(module, alpha=alpha, train_scale=True), random(7, shape[1])
    W = module.weight.detach()
    P, L, U = torch.linalg.lu(W)
    left, right = (P @ L)[:, :4], (U / U.diagonal()[:, None])[:4]
    out = made(x, stacked(module, made.layer, []))
    assert torch.equal(out, module(x)), "it starts at the base to the last bit"
    G = (2 * out.T @ x).detach()
    out.square().sum().backward()
    expected = alpha / 4 * (left.T @ G @ right.T).diagonal()
    assert made.z.grad is not None
    assert made.scale is not None
    assert made.scale.grad is not None
    assert torch.allclose(made.z.grad, expected, rtol=1e-3, atol=1e-3)
    by_scale = (left.T @ G @ right.T).diagonal() @ U.diagonal()[:4]
    assert torch.allclose(made.scale.grad, by_scale, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        made.z.add_(random(4, seed=1))
        made.scale.fill_(0.7)
        z0 = U.diagonal()[:4]
        whole = W - alpha / 4 * (left * z0) @ right + 0.7 * (left * made.z) @ right
        assert torch.allclose(made.weight(W), whole, atol=1e-4)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(12, 8), (3, 12)),
        (Conv1D(8, 12), (3, 12)),
        (nn.Conv2d(4, 8, 3, padding=1), (2, 4, 6, 6)),
        (nn.Conv2d(4, 8, 3, groups=2), (2, 4, 6, 6)),
        (nn.Embedding(12, 8, padding_idx=1), None),
        (Gemma3TextScaledWordEmbedding(12, 8, padding_idx=1, embed_scale=3.0), None),
    ],
    ids=["linear", "Conv1D", "conv", "grouped conv", "embedding", "scaled embedding"],
)
def test_the_forward_pass_is_that_of_the_weight(module: nn.Module, shape: tuple | None) -> None:
    made = move(prepared(module), 0.5)
    x = torch.arange(12).view(3, 4) if shape is None else random(*shape)
    below = stacked(module, made.layer, [])
    by_weight = below.apply(x, made.weight(below.weight), below.bias)
    assert torch.allclose(made(x, below), by_weight, atol=1e-5)
    assert not torch.allclose(module(x), by_weight, atol=0.1)
    assert made.left.shape == (made.layer.shape[0], 4), "a row of L for each row of the weight as it is stored"


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ("constant", lambda z0: z0.mean().expand_as(z0)),
        ("zeros", torch.zeros_like),
        ("ones", torch.ones_like),
        ("lu", lambda z0: z0),
    ],
)
def test_where_z_starts(init: str, expected: Any) -> None:
    module, x = nn.Linear(16, 16), random(3, 16)
    made = prepared(module, rank=8, init=init)
    z0 = ldu(module.weight, 8)[1].float()
    assert torch.equal(made.z.detach(), expected(z0))
    left, right = made.left, made.right
    change = x @ (made.scaling * left * (made.z - z0) @ right).T
    assert torch.allclose(made(x, stacked(module, made.layer, [])), module(x) + change, atol=1e-5)


def test_random_starts_follow_the_diagonal_and_the_seed() -> None:
    module = nn.Linear(512, 512)
    module.weight.data += 0.3
    z0 = ldu(module.weight, 512)[1].float()
    for init in ("uniform", "normal"):
        first, again, other = (prepared(module, rank=512, init=init, seed=s).z.detach() for s in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        if init == "uniform":
            assert float(first.abs().max()) <= abs(float(z0.mean())) / 2
            assert float(first.std()) == pytest.approx(abs(float(z0.mean())) / 12**0.5, rel=0.1)
        else:
            assert float(first.mean() - z0.mean()) == pytest.approx(0, abs=0.2 * float(z0.std()))
            assert float(first.std()) == pytest.approx(float(z0.std()), rel=0.1)
    assert bool(prepared(nn.Linear(4, 4), rank=1, init="normal").z.isfinite().all())


@pytest.mark.parametrize("train_scale", [False, True])
def test_what_trains_and_what_is_saved(train_scale: bool, tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), tunesmith.adapter("loldu", rank=4, train_scale=train_scale))
    count = len(layers(model))
    assert model.get_nb_trainable_parameters()[0] == count * (4 + train_scale)
    assert all(p.numel() in (1, 4) for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == {"z", "start", "rows"} | ({"scale"} if train_scale else set())
    assert sum(t.numel() for t in saved.values()) == count * (12 + train_scale)


def test_z_is_there_for_an_optimizer_made_before_the_first_forward_pass() -> None:
    model, given = get_peft_model(tiny("gpt2"), tunesmith.adapter("loldu")), batch("gpt2")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    before = [made.z.detach().clone() for made in layers(model)]
    model.train()(**given).loss.backward()
    optimizer.step()
    assert all(not torch.equal(made.z, z) for made, z in zip(layers(model), before, strict=True))


def test_no_tensor_has_the_size_of_a_permutation() -> None:
    made = prepared(nn.Linear(64, 96), rank=4)
    assert max(t.numel() for t in [*made.parameters(), *made.buffers()]) == 96 * 4


@pytest.mark.parametrize("change", ["another model", "noise", "other rows"])
def test_another_base_is_an_error(change: str, tmp_path: Path) -> None:
    base = tiny("llama")
    model = move(get_peft_model(copy.deepcopy(base), tunesmith.adapter("loldu", rank=4)))
    model.save_pretrained(tmp_path)
    other = tiny("llama", seed=1) if change == "another model" else copy.deepcopy(base)
    with torch.no_grad():
        for p in other.parameters():
            if change == "noise":
                p.mul_(1.02)
            elif p.dim() == 2:
                p.copy_(p.flip(0))
    with pytest.raises(ModelError, match=r"LoLDU on '.*' was trained on another weight.*dtype and quantisation"):
        PeftModel.from_pretrained(other, tmp_path)


def test_a_base_that_rounding_changed_is_taken() -> None:
    base = tiny("llama")
    made = prepared(base.model.layers[0].mlp.up_proj)
    state = checkpoint(move(made, 0.3))
    base.to(torch.bfloat16).to(torch.float32)
    other = prepared(base.model.layers[0].mlp.up_proj)
    assert not torch.equal(other.start, made.start)
    other.load_state_dict(state)
    assert torch.equal(other.start, made.start), "z is compared with what it started from"
    assert torch.equal(other.z, made.z)


def test_one_thread_or_two_give_the_same_rows() -> None:
    W, found = random(700, 300), []
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(ldu(W, 64))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(*found, strict=True)) if i in (0, 3))


def test_a_second_adapter_starts_from_the_original_weight() -> None:
    base, given = tiny("llama"), batch("llama")
    model = move(get_peft_model(copy.deepcopy(base), tunesmith.adapter("loldu", rank=4)), 0.3)
    model.merge_adapter()
    model.add_adapter("second", tunesmith.adapter("loldu", rank=4))
    model.unmerge_adapter()
    model.set_adapter("second")
    assert torch.equal(logits(model, given), logits(base, given))
    assert same(checkpoint(model.unload()), checkpoint(base))


def test_ranks_above_the_diagonal_are_errors() -> None:
    with pytest.raises(ModelError, match=r"rank 9 needs as many diagonal entries; 'layer' of shape \(8, 12\) has 8"):
        LoLDU(describe(nn.Linear(12, 8), "layer"), rank=9)


def test_counting_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = tiny("llama")
        adapted = get_peft_model(model, tunesmith.adapter("loldu", rank=4))
    assert adapted.get_nb_trainable_parameters()[0] == 4 * len(layers(adapted))


def test_exports_as_a_lora(tmp_path: Path) -> None:
    given, targets = batch("gpt2"), ["c_attn", "c_proj", "wpe"]
    model = move(get_peft_model(tiny("gpt2"), tunesmith.adapter("loldu", rank=4, target_modules=targets)), 0.3)
    expected = logits(model, given)
    tunesmith.export_lora(model, tmp_path / "lora")
    exported = PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "lora")
    assert exported.peft_config["default"].r == 4
    assert torch.allclose(logits(exported, given), expected, atol=1e-5)
