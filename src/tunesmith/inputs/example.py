"""A row as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.core.loss import IGNORED


@dataclass(frozen=True)
class Example:
    """A row as tokens.

    Attributes:
        ids: What goes into the model.
        labels: Of a causal model: as many as `ids`, `IGNORED` where there is no loss; of a seq2seq model: the target;
            of a classifier: the class.
        prompt_length: Of a causal model, the tokens before the last answer.
        parted: Whether prompt and completion were tokenised apart, because together a token crosses the boundary.
    """

    ids: list[int]
    labels: list[int] | int
    prompt_length: int | None = None
    parted: bool = False

    @property
    def length(self) -> int:
        """Tokens that a limit applies to."""
        return max(len(self.ids), len(self.labels)) if isinstance(self.labels, list) else len(self.ids)

    @property
    def labelled(self) -> int:
        """Labels that a loss is taken of; a causal model predicts none for the first token."""
        if isinstance(self.labels, int):
            return 1
        first = self.prompt_length is not None and self.labels[:1] not in ([IGNORED], [])
        return len(self.labels) - self.labels.count(IGNORED) - first

    def columns(self) -> dict[str, Any]:
        own = {} if self.prompt_length is None else {"prompt_length": self.prompt_length}
        return {"input_ids": self.ids, "labels": self.labels, **own}
