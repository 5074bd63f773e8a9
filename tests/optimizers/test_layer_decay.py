"""What is special to layer decay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

from tests.zoo import FAMILIES, batch, checkpoint, same, tiny
from tunesmith.core.modelmap import depths
from tunesmith.errors import ModelError, RecipeError
from tunesmith.optimizers.layer_decay import LayerDecay, layers_below_head

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}


def built(model: nn.Module, lr: float = 1.0, weight_decay: float = 0.0, **options: Any) -> LayerDecay:
    return LayerDecay(LayerDecay.groups(model, weight_decay=weight_decay, **options), lr, **options)


def rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_plain_descent_moves_each_layer_by_its_rate(family: str) -> None:
    """SGD over the same groups: what moved, over the gradient, is lr delta^(L + 1 - i)."""
    changes = {"gpt2": {"n_layer": 4}, "t5": {}}.get(family, {"num_hidden_layers": 4})
    model = tiny(family, **changes).double()
    groups = built(model, 0.5, layer_decay=0.8).param_groups
    before = checkpoint(model)
    g = torch.Generator().manual_seed(0)
    grads = {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = grads[name]
    torch.optim.SGD([{"params": group["params"], "lr": group["lr"]} for group in groups], lr=9.0).step()
    blocks = 2 if family == "t5" else 4
    place = depths(grads)
    for name, p in model.named_parameters():
        depth = place[name]
        if depth is not None:
            i = depth.index + 1
        elif any(word in name for word in ("embed", "wte", "wpe", "shared", "cls_token")):
            i = 0
        else:
            i = blocks + 1
        moved = (before[name] - p) / grads[name]
        assert torch.allclose(moved, torch.full_like(moved, 0.5 * 0.8 ** (blocks + 1 - i)), rtol=1e-9), name


def layer(model: nn.Module, name: str) -> int:
    return layers_below_head(model)[name]


def test_electra_and_relative_positions() -> None:
    electra = T.ElectraForSequenceClassification(T.ElectraConfig(**SMALL, num_hidden_layers=3, embedding_size=8))
    assert layer(electra, "electra.embeddings_project.weight") == 4
    assert layer(electra, "electra.embeddings.LayerNorm.weight") == 4
    assert layer(electra, "electra.encoder.layer.0.output.dense.weight") == 3
    assert layer(electra, "electra.encoder.layer.2.output.dense.weight") == 1
    assert layer(electra, "classifier.out_proj.weight") == 0
    deberta = T.DebertaV2ForSequenceClassification(
        T.DebertaV2Config(
            **SMALL, num_hidden_layers=2, relative_attention=True, position_buckets=4, norm_rel_ebd="layer_norm"
        )
    )
    assert layer(deberta, "deberta.encoder.rel_embeddings.weight") == 3
    mpnet = T.MPNetForSequenceClassification(T.MPNetConfig(**SMALL, num_hidden_layers=2))
    assert layer(mpnet, "mpnet.encoder.relative_attention_bias.weight") == 3
    bert = tiny("bert")
    assert layer(bert, "bert.pooler.dense.weight") == layer(bert, "classifier.weight") == 0


def test_a_tied_head_is_one_with_the_embedding() -> None:
    tied, loose = (tiny("llama", tie_word_embeddings=tie) for tie in (True, False))
    assert layer(tied, "model.embed_tokens.weight") == 3
    assert "lm_head.weight" not in layers_below_head(tied)
    assert (layer(loose, "model.embed_tokens.weight"), layer(loose, "lm_head.weight")) == (3, 0)
    assert layer(loose, "model.norm.weight") == 0


def test_stacks_of_an_encoder_decoder_count_from_their_own_top() -> None:
    model = tiny("t5", num_layers=3, num_decoder_layers=2)
    assert layer(model, "encoder.block.2.layer.0.SelfAttention.q.weight") == 1
    assert layer(model, "encoder.block.0.layer.0.SelfAttention.q.weight") == 3
    assert layer(model, "decoder.block.0.layer.0.SelfAttention.q.weight") == 2
    assert layer(model, "shared.weight") == 4


def test_weight_decay_and_layers_multiply() -> None:
    model = tiny("bert")
    for group in built(model, 1.0, weight_decay=0.3, layer_decay=0.5).param_groups:
        assert group["lr"] == 0.5 ** group["layers_below_head"]
        assert all((p.dim() > 1) == (group["weight_decay"] == 0.3) for p in group["params"])
    frozen = tiny("bert")
    frozen.bert.embeddings.requires_grad_(False)
    assert all(group["layers_below_head"] < 3 for group in built(frozen).param_groups)


def test_a_schedule_keeps_the_ratios() -> None:
    model = tiny("bert")
    optimizer = built(model, 1e-2, layer_decay=0.5)
    scheduler = T.get_linear_schedule_with_warmup(optimizer, 2, 10)
    optimizer.step()
    scheduler.step()
    assert rates(optimizer, model)["classifier.weight"] == pytest.approx(5e-3)
    assert rates(optimizer, model)["bert.embeddings.word_embeddings.weight"] == pytest.approx(5e-3 / 8)


def test_with_one_rate_and_correction_it_is_torchs_adamw() -> None:
    ours, theirs = tiny("bert"), tiny("bert")
    mine = built(ours, 1e-2, layer_decay=1.0)
    other = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        for model, optimizer in ((ours, mine), (theirs, other)):
            optimizer.zero_grad()
            model(**batch("bert")).loss.backward()
            optimizer.step()
    assert same(checkpoint(ours), checkpoint(theirs))


def reference(p: Tensor, grads: list[Tensor], lr: float, decay: float, corrected: bool) -> Tensor:
    b1, b2, eps = 0.9, 0.999, 1e-8
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        first, second = (1 - b1**t, 1 - b2**t) if corrected else (1.0, 1.0)
        p = p - lr * decay * p - lr * (m / first) / ((v / second).sqrt() + eps)
    return p


@pytest.mark.parametrize("corrected", [True, False])
def test_the_update_is_the_formula(corrected: bool) -> None:
    g = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(5, 4, generator=g, dtype=torch.float64))
    grads = [torch.randn(5, 4, generator=g, dtype=torch.float64) for _ in range(4)]
    start = p.detach().clone()
    optimizer = LayerDecay([p], 0.1, 0.2, bias_correction=corrected)
    for grad in grads:
        p.grad = grad
        optimizer.step()
    assert torch.allclose(p, reference(start, grads, 0.1, 0.2, corrected), rtol=1e-12)


def test_without_correction_the_first_step_is_larger() -> None:
    for corrected, size in ((True, 1.0), (False, 0.1 / 0.001**0.5)):
        p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        optimizer = LayerDecay([p], 1e-3, bias_correction=corrected)
        p.grad = torch.tensor([2.0, -5.0, 0.1], dtype=torch.float64)
        optimizer.step()
        assert torch.allclose(p.abs(), torch.full_like(p, 1e-3 * size), rtol=1e-5)


def test_an_uncorrected_state_goes_on_bitwise_and_sets_embeddings_like_the_rest() -> None:
    model = tiny("llama").bfloat16()
    optimizer = built(model, 1e-2, bias_correction=False)

    def go(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(**batch("llama")).loss.backward()
        optimizer.step()

    go(model, optimizer)
    second = copy.deepcopy(model)
    resumed = built(second, 9.0, bias_correction=False)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go(model, optimizer)
    go(second, resumed)
    assert same(checkpoint(model), checkpoint(second))


def test_what_it_does_not_take() -> None:
    with pytest.raises(ModelError, match="has no numbered blocks"):
        LayerDecay.groups(nn.Sequential())
    with pytest.raises(RecipeError, match="layer_decay"):
        LayerDecay([nn.Parameter(torch.zeros(1))], layer_decay=1.5)
