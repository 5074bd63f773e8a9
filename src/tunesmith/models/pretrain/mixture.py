"""What the embedded language models are trained on: the pretraining families and standard-library text.

The batch of a step is a function of the seed and the step alone, so a resumed run sees what it would have seen.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedTokenizerBase

from tunesmith import world
from tunesmith.models.pretrain.tokenizer import ROLES
from tunesmith.world import realtext
from tunesmith.world.base import Family, Item
from tunesmith.world.facts import Facts

# How often a family is drawn, relative to the others: more for what takes longer to learn.
WEIGHTS = {
    "copy": 1.0,
    "reverse": 1.5,
    "sort": 2.0,
    "addition": 3.0,
    "facts": 3.0,
    "sentiment": 1.0,
    "translation": 3.0,
}
SYSTEM = ("You are a helpful assistant.", "Answer briefly.", "Answer the question.")
PROMPT_WEIGHT = 0.1  # of the loss on a prompt's token; an answer's token has 1
IGNORED = -100


@dataclass(frozen=True)
class Packed:
    """Documents side by side in rows; (rows, length) each.

    `segment` numbers the documents of a row from 1 (0 is padding), `position` restarts in each, `weight` is that of
    the loss on the token itself (float32).
    """

    ids: torch.Tensor
    segment: torch.Tensor
    position: torch.Tensor
    weight: torch.Tensor

    def mask(self) -> torch.Tensor:
        """(rows, 1, length, length) bool: which earlier tokens of its own document a token sees."""
        same = self.segment[:, :, None] == self.segment[:, None, :]
        return (same & torch.ones_like(same[0]).tril())[:, None]


class Mixture:
    """Documents and text for language-model pretraining; never an item of a family kept for fine-tuning."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.families: dict[str, Family] = {name: f() for name, f in world.families(pretraining=True).items()}
        kept = [name for name, family in self.families.items() if not family.pretraining]
        if kept or set(self.families) != set(WEIGHTS):
            raise AssertionError(f"the mixture must be the pretraining families exactly, found {list(self.families)}")

    def packed(self, step: int, rows: int, length: int) -> Packed:
        """The documents of a step, packed into `rows` of `length` tokens."""
        rng = random.Random(f"{self.seed}/items/{step}")
        bins: list[list[list[tuple[list[int], float]]]] = [[] for _ in range(rows)]
        used = [0] * rows
        while True:
            for document in self._documents(rng, 16):
                size = sum(len(ids) for ids, _ in document)
                if size > length:
                    continue
                place = next((i for i in range(rows) if used[i] + size <= length), None)
                if place is None:
                    return self._lay(bins, length)
                bins[place].append(document)
                used[place] += size

    def text(self, step: int, rows: int, length: int) -> torch.Tensor:
        """(rows, length) token ids: windows at random places of the pretraining modules."""
        rng = random.Random(f"{self.seed}/text/{step}")
        starts = [rng.randrange(len(self._library) - length) for _ in range(rows)]
        return torch.stack([self._library[start : start + length] for start in starts])

    @cached_property
    def _library(self) -> torch.Tensor:
        return library(self.tokenizer, "pretrain")

    def _documents(self, rng: random.Random, count: int) -> list[list[tuple[list[int], float]]]:
        written = [self._write(rng) for _ in range(count)]
        texts = [text for document in written for text, _ in document]
        encoded = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        return [[(next(encoded), weight) for _, weight in document] for document in written]

    def _write(self, rng: random.Random) -> list[tuple[str, float]]:
        """One document as pieces of text with their loss weights."""
        eos, bos = self.tokenizer.eos_token, self.tokenizer.bos_token
        start = bos if rng.random() < 0.5 else ""
        kind = rng.random()
        if kind < 0.05:
            facts = self.families["facts"]
            assert isinstance(facts, Facts)
            return [(f"{start}{facts.biography(rng)}{eos}", 1.0)]
        if kind < 0.5:
            item = self._item(rng)
            return [(start + item.prompt, PROMPT_WEIGHT), (item.answer + eos, 1.0)]
        pieces = []
        if rng.random() < 0.1:
            pieces.append((ROLES["system"] + rng.choice(SYSTEM), PROMPT_WEIGHT))
        for _ in range(1 if rng.random() < 0.85 else rng.randint(2, 4)):
            user, assistant = self._item(rng).messages()
            pieces.append((ROLES["user"] + user["content"] + ROLES["assistant"], PROMPT_WEIGHT))
            pieces.append((assistant["content"] + eos, 1.0))
        return pieces

    def _item(self, rng: random.Random) -> Item:
        family = self.families[rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]]
        while True:
            item = family.generate(rng)
            if family.split_of(item) == "train":
                return item

    def _lay(self, bins: list[list[list[tuple[list[int], float]]]], length: int) -> Packed:
        shape = (len(bins), length)
        ids = torch.full(shape, self.tokenizer.pad_token_id)
        segment, position = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        weight = torch.zeros(shape)
        for row, documents in enumerate(bins):
            at = 0
            for number, document in enumerate(documents, 1):
                flat = [token for piece, _ in document for token in piece]
                end = at + len(flat)
                ids[row, at:end] = torch.tensor(flat)
                segment[row, at:end] = number
                position[row, at:end] = torch.arange(len(flat))
                weight[row, at:end] = torch.tensor([w for piece, w in document for _ in piece])
                weight[row, at] = 0.0  # nothing comes before a document's first token to predict it from
                at = end
        return Packed(ids, segment, position, weight)


def library(tokenizer: PreTrainedTokenizerBase, split: realtext.TextSplit) -> torch.Tensor:
    """(tokens,) ids of all standard-library text of a split, each piece followed by the end token."""
    pieces = list(realtext.text_stream(split))
    encoded = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in [*ids, tokenizer.eos_token_id]])
