"""Half of a model's parameters by name: the same half for a training run and for a checkpoint on disk.

    chosen(names, level="category", seed=0, stage=0)      names of the half that trains (or is kept)

The choice depends on seed, stage and draw and on where a parameter stands, never on the order of the names or on which
others there are: a schedule that sees the parameters of a wrapped model, and a merge that reads a safetensors file,
choose alike. A bias goes with its matrix, an adapter with its layer.

    category   in every block: 2 of {q, k, v, o}; 2 of {gate, up, down} in one half of the blocks and 1 in the other;
               half of the norms; half of anything else. Every attention module, and every expert, on its own.
    layer      half of the blocks of each stack
    model      half of all the matrices of the blocks, and half of what else is in them, drawn from one urn each

An odd number is rounded up in half of the blocks (rounded down) and down in the others. A fused matrix cannot be
split: {qkv, o} and {gate_up, down} give the fused one to one half of the blocks and the other to the rest, so that the
share stays a half over the model; experts that are stored as one tensor are one matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from tunesmith.core.modelmap import roles_from_names
from tunesmith.core.seeds import subset
from tunesmith.errors import ModelError

Level = Literal["category", "layer", "model"]
Outside = Literal["train", "freeze"]
ATTENTION, FFN, NORMS, REST = "attention", "ffn", "norms", "rest"
_CATEGORIES = {
    **dict.fromkeys(("q", "k", "v", "o", "qkv"), ATTENTION),
    **dict.fromkeys(("gate", "up", "down", "gate_up"), FFN),
    "norm": NORMS,
}
_FUSED = ("qkv", "gate_up")
_WRAPPERS = ("base_layer", "original_module", "modules_to_save", "module", "_orig_mod", "_fsdp_wrapped_module")
_ADAPTERS = ("tunesmith_", "lora_", "ia3_", "oft_", "vera_", "hada_", "lokr_", "boft_", "ada_")


@dataclass(frozen=True)
class Place:
    """Where a parameter of a block stands.

    Attributes:
        stack: Number of its stack of blocks, in the alphabetical order of their paths.
        block: Number of its block in that stack.
        category: `attention`, `ffn`, `norms` or `rest`.
        group: The module inside of the block that the category is drawn in: an attention module, an expert.
        member: What is chosen in it: a kind of matrix, or the path of a norm.
    """

    stack: int
    block: int
    category: str
    group: str
    member: str


def canonical(name: str) -> str:
    """The name that a parameter has in the plain model: wrappers left out; an adapter's gets that of the weight."""
    words = name.removeprefix("base_model.model.").split(".")
    kept: list[str] = []
    for i, word in enumerate(words):
        if word.startswith(_ADAPTERS):
            return ".".join([*kept, "weight"])
        # PEFT keeps copies of whole modules by adapter name: `score.modules_to_save.default.weight`.
        if word not in _WRAPPERS and not (i and words[i - 1] == "modules_to_save"):
            kept.append(word)
    return ".".join(kept)


def places(names: Iterable[str]) -> dict[str, Place | None]:
    """The place of each parameter; None outside of the blocks.

    Raises:
        ModelError: no name is inside of a numbered block.
    """
    plain = {name: canonical(name) for name in names}
    roles = roles_from_names(dict.fromkeys(plain.values()))
    stacks = sorted({role.depth.stack for role in roles.values() if role.depth})
    if not stacks:
        raise ModelError(
            "half of the parameters are chosen block by block, but no name has a numbered block (such as "
            f"`model.layers.0`); found {sorted(plain)[:3]}"
        )
    found: dict[str, Place | None] = {}
    for name, called in plain.items():
        role = roles[called]
        if role.depth is None:
            found[name] = None
            continue
        words = called.removeprefix(f"{role.depth.stack}.{role.depth.index}.").split(".")
        kind = "gate_up" if "gate_up_proj" in words else role.kind
        category = _CATEGORIES.get(kind, REST)
        named = category in (ATTENTION, FFN)
        path = ".".join(words[:-1] if words[-1] in ("weight", "bias") else words)
        member = kind if named else path
        group = _group(words, category) if named else ""
        found[name] = Place(stacks.index(role.depth.stack), role.depth.index, category, group, member)
    return found


def _group(words: list[str], category: str) -> str:
    """BERT spreads attention over `attention.self` and `attention.output`, and the FFN over two modules."""
    if category == ATTENTION:
        ends = [i for i, word in enumerate(words) if "attn" in word.lower() or "attention" in word.lower()]
        # GPT-2's `c_attn` is a matrix.
        return ".".join(words[: ends[0] + 1]) if ends and ends[0] < len(words) - 2 else ""
    for i, word in enumerate(words):
        if word == "experts":
            return ".".join(words[: i + 1 + words[i + 1].isdigit()])
        if word.startswith("shared_expert"):
            return word
    return ""


def chosen(
    names: Iterable[str],
    *,
    level: Level = "category",
    outside: Outside = "train",
    seed: int = 0,
    stage: int = 0,
    draw: int = 0,
) -> frozenset[str]:
    """The names of the half that trains.

    Args:
        names: Of all parameters of the model, or of the tensors of a checkpoint; wrapped or plain.
        level: As above.
        outside: Whether what stands outside of the blocks (embedding, final norm, head) belongs to the half.
        seed: Of the draws.
        stage: Number of the training stage; each has a half of its own.
        draw: Number of the draw within the stage.

    Raises:
        ModelError: the names have no blocks.
    """
    found = places(names)
    inside = {name: place for name, place in found.items() if place is not None}
    key = (seed, "half", stage, draw)
    if level == "layer":
        kept = _layers(set(inside.values()), *key)
    elif level == "model":
        kept = _urns(set(inside.values()), *key)
    else:
        kept = _categories(set(inside.values()), *key)
    held = {name for name, place in inside.items() if place in kept}
    return frozenset(held | ({name for name in found if name not in inside} if outside == "train" else set()))


def _layers(given: set[Place], *key: int | str) -> set[Place]:
    kept = set()
    for stack in {place.stack for place in given}:
        blocks = sorted({place.block for place in given if place.stack == stack})
        drawn = {blocks[i] for i in subset(len(blocks), max(1, len(blocks) // 2), *key, "layer", stack)}
        kept |= {place for place in given if place.stack == stack and place.block in drawn}
    return kept


def _urns(given: set[Place], *key: int | str) -> set[Place]:
    kept: set[Place] = set()
    for matrices in (True, False):
        urn = sorted((p for p in given if (p.category in (ATTENTION, FFN)) == matrices), key=_order)
        kept |= {urn[i] for i in subset(len(urn), len(urn) // 2, *key, "model", str(matrices))}
    return kept


def _order(place: Place) -> tuple[int, int, str, str, str]:
    return place.stack, place.block, place.category, place.group, place.member


def _categories(given: set[Place], *key: int | str) -> set[Place]:
    groups: dict[tuple[int, str, str], dict[int, list[Place]]] = {}
    for place in sorted(given, key=_order):
        row = groups.setdefault((place.stack, place.category, place.group), {})
        row.setdefault(place.block, []).append(place)
    kept: set[Place] = set()
    for (stack, category, group), rows in groups.items():
        where = (*key, category, stack, group)
        kept |= _drawn(rows, *where)
    return kept


def _drawn(rows: Mapping[int, list[Place]], *where: int | str) -> set[Place]:
    """Half of the members in each block; `more` are the blocks that round up, or train the fused matrix."""
    blocks = sorted(rows)
    more = {blocks[i] for i in subset(len(blocks), len(blocks) // 2, *where, "more")}
    kept: set[Place] = set()
    for block, members in rows.items():
        fused = [place for place in members if place.member in _FUSED]
        if fused:
            kept |= set(fused) if block in more else set(members) - set(fused)
            continue
        count = (len(members) + (block in more)) // 2
        kept |= {members[i] for i in subset(len(members), count, *where, block)}
    return kept
