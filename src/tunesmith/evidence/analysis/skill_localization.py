"""Skill localization: grafts, gradients, bytes exactly; a planted skill; the regions of two tasks of a small BERT."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import BertConfig, BertForMaskedLM

from tunesmith import world
from tunesmith.analysis.skill_mask import Mask, Places, _delta, base_patch, chosen, localise
from tunesmith.analysis.skill_metrics import accuracy, calibration_error, predictions
from tunesmith.core.entries import index_dtype
from tunesmith.core.seeds import forked, generator
from tunesmith.core.sparse import SparseDelta
from tunesmith.core.statedict import Checkpoint
from tunesmith.evidence import kit_chains, kit_tune
from tunesmith.evidence.claim import Check, Claim, Figures

TASKS = ("sentiment", "intents")
ITEMS, EPOCHS_BEFORE, STEPS, ROWS, SGD, ADAM = 4000, 3, 200, 16, 0.1, 3e-2
SHARE, PLANTED, EPOCHS = 0.01, 0.005, 20
Batch = Mapping[str, Tensor]

CLAIM = Claim(
    "skill-localization",
    says="Fine-tuned values of about 0.01 % of the parameters, put into the base model, keep more than 95 % of the "
    "fine-tuned performance, with a calibration error 40 to 90 % lower; regions of different tasks hardly overlap.",
    where="abstract; Sections 3 to 5",
    ran="Grafts, gradients and bytes exactly. Then a BERT of words (2 blocks, 64 wide, 88,000 numbers, 67,000 "
    "without embedding and head) fills masks in texts of the world's `sentiment` (without negation and contrast) and "
    "`intents`, each followed by a label drawn at random, three epochs of 8,000 texts; tuned with fixed embedding and "
    "head to fill the mask behind a text with its label, 200 steps of 16, SGD with a learning rate of 0.1 and momentum "
    "of 0.9. Masks: 1 % of the entries, 20 epochs of 8 of these batches, lr 1e7, 64 other texts to choose by; accuracy "
    "on 256 held-out texts. The same number of entries at random in place of the graft, and the region of either task "
    "with the values of the other. A planted skill: `intents` tuned by Adam (3e-2) in 0.5 % of the entries, drawn "
    "at random; then 5 % of the other entries moved by 0.3 times the mean size of a change, up or down. The rates were "
    "chosen on another seed, by what tuning reaches.",
    not_held="Grafts keep 95 to 99 % of what tuning reaches on `sentiment`, with 2 % of the entries once the mask is "
    "learnt, but 65 to 79 % on `intents`, with 5 %. Probably the model is too small: 0.01 % of it is 6 entries, which "
    "do nothing, where the paper's 0.01 % is 8,500; and what it knew of the task before was a label at random. "
    "Calibration is 7 to 42 % better with the grafts of `intents`, and 9 to 17 % worse with those of `sentiment`. Of "
    "planted entries the base patch finds all that stand out of the noise, but 18 to 21 % moved less than 0.3 of the "
    "mean, so that 0.9 was out of reach. The learnt mask gives up some of them, 8 to 14 % of the skill, and adds "
    "others, for accuracy: -1.6, +5.1 and +6.6 points over the base patch.",
)


# Exact ----------------------------------------------------------------------------------------------------------------


def _pair(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    base = kit_chains.model(32, 0).to(dtype)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            p.copy_(0.05 * torch.randn(p.shape, generator=generator(1, name)))
    return base, tuned


def _mask(base: nn.Module, tuned: nn.Module, level: float, patch: Places | None = None) -> tuple[Mask, dict[str, Any]]:
    a, b = Checkpoint(base.state_dict()), Checkpoint(tuned.state_dict())
    mask = Mask(a, b, patch or {}, chosen(a))
    for score in mask.scores.values():
        score.fill_(level)
    model = copy.deepcopy(base)
    held = dict(model.named_parameters())
    mask.put(held)
    return mask, held


@CLAIM.exact
def the_ends_of_a_graft() -> list[Check]:
    """Where gamma is 1 every entry is the fine-tuned one, where it is 0 the pretrained one, bit for bit."""
    wrong = 0
    for dtype in (torch.float32, torch.bfloat16):
        base, tuned = _pair(dtype)
        for level, model in ((1e3, tuned), (-1e3, base)):
            mask, held = _mask(base, tuned, level)
            wrong += sum(int((held[n] != dict(model.named_parameters())[n]).sum()) for n in mask.names)
    base, tuned = _pair()
    a, b = Checkpoint(base.state_dict()), Checkpoint(tuned.state_dict())
    drawn = torch.rand(a[chosen(a)[0]].numel(), generator=generator(2)) < 0.5
    name = chosen(a)[0]
    _, held = _mask(base, tuned, -1e3, {name: drawn.nonzero()[:, 0]})
    mixed = torch.where(drawn.view_as(a[name]), b[name], a[name])
    return [
        Check("entries that differ at gamma 0 and 1", wrong, "==", 0),
        Check("entries that differ under a mask of both", int((held[name] != mixed).sum()), "==", 0),
    ]


@CLAIM.exact
def the_gradient_is_autograds() -> list[Check]:
    """dL/dS is what autograd finds through theta(gamma), and the patch is the entries that moved most."""
    base, tuned = _pair(torch.float64)
    a, b = Checkpoint(copy.deepcopy(base).state_dict()), Checkpoint(tuned.state_dict())
    patch = {n: e.indices.long() for n, e in base_patch(a, b, share=0.1).items()}
    mask = Mask(a, b, patch, chosen(a), bias=1.0)
    ids = torch.randint(64, (4, 12), generator=generator(3))
    leaves = {n: s.double().requires_grad_() for n, s in mask.scores.items()}
    grafted = {}
    for name, score in leaves.items():
        start = torch.zeros(score.numel(), dtype=torch.float64)
        start[patch.get(name, torch.empty(0, dtype=torch.long))] = 1
        start = start.view_as(score)
        gamma = start + (1 - 2 * start) * (score - 1.0).sigmoid()
        grafted[name] = a[name] + gamma * (b[name] - a[name])
    functional_call(base, grafted, (), {"input_ids": ids, "labels": ids}).loss.backward()
    held = dict(base.named_parameters())
    mask.put(held)
    base.zero_grad()
    base(input_ids=ids, labels=ids).loss.backward()
    worst = largest = 0.0
    for name, leaf in leaves.items():
        grad = held[name].grad
        assert leaf.grad is not None
        assert grad is not None
        error = (mask.gradient(name, grad) - leaf.grad).abs().max()
        worst, largest = max(worst, float(error)), max(largest, float(leaf.grad.abs().max()))
    sizes = {n: (b[n] - a[n]).abs().float() for n in mask.names}
    inside = torch.cat([sizes[n].flatten()[at] for n, at in patch.items()])
    count = int(0.1 * sum(s.numel() for s in sizes.values()))
    above = sum(int((s > inside.min()).sum()) for s in sizes.values())
    return [
        Check("largest error, share of the largest gradient", worst / largest, "<=", 1e-6),
        Check("entries of the base patch - floor(s N)", len(inside) - count, "==", 0),
        Check("larger entries that it lacks", above - (len(inside) - 1), "==", 0),
    ]


@CLAIM.exact
def the_bytes_of_a_graft() -> list[Check]:
    """A stored graft takes 4 bytes for the place and 4 for the value of an entry; the checkpoint 4 for each number."""
    base, tuned = _pair()
    a, b = Checkpoint(base.state_dict()), Checkpoint(tuned.state_dict())
    graft = base_patch(a, b, share=0.01)
    with TemporaryDirectory() as folder:
        file = graft.save(Path(folder) / "graft.safetensors")
        stored, header = file.stat().st_size, int.from_bytes(file.read_bytes()[:8], "little")
    entry = 4 + index_dtype(1).itemsize
    whole = sum(p.numel() * p.element_size() for p in base.parameters())
    return [
        Check(
            "bytes of the file without its header - (4 + index) per entry",
            stored - 8 - header - entry * graft.count,
            "==",
            0,
        ),
        Check("entries", graft.count, ">=", 200),
        Check("share of the checkpoint's bytes", graft.nbytes / whole, "<=", 0.02),
    ]


# Comparison -----------------------------------------------------------------------------------------------------------


_FAMILIES = {"sentiment": world.get("sentiment", negation=False, contrast=False), "intents": world.get("intents")}


@lru_cache
def _vocabulary() -> dict[str, int]:
    """Every word of the items, their labels among them; 0 is padding, 1 the mask."""
    items = [i for family in _FAMILIES.values() for i in family.items(3000, split="train", seed=7)]
    found = sorted({w for i in items for w in (*_split(str(i.meta["text"])), i.answer)})
    return {word: index for index, word in enumerate(found, start=3)}


def _split(text: str) -> list[str]:
    return re.findall(r"[a-z]+|[^a-z\s]", text.lower())


def _rows(task: str, split: world.Split, count: int, seed: int) -> list[tuple[list[int], int]]:
    """Ids of each item's text, and of its label; 2 is a word that the vocabulary lacks."""
    words = _vocabulary()
    items = _FAMILIES[task].items(count, split=split, seed=seed)
    return [([words.get(w, 2) for w in _split(str(i.meta["text"]))], words[i.answer]) for i in items]


def _padded(rows: Sequence[Sequence[int]], fill: int = 0) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def _batches(task: str, split: world.Split, count: int, seed: int) -> list[Batch]:
    """Items with the mask behind their text, to be filled with the label."""
    rows = _rows(task, split, count, seed)
    found: list[Batch] = []
    for start in range(0, count, ROWS):
        some = rows[start : start + ROWS]
        ids = _padded([[*text, 1] for text, _ in some])
        labels = _padded([[*[-100] * len(text), label] for text, label in some], -100)
        found.append({"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels})
    return found


@lru_cache
def _base() -> nn.Module:
    """A BERT that fills in a third of the words of the items' texts, with a label behind that is drawn at random."""
    config = BertConfig(
        vocab_size=len(_vocabulary()) + 3,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with forked("base"):
        model = BertForMaskedLM(config)
    half = [EPOCHS_BEFORE * _rows(task, "train", ITEMS, 50) for task in TASKS]
    given = []
    for start in range(0, len(half[0]), ROWS // 2):
        g = generator("base", start)
        some = [row for rows in half for row in rows[start : start + ROWS // 2]]
        drawn = [label for rows in half for label in _shuffled([y for _, y in rows[start : start + ROWS // 2]], g)]
        ids = _padded([[*text, label] for (text, _), label in zip(some, drawn, strict=True)])
        hidden = (torch.rand(ids.shape, generator=g) < 1 / 3) & (ids != 0)
        hidden[:, 0] |= ~hidden.any(1)
        masked = {"input_ids": ids.masked_fill(hidden, 1), "labels": ids.masked_fill(~hidden, -100)}
        given.append({**masked, "attention_mask": (ids != 0).long()})
    kit_tune.tune(model, torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0), given)
    return model.eval()


def _shuffled(labels: Sequence[int], g: torch.Generator) -> list[int]:
    return [labels[i] for i in torch.randperm(len(labels), generator=g).tolist()]


def _tune(
    model: nn.Module, optimizer: torch.optim.Optimizer, given: Sequence[Batch], only: Mapping[str, Tensor] | None = None
) -> Checkpoint:
    """Tune embedding and head excepted, in the entries of `only` if given."""
    held = dict(model.named_parameters())
    free = chosen(Checkpoint(model.state_dict()))
    for name, p in held.items():
        p.requires_grad_(name in free)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, len(given))
    for batch in given:
        model(**batch).loss.backward()
        for name, mask in (only or {}).items():
            held[name].grad *= mask
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return Checkpoint({name: value.detach().clone() for name, value in model.state_dict().items()}, "tuned")


def _scores(model: nn.Module, graft: SparseDelta, given: Sequence[Batch]) -> tuple[float, float]:
    """Accuracy and calibration error with a graft, percent."""
    with graft.applied(model):
        label, answer, sure = predictions(model, given)
    return 100 * accuracy(label, answer), 100 * calibration_error(label, answer, sure)


def _region(graft: SparseDelta) -> Places:
    return {name: entries.indices.long() for name, entries in graft.items()}


def _random(base: Checkpoint, names: Sequence[str], count: int, seed: int) -> Places:
    sizes = [base[name].numel() for name in names]
    drawn = torch.randperm(sum(sizes), generator=generator(seed, "random"))[:count].sort().values
    ends = torch.tensor(sizes).cumsum(0)
    owner = torch.bucketize(drawn, ends, right=True)
    return {n: drawn[owner == i] - (ends[i] - sizes[i]) for i, n in enumerate(names) if bool((owner == i).any())}


@CLAIM.comparison
def regions(seed: int) -> dict[str, float]:
    """Accuracy of base, tuned, grafted; of random entries; of each task's region with the other's values."""
    model = copy.deepcopy(_base())
    base = Checkpoint({name: value.detach().clone() for name, value in model.state_dict().items()}, "base")
    figures: dict[str, float] = {}
    tuned, grafts, test = {}, {}, {}
    for task in TASKS:
        fresh = copy.deepcopy(model)
        given = _batches(task, "train", STEPS * ROWS, seed)
        tuned[task] = _tune(fresh, torch.optim.SGD(fresh.parameters(), lr=SGD, momentum=0.9), given)
        heldout = _batches(task, "heldout", 320, 0)
        dev, test[task] = heldout[:4], heldout[4:]
        grafts[task] = localise(base, tuned[task], model, given[:8], dev, share=SHARE, epochs=EPOCHS, seed=seed)
        label, answer, sure = predictions(fresh, test[task])
        figures[f"{task}: tuned"] = 100 * accuracy(label, answer)
        figures[f"{task}: tuned, calibration error"] = 100 * calibration_error(label, answer, sure)
        figures[f"{task}: base"] = _scores(model, SparseDelta({}, {}), test[task])[0]
        figures[f"{task}: graft"], figures[f"{task}: graft, calibration error"] = _scores(
            model, grafts[task], test[task]
        )
        about = json.loads(json.dumps(dict(grafts[task].about)))
        figures[f"{task}: entries"] = grafts[task].count
        figures[f"{task}: added"], figures[f"{task}: removed"] = about["added"], about["removed"]
        places = _random(base, chosen(base), grafts[task].count, seed)
        figures[f"{task}: random entries"] = _scores(model, _delta(base, tuned[task], places, "base", {}), test[task])[
            0
        ]
        least = base_patch(base, tuned[task], share=1e-4)
        figures[f"{task}: 0.01 %"] = _scores(model, least, test[task])[0]
    for task, other in (TASKS, TASKS[::-1]):
        crossed = _delta(base, tuned[task], _region(grafts[other]), "base", {})
        figures[f"{task}: region of {other}"] = _scores(model, crossed, test[task])[0]
        figures[f"{task}: share of {other}'s region"] = grafts[task].overlap(grafts[other])
    return {**figures, **_planted(model, base, seed)}


def _planted(model: nn.Module, base: Checkpoint, seed: int) -> dict[str, float]:
    names = chosen(base)
    skill = _random(base, names, int(PLANTED * sum(base[n].numel() for n in names)), 100 + seed)
    only = {name: torch.zeros(base[name].numel()) for name in names}
    for name, at in skill.items():
        only[name][at] = 1
    only = {name: mask.view_as(base[name]) for name, mask in only.items()}
    fresh = copy.deepcopy(model)
    given = _batches("intents", "train", STEPS * ROWS, seed)
    plain = _tune(fresh, torch.optim.Adam(fresh.parameters(), lr=ADAM), given, only)
    moved = sum(float((plain[n] - base[n]).abs().sum()) for n in names) / sum(map(len, skill.values()))
    noise = dict(plain)
    for name in names:
        g = generator(seed, "noise", name)
        hit = (torch.rand(base[name].shape, generator=g) < 0.05) & (only[name] == 0)
        sign = torch.randint(0, 2, base[name].shape, generator=g) * 2.0 - 1
        noise[name] = plain[name] + 0.3 * moved * sign * hit
    tuned = Checkpoint(noise, "tuned")
    heldout = _batches("intents", "heldout", 320, 0)
    first = base_patch(base, tuned, share=PLANTED)
    last = localise(base, tuned, model, given[:8], heldout[:4], share=PLANTED, epochs=EPOCHS, seed=seed)
    truth = _delta(base, plain, skill, "base", {})
    inside = {n: at[(plain[n] - base[n]).flatten()[at].abs() > 0.3001 * moved] for n, at in skill.items()}
    standing = _delta(base, plain, inside, "base", {})
    everything = _delta(base, tuned, {n: torch.arange(base[n].numel()) for n in names}, "base", {})
    return {
        "planted: tuned with noise": _scores(model, everything, heldout[4:])[0],
        "planted: the skill alone": _scores(model, truth, heldout[4:])[0],
        "planted: base patch": _scores(model, first, heldout[4:])[0],
        "planted: learnt mask": _scores(model, last, heldout[4:])[0],
        "planted: recall of the base patch": first.overlap(truth),
        "planted: share of the skill above the noise": standing.count / truth.count,
        "planted: recall of that share": first.overlap(standing),
        "planted: recall of the learnt mask": last.overlap(truth),
        "planted: entries of the base patch": first.count,
        "planted: entries of the learnt mask": last.count,
    }


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """Every seed has to hold."""
    seeds = range(figures.seeds())

    def least(first: str, second: str) -> float:
        return min(figures[first][s] - figures[second][s] for s in seeds)

    kept = min(figures[f"{t}: graft"][s] / figures[f"{t}: tuned"][s] for t in TASKS for s in seeds)
    own = min(least(f"{t}: graft", f"{t}: region of {o}") for t, o in (TASKS, TASKS[::-1]))
    first, last = (figures[f"planted: recall of the {which}"] for which in ("base patch", "learnt mask"))
    return [
        Check(
            "what tuning adds to the base, least, points",
            min(least(f"{t}: tuned", f"{t}: base") for t in TASKS),
            ">=",
            10,
        ),
        Check("accuracy of a graft of 1 % / of the tuned model, least", kept, ">=", 0.95),
        Check(
            "graft - random entries, least, points",
            min(least(f"{t}: graft", f"{t}: random entries") for t in TASKS),
            ">=",
            10,
        ),
        Check("own region - region of the other task, least, points", own, ">=", 1e-9),
        Check("recall of the base patch of the planted entries, least", min(first), ">=", 0.9),
        Check("of those above the noise, least", min(figures["planted: recall of that share"]), "==", 1),
        Check("recall lost by the learnt mask, most", max(a - b for a, b in zip(first, last, strict=True)), "<=", 0.01),
    ]
