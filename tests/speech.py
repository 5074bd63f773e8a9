"""Tiny random models that do not repeat one token for ever, a tokenizer for them, and prompts of unequal lengths."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from tests.zoo import VOCABULARY, tiny

PAD, BOS, EOS = 0, 1, 2


def lively(family: str, seed: int = 0, blocks: int = 2, **changes: Any) -> T.PreTrainedModel:
    """A tiny model whose weights are large enough that every token changes the next one."""
    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    model = tiny(family, seed, **{depth: blocks, **changes})
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(6)
    return model


def tokenizer(size: int = VOCABULARY, first: str = "w") -> T.PreTrainedTokenizerFast:
    """Words `w3`, `w4`, ... with their own numbers as ids, split at white space."""
    words = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS} | {f"{first}{i}": i for i in range(3, size)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return T.PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="left", **special)


def prompts(lengths: tuple[int, ...] = (7, 3, 5), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids padded on the left and their mask, (rows, longest)."""
    g = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(3, VOCABULARY, (len(lengths), longest), generator=g)
    mask = torch.arange(longest) >= (longest - torch.tensor(lengths))[:, None]
    return ids.masked_fill(~mask, PAD), mask.long()
