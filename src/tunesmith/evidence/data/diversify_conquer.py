"""Diversify and conquer: weights and draws exactly, a simulated mixture with wrong answers, and a tuned model."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer

from tunesmith import inputs, world
from tunesmith.core.seeds import subset
from tunesmith.core.selection import Rows, Services, Tuned, take
from tunesmith.data.diversify_conquer import cluster_means, diversify_conquer, draw, reweighted
from tunesmith.engine.services import ModelServices
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.evidence.kit_tune import language_model
from tunesmith.models import embedded
from tunesmith.recipe import Recipe
from tunesmith.world import Item

SIZES = tuple(round(size) for size in np.linspace(600, 20, 10))
NOISY = (1, 4, 7)
RIGHT, WRONG = 2.0, -2.0
FAMILIES = ("copy", "reverse", "sort", "addition", "facts", "sentiment", "translation", "intents", "requests", "boxes")
BUDGET, ROUNDS, RATES, CHOOSING, REPORTED = 450, 3, (2e-4, 5e-4, 1e-3), 20, 60

CLAIM = Claim(
    "diversify-conquer",
    says="Selecting from every cluster of the data, and iteratively more from those on which training shows the gold "
    "answers to be better than the model's, beats random selection by 7 % and earlier selection methods by 3.8 %.",
    where="abstract; Table 2; Figure 2",
    ran="Weights and draws by their formulas. A simulated pool of 10 clusters with 600 to 20 rows, three of them (31 % "
    "of the rows) with wrong answers, 150 rows in 3 rounds, 20 times. Then tiny-lm-s: a pool of ten families of the "
    "world in those sizes, drawn anew for each seed, three of them with the answers of other items; 450 rows are "
    "chosen, at random or in 3 rounds from 10 clusters of the model's own vectors with the world's checkers as the "
    "reward (2 for a right answer, -2 for a wrong one), and all weights are tuned for 4 epochs of batches of 16 with "
    "AdamW. Three learning rates for each side, selection included, the best chosen by the right answers to 20 "
    "held-out items of each family; reported on 60 others of each, the three included.",
)


# Exactly ----------------------------------------------------------------------------------------------------------


@CLAIM.exact
def weights_are_the_softmax() -> list[Check]:
    """Weights are softmax(s), times the weights before, by hand; equal scores leave them alone."""
    means, before = np.log([1.0, 2.0, 5.0]), np.array([0.5, 0.25, 0.25])
    forgets = reweighted(before, means, "softmax") - np.array([1, 2, 5]) / 8
    keeps = reweighted(before, means, "product") - np.array([2, 2, 5]) / 9
    even = reweighted(before, np.full(3, -3.0), "product") - before
    unseen = reweighted(before, cluster_means(np.ones(2), np.array([0, 2]), 3), "product") - before
    return [
        Check("largest difference from the softmax", float(np.abs(forgets).max()), "<=", 1e-12),
        Check("largest difference from the product", float(np.abs(keeps).max()), "<=", 1e-12),
        Check("largest change of weights under equal scores", float(np.abs(even).max()), "<=", 1e-12),
        Check("change of the weight of a cluster without a row", float(np.abs(unseen[1])), "==", 0),
    ]


@CLAIM.exact
def inclusion_follows_quality() -> Check:
    """A row of a cluster is drawn in proportion to exp(q)."""
    q, times = np.array([0.0, 1.0, -0.5, 2.0, 0.3]), 20_000
    of = np.repeat(np.arange(times), len(q))
    taken = draw(of, np.tile(q, times), np.ones(times, dtype=np.int64), np.random.default_rng(0)) % len(q)
    p = np.exp(q) / np.exp(q).sum()
    apart = np.abs(np.bincount(taken, minlength=len(q)) / times - p) / np.sqrt(p * (1 - p) / times)
    return Check("largest deviation of a frequency, standard deviations", float(apart.max()), "<=", 3)


def _simulated(seed: int) -> Dataset:
    """150 rows chosen from a pool whose model gets better at a cluster with each of its right rows that it sees."""
    rng = np.random.default_rng(seed)
    of = np.repeat(np.arange(len(SIZES)), SIZES)
    E = 10 * np.eye(len(SIZES))[of] + rng.standard_normal((len(of), len(SIZES)))
    gold = ["wrong" if k in NOISY else "right" for k in of]
    pool = Dataset.from_dict({"prompt": [str(k) for k in of], "completion": gold, "of": of, "vector": E.tolist()})

    def fit(rows: Rows) -> Tuned:
        seen = np.bincount([row["of"] for row in rows if row["completion"] == "right"], minlength=len(SIZES))
        skill = seen / (seen + 10)
        own = lambda row: "right" if rng.random() < skill[row["of"]] else "wrong"  # noqa: E731
        return Tuned(lambda asked: [own(row) for row in asked], lambda asked: np.zeros(len(asked)))

    def reward(prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        means = [RIGHT if answer == "right" else WRONG for answer in answers]
        return rng.normal(means, 0.5)

    return diversify_conquer(
        pool,
        Services(fit=fit, reward=reward),
        budget=150,
        clusters=len(SIZES),
        rounds=3,
        score="reward",
        embedding="vector",
        seed=seed,
    )


def _noisy_weight(chosen: Dataset, stage: int) -> float:
    """What the clean clusters leave; NaN where one of them has no row to read its weight from."""
    weights = {row["of"]: row["selection_score"] for row in chosen if row["selection_round"] == stage}
    clean = [k for k in range(len(SIZES)) if k not in NOISY]
    return 1 - sum(weights.get(k, float("nan")) for k in clean)


@CLAIM.exact
def wrong_answers_are_left() -> list[Check]:
    """Clusters of wrong answers lose their weight, every cluster is represented, and the budget is met."""
    runs = [_simulated(seed) for seed in range(20)]
    share = float(np.mean([np.isin(run["of"], NOISY).mean() for run in runs]))
    random_share = sum(SIZES[k] for k in NOISY) / sum(SIZES)
    steps = [_noisy_weight(run, stage) - _noisy_weight(run, stage - 1) for run in runs for stage in (1, 2)]
    return [
        Check("share of wrong answers / that of the pool", share / random_share, "<=", 0.6),
        Check("largest change of the noisy clusters' weight from a round to the next", max(steps), "<=", 0),
        Check("fewest clusters covered", min(len(set(run["of"])) for run in runs), "==", 10),
        Check("fewest different rows", min(len(set(run["source_index"])) for run in runs), "==", 150),
        Check("most rows", max(len(run) for run in runs), "==", 150),
    ]


# With a model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """A pool of ten families, three with wrong answers, and held-out items of all."""

    pool: list[dict[str, str]]
    items: dict[str, Item]
    noisy: frozenset[str]
    choosing: list[Item]
    reported: list[Item]


def _mixture(seed: int) -> Mixture:
    rng = random.Random(seed)
    order = rng.sample(FAMILIES, len(FAMILIES))
    noisy = frozenset(order[k] for k in NOISY)
    pool: list[dict[str, str]] = []
    items: dict[str, Item] = {}
    choosing, reported = [], []
    for name, size in zip(order, SIZES, strict=True):
        family = world.get(name)
        found = family.items(size, split="train", seed=seed)
        items.update({item.prompt: item for item in found})
        answers = [item.answer for item in found]
        if name in noisy:
            answers = [rng.choice([a for a in answers if a != own]) for own in answers]
        pool += [
            {"prompt": item.prompt, "completion": answer, "family": name}
            for item, answer in zip(found, answers, strict=True)
        ]
        held_out = family.items(CHOOSING + REPORTED, split="heldout", seed=seed)
        choosing += held_out[:CHOOSING]
        reported += held_out[CHOOSING:]
    return Mixture(pool, items, noisy, choosing, reported)


def _services(mixture: Mixture, folder: Path, seed: int, lr: float) -> tuple[ModelServices, Services]:
    """The services of a run on the pool, and the same with the world's checkers as the reward."""
    file = folder / "pool.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in mixture.pool), encoding="utf-8")
    held = folder / "heldout.jsonl"
    held.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n", encoding="utf-8")
    recipe = Recipe.model_validate(
        {
            "model": "tiny-lm-s",
            "method": "full",
            "data": {"train": str(file), "eval": str(held)},
            "train": {"epochs": 4, "batch_size": 16, "learning_rate": lr, "seed": seed},
            "report": {"max_new_tokens": 40},
        }
    )
    base = language_model()
    tokenizer = AutoTokenizer.from_pretrained(embedded.path("tiny-lm-s"))
    own = ModelServices(recipe, base, tokenizer, inputs.gather(recipe.data, config=base.config))

    def reward(prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        asked = [mixture.items[prompt] for prompt in prompts]
        right = [world.get(item.family).check(item, answer) for item, answer in zip(asked, answers, strict=True)]
        return np.where(right, RIGHT, WRONG)

    return own, dataclasses.replace(own.offered(), reward=reward)


def _at_random(pool: Dataset, services: Services, seed: int) -> Dataset:
    return take(pool, subset(len(pool), BUDGET, seed, "random rows"))


def _iterative(pool: Dataset, services: Services, seed: int) -> Dataset:
    return diversify_conquer(
        pool, services, budget=BUDGET, clusters=len(FAMILIES), rounds=ROUNDS, score="reward", seed=seed
    )


def _accuracy(tuned: Tuned, items: Sequence[Item], names: Sequence[str] = FAMILIES) -> float:
    """The mean over families of the share of right answers, in points."""
    asked = [item for item in items if item.family in names]
    texts = tuned.generate([{"prompt": item.prompt, "completion": item.answer} for item in asked])
    right = [world.get(item.family).check(item, text) for item, text in zip(asked, texts, strict=True)]
    return 100 * float(np.mean(right))


SIDES: dict[str, Callable[[Dataset, Services, int], Dataset]] = {"random": _at_random, "iterative": _iterative}


@CLAIM.comparison
def tuning(seed: int) -> dict[str, float]:
    """Right answers on held-out items after tuning on the rows that each side chose, at its best learning rate."""
    mixture = _mixture(seed)
    figures: dict[str, float] = {}
    with TemporaryDirectory(prefix="tunesmith-") as folder:
        for side, select in SIDES.items():
            runs: dict[float, tuple[float, Tuned, Dataset]] = {}
            for lr in RATES:
                own, offered = _services(mixture, Path(folder), seed, lr)
                chosen = select(own.gathered.train.dataset, offered, seed)
                tuned = own.fit(chosen)
                runs[lr] = (_accuracy(tuned, mixture.choosing), tuned, chosen)
            best = max(RATES, key=lambda lr: runs[lr][0])
            _, tuned, chosen = runs[best]
            clean = [name for name in FAMILIES if name not in mixture.noisy]
            figures[side] = _accuracy(tuned, mixture.reported)
            figures[f"{side}_clean"] = _accuracy(tuned, mixture.reported, clean)
            figures[f"{side}_wrong"] = float(np.mean([name in mixture.noisy for name in chosen["group"]]))
            figures[f"{side}_rate"] = best
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """The card's threshold."""
    gain = figures.median("iterative") - figures.median("random")
    return [Check("right answers, iterative - random, points", gain, ">=", 3)]
