"""DSnoT: refine a pruning mask without training, by growing and pruning weights in pairs.

Zhang et al., "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", ICLR 2024.

    c_rj = W_rj mu_j,   e_r = sum over pruned j of c_rj                        expected loss of the row's output
    grow    the pruned j with c_rj of the sign of e_r and the largest |c_rj| / v_j^p
    prune   the kept j with c_rj of the other sign and the smallest |W_rj| sqrt(sum x_j^2)      (the Wanda metric)
    e_r <- e_r + c_pruned - c_grown

mu_j and v_j are mean and variance of input j over the calibration tokens, taken block by block behind blocks that are
already pruned. A row stops after `cycles` swaps, at |e_r| <= `threshold`, when no candidate of the right sign is left,
or before a swap that would turn the sign of e_r. Both halves of a swap move e_r towards zero, so |e_r| never grows. In
an N:M pattern the pruned weight is the smallest of the grown one's group; a pair that would enlarge |e_r| is none.
A weight is grown at most once and pruned at most once; survivors keep their dense values bit for bit.

The released code differs: its mu is a sum over tokens divided by sequences, so that its threshold of 0.1 is 0.1 / 2048
here; its flag `--without_same_sign` is on by default and drops the sign rule (on a 48 x 96 layer that raises the error
of the output instead of lowering it, see `evidence/compression/dsnot.py`); its pointers run past the last candidate of
a short row and then prune what they should keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.core.compression import Compressor, parse_pattern, smallest, walk
from tunesmith.core.layer import describe, read_weight, write
from tunesmith.core.modelmap import block_linears, roles
from tunesmith.core.part import part
from tunesmith.core.report import Report, Table
from tunesmith.core.statedict import Checkpoint
from tunesmith.errors import CheckpointError, ModelError, RecipeError

_ATTENTION = ("q", "k", "v", "qkv", "o")
_WANT = ("input_mean", "input_variance", "input_square")


@part(paper="arXiv:2310.08915")
class DSnoT(Compressor):
    """Prune every linear layer in the blocks and refine the masks; pruned weights are zeros in the same tensors.

    No gain is to be expected where the inputs have zero mean: the expected loss is zero whatever the mask.

    Args:
        sparsity: Share of each row that is pruned, rounded down to whole weights; 0.5 if nothing else is given.
        pattern: `N:M` keeps N of every M weights of a row, such as `2:4`.
        mask_from: A pruned copy of the model (a folder or a `Checkpoint`): its zeros are the first mask.
        initial: Metric of the first mask: `wanda` (|W| times the input's norm) or `magnitude`.
        refine: Which layers are refined: the `attention` projections, as released, or `all`. The first mask prunes all.
        cycles: Most swaps per row.
        threshold: |e_r| at which a row is done, in units of the layer's output.
        variance_power: p.
        sign_stop: Stop a row before a swap that turns the sign of e_r.
    """

    def __init__(
        self,
        *,
        sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None,
        pattern: Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")] | None = None,
        mask_from: str | Checkpoint | None = None,
        initial: Literal["wanda", "magnitude"] = "wanda",
        refine: Literal["attention", "all"] = "attention",
        cycles: PositiveInt = 50,
        threshold: NonNegativeFloat = 0.1 / 2048,
        variance_power: NonNegativeFloat = 1.0,
        sign_stop: bool = True,
    ) -> None:
        if sum(x is not None for x in (sparsity, pattern, mask_from)) > 1:
            raise RecipeError("dsnot: give one of `sparsity`, `pattern` and `mask_from`")
        self.sparsity = 0.5 if sparsity is None else sparsity
        self.group = parse_pattern(pattern) if pattern is not None else None
        self.masks = Checkpoint(mask_from) if isinstance(mask_from, str) else mask_from
        self.initial, self.refine = initial, refine
        self.cycles, self.threshold = cycles, threshold
        self.variance_power, self.sign_stop = variance_power, sign_stop

    @torch.no_grad()
    def __call__(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> Report:
        chosen = self._check(model)
        columns = ["layer", "rows", "columns", "sparsity", "refined", "swaps", "mean |e| before", "mean |e| after"]
        table = Table("Layers", columns, note="|e| is the expected loss of an output, averaged over the layer's rows.")
        zeros = weights = rows = swaps = 0
        before = after = 0.0
        for block in walk(model, batches):
            found = block.statistics(_WANT)
            for name in block.linears:
                module = model.get_submodule(name)
                spec = describe(module, name)
                W = read_weight(module, spec)
                pruned = self._first_mask(W, module, name, found[name])
                first = last = expected_loss(W, pruned, found[name]["input_mean"]).abs().sum().item()
                swapped = 0
                if name in chosen:
                    pruned, taken = self.refined(W, pruned, found[name])
                    last = expected_loss(W, pruned, found[name]["input_mean"]).abs().sum().item()
                    rows, before, after = rows + len(W), before + first, after + last
                    swapped = int(taken.sum())
                write(module, spec, W.masked_fill(pruned, 0), None)
                zeros, weights, swaps = zeros + int(pruned.sum()), weights + W.numel(), swaps + swapped
                share = pruned.float().mean().item()
                table.rows.append([name, *W.shape, share, name in chosen, swapped, first / len(W), last / len(W)])
        figures: dict[str, Any] = {
            "sparsity of the pruned layers": zeros / weights,
            "swaps": swaps,
            "mean |e| before": before / rows,
            "mean |e| after": after / rows,
        }
        return Report("DSnoT", figures=figures, tables=[table])

    def _check(self, model: nn.Module) -> set[str]:
        """The layers to refine; everything that could fail later fails here, before a weight has changed."""
        names = block_linears(model)
        zeros = 0
        for name in names:
            module = model.get_submodule(name)
            spec = describe(module, name)
            if spec.quantized:
                raise ModelError(f"dsnot: the layer {name!r} is quantised, and codes cannot be pruned; load it dense")
            W = read_weight(module, spec)
            if not bool(W.isfinite().all()):
                raise ModelError(f"dsnot: the weight of {name!r} has values that are not finite")
            if self.group is not None:
                smallest(W[:1].abs(), self.sparsity, self.group, name)
            if self.masks is not None:
                zeros += int(self._given(W, module, name).sum())
        if self.masks is not None and not zeros:
            raise CheckpointError(
                f"dsnot: {self.masks.name} has no zeros in the layers of this model; it is not pruned"
            )
        kinds = {name: role.kind for name, role in roles(model).items()}
        chosen = {n for n in names if self.refine == "all" or kinds.get(f"{n}.weight") in _ATTENTION}
        if not chosen:
            found = "no attention projections" if names else "no linear layers"
            raise ModelError(f"dsnot: {type(model).__name__} has {found} to refine; set `refine` to 'all'")
        return chosen

    def _given(self, W: Tensor, module: nn.Module, layer: str) -> Tensor:
        assert self.masks is not None
        name = f"{layer}.weight"
        if name not in self.masks:
            raise CheckpointError(f"dsnot: {self.masks.name} lacks the tensor {name!r} of the model")
        mask = self.masks[name] == 0
        mask = mask.T if isinstance(module, Conv1D) else mask
        if mask.shape != W.shape:
            raise CheckpointError(
                f"dsnot: {name!r} is {tuple(mask.shape)} (out, in) in {self.masks.name}; the model has {tuple(W.shape)}"
            )
        return mask.to(W.device)

    def _first_mask(self, W: Tensor, module: nn.Module, name: str, found: Mapping[str, Tensor]) -> Tensor:
        if self.masks is not None:
            return self._given(W, module, name)
        metric = W.abs().float()
        if self.initial == "wanda":
            metric = metric * found["input_square"].sqrt()
        return smallest(metric, self.sparsity, self.group, name)

    def refined(self, W: Tensor, pruned: Tensor, found: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A better mask for one layer.

        Args:
            W: (out, in), any floating dtype.
            pruned: (out, in), bool.
            found: `input_mean`, `input_variance` and `input_square` of its inputs, (in,).

        Returns:
            The mask, (out, in), with the same number pruned in each row (and group), and the swaps per row, (out,).
        """
        mean, variance = found["input_mean"], found["input_variance"]
        c = W.float() * mean
        gain = c.abs() / variance**self.variance_power
        wanda = W.float().abs() * found["input_square"].sqrt()
        # A constant input has no variance to divide by.
        growable = pruned & (variance > 0) if self.variance_power else pruned.clone()
        prunable, pruned = ~pruned, pruned.clone()
        e = (c * pruned).sum(1)
        began, active = e.sign(), e.abs() > self.threshold
        swaps = torch.zeros(len(W), dtype=torch.long, device=W.device)
        for _ in range(self.cycles):
            if not bool(active.any()):
                break
            sign = e.sign()[:, None]
            grown, cut, possible = _pair(c * sign, gain, wanda, growable, prunable, self.group)
            after = e + _at(c, cut) - _at(c, grown)
            active &= possible
            if self.sign_stop:
                active &= after * began >= 0
            row = active.nonzero()[:, 0]
            grown, cut = grown[row], cut[row]
            pruned[row, grown], pruned[row, cut] = False, True
            growable[row, grown] = prunable[row, cut] = False
            e[row] = after[row]
            swaps[row] += 1
            active &= e.abs() > self.threshold
        return pruned, swaps


def _pair(
    toward: Tensor, gain: Tensor, wanda: Tensor, growable: Tensor, prunable: Tensor, group: tuple[int, int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(grown, pruned, whether there is such a pair) for each row; `toward` is c times the sign of e, (out, in)."""
    growable = growable & (toward > 0)
    if group is None:
        left = torch.where(prunable & (toward < 0), wanda, torch.inf)
        cost, cut = left.min(1)
        benefit, grown = torch.where(growable, gain, -torch.inf).max(1)
        return grown, cut, (benefit > -torch.inf) & (cost < torch.inf)
    M = group[1]
    left = torch.where(prunable, wanda, torch.inf).unflatten(1, (-1, M))
    cost, inside = left.min(-1, keepdim=True)
    start = torch.arange(0, toward.shape[1], M, device=toward.device)[:, None]
    partner = (start + inside).expand_as(left).flatten(1)
    exists = (cost < torch.inf).expand_as(left).flatten(1)
    closer = toward - toward.gather(1, partner) > 0
    benefit, grown = torch.where(growable & exists & closer, gain, -torch.inf).max(1)
    return grown, _at(partner, grown), benefit > -torch.inf


def _at(values: Tensor, column: Tensor) -> Tensor:
    return values.gather(1, column[:, None])[:, 0]


def expected_loss(W: Tensor, pruned: Tensor, mean: Tensor) -> Tensor:
    """e: dense minus sparse output of each row at the mean input, (out,), float64."""
    return (W.float() * mean * pruned).sum(1, dtype=torch.float64)
