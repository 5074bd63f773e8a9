"""Bone: one small trained block per band of outputs, combined with the blocks of the frozen weight.

Kang, "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models", 2024
(arXiv 2409.15371v1 to v3). Later versions call this method Bat, and the ones below Bone, DiSHA and MiSS.

    bat    W'_ij = W_ij (I + B_i) + B_i        blocks of r x r, i = 1 ... out / r, j = 1 ... in / r
    miss   W'[:, c] = W[:, c] + D[c mod r]     D is (r, out);  y = W x + D^T s,  s_k = sum of the x_c with c mod r = k
    mini   as miss, with D[k, o] = D[k, o mod m], D (r, m)

All start at zero and have no factor in front. In `bat` the frozen blocks guide the change, whose rank is not bounded by
r; the others are low rank, need no frozen weight and export as a LoRA.

`bat` builds the changed weight in every forward pass, as the paper and PEFT do. Here it is built again in the backward
pass instead of being kept, which would be a second copy of the model. With dropout, which PEFT's `bat` ignores, the
change is multiplied apart from W. Unmerging restores the kept weight; the inverse of I + B_i, which PEFT takes for it,
loses digits where that is nearly singular.

Embeddings: the table (rows, dim) is the weight, so that every token has its own row of B or D. Convolutions: the kernel
is flattened into the inputs.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.core.adapter import Adapter, Below
from tunesmith.core.layer import LayerSpec
from tunesmith.core.part import part
from tunesmith.errors import ModelError


@part(paper="arXiv:2409.15371", tags=("mergeable",))
class Bone(Adapter):
    """Trained blocks, one for each band of outputs.

    Args:
        layer: A linear, convolution or embedding layer.
        rank: r, the size of a block; the paper has 64 for Llama-2-7B. `bat` needs it to divide both dimensions.
        form: `bat` is the paper's; `miss` and `mini` are its later variants.
        mini_rank: m of `mini`, which must divide the outputs.
        dropout: On the input of the change while training. Not defined for an embedding.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding"})

    def __init__(
        self,
        layer: LayerSpec,
        *,
        rank: PositiveInt = 8,
        form: Literal["bat", "miss", "mini"] = "bat",
        mini_rank: PositiveInt = 1,
        dropout: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__(layer)
        if dropout and layer.kind == "embedding":
            raise ModelError(
                f"Bone: dropout {dropout} is on the input, and the input of the embedding {layer.name!r} is indices; "
                "set it to 0 or leave the layer out of `target_modules`"
            )
        self.rank, self.form = rank, form
        self.out, self.inputs = layer.shape[0], math.prod(layer.shape[1:])
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.blocks = nn.Parameter(torch.zeros(self._shape(mini_rank), device=layer.device))

    def _shape(self, mini_rank: int) -> tuple[int, ...]:
        r, out, inputs, form = self.rank, self.out, self.inputs, self.form
        where = f"{self.layer.name!r} of shape {tuple(self.layer.shape)}"
        if form == "bat":
            if out % r or inputs % r:
                raise ModelError(
                    f"Bone cuts the weight into blocks of {r} x {r}; {where} is {out} x {inputs}. Set `rank` to a "
                    f'divisor of {math.gcd(out, inputs)}, leave the layer out of `target_modules`, or set `form="miss"`'
                )
            return out // r, r, r
        if r > inputs:
            raise ModelError(f"Bone sums the inputs in {r} groups; {where} has {inputs}. Lower `rank`.")
        if form == "miss":
            return r, out
        if out % mini_rank:
            raise ModelError(f"Bone repeats {mini_rank} outputs; {where} has {out}. Set `mini_rank` to a divisor.")
        return r, mini_rank

    def _change(self, W: Tensor, blocks: Tensor) -> Tensor:
        """W' - W in the canonical shape, in float32 or wider."""
        if self.form == "bat":
            r, wide = self.rank, torch.promote_types(W.dtype, blocks.dtype)
            blocks = blocks.to(wide)
            bands = W.to(wide).reshape(self.out // r, -1, r) @ blocks
            return (bands.view(len(blocks), r, -1, r) + blocks[:, :, None]).reshape(W.shape)
        return (self._D().T @ self._groups()).view(W.shape)

    def _D(self) -> Tensor:
        """(r, out) of the forms without a guide."""
        return self.blocks.repeat(1, self.out // self.blocks.shape[1])

    def _groups(self) -> Tensor:
        """(r, in) of zeros and ones: which inputs are summed."""
        r = self.rank
        return torch.eye(r, device=self.blocks.device).repeat(1, -(-self.inputs // r))[:, : self.inputs]

    def weight(self, W: Tensor) -> Tensor:
        return W + self._change(W, self.blocks).to(W.dtype)

    def forward(self, x: Tensor, below: Below) -> Tensor:
        if self.layer.kind == "embedding":
            return self._looked_up(x, below)
        if self.form == "bat" or self.layer.groups > 1:
            return self._multiplied(x, below)
        out = below(x)
        if self.dropout is not None:
            x = self.dropout(x)
        if self.layer.kind == "linear":
            change = self._sums(x) @ self.blocks
            return out + change.repeat(*[1] * (x.dim() - 1), self.out // self.blocks.shape[1]).to(out.dtype)
        sums = below.apply(x, self._groups().view(self.rank, *self.layer.shape[1:]), None)
        return out + torch.einsum("ro,br...->bo...", self._D().to(sums.dtype), sums).to(out.dtype)

    def _sums(self, x: Tensor) -> Tensor:
        """(..., in) to (..., r): the inputs that have the same place in their group, added."""
        r, whole = self.rank, self.inputs - self.inputs % self.rank
        sums = x[..., :whole].unflatten(-1, (-1, r)).sum(-2, dtype=self.blocks.dtype)
        rest = x[..., whole:]
        return sums if whole == self.inputs else sums + F.pad(rest, (0, r - rest.shape[-1])).to(sums.dtype)

    def _multiplied(self, x: Tensor, below: Below) -> Tensor:
        """By the changed weight, or by the change alone where its input is dropped out."""
        apart = self.training and self.dropout is not None
        # Codes are read anew in both passes; a weight is handed over, so that both see the same one.
        W = None if below.spec.quantized else below.weight

        def run(x: Tensor, blocks: Tensor, W: Tensor | None, bias: Tensor | None) -> Tensor:
            W = below.weight if W is None else W
            change = self._change(W, blocks)
            return below.apply(x, change if apart else W + change.to(W.dtype), bias)

        given = x if self.dropout is None else self.dropout(x)
        arguments = (given, self.blocks, W, None if apart else below.bias)
        if torch.is_grad_enabled():
            out = checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            out = run(*arguments)
        return below(x) + out if apart else out

    def _looked_up(self, x: Tensor, below: Below) -> Tensor:
        """Of the rows asked for alone; `apply` on a table of r columns keeps what the layer does to its rows."""
        out, r = below(x), self.rank
        bat = self.form == "bat"
        table = self.blocks.reshape(-1, r) if bat else self._D().T
        change = below.apply(x, table, None).repeat(*[1] * x.dim(), -(-self.inputs // r))[..., : self.inputs]
        if bat:
            change = change + (out.to(table.dtype).unflatten(-1, (-1, r)) @ self.blocks[x // r]).flatten(-2)
        return out + change.to(out.dtype)

    def to_lora(self) -> tuple[Tensor, Tensor] | None:
        if self.form == "bat":
            return None
        D, groups = self._D().detach(), self._groups()
        return (groups.T, D) if self.layer.kind == "embedding" else (D.T, groups)
