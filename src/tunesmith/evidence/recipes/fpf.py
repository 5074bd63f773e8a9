"""FPF: what rests and what is in the buffer, exactly; FLOPs by count; ten digits learnt two at a time."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.meters import flops
from tunesmith.evidence import kit_digits as kit
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.recipes.fpf_learn import Loop, Meter, Movement, finetune, sensitivity, sgd, switched, usual
from tunesmith.recipes.fpf_stream import Reservoir, Stream, slots
from tunesmith.schedules.prone_modules import groups, pick

TASKS, EPOCHS, BATCH, BUFFER, ITERATIONS, PHASE_BATCH, K = 5, 5, 16, 200, 60, 32, 5
RATES = (0.02, 0.05, 0.1)
METHODS = {"sgd": (0, 0), "sgd_fpf": (0, 1), "er": (BATCH, 0), "er_fpf": (BATCH, 1), "k_fpf": (0, K)}
"""Rows replayed in each step, and phases."""

CLAIM = Claim(
    "fpf",
    says="Fine-tuning only the modules that are most prone to forgetting on a small buffer at the end improves methods "
    "of continual learning by a large margin; k such phases in place of replay perform comparably at much lower cost.",
    where="abstract",
    ran="Identities and counts on a small model. Then scikit-learn's digits as five tasks of two classes, 5 epochs "
    "each in batches of 16, on an untrained network of three convolutions with batch normalisation; 200 rows in the "
    "buffer; a phase is 60 steps of 32 rows on normalisation, first convolution and last layer. SGD, SGD with one "
    "phase at the end, replay of 16 rows in every step (ER), ER with one phase at the end, and SGD with 5 phases "
    "(k-FPF). Each has the same three learning rates, chosen on validation rows; accuracy on test rows of all ten.",
    not_held="A phase after replay helps with every seed (95, 97 and 98 % against 90, 93 and 94 %), but by 3.3 "
    "points, not 5: at its best rate replay leaves little room. SGD with one phase costs 0.613 of replay, "
    "not 0.6, since a phase costs the same however short the stream; with the 360 rows that are kept for "
    "choosing in the stream it would be 0.583. The last layer is the most sensitive group by far (S 7.7, "
    "median group 2.9), but running means and variances are below it (1.8 and 1.0). Probably because they "
    "follow with delay: 0.9^14, a quarter, of a change is left after an epoch of 14 batches, and counts in "
    "the next one. In a first run of the same seeds, in which the very first epoch was one of the others, "
    "they had 1.3 and 0.3; it was taken out since it begins a task too. ER and k-FPF chose the largest of "
    "the three rates.",
)


class Net(nn.Module):
    """Three convolutions with batch normalisation, the mean over all places, a linear layer."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        a, b, c = widths
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv2d(1, a, 3, padding=1, bias=False),
            nn.Conv2d(a, b, 3, padding=1, bias=False),
            nn.Conv2d(b, c, 3, padding=1, stride=2, bias=False),
        )
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(a), nn.BatchNorm2d(b), nn.BatchNorm2d(c)
        self.fc = nn.Linear(c, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        x = F.relu(self.bn2(self.conv2(x)))
        logits = self.fc(F.relu(self.bn3(self.conv3(x))).mean((2, 3)))
        return SimpleNamespace(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))


@dataclass
class Learnt:
    """A model after a stream: FLOPs, accuracy on validation rows in percent, S_l, rows in the buffer."""

    model: nn.Module
    flops: int
    accuracy: float
    sensitive: dict[str, float] = field(default_factory=dict)
    buffer: tuple[int, ...] = ()


def _divided(labels: Tensor) -> list[list[int]]:
    return [(labels // 2 == task).nonzero()[:, 0].tolist() for task in range(TASKS)]


def learn(data: kit.Rows, seed: int, lr: float, *, replay: int, phases: int, epochs: int = EPOCHS) -> Learnt:
    """The digits two at a time."""
    x, y = data
    stream = Stream(_divided(y), epochs=epochs, batch=BATCH, buffer=BUFFER, replay=replay, phases=phases, seed=seed)
    model = kit.seeded(Net, seed).train()
    optimizer, meter, loop, moved = sgd(model, lr), Meter(), Loop(seed=seed), Movement(model)
    changes = []
    moved.begin()

    def batch(rows: Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values": x[list(rows)], "labels": y[list(rows)]}

    for step in stream:
        given = batch((*step.rows, *step.replay))
        meter.run("stream", "", given, partial(loop.step, model, given, optimizer, step.number))
        if step.phase:
            drawn = slots(len(step.buffer), iterations=ITERATIONS, batch=PHASE_BATCH, seed=seed, phase=step.phase)
            given_now = [batch([step.buffer[slot] for slot in chosen]) for chosen in drawn]
            before = moved.copy()
            finetune(model, usual(model, domain=True), given_now, lr=lr, loop=loop, meter=meter, keys=(step.phase,))
            moved.skip(before)
        if step.ends_epoch:
            changes.append(moved.end())
            moved.begin()
    switches = [switched(epoch, epochs) for epoch in range(len(changes))]
    held = kit.load().validation
    scores = sensitivity(changes, switches)
    return Learnt(model, meter.total.total(), kit.accuracy(model, *held), scores, step.buffer)


# Exact ----------------------------------------------------------------------------------------------------------------


def _rows(count: int = 64) -> kit.Rows:
    x, y = kit.load().train
    return x[:count], y[:count]


@CLAIM.exact
def what_is_not_chosen_keeps_its_bits() -> list[Check]:
    """A phase changes the chosen groups and no other bit, running statistics included."""
    x, y = _rows()
    checks = []
    for modules in (["norm", "last", "first"], ["last"], ["norm.weight", "norm.mean"]):
        model = kit.seeded(Net, 0).train()
        model(x)  # so that statistics are not those of the start
        chosen = pick(groups(model), modules)
        # Layers that renew a statistic count their batches as well.
        counters = "norm" in " ".join(modules)
        state = {n: t for n, t in model.state_dict().items() if not (counters and n.endswith("tracked"))}
        before = {n: t.clone() for n, t in state.items()}
        finetune(model, modules, [{"pixel_values": x[i::4], "labels": y[i::4]} for i in range(4)], lr=0.1)
        changed = {n for n, t in before.items() if not torch.equal(t, model.state_dict()[n])}
        name = ", ".join(modules)
        checks.append(Check(f"{name}: tensors outside that changed", len(changed - chosen), "==", 0))
        checks.append(Check(f"{name}: tensors inside that did not", len(chosen - changed), "==", 0))
    return checks


@CLAIM.exact
def the_buffer_is_a_uniform_sample() -> list[Check]:
    """After n items each is in the buffer with probability size / n, at every n looked at."""
    times, size, worst, wrong = 2000, 5, 0.0, 0
    for seen in (10, 20):
        counts = [0] * seen
        for seed in range(times):
            held = Reservoir(size, seed)
            for item in range(seen):
                held.add(item)
            wrong += len(set(held.rows)) != size
            for item in held.rows:
                counts[item] += 1
        p = size / seen
        worst = max(worst, *(abs(c - times * p) / (times * p * (1 - p)) ** 0.5 for c in counts))
    return [
        Check("buffers that do not hold 5 different items", wrong, "==", 0),
        Check("largest distance of a count from its expectation, sigma", worst, "<=", 3),
    ]


@CLAIM.exact
def there_are_k_phases_at_equal_distances() -> list[Check]:
    """k phases, the last at the end, at distances that differ by one step at most, wherever tasks begin."""
    rows = [list(range(a, a + n)) for a, n in ((0, 37), (40, 90), (200, 13))]
    missing, uneven, late, wrong = 0, 0, 0, 0
    for k in range(1, 12):
        stream = Stream(rows, epochs=2, batch=8, buffer=20, phases=k)
        steps = list(stream)
        done = [step.number + 1 for step in steps if step.phase]
        missing += abs(len(done) - k)
        gaps = [b - a for a, b in pairwise([0, *done])]
        uneven = max(uneven, max(gaps) - min(gaps))
        late += done[-1] != len(steps)
        wrong += sum(sorted(s.buffer) != sorted(set(s.buffer)) and s.epoch == 0 for s in steps)
    return [
        Check("phases more or less than k", missing, "==", 0),
        Check("largest difference of two distances, steps", uneven, "<=", 1),
        Check("streams whose last phase is not at the end", late, "==", 0),
        Check("buffers with a row twice in the first epoch", wrong, "==", 0),
    ]


@CLAIM.exact
def phases_cost_what_their_steps_cost() -> list[Check]:
    """FLOPs of k-FPF are those of SGD and k x iterations steps, a step counted by hand with the rest frozen."""
    data = _rows(160)
    plain = learn(data, 0, 0.05, replay=0, phases=0, epochs=1)
    three = learn(data, 0, 0.05, replay=0, phases=2, epochs=1)
    x, y = (part[:PHASE_BATCH] for part in data)
    model = kit.seeded(Net, 0).train()
    for name, p in model.named_parameters():
        p.requires_grad_("bn" in name or name.startswith(("fc", "conv1")))
    one = flops(lambda: model(x, y).loss.backward())
    full = copy.deepcopy(model).requires_grad_(True)
    return [
        Check("FLOPs beside those", three.flops - plain.flops - 2 * ITERATIONS * one, "==", 0),
        Check("step with the rest frozen / full step", one / flops(lambda: full(x, y).loss.backward()), "<=", 0.75),
    ]


# Digits ---------------------------------------------------------------------------------------------------------------


@CLAIM.comparison
def two_digits_at_a_time(seed: int) -> dict[str, float]:
    data = kit.load()
    figures: dict[str, float] = {}
    for name, (replay, phases) in METHODS.items():
        best, rate = kit.search(
            lambda lr, replay=replay, phases=phases: learn(data.train, seed, lr, replay=replay, phases=phases),
            RATES,
            lambda done: done.accuracy,
        )
        figures |= {
            name: kit.accuracy(best.model, *data.test),
            f"{name}_rate": rate,
            f"{name}_gflops": best.flops / 1e9,
        }
        if name == "sgd":
            middle = statistics.median(best.sensitive.values())
            figures |= {f"S_{label}": score for label, score in best.sensitive.items()}
            prone = (best.sensitive[label] for label in ("last", "norm.mean", "norm.var"))
            figures["prone_over_median"] = min(prone) / middle
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    m = figures.median
    return [
        Check("ER and FPF - ER, points", m("er_fpf") - m("er"), ">=", 5),
        Check("k-FPF - SGD, points", m("k_fpf") - m("sgd"), ">=", 40),
        Check("k-FPF - ER, points", m("k_fpf") - m("er"), ">=", -12),
        Check("FLOPs of SGD and one phase / of ER", m("sgd_fpf_gflops") / m("er_gflops"), "<=", 0.6),
        Check("smallest S of last layer and statistics / median group", m("prone_over_median"), ">=", 1),
    ]
