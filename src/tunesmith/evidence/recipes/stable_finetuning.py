"""Stable fine-tuning: what freezing costs and which run failed, exactly; spread over seeds on 64 rows."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, get_linear_schedule_with_warmup

from tunesmith.core.meters import flops, saved_bytes, state_bytes, trainable
from tunesmith.core.schedule import Schedule
from tunesmith.core.seeds import forked, generator, seed_of
from tunesmith.evidence import kit_tune
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.optimizers.layer_decay import LayerDecay
from tunesmith.recipes.stable_finetuning import StableFinetuning, _choose, _row
from tunesmith.schedules.fresh_top import FreshTop
from tunesmith.schedules.telly import Telly

TOPICS, WORDS, COMMON, LENGTH = 8, 10, 20, 12
PROFILE = range(1, TOPICS + 1)
BLOCKS, WIDTH, PRETRAINING, STEPS, ROWS, EXAMPLES, RUNS, SEARCH = 4, 48, 1200, 40, 16, 64, 4, 2
RATES = (1e-3, 4e-3)
STABILISERS = ("plain", "freeze", "decay", "fresh")
TASKS = ("subject", "similarity")
MARGIN = 0.01
Batch = Mapping[str, Tensor]

CLAIM = Claim(
    "stable-finetuning",
    says="Fine-tuning on few rows is unstable; freezing lower layers helps base-sized models, layer-wise decay large "
    "ones and ELECTRA, and beginning the top anew the smallest similarity data.",
    where="abstract",
    ran="Parameters, state, saved bytes and backward FLOPs of freezing, what each stabiliser is, and which runs fail, "
    "exactly. Then a BERT of 4 blocks, 48 wide, masked language modelling on synthetic abstracts (12 words of two "
    "of 8 subjects, and common ones), 1,200 steps of 16. Two tasks of 64 rows, 40 steps of 16: which half of the "
    "subjects an abstract is about, by accuracy, and how alike its subjects and a given mixture are (cosine), by "
    "the share of the variance that is explained. AdamW with a tenth of warm-up, alone and with 2 blocks and the "
    "embedding frozen, with delta 0.9, with the top block and the pooler anew. 4 runs for each of 3 sets of rows, "
    "12 in all; each has two learning rates, chosen by the mean of two runs on 128 other rows; so is, by all "
    "runs, the recommended one: that with the fewest failed runs and, of these, the best mean. Spread and "
    "failures of that one and of plain are of 256 further rows. Failed: no more than 0.01 above a constant "
    "answer.",
    not_held="On the similarity the recommended decay has no fewer failed runs than plain, 2 of 12, and a spread 0.8 "
    "points larger (20.6 to 19.8), at a mean 6 points better. The other rows, on which none of its runs failed, "
    "recommended it; by their spread it would have been freezing, which has 5.3 points and no failed run, and the "
    "lowest mean of all (20). The top anew has the best mean on both tasks, 43 and 30 points above a constant answer "
    "to plain's 23 and 27, as the study says of its smallest data, but 2 failed runs as well. On the classes no run "
    "failed with any of them. Deviations are over 12 runs of 3 sets of rows, so that the difference between the sets "
    "is in them.",
)


# Exact ----------------------------------------------------------------------------------------------------------------


def _bert(**changes: Any) -> BertConfig:
    size = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "intermediate_size": 2 * WIDTH}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    words = 3 + COMMON + TOPICS * WORDS
    return BertConfig(vocab_size=words, max_position_embeddings=LENGTH + 1, **{**size, **drop, **changes})


@CLAIM.exact
def what_freezing_costs() -> list[Check]:
    """Each frozen block takes its parameters, 8 bytes of state for each, and the same saved bytes and FLOPs away."""
    costs = []
    for k in range(BLOCKS):
        with forked("cost"):
            model = BertForSequenceClassification(_bert(attn_implementation="eager"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        telly = Telly(blocks=k)
        telly.attach(model, optimizer)
        telly.begin_step(0)
        given = {
            "input_ids": torch.randint(3, 50, (4, LENGTH), generator=generator(0)),
            "labels": torch.tensor([0, 1, 0, 1]),
        }

        def forward(model: nn.Module = model, given: Batch = given) -> Tensor:
            return model(**given).loss

        with saved_bytes(model) as saved:
            forward()
        backward = flops(lambda forward=forward: forward().backward()) - flops(forward)
        optimizer.step()
        costs.append((trainable(model)[0], state_bytes(optimizer), saved.bytes, backward))
    block = sum(p.numel() for p in model.bert.encoder.layer[0].parameters())
    tensors = len(list(model.bert.encoder.layer[0].parameters()))
    steps = [tuple(a - b for a, b in zip(first, second, strict=True)) for first, second in pairwise(costs)]
    spread = max((max(s[i] for s in steps) - min(s[i] for s in steps)) / min(s[i] for s in steps) for i in (2, 3))
    return [
        Check("parameters of a frozen block - its own, most", max(abs(s[0] - block) for s in steps), "==", 0),
        Check(
            "its state - 8 bytes each and 4 a tensor", max(abs(s[1] - 8 * block - 4 * tensors) for s in steps), "==", 0
        ),
        Check("spread of saved bytes and FLOPs of a block, share", spread, "<=", 0.01),
        Check("what a block saves of the FLOPs, share", steps[0][3] / costs[0][3], ">=", 0.2),
    ]


@CLAIM.exact
def what_is_decided() -> list[Check]:
    """The grid's means, deviations, failed runs and choice are those of a small table worked out by hand."""
    given: dict[str, list[float | None]] = {
        "plain": [0.9, 0.5, 0.7],
        "freeze": [0.7, 0.6, 0.8],
        "decay": [0.9, 0.8, None],
    }
    runs: list[dict[str, Any]] = [
        {
            "stabiliser": s,
            "stage": f"{s}-{i}",
            "score": x,
            "failed": x is None or x - 0.5 <= MARGIN,
            "state": 1,
            "seconds": 1,
        }
        for s, scores in given.items()
        for i, x in enumerate(scores)
    ]
    rows = {s: _row(s, [r for r in runs if r["stabiliser"] == s], 1.0) for s in given}
    chosen = _choose(list(rows.values()), runs, 1.0)
    grid = StableFinetuning()
    recipe = {"train": {"steps": 10, "epochs": None}}
    freeze = grid.overrides("freeze+fresh", 3, recipe, 12)["schedule"]
    return [
        Check(
            "failed runs of plain, freeze, decay as a number",
            int("".join(str(r["failed"]) for r in rows.values())),
            "==",
            101,
        ),
        Check("error of a standard deviation", abs(rows["plain"]["std"] - 0.2), "<=", 1e-12),
        Check("mean of the finite scores - 0.85", abs(rows["decay"]["mean"] - 0.85), "<=", 1e-12),
        Check(
            "freeze is chosen, by its best run", int(chosen == {"stabiliser": "freeze", "stage": "freeze-2"}), "==", 1
        ),
        Check("blocks at the bottom that rest, of 12", freeze["frozen"], "==", 6),
    ]


# The study ------------------------------------------------------------------------------------------------------------


def _abstract(rng: random.Random) -> tuple[list[int], list[int]]:
    """Words of two subjects and common ones, and how many are of each subject."""
    two, share = rng.sample(range(TOPICS), 2), rng.uniform(0.5, 1.0)
    words, counts = [], [0] * TOPICS
    for _ in range(LENGTH):
        if rng.random() < 0.25:
            words.append(3 + rng.randrange(COMMON))
            continue
        topic = two[rng.random() >= share]
        words.append(3 + COMMON + WORDS * topic + rng.randrange(WORDS))
        counts[topic] += 1
    return words, counts


def _rows(task: str, count: int, *keys: int | str) -> Batch:
    """Abstracts with their class, or with the cosine of their subjects and those of `PROFILE`."""
    rng = random.Random(seed_of("abstracts", task, *keys))
    ids: list[list[int]] = []
    labels: list[float] = []
    while len(ids) < count:
        words, counts = _abstract(rng)
        if task == "subject":
            first, second = sum(counts[: TOPICS // 2]), sum(counts[TOPICS // 2 :])
            if first != second:
                ids.append([1, *words])
                labels.append(first > second)
            continue
        lengths = math.sqrt(sum(x * x for x in counts) * sum(x * x for x in PROFILE))
        ids.append([1, *words])
        labels.append(sum(x * y for x, y in zip(counts, PROFILE, strict=True)) / max(lengths, 1e-9))
    kind = torch.long if task == "subject" else torch.float32
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels).to(kind)}


@lru_cache
def _base() -> BertForMaskedLM:
    with forked("base"):
        model = BertForMaskedLM(_bert())
    given = []
    for step, ids in enumerate(_rows("similarity", PRETRAINING * ROWS, "pretrain")["input_ids"].split(ROWS)):
        hidden = (torch.rand(ids.shape, generator=generator("hidden", step)) < 0.25) & (ids > 2)
        given.append({"input_ids": ids.masked_fill(hidden, 0), "labels": ids.masked_fill(~hidden, -100)})
    kit_tune.tune(model, torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0), given)
    return model


def _run(task: str, stabiliser: str, lr: float, data: Batch, seed: int) -> nn.Module:
    with forked(seed, "head"):
        model = BertForSequenceClassification(_bert(num_labels=2 if task == "subject" else 1))
    model.bert.load_state_dict(_base().bert.state_dict(), strict=False)
    delta = 0.9 if stabiliser == "decay" else 1.0
    optimizer = LayerDecay(LayerDecay.groups(model, layer_decay=delta, weight_decay=0.01), lr)
    schedules: dict[str, Schedule] = {"freeze": Telly(blocks=BLOCKS // 2), "fresh": FreshTop(frozen=None, seed=seed)}
    schedule = schedules.get(stabiliser)
    if schedule is not None:
        schedule.attach(model, optimizer)
    scheduler = get_linear_schedule_with_warmup(optimizer, STEPS // 10, STEPS)
    model.train()
    for step in range(STEPS):
        if schedule is not None:
            schedule.begin_step(step)
        if step % (EXAMPLES // ROWS) == 0:
            order = torch.randperm(EXAMPLES, generator=generator(seed, "order", step)).split(ROWS)
        model(**{key: value[order[step % (EXAMPLES // ROWS)]] for key, value in data.items()}).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def _score(model: nn.Module, task: str, data: Batch) -> float:
    """Accuracy above the share of the commonest class; or the share of the variance that is explained."""
    logits, labels = model(input_ids=data["input_ids"]).logits, data["labels"]
    if task == "subject":
        share = float(labels.float().mean())
        found = float((logits.argmax(1) == labels).float().mean()) - max(share, 1 - share)
    else:
        found = float(1 - (logits[:, 0] - labels).square().mean() / labels.var(correction=0))
    return found if math.isfinite(found) else -math.inf


@CLAIM.comparison
def grid(seed: int) -> dict[str, float]:
    """Every run of every stabiliser at the rate that is best for it, on one set of 64 rows per task."""
    figures: dict[str, float] = {}
    for task in TASKS:
        data, dev = _rows(task, EXAMPLES, "train", seed), _rows(task, 128, "dev", seed)
        test = _rows(task, 256, "test")
        for stabiliser in STABILISERS:
            made = {(lr, i): _run(task, stabiliser, lr, data, 100 * seed + i) for lr in RATES for i in range(SEARCH)}
            lr = max(RATES, key=lambda lr: mean(_score(made[lr, i], task, dev) for i in range(SEARCH)))
            models = [made[lr, i] for i in range(SEARCH)]
            models += [_run(task, stabiliser, lr, data, 100 * seed + i) for i in range(SEARCH, RUNS)]
            here, there = ([max(_score(m, task, rows), -1.0) for m in models] for rows in (dev, test))
            figures[f"{task}, {stabiliser}: rate"] = lr
            for i in range(RUNS):
                figures[f"{task}, {stabiliser}: run {i}, dev"] = here[i]
                figures[f"{task}, {stabiliser}: run {i}"] = there[i]
    return figures


def _all(figures: Figures, task: str, stabiliser: str, suffix: str = "") -> list[float]:
    return [x for i in range(RUNS) for x in figures[f"{task}, {stabiliser}: run {i}{suffix}"]]


def _failed(scores: Sequence[float]) -> int:
    return sum(not score > MARGIN for score in scores)


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """Over the 12 runs of each task; the recommended stabiliser is not plain."""
    checks = []
    for task in TASKS:
        dev = {s: _all(figures, task, s, ", dev") for s in STABILISERS[1:]}
        best = min(dev, key=lambda s: (_failed(dev[s]), -mean(dev[s])))
        plain, ours = _all(figures, task, "plain"), _all(figures, task, best)
        name = f"{task}, {best}"
        checks += [
            Check(f"{name}: standard deviation - plain's, points", 100 * (stdev(ours) - stdev(plain)), "<=", 0),
            Check(f"{name}: failed runs - plain's, of {len(plain)}", _failed(ours) - _failed(plain), "<=", 0),
            Check(f"{name}: mean above a constant answer, points", 100 * mean(ours), ">=", 5),
        ]
    return checks
