"""Predictors of the attention that tokens get in each block, and thresholds on it: fitted, saved, loaded.

    lift(a, b) ~ exp(q_a . k_b / sqrt(rank) + d(a - b)),     q = Wq [x, 1],  k = Wk [x, 1]

for groups a, b of tokens whose mean on entering the block is x (`core.tokens`): two maps of low rank and a number for
each power of two of the distance, by regression of the logarithm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed

from tunesmith.core.files import staged_file
from tunesmith.core.seeds import generator
from tunesmith.core.tokens import Sighting, choose, pairs, score
from tunesmith.errors import CheckpointError, ModelError

FLOOR = 1e-2
"""Added to a lift before its logarithm: what is far below uniform need not be told apart."""
_DISTANCES = 24
_STEPS, _RATE, _DECAY = 300, 0.03, 1e-4


def predicted_lift(x: Tensor, query: Tensor, key: Tensor, distance: Tensor) -> Tensor:
    """exp(q_a . k_b / sqrt(rank) + d(a - b)), (B, g, g), with q = Wq [x, 1], k = Wk [x, 1].

    Args:
        x: (B, g, dim), from `features`.
        query: Wq, (rank, dim + 1).
        key: Wk, (rank, dim + 1).
        distance: (24,), d by the logarithm of the distance.
    """
    x = F.pad(x, (0, 1), value=1.0)
    q, k = F.linear(x, query), F.linear(x, key)
    return (torch.bmm(q, k.mT) * len(query) ** -0.5 + distance[_apart(x.shape[1], x.device)]).clamp_max(20).exp()


def _apart(g: int, device: torch.device) -> Tensor:
    """The entry of `distance` for each pair of groups: 0 for the same, then one for each power of two; (g, g)."""
    at = torch.arange(g, device=device)
    apart = (at[:, None] - at).clamp_min(0)
    return torch.where(apart > 0, (apart.clamp_min(1).float().log2().floor() + 1).long(), 0).clamp_max(_DISTANCES - 1)


def _joined(values: Sequence[Tensor], size: Sequence[int], device: torch.device) -> Tensor:
    """(B, ...) tensors, each padded with zeros to (B, *size), in one."""
    wide = []
    for value in values:
        made = value.new_zeros(len(value), *size)
        made[tuple(slice(n) for n in value.shape)] = value
        wide.append(made)
    return torch.cat(wide).to(device)


@torch.enable_grad()
def regress(seen: Sequence[Sighting], rank: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Regression of log lift on what entered: `query`, `key`, `distance` of `predicted_lift`, on `device`.

    The maps are sought among the leading principal components of the features, at most four per rank.
    """
    widest, dim = max(s.tokens.shape[1] for s in seen), seen[0].features.shape[2]
    x = _joined([s.features for s in seen], (widest, dim), device)
    lift = _joined([s.lift for s in seen], (widest, widest), device)
    count = _joined([s.tokens for s in seen], (widest,), device)
    target, mask = (lift + FLOOR).log(), pairs(count) > 0
    rows = x[count > 0]
    mean = rows.mean(0)
    size = max(1, min(4 * rank, rows.shape[1], len(rows) // 4))
    # eigh of the smaller Gram matrix; both give the leading right singular vectors.
    centred = rows - mean
    if len(rows) >= rows.shape[1]:
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        values, vectors = values[-size:], vectors[:, -size:]
    else:
        values, left = torch.linalg.eigh(centred @ centred.T)
        values = values[-size:]
        vectors = centred.T @ left[:, -size:] / values.clamp_min(1e-12).sqrt()
    scale = (values.clamp_min(1e-3 * float(values.max().clamp_min(1e-12))) / len(rows)).rsqrt()
    white = vectors * scale
    inputs, apart = F.pad((x - mean) @ white, (0, 1), value=1.0), _apart(widest, device)
    start = torch.randn(rank, size + 1, generator=generator(seed, "lemo")) / size**0.5
    query = start.to(device).requires_grad_()
    key = torch.zeros(rank, size + 1, device=device, requires_grad=True)
    distance = torch.zeros(_DISTANCES, device=device, requires_grad=True)
    number = mask.sum().clamp_min(1)
    optimizer = torch.optim.AdamW([query, key, distance], lr=_RATE, weight_decay=_DECAY)
    for step in range(_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (1 - step / _STEPS)
        q, k = F.linear(inputs, query), F.linear(inputs, key)
        found = torch.bmm(q, k.mT) * rank**-0.5 + distance[apart]
        optimizer.zero_grad()
        ((found - target) * mask).square().sum().div(number).backward()
        optimizer.step()
    maps = []
    for small in (query.detach(), key.detach()):
        wide = small[:, :-1] @ white.T
        maps.append(torch.cat([wide, (small[:, -1] - wide @ mean)[:, None]], dim=1))
    return maps[0], maps[1], distance.detach()


@dataclass(frozen=True)
class Held:
    """A held-out batch in one block: scores that are thresholded, exact ones, and what `choose` must know; (B, g)."""

    scores: Tensor
    exact: Tensor
    tokens: Tensor
    forced: Tensor

    @classmethod
    def of(cls, seen: Sighting, maps: Sequence[Tensor]) -> Held:
        """With scores by `predicted_lift` of these maps; exact ones if there are none."""
        exact = score(seen.lift, seen.tokens)
        if not maps:
            return cls(exact, exact, seen.tokens, seen.forced)
        lift = predicted_lift(seen.features, *(m.cpu() for m in maps))
        return cls(score(lift, seen.tokens), exact, seen.tokens, seen.forced)

    def kept(self, ratio: float, tau: Tensor | None, exact: bool = False) -> Tensor:
        return choose(self.exact if exact else self.scores, self.tokens, self.forced, ratio, tau)


def threshold(held: Sequence[Held], ratio: float) -> Tensor:
    """The tau under which the mean share of groups that `choose` keeps is nearest to `ratio`, ()."""
    found = torch.cat([h.scores[(h.tokens > 0) & ~h.forced] for h in held])
    values = torch.cat([found.unique(), torch.tensor([torch.inf])])

    def share(at: int) -> float:
        kept = [h.kept(ratio, values[at]).shape[1] / h.tokens.shape[1] for h in held]
        return sum(kept) / len(kept)

    low, high = 0, len(values) - 1
    while low < high:  # the first value that keeps no more than the ratio; the share falls with it
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle) <= ratio else (middle + 1, high)
    if low and abs(share(low - 1) - ratio) < abs(share(low) - ratio):
        low -= 1
    return values[low]


def quality(held: Sequence[Held], ratio: float, tau: Tensor) -> dict[str, float]:
    """`kept`, the share of groups kept; `agreement`, how much of an exactly scored choice of that size is among them.

    Groups that are kept whatever their score do not count for the agreement; 1 where there are no others.
    """
    shares, both, total = [], 0, 0
    for h in held:
        kept = h.kept(ratio, tau)
        k, g = kept.shape[1], h.scores.shape[1]
        ours = torch.zeros_like(h.forced).scatter(1, kept, True) & ~h.forced
        best = h.exact.masked_fill(h.tokens == 0, -torch.inf).masked_fill(h.forced, torch.inf)
        best = best.argsort(dim=1, descending=True, stable=True)[:, :k]
        theirs = torch.zeros_like(h.forced).scatter(1, best, True) & ~h.forced
        shares.append(k / g)
        both, total = both + int((ours & theirs).sum()), total + int(theirs.sum())
    return {"kept": sum(shares) / len(shares), "agreement": both / total if total else 1.0}


@dataclass
class Patterns:
    """What was learnt of every block.

    Attributes:
        tensors: `thresholds`, (blocks,); with predictors also `query` and `key`, (blocks, rank, dim + 1), and
            `distance`, (blocks, 24). Empty before calibration.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors["thresholds"]) if self.tensors else 0

    def tau(self, index: int) -> Tensor:
        """The threshold of a block, ()."""
        return self.tensors["thresholds"][index]

    def lift(self, index: int, x: Tensor) -> Tensor:
        """lift(a, b) of a block by its predictor, (B, g, g), from `features` x, (B, g, dim)."""
        held = (self.tensors[name][index].to(x.device) for name in ("query", "key", "distance"))
        with torch.autocast(x.device.type, enabled=False):
            return predicted_lift(x, *held)

    @classmethod
    def of(
        cls, seen: Sequence[Sequence[Sighting]], ratio: float, rank: int | None, device: torch.device
    ) -> tuple[Patterns, list[dict[str, float]]]:
        """Fitted to what the blocks saw, and the `quality` of each on what was held out; the same in all processes.

        Args:
            seen: By pass, then by block; the last quarter of the passes, at least one, is held out for the thresholds,
                a single one is used for both.
            ratio: Share of groups to keep.
            rank: Of the predictors; None for thresholds on exact scores.
            device: To fit on.

        Raises:
            ModelError: nothing was seen.
        """
        if not seen:
            raise ModelError("there are no batches to calibrate on")
        held = seen[-max(1, len(seen) // 4) :]
        used = seen[: -len(held)] or seen
        tensors: dict[str, list[Tensor]] = {"thresholds": []}
        found = []
        for index in range(len(seen[0])):
            maps: tuple[Tensor, ...] = ()
            if rank is not None:
                maps = regress([sight[index] for sight in used], rank, index, device)
                for name, value in zip(("query", "key", "distance"), maps, strict=True):
                    tensors.setdefault(name, []).append(value)
            told = [Held.of(sight[index], maps) for sight in held]
            tau = threshold(told, ratio)
            tensors["thresholds"].append(tau)
            found.append(quality(told, ratio, tau))
        made = cls({name: torch.stack([v.to(device) for v in values]) for name, values in tensors.items()})
        if distributed.is_available() and distributed.is_initialized():
            for value in made.tensors.values():
                distributed.broadcast(value, 0)
        return made, found

    def save(self, file: Path, options: Mapping[str, object]) -> None:
        """Write to a safetensors file, with the options that it was made with.

        Raises:
            CheckpointError: there is nothing yet.
        """
        if not self:
            raise CheckpointError(f"{file.name}: not calibrated yet, so that there is nothing to save")
        with staged_file(file) as staging:
            words = {name: str(value) for name, value in options.items()}
            save_file({k: v.cpu().contiguous() for k, v in self.tensors.items()}, staging, metadata=words)

    @classmethod
    def load(cls, file: Path, options: Mapping[str, object]) -> Patterns:
        """Read what `save` wrote.

        Raises:
            CheckpointError: there is no such file, or it was made with other options.
        """
        if not file.is_file():
            raise CheckpointError(f"there is no file {file}")
        with safe_open(str(file), "pt") as held:
            found = held.metadata() or {}
            if wrong := {name: v for name, v in options.items() if found.get(name) != str(v)}:
                raise CheckpointError(f"{file} was made with {found}, and is to be used with {wrong}")
            return cls({name: held.get_tensor(name) for name in held.keys()})  # noqa: SIM118


def flat(seen: Sequence[Sequence[Sighting]]) -> dict[str, Tensor]:
    """Sightings under names, for a checkpoint."""
    found: dict[str, Tensor] = {}
    for i, sights in enumerate(seen):
        for j, sight in enumerate(sights):
            found |= {f"seen/{i}/{j}/{name}": value for name, value in vars(sight).items()}
    return found


def unflat(state: Mapping[str, Tensor]) -> list[list[Sighting]]:
    """What `flat` put under names, other names left out."""
    held: dict[int, dict[int, dict[str, Tensor]]] = {}
    for key, value in state.items():
        if key.startswith("seen/"):
            _, i, j, name = key.split("/")
            held.setdefault(int(i), {}).setdefault(int(j), {})[name] = value.cpu()
    return [[Sighting(**held[i][j]) for j in sorted(held[i])] for i in sorted(held)]
