"""Model soups: identities of the mean; eight fine-tuned ViTs on digits, averaged in three ways."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.merging import Judges, merged
from tunesmith.core.statedict import Checkpoint
from tunesmith.evidence import kit_digits as kit
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.merging.model_soups import ModelSoups

PRETRAIN, TUNE, FRESH = 600, 200, 400
RATE = 4e-3

CLAIM = Claim(
    "model-soups",
    says="Averaging models fine-tuned from one start with different hyper-parameters is often more accurate than the "
    "best of them, at the cost of one; the greedy soup is never worse than the best on its validation data.",
    where="abstract; Recipe 1",
    ran="Identities on random checkpoints. Then a ViT of three blocks, pretrained on half of the digits and fine-tuned "
    "on all of them eight times, 200 steps: learning rate 1e-3 or 4e-3, weight decay and label smoothing of 0.1 or "
    "not, noise or not. The baseline is the best of the eight by validation accuracy, which also leads the greedy "
    "soup; test accuracy of that, of the uniform, the greedy and the learned soup (40 steps), and as a control of the "
    "mean of three ViTs trained from different random starts.",
)


def _random(count: int) -> list[Checkpoint]:
    made = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        made.append(Checkpoint({f"blocks.{b}.w": torch.randn(64, 64, generator=g) for b in range(3)}, f"model {i}"))
    return made


def _largest(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@CLAIM.exact
def greedy_is_never_worse_on_validation() -> Check:
    """The greedy soup's validation score is at least the best single model's, for 50 random scores."""
    worst = 0.0
    for seed in range(50):
        models, direction = _random(6), torch.randn(64, 64, generator=torch.Generator().manual_seed(100 + seed))

        def score(state: Mapping[str, Tensor], direction: Tensor = direction) -> float:
            return float((state["blocks.0.w"] * direction).sum() - (state["blocks.1.w"] ** 2).sum())

        soup = merged(ModelSoups(kind="greedy"), models, judges=Judges(score=score))
        worst = max(worst, max(map(score, models)) - score(soup))
    return Check("best single - greedy, largest", worst, "<=", 0.0)


@CLAIM.exact
def order_does_not_matter() -> Check:
    """The uniform soup of five models is the same bit for bit in all 120 orders."""
    models = _random(5)
    first = dict(merged(ModelSoups(), models))
    soups = (merged(ModelSoups(), list(order)) for order in itertools.permutations(models))
    return Check("largest difference", max(_largest(first, soup) for soup in soups), "==", 0.0)


@CLAIM.exact
def copies_give_the_model() -> Check:
    """n identical models give that model, for n = 1 to 9."""
    (model,) = _random(1)
    return Check(
        "largest difference", max(_largest(merged(ModelSoups(), [model] * n), model) for n in range(1, 10)), "==", 0
    )


@CLAIM.exact
def streamed_mean_is_the_mean() -> Check:
    """Adding one model after the other gives the mean of all at once."""
    models = _random(9)
    mean = {name: torch.stack([m[name] for m in models]).double().mean(0) for name in models[0]}
    return Check("largest difference", _largest(merged(ModelSoups(), models), mean), "<=", 1e-6)


@CLAIM.exact
def logits_of_a_linear_model() -> Check:
    """For a linear model the soup's logits are the mean of the logits."""
    models = _random(4)
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    mean = torch.stack([x @ m["blocks.0.w"].T for m in models]).mean(0)
    return Check(
        "largest difference", float((x @ merged(ModelSoups(), models)["blocks.0.w"].T - mean).abs().max()), "<=", 1e-4
    )


@CLAIM.comparison
def digits(seed: int) -> dict[str, float]:
    """Test accuracies in percent."""
    data = kit.load()
    x, y = data.train
    net = kit.train(kit.vit(seed), x[: len(x) // 2], y[: len(x) // 2], steps=PRETRAIN, lr=RATE, seed=seed)
    models = []
    for i, (rate, decay, noise) in enumerate(itertools.product((1e-3, RATE), (0.0, 0.1), (False, True))):
        one = kit.train(
            copy.deepcopy(net),
            x,
            y,
            steps=TUNE,
            lr=rate,
            seed=100 * seed + i,
            weight_decay=decay,
            label_smoothing=decay,
            change=_noisy if noise else None,
        )
        models.append(kit.snapshot(one, f"model {i}"))
    fresh = [kit.train(kit.vit(1000 + 10 * seed + i), x, y, steps=FRESH, lr=RATE, seed=seed) for i in range(3)]

    def accuracy(state: Mapping[str, Tensor], part: kit.Rows = data.test) -> float:
        return kit.accuracy(net, *part, state=dict(state))

    def loss(state: Mapping[str, Tensor], scale: Tensor) -> Tensor:
        pictures, labels = data.validation
        return F.cross_entropy(scale * kit.logits(net, pictures, state), labels)

    judges = Judges(score=lambda state: accuracy(state, data.validation), loss=loss)
    scores = [accuracy(model, data.validation) for model in models]
    figures = {"pretrained": accuracy(kit.snapshot(net)), "best single": accuracy(models[scores.index(max(scores))])}
    for kind in ("uniform", "greedy", "learned"):
        method = ModelSoups(kind=kind, steps=40)
        figures[kind] = accuracy(merged(method, models, judges=judges))
        if kind == "greedy":
            figures["models in the greedy soup"] = len(list(method.record()["kept"]))
    alone = [kit.accuracy(model, *data.test) for model in fresh]
    together = accuracy(merged(ModelSoups(), [kit.snapshot(model) for model in fresh]))
    return {**figures, "different starts, worst single": min(alone), "different starts, uniform": together}


def _noisy(x: Tensor, seed: int) -> Tensor:
    return kit.noisy(x, seed, 0.3)


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """Greedy at least as good as the best single model; different starts cannot be averaged."""
    seeds = range(figures.seeds())
    gain = [figures["greedy"][i] - figures["best single"][i] for i in seeds]
    fall = [figures["different starts, worst single"][i] - figures["different starts, uniform"][i] for i in seeds]
    found = Figures({"gain": gain, "fall": fall})
    return [
        Check("greedy - best single, points", found.median("gain"), ">=", -0.1),
        Check("worst single - uniform from different starts, points", found.median("fall"), ">=", 20),
    ]
