"""The bottom of a model: its embedding and first blocks by name, and their outputs kept.

    frozen = bottom(model, 5)            names as `named_parameters` gives them
    kept = Prefix(model, 5, 2**30)       in training mode, what leaves block 4 is kept per distinct input
    kept.attach(); ...; kept.detach()

Outputs are kept by row of a batch. What belongs to a row is known by all that enters block 0: a hash of the bits of
the hidden state, masks and positions, made where these tensors are; the embedding, which is cheap, always runs. A batch
of which all rows are known skips the blocks, and any other runs as it would have: what a pass computes is never mixed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from transformers import Cache
from transformers.utils import output_capturing

from tunesmith.core.modelmap import blocks, roles
from tunesmith.core.seeds import generator
from tunesmith.errors import ModelError, TunesmithError

FIRST, ALL = "first", "all"
_BEFORE = ("project_in", "pre_layrnorm", "ln_pre", "norm_pre", "conv1", "conv2")
"""What stands before the first block and is not called an embedding: OPT, CLIP, timm, Whisper."""
Row = tuple[Tensor, ...]


def chosen_stacks(model: nn.Module, stack: str = FIRST) -> dict[str, list[nn.Module]]:
    """The stacks of blocks that `stack` means, by dotted path.

    Args:
        model: With numbered blocks.
        stack: `first` in the order of execution (the encoder of an encoder-decoder), `all`, or a path or its end.

    Raises:
        ModelError: there are no blocks, no such stack, or several.
    """
    found = blocks(model)
    if stack == ALL:
        return found
    names = list(found)
    wanted = names[:1] if stack == FIRST else [n for n in names if f".{n}".endswith(f".{stack}")]
    if len(wanted) != 1:
        raise ModelError(
            f"stack={stack!r} means {len(wanted)} of the stacks of blocks of {type(model).__name__}; expected "
            f"`{FIRST}`, `{ALL}` or the path of one of {', '.join(names)}"
        )
    return {wanted[0]: found[wanted[0]]}


def first_blocks(model: nn.Module, k: int, stack: str = FIRST) -> list[nn.Module]:
    """Blocks 0 ... k - 1 of each stack that `stack` means.

    Raises:
        ModelError: a stack has fewer blocks, or its blocks share their weights (ALBERT).
    """
    found: list[nn.Module] = []
    for name, held in chosen_stacks(model, stack).items():
        config = getattr(model, "config", None)
        if k and hasattr(config, "num_hidden_groups"):
            raise ModelError(
                f"the {config.num_hidden_layers} layers of {type(model).__name__} share the weights of {name!r}: those "
                "at the bottom cannot be frozen by themselves"
            )
        if k > len(held):
            raise ModelError(
                f"{k} blocks were asked for at the bottom of {name!r}, which has {len(held)}; ask for fewer"
            )
        found += held[:k]
    return found


def bottom(model: nn.Module, k: int, *, stack: str = FIRST) -> frozenset[str]:
    """Names of the parameters of the input embedding and of the first `k` blocks.

    The embedding is all that stands before block 0: token, position and type embeddings, patches, their norm and
    projection (BERT, ELECTRA, BART, OPT, ViT, CLIP, Whisper); what another stack has of its own stays out, such as the
    positions of a decoder. A head that is tied to it is one tensor with it, and in the result; another head is not.
    What adapters put into these blocks is in the result too.

    Args:
        model: With numbered blocks.
        k: How many blocks; 0 for the embedding alone.
        stack: As in `chosen_stacks`.

    Raises:
        ModelError: what `chosen_stacks` and `first_blocks` raise.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    inside = {names[id(p)] for block in first_blocks(model, k, stack) for p in block.parameters()}
    return frozenset(inside | _embedding(model, set(chosen_stacks(model, stack))))


def _embedding(model: nn.Module, chosen: set[str]) -> set[str]:
    # Some models call their output layer an embedding too (GPT-NeoX: `embed_out`).
    outputs = _held(model, "get_output_embeddings") - _held(model, "get_input_embeddings")
    stacks = list(blocks(model))
    others = tuple(f"{_owner(stack, stacks)}." for stack in stacks if stack not in chosen)
    kinds = roles(model)
    return {
        name
        for name, p in model.named_parameters()
        if kinds[name].depth is None
        and id(p) not in outputs
        and not name.startswith(others)
        and (
            kinds[name].kind in ("embedding", "position")
            or "embed" in name.lower()
            or any(word in _BEFORE for word in name.split("."))
        )
    }


def _held(model: nn.Module, getter: str) -> set[int]:
    """Identities of the parameters of a module that transformers' models can name."""
    try:
        module = getattr(model, getter, lambda: None)()
    except RuntimeError:  # models of several towers (CLIP) have no single one
        return set()
    return {id(p) for p in module.parameters()} if isinstance(module, nn.Module) else set()


def _owner(stack: str, every: Iterable[str]) -> str:
    """The widest module that has a stack to itself: `model.decoder` of BART's two, `vision_model` of CLIP's."""
    words = stack.split(".")
    for i in range(1, len(words)):
        path = ".".join(words[:i])
        if not any(other != stack and other.startswith(f"{path}.") for other in every):
            return path
    return stack


def randomness(model: nn.Module, k: int, stack: str = FIRST) -> list[str]:
    """What gives the embedding or the first `k` blocks another output for the same input in training mode, in words.

    Dropout, as a module or as a number that a module hands to a function, skipped layers, batch statistics.
    """
    found = []
    names = {id(module): name for name, module in model.named_modules()}
    deep = first_blocks(model, k, stack)
    path = next(iter(chosen_stacks(model, stack)))
    owner = model.get_submodule(path.rpartition(".")[0])
    # A module that holds embeddings and no blocks stands before the blocks; of their owner, what is directly in it.
    ancestors = {".".join(path.split(".")[:i]) for i in range(path.count(".") + 1)}
    for name in sorted(_embedding(model, {path})):
        words = name.split(".")
        holder = next((".".join(words[:i]) for i in range(len(words)) if ".".join(words[:i]) not in ancestors), None)
        deep += [model.get_submodule(holder)] if holder else []
    every = {id(m): m for each in deep for m in each.modules()}
    every |= {id(m): m for m in (owner, *owner.children()) if m is owner or isinstance(m, _DropoutNd)}
    for module in every.values():
        label = f"{type(module).__name__} {names[id(module)]!r}"
        rates = {key: value for key, value in vars(module).items() if "drop" in key.lower()}
        if isinstance(module, _DropoutNd):
            rates["p"] = module.p
        found += [
            f"{label} ({key}={rate:g})"
            for key, rate in rates.items()
            if isinstance(rate, float | int) and not isinstance(rate, bool) and rate > 0
        ]
        if isinstance(module, _BatchNorm):
            found.append(f"{label} (batch statistics)")
    return found


class Prefix:
    """The first blocks of one stack, skipped in training mode for inputs that they have seen.

    Evaluation, generation with earlier tokens, and passes that somebody watches inside (hooks, `output_hidden_states`)
    run as ever. Losses are those without it bit for bit when batches come back as they were; where a row comes back
    in another batch, they are those up to the rounding by which the kernels tell batches apart.

    Args:
        model: With numbered blocks.
        k: How many blocks.
        limit: Bytes of outputs to keep, in the memory of the CPU. When it is full nothing is added and nothing leaves:
            data that comes in epochs would otherwise push itself out before it comes again.
        stack: Of which stack; as in `chosen_stacks`, but one.

    Attributes:
        hits: Rows of batches that skipped the blocks.
        misses: Rows of batches that ran through them.
        bytes: Of what is kept.
    """

    def __init__(self, model: nn.Module, k: int, limit: int, *, stack: str = FIRST) -> None:
        self.model, self.k, self.limit, self.stack = model, k, limit, stack
        self.blocks = first_blocks(model, k, stack)
        self.hits = self.misses = self.bytes = 0
        self._rows: dict[tuple[Any, ...], tuple[Row, Any]] = {}
        self._before: list[Any] = []
        self._known: tuple[list[Tensor], Any] | None = None
        self._keys: list[tuple[Any, ...]] | None = None
        self._version = -1
        self._factors: dict[torch.device, Tensor] = {}

    def attach(self) -> None:
        """Put itself before the blocks.

        Raises:
            TunesmithError: there are no blocks, those of several stacks, or they give another output each time
                (dropout, batch statistics).
        """
        if not self.blocks:
            raise TunesmithError("there are no blocks at the bottom whose outputs could be kept; freeze at least one")
        if len(chosen_stacks(self.model, self.stack)) > 1:
            raise TunesmithError(
                f"outputs are kept of one stack, but stack={self.stack!r} of {type(self.model).__name__} means "
                "several, and the blocks of a decoder read an encoder that trains; choose one stack"
            )
        if random := randomness(self.model, self.k, self.stack):
            raise TunesmithError(
                f"the frozen part gives another output each time: {random[0]} and {len(random) - 1} others. Load the "
                "model with its dropout set to 0, or do not keep outputs (cache=False)"
            )
        for index, block in enumerate(self.blocks):
            self._before.append(block.__dict__.get("forward"))
            block.forward = functools.partial(self._call, index, block.forward)

    def detach(self) -> None:
        """Take itself away again, with all that is kept."""
        for block, before in zip(self.blocks, self._before, strict=False):
            if before is None:
                del block.forward
            else:
                block.forward = before
        self._before = []
        self.clear()

    def clear(self) -> None:
        """Keep nothing of what was seen."""
        self._rows, self._known, self._keys, self.bytes = {}, None, None, 0

    def _call(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if index == 0:
            self._look_up(args, kwargs)
        if self._known is not None:
            leaves, structure = self._known
            # Each block hands on what the last of them gave: also what later blocks take from the first (T5's bias).
            return tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in leaves], structure)
        out = forward(*args, **kwargs)
        if self._keys is not None and index == len(self.blocks) - 1:
            self._keep(out)
        return out

    def _look_up(self, args: Any, kwargs: Any) -> None:
        self._known = self._keys = None
        if not self.blocks[0].training or self._watched():
            return
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, Cache) and leaf.get_seq_length() > 0 for leaf in leaves):
            return
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        parameters = [p for block in self.blocks for p in block.parameters()]
        if any(t.requires_grad for t in (*tensors, *parameters)):
            raise TunesmithError(
                "outputs of the frozen blocks are to be kept, but something in them or before them trains (a prompt, "
                "an adapter, an encoder), or asks for gradients at the input (activation checkpointing: call "
                "`model.disable_input_require_grads()`); freeze it, or do not keep outputs (cache=False)"
            )
        version = sum(t._version for t in (*parameters, *(b for block in self.blocks for b in block.buffers())))
        if version != self._version:
            self.clear()
            self._version = version
        keys = self._hash(tensors, leaves)
        if all(key in self._rows for key in keys):
            self._known = _joined([self._rows[key] for key in keys], tensors[0].device)
            self.hits += len(keys)
        else:
            self._keys = keys
            self.misses += len(keys)

    def _watched(self) -> bool:
        if output_capturing._active_collector.get():
            return True
        hooks = (
            hook
            for block in self.blocks
            for module in block.modules()
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        )
        return any(getattr(hook, "__name__", "") != "output_capturing_hook" for hook in hooks)

    def _hash(self, tensors: Sequence[Tensor], leaves: Sequence[Any]) -> list[tuple[Any, ...]]:
        """One key per row of the first tensor, from all tensors: those of as many rows give each row its own."""
        rows = len(tensors[0])
        plain = [leaf for leaf in leaves if isinstance(leaf, bool | int | float | str)]
        common: tuple[Any, ...] = (*plain, torch.is_autocast_enabled(tensors[0].device.type))
        columns = []
        for t in tensors:
            per_row = t.dim() > 1 and len(t) == rows
            common += (t.shape[1:] if per_row else t.shape, t.dtype)
            columns.append(self._digest(t.reshape(rows if per_row else 1, -1)).expand(rows, -1))
        return [(*common, *digest) for digest in torch.cat(columns, dim=1).tolist()]

    def _digest(self, x: Tensor) -> Tensor:
        """(R, n) of any dtype -> (R, 2) int64: two sums of its 32-bit words times random odd numbers, mod 2^64.

        Two rows that differ agree in both with probability at most 2^-64.
        """
        octets = x.detach().contiguous().view(torch.uint8)
        octets = nn.functional.pad(octets, (0, -octets.shape[1] % 4)).contiguous()
        words = octets.view(torch.int32).long()
        factors = self._factors.get(x.device)
        if factors is None or factors.shape[1] < words.shape[1]:
            g = generator("prefix of a model")
            drawn = torch.randint(-(2**63), 2**63 - 1, (words.shape[1], 2), generator=g) | 1
            factors = self._factors[x.device] = drawn.T.contiguous().to(x.device)
        return torch.stack([(words * row[: words.shape[1]]).sum(1) for row in factors], dim=1)

    def _keep(self, out: Any) -> None:
        assert self._keys is not None
        leaves, structure = tree_flatten(out)
        held = [leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        count = len(self._keys)
        # What is one for all rows, such as a position bias, is kept once.
        shared = {i: t.clone() for i, t in enumerate(held) if isinstance(t, Tensor) and len(t) != count}
        extra = sum(t.nbytes for t in shared.values())
        for r, key in enumerate(self._keys):
            if key in self._rows:
                continue
            own = {i: t[r : r + 1].clone() for i, t in enumerate(held) if isinstance(t, Tensor) and i not in shared}
            size = extra + sum(t.nbytes for t in own.values())
            if self.bytes + size > self.limit:
                return
            self._rows[key] = tuple((own | shared).get(i, leaf) for i, leaf in enumerate(held)), structure
            self.bytes, extra = self.bytes + size, 0


def _joined(rows: Sequence[tuple[Row, Any]], device: torch.device) -> tuple[list[Any], Any]:
    """The output of a batch from those of its rows."""
    leaves = []
    for column in zip(*(row for row, _ in rows), strict=True):
        first = column[0]
        if isinstance(first, Tensor):
            first = (first if all(t is first for t in column) and len(rows) > 1 else torch.cat(column)).to(device)
        leaves.append(first)
    return leaves, rows[0][1]
