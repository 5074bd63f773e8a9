"""One view of every kind of layer that an adapter can change.

An adapter always sees a weight in its canonical shape, whatever the module stores: (out, in) for a linear layer, also
for GPT-2's `Conv1D`, which keeps the transpose, and for 4- and 8-bit layers, which keep codes; (out, in / groups,
*kernel) for a convolution; (rows, dim) for an embedding; (dim,) for a normalisation, as the factor that multiplies the
normalised input (Gemma's norms store that factor minus one).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ModelError

KINDS = ("linear", "conv", "embedding", "norm")


_CHANNELS_FIRST = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


@dataclass(frozen=True)
class LayerSpec:
    """What an adapter may know of its layer before it sees the weight.

    Attributes:
        name: Dotted path in the model.
        kind: `"linear"`, `"conv"`, `"embedding"` or `"norm"`.
        shape: Of the canonical weight.
        dtype: That the layer computes in: of its weight, or of its inputs where the weight is codes.
        device: Of the weight.
        has_bias: Whether the layer has a bias now.
        can_bias: Whether it can be given one (an RMSNorm and an embedding cannot).
        quantized: Whether the stored weight is codes.
        groups: Of a convolution; 1 elsewhere.
        unit_offset: 1.0 for a norm that stores its factor minus one, else 0.0.
        channel_dim: The dimension of the layer's OUTPUT that holds its channels: 1 for convolutions and the norms that
            go with them, the last elsewhere.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    has_bias: bool
    can_bias: bool
    quantized: bool = False
    groups: int = 1
    unit_offset: float = 0.0
    channel_dim: int = -1

    @property
    def out_features(self) -> int:
        """Channels of the output: rows of a linear or convolution weight, columns of an embedding's."""
        return self.shape[-1] if self.kind in ("embedding", "norm") else self.shape[0]


def kind_of(module: nn.Module) -> str | None:
    """The kind of a module, or None for one that no adapter can change."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    if isinstance(module, nn.Linear | Conv1D) or _backend(module) is not None:
        return "linear"
    weight = getattr(module, "weight", None)
    # transformers defines an RMSNorm per architecture with no common base class: the name is what they share.
    if "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter) and weight.dim() == 1:
        return "norm"
    return None


def describe(module: nn.Module, name: str) -> LayerSpec:
    """The spec of a layer.

    Raises:
        ModelError: no adapter can change a module of this type.
    """
    kind = kind_of(module)
    if kind is None:
        raise ModelError(
            f"the layer {name!r} is a {type(module).__name__}, which no adapter can change; name linear, convolution, "
            "embedding or normalisation layers in `target_modules`"
        )
    quantized = _backend(module) is not None
    stored: Tensor = module.weight  # type: ignore[assignment]
    shape = tuple(stored.shape)
    dtype = stored.dtype
    if quantized:
        shape = (module.out_features, module.in_features)  # type: ignore[assignment]
        dtype = getattr(module, "compute_dtype", None) or torch.float32
    elif isinstance(module, Conv1D):
        shape = shape[::-1]
    offset = _unit_offset(module) if kind == "norm" else 0.0
    return LayerSpec(
        name=name,
        kind=kind,
        shape=shape,
        dtype=dtype,
        device=stored.device,
        has_bias=getattr(module, "bias", None) is not None,
        can_bias=kind in ("linear", "conv") or getattr(module, "bias", None) is not None,
        quantized=quantized,
        groups=getattr(module, "groups", 1),
        unit_offset=offset,
        channel_dim=1 if kind == "conv" or isinstance(module, _CHANNELS_FIRST) else -1,
    )


def read_weight(module: nn.Module, spec: LayerSpec) -> Tensor:
    """The canonical weight; a view of the stored one wherever that is possible."""
    backend = _backend(module)
    if backend is not None:
        return backend.get_base_weight(module)
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, Conv1D):
        return weight.T
    return weight + spec.unit_offset if spec.unit_offset else weight


def apply(module: nn.Module, spec: LayerSpec, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's operation on `x` with another canonical weight and bias; differentiable in all three."""
    if x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    if spec.kind == "linear":
        return F.linear(x, weight, bias)
    if spec.kind == "conv":
        return module._conv_forward(x, weight, bias)
    # Norms and embeddings differ by architecture (epsilon, scale, padding): their own forward, with other tensors.
    replaced = {"weight": weight - spec.unit_offset if spec.unit_offset else weight}
    if spec.has_bias and bias is not None:
        replaced["bias"] = bias
    return functional_call(module, replaced, (x,))


def write(module: nn.Module, spec: LayerSpec, weight: Tensor, bias: Tensor | None) -> None:
    """Store a canonical weight and bias in the layer, in the dtype and layout that it keeps.

    Raises:
        ModelError: the layer cannot hold a bias, or its quantisation cannot be written back.
    """
    backend = _backend(module)
    if backend is not None:
        if not backend.supports_merge:
            raise ModelError(
                f"the layer {spec.name!r} is quantised by {backend.backend_name}, which cannot be rewritten"
            )
        backend.set_base_weight(_Holder(module), weight)
    else:
        stored: nn.Parameter = module.weight  # type: ignore[assignment]
        value = weight - spec.unit_offset if spec.unit_offset else weight
        value = value.T if isinstance(module, Conv1D) else value
        with torch.no_grad():
            stored.copy_(value)
    current = getattr(module, "bias", None)
    if bias is None:
        # Only a bias that merging itself created is ever taken away again.
        if current is not None and not spec.has_bias:
            module.register_parameter("bias", None)
        return
    if current is None:
        if not spec.can_bias:
            raise ModelError(
                f"the layer {spec.name!r} ({type(module).__name__}) cannot hold the bias that merging needs"
            )
        module.bias = nn.Parameter(bias.detach().to(spec.device, spec.dtype).clone(), requires_grad=False)
    else:
        with torch.no_grad():
            current.copy_(bias)


def keep_codes_readable(model: nn.Module) -> None:
    """Stop bitsandbytes from reordering 4-bit codes for CPU inference, and undo it where that has happened.

    It does so at a layer's first forward pass in evaluation mode. Reordered codes can neither be dequantised by PEFT
    nor trained through: the layer's output then carries no gradient to the adapters below it.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.state_dict()  # bitsandbytes puts the codes back in order to save them
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


class _Holder:
    """The little of a PEFT layer that peft's quantisation backends ask for when they write a weight back."""

    def __init__(self, module: nn.Module) -> None:
        self.base_layer = module

    def get_base_layer(self) -> nn.Module:
        return self.base_layer


def _backend(module: nn.Module):
    if isinstance(module, nn.Linear) and type(module) is nn.Linear and type(module.weight) is nn.Parameter:
        return None  # the common case, decided without asking every quantisation library
    return resolve_quantization_backend(module)


def _unit_offset(norm: nn.Module) -> float:
    """1.0 if the norm multiplies by 1 + weight: then a zero weight leaves something of its input."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    if weight.device.type == "meta":
        return 0.0
    zeros = {name: torch.zeros_like(p) for name, p in norm.named_parameters(recurse=False)}
    probe = torch.linspace(-1.0, 1.0, weight.numel(), device=weight.device, dtype=weight.dtype)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
        return 0.0
    with torch.no_grad():
        left = functional_call(norm, zeros, (probe[None],))
    return 1.0 if bool(left.abs().max() > 1e-3) else 0.0
