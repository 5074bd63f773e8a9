"""Derivatives of a closure over a model: along a direction in one forward pass, or by its own backward pass.

A parameter carries its tangent itself: a closure over a model needs no other parameters, names or arguments, and runs
as it does for a finite difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tunesmith.errors import TunesmithError


@torch.no_grad()
def derivative(closure: Callable[[], Tensor], tangents: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, float]:
    """The loss, (), and <gradient, tangents>; `torch.func.jvp` of the loss as a function of the parameters.

    Attention runs unfused meanwhile: the fused kernels have no forward-mode derivative.

    Args:
        closure: Returns the loss, ().
        tangents: Parameters, and what to differentiate along, of their shape and dtype. Parameters that share memory
            each need their own.

    Raises:
        TunesmithError: something in the closure has no forward-mode derivative, or cuts it off.
    """
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        for p, tangent in tangents:
            # Onto itself: the values stay as they are, and the tangent goes when the level ends.
            p.copy_(forward_ad.make_dual(p.detach(), tangent))
        try:
            loss, slope = forward_ad.unpack_dual(closure())
        except RuntimeError as error:  # also of what has no such derivative at all
            if "forward AD" not in str(error) and "jvp" not in str(error):
                raise
            raise TunesmithError(
                "a forward gradient needs the forward-mode derivative of all that the loss is made of, and here it is "
                f"missing ({error}); load the model with attn_implementation='eager' and without quantised or custom "
                "kernels, or take a finite difference"
            ) from error
    if slope is None:
        raise TunesmithError(
            "a forward gradient needs a loss that can be derived, and this one does not depend on what trains: it is a "
            "count such as an accuracy, or was cut off (`detach`, `item`, `inference_mode`); take a finite difference"
        )
    return loss.detach(), float(slope)


def reduced(loss: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """A sum or mean over processes of a loss, and of its tangent if it carries one, which no collective does."""
    value, slope = forward_ad.unpack_dual(loss)
    return reduce(value) if slope is None else forward_ad.make_dual(reduce(value), reduce(slope))


def gradients(closure: Callable[[], Tensor], wanted: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Put the loss's gradient into `.grad` of the wanted parameters and of no others; returns the loss, () detached.

    Only what the wanted ones need is kept for the backward pass: nothing, where they are the last layers.

    Args:
        closure: Returns the loss, (); called once, with gradients enabled. It may run the backward pass itself.
        wanted: Parameters that require a gradient.
        others: All others that do.

    Raises:
        TunesmithError: the loss has no gradient.
    """
    for p in wanted:
        p.grad = None
    for p in others:
        p.requires_grad_(False)
    try:
        with torch.enable_grad():
            loss = closure()
            if loss.requires_grad and all(p.grad is None for p in wanted):
                loss.backward()
    finally:
        for p in others:
            p.requires_grad_(True)
    if wanted and all(p.grad is None for p in wanted):
        raise TunesmithError(
            "first-order blocks need the gradient of the loss, and the closure gave none: it switched gradients off or "
            "its loss is a count; let it leave them as they are when it is called"
        )
    return loss.detach()
