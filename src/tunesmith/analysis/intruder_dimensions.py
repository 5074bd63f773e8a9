"""Intruder dimensions: strong singular directions of a tuned weight that match none of the base's.

Shuttleworth, Andreas, Torralba and Sharma, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", 2024.

    W0 = U0 S0 V0^T,   W1 = U1 S1 V1^T     (float32, (out, in), adapters merged)
    s_j = max_i |<u1_j, u0_i>|,            j is an intruder if j <= k and s_j < threshold                  (Algorithm 1)
    repair   W1' = W1 + (lambda - 1) sum over intruders of sigma_j u_j v_j^T                               (Section 5)

Where singular values nearly coincide, their directions turn under the smallest change and s_j is small without any
intruder. So the same is counted for W0 plus a little noise (`jitter`); where that baseline is not zero, the count says
nothing. Directions of singular values that are numerically zero are arbitrary, and left out on both sides. The released
script takes layers as they are stored, which for GPT-2 swaps left and right; here both are read as (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from tunesmith.core.analysis import Subjects, matrices, transposed
from tunesmith.core.merging import read
from tunesmith.core.part import part
from tunesmith.core.report import Plot, Report, Table
from tunesmith.core.seeds import generator
from tunesmith.core.statedict import Checkpoint, Computed
from tunesmith.errors import ModelError, did_you_mean

Share = Annotated[float, Field(gt=0, le=1)]


@part(paper="arXiv:2410.21228")
def intruder_dimensions(
    subjects: Subjects,
    *,
    k: PositiveInt = 10,
    threshold: Share = 0.5,
    target_modules: Sequence[str] | None = None,
    jitter: NonNegativeFloat = 1e-3,
    device: str = "cpu",
    seed: int = 0,
) -> Report:
    """Count intruder dimensions in every linear layer, a matrix at a time.

    Embeddings, norms and the output head are left out, also where they are matrices.

    Args:
        subjects: `tuned` and `base`, of one architecture.
        k: How many of the strongest directions of each tuned matrix are looked at.
        threshold: Cosine similarity below which a direction is an intruder.
        target_modules: Only these layers, by their names' endings; all linear layers if not given.
        jitter: Norm of the baseline's noise, as a share of the norm of W0; 0 leaves the baseline out.
        device: Where the singular value decompositions run.
        seed: Of the noise.

    Returns:
        Counts per matrix and in total, similarities as a heat-map, effective rank of W1 - W0 (exponential of the
        entropy of its normalised singular values).

    Raises:
        TunesmithError: no base; no such layers; tensors that differ in name or shape, or are not finite.
    """
    base, tuned = subjects.pair("intruder-dimensions")
    names, flipped = _chosen(base, target_modules), transposed(base)
    columns = ["matrix", "rows", "columns", "intruders", "in the jitter baseline", "least similarity"]
    table = Table("Matrices", [*columns, "effective rank of the change", "size of the change"])
    rows: dict[str, list[float]] = {}
    ranks, total, baseline, hit = [], 0, 0, 0
    for name in names:
        W0, W1 = (_matrix(c, name, flipped, device) for c in (base, tuned))
        known = _known(W0)
        found = _directions(known, W1, k, threshold)
        noise = torch.randn(W0.shape, generator=generator(seed, "jitter", name)).to(device)
        noise *= jitter * W0.norm() / noise.norm()
        moved = int(_directions(known, W0 + noise, k, threshold).intruders.sum()) if jitter else None
        count, rank = int(found.intruders.sum()), effective_rank(W1 - W0)
        total, baseline, hit = total + count, baseline + (moved or 0), hit + (count > 0)
        least = found.similarity.min().item() if len(found.similarity) else 1.0
        size = ((W1 - W0).norm() / W0.norm()).item() if bool(W0.any()) else math.inf
        table.rows.append([name, *W0.shape, count, moved, least, rank, size])
        rows[name] = [*found.similarity.tolist(), *[1.0] * (k - len(found.similarity))]
        ranks.append(rank)
    report = Report(
        "Intruder dimensions",
        figures={
            "intruder dimensions": total,
            "in the jitter baseline": baseline if jitter else None,
            "matrices": len(names),
            "matrices with intruders": hit,
            "median effective rank of the change": median(ranks),
        },
        tables=[table],
        plots=[_heatmap(rows, k)],
        details={"k": k, "threshold": threshold, "similarity": rows},
    )
    if baseline:
        report.notes.append(
            f"{baseline} directions of the base itself turn below the threshold under noise of {jitter:g} of its norm: "
            "their singular values nearly coincide. Counts of those matrices say nothing about the tuning."
        )
    return report


def repair(
    subjects: Subjects,
    *,
    scale: float = 0.0,
    k: int = 10,
    threshold: float = 0.5,
    target_modules: Sequence[str] | None = None,
    device: str = "cpu",
) -> Checkpoint:
    """The tuned model with its intruder dimensions scaled by `scale` (lambda), computed a matrix at a time.

    Write it with `core.statedict.write(folder, repaired.items(), like=repaired.folder)`.

    Args:
        subjects: `tuned` and `base`, of one architecture.
        scale: 0 takes the intruders out, 1 leaves the model as it is.
        k: As in the analysis.
        threshold: As in the analysis.
        target_modules: As in the analysis.
        device: As in the analysis.
    """
    base, tuned = subjects.pair("intruder-dimensions")
    chosen, flipped = set(_chosen(base, target_modules)), transposed(base)

    def value(name: str) -> Tensor:
        kept = tuned.wide(name)
        if name not in chosen:
            return kept
        known = _known(_matrix(base, name, flipped, device))
        found = _directions(known, _matrix(tuned, name, flipped, device), k, threshold)
        j = found.intruders.nonzero()[:, 0]
        part = (found.U[:, j] * found.S[j]) @ found.Vh[j]
        part = (part.T if name in flipped else part).to(kept.device, kept.dtype)
        return kept + (scale - 1) * part if len(j) else kept

    return Computed(tuned, value, f"{tuned.name} with its intruder dimensions scaled by {scale:g}")


@dataclass(frozen=True)
class _Directions:
    """The decomposition of W1, and for its strongest directions, min(k, rank): s_j and whether each is an intruder."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    similarity: Tensor
    intruders: Tensor


def _known(W0: Tensor) -> Tensor:
    """The left singular vectors of the base, (out, rank)."""
    U, S, _ = torch.linalg.svd(W0, full_matrices=False)
    return U[:, : _rank(S, W0)]


def _directions(known: Tensor, W1: Tensor, k: int, threshold: float) -> _Directions:
    U, S, Vh = torch.linalg.svd(W1, full_matrices=False)
    cosines = (U[:, : min(k, _rank(S, W1))].T @ known).abs()
    similarity = cosines.max(1).values.cpu() if known.shape[1] else torch.zeros(len(cosines))
    return _Directions(U, S, Vh, similarity, similarity < threshold)


def _rank(S: Tensor, W: Tensor) -> int:
    """Singular values above the rounding of the largest, as `torch.linalg.matrix_rank` counts them."""
    rounding = S.max() * max(W.shape) * torch.finfo(S.dtype).eps
    return int(S.gt(rounding).sum())


def effective_rank(W: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007); 0 for a zero matrix."""
    S = torch.linalg.svdvals(W)
    if not bool(S.any()):
        return 0.0
    p = S / S.sum()
    return math.exp(torch.special.entr(p).sum().item())


def _matrix(checkpoint: Checkpoint, name: str, flipped: frozenset[str], device: str) -> Tensor:
    value = read(checkpoint, name).float().to(device)
    return value.T if name in flipped else value


def _chosen(checkpoint: Checkpoint, target_modules: Sequence[str] | None) -> list[str]:
    names = matrices(checkpoint)
    modules = {name: name.removesuffix(".weight") for name in names}
    for target in target_modules or ():
        if not any(f".{module}".endswith(f".{target}") for module in modules.values()):
            last = {module.rpartition(".")[2] for module in modules.values()}
            raise ModelError(
                f"intruder-dimensions: no linear layer of {checkpoint.name} ends in {target!r}."
                f"{did_you_mean(target, last)} There are: {', '.join(sorted(last))}."
            )
    if target_modules is not None:
        names = [n for n in names if any(f".{modules[n]}".endswith(f".{target}") for target in target_modules)]
    if not names:
        raise ModelError(f"intruder-dimensions: {checkpoint.name} has no linear layers to look at")
    return names


def _heatmap(rows: dict[str, list[float]], k: int) -> Plot:
    return Plot(
        "Similarity of each tuned direction to its closest in the base",
        "heatmap",
        x="singular direction of the tuned matrix, strongest first",
        y="matrix",
        matrix=list(rows.values()),
        row_labels=list(rows),
        column_labels=[str(j + 1) for j in range(k)],
    )
