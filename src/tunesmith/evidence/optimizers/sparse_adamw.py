"""Sparse AdamW: what moves, what the state costs, and that it is AdamW with a mask, by identities and counts."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from tunesmith.core.entries import Entries
from tunesmith.core.meters import state_bytes
from tunesmith.core.sparse import SparseDelta
from tunesmith.evidence import kit_chains, kit_tune
from tunesmith.evidence.claim import Check, Claim
from tunesmith.optimizers.sparse_adamw import SparseAdamW

CLAIM = Claim(
    "sparse-adamw",
    says="In the second phase only the K entries of the mask are tuned, all others keep their pretrained values: a "
    "difference of 4.3 % of mBERT's parameters for a language and 8 % for a task.",
    where="Section 3.1, Algorithm 1",
    ran="Identities and counts on a GPT-2 of two blocks and on tiny-lm-s with random masks of 1 % and 10 %, in the "
    "loss's own gradients: entries outside of the mask bit for bit under weight decay, against AdamW on masked "
    "gradients, which moves them; the trajectory against AdamW on dense matrices of zeros and ones; bytes of state.",
)


def _mask(model: nn.Module, share: float, seed: int = 0) -> SparseDelta:
    g = torch.Generator().manual_seed(seed)
    entries = {}
    for name, p in model.named_parameters():
        places = torch.randperm(p.numel(), generator=g)[: max(round(share * p.numel()), 1)]
        entries[name] = Entries.of(torch.zeros(p.shape), places)
    return SparseDelta(entries, dict.fromkeys(entries, 0))


def _grid(entries: Entries) -> Tensor:
    return Entries(entries.shape, entries.indices, torch.ones(len(entries))).dense()


def _batches(count: int) -> list[kit_tune.Batch]:
    ids = kit_chains.sample(kit_chains.chain(0), 8 * count, 16, 0)
    return [{"input_ids": rows, "labels": rows} for rows in ids.split(8)]


def _optimizer(model: nn.Module, mask: SparseDelta, lr: float, weight_decay: float, **options: object) -> SparseAdamW:
    with TemporaryDirectory(prefix="tunesmith-") as folder:
        file = str(mask.save(Path(folder) / "mask.safetensors"))
        groups = SparseAdamW.groups(model, weight_decay=weight_decay, mask=file)
        return SparseAdamW(groups, lr, mask=file, **options)  # type: ignore[arg-type]


@CLAIM.exact
def nothing_outside_of_the_mask_moves() -> list[Check]:
    """Under weight decay no bit outside of the mask changes, where AdamW on masked gradients moves every entry."""
    moved = {}
    for way in ("ours", "masked gradients"):
        model = kit_chains.model(32, 0)
        mask = _mask(model, 0.1)
        grids = {name: _grid(e) for name, e in mask.items()}
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        if way == "ours":
            optimizer = _optimizer(model, mask, 1e-2, 0.1)
        for batch in _batches(5):
            model(**batch).loss.backward()
            for name, p in model.named_parameters():
                if way != "ours" and p.grad is not None:
                    p.grad.mul_(grids[name])
            optimizer.step()
            optimizer.zero_grad()
        changed = {n: p.detach() != before[n] for n, p in model.named_parameters()}
        moved[way] = sum(int((changed[n] & (grids[n] == 0)).sum()) for n in changed)
        inside = sum(int((changed[n] & (grids[n] == 1)).sum()) for n in changed)
        moved[f"{way}, inside"] = 100 * inside // mask.count
    return [
        Check("entries outside that moved", moved["ours"], "==", 0),
        Check("the same with masked gradients, as in the released code", moved["masked gradients"], ">=", 10_000),
        Check("entries inside that moved, %", moved["ours, inside"], ">=", 75),
    ]


@CLAIM.exact
def it_is_adamw_on_the_mask() -> Check:
    """Ten steps follow AdamW with gradient and decay masked by matrices of zeros and ones, calculated in float64."""
    model = kit_chains.model(32, 0)
    mask = _mask(model, 0.1)
    optimizer = _optimizer(model, mask, 1e-2, 0.1)
    groups = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
    grids = {name: _grid(e).double() for name, e in mask.items()}
    W = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    M, V = ({n: torch.zeros_like(w) for n, w in W.items()} for _ in range(2))
    for k, batch in enumerate(_batches(10), start=1):
        model(**batch).loss.backward()
        for name, p in model.named_parameters():
            G = (torch.zeros_like(p) if p.grad is None else p.grad).double() * grids[name]
            M[name], V[name] = 0.9 * M[name] + 0.1 * G, 0.999 * V[name] + 0.001 * G**2
            size = 1e-2 * (1 - 0.999**k) ** 0.5 / (1 - 0.9**k)
            W[name] -= size * M[name] / (V[name].sqrt() + 1e-8)
            W[name] -= 1e-2 * groups[name] * W[name] * grids[name]
        optimizer.step()
        optimizer.zero_grad()
    worst = max(float((p.detach().double() - W[n]).abs().max()) for n, p in model.named_parameters())
    return Check("largest difference of a weight", worst, "<=", 1e-5)


@CLAIM.exact
def the_state_is_12_bytes_per_entry() -> list[Check]:
    """On tiny-lm-s with 1 % of all entries: two moments and a place of 4 bytes each; `l1` costs 4 more."""
    counted = {}
    for l1 in (0.0, 0.1):
        model = kit_tune.language_model()
        every = sum(p.numel() for p in model.parameters())
        mask = _mask(model, 0.01)
        optimizer = _optimizer(model, mask, 1e-3, 0.0, l1=l1)
        ids = torch.arange(3, 19).view(1, 16)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        counted[l1] = state_bytes(optimizer) / mask.count
        share = 100 * state_bytes(optimizer) / (8 * every)
        if not l1:
            counted["share"] = share
    return [
        Check("bytes per entry", counted[0.0], "==", 12.0),
        Check("bytes per entry with l1", counted[0.1], "==", 16.0),
        Check("state / AdamW's on all, %", counted["share"], "<=", 1.6),
    ]


@CLAIM.exact
def l1_is_the_gradient_of_the_distance() -> Check:
    """What `l1` adds to the gradient is that of l1 / N sum |theta - theta_0| by autograd."""
    model = kit_chains.model(32, 0)
    every = sum(p.numel() for p in model.parameters())
    mask, start = _mask(model, 0.1), {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = _optimizer(model, mask, 1e-2, 0.0, l1=0.01 * every)
    worst = 0.0
    for step in range(3):
        values = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        total = torch.stack([(v - start[n]).abs().sum() for n, v in values.items()]).sum()
        slopes = torch.autograd.grad(0.01 * every / every * total, list(values.values()))
        g = torch.Generator().manual_seed(step)
        given = {n: torch.randn(p.shape, generator=g) for n, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.grad = given[name].clone()
        optimizer.step()
        for (name, p), slope in zip(model.named_parameters(), slopes, strict=True):
            assert p.grad is not None
            added = (p.grad - given[name]).flatten()[mask[name].indices.long()]
            worst = max(worst, float((added - slope.flatten()[mask[name].indices.long()]).abs().max()))
    return Check("largest difference of a gradient", worst, "<=", 1e-6)
