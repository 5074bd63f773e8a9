"""Physical pruning of a transformers model: attention heads and feed-forward neurons are cut out of its matrices.

    kept = Structure({"model.layers.0.self_attn.o_proj": [0, 1, 3]}, {"model.layers.0.mlp.down_proj": [0, 2, ...]})
    prune(model, kept)
    model.save_pretrained(folder)      # `tunesmith.models.loader` and every command load it again

What is kept is named by the layer that reads it: heads by the attention's output projection, neurons by the down
projection. Heads that share keys (grouped queries) are one unit. Blocks may keep different numbers; every one keeps
something. The plan is written into the config as `tunesmith_structure`, with the numbers that heads and neurons had in
the original architecture; a loader that does not know it finds weights of another shape and says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunesmith.core.layer import LayerSpec, describe
from tunesmith.core.modelmap import block_linears, roles_from_names
from tunesmith.errors import ModelError

FIELD = "tunesmith_structure"
"""Of the config."""
_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_GROUPS = ("num_key_value_heads", "num_kv_heads")
_INNER = ("all_head_size", "inner_dim", "split_size")
_HIDDEN = ("embed_dim", "hidden_size", "d_model", "hidden_dim")
"""Attributes of attention modules: what a head has, how many there are, all heads together, the residual stream."""
M = TypeVar("M", bound=PreTrainedModel)


@dataclass(frozen=True)
class Site:
    """Heads or neurons that can be cut, and the layers that hold them.

    Attributes:
        kind: `heads` or `neurons`.
        output: Name of the layer that reads them: `o` or `down`.
        inputs: Names of the layers that make them: q, k, v, or the fused one; up and gate.
        scope: Name of the module that holds all of these.
        count: Heads or neurons.
        share: Heads that read the same keys, 1 without grouped queries; they go together.
        size: Columns of `output` per head or neuron.
    """

    kind: str
    output: str
    inputs: tuple[str, ...]
    scope: str
    count: int
    share: int = 1
    size: int = 1

    @property
    def units(self) -> int:
        """What can be cut one by one."""
        return self.count // self.share

    @property
    def width(self) -> int:
        """Columns of `output` per unit."""
        return self.share * self.size


@dataclass(frozen=True)
class Structure:
    """What is kept, by the name of the layer that reads it; a layer that is not named keeps everything.

    Attributes:
        heads: Indices of query heads, ascending.
        neurons: Indices of neurons, ascending.
    """

    heads: Mapping[str, Sequence[int]]
    neurons: Mapping[str, Sequence[int]]

    def of(self, site: Site) -> Sequence[int] | None:
        """What a site keeps; None for everything."""
        return (self.heads if site.kind == "heads" else self.neurons).get(site.output)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        parts = {"heads": self.heads, "neurons": self.neurons}
        return {kind: {name: list(kept) for name, kept in held.items()} for kind, held in parts.items()}


def sites(model: nn.Module) -> dict[str, Site]:
    """Everything in the blocks that has heads or neurons, by the name of the layer that reads it.

    Layers may have adapters around them.

    Raises:
        ModelError: an attention or feed-forward part whose layers are not told by their roles.
    """
    names = _outermost(block_linears(model))
    role = {name: roles_from_names([f"{name}.weight"])[f"{name}.weight"].kind for name in names}
    specs = {name: describe(_bare(model.get_submodule(name)), name) for name in names}
    found: dict[str, Site] = {}
    for name in names:
        if role[name] == "o":
            scope, inputs = _beside(name, [n for n in names if role[n] in ("q", "k", "v", "qkv")])
            found[name] = _attention(model, name, scope, sorted(inputs, key=lambda n: "qkv".index(role[n][0])), specs)
        elif role[name] == "down":
            scope, inputs = _beside(name, [n for n in names if role[n] in ("up", "gate")])
            neurons = specs[name].shape[1]
            if any(specs[n].shape[0] != neurons for n in inputs):
                raise ModelError(f"{name!r} reads {neurons} neurons, which {inputs} do not each make")
            found[name] = Site("neurons", name, tuple(inputs), scope, neurons)
    taken = [n for site in found.values() for n in site.inputs]
    if twice := sorted({n for n in taken if taken.count(n) > 1}):
        raise ModelError(f"{twice[0]!r} is read by several layers; which heads or neurons are whose is not known")
    return found


def _outermost(names: Sequence[str]) -> list[str]:
    """Without the linear layers inside of others, which are adapters' own."""
    known = set(names)
    inside = {n for n in names if any(n[:at] in known for at in range(len(n)) if n[at] == ".")}
    return [n for n in names if n not in inside]


def _beside(name: str, candidates: Sequence[str]) -> tuple[str, list[str]]:
    """The nearest module around a layer that holds some of the candidates, and these."""
    scope = name
    while "." in scope:
        scope = scope.rpartition(".")[0]
        if inside := [n for n in candidates if n.startswith(f"{scope}.")]:
            return scope, inside
    raise ModelError(f"the layers that feed {name!r} are not known by their names, so that nothing can be cut there")


def _attention(model: nn.Module, name: str, scope: str, inputs: list[str], specs: Mapping[str, LayerSpec]) -> Site:
    around = _modules(model, scope)
    size = next((int(getattr(m, a)) for m in around for a in _SIZES if isinstance(getattr(m, a, None), int)), 0)
    inner, made = specs[name].shape[1], [specs[n].shape[0] for n in inputs]
    if len(made) == 1 and made[0] == 3 * inner and any("split_size" in vars(m) for m in around):
        made = [inner] * 3
    if len(made) != 3 or made[0] != inner or made[1] != made[2] or not size or inner % size or made[1] % size:
        raise ModelError(
            f"{name!r}: the attention has layers of {made} outputs for {inner} inputs of the output projection and "
            f"heads of {size or 'unknown size'}; expected q, k and v, or GPT-2's fused layer"
        )
    return Site("heads", name, tuple(inputs), scope, inner // size, inner // made[1], size)


def prune(model: M, kept: Structure) -> M:
    """Cut everything else out, in place, and write the plan into the config.

    Args:
        model: Without adapters, not quantised; may have been pruned before.
        kept: Indices among the heads and neurons that the model has now.

    Raises:
        ModelError: a layer that has no heads or neurons, indices that it has not, part of a group of heads that shares
            keys, nothing kept, or an attention whose code does not follow the shapes of its layers.
    """
    before = recorded(model.config) or Structure({}, {})
    cut(model, kept)
    record = {kind: {n: list(v) for n, v in held.items()} for kind, held in before.to_json().items()}
    for kind, held in kept.to_json().items():
        for name, indices in held.items():
            earlier = record[kind].get(name)
            record[kind][name] = indices if earlier is None else [earlier[i] for i in indices]
    setattr(model.config, FIELD, record)
    return model


def recorded(config: Any) -> Structure | None:
    """The plan in a config; None if nothing was cut.

    Raises:
        ModelError: it is not a plan.
    """
    held = getattr(config, FIELD, None)
    if held is None:
        return None
    if not isinstance(held, Mapping) or any(not isinstance(held.get(kind), Mapping) for kind in ("heads", "neurons")):
        raise ModelError(
            f"config.json: {FIELD} must hold `heads` and `neurons`, lists of indices by layer; found {held!r}"
        )
    return Structure(held["heads"], held["neurons"])


def loadable(cls: type[M]) -> type[M]:
    """A class that `from_pretrained` fills: the architecture, cut as its config says before weights are looked for."""

    class Cut(cls):  # type: ignore[valid-type]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            kept = recorded(config)
            if kept is not None:
                cut(self, kept)
            self.__class__ = cls

    Cut.__name__, Cut.__qualname__, Cut.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Cut


def cut(model: nn.Module, kept: Structure) -> None:
    """Cut without writing into the config; otherwise as `prune`. Nothing is changed if it raises."""
    known = sites(model)
    wanted = {"heads": kept.heads, "neurons": kept.neurons}
    for kind, held in wanted.items():
        for name, indices in held.items():
            if name not in known or known[name].kind != kind:
                some = ", ".join([n for n, s in known.items() if s.kind == kind][:4]) or "none"
                raise ModelError(f"{name!r} reads no {kind} of this {type(model).__name__}; such layers are {some}")
            _check(model, known[name], indices)
    for site in known.values():
        stays = kept.of(site)
        if stays is not None and len(stays) < site.count:
            (_cut_heads if site.kind == "heads" else _cut_neurons)(model, site, list(stays))


def _check(model: nn.Module, site: Site, kept: Sequence[int]) -> None:
    if not kept or list(kept) != sorted({i for i in kept if 0 <= i < site.count}):
        raise ModelError(
            f"{site.output!r} has {site.kind} 0 to {site.count - 1}; expected some of them in ascending order, found "
            f"{list(kept)[:8]}"
        )
    groups = {i // site.share for i in kept}
    if len(groups) * site.share != len(kept):
        raise ModelError(
            f"{site.output!r}: {site.share} heads each share their keys and go together; found {list(kept)[:8]}"
        )
    for name in (site.output, *site.inputs):
        module = model.get_submodule(name)
        if not (type(module) is nn.Linear or isinstance(module, Conv1D)):
            raise ModelError(
                f"{name!r} is a {type(module).__name__}; prune before weights are quantised and adapters are attached"
            )
    if site.kind == "heads" and len(kept) < site.count:
        _check_code(model, site)


def _check_code(model: nn.Module, site: Site) -> None:
    """Raise unless the attention's forward pass follows what is cut."""

    def refuse(why: str) -> None:
        raise ModelError(f"heads of {site.scope!r} cannot be cut: {why}")

    own = (site.output, *site.inputs)
    for path, module in model.get_submodule(site.scope).named_modules():
        name = f"{site.scope}.{path}".removesuffix(".")
        if name in own:
            continue
        norm = "norm" in type(module).__name__.lower()
        for key, p in module.named_parameters(recurse=False):
            per_head = path.rpartition(".")[2] in ("q_norm", "k_norm") and p.numel() != site.size
            if not norm or per_head:
                refuse(f"{name}.{key} of shape {tuple(p.shape)} belongs to heads in a way that is not known")
        if norm or not _is_written_out(module):
            continue
        forward = inspect.unwrap(type(module).forward)
        if "position_bias" in inspect.signature(forward).parameters:
            refuse("its position bias has an entry per head and is shared by all blocks; neurons can be cut")
        read = set(forward.__code__.co_names)
        fixed = read & set(_HIDDEN) or {n for n in (*_COUNTS, *_GROUPS, *_INNER) if n in read and n not in vars(module)}
        if fixed:
            refuse(f"{type(module).__name__} reads {sorted(fixed)[0]!r} instead of the shapes of its layers")


def _is_written_out(module: nn.Module) -> bool:
    return type(module).__module__.split(".")[0] != "torch" and any(True for _ in module.children())


def _cut_heads(model: nn.Module, site: Site, heads: list[int]) -> None:
    groups = sorted({h // site.share for h in heads})
    of_queries, of_keys = _columns(heads, site.size), _columns(groups, site.size)
    if len(site.inputs) == 1:
        inner = site.count * site.size
        _take(model, site.inputs[0], [part * inner + i for part in range(3) for i in of_queries], 0)
    else:
        for name, rows in zip(site.inputs, (of_queries, of_keys, of_keys), strict=True):
            _take(model, name, rows, 0)
    _take(model, site.output, of_queries, 1)
    sizes = {
        **dict.fromkeys(_COUNTS, (site.count, len(heads))),
        **dict.fromkeys(_GROUPS, (site.units, len(groups))),
        **dict.fromkeys(_INNER, (site.count * site.size, len(of_queries))),
    }
    for module in _modules(model, site.scope):
        for name, (was, now) in sizes.items():
            if vars(module).get(name) == was:
                setattr(module, name, now)


def _cut_neurons(model: nn.Module, site: Site, neurons: list[int]) -> None:
    for name in site.inputs:
        _take(model, name, neurons, 0)
    _take(model, site.output, neurons, 1)
    scope = model.get_submodule(site.scope)
    if vars(scope).get("intermediate_size") == site.count:
        scope.intermediate_size = len(neurons)  # type: ignore[assignment]


def _columns(units: Iterable[int], size: int) -> list[int]:
    return [unit * size + i for unit in units for i in range(size)]


def _take(model: nn.Module, name: str, rows: list[int], dim: int) -> None:
    """Keep some outputs (0) or inputs (1) of a linear layer."""
    module: Any = model.get_submodule(name)
    stored = 1 - dim if isinstance(module, Conv1D) else dim

    def some(p: Tensor, at: int) -> nn.Parameter:
        index = torch.tensor(rows, device=p.device)
        return nn.Parameter(p.detach().index_select(at, index).clone(), requires_grad=p.requires_grad)

    module.weight = some(module.weight, stored)
    if dim == 0 and module.bias is not None:
        module.bias = some(module.bias, 0)
    sizes = ("nf", "nx") if isinstance(module, Conv1D) else ("out_features", "in_features")
    setattr(module, sizes[dim], len(rows))


def _bare(module: nn.Module) -> nn.Module:
    return getattr(module, "base_layer", module)


def _modules(model: nn.Module, scope: str) -> list[nn.Module]:
    return list(model.get_submodule(scope).modules())
