"""Experiments on scikit-learn's digits: fixed splits, variants of the pictures, small models, training, search.

    data = load()                                                # train, validation and test, the same in every claim
    model = train(vit(seed=0), *data.train, steps=300, lr=1e-3, seed=0)
    accuracy(model, *data.test)                                  # percent

Pictures are (n, 1, 8, 8) float32 in -1 to 1; labels are (n,) int64. Every function has its own seed and leaves torch's
global random state alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import ViTConfig, ViTForImageClassification

from tunesmith.core.seeds import generator, seed_of
from tunesmith.core.statedict import Checkpoint
from tunesmith.world.images import digits

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
Rows = tuple[Tensor, Tensor]
"""Pictures and labels."""


@dataclass(frozen=True)
class Digits:
    """Three parts that share no picture: 1077 to train on, 360 to choose by, 360 to report."""

    train: Rows
    validation: Rows
    test: Rows

    def each(self, change: Callable[[Tensor], Tensor]) -> Digits:
        """The same with every picture changed: another task with the same labels."""
        parts = ((change(x), y) for x, y in (self.train, self.validation, self.test))
        return Digits(*parts)


@lru_cache
def load() -> Digits:
    """The digits; the split is fixed."""
    images, labels = digits("train")
    order = np.random.default_rng(0).permutation(len(images))
    chosen, kept = order[:360], order[360:]
    return Digits(_rows(images[kept], labels[kept]), _rows(images[chosen], labels[chosen]), _rows(*digits("heldout")))


def _rows(images: np.ndarray, labels: np.ndarray) -> Rows:
    return torch.from_numpy(images).float()[:, None] / 127.5 - 1, torch.from_numpy(labels)


def shifted(x: Tensor, seed: int, most: int = 1) -> Tensor:
    """Each picture moved by up to `most` pixels in both directions, black moving in."""
    padded = F.pad(x, (most,) * 4, value=-1.0)
    moves = torch.randint(2 * most + 1, (len(x), 2), generator=generator(seed, "shifted")).tolist()
    return torch.stack([padded[i, :, b : b + 8, a : a + 8] for i, (a, b) in enumerate(moves)])


def noisy(x: Tensor, seed: int, size: float = 0.5) -> Tensor:
    """With normal noise of standard deviation `size` added."""
    return x + size * torch.randn(x.shape, generator=generator(seed, "noisy"))


def permuted(x: Tensor, seed: int) -> Tensor:
    """With the 64 pixels in another order, the same one for all pictures."""
    order = torch.randperm(64, generator=generator(seed, "permuted"))
    return x.flatten(1)[:, order].view_as(x)


def turned(x: Tensor, quarters: int) -> Tensor:
    """Rotated by quarters of a turn."""
    return torch.rot90(x, quarters, (2, 3))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.linear(x))


class ResidualMLP(nn.Module):
    """64 pixels -> `width`, then blocks h + relu(W h + b), then 10 logits."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.blocks = nn.ModuleList(_Residual(width) for _ in range(blocks))
        self.classifier = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            x = block(x)
        return self.classifier(x)


def mlp(seed: int, width: int = 64, blocks: int = 3) -> ResidualMLP:
    """An untrained residual MLP."""
    return seeded(lambda: ResidualMLP(width, blocks), seed)


def vit(seed: int, width: int = 32, blocks: int = 3) -> ViTForImageClassification:
    """An untrained ViT with patches of 2 x 2 pixels."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        intermediate_size=2 * width,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return seeded(lambda: ViTForImageClassification(config), seed)


def seeded(make: Callable[[], T], seed: int) -> T:
    """What `make` makes when torch's global seed is `seed`; the random state is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def logits(model: nn.Module, x: Tensor, state: Mapping[str, Tensor] | None = None) -> Tensor:
    """(n, 10) of a model, or of its architecture with the tensors of `state`, differentiable in them."""
    out = model(x) if state is None else functional_call(model, dict(state), (x,))
    return out if isinstance(out, Tensor) else out.logits


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, state: Mapping[str, Tensor] | None = None) -> float:
    """Percent of right answers in evaluation mode."""
    model.eval()
    return 100 * (logits(model, x, state).argmax(-1) == y).double().mean().item()


def train(
    model: M,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    lr: float,
    seed: int,
    batch: int = 64,
    weight_decay: float = 0.0,
    label_smoothing: float = 0.0,
    change: Callable[[Tensor, int], Tensor] | None = None,
    decay: bool = True,
    parameters: Iterable[nn.Parameter] | None = None,
) -> M:
    """Cross-entropy with AdamW; changes the model and returns it.

    Args:
        model: `x -> logits`, or a transformers image classifier.
        x: Pictures.
        y: Labels.
        steps: Optimizer steps; rows are drawn with replacement.
        lr: Learning rate at the start.
        seed: Of the rows drawn and of `change`.
        batch: Rows per step.
        weight_decay: Of AdamW.
        label_smoothing: Of the cross-entropy.
        change: `(pictures, seed) -> pictures`, an augmentation such as `shifted`.
        decay: Whether the learning rate falls linearly to zero.
        parameters: What trains; all that require gradients if not given.
    """
    chosen = [p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=lr, weight_decay=weight_decay)
    draw = generator(seed, "train")
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps) if decay else lr
        rows = torch.randint(len(x), (batch,), generator=draw)
        pictures = x[rows] if change is None else change(x[rows], seed_of(seed, step))
        loss = F.cross_entropy(logits(model, pictures), y[rows], label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def search(run: Callable[[float], T], rates: Iterable[float], score: Callable[[T], float]) -> tuple[T, float]:
    """The result of the learning rate with the highest score (the first of equals), and that rate."""
    done = [(run(rate), rate) for rate in rates]
    scores = [score(result) for result, _ in done]
    return done[scores.index(max(scores))]


def snapshot(model: nn.Module, name: str = "model") -> Checkpoint:
    """A copy of the weights."""
    return Checkpoint({key: value.detach().clone() for key, value in model.state_dict().items()}, name)
