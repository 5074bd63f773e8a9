"""Tiny random models of every family, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T
from torch import Tensor, nn

VOCABULARY = 64
_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODERS = ("llama", "gpt2", "opt", "qwen2")
FAMILIES = (*DECODERS, "bert", "t5", "vit")


def tiny(family: str, seed: int = 0, **changes: Any) -> T.PreTrainedModel:
    """A random model in evaluation mode; about 20,000 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _MAKE[family](**changes).eval()


def _llama(**changes: Any) -> T.PreTrainedModel:
    return T.LlamaForCausalLM(T.LlamaConfig(**{**_LLAMA_LIKE, "num_key_value_heads": 2, **changes}))


def _qwen2(**changes: Any) -> T.PreTrainedModel:
    return T.Qwen2ForCausalLM(T.Qwen2Config(**{**_LLAMA_LIKE, "num_key_value_heads": 2, **changes}))


def _gpt2(**changes: Any) -> T.PreTrainedModel:
    config = {"vocab_size": VOCABULARY, "n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return T.GPT2LMHeadModel(T.GPT2Config(**{**config, **ids, **dropout, **changes}))


def _opt(**changes: Any) -> T.PreTrainedModel:
    config = {**_LLAMA_LIKE, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
    del config["intermediate_size"]
    return T.OPTForCausalLM(T.OPTConfig(**{**config, **changes}))


def _bert(**changes: Any) -> T.PreTrainedModel:
    config = {**_LLAMA_LIKE, "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return T.BertForSequenceClassification(T.BertConfig(**{**config, **changes}))


def _t5(**changes: Any) -> T.PreTrainedModel:
    size = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "dropout_rate": 0.0}
    return T.T5ForConditionalGeneration(T.T5Config(**{**size, **ids, **changes}))


def _vit(**changes: Any) -> T.PreTrainedModel:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return T.ViTForImageClassification(
        T.ViTConfig(**{**size, "image_size": 8, "patch_size": 2, "num_labels": 3, **changes})
    )


_MAKE = {"llama": _llama, "qwen2": _qwen2, "gpt2": _gpt2, "opt": _opt, "bert": _bert, "t5": _t5, "vit": _vit}


def batch(family: str, rows: int = 2, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Inputs with labels: token ids of 3 and more, or pictures."""
    g = torch.Generator().manual_seed(seed)
    if family == "vit":
        labels = torch.randint(3, (rows,), generator=g)
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=g), "labels": labels}
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=g)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "bert":
        return {**given, "labels": torch.randint(3, (rows,), generator=g)}
    if family == "t5":
        return {**given, "labels": torch.randint(3, VOCABULARY, (rows, 5), generator=g)}
    return {**given, "labels": ids.clone()}


@torch.no_grad()
def logits(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """Logits in evaluation mode; gradients off, so that frozen and trainable models take the same kernels."""
    was = model.training
    out = model.eval()(**given).logits
    model.train(was)
    return out


def checkpoint(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same names and bit-equal tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
