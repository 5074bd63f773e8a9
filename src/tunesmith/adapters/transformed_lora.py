"""TLoRA: multiply the weight by a dense transform stored as a tensor ring, and add a small residual.

Tao, Takida, Murata, Zhao and Mitsufuji, "Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications
to Text-to-image Models", ICCV 2025.

    y = (W T + s D) x,    s = alpha / sqrt(R)
    T[i1..iD, j1..jD] = tr(A_1[i1, j1] A_2[i2, j2] ... A_D[iD, jD]),     A_d[i, j] of shape (R_T, R_T)      (Sec. 3)
    D[o1..oK, j1..jD] = tr(B_1[o1] ... B_K[oK] C_1[j1] ... C_D[jD]),     B_k[o], C_d[j] of shape (R, R)

The sizes in = I_1 ... I_D and out = O_1 ... O_K are products, the last index running fastest. T starts at the identity
and D at zero (B_1 = 0). T is dense and of full rank with sum I_d^2 R_T^2 numbers; D is a LoRA of rank R^2 whose factors
have sum (I_d + O_k) R^2 numbers. Neither is ever made as a matrix: an input meets the cores of T one after the other.

The paper starts every A_d[:, :, a, b] at I / R_T (Proposition 1). The R_T^2 slices of a core then get the same gradient
in every step and stay equal, so that R_T > 1 learns what R_T = 1 can (`evidence/adapters/transformed_lora.py`). Here
slice (a, b) starts at P_d[a, b] I, where P_d is 1 / R_T plus fixed noise of size `spread`, scaled so that
tr(P_1 ... P_D) = 1: still the identity, and the slices go apart. `spread=0` is the paper's start. R_T = 1 has no noise.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.core.adapter import Adapter, Below, each_adapter
from tunesmith.core.layer import LayerSpec
from tunesmith.core.lowrank import low_rank
from tunesmith.core.part import part
from tunesmith.core.seeds import generator
from tunesmith.errors import ModelError, RecipeError

Penalty = Literal["identity", "orthogonal"]


@part(paper="arXiv:2501.08727", tags=("mergeable",))
class TransformedLoRA(Adapter):
    """A learned transform of the layer's input and a low-rank residual.

    Args:
        layer: A linear layer.
        rank: R of the residual: of the tensor ring, or of the LoRA.
        transform_rank: R_T; 1 makes T a Kronecker product of D matrices, 0 leaves it out.
        residual: `tensor-ring`, `lora` (the paper's TLoRA*), or `none`.
        dims: D, how many near-equal factors the sizes are split into.
        shapes: Factors of given sizes, such as `{320: [4, 8, 10]}`, instead of the near-equal ones.
        alpha: Scale of the residual.
        rslora: s = alpha / sqrt(R), as released; False gives alpha / R.
        spread: Size of the noise that sets the slices of T's cores apart at the start, relative to 1 / R_T; 0 is the
            paper's start.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __init__(
        self,
        layer: LayerSpec,
        *,
        rank: PositiveInt = 2,
        transform_rank: NonNegativeInt = 1,
        residual: Literal["tensor-ring", "lora", "none"] = "tensor-ring",
        dims: Annotated[int, Field(ge=2)] = 3,
        shapes: dict[PositiveInt, list[PositiveInt]] | None = None,
        alpha: PositiveFloat = 1.0,
        rslora: bool = True,
        spread: NonNegativeFloat = 0.1,
    ) -> None:
        super().__init__(layer)
        if not transform_rank and residual == "none":
            raise RecipeError("transformed-lora: transform_rank=0 with residual='none' leaves nothing to train")
        self.transform_rank, self.residual, self.spread = transform_rank, residual, spread
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        (out_features, in_features), device = layer.shape, layer.device
        self.in_shape = _split(in_features, dims, shapes)
        if transform_rank and in_features not in (shapes or {}) and max(self.in_shape) == in_features > 1:
            raise ModelError(
                f"TransformedLoRA: {layer.name!r} has {in_features} inputs, a prime: its transform would be a dense "
                f"{in_features} x {in_features} matrix. Leave the layer out of `target_modules`, set "
                f"`transform_rank=0`, or accept the matrix with `shapes={{{in_features}: [{in_features}]}}`."
            )
        self.cores = nn.ParameterList(
            torch.einsum("ij,ab->ijab", torch.eye(n, device=device), P.to(device))
            for n, P in zip(self.in_shape, self._start(), strict=False)
        )
        left, right = [], []
        if residual == "lora":
            left = [torch.zeros(out_features, rank, device=device)]
            right = [torch.randn(rank, in_features, device=device) / math.sqrt(3 * in_features)]
        elif residual == "tensor-ring":
            # The paper gives the order of the standard deviations; these are the released ones.
            for k, n in enumerate(_split(out_features, dims, shapes)):
                std = math.sqrt(n) / rank**2 if k else 0.0
                left.append(std * torch.randn(n, rank, rank, device=device))
            right = [torch.randn(n, rank, rank, device=device) / math.sqrt(n) for n in self.in_shape]
        self.left, self.right = nn.ParameterList(left), nn.ParameterList(right)

    def _start(self) -> list[Tensor]:
        """P_1, ..., P_D, each (R_T, R_T), with tr(P_1 ... P_D) = 1; the same in every layer. Empty without T."""
        R, D = self.transform_rank, len(self.in_shape)
        if not R:
            return []
        noise = torch.randn(D, R, R, generator=generator("transformed-lora", R, D))
        P = [(1 + (self.spread if R > 1 else 0.0) * each) / R for each in noise]
        P[-1] = P[-1] / torch.linalg.multi_dot([*P, torch.eye(R)]).trace()
        return P

    def apply_transform(self, x: Tensor, transposed: bool = False) -> Tensor:
        """T x (or T^T x) of each row of `x`, (..., in), in the dtype of the cores and without making T.

        What lies between the cores is computed again in the backward pass: kept, it would be D times the input.
        """
        if not self.transform_rank:
            return x
        cores = [A.transpose(0, 1) if transposed else A for A in self.cores]
        if torch.is_grad_enabled():
            return checkpoint(_transformed, x, *cores, use_reentrant=False, preserve_rng_state=False)
        return _transformed(x, *cores)

    def transform(self) -> Tensor:
        """T as a matrix, (in, in); for looking at it."""
        return self.apply_transform(torch.eye(self.layer.shape[1], device=self.layer.device), transposed=True)

    def residual_factors(self) -> tuple[Tensor, Tensor]:
        """(L, M) with D = L M: (out, R^2) and (R^2, in) of a tensor ring, R instead of R^2 of a LoRA."""
        if self.residual == "lora":
            return self.left[0], self.right[0]
        return _ring(self.left).flatten(1), _ring(self.right).transpose(1, 2).flatten(1).T

    def weight(self, W: Tensor) -> Tensor:
        new = self.apply_transform(W, transposed=True)
        if self.residual != "none":
            left, right = self.residual_factors()
            new = new + self.scaling * (left @ right).to(new.dtype)
        return new.to(W.dtype)

    def forward(self, x: Tensor, below: Below) -> Tensor:
        out = below(self.apply_transform(x).to(x.dtype))
        if self.residual == "none":
            return out
        left, right = self.residual_factors()
        return out + low_rank(x, right, left, self.scaling).to(out.dtype)

    def penalty(self, kind: Penalty = "identity") -> Tensor:
        """How far T's cores are from their start, or from those of an orthogonal T; a scalar, 0 at the start.

        Args:
            kind: `identity`, the sum over slices of |A_d[:, :, a, b] - P_d[a, b] I|_F (the paper's better one); or
                `orthogonal`, the sum over i and j of |sum_l A_d[i, l] (x) A_d[j, l] - [i = j] P_d (x) P_d|_F, which are
                the cores of T T^T (Proposition 2) against those of the identity.

        Raises:
            ModelError: there is no transform.
        """
        if not self.transform_rank:
            raise ModelError(f"transformed-lora on {self.layer.name!r} has no transform (transform_rank=0) to penalise")
        total = self.cores[0].new_zeros(())
        for A, P in zip(self.cores, self._start(), strict=True):
            P, eye = P.to(A), torch.eye(len(A), device=A.device, dtype=A.dtype)
            if kind == "identity":
                apart, over = A - torch.einsum("ij,ab->ijab", eye, P), (0, 1)
            else:
                apart, over = gram(A) - torch.einsum("ij,ab->ijab", eye, torch.kron(P, P)), (2, 3)
            total = total + torch.linalg.vector_norm(apart, dim=over).sum()
        return total


def _transformed(x: Tensor, *cores: Tensor) -> Tensor:
    R, n = cores[0].shape[-1], math.prod(x.shape[:-1])
    # T is the identity plus little; cores rounded to 16 bits would lose what they have learned.
    with torch.autocast(x.device.type, enabled=False):
        z = x.to(cores[0].dtype)
        if R == 1:
            # A Kronecker product: each core meets its own index where it stands, and nothing is moved.
            rows = n
            for core in cores:
                A = core[:, :, 0, 0]
                rest = z.numel() // max(rows * len(A), 1)
                # Not `@`, which takes another way, and rounds differently, where a factor is frozen.
                each = z.reshape(rows, len(A), rest)
                z = F.linear(each[..., 0], A) if rest == 1 else torch.bmm(A.expand(rows, *A.shape), each)
                rows *= len(A)
            return z.reshape(x.shape)
        first, *others = cores
        if not others:
            return F.linear(z, torch.einsum("ijaa->ij", first))
        # z is (rows, inputs to come, outputs done, ring, ring) from here on. There may be no rows: no -1 in shapes.
        z = torch.einsum("njr,ijab->nriab", z.reshape(n, len(first), x.shape[-1] // len(first)), first)
        for d, A in enumerate(others, 2):
            z = z.reshape(n, len(A), z.shape[1] // len(A), z.shape[2], R, R)
            ring = "ijbc->nrqiac" if d < len(cores) else "ijba->nrqi"
            z = torch.einsum(f"njrqab,{ring}", z, A).flatten(2, 3)
        return z.reshape(x.shape)


def penalty(model: nn.Module, kind: Penalty = "identity") -> Tensor:
    """The sum of all layers' penalties, to be weighted and added to the loss.

    Raises:
        ModelError: the model has no layer of this part.
    """
    found: list[Tensor] = []
    if not each_adapter(model, lambda made: found.append(made.penalty(kind)), TransformedLoRA):
        raise ModelError("the model has no layer adapted by transformed-lora")
    return torch.stack([one.to(found[0].device) for one in found]).sum()


def gram(core: Tensor) -> Tensor:
    """The core of X X^T for a core of X: (I, J, R, R) to (I, I, R^2, R^2), by Proposition 2."""
    return torch.einsum("ilab,jlcd->ijacbd", core, core).flatten(4, 5).flatten(2, 3)


def _ring(cores: nn.ParameterList) -> Tensor:
    """The products of one matrix of each core, (n1 n2 ..., R, R), the last index running fastest."""
    out = cores[0]
    for core in list(cores)[1:]:
        out = torch.einsum("nab,ibc->niac", out, core).flatten(0, 1)
    return out


def _split(n: int, dims: int, shapes: dict[int, list[int]] | None) -> tuple[int, ...]:
    """The factors of a size.

    Raises:
        RecipeError: the given ones have another product.
    """
    given = (shapes or {}).get(n)
    if given is None:
        return near_equal(n, dims)
    if math.prod(given) != n:
        raise RecipeError(f"transformed-lora: the product of shapes[{n}] = {given} is {math.prod(given)}, not {n}")
    return tuple(given)


@lru_cache
def near_equal(n: int, dims: int) -> tuple[int, ...]:
    """`dims` ascending factors of `n` with the smallest sum of squares, which is what the transform's count is."""
    if dims == 1:
        return (n,)
    smallest = (f for f in range(1, round(n ** (1 / dims)) + 1) if n % f == 0 and f**dims <= n)
    found = [(f, *near_equal(n // f, dims - 1)) for f in smallest]
    return min(found, key=lambda factors: sum(f * f for f in factors))
