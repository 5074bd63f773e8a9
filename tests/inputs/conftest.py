"""Files to read, tokenizers of three kinds, and configurations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import transformers as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.zoo import tiny
from tunesmith import inputs
from tunesmith.models.embedded import WEIGHTS
from tunesmith.recipe_fields import DataSpec

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ["the cat sat on the mat", "a dog ran to the house", "yes no maybe 0123456789", "Question: what? Answer: that"]


@pytest.fixture(scope="session")
def embedded() -> Any:
    """The embedded byte-level tokenizer, with generation markers in its template; left padding."""
    return T.AutoTokenizer.from_pretrained(WEIGHTS / "tokenizer")


def byte_level(**special: str) -> Any:
    """Byte-level BPE that merges across spaces; no padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    extra = ["<|end|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(vocab_size=340, special_tokens=extra, initial_alphabet=alphabet, show_progress=False),
    )
    special = {"eos_token": "<|end|>", **special}
    return T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=extra[1:], **special)


def sentencepiece_like() -> Any:
    """Llama's manner: a space before any text, byte fallback, BOS put in front, EOS behind."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return T.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


@pytest.fixture(scope="session")
def merging() -> Any:
    return byte_level()


@pytest.fixture(scope="session")
def llama_like() -> Any:
    return sentencepiece_like()


@pytest.fixture
def chatml() -> Any:
    """A template without generation markers."""
    tokenizer = byte_level(pad_token="<|end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def lm() -> Any:
    """A causal model's configuration: 64 positions, the embedded vocabulary."""
    return _declared("llama", "LlamaForCausalLM")


@pytest.fixture(scope="session")
def roomy() -> Any:
    """A causal model's configuration with 4,096 positions."""
    return _declared("llama", "LlamaForCausalLM", max_position_embeddings=4096)


@pytest.fixture(scope="session")
def t5() -> Any:
    return _declared("t5", "T5ForConditionalGeneration")


@pytest.fixture(scope="session")
def bert() -> Any:
    return _declared("bert", "BertForMaskedLM", num_labels=2)


@pytest.fixture(scope="session")
def vit() -> Any:
    return _declared("vit", "ViTForImageClassification")


def _declared(family: str, architecture: str, **changes: Any) -> Any:
    config = tiny(family, **changes).config
    config.architectures = [architecture]
    return config


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`write("rows.jsonl", rows)` in an empty working folder; rows are objects or finished lines, or a whole text."""
    monkeypatch.chdir(tmp_path)

    def to(name: str, content: Iterable[Any] | str | bytes) -> str:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            Path(name).write_bytes(content)
            return name
        if not isinstance(content, str):
            lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in content]
            content = "".join(f"{line}\n" for line in lines)
        Path(name).write_text(content, encoding="utf-8", newline="")
        return name

    return to


def pairs(n: int, start: int = 0) -> list[dict[str, str]]:
    """Rows with prompt and completion, all different."""
    return [{"prompt": f"Question {i}:", "completion": f" answer {i}"} for i in range(start, start + n)]


def prepare(config: Any, processor: Any, **fields: Any) -> inputs.Encoded:
    """`inputs.prepare` with the fields of `DataSpec`; `task`, `reserved`, `padding_free`, `select` apart."""
    apart = {name: fields.pop(name) for name in ("task", "reserved", "padding_free", "select") if name in fields}
    return inputs.prepare(DataSpec(**fields), config=config, processor=processor, **apart)


def learned(row: dict[str, Any]) -> list[int]:
    """The labels that carry loss."""
    return [label for label in row["labels"] if label != -100]
