"""Layer decay: the rate of every layer from what moves, the update with and without bias correction, bytes."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tunesmith.core.meters import state_bytes
from tunesmith.evidence.claim import Check, Claim
from tunesmith.optimizers.layer_decay import LayerDecay

BLOCKS, DELTA, LR = 5, 0.8, 0.25
SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
LAYERS = {
    "embeddings": 0,
    "embed_tokens": 0,
    **{f"layer.{i}": i + 1 for i in range(BLOCKS)},
    **{f"layers.{i}": i + 1 for i in range(BLOCKS)},
    "pooler": BLOCKS + 1,
    "classifier": BLOCKS + 1,
    "model.norm": BLOCKS + 1,
}

CLAIM = Claim(
    "layer-decay",
    says="Layer-wise learning-rate decay is what stabilises fine-tuning on few rows for large models and for ELECTRA; "
    "bias correction of Adam, which BERT's own optimizer lacks, is among what is compared.",
    where="abstract; optimization section",
    ran="What the two switches do, exactly: the rate of each layer, from what one step of plain descent over the same "
    "groups moves, for a BERT, an ELECTRA with a projection behind its embedding, and a Llama with a tied head; the "
    "first steps with and without correction; bytes of state. Runs that fail, with and without the decay, are in the "
    "claim of stable-finetuning.",
)


def _models() -> list[PreTrainedModel]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [
            BertForSequenceClassification(BertConfig(**SMALL, intermediate_size=24)).double(),
            ElectraForSequenceClassification(ElectraConfig(**SMALL, intermediate_size=24, embedding_size=8)).double(),
            LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=24, tie_word_embeddings=True)).double(),
        ]


@CLAIM.exact
def the_rate_of_each_layer() -> list[Check]:
    """Plain descent moves layer i of L by lr delta^(L + 1 - i), the embedding as layer 0, the head as L + 1."""
    worst, unknown, count = 0.0, 0, 0
    for model in _models():
        groups = LayerDecay(LayerDecay.groups(model, layer_decay=DELTA, weight_decay=0.1), LR).param_groups
        before = copy.deepcopy(model.state_dict())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        torch.optim.SGD([{"params": g["params"], "lr": g["lr"]} for g in groups], lr=99.0).step()
        for name, p in model.named_parameters():
            layer = next((i for word, i in LAYERS.items() if f".{word}." in f".{name}."), None)
            layer = 0 if "embeddings_project" in name else layer
            unknown += layer is None
            expected = LR * DELTA ** (BLOCKS + 1 - (layer or 0))
            worst = max(worst, float(((before[name] - p.detach()) / expected - 1).abs().max()))
            count += 1
    return [
        Check("largest error of a rate, share of it", worst, "<=", 1e-9),
        Check("parameters whose layer is not known here", unknown, "==", 0),
        Check("parameters", count, ">=", 150),
    ]


def _steps(grads: list[torch.Tensor], corrected: bool) -> list[float]:
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = LayerDecay([p], 1e-3, bias_correction=corrected, eps=1e-12)
    found = [0.0]
    for grad in grads:
        p.grad = grad
        optimizer.step()
        found.append(float(p[0].detach()))
    return [(a - b) / 1e-3 for a, b in pairwise(found)]


@CLAIM.exact
def bias_correction() -> list[Check]:
    """Of a constant gradient the corrected step is lr; the uncorrected one is lr (1 - b1^t) / sqrt(1 - b2^t)."""
    grads = [torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64)] * 30
    corrected, plain = _steps(grads, True), _steps(grads, False)
    formula = [(1 - 0.9**t) / (1 - 0.999**t) ** 0.5 for t in range(1, 31)]
    return [
        Check("first uncorrected step / lr", plain[0], ">=", 3.16),
        Check("the same, from above", plain[0], "<=", 3.163),
        Check(
            "error of the first 30, uncorrected",
            max(abs(a / b - 1) for a, b in zip(plain, formula, strict=True)),
            "<=",
            1e-6,
        ),
        Check("error of the first 30, corrected", max(abs(a - 1) for a in corrected), "<=", 1e-6),
        Check("largest uncorrected step / lr", max(plain), ">=", 6.0),
    ]


@CLAIM.exact
def one_rate_is_adamw() -> list[Check]:
    """With delta 1 the weights are AdamW's bit for bit, and the state is as large with either switch."""
    ours = _models()[0].float()
    theirs = copy.deepcopy(ours)
    mine = LayerDecay(LayerDecay.groups(ours, layer_decay=1.0, weight_decay=0.1), 1e-3, layer_decay=1.0)
    other = torch.optim.AdamW(mine.groups(theirs, layer_decay=1.0, weight_decay=0.1), lr=1e-3)
    ids = torch.randint(50, (4, 8), generator=torch.Generator().manual_seed(0))
    for model, optimizer in ((ours.eval(), mine), (theirs.eval(), other)):
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
            optimizer.step()
    differ = sum(int((p != q).sum()) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    plain = LayerDecay(ours.parameters(), 1e-3, bias_correction=False)
    plain.step()
    return [
        Check("entries that differ from AdamW's", differ, "==", 0),
        Check("bytes of state - AdamW's", state_bytes(mine) - state_bytes(other), "==", 0),
        Check("the same without correction", state_bytes(plain) - state_bytes(other), "==", 0),
    ]
