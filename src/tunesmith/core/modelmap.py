"""What the tensors of a transformer are: its blocks, and the role of each parameter.

Discovered from names and module types, not from a table per architecture: the blocks are the outermost numbered
containers, and the roles are the words that transformers' own models use. `tests/core/test_modelmap.py` holds the
result for Llama, Qwen2, GPT-2, OPT, BERT, T5 and ViT.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ModelError

_ROLES = {
    "qkv": "c_attn qkv qkv_proj query_key_value Wqkv in_proj_weight",
    "q": "q_proj query q q_lin wq",
    "k": "k_proj key k k_lin wk",
    "v": "v_proj value v v_lin wv",
    "o": "o_proj out_proj o out_lin wo",
    "gate": "gate_proj wi_0 w1",
    "up": "up_proj fc1 c_fc lin1 wi wi_1 w3 dense_h_to_4h",
    "down": "down_proj fc2 lin2 w2 dense_4h_to_h",
    "embedding": "embed_tokens wte word_embeddings shared patch_embeddings token_type_embeddings cls_token",
    "position": "wpe position_embeddings embed_positions relative_attention_bias",
    "head": "lm_head classifier score cls qa_outputs predictions",
}
_ROLE_OF = {word: role for role, words in _ROLES.items() for word in words.split()}
_ATTENTION_WORDS = ("attn", "attention")
_OUTER = ("embedding", "position", "head")
"""Roles of whole subtrees: they hold also for a module inside."""


@dataclass(frozen=True)
class Depth:
    """Where a parameter stands: block `index` of the `count` blocks of the stack at `stack`."""

    stack: str
    index: int
    count: int


@dataclass(frozen=True)
class Role:
    """What a parameter is for.

    Attributes:
        kind: `q`, `k`, `v`, `qkv`, `o`, `gate`, `up`, `down`, `norm`, `embedding`, `position`, `head` or `other`.
        depth: Its block, or None outside of the blocks.
        bias: Whether it is a bias.
    """

    kind: str
    depth: Depth | None
    bias: bool


def depths(names: Iterable[str]) -> dict[str, Depth | None]:
    """The block of each parameter name, from the names alone.

    A stack is the outermost numbered container whose numbers are 0, 1, ..., n - 1 (`model.layers`, `transformer.h`,
    `encoder.block`); an inner number, such as the one in `encoder.block.3.layer.0`, is not a depth.
    """
    names = list(names)
    split: dict[str, tuple[str, int] | None] = {}
    numbers: dict[str, set[int]] = {}
    for name in names:
        words = name.split(".")
        at = next((i for i, word in enumerate(words) if word.isdigit() and i > 0), None)
        # A number under an adapter's container counts adapters, not blocks.
        if at is None or any(word.startswith("tunesmith_") for word in words[:at]):
            split[name] = None
            continue
        stack = ".".join(words[:at])
        split[name] = (stack, int(words[at]))
        numbers.setdefault(stack, set()).add(int(words[at]))
    whole = {stack: len(found) for stack, found in numbers.items() if found == set(range(len(found)))}
    result: dict[str, Depth | None] = {}
    for name, place in split.items():
        known = place is not None and place[0] in whole
        result[name] = Depth(place[0], place[1], whole[place[0]]) if known and place else None
    return result


def blocks(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The blocks of each stack, in order of execution, by the stack's dotted path.

    Raises:
        ModelError: the model has no numbered blocks.
    """
    stacks = {d.stack: d.count for d in depths(n for n, _ in model.named_parameters()).values() if d}
    if not stacks:
        raise ModelError(
            f"{type(model).__name__} has no numbered blocks (such as `model.layers.0`), which this method works on"
        )
    return {stack: [model.get_submodule(f"{stack}.{i}") for i in range(count)] for stack, count in stacks.items()}


def roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter; tied parameters are named once, as `named_parameters` does."""
    norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    names = [name for name, _ in model.named_parameters()]
    place = depths(names)
    return {name: Role(_kind(name, norms), place[name], name.endswith("bias")) for name in names}


def roles_from_names(names: Iterable[str]) -> Mapping[str, Role]:
    """The same from a checkpoint's names, without the model: a norm is then known by its name."""
    names = list(names)
    place = depths(names)
    norms = {n.rpartition(".")[0] for n in names if _looks_like_norm(n)}
    return {n: Role(_kind(n, norms), place[n], n.endswith("bias")) for n in names}


def _looks_like_norm(name: str) -> bool:
    module = name.split(".")[-2] if "." in name else ""
    return "norm" in module.lower() or module in ("ln_1", "ln_2", "ln_f")


def _kind(name: str, norms: set[str]) -> str:
    words = name.split(".")
    outer = next((_ROLE_OF[w] for w in words if _ROLE_OF.get(w) in _OUTER), None)
    if any(".".join(words[:i]) in norms for i in range(1, len(words))):
        return "norm"
    if outer:
        return outer
    attention = any(mark in word.lower() for word in words for mark in _ATTENTION_WORDS)
    for word in reversed(words):
        if word == "c_proj":  # GPT-2 calls both output projections so
            return "o" if attention else "down"
        if word == "wo" and not attention:  # T5's feed-forward output
            return "down"
        if word == "dense":  # BERT: attention.output.dense, intermediate.dense, output.dense
            if "intermediate" in words:
                return "up"
            return ("o" if attention else "down") if "output" in words else "other"
        if word in _ROLE_OF:
            return _ROLE_OF[word]
    return "other"


def block_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers inside the blocks (also `Conv1D` and quantised ones), outermost modules only.

    A model without numbered blocks gives all its linear layers but its output head.
    """
    from tunesmith.core.layer import kind_of

    place = depths(n for n, _ in model.named_parameters())
    stacks = tuple({f"{d.stack}." for d in place.values() if d})
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    last = _last_linear(model) if not stacks else None
    found, others = [], _inside_adapters(model)
    for name, module in model.named_modules():
        if name.startswith(others):
            continue
        inside = name.startswith(stacks) if stacks else module is not last
        if inside and module is not head and "tunesmith_" not in name and kind_of(module) == "linear":
            found.append(name.removesuffix(".base_layer"))
    return found


def _inside_adapters(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of what other libraries' adapters hold beside the layer that they change."""
    return tuple(
        f"{name}.{held}."
        for name, module in model.named_modules()
        if hasattr(module, "base_layer")
        for held, _ in module.named_children()
        if held != "base_layer"
    )


def _last_linear(model: nn.Module) -> nn.Module | None:
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    return linears[-1] if len(linears) > 1 else None
