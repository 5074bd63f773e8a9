"""Markov chains of order 1, whose best loss is known, and small GPT-2 models trained on them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from tunesmith.evidence.kit_tune import tune

STATES = 64


def chain(seed: int, concentration: float = 0.05) -> Tensor:
    """Transition probabilities, (STATES, STATES) float64: each row from a symmetric Dirichlet distribution."""
    g = torch.Generator().manual_seed(seed)
    gamma = torch._standard_gamma(torch.full((STATES, STATES), concentration, dtype=torch.float64), generator=g)
    return gamma / gamma.sum(1, keepdim=True)


def sample(transitions: Tensor, rows: int, length: int, seed: int) -> Tensor:
    """Sequences that begin in a uniform state, (rows, length) int64."""
    g = torch.Generator().manual_seed(seed)
    states = [torch.randint(STATES, (rows,), generator=g)]
    for _ in range(length - 1):
        states.append(torch.multinomial(transitions[states[-1]], 1, generator=g)[:, 0])
    return torch.stack(states, dim=1)


def best_loss(transitions: Tensor, ids: Tensor) -> float:
    """Mean -log p of each token after the first under the chain itself, nats."""
    return float(-transitions[ids[:, :-1], ids[:, 1:]].log().mean())


def model(width: int, seed: int, initializer_range: float = 0.02) -> GPT2LMHeadModel:
    """An untrained GPT-2 of two blocks without dropout."""
    config = GPT2Config(
        vocab_size=STATES,
        n_positions=64,
        n_embd=width,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=initializer_range,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def train(
    model: GPT2LMHeadModel, transitions: Tensor, *, steps: int, lr: float, seed: int, rows: int = 32, length: int = 32
) -> GPT2LMHeadModel:
    """AdamW with a linear schedule whose first tenth warms up; every step sees new sequences. Gives the model back."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    given = sample(transitions, steps * rows, length, seed).split(rows)
    tune(model, optimizer, [{"input_ids": ids, "labels": ids} for ids in given])
    return model.eval()


@torch.no_grad()
def loss(model: GPT2LMHeadModel, ids: Tensor) -> float:
    """Mean cross-entropy of each token after the first, nats."""
    logits = model(input_ids=ids).logits[:, :-1]
    return float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
