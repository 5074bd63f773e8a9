"""The tokenizer of the embedded language models: byte-level BPE, every digit its own token, no unknown token."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tunesmith import world
from tunesmith.core.files import staged_folder
from tunesmith.models.embedded import path
from tunesmith.world import realtext
from tunesmith.world.facts import Facts

VOCABULARY = 2048
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>", "mask_token": "<|mask|>"}
LONGEST = 1024
ITEMS_EACH = 5000
TEXT_CHARS = 3_000_000

# A turn is its role token and its content; only what the assistant says ends with the end token.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{ raise_exception('The role must be system, user or assistant, found ' + message['role'] + '.') }}"
    "{%- endif -%}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{%- else -%}{{ message['content'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def corpus() -> Iterator[str]:
    """Items of the pretraining families, biographies, and standard-library text."""
    for family in world.families(pretraining=True).values():
        for item in islice(family().stream(split="train", seed=1), ITEMS_EACH):
            yield item.prompt + item.answer
    rng = random.Random("tokenizer")
    for _ in range(ITEMS_EACH // 5):
        yield Facts().biography(rng)
    given = 0
    for piece in realtext.text_stream("pretrain"):
        yield piece
        given += len(piece)
        if given > TEXT_CHARS:
            return


def build() -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same on every machine with the same standard library."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL.values(), *ROLES.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **SPECIAL,
        additional_special_tokens=list(ROLES.values()),
        padding_side="left",
        model_max_length=LONGEST,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make(output: Path) -> Path:
    """Train the tokenizer and write its folder."""
    tokenizer = build()
    with staged_folder(output) as staging:
        tokenizer.save_pretrained(staging)
    return output


def load() -> PreTrainedTokenizerFast:
    """The embedded tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path("tokenizer"))
    for key in ("is_local", "local_files_only"):  # how it was loaded here, which a saved copy need not say
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer
