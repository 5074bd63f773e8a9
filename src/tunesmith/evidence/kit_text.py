"""Byte-level language models of any depth on the text of the Python standard library."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tunesmith.evidence.kit_tune import Batch
from tunesmith.world.realtext import TextSplit, text_stream

BYTES = 256


@lru_cache
def _text(split: TextSplit) -> Tensor:
    return torch.frombuffer(bytearray("".join(text_stream(split)).encode()), dtype=torch.uint8)


def windows(split: TextSplit, rows: int, length: int, seed: int) -> Tensor:
    """Pieces of the text at random places, (rows, length) int64 bytes; the splits share no module."""
    text = _text(split)
    starts = torch.randint(len(text) - length, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(length)].long()


def batches(split: TextSplit, steps: int, rows: int, length: int, seed: int) -> list[Batch]:
    """One batch per step, every token a label."""
    return [{"input_ids": ids, "labels": ids} for ids in windows(split, steps * rows, length, seed).split(rows)]


def model(blocks: int, seed: int, width: int = 64) -> LlamaForCausalLM:
    """An untrained Llama over bytes; `width` must be a multiple of 16, the size of a head."""
    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@torch.no_grad()
def loss(model: PreTrainedModel, ids: Tensor) -> float:
    """Mean cross-entropy of each byte after the first of its window, nats."""
    model.eval()
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
