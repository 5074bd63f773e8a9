"""GreenTrainer: its choice, its costs and its probe by exact comparison; loss at equal FLOPs against other choices."""

from __future__ import annotations

import copy
import random
from collections.abc import Collection
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel, get_linear_schedule_with_warmup

from tunesmith import world
from tunesmith.core.backward_cost import BackwardCosts, trace
from tunesmith.core.knapsack import best_subset
from tunesmith.core.meters import flops
from tunesmith.core.schedule import Schedule
from tunesmith.evidence import kit_text, kit_tune
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.schedules.greentrainer import GreenTrainer
from tunesmith.world import Split

BLOCKS, RHO, INTERVAL = 8, 0.5, 40
STEPS, ROWS, LENGTH = 120, 8, 64
RATES = (3e-3, 1e-2, 3e-2)

CLAIM = Claim(
    "greentrainer",
    says="Fine-tuning with up to 64 % fewer FLOPs without noticeable loss of accuracy, and with up to 4 % more than "
    "LoRA's accuracy at as many FLOPs.",
    where="abstract",
    ran="The search against all sets of up to 12 tensors; costs on a random OPT (4 blocks of width 64, tied embedding) "
    "against the FLOPs that torch counts; weights and state around a probe. Then a Llama of 8 blocks over bytes (width "
    "64, tied embedding), trained for 300 steps on the source text of the Python standard library, is tuned on items "
    "of the family `translation` for 120 steps of 8 x 64 bytes with rho = 0.5, chosen anew every 40; the blocks "
    "nearest to the output that fit the same budget, with the final norm; random sets that fit it, drawn anew as "
    "often. These two train for as many steps more as the FLOPs of GreenTrainer's own probes pay for. Each side has "
    "three learning rates a factor of about 3 apart, chosen on other pieces of held-out text than the loss reported.",
    not_held="Random sets are beaten (in two seeds of three), the last block with the final norm is not. Worth is "
    "measured by a whole step of Adam at the rate of the run, and at rates that a small model and 120 "
    "steps ask for it overshoots: at 1e-2 and 3e-2 (seed 1) I_k is negative for 19 to 25 of the 31 "
    "tensors in reach, and 2 to 9 of them train. At 3e-3 nearly all are positive and blocks 6 and 7 "
    "train, but that rate is too small here, while the last block alone takes 3e-2. The paper's rate is "
    "2e-5. Each new choice also begins with fresh moments, twice in 120 steps.",
)


@CLAIM.exact
def choice_is_optimal() -> list[Check]:
    """The choice is as good as the best of all sets within the budget: 200 random instances of 4 to 12 tensors."""
    rng = random.Random(0)
    missed = over = 0
    for _ in range(200):
        n = rng.randint(4, 12)
        own, passing = [rng.randint(0, 20) for _ in range(n)], [rng.randint(0, 20) for _ in range(n)]
        values, budget = (
            [rng.uniform(-0.3, 1) for _ in range(n)],
            int(rng.uniform(0.2, 0.9) * (sum(own) + sum(passing))),
        )
        sets = (torch.arange(1, 2**n)[:, None] >> torch.arange(n)) & 1
        # A tensor is passed if a chosen one stands at or before it.
        passed = sets.cumsum(1) > 0
        costs = sets @ torch.tensor(own) + (passed * torch.tensor(passing)).sum(1)
        worth = sets.double() @ torch.tensor(values, dtype=torch.float64)
        chosen = best_subset(values, own, passing, budget)
        fits = costs <= budget
        if not bool(fits.any()) or not chosen:
            missed += bool(fits.any()) or bool(chosen)
            continue
        missed += abs(float(worth[fits].max()) - sum(values[k] for k in chosen)) > 1e-9
        over += sum(own[k] for k in chosen) + sum(passing[min(chosen) :]) > budget
    return [
        Check("instances of 200 in which a better set exists", missed, "==", 0),
        Check("over budget", over, "==", 0),
    ]


def _opt() -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=256,
        hidden_size=64,
        ffn_dim=256,
        word_embed_proj_dim=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OPTForCausalLM(config)


def _ids() -> Tensor:
    return torch.randint(3, 256, (2, 32), generator=torch.Generator().manual_seed(0))


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def _traced(model: nn.Module, ids: Tensor) -> BackwardCosts:
    with torch.no_grad():
        return trace(lambda: _loss(model, ids), dict(model.named_parameters()))


def _counted(model: nn.Module, ids: Tensor, trained: Collection[str]) -> int:
    """FLOPs of a step that torch counts when these train."""
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained)
    found = flops(lambda: _loss(model, ids).backward())
    model.zero_grad()
    return found


@CLAIM.exact
def costs_are_those_of_torch() -> list[Check]:
    """For all and for 10 random sets of tensors, predicted FLOPs of the backward pass against those counted in one."""
    model, ids = _opt(), _ids()
    costs, rng = _traced(model, ids), random.Random(0)
    with torch.no_grad():
        forward = flops(lambda: _loss(model, ids))
    sets = [costs.names, *(rng.sample(costs.names, rng.randint(1, len(costs.names))) for _ in range(10))]
    differs, worst, below = 0, 0.0, 0
    for chosen in sets:
        counted = _counted(model, ids, chosen) - forward
        differs += costs.exact(chosen, products_only=True) != counted
        worst = max(worst, abs(costs.bound(chosen) / counted - 1))
        below += costs.bound(chosen) < counted
    return [
        Check("sets of 11 whose products are predicted otherwise than counted", differs, "==", 0),
        Check("largest relative error of the cost that the choice works with", worst, "<=", 0.05),
        Check("sets for which that cost is too low", below, "==", 0),
    ]


def _begin(schedule: Schedule, step: int, model: nn.Module, ids: Tensor) -> None:
    def measure() -> float:
        with torch.no_grad():
            return float(_loss(model, ids))

    schedule.begin_step(step, measure, lambda: _loss(model, ids).backward())


@CLAIM.exact
def the_probe_leaves_nothing_behind() -> list[Check]:
    """After three steps of AdamW and a probe, weights and state are bit for bit those of a run without the probe."""
    held = []
    for probes in (False, True):
        model, ids = _opt(), _ids()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            _loss(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        if probes:
            schedule = GreenTrainer(rho=0.9)
            schedule.attach(model, optimizer)
            schedule._backward = lambda model=model, ids=ids: _loss(model, ids).backward()
            schedule._probe(list(schedule.eligible))
        state = [t for p in model.parameters() for t in optimizer.state[p].values()]
        held.append([*(p.detach() for p in model.parameters()), *state])
    differ = sum(not torch.equal(a, b) for a, b in zip(*held, strict=True))
    return [Check("tensors compared", len(held[0]), ">=", 200), Check("tensors that differ", differ, "==", 0)]


@CLAIM.exact
def steps_keep_the_budget() -> list[Check]:
    """FLOPs of a step that torch counts with what was chosen, as a share of those of full training, against rho."""
    whole = _counted(_opt(), _ids(), dict(_opt().named_parameters()))
    worst, least = 0.0, 1.0
    for rho in (0.4, 0.5, 0.64, 0.8):
        model, ids = _opt(), _ids()
        schedule = GreenTrainer(rho=rho)
        schedule.attach(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        _begin(schedule, 0, model, ids)
        share = _counted(model, ids, schedule.selected) / whole
        worst, least = max(worst, share / rho), min(least, share / rho)
    return [
        Check("largest share / rho, four budgets", worst, "<=", 1.01),
        Check("smallest share / rho", least, ">=", 0.9),
    ]


class _Given(Schedule):
    """Sets that are known beforehand, one after the other."""

    def __init__(self, sets: list[frozenset[str]]) -> None:
        super().__init__()
        self.sets = sets

    def active(self, step: int) -> frozenset[str]:
        return self.sets[min(step // INTERVAL, len(self.sets) - 1)]


@lru_cache
def _pretrained(seed: int) -> PreTrainedModel:
    model = kit_text.model(BLOCKS, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    kit_tune.tune(model, optimizer, kit_text.batches("train", 300, ROWS, LENGTH, seed))
    return model


@lru_cache
def _windows(split: Split, rows: int, seed: int) -> Tensor:
    """Pieces of items of `translation`, prompt and answer after one another, (rows, LENGTH) bytes."""
    items = world.get("translation").items(2000 if split == "train" else 400, split=split, seed=0)
    text = torch.frombuffer(bytearray("".join(i.prompt + i.answer + "\n" for i in items).encode()), dtype=torch.uint8)
    starts = torch.randint(len(text) - LENGTH, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(LENGTH)].long()


def _top(costs: BackwardCosts, budget: float) -> list[frozenset[str]]:
    """The blocks nearest to the output that fit, with the final norm."""
    chosen = frozenset(name for name in costs.names if name.startswith("model.norm."))
    for i in reversed(range(BLOCKS)):
        more = chosen | {name for name in costs.names if name.startswith(f"model.layers.{i}.")}
        if costs.bound(more) > budget:
            break
        chosen = more
    return [chosen]


def _random(costs: BackwardCosts, budget: float, seed: int) -> list[frozenset[str]]:
    """Tensors in a random order, each that still fits; one set per interval."""
    rng, found = random.Random(seed), []
    for _ in range(STEPS // INTERVAL + 1):
        chosen: frozenset[str] = frozenset()
        for name in rng.sample(costs.names, len(costs.names)):
            if costs.bound(chosen | {name}) <= budget:
                chosen |= {name}
        found.append(chosen)
    return found


def _tuned(seed: int, side: str, lr: float) -> tuple[PreTrainedModel, float]:
    """The model after tuning, and the FLOPs of the run in those of full training steps."""
    model: PreTrainedModel = copy.deepcopy(_pretrained(seed)).train()
    data = _windows("train", 2 * STEPS * ROWS, 1 + seed).split(ROWS)
    costs = _traced(model, data[0])
    whole, budget = costs.forward + costs.full, RHO * (costs.forward + costs.full) - costs.forward
    probe = [name for name in costs.names if costs.bound([name]) <= budget]
    # A forward pass to trace, and twice forward and backward with all that the budget allows.
    probing = (3 * costs.forward + 2 * costs.exact(probe)) / whole
    allowed = STEPS * RHO + STEPS // INTERVAL * probing
    schedule: Schedule
    if side == "greentrainer":
        schedule, steps = GreenTrainer(rho=RHO, interval=INTERVAL, every="steps"), STEPS
    else:
        schedule = _Given(_top(costs, budget) if side == "top" else _random(costs, budget, seed))
        steps = 2 * STEPS
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule.attach(model, optimizer)
    if isinstance(schedule, _Given):  # what they leave of the budget pays for further steps
        shares = [(costs.forward + costs.exact(schedule.active(step))) / whole for step in range(steps)]
        steps = next(i for i in range(steps) if sum(shares[: i + 1]) > allowed)
    decay = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    spent = 0.0
    for step, ids in enumerate(data[:steps]):
        _begin(schedule, step, model, ids)
        spent += (costs.forward + costs.exact(schedule.active(step))) / whole
        _loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    if isinstance(schedule, GreenTrainer):
        spent += STEPS // INTERVAL * probing
    return model, spent


@CLAIM.comparison
def tuning(seed: int) -> dict[str, float]:
    """Held-out loss at the best rate of each side, and what it spent."""
    choosing, reported = _windows("heldout", 512, 0).chunk(2)
    figures = {"untuned": kit_text.loss(_pretrained(seed), reported)}
    for side in ("greentrainer", "top", "random"):
        runs = {lr: _tuned(seed, side, lr) for lr in RATES}
        best = min(RATES, key=lambda lr: kit_text.loss(runs[lr][0], choosing))
        figures[side] = kit_text.loss(runs[best][0], reported)
        figures[f"{side}_rate"], figures[f"{side}_spent"] = best, runs[best][1]
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """The card's thresholds."""
    ours, top, drawn = (figures.median(side) for side in ("greentrainer", "top", "random"))
    spent = figures.median("greentrainer_spent") / min(figures.median("top_spent"), figures.median("random_spent"))
    return [
        Check("GreenTrainer's loss - that of the top blocks, nats", ours - top, "<=", 0),
        Check("GreenTrainer's loss - that of random sets, nats", ours - drawn, "<=", 0),
        Check("its FLOPs / theirs, probes included", spent, "<=", 1.02),
    ]
