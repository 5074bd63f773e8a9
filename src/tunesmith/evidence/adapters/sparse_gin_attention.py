"""Sparse-GIN attention: its graph, its direction and its caches exactly; beside LoRA of its size on a new language."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

import tunesmith
from tunesmith import world
from tunesmith.adapters.sparse_gin_attention import SparseGINAttention
from tunesmith.core.layer import describe
from tunesmith.core.seeds import generator
from tunesmith.evidence import kit_digits, kit_text, kit_tune
from tunesmith.evidence.claim import Check, Claim, Figures

SLUG = "sparse-gin-attention"
TASK, STEPS, ROWS, RATES = "third_language", 60, 16, (3e-3, 1e-2, 3e-2)
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "gin": (SLUG, {"width": 15}),
    "loops": (SLUG, {"width": 15, "self_loops_only": True}),
    "lora": ("lora", {"rank": 2, "alpha": 4.0}),
}

CLAIM = Claim(
    SLUG,
    says="A sparse graph network on the attention of a frozen model shows better training dynamics and generalises "
    "better than low-rank adaptation (LoRA); no figure in the abstract.",
    where="abstract",
    ran="Identities on one layer with attention weights set by hand and on a byte-level Llama of four blocks. Then "
    "tiny-lm-s learns to translate into a language that it has never seen, from 60 batches of 16 items, with AdamW "
    "(weight decay 0.01): Sparse-GIN of width 15 in its four blocks, the same with the loops that the released code "
    "keeps, and LoRA of rank 2 in every linear layer, whose size is within 1 %. Each has three learning rates a factor "
    "of about 3 apart, chosen by 128 held-out items; the loss is that of 128 others. The losses are reported; the "
    "sizes alone have a threshold.",
)


def _alone(**options: Any) -> SparseGINAttention:
    """One adapter of width 5 on a layer of 6, in no model."""
    spec = describe(nn.Linear(6, 6), "layer")
    return kit_digits.seeded(lambda: SparseGINAttention(spec, width=5, causal=True, **options), 0).eval()


def _map() -> Tensor:
    """Attention weights of two heads over six tokens, (1, 2, 6, 6): rows add up to 1, later tokens have none."""
    scores = 2 * torch.randn(1, 2, 6, 6, generator=generator(0, "map"))
    return torch.softmax(scores.masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf), -1)


def _nodes(seed: int = 0) -> Tensor:
    return torch.randn(1, 6, 5, generator=generator(seed, "nodes"))


def _adapted(base: nn.Module, size: float = 0.2, **options: Any) -> nn.Module:
    """With the adapter off its start, its scales among the rest unless `size` is 0."""
    config = tunesmith.adapter(SLUG, width=16, **options)
    model, g = kit_digits.seeded(lambda: get_peft_model(copy.deepcopy(base), config), 0), generator(0, "moved")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and size:
                p.add_(size * torch.randn(p.shape, generator=g))
    return model.eval()


def _ids(rows: int = 2, length: int = 24) -> Tensor:
    return torch.randint(kit_text.BYTES, (rows, length), generator=generator(0, "ids"))


@CLAIM.exact
def no_token_hears_of_a_later_one() -> list[Check]:
    """Changing token k leaves the logits before k, in training and in evaluation, and changes those from k on."""
    model, ids = _adapted(kit_text.model(4, 0)), _ids()

    @torch.no_grad()
    def given(token: int) -> Tensor:
        changed = ids.clone()
        changed[:, 12] = token
        return kit_digits.seeded(lambda: model(input_ids=changed).logits, 0)

    checks = []
    for training in (False, True):
        model.train(training)
        outs = [given(5), given(6)]
        apart = (outs[0] - outs[1]).abs().amax((0, 2))
        name = "training" if training else "evaluation"
        checks += [
            Check(f"largest difference before k, {name}", float(apart[:12].max()), "<=", 1e-6),
            Check(f"smallest after k, {name}", float(apart[12:].min()), ">=", 1e-4),
        ]
    return checks


@CLAIM.exact
def the_aggregate_is_the_dense_formula() -> list[Check]:
    """E of every pair, and sum_j E_ij n_j + eps n_i, pair by pair from the equations."""
    A, n = _map(), _nodes()
    made = _alone(epsilon=0.7)
    by_hand, u = torch.zeros(1, 6, 6), 0.7 * n
    for i in range(6):
        for j in range(i + 1):
            weight = 1 / (1 + torch.exp(-10 * (min(float(A[0, 0, i, j] + A[0, 1, i, j]), 1.0) - torch.tensor(0.1))))
            if weight > 0.6:
                by_hand[0, i, j] = weight
                u[0, i] += weight * n[0, j]
    E = made.edges(A)
    aggregate = (made.epsilon * n + E @ made._with_past(n, 6, None)).detach()
    return [
        Check("edges between tokens", int((E - torch.diag_embed(E.diagonal(0, 1, 2)) > 0).sum()), ">=", 5),
        Check("largest difference of an edge", float((E - by_hand).abs().max()), "<=", 1e-6),
        Check("of the aggregate", float((aggregate - u).abs().max()), "<=", 1e-6),
    ]


@CLAIM.exact
def an_edge_of_0_5_carries_and_one_of_0_1_does_not() -> list[Check]:
    """Token 1 is moved: token 3 attends to it by 0.5 and hears it, token 4 by 0.1 and does not, to the bit."""
    A = torch.zeros(1, 2, 6, 6)
    A[0, 0] = torch.eye(6)
    A[0, 0, 3, 1], A[0, 1, 3, 1] = 0.2, 0.3
    A[0, 0, 4, 1], A[0, 1, 4, 1] = 0.04, 0.06
    n, E = _nodes(), _alone().edges(A)
    moved = n.clone()
    moved[0, 1] += 1
    change = (E @ moved - E @ n).abs().amax(-1)[0]
    around = [float(_alone().edges(torch.full((1, 1, 1, 1), x)).max()) for x in (0.1404, 0.1406)]
    return [
        Check("change at 0.5", float(change[3]), ">=", 0.6),
        Check("change at 0.1", float(change[4]), "==", 0),
        Check("weight of an edge at an aggregate of 0.1404", around[0], "==", 0),
        Check("at 0.1406", around[1], ">=", 0.6),
    ]


@CLAIM.exact
def zero_scales_are_the_base() -> list[Check]:
    """With all s = 0 the logits are those of eager attention to the bit; the default start differs from the base."""
    base, ids = kit_text.model(4, 0), _ids()
    base.set_attn_implementation("eager")
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        apart = {
            init: float((_adapted(base, 0, init=init)(input_ids=ids).logits - expected).abs().max())
            for init in ("identity", "schedule")
        }
    return [
        Check("largest difference of a logit, all s = 0", apart["identity"], "==", 0),
        Check("at the default start", apart["schedule"], ">=", 1e-2),
    ]


def _released(E: Tensor, n: Tensor, turned: bool) -> Tensor:
    """Messages along the edges (row, column) of E that point forwards; `turned` takes (column, row) instead."""
    source, target = E[0].nonzero().T
    weight = E[0, source, target]
    if turned:
        source, target = target, source
    kept = source <= target
    out = torch.zeros_like(n[0])
    return out.index_add(0, target[kept], weight[kept, None] * n[0, source[kept]])


@CLAIM.exact
def the_released_direction_keeps_loops_alone() -> list[Check]:
    """Moving token 1 in the released message passing reaches no other token; turned round it is the dense formula."""
    A, n = _map(), _nodes()
    E, loops = _alone(cut=0.0).edges(A), _alone(cut=0.0, self_loops_only=True).edges(A)
    moved = n.clone()
    moved[0, 1] += 1

    def reached(turned: bool) -> int:
        change = _released(E, moved, turned) - _released(E, n, turned)
        return int((change.abs().amax(-1) > 0).sum())

    return [
        Check("tokens that hear of token 1 as released", reached(False), "==", 1),
        Check("with the edges turned round", reached(True), "==", 5),
        Check("turned, from the dense formula", float((_released(E, n, True) - (E @ n)[0]).abs().max()), "<=", 1e-6),
        Check(
            "as released, from self_loops_only", float((_released(E, n, False) - (loops @ n)[0]).abs().max()), "<=", 0
        ),
    ]


@CLAIM.exact
def generation_with_a_cache() -> list[Check]:
    """Logits token by token and of beams with a cache are those of the whole row."""
    model, ids = _adapted(kit_text.model(4, 0)), _ids()
    with torch.no_grad():
        whole, cache, steps = model(input_ids=ids, use_cache=False).logits, None, []
        for i in range(ids.shape[1]):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        made = [
            model.generate(input_ids=ids[:, :8], max_new_tokens=12, num_beams=3, do_sample=False, use_cache=cached)
            for cached in (True, False)
        ]
    apart = float((torch.cat(steps, 1) - whole).abs().max() / whole.abs().max())
    return [
        Check("largest difference of a logit, relative to the largest", apart, "<=", 1e-5),
        Check("tokens of beam search that differ", int((made[0] != made[1]).sum()), "==", 0),
    ]


def _made(side: str, seed: int) -> nn.Module:
    slug, options = SIDES[side]
    config = tunesmith.adapter(slug, **options)
    return kit_digits.seeded(lambda: get_peft_model(kit_tune.language_model(), config), seed)


def _tuned(side: str, lr: float, seed: int) -> nn.Module:
    model = _made(side, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    given = kit_tune.train_batches(world.get(TASK), STEPS, ROWS, seed)
    kit_digits.seeded(lambda: kit_tune.tune(model, optimizer, given), seed)
    return model


@CLAIM.comparison
def a_new_language(seed: int) -> dict[str, float]:
    """Held-out loss after 60 steps at the best rate of each side, nats per token."""
    choose, report = kit_tune.heldout_batches(world.get(TASK), 128)
    figures = {"before": kit_tune.loss(kit_tune.language_model(), report)}
    for side in SIDES:
        model, figures[f"{side}_rate"] = kit_digits.search(
            lambda lr, side=side: _tuned(side, lr, seed), RATES, lambda m: -kit_tune.loss(m, choose)
        )
        figures[side] = kit_tune.loss(model, report)
        figures[f"{side}_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """Of equal size; the losses are figures without a threshold."""
    ratio = figures.median("gin_parameters") / figures.median("lora_parameters")
    return [Check("|parameters, Sparse-GIN / LoRA - 1|", abs(ratio - 1), "<=", 0.01)]
