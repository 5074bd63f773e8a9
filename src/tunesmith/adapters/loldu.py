"""LoLDU: train nothing but a few diagonal entries of the weight's LDU decomposition.

Shi et al., "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning", 2024.

    W = P L D U         P permutes rows; L is unit lower, D diagonal, U unit upper triangular
    W' = W - s0 P L_r diag(z0) U_r + s P L_r diag(z) U_r,   z0 = D_r,   s = s0 = alpha / r at the start

L_r, U_r and D_r are the first r columns, rows and entries. Only z trains, and s if `train_scale`.

The first r steps of the elimination see only the first r columns, so no whole decomposition is made and P never exists:
the factors of a 4096 x 4096 weight at r = 64 take 0.1 s, in float64 on a CPU core. They follow from the weight and are
not saved. The file holds z, z0 and the rows that were pivots, which are compared with those of the base that it is
loaded on: other weights would give other directions.

Where we differ from the released code: it keeps P as a dense matrix among the parameters, subtracts from the frozen
weight, and makes z only in the first forward pass, so that an optimizer built before never sees it. A column without a
pivot (zero, or dependent on the columns before it) gives it infinities; here D is 0 there, and L and U have a 1. An
embedding's table is decomposed as it is stored.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tunesmith.core.adapter import Statistics
from tunesmith.core.layer import LayerSpec
from tunesmith.core.lowrank import LowRank
from tunesmith.core.part import part
from tunesmith.core.seeds import generator
from tunesmith.errors import ModelError

NO_PIVOT = 1e-6
"""A pivot smaller than this times the largest entry of the columns is taken for zero."""


@part(paper="arXiv:2410.13618", tags=("mergeable", "low-rank"))
class LoLDU(LowRank):
    """r trained numbers per layer, along the first directions of an LU decomposition.

    Args:
        layer: A linear, convolution or embedding layer.
        rank: r, the diagonal entries that train.
        alpha: s starts at alpha / r; the start is the same whatever it is.
        dropout: On the input of U while training. Not defined for an embedding.
        init: Where z starts: `lu` at z0, and so at the base. The others start elsewhere: `uniform` in +-|mean z0| / 2,
            `normal` with the mean and deviation of z0, `constant` at its mean, `zeros`, `ones`.
        train_scale: Whether s trains as well, one more number per layer.
        seed: Of the random starts.
    """

    left: Tensor
    right: Tensor
    start: Tensor
    rows: Tensor

    def __init__(
        self,
        layer: LayerSpec,
        *,
        rank: PositiveInt = 8,
        alpha: PositiveFloat = 16.0,
        dropout: NonNegativeFloat = 0.0,
        init: Literal["lu", "uniform", "normal", "constant", "zeros", "ones"] = "lu",
        train_scale: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(layer, rank, dropout)
        if rank > (most := min(layer.shape[0], math.prod(layer.shape[1:]))):
            raise ModelError(
                f"LoLDU of rank {rank} needs as many diagonal entries; {layer.name!r} of shape {tuple(layer.shape)} "
                f"has {most}. Lower `rank` or leave the layer out of `target_modules`."
            )
        self.scaling, self.init, self.seed = alpha / rank, init, seed
        self.scale = nn.Parameter(torch.tensor(self.scaling, device=layer.device)) if train_scale else None

    def resize(self, rank: int) -> None:
        """Make room for r directions; `prepare` fills it."""
        out, inputs, device = self.layer.shape[0], math.prod(self.layer.shape[1:]), self.layer.device
        self.rank = rank
        self.z = nn.Parameter(torch.zeros(rank, device=device))
        self.register_buffer("left", torch.zeros(out, rank, device=device), persistent=False)
        self.register_buffer("right", torch.zeros(rank, inputs, device=device), persistent=False)
        self.register_buffer("start", torch.zeros(rank, device=device))
        self.register_buffer("rows", torch.full((rank,), -1, device=device))

    def prepare(self, W: Tensor, statistics: Statistics) -> None:
        if W.is_meta:  # for counting; nothing can be computed
            return
        left, diagonal, right, rows = ldu(W.flatten(1), self.rank)
        self.left, self.right = left.to(W.device, torch.float32), right.to(W.device, torch.float32)
        self.start, self.rows = diagonal.to(W.device, torch.float32), rows.to(W.device)
        with torch.no_grad():
            self.z.copy_(self._first(diagonal.float()))

    def _first(self, z0: Tensor) -> Tensor:
        mean, g = z0.mean(), generator(self.seed, "loldu", self.layer.name)
        if self.init == "uniform":
            return mean * (torch.rand(z0.shape, generator=g) - 0.5)
        if self.init == "normal":
            return mean + z0.std(correction=int(len(z0) > 1)) * torch.randn(z0.shape, generator=g)
        if self.init == "constant":
            return mean.expand_as(z0)
        if self.init == "lu":
            return z0
        return torch.full_like(z0, float(self.init == "ones"))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        now = self.z * (self.scaling if self.scale is None else self.scale)
        moved = now - self.scaling * self.start
        if self.layer.kind == "embedding":  # the low-rank view of a table is its transpose
            return self.right.T * moved, self.left.T, 1.0
        return self.left * moved, self.right, 1.0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        rows, start = self.rows, self.start
        # Loading writes into what is there, and what was computed is compared with it.
        self.rows, self.start = rows.clone(), start.clone()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        same = torch.equal(rows, self.rows.to(rows.device))
        apart = float((start - self.start.to(start.device)).abs().max())
        if not same or apart > 0.01 * float(start.abs().max()):
            raise ModelError(
                f"LoLDU on {self.layer.name!r} was trained on another weight than the base has here: "
                f"{'the diagonal is off by up to ' + format(apart, '.2g') if same else 'other rows are pivots'}. Load "
                "the base in the dtype and quantisation that it was trained in, and merge or `export_lora` it there"
            )


def ldu(M: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first `rank` steps of Gaussian elimination with row pivoting, in float64 on the CPU.

    Args:
        M: (out, in).
        rank: At most min(out, in).

    Returns:
        P L_r (out, r), D_r (r,), U_r (r, in), and the pivot's row of M at each step (r,), int64.
    """
    columns = M[:, :rank].detach().to("cpu", torch.float64, copy=True)
    left, rows = torch.zeros_like(columns), torch.zeros(rank, dtype=torch.int64)
    free = torch.ones(len(columns), dtype=torch.bool)
    smallest = NO_PIVOT * columns.abs().max()
    # Elementwise operations alone: equal weights give equal pivots on every machine and number of threads.
    for k in range(rank):
        size = torch.where(free, columns[:, k].abs(), -1.0)
        row = int(size.argmax())
        if size[row] > smallest:
            left[:, k] = columns[:, k] / columns[row, k]
        left[row, k] = 1.0
        # The pivot's row becomes zero, and so are its entries of the columns of L to come.
        columns[:, k + 1 :] -= left[:, k : k + 1] * columns[row, k + 1 :].clone()
        free[row], rows[k] = False, row
    found = M[rows.to(M.device)].detach().to("cpu", torch.float64)
    upper = torch.linalg.solve_triangular(left[rows], found, upper=False, unitriangular=True)
    diagonal = upper.diagonal().clone()
    none = diagonal.abs() <= smallest
    right = upper / torch.where(none, 1.0, diagonal)[:, None]
    right.diagonal().fill_(1.0)
    return left, torch.where(none, 0.0, diagonal), right.triu(), rows
