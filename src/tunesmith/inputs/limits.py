"""How many tokens a row may have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.errors import DataError

# Their positions begin after the padding token's number, so that many fewer can be used.
_OFFSET = {
    "camembert", "data2vec-text", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


@dataclass(frozen=True)
class Limit:
    """At most `tokens` per row; `origin` says in words where the number comes from."""

    tokens: int
    origin: str


def positions(config: Any) -> int | None:
    """The tokens that a model can tell the places of; None where it has no such limit."""
    config = getattr(config, "get_text_config", lambda: config)()
    found = getattr(config, "max_position_embeddings", None)
    if found is None and getattr(config, "relative_attention_num_buckets", None) is None:
        found = getattr(config, "n_positions", None)
    if not isinstance(found, int) or found <= 0:
        return None
    return found - (config.pad_token_id or 0) - 1 if config.model_type in _OFFSET else found


def token_limit(config: Any, max_length: int, reserved: int = 0, longest: int | None = None) -> Limit:
    """The smallest of `data.max_length`, what the model leaves after `reserved` virtual tokens, and `longest`.

    Args:
        config: Of the model.
        max_length: The user's limit.
        reserved: Virtual tokens that prompts put before a row.
        longest: The longest row that a prompt was made for, virtual tokens left out; None where it takes any.

    Raises:
        DataError: nothing is left.
    """
    limits = [Limit(max_length, "data.max_length")]
    if (own := positions(config)) is not None:
        less = f", less {reserved} virtual tokens of prompts" if reserved else ""
        if own - reserved < 2:
            raise DataError(f"The model takes {own} tokens{less}: that leaves no room for rows.")
        limits.append(Limit(own - reserved, f"the model's own limit of {own}{less}"))
    if longest is not None:
        limits.append(Limit(longest, "the longest row that the prompt is made for"))
    return min(limits, key=lambda limit: limit.tokens)
