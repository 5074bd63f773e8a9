"""Conversations as tokens: through the tokenizer's chat template, with loss on what the assistant says.

Which tokens those are is told, in this order, by the template's own generation markers; by TRL's training version of
the template, where TRL has one; or by the differences between the conversation up to a turn and with it, each checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jinja2.exceptions import TemplateError
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)
from trl.data_utils import common_prefix_length

from tunesmith.core.loss import IGNORED
from tunesmith.errors import DataError
from tunesmith.inputs.example import Example
from tunesmith.inputs.rows import RowError, first_line

Messages = Sequence[Mapping[str, Any]]
Method = Literal["the template's generation markers", "TRL's training template", "differences between turns"]
_ADVICE = (
    "Put {% generation %} and {% endgeneration %} around the assistant's part of the chat template, or set "
    "`data.loss_on: all`."
)


class ChatTemplate:
    """Conversations through a tokenizer's template.

    Raises:
        DataError: the tokenizer has no template, or is one of the slow ones, which cannot say where a token stands.
    """

    def __init__(self, tokenizer: Any, who: str) -> None:
        """`who` asks for the template, in words for the message."""
        if not tokenizer.chat_template:
            raise DataError(
                f"{who} need a chat template, and the tokenizer has none. Use a model tuned for chat, put a "
                "`chat_template.jinja` into the model's folder, or give rows with prompt and completion as text."
            )
        if not tokenizer.is_fast:
            raise DataError(f"{who} need a fast tokenizer (a tokenizer.json); {type(tokenizer).__name__} is none.")
        self.tokenizer = tokenizer
        self.template: str | None = None
        self.method: Method = "the template's generation markers"
        if not has_generation_markers(tokenizer.chat_template):
            self.template = _training_template(tokenizer)
            self.method = "TRL's training template" if self.template else "differences between turns"

    @property
    def stops(self) -> bool:
        """Whether the token that ends a turn carries loss; a model tuned without it does not learn to stop."""
        if self.method == "differences between turns":
            return True
        return is_chat_template_stop_token_trained(self.tokenizer, chat_template=self.template)

    def encode(
        self, messages: Messages, tools: Sequence[Any] | None, context: int, everything: bool = False
    ) -> Example:
        """A conversation as tokens.

        Args:
            messages: Roles and contents; the last is the assistant's.
            tools: Descriptions of functions, for the template.
            context: The number of leading messages without loss.
            everything: Every token will carry loss, so that the assistant's need not be told from the others.

        Raises:
            RowError: the template refuses the conversation.
            DataError: the assistant's tokens cannot be told from the others.
        """
        try:
            if self.method == "differences between turns":
                ids, learned, starts = self._by_difference(messages, tools, context, everything)
            else:
                ids, learned, starts = self._by_markers(messages, tools, context)
        except (TemplateError, TypeError, KeyError) as error:
            raise RowError("template", f"the chat template refuses it: {first_line(error)}") from None
        labels = [token if mark else IGNORED for token, mark in zip(ids, learned, strict=True)]
        return Example(ids, labels, starts[-1] if starts else 0)

    def _by_markers(self, messages: Messages, tools: Any, context: int) -> tuple[list[int], list[bool], list[int]]:
        found = self.tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            chat_template=self.template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        ids, learned = list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]
        if any(message["role"] == "assistant" for message in messages[:context]):
            asked = self._tokens(self._render(messages[:context], tools, ask=True))[0]
            known = common_prefix_length(asked, ids)
            learned = [mark and at >= known for at, mark in enumerate(learned)]
        starts = [at for at, mark in enumerate(learned) if mark and not (at and learned[at - 1])]
        return ids, learned, starts

    def _by_difference(
        self, messages: Messages, tools: Any, context: int, everything: bool
    ) -> tuple[list[int], list[bool], list[int]]:
        whole = self._render(messages, tools)
        ids, offsets = self._tokens(whole)
        turns = [at for at in range(context, len(messages)) if messages[at]["role"] == "assistant"]
        spans = [self._span(messages, tools, at, whole, everything) for at in turns]
        learned = [any(start < b and a < stop for start, stop in spans) and a < b for a, b in offsets]
        starts = [next((i for i, (a, b) in enumerate(offsets) if a < b and start < b), 0) for start, _ in spans]
        return ids, learned, starts

    def _span(self, messages: Messages, tools: Any, at: int, whole: str, everything: bool) -> tuple[int, int]:
        """Where turn `at` stands in the whole conversation, in characters."""
        asked = self._render(messages[:at], tools, ask=True) if at else ""
        said = self._render(messages[: at + 1], tools)
        start = common_prefix_length(asked, said)
        before = len(self._render(messages[:at], tools)) if at and start < len(asked) else 0
        content = messages[at]["content"].strip()
        if not everything and (start < before or not whole.startswith(said) or content not in said[start:]):
            raise DataError(
                "The chat template shows an earlier turn differently once others follow it, or leaves parts of it out, "
                f"so that the assistant's tokens cannot be told from the others. {_ADVICE}"
            )
        return start, len(said)

    def _render(self, messages: Messages, tools: Any, ask: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages), tools=tools, chat_template=self.template, tokenize=False, add_generation_prompt=ask
        )

    def _tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return found["input_ids"], found["offset_mapping"]


def _training_template(tokenizer: Any) -> str | None:
    try:
        return get_training_chat_template(tokenizer)
    except (ValueError, TemplateError, TypeError, KeyError):
        return None  # TRL has none for this template


def with_system(messages: Messages, system: str | None) -> list[Mapping[str, Any]]:
    """The conversation, begun by `system` if it has no system message."""
    if system is None or messages[0]["role"] in ("system", "developer"):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]
