"""AutoPEFT: counts and hypervolumes exactly; its search against random search on a known front, and on a real model."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, PreTrainedModel

import tunesmith
from tunesmith.adapters.bottleneck import Block, blocks_of
from tunesmith.core.seeds import forked, generator
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.models import embedded
from tunesmith.recipes.autopeft_space import Space
from tunesmith.recipes.pareto import Code, Search, Trial, Values, hypervolume, pareto
from tunesmith.world.sentiment import LABELS, Sentiment

CLAIM = Claim(
    "autopeft",
    says="A Bayesian search over which modules, of which sizes, in which layers finds configurations that beat "
    "existing PEFT methods and are on par with or better than full fine-tuning, without substantial cost.",
    where="abstract",
    ran="The trained numbers of 50 random configurations on a small BERT, and hypervolumes, against their definitions. "
    "Then the paper's space for BERT-base (12 blocks, width 768) with a made-up error whose best trade-offs can be "
    "listed: 60 evaluations, half of them random, in batches of 4, against 60 random ones with the same first half. "
    "The error is 1 - (sum of the weights of the blocks that are on) (1 - exp(-sum over modules of a log2(1 + size))), "
    "the reference point 26 % of 109 million parameters and an error of 1. Last, 12 configurations (6 of them random) "
    "trained for 12 steps of 16 reviews each on the embedded encoder (4 blocks, width 128), by their loss on 64 "
    "others. No comparison with other methods: what the search finds, not what its modules are worth, is shown.",
    seeds=(0, 1, 2, 3, 4),
)
BERT_BASE, PARAMETERS = Space((Block(768, 768),) * 12), 109_482_240
REFERENCE: Values = (0.26, 1.0)


def _small() -> PreTrainedModel:
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with forked("autopeft"):
        return BertForSequenceClassification(config)


def _codes(space: Space, count: int, seed: int) -> list[Code]:
    g, found = generator(seed, "codes"), dict[Code, None]()
    while len(found) < count:
        code = tuple(int(torch.randint(size, (), generator=g)) for size in space.coordinates)
        if space.valid(code):
            found[code] = None
    return list(found)


@CLAIM.exact
def counts() -> list[Check]:
    """50 random configurations train as many numbers as the paper's formula says, plus their biases, and run."""
    space = Space(tuple(blocks_of(_small())))
    ids = torch.randint(64, (2, 7), generator=generator(0, "ids"))
    wrong = wrong_cost = failed = 0
    for code in _codes(space, 50, 0):
        options = space.decode(code)
        model = get_peft_model(_small(), tunesmith.adapter("bottleneck", **options))
        trained = model.get_nb_trainable_parameters()[0]
        active, sizes = len(options["layers"]), [options[name] for name in ("serial", "parallel", "prefix")]
        paper = active * sum(2 * 32 * size for size in sizes)
        biases = active * sum(size + 32 for size in sizes[:2] if size)
        wrong += trained != paper + biases
        wrong_cost += space.count(code) != trained
        loss = model(input_ids=ids, labels=torch.tensor([0, 1])).loss
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        failed += not all(g is not None and bool(g.isfinite().all()) for g in grads)
    return [
        Check("configurations with another count", wrong, "==", 0),
        Check("configurations that the search counts otherwise", wrong_cost, "==", 0),
        Check("configurations whose forward and backward pass fails", failed, "==", 0),
    ]


@CLAIM.exact
def hypervolumes() -> list[Check]:
    """The hypervolume is the area of the grid cells that some point dominates; the Pareto set is what nothing beats."""
    worst, sets = 0.0, 0
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = rng.integers(0, 300, (int(rng.integers(1, 30)), 2))
        right, top = (int(n) for n in rng.integers(100, 301, 2))
        covered = np.zeros((right, top), dtype=bool)
        for x, y in points:
            covered[x:, y:] = True
        values: list[Values] = [(float(x) / 300, float(y) / 300) for x, y in points]
        found = hypervolume(values, (right / 300, top / 300))
        worst = max(worst, abs(found - int(covered.sum()) / 90_000))
        sets += {values[i] for i in pareto(values)} != set(_unbeaten(values))
    return [
        Check("largest difference of the area over 50 sets", worst, "<=", 1e-9),
        Check("Pareto sets that are not", sets, "==", 0),
    ]


def _unbeaten(points: list[Values]) -> list[Values]:
    return [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]


# The made-up error ------------------------------------------------------------------------------------------------


def _weights(seed: int) -> tuple[Tensor, Tensor]:
    """What each block is worth, summing to 1, and how fast each module saturates."""
    g = generator(seed, "synthetic")
    worth = torch.rand(12, generator=g) ** 2
    return worth / worth.sum(), 0.05 + 0.25 * torch.rand(3, generator=g)


def _error(code: Code, seed: int) -> Values:
    worth, rates = _weights(seed)
    sizes = [BERT_BASE.sizes[x] for x in code[12:]]
    gain = 1 - math.exp(-sum(float(a) * math.log2(1 + size) for a, size in zip(rates, sizes, strict=True)))
    on = sum(float(w) for w, bit in zip(worth, code[:12], strict=True) if bit)
    return BERT_BASE.count(code) / PARAMETERS, 1 - on * gain


def _front(seed: int) -> float:
    """The hypervolume of all configurations: of so many blocks, the worthiest are best."""
    order = _weights(seed)[0].argsort(descending=True).tolist()
    best = []
    for blocks in range(1, 13):
        bits = tuple(int(i in order[:blocks]) for i in range(12))
        for sizes in itertools.product(range(11), repeat=3):
            if BERT_BASE.valid((*bits, *sizes)):
                best.append(_error((*bits, *sizes), seed))
    return hypervolume(best, REFERENCE)


def _searched(sampler: str, seed: int) -> float:
    search = Search(
        BERT_BASE.coordinates,
        BERT_BASE.valid,
        total=60,
        start=30,
        batch=4,
        sampler=sampler,  # type: ignore[arg-type]
        seed=seed,
        points=BERT_BASE.points,
    )
    while todo := search.next():
        for trial in todo:
            search.tell(trial, _error(trial.code, seed))
    return hypervolume([trial.values for trial in search.done() if trial.values], REFERENCE)


# A real model -----------------------------------------------------------------------------------------------------


def _reviews(split: str, count: int, seed: int) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(embedded.path("tiny-encoder"))
    items = Sentiment().items(count, split=split, seed=seed)  # type: ignore[arg-type]
    given = tokenizer([item.prompt for item in items], padding=True, return_tensors="pt")
    labels = torch.tensor([LABELS.index(item.answer.strip()) for item in items])
    return {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"], "labels": labels}


def _trained(space: Space, code: Code, seed: int) -> float:
    """Loss on held-out reviews after a few steps."""
    with forked(seed, "encoder"):
        base = BertForSequenceClassification.from_pretrained(
            embedded.path("tiny-encoder"), dtype=torch.float32, num_labels=2
        )
        config = tunesmith.adapter("bottleneck", modules_to_save=["classifier"], **space.decode(code))
        model = get_peft_model(base, config)
    rows, held_out = _reviews("train", 192, seed), _reviews("heldout", 64, 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    model.train()
    for step in range(12):
        model(**{name: tensor[16 * step : 16 * step + 16] for name, tensor in rows.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float(model.eval()(**held_out).loss)


def _real(seed: int) -> list[Trial]:
    base = BertForSequenceClassification.from_pretrained(embedded.path("tiny-encoder"), dtype=torch.float32)
    space, parameters = Space(tuple(blocks_of(base))), sum(p.numel() for p in base.parameters())
    search = Search(
        space.coordinates,
        space.valid,
        total=12,
        start=6,
        batch=3,
        sampler="gp",
        seed=seed,
        points=space.points,
    )
    while todo := search.next():
        for trial in todo:
            search.tell(trial, (space.count(trial.code) / parameters, _trained(space, trial.code, seed)))
    return search.done()


@CLAIM.comparison
def searches(seed: int) -> dict[str, float]:
    """Hypervolumes of both searches and of the best possible; what the real search returned."""
    done = [trial.values for trial in _real(seed) if trial.values]
    front = [done[i] for i in pareto(done)]
    return {
        "search": _searched("gp", seed),
        "random": _searched("random", seed),
        "possible": _front(seed),
        "evaluated": len(done),
        "returned": len(front),
        "wrong": len(set(front) ^ set(_unbeaten(done))),
        "best_loss": min(y for _, y in done),
    }


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """The card's thresholds."""

    def mean(name: str) -> float:
        return sum(figures[name]) / len(figures[name])

    gain = (mean("search") - mean("random")) / mean("possible")
    most = max(a / b for a, b in zip(figures["search"], figures["possible"], strict=True))
    return [
        Check("hypervolume after 60 evaluations - random search's, share of the possible, mean", gain, ">=", 1e-6),
        Check("largest hypervolume / the possible", most, "<=", 1),
        Check("evaluations of a real search", min(figures["evaluated"]), "==", 12),
        Check("configurations in a real Pareto set that are beaten, or missing", sum(figures["wrong"]), "==", 0),
        Check("smallest real Pareto set", min(figures["returned"]), ">=", 1),
    ]
