"""DEFT: a smooth count of the MLP activations that are not zero, added to the loss, so that they become sparse.

Runwal, Pedapati and Chen, "From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in
Transformers", 2024; the normalisation is that of the released code (IBM/DEFT).

    A_l                                            what the activation function of the MLP of block l gives, per token
    phi(a) = a^2 / (a^2 + eps)                                 0 at zero, 1/2 at |a| = sqrt(eps), 1 far from it
    D_l = mean over rows of: mean over the row's tokens and the neurons of phi(A_l)
    L = task + w mean_l D_l                        encoder-decoder: the mean of the encoder plus that of the decoder

phi has slope 0 at 0: a neuron that is off for a token stays off as far as this term goes. What is minimised is not what
is reported: `density` counts exact zeros, which ReLU gives and GELU and SiLU hardly ever do; `density_above_tau` counts
|a| > tau and says something of those too. In a gated MLP A_l is the output of the activation function, as in the
released code, not its product with the other branch.

Where we differ from the released code: padding does not count (`padding=True` counts it), of rows of several lengths
each counts the same, and of a prompt's virtual tokens none; A^2 is taken in float32, since eps = 1e-7 is below the
resolution of half precision; the activations of a step are let go after it, also in evaluation and after an exception.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from accelerate.utils import extract_model_from_parallel
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunesmith.core.loss import IGNORED, model_inputs
from tunesmith.core.modelmap import blocks
from tunesmith.core.objective import Batch, Objective
from tunesmith.core.packing import segments
from tunesmith.core.part import part
from tunesmith.errors import DataError, ModelError

Epsilon = Annotated[float, Field(ge=1e-30)]
"""Large enough for a float32."""
Figures = tuple[Tensor, Tensor, Tensor]
_HOMES = ("torch.nn.modules.activation", "transformers.activations")
_NO_ACTIVATIONS = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.MultiheadAttention)


class _Smooth(torch.autograd.Function):
    """The mean of phi over the neurons, (..., neurons) -> (...) in float32; keeps nothing but the activations."""

    @staticmethod
    def forward(ctx: Any, activations: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(activations)
        ctx.eps = eps
        square = _wide(activations).square()
        return (square / (square + eps)).mean(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None]:
        (activations,) = ctx.saved_tensors
        wide = _wide(activations)
        below = wide.square() + ctx.eps
        # As a product of two quotients: eps / below^2 would underflow for a small eps.
        slope = (2 * wide / below) * (ctx.eps / below)
        return (slope * (given / wide.shape[-1]).unsqueeze(-1)).to(activations.dtype), None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Layer:
    """One run of one activation function: its output while gradients are needed, else figures per token."""

    def __init__(self, activations: Tensor, eps: float, tau: float) -> None:
        self.eps, self.tau, self.tokens = eps, tau, activations.shape[:-1].numel()
        self.kept = activations if activations.requires_grad else self._read(activations)

    def read(self) -> Figures:
        """phi, the share that is not zero and the share beyond tau, (tokens,) float32 each; only phi has a gradient."""
        return self._read(self.kept) if isinstance(self.kept, Tensor) else self.kept

    def _read(self, activations: Tensor) -> Figures:
        flat = activations.flatten(0, -2)
        size = flat.detach()
        nonzero, above = ((size.abs() > bound).float().mean(-1) for bound in (0.0, self.tau))
        return _Smooth.apply(flat, self.eps), nonzero, above


@part(paper="arXiv:2402.01911", tags=("regulariser",))
class DensityFinetuning(Objective):
    """The smooth density of the MLP activations, for any main objective and whatever trains.

    Its weight, 1 in the paper, is given where it is added. In a loop of one's own:

        with term.watching(model):
            loss = model(**batch).loss
        density, figures = term(model, batch)  # of the activations of that pass
        (loss + density).backward()

    Without `watching` it runs the model itself. The tokens of a row count the same together as those of any other row;
    of an encoder-decoder's decoder, those with a label or of `decoder_attention_mask`.

    Args:
        eps: Where an activation counts one half: at |a| = sqrt(eps).
        tau: Of the figure `density_above_tau`, which counts |a| > tau; the loss does not depend on it.
        padding: Count padding too, as the released code does.
    """

    def __init__(self, *, eps: Epsilon = 1e-7, tau: NonNegativeFloat = 1e-3, padding: bool = False) -> None:
        self.eps, self.tau, self.padding = eps, tau, padding
        self._seen: dict[str, list[_Layer]] | None = None

    def count(self, batch: Batch) -> Tensor:
        """The number of rows that have tokens, or of pictures, ()."""
        row = self._rows(batch)
        if row is None:
            first: Tensor = next(iter(batch.values()))
            return torch.tensor(len(first), device=first.device)
        return torch.tensor(row[row >= 0].unique().numel(), device=row.device)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Keep what the activation functions of the MLPs give in the last forward pass inside the block.

        Nothing is kept of passes that come after this term's own call, such as those of gradient checkpointing.

        Raises:
            ModelError: at the start, that there are none to watch; in the pass, that its blocks run without gradients.
        """
        found = activations(model)
        graph = False

        def begin(*_: Any) -> None:
            nonlocal graph
            self._seen, graph = {stack: [] for stack in found.values()}, torch.is_grad_enabled()

        def keep(module: nn.Module, args: Any, out: Tensor) -> None:
            if self._seen is None:
                return
            if graph and not torch.is_grad_enabled():
                raise ModelError(
                    "density-finetuning: the blocks run without gradients, as under reentrant gradient checkpointing, "
                    'so that their activations cannot be trained; set gradient_checkpointing_kwargs={"use_reentrant": '
                    "False}"
                )
            self._seen[found[module]].append(_Layer(out, self.eps, self.tau))

        begin()
        handles = [model.register_forward_pre_hook(begin), *(m.register_forward_hook(keep) for m in found)]
        try:
            yield
        except BaseException:
            self._seen = None
            raise
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self, model: nn.Module, batch: Batch, total: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The smooth density of one micro-batch, from the pass that was watched or from one of its own.

        Returns:
            The loss, () float32; `density_smooth`, its mean over the rows; `density`, the share of activations that
            are not exactly 0, and `density_above_tau`, both over the tokens that count. An encoder-decoder has the
            last two for each side (`encoder_density`, ...).

        Raises:
            ModelError: activations that are not one vector per token of the batch.
        """
        config = getattr(extract_model_from_parallel(model, keep_fp32_wrapper=True), "config", None)
        both = bool(getattr(config, "is_encoder_decoder", False))
        if not self._seen or not any(self._seen.values()):
            with self.watching(model):
                model(**(batch if both else model_inputs(batch)))
        seen, self._seen = self._seen or {}, None
        ran = {stack: layers for stack, layers in seen.items() if layers}
        if len(ran) > 1 and not both:
            raise ModelError(
                f"density-finetuning: {type(model).__name__} has several stacks of blocks ({', '.join(ran)}) and is no "
                "encoder-decoder; which tokens theirs are is not known"
            )
        device = next(v.device for v in batch.values() if isinstance(v, Tensor))
        loss = torch.zeros((), device=device)
        scalars: dict[str, Tensor] = {}
        for stack, layers in ran.items():
            decoder = both and "decoder" in stack.split(".")
            row = self._decoder_rows(batch) if decoder else self._rows(batch)
            sums = torch.stack([self._sums(layer, row, batch, stack).to(device) for layer in layers]).mean(0)
            loss = loss + sums[0]
            side = ("decoder_" if decoder else "encoder_") if both else ""
            scalars |= {f"{side}density": sums[1].detach(), f"{side}density_above_tau": sums[2].detach()}
        scalars["density_smooth"] = loss.detach() / self.share(batch, None)
        return loss / self.share(batch, total), scalars

    def _sums(self, layer: _Layer, row: Tensor | None, batch: Batch, stack: str) -> Tensor:
        """The sum over rows of their mean phi; the share of what is not 0, and of what is beyond tau. (3,)."""
        smooth, nonzero, above = layer.read()
        if row is None:
            return torch.stack([smooth.mean() * self.count(batch), nonzero.mean(), above.mean()])
        # A prompt's virtual tokens stand before the row's own.
        more, rest = divmod(layer.tokens - row.numel(), len(row))
        if rest or more < 0:
            raise ModelError(
                f"density-finetuning: an activation function in {stack} gives {layer.tokens} vectors for a batch of "
                f"{len(row)} x {row.shape[1]} tokens; mixtures of experts and chunked feed-forward layers are not "
                "understood"
            )
        row = torch.cat([row.new_full((len(row), more), -1), row], dim=1).flatten().to(smooth.device)
        kept = row >= 0
        row = row[kept]
        if not len(row):
            return torch.stack([smooth.sum() * 0, nonzero.sum() * 0, above.sum() * 0])
        own = (smooth[kept] / row.bincount()[row]).sum()
        return torch.stack([own, nonzero[kept].mean().to(own.dtype), above[kept].mean().to(own.dtype)])

    def _rows(self, batch: Batch) -> Tensor | None:
        """The row of each token that counts, -1 elsewhere, (B, T) int64; None where all positions count alike."""
        mask: Tensor | None = None if self.padding else batch.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise DataError(
                f"density-finetuning: attention_mask has the shape {tuple(mask.shape)}; expected (rows, tokens), which "
                "tells padding. Give such a mask, or padding=True to count every position"
            )
        if "input_ids" in batch:
            return segments({**{k: v for k, v in batch.items() if k != "attention_mask"}, "attention_mask": mask})
        return None if mask is None else _numbered(mask.bool())

    def _decoder_rows(self, batch: Batch) -> Tensor | None:
        mask: Tensor | None = batch.get("decoder_attention_mask")
        labels: Tensor | None = batch.get("labels")
        if mask is None and labels is not None:
            mask = labels.ne(IGNORED)
        return None if self.padding or mask is None else _numbered(mask.bool())


def _numbered(kept: Tensor) -> Tensor:
    rows = torch.arange(len(kept), device=kept.device)[:, None].expand_as(kept)
    return rows.masked_fill(~kept, -1)


def activations(model: nn.Module) -> dict[nn.Module, str]:
    """The activation functions of the blocks outside of attention and adapters, each with its stack's dotted path.

    Raises:
        ModelError: the model has no numbered blocks, or there is none in them.
    """
    found = {
        module: stack
        for stack, members in blocks(model).items()
        for block in members
        for name, module in block.named_modules()
        if type(module).__module__ in _HOMES
        and not isinstance(module, _NO_ACTIVATIONS)
        and not any(word in name.lower() for word in ("attn", "attention", "tunesmith_"))
    }
    if not found:
        raise ModelError(
            f"density-finetuning: the blocks of {type(model).__name__} have no activation functions that are modules; "
            "what is not a module cannot be watched"
        )
    return found
