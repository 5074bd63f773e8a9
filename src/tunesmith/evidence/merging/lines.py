"""LiNeS: its factors exactly; forgetting undone after fine-tuning, and gain over task arithmetic, on digits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.merging import Judges, merged, weighted
from tunesmith.core.statedict import Checkpoint
from tunesmith.evidence import kit_digits as kit
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.evidence.kit_digits import Digits, ResidualMLP
from tunesmith.merging.lines import Lines

WIDTH, BLOCKS = 128, 6
PRETRAIN, TUNE = 800, 1000
RATE, NOISE = 3e-3, 0.25
SCALES = [step / 10 for step in range(11)]

CLAIM = Claim(
    "lines",
    says="Scaling what fine-tuning changed linearly with depth keeps the accuracy of the new task and gives back what "
    "was forgotten; added to task arithmetic it makes better multi-task models.",
    where="abstract; Sections 4 and 5",
    ran="Identities on small checkpoints. Then a residual MLP of six blocks, pretrained on the digits at a learning "
    "rate of 3e-3, fine-tuned for 1000 steps at a tenth of it on the digits moved one pixel to the right with noise. "
    "Of the gammas 0.9, 0.8, ..., 0 the one that gives back most of the old task and keeps 98 % of the new one is "
    "compared with the same change scaled uniformly, by that of 1, 0.9, ..., 0 which gives back most of the old task "
    "and keeps as much of the new one; the gamma that the paper's rule takes on validation pictures (twice the new "
    "task plus the old one) is reported beside it. Multi-task: the sum of three such changes (moved right, down and "
    "left), task arithmetic with its best scale of 0.1, ..., 1 against LiNeS with its best beta of the same, both by "
    "mean validation accuracy. Test pictures throughout.",
    not_held="LiNeS gives back more of the old task than uniform scaling at the same cost to the new one, but a fifth "
    "of what was lost, not half; and on three tasks it is behind task arithmetic. Probably because a pixel's shift is "
    "a change of the input: the first of six blocks must learn it, and those are the ones that LiNeS scales down most. "
    "The paper's tasks are new classes for a deep CLIP model, whose first layers need to change little.",
)


def _blocks(count: int, by: float = 0.0) -> Checkpoint:
    names = ["embed.weight", *(f"blocks.{i}.mlp.0.weight" for i in range(count)), "norm.weight", "head.weight"]
    g = torch.Generator().manual_seed(0)
    return Checkpoint({name: torch.randn(5, generator=g) + by for name in names})


@CLAIM.exact
def factors_are_the_formula() -> list[Check]:
    """With alpha 0.2 and beta 0.8, four blocks are scaled by 0.2, 0.467, 0.733 and 1, all else by 0.2."""
    base, tuned = _blocks(4), _blocks(4, by=1.0)
    result = merged(Lines(form="multi-task", alpha=0.2, beta=0.8), [tuned], base)
    got = [float((result[name] - base[name]).mean()) for name in base]
    expected = [0.2, 0.2, 0.2 + 0.8 / 3, 0.2 + 1.6 / 3, 1.0, 0.2, 0.2]
    return [Check("largest error", max(abs(a - b) for a, b in zip(got, expected, strict=True)), "<=", 1e-6)]


@CLAIM.exact
def neutral_settings() -> list[Check]:
    """beta = 0 is uniform scaling; alpha = 1, beta = 0 and gamma = 1 give the tuned model bit for bit."""
    base, tuned = _blocks(4), _blocks(4, by=1.0)
    half = merged(Lines(form="multi-task", alpha=0.5, beta=0.0), [tuned], base)
    error = max(float((half[name] - (base[name] + tuned[name]) / 2).abs().max()) for name in base)
    whole = (Lines(form="multi-task", alpha=1.0, beta=0.0), Lines(gamma=1.0))
    differing = sum(not torch.equal(t, tuned[n]) for m in whole for n, t in merged(m, [tuned], base).items())
    return [Check("error against uniform scaling", error, "<=", 1e-6), Check("tensors that differ", differing, "==", 0)]


@CLAIM.exact
def alpha_of_one_task() -> Check:
    """For one task whose merged vector is its own, alpha by the norms is 1."""
    base, tuned = _blocks(3), _blocks(3, by=1.0)
    method = Lines(form="multi-task", beta=0.5)
    merged(method, [tuned, tuned], base)
    return Check("|alpha - 1|", abs(float(str(method.record()["alpha"])) - 1), "<=", 1e-6)


@CLAIM.exact
def depth_is_the_block() -> Check:
    """`blocks.7.mlp.0.weight` is of the last of eight blocks, not of the first."""
    base, tuned = _blocks(8), _blocks(8, by=1.0)
    result = merged(Lines(gamma=0.3), [tuned], base)
    name = "blocks.7.mlp.0.weight"
    return Check("error of its factor 1", float((result[name] - tuned[name]).abs().max()), "<=", 1e-6)


# Padding before and after the last dimension, then before and after the one before it.
MOVES = {"right": (1, 0, 0, 0), "down": (0, 0, 1, 0), "left": (0, 1, 0, 0)}


def moved(move: str) -> Callable[[Tensor, int], Tensor]:
    """Pictures moved by one pixel, black moving in, with noise added."""
    _, after_x, _, after_y = MOVES[move]

    def change(x: Tensor, seed: int) -> Tensor:
        padded = F.pad(x, MOVES[move], value=-1.0)
        return kit.noisy(padded[..., after_y : 8 + after_y, after_x : 8 + after_x], seed, NOISE)

    return change


def _accuracy(data: Digits, model: ResidualMLP, state: Mapping[str, Tensor], part: str = "test") -> float:
    return kit.accuracy(model, *getattr(data, part), state=state)


@CLAIM.comparison
def digits(seed: int) -> dict[str, float]:
    """Accuracies on the old and the new task, and the mean over three tasks, in percent."""
    old = kit.load()
    net = kit.train(kit.mlp(seed, WIDTH, BLOCKS), *old.train, steps=PRETRAIN, lr=RATE, seed=seed)
    base = kit.snapshot(net)
    tuned, tasks = [], []
    for move in MOVES:
        change = moved(move)
        one = copy.deepcopy(net)
        kit.train(one, *old.train, steps=TUNE, lr=RATE / 10, seed=seed, change=change)
        tuned.append(kit.snapshot(one))
        tasks.append(old.each(lambda x, change=change: change(x, seed)))
    return {**_single(net, base, tuned[0], old, tasks[0]), **_multi(net, base, tuned, tasks)}


def _single(net: ResidualMLP, base: Checkpoint, tuned: Checkpoint, old: Digits, new: Digits) -> dict[str, float]:
    most = (_accuracy(new, net, tuned, "validation"), _accuracy(old, net, base, "validation"))

    def score(state: Mapping[str, Tensor]) -> float:
        return (
            2 * _accuracy(new, net, state, "validation") / most[0] + _accuracy(old, net, state, "validation") / most[1]
        )

    def measured(state: Mapping[str, Tensor]) -> tuple[float, float]:
        held = dict(state)
        return _accuracy(new, net, held), _accuracy(old, net, held)

    before, after = measured(base), measured(tuned)
    curve = [measured(merged(Lines(gamma=gamma), [tuned], base)) for gamma in SCALES[:-1]]
    lines = max((point for point in curve if point[0] >= 0.98 * after[0]), key=lambda p: p[1], default=curve[-1])
    scaled = [measured(weighted([tuned], lambda _, s=s: [s], base)) for s in SCALES]
    uniform = max((point for point in scaled if point[0] >= lines[0]), key=lambda p: p[1], default=after)
    method = Lines()
    ruled = measured(merged(method, [tuned], base, Judges(score=score)))
    points = {"pretrained": before, "fine-tuned": after, "LiNeS": lines, "uniform": uniform, "LiNeS by the rule": ruled}
    figures = {f"new task, {key}": point[0] for key, point in points.items()}
    figures |= {f"old task, {key}": point[1] for key, point in points.items()}
    return {**figures, "gamma by the rule": float(str(method.record()["alpha"]))}


def _multi(net: ResidualMLP, base: Checkpoint, tuned: list[Checkpoint], tasks: list[Digits]) -> dict[str, float]:
    def mean(state: Mapping[str, Tensor], part: str) -> float:
        held = dict(state)
        return sum(_accuracy(task, net, held, part) for task in tasks) / len(tasks)

    def summed(scale: float) -> Checkpoint:
        return weighted(tuned, lambda _: [scale] * len(tuned), base)

    arithmetic = max((summed(s) for s in SCALES[1:]), key=lambda state: mean(state, "validation"))
    judges = Judges(score=lambda state: mean(state, "validation"))
    lines = merged(Lines(form="multi-task"), [summed(1.0), *tuned], base, judges)
    return {"three tasks, arithmetic": mean(arithmetic, "test"), "three tasks, LiNeS": mean(lines, "test")}


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """New task kept, old task given back, more than by uniform scaling; more than task arithmetic."""
    seeds = range(figures.seeds())
    old = {key: figures[f"old task, {key}"] for key in ("pretrained", "fine-tuned", "LiNeS", "uniform")}
    kept = [figures["new task, LiNeS"][i] / figures["new task, fine-tuned"][i] for i in seeds]
    back = [(old["LiNeS"][i] - old["fine-tuned"][i]) / (old["pretrained"][i] - old["fine-tuned"][i]) for i in seeds]
    more = [old["LiNeS"][i] - old["uniform"][i] for i in seeds]
    gain = [figures["three tasks, LiNeS"][i] - figures["three tasks, arithmetic"][i] for i in seeds]
    found = Figures({"kept": kept, "back": back, "more": more, "gain": gain})
    return [
        Check("share of the new task's accuracy kept", found.median("kept"), ">=", 0.98),
        Check("share of the lost old accuracy given back", found.median("back"), ">=", 0.5),
        Check("old task, LiNeS - uniform, points", found.median("more"), ">=", 0.1),
        Check("three tasks, LiNeS - task arithmetic, points", found.median("gain"), ">=", 0.1),
    ]
