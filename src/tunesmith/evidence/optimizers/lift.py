"""LIFT: the mask by brute force, the state by counts, moments over a refresh; then what is learnt and what is kept."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from tunesmith import world
from tunesmith.core.entryspace import EntrySpace
from tunesmith.core.gradspace import GradSpace, State
from tunesmith.core.meters import grad_bytes, state_bytes
from tunesmith.core.modelmap import block_linears
from tunesmith.core.seeds import generator
from tunesmith.evidence import kit_tune
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.optimizers.lift import LIFT

RANK, FILTER, PERIOD, STEPS, ROWS = 4, 4, 20, 100, 16
SPARSE_RATES, FULL_RATES = (3e-3, 1e-2, 3e-2), (1e-3, 3e-3, 1e-2)

CLAIM = Claim(
    "lift",
    says="Fine-tuning the 5 % of the weights that are largest after rank reduction is better than full fine-tuning on "
    "reasoning tasks, and keeps up to 20 % more of what the model knew than full fine-tuning and LoRA.",
    where="abstract",
    ran="Identities and counts on random matrices. Then tiny-lm-s on `steps`, arithmetic in several steps that it was "
    "not pretrained on, 100 steps on the same batches of 16 with the same schedule: LIFT with the entries of a LoRA of "
    "rank 4 in the linear layers of the blocks (5.1 % of them), filter rank 4, chosen anew every 20 steps; as many "
    "random entries of the same layers, drawn once; and all weights. Each has three learning rates a factor of about 3 "
    "apart, chosen on 100 held-out items; the loss on 100 others is reported, and the rise of the loss on 210 held-out "
    "items of the seven families of the pretraining.",
    not_held="What is learnt holds, by little: LIFT's loss is below that of random entries with all three seeds, by "
    "0.003, 0.001 and 0.020. What is kept cannot be told apart here: each way forgets all of it, from 0.002 to 7 "
    "to 10 nats per token, where guessing among 2,048 tokens has 7.6; LIFT loses less than full fine-tuning with "
    "two seeds of three, and the medians are of different seeds. Probably the task is too far from what a model "
    "of a million weights knows (loss 4.0 at first), and the best rate of both sparse ways, 3e-2, is the largest "
    "that was tried. Other settings were not tried.",
)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _stepped(p: nn.Parameter, grad: Tensor | None = None, **options: object) -> LIFT:
    optimizer = LIFT([p], **options)  # type: ignore[arg-type]
    p.grad = torch.ones_like(p) if grad is None else grad.clone()
    optimizer.step()
    return optimizer


@CLAIM.exact
def the_mask_is_the_largest_of_the_low_rank_weight() -> list[Check]:
    """The mask is the K entries of largest |W_r|, found one by one; the released setting's share none with them."""
    wrong = counts = shared = 0
    for seed, shape in enumerate([(24, 40), (40, 24), (32, 32), (17, 51)]):
        p = nn.Parameter(_random(*shape, seed=seed))
        before = p.detach().double().clone()
        found = set(_stepped(p, rank=2, filter_rank=3).state[p]["indices"].tolist())
        U, S, Vh = torch.linalg.svd(before)
        sizes = [abs(float((U[i, :3] * S[:3]) @ Vh[:3, j])) for i in range(shape[0]) for j in range(shape[1])]
        order = sorted(range(len(sizes)), key=lambda place: -sizes[place])
        K = 2 * sum(shape)
        wrong += len(found ^ set(order[:K]))
        shared += len(found & set(order[-K:]))
        counts += len(found) - K
    return [
        Check("entries that differ from brute force, four shapes", wrong, "==", 0),
        Check("entries more or less than K", counts, "==", 0),
        Check("entries that the released setting takes too", shared, "==", 0),
    ]


@CLAIM.exact
def without_a_filter_it_is_magnitude() -> Check:
    """With the filter rank at min(m, n), the mask is that of the largest weights."""
    p = nn.Parameter(_random(24, 40))
    largest = p.detach().abs().flatten().topk(128).indices
    found = _stepped(p, rank=2, filter_rank=24).state[p]["indices"]
    return Check("entries that differ", len(set(found.tolist()) ^ set(largest.tolist())), "==", 0)


@CLAIM.exact
def nothing_else_moves_and_the_state_is_12_bytes_per_entry() -> list[Check]:
    """Outside of the mask every bit stays until a refresh, also under weight decay; state is 8 K + the mask's 4 K."""
    p = nn.Parameter(_random(64, 96))
    before = p.detach().clone()
    optimizer = LIFT([p], lr=0.1, weight_decay=0.5, rank=2, filter_rank=4, period=10)
    for seed in range(9):
        p.grad = _random(64, 96, seed=seed)
        optimizer.step()
    inside = torch.zeros(p.numel(), dtype=torch.bool)
    inside[optimizer.state[p]["indices"].long()] = True
    moved = (p.detach() != before).flatten()
    early = int((moved & ~inside).sum())
    for seed in range(2):  # the tenth step begins with a refresh
        p.grad = _random(64, 96, seed=seed)
        optimizer.step()
    return [
        Check("entries outside that moved", early, "==", 0),
        Check("entries inside that did not", int((~moved & inside).sum()), "==", 0),
        Check("bytes of state, K = 320", state_bytes(optimizer), "==", 12 * 320),
        Check("entries that moved after a refresh", int((p.detach() != before).sum()), ">=", 321),
    ]


@CLAIM.exact
def moments_are_carried_over() -> list[Check]:
    """At a refresh entries in both masks keep their moments, new ones start at 0; half of the mask is planted anew."""
    big = torch.zeros(8, 8)
    big[:, :4] = 10 + _random(8, 4)
    p = nn.Parameter(big + 0.01 * _random(8, 8, seed=1))
    optimizer = _stepped(p, _random(8, 8, seed=2), lr=0.0, rank=2, filter_rank=8, period=2)
    state = optimizer.state[p]
    old = dict(zip(state["indices"].tolist(), state["exp_avg"].tolist(), strict=True))
    with torch.no_grad():
        p.copy_(p.roll(2, dims=1))
    p.grad = torch.zeros(8, 8)
    optimizer.step()
    pairs = list(zip(state["indices"].tolist(), state["exp_avg"].tolist(), strict=True))
    worst = max(abs(mean - 0.9 * old.get(place, 0.0)) for place, mean in pairs)
    return [
        Check("entries in both masks of 32", len(set(old) & {place for place, _ in pairs}), "==", 16),
        Check("largest difference of a moment", worst, "<=", 1e-7),
        Check("steps of Adam's count", state["step"], "==", 2),
    ]


@CLAIM.exact
def bytes_on_a_model() -> list[Check]:
    """State and live gradients on tiny-lm-s at rank 4: 36,992 entries at 12 bytes; AdamW's is 8 for each of 988,288."""
    model = kit_tune.language_model()
    every = sum(p.numel() for p in model.parameters())
    weights = [model.get_submodule(name).weight for name in block_linears(model)]
    entries = sum(RANK * sum(w.shape) for w in weights)
    ids = torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    with grad_bytes(model) as peak:
        optimizer = LIFT(LIFT.groups(model), lr=1e-3, rank=RANK, filter_rank=FILTER, per_layer=True)
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.detach()
    return [
        Check("entries", entries, "==", 36_992),
        Check("bytes of state", state_bytes(optimizer), "==", 443_904),
        Check("bytes of state / AdamW's on all weights, %", 100 * state_bytes(optimizer) / (8 * every), "<=", 5.7),
        Check("live gradients / largest trained weight", peak.bytes / max(4 * w.numel() for w in weights), "==", 1.0),
    ]


class _RandomSpace(EntrySpace):
    """As many entries as LIFT has, drawn once."""

    seed = 0

    def choose(self, p: nn.Parameter, state: State, name: str) -> Tensor:
        return torch.randperm(p.numel(), generator=generator(self.seed, "random mask", name))[: self.count]


class _Random(LIFT):
    seed = 0

    def space(self, p: Tensor, group: dict) -> GradSpace:
        space = super().space(p, group)
        if not isinstance(space, EntrySpace):
            return space
        drawn = _RandomSpace(p, space.count, group["bits"])
        drawn.seed = self.seed
        return drawn


def _sparse(kind: type[LIFT], lr: float, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = kit_tune.language_model()
    optimizer = kind(kind.groups(model), lr=lr, rank=RANK, filter_rank=FILTER, period=PERIOD)
    if isinstance(optimizer, _Random):
        optimizer.seed = seed
    return model, optimizer


def _full(lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = kit_tune.language_model()
    return model, torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


@lru_cache
def _known() -> list[kit_tune.Batch]:
    """Held-out items of every family of the pretraining, 30 of each."""
    families = [family() for family in world.families(pretraining=True).values()]
    return [b for family in families for b in kit_tune.batches(family.items(30, split="heldout", seed=1), 30)]


@CLAIM.comparison
def learnt_and_kept(seed: int) -> dict[str, float]:
    family = world.get("steps")
    given = kit_tune.train_batches(family, STEPS, ROWS, seed)
    choose, report = kit_tune.heldout_batches(family, 100)
    before = kit_tune.language_model()
    figures = {"before": kit_tune.loss(before, report), "knew": kit_tune.loss(before, _known())}
    makers = {
        "lift": lambda lr: _sparse(LIFT, lr, seed),
        "random": lambda lr: _sparse(_Random, lr, seed),
        "full": _full,
    }
    for name, make in makers.items():
        runs = []
        for lr in FULL_RATES if name == "full" else SPARSE_RATES:
            model, optimizer = make(lr)
            kit_tune.tune(model, optimizer, given)
            rise = kit_tune.loss(model, _known()) - figures["knew"]
            runs.append((kit_tune.loss(model, choose), kit_tune.loss(model, report), rise, lr))
        _, figures[name], figures[f"{name}_forgot"], figures[f"{name}_lr"] = min(runs)
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """The card's directions."""
    gap = figures.median("lift") - figures.median("random")
    kept = figures.median("lift_forgot") - figures.median("full_forgot")
    return [
        Check("held-out loss, LIFT - random entries, nats per token", gap, "<=", 0.0),
        Check("rise of the loss on what it knew, LIFT - full, nats per token", kept, "<=", 0.0),
    ]
