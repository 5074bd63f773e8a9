"""MHR: identities and counts, exactly; few-shot learning of an unseen task after six related ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from peft import PolyConfig, get_peft_model
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

import tunesmith
from tunesmith.adapters.multi_head_routing import MultiHeadRouting, add_task, average, choose, gradient_alignment
from tunesmith.core.optimizer import set_lr_ratios
from tunesmith.core.seeds import generator, seed_of
from tunesmith.evidence import kit_chains, kit_digits, kit_text
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.evidence.kit_tune import Batch

RANK, SKILLS, SPLITS, LENGTH = 4, 8, 8, 24
SEEN = [(i, j) for i in range(3) for j in range(3) if i != j]
UNSEEN = [(i, i) for i in range(3)]
STEPS, EACH, MULTI_RATES = 200, 4, (3e-3, 1e-2, 3e-2)
SHOTS, SHOT_STEPS, SHOT_RATES = 16, 40, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

CLAIM = Claim(
    "multi-head-routing",
    says="Routing blocks of dimensions apart beats one routing for all of them at a comparable number of parameters; "
    "training the routing alone (MHR-z) is competitive; tasks' gradients are well aligned, so that the gain is one of "
    "multi-task optimisation, and the plain average of the inventory (MHR-mu) is as good a start for a new task.",
    where="abstract",
    ran="Identities on a small Llama, against PEFT's Poly where that is defined. Then a GPT-2 of width 32 that knows "
    "one Markov chain learns six others for 200 steps of 4 rows each: the first 32 states of a chain follow one of "
    "three tables, the last 32 one of three others, and the three pairings left out are the new tasks. Each is learned "
    "from 16 rows of 24 tokens in 40 steps: by LoRA of rank 4 from scratch, and after the six tasks by MHR (rank 4, 8 "
    "skills, 8 blocks), MHR-z, MHR-mu, and the LoRA of rank 32 that had learned the six tasks without routing "
    "(`shared`). Three rates for the six tasks, five for a new one, chosen on 64 rows (32 for each of the six); "
    "reported is the loss of others, less the chain's own entropy. `alignment` is the mean cosine of two tasks' "
    "gradients during training on six. Only LoRA from scratch has a threshold.",
)


def _layers(model: nn.Module) -> list[MultiHeadRouting]:
    return [m for m in model.modules() if isinstance(m, MultiHeadRouting)]


def _routed(groups: Sequence[str], base: nn.Module, start: int = 0, **options: Any) -> nn.Module:
    options = {"rank": RANK, "skills": SKILLS, "splits": SPLITS, "groups": list(groups), **options}
    config = tunesmith.adapter("multi-head-routing", **options)
    return kit_digits.seeded(lambda: get_peft_model(copy.deepcopy(base), config), start)


def _moved(**options: Any) -> nn.Module:
    """A small Llama with three tasks, off its start."""
    model = _routed(["a", "b", "c"], kit_text.model(2, 0), **options)
    g = generator(0, "moved")
    with torch.no_grad():
        for made in _layers(model):
            for p, size in ((made.A, 0.1), (made.B, 0.1), (made.Z, 2.0)):
                p.copy_(size * torch.randn(p.shape, generator=g))
    return model.eval()


def _ids(rows: int = 4) -> Tensor:
    return torch.randint(kit_text.BYTES, (rows, 16), generator=generator(0, "ids"))


@torch.no_grad()
def _logits(model: nn.Module, **given: Any) -> Tensor:
    return model.eval()(input_ids=_ids(), **given).logits


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@CLAIM.exact
def uniform_routing_is_the_average() -> list[Check]:
    """With Z = 0 every task computes what the one LoRA of MHR-mu does; the mean of products is another matrix."""
    model = _moved()
    with torch.no_grad():
        for made in _layers(model):
            made.Z.zero_()
    routed = _logits(model, group=torch.tensor([0, 1, 2, -1]))
    products = {made: 4 * torch.einsum("sro,sri->soi", made.B, made.A).mean(0).detach() for made in _layers(model)}
    average(model)
    wrong = min(float((made.delta().detach() - product).norm() / product.norm()) for made, product in products.items())
    lora = sum(RANK * sum(made.layer.shape) for made in _layers(model))
    return [
        Check("largest difference of a logit", _apart(routed, _logits(model)), "<=", 1e-6),
        Check("trainable numbers more than those of a LoRA of rank 4", _trainable(model) - lora, "==", 0),
        Check("smallest relative distance to the mean of products", wrong, ">=", 0.1),
    ]


def _trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@CLAIM.exact
def merged_for_a_task_is_that_task() -> list[Check]:
    """A plain model merged for one task gives what the routed one gives rows of it; tasks differ."""
    routed, results = _moved(), []
    apart = 0.0
    for i, task in enumerate(("a", "b", "c", None)):
        model = copy.deepcopy(routed)
        choose(model, task)
        wanted = _logits(routed, group=torch.full((4,), i if task else -1))
        results.append(wanted)
        apart = max(apart, _apart(_logits(model.merge_and_unload()), wanted))
    mixed = _logits(routed, group=torch.tensor([0, 1, 2, -1]))
    rows = max(_apart(mixed[i], results[i][i]) for i in range(4))
    return [
        Check("largest difference of a logit, merged and routed", apart, "<=", 1e-5),
        Check("largest difference of a logit, alone and in a batch of several tasks", rows, "<=", 1e-5),
        Check("smallest largest difference of two tasks", min(_apart(results[0], r) for r in results[1:]), ">=", 1e-2),
    ]


@CLAIM.exact
def z_trains_its_routing_alone() -> list[Check]:
    """30 AdamW steps with decay on a new task by MHR-z: A, B and the other tasks' routing stay, bit for bit."""
    model = _moved()
    add_task(model, "new", "z")
    held = [(made.A.clone(), made.B.clone(), made.logits().detach()[:3].clone()) for made in _layers(model)]
    more = _trainable(model) - SKILLS * SPLITS * len(held)
    start = [made.Z.detach().clone() for made in _layers(model)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for step in range(30):
        with tunesmith.step(model.train(), step):
            model(input_ids=_ids(), labels=_ids(), group=torch.full((4,), 3)).loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    moved = unmoved = 0
    for made, kept, Z in zip(_layers(model), held, start, strict=True):
        moved += sum(not torch.equal(a, b) for a, b in zip((made.A, made.B, made.logits()[:3]), kept, strict=True))
        unmoved += int((made.Z == Z).sum())
    return [
        Check("trainable numbers more than 8 x 8 a layer", more, "==", 0),
        Check("tensors that moved beside the new routing", moved, "==", 0),
        Check("numbers of the new routing that did not move", unmoved, "==", 0),
    ]


@CLAIM.exact
def is_poly() -> list[Check]:
    """With one block it is PEFT's Poly, with 4 or 16 its MHR; rows of a batch have different tasks."""
    checks, names = [], ["q_proj", "o_proj", "up_proj"]
    for splits in (1, 4, 16):
        ours = _moved(splits=splits, alpha=1.0, target_modules=names)
        config = PolyConfig(r=RANK, n_tasks=3, n_skills=SKILLS, n_splits=splits, target_modules=names)
        config.task_type = "CAUSAL_LM"
        theirs = get_peft_model(kit_text.model(2, 0), config)
        with torch.no_grad():
            for made in _layers(ours):
                poly: Any = theirs.get_submodule(f"base_model.model.{made.layer.name}")
                A, B = (t.unflatten(2, (splits, -1)).permute(2, 0, 1, 3) for t in (made.A, made.B))
                poly.poly_lora_A["default"].copy_(A.mT)
                poly.poly_lora_B["default"].copy_(B)
                poly.poly_router["default"].module_logits.copy_(made.Z.flatten(1))
        ids = torch.tensor([2, 0, 1, 0])
        apart = _apart(_logits(ours, group=ids), _logits(theirs, task_ids=ids))
        checks.append(Check(f"largest difference of a logit, blocks: {splits}", apart, "<=", 1e-5))
    return checks


# Few-shot ----------------------------------------------------------------------------------------------------------


@lru_cache
def _base() -> nn.Module:
    chain = kit_chains.chain(0)
    return kit_chains.train(kit_chains.model(32, 0), chain, steps=300, lr=1e-2, seed=0, rows=24, length=LENGTH)


def _table(seed: int, task: tuple[int, int]) -> Tensor:
    """The chain of a task: each half of the states follows a table that several tasks share."""
    first, last = (kit_chains.chain(seed_of(seed, half, part)) for half, part in zip("ab", task, strict=True))
    return torch.cat([first[:32], last[32:]])


def _rows(seed: int, task: tuple[int, int], rows: int, purpose: str) -> Tensor:
    return kit_chains.sample(_table(seed, task), rows, LENGTH, seed_of(seed, *task, purpose))


def _excess(model: nn.Module, seed: int, task: tuple[int, int], purpose: str, rows: int = 64) -> float:
    """Mean cross-entropy over what the chain itself has, nats."""
    ids = _rows(seed, task, rows, purpose)
    return kit_chains.loss(model, ids) - kit_chains.best_loss(_table(seed, task), ids)


def _tuned(model: nn.Module, lr: float, batches: Sequence[Batch], at: Callable[[int], object] | None = None) -> None:
    """Adam, a linear schedule whose first tenth warms up; `at` is told each step."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    set_lr_ratios(optimizer, model)
    scheduler = get_linear_schedule_with_warmup(optimizer, len(batches) // 10, len(batches))
    for step, batch in enumerate(batches):
        if at is not None:
            at(step)
        with tunesmith.step(model.train(), step):
            model(**batch).loss.backward()
            optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()


def _names(tasks: Sequence[tuple[int, int]]) -> list[str]:
    return [f"{i}{j}" for i, j in tasks]


def _multi(kind: str, lr: float, seed: int) -> tuple[nn.Module, float]:
    """A model that learned the six tasks, and the mean alignment on the way."""
    if kind == "mhr":
        model = _routed(_names(SEEN), _base(), seed, seed=seed)
    else:
        config = tunesmith.adapter("lora", rank=RANK * SKILLS)
        model = kit_digits.seeded(lambda: get_peft_model(copy.deepcopy(_base()), config), seed)
    each = [_rows(seed, task, STEPS * EACH, "train").split(EACH) for task in SEEN]
    group = {"group": torch.arange(len(SEEN)).repeat_interleave(EACH)} if kind == "mhr" else {}
    ids = [torch.cat(parts) for parts in zip(*each, strict=True)]
    probe = {name: _rows(seed, task, 32, "probe") for name, task in zip(_names(SEEN), SEEN, strict=True)}
    asked = {name: {"input_ids": rows, "labels": rows} for name, rows in probe.items()}
    found: list[float] = []

    def at(step: int) -> None:
        if step % 40 == 20:
            found.append(gradient_alignment(model, asked))

    _tuned(model, lr, [{"input_ids": rows, "labels": rows, **group} for rows in ids], at)
    return model, sum(found) / len(found)


def _on_seen(model: nn.Module, seed: int, purpose: str) -> float:
    """The mean over the six tasks, each with its own routing."""
    losses = []
    for name, task in zip(_names(SEEN), SEEN, strict=True):
        choose(model, name)
        losses.append(_excess(model, seed, task, purpose, 32))
    choose(model, None)
    return sum(losses) / len(losses)


def _few_shot(start: Callable[[], nn.Module], seed: int) -> tuple[float, list[float]]:
    """The mean over the new tasks at the best rate of each, and the rates."""
    losses, rates = [], []
    for task in UNSEEN:
        tried: Mapping[float, nn.Module] = {lr: start() for lr in SHOT_RATES}
        ids = _rows(seed, task, SHOTS, "train")
        for lr, model in tried.items():
            group = {"group": torch.full((SHOTS,), len(SEEN))} if _layers(model) else {}
            _tuned(model, lr, [{"input_ids": ids, "labels": ids, **group}] * SHOT_STEPS)
            if _layers(model):
                choose(model, "new")
        best = min(tried, key=lambda lr, tried=tried, task=task: _excess(tried[lr], seed, task, "validation"))
        losses.append(_excess(tried[best], seed, task, "test"))
        rates.append(best)
    return sum(losses) / len(losses), rates


@CLAIM.comparison
def chains(seed: int) -> dict[str, float]:
    """Loss above the chain's entropy on the six tasks and on new ones, and alignment."""
    figures, learned = dict[str, float](), dict[str, nn.Module]()
    for kind in ("mhr", "shared"):
        tried = {lr: _multi(kind, lr, seed) for lr in MULTI_RATES}
        best = min(tried, key=lambda lr, tried=tried: _on_seen(tried[lr][0], seed, "validation"))
        learned[kind], figures[f"alignment_{kind}"] = tried[best]
        figures |= {f"seen_{kind}": _on_seen(learned[kind], seed, "test"), f"seen_{kind}_rate": best}

    def scratch() -> nn.Module:
        config = tunesmith.adapter("lora", rank=RANK)
        return kit_digits.seeded(lambda: get_peft_model(copy.deepcopy(_base()), config), seed)

    def new(change: Callable[[nn.Module], object]) -> nn.Module:
        model = copy.deepcopy(learned["mhr"])
        change(model)
        if "new" not in _layers(model)[0].groups:
            add_task(model, "new")
        return model

    starts: dict[str, Callable[[], nn.Module]] = {
        "lora": scratch,
        "shared": lambda: copy.deepcopy(learned["shared"]),
        "mhr": lambda: new(lambda model: add_task(model, "new")),
        "mhr_z": lambda: new(lambda model: add_task(model, "new", "z")),
        "mhr_mu": lambda: new(average),
    }
    for kind, start in starts.items():
        loss, rates = _few_shot(start, seed)
        figures |= {kind: loss, f"{kind}_rate": sum(rates) / len(rates)}
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """The card's thresholds."""
    lora = figures.median("lora")
    return [
        Check("MHR / LoRA from scratch, loss of a new task", figures.median("mhr") / lora, "<=", 1.0),
        Check("MHR-mu / LoRA from scratch, loss of a new task", figures.median("mhr_mu") / lora, "<=", 1.0),
    ]
