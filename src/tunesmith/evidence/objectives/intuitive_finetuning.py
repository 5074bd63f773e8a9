"""Intuitive Fine-Tuning: the limits of its formula exactly; free-running answers against plain fine-tuning."""

from __future__ import annotations

import copy
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from tunesmith.core.loss import labelled, token_losses
from tunesmith.core.objective import Objective
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.objectives.intuitive_finetuning import IntuitiveFineTuning
from tunesmith.objectives.sft import SFT

DIGITS, EQUALS, WIDTH = 4, 10, 48
STOPS, ROWS, RATES = (150, 300, 600), 64, (1e-3, 3e-3, 1e-2)
Batch = dict[str, Tensor]

CLAIM = Claim(
    "intuitive-finetuning",
    says="With nothing but SFT data, a model that predicts from a blend of the answer and its own guesses, each token "
    "weighted by what follows, does on a par with or better than SFT followed by alignment.",
    where="abstract",
    ran="The limits of the formula on a GPT-2 of width 48. Then such a model, from nothing, learns the running sums of "
    "four digits modulo 10: 600 steps of 64 rows with AdamW at a constant rate, three rates for each side, the best "
    "chosen by exact match on other prompts, summed over steps 300 and 600. Reported: the share of 500 unseen prompts "
    "that it answers without a fault, running free. A step of IFT costs two forward passes where SFT's costs one; the "
    "comparison is at equal steps.",
)


def _model(seed: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=11,
        n_positions=16,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def _batch(numbers: Tensor) -> Batch:
    """Rows of four digits, an equals sign and their running sums, labels on the sums."""
    digits = torch.stack([numbers // 10**i % 10 for i in reversed(range(DIGITS))], dim=1)
    ids = torch.cat([digits, torch.full((len(digits), 1), EQUALS), digits.cumsum(1) % 10], dim=1)
    labels = ids.clone()
    labels[:, : DIGITS + 1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@lru_cache
def _split(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts to train on, to choose a rate by, and to report."""
    every = torch.randperm(10**DIGITS, generator=torch.Generator().manual_seed(seed))
    return every[1000:], every[:500], every[500:1000]


def _gradients(objective: Objective, model: nn.Module, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    loss = objective(model, batch)[0]
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


@CLAIM.exact
def without_blend_and_discount_it_is_sft() -> list[Check]:
    """With lambda = 0 and gamma = 0 loss and gradient are those of SFT, rows being equally long."""
    model, batch = _model(0).eval(), _batch(_split(0)[0][:ROWS])
    ours, mine = _gradients(IntuitiveFineTuning(lam=0.0, gamma=0.0), model, batch)
    theirs = model(**batch).loss
    other = torch.autograd.grad(theirs, list(model.parameters()))
    worst = max(float((a - b).abs().max()) for a, b in zip(mine, other, strict=True))
    return [
        Check("difference of the loss from transformers' own, nats", float((ours - theirs.detach()).abs()), "<=", 1e-6),
        Check("largest difference of the gradient", worst, "<=", 1e-6),
    ]


@CLAIM.exact
def weights_are_the_formula() -> list[Check]:
    """w_t = n u_t / sum u with u_t = sum_k gamma^(k - t) l_k / n, and their mean is 1."""
    model, batch = _model(0).eval(), _batch(_split(0)[0][:ROWS])
    with torch.no_grad():
        found = labelled(model, batch)
        losses = token_losses(found)
        weights, _ = IntuitiveFineTuning(gamma=0.95).weights(losses, found)
    rows = losses.view(ROWS, DIGITS).double()
    u = torch.stack([sum(0.95 ** (k - t) * rows[:, k] for k in range(t, DIGITS)) for t in range(DIGITS)], dim=1)
    expected = DIGITS * u / u.sum(1, keepdim=True)
    weights = weights.view(ROWS, DIGITS)
    return [
        Check("largest difference from the formula", float((weights - expected).abs().max()), "<=", 1e-5),
        Check("largest difference of a row's mean from 1", float((weights.mean(1) - 1).abs().max()), "<=", 1e-6),
    ]


@CLAIM.exact
def weights_carry_gradient() -> list[Check]:
    """As released, the gradient flows through the weights; detached, the loss is the same and its slope is not."""
    model, batch = _model(0).eval(), _batch(_split(0)[0][:ROWS])
    loss, through = _gradients(IntuitiveFineTuning(lam=0.0), model, batch)
    same, detached = _gradients(IntuitiveFineTuning(lam=0.0, detach_weights=True), model, batch)
    apart = sum(float((a - b).square().sum()) for a, b in zip(through, detached, strict=True)) ** 0.5
    size = sum(float(a.square().sum()) for a in detached) ** 0.5
    return [
        Check("difference of the losses, nats", float((loss - same).abs()), "==", 0),
        Check("difference of the gradients / size of the detached one", apart / size, ">=", 1e-3),
    ]


@CLAIM.exact
def a_step_is_two_forward_passes() -> Check:
    """A step runs the model twice, once without gradient."""
    model = _model(0)
    modes: list[bool] = []
    model.transformer.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    IntuitiveFineTuning()(model, _batch(_split(0)[0][:ROWS]))
    return Check("passes, of which the first without gradient", len(modes) if modes == [False, True] else 0, "==", 2)


@torch.no_grad()
def _exact_match(model: nn.Module, numbers: Tensor) -> float:
    """The share of rows whose four sums come out right when the model reads its own answers."""
    model.eval()
    expected = _batch(numbers)["input_ids"]
    ids = expected[:, : DIGITS + 1]
    for _ in range(DIGITS):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    model.train()
    return float((ids == expected).all(1).float().mean())


def _learn(objective: Objective, seed: int, lr: float) -> dict[int, nn.Module]:
    """The model at each of STOPS."""
    model, given = _model(seed), _split(seed)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    g = torch.Generator().manual_seed(100 + seed)
    kept = {}
    for step in range(1, STOPS[-1] + 1):
        objective(model, _batch(given[torch.randint(len(given), (ROWS,), generator=g)]))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in STOPS:
            kept[step] = copy.deepcopy(model)
    return kept


@CLAIM.comparison
def running_sums(seed: int) -> dict[str, float]:
    """Exact match on unseen prompts after 150, 300 and 600 steps, each side at its best rate."""
    _, choosing, reported = _split(seed)
    figures: dict[str, float] = {}
    for name, objective in (("sft", SFT()), ("ift", IntuitiveFineTuning())):
        runs = {lr: _learn(objective, seed, lr) for lr in RATES}
        best = max(RATES, key=lambda lr: sum(_exact_match(runs[lr][stop], choosing) for stop in STOPS[1:]))
        figures.update({f"{name}_{stop}": _exact_match(runs[best][stop], reported) for stop in STOPS})
        figures[f"{name}_rate"] = best
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """The card's thresholds."""
    return [
        Check(
            f"IFT - SFT, exact match after {stop} steps",
            figures.median(f"ift_{stop}") - figures.median(f"sft_{stop}"),
            ">=",
            -0.02,
        )
        for stop in STOPS[1:]
    ]
