"""Prompts and completions as tokens: concatenated as they are, the end marked, the boundary kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl.data_utils import common_prefix_length

from tunesmith.core.loss import IGNORED
from tunesmith.errors import DataError
from tunesmith.inputs.example import Example


class PlainText:
    """Text, or prompt and completion, through a tokenizer.

    What the tokenizer puts before a text (BOS) is put before a row; what it puts after one is not: a row ends with the
    end-of-sequence token, once.

    Raises:
        DataError: neither tokenizer nor model has an end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, config: Any) -> None:
        self.tokenizer = tokenizer
        self.eos = end_token(tokenizer, config)
        self.before, _ = surroundings(tokenizer)

    def texts(self, texts: Sequence[str]) -> list[Example]:
        """Rows of plain text; every token carries loss."""
        whole = [[*self._lead(ids), *ids, *self._end(ids)] for ids in self._bare(texts)]
        return [Example(ids, ids, 0) for ids in whole]

    def pairs(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Example]:
        """Rows of prompt and completion; loss on the completion and its end."""
        alone = self._bare(prompts)
        together = self._bare([p + c for p, c in zip(prompts, completions, strict=True)])
        return [self._pair(a, t, c) for a, t, c in zip(alone, together, completions, strict=True)]

    def _pair(self, prompt: list[int], together: list[int], completion: str) -> Example:
        start = len(prompt)
        parted = together[:start] != prompt
        if parted:
            together = self._apart(prompt, together, completion)
            start = common_prefix_length(prompt, together)
        lead = self._lead(together)
        ids = [*lead, *together, *self._end(together)]
        start += len(lead)
        return Example(ids, [IGNORED] * start + ids[start:], start, parted)

    def _apart(self, prompt: list[int], together: list[int], completion: str) -> list[int]:
        # Some tokenizers put a space before any text; a line break in front, taken away again, keeps it from them.
        plain, led, mark = self._bare([completion, f"\n{completion}", "\n"])
        ways = [plain, *([led[len(mark) :]] if led[: len(mark)] == mark else [])]
        text = self._decode(together)
        return next((prompt + way for way in ways if self._decode(prompt + way) == text), together)

    def _lead(self, ids: list[int]) -> list[int]:
        return [] if ids[: len(self.before)] == self.before else self.before

    def _end(self, ids: list[int]) -> list[int]:
        return [] if ids[-1:] == [self.eos] else [self.eos]

    def _bare(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def surroundings(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before a text, and those that it puts after it."""
    bare, full = (tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"] for special in (False, True))
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return list(full[:at]), list(full[at + len(bare) :])


def end_token(tokenizer: Any, config: Any) -> int:
    """The end-of-sequence token of the tokenizer, or else of the model.

    Raises:
        DataError: neither has one.
    """
    found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else getattr(config, "eos_token_id", None)
    found = found[0] if isinstance(found, list) and found else found
    if not isinstance(found, int):
        raise DataError(
            "Neither the tokenizer nor the model names an end-of-sequence token, without which a model never learns to "
            "stop. Set `eos_token` in tokenizer_config.json."
        )
    return found
