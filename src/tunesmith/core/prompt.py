"""The prompt contract: learned context beside a frozen model's inputs.

A prompt is a module that, given the embedded inputs, says which vectors to put before them and what to add to them. It
never touches masks, labels or positions: the driver here does that, once, for every model and for cached generation.
Prompts live on the model's input embedding (`core.bridge` puts them there, so they are saved, switched and disabled
like any PEFT adapter), and act through a hook on the model's forward.

Given inputs of n tokens and a prompt of l, the model runs on l + n positions and returns logits for the n tokens: a
caller sees the shapes that it would see without the prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError

IGNORED = -100


@dataclass(frozen=True)
class PromptSpace:
    """Where a prompt lives.

    Attributes:
        table: The frozen input embedding, (vocabulary, dim), to start a prompt from words.
        max_positions: Of the model; None if it has no limit.
    """

    table: Tensor
    max_positions: int | None = None

    @property
    def dim(self) -> int:
        return self.table.shape[1]


@dataclass(frozen=True)
class PromptContext:
    """One batch at the moment its inputs are embedded.

    Attributes:
        embeds: (batch, n, dim).
        mask: (batch, n), True for real tokens.
        positions: (batch, n), the index of each token among the row's real tokens, whichever side is padded.
        input_ids: (batch, n), or None when the caller gave embeddings.
    """

    embeds: Tensor
    mask: Tensor
    positions: Tensor
    input_ids: Tensor | None


@dataclass(frozen=True)
class PromptOut:
    """What a prompt contributes.

    Attributes:
        prefix: Vectors before the inputs, (l, dim) or (batch, l, dim); None for none.
        add: What is added to the embedded inputs, (batch, n, dim); None for nothing.
    """

    prefix: Tensor | None = None
    add: Tensor | None = None


class Prompt(nn.Module):
    """A learned context. Trainable tensors are parameters; other tensors to save are persistent buffers."""

    def __init__(self, space: PromptSpace) -> None:
        super().__init__()
        self.dim = space.dim

    @classmethod
    def targets(cls, model: nn.Module) -> list[str]:
        """Always the input embedding."""
        if not hasattr(model, "get_input_embeddings"):
            raise ModelError(f"{type(model).__name__} has no input embedding, which a prompt needs")
        embedding = model.get_input_embeddings()
        names = [name for name, module in model.named_modules() if module is embedding]
        return [name.removesuffix(".base_layer") for name in names]

    @property
    def length(self) -> int:
        """Number of positions that the prompt takes."""
        return 0

    def forward(self, context: PromptContext) -> PromptOut:
        raise TypeError(f"{type(self).__name__} does not define forward")

    def trainable_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def space_of(model: nn.Module, embedding: nn.Module) -> PromptSpace:
    """The space of a model with this input embedding."""
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return PromptSpace(embedding.weight.detach(), limit)


# The driver -----------------------------------------------------------------------------------------------------


def hook(model: nn.Module) -> None:
    """Let the prompts on the model's input embedding act. Hooking a model twice does nothing."""
    if hasattr(model, "_tunesmith_prompt_hooks"):
        return
    entry = _entry(model)
    handles = [
        entry.register_forward_pre_hook(_before, with_kwargs=True),
        entry.register_forward_hook(_after),
    ]
    if entry is not model:
        handles.append(model.register_forward_pre_hook(_widen_encoder_mask, with_kwargs=True))
    model._tunesmith_prompt_hooks = handles  # type: ignore[assignment]


def unhook(model: nn.Module) -> None:
    """Take the hooks away again."""
    for handle in getattr(model, "_tunesmith_prompt_hooks", ()):
        handle.remove()
    if hasattr(model, "_tunesmith_prompt_hooks"):
        del model._tunesmith_prompt_hooks


def _entry(model: nn.Module) -> nn.Module:
    """The module whose inputs get the prompt: the encoder of an encoder-decoder, else the model itself."""
    config = getattr(model, "config", None)
    return model.get_encoder() if getattr(config, "is_encoder_decoder", False) else model


def _prompts(module: nn.Module) -> list[Prompt]:
    embedding = module.get_input_embeddings()
    return embedding.active_prompts() if hasattr(embedding, "active_prompts") else []


def _before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    prompts = _prompts(module)
    if not prompts:
        return None
    given = dict(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments)
    given.update(given.pop("kwargs", {}))
    length = sum(p.length for p in prompts)
    cache = given.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        module.get_input_embeddings().prompted_length = None
        return (), _continue(given, length)
    return (), _prefill(module, given, prompts, length)


def _prefill(module: nn.Module, given: dict[str, Any], prompts: Iterable[Prompt], length: int) -> dict[str, Any]:
    ids, embeds = given.pop("input_ids", None), given.pop("inputs_embeds", None)
    if embeds is None:
        embeds = module.get_input_embeddings()(ids)
    batch, n, dim = embeds.shape
    # An encoder's mask was widened already when its encoder-decoder was called as a whole.
    mask = _token_mask(given.get("attention_mask"), batch, n, embeds.device)
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    context = PromptContext(embeds, mask, positions, ids)
    prefixes = []
    for prompt in prompts:
        out = prompt(context)
        if out.add is not None:
            embeds = embeds + out.add.to(embeds.dtype)
        if out.prefix is not None:
            prefixes.append(out.prefix.to(embeds.dtype).expand(batch, -1, dim))
    _check_room(module, length + n, length)
    module.get_input_embeddings().prompted_length = length + n
    given["inputs_embeds"] = torch.cat([*prefixes, embeds], dim=1)
    given["attention_mask"] = _prepend(mask.long(), length, 1)
    if "position_ids" in inspect.signature(module.forward).parameters:
        given["position_ids"] = torch.cat(
            [torch.arange(length, device=mask.device).expand(batch, -1), positions + length], dim=1
        )
    labels = given.get("labels")
    if labels is not None and labels.shape == (batch, n):
        given["labels"] = _prepend(labels, length, IGNORED)
    if given.get("token_type_ids") is not None:
        given["token_type_ids"] = _prepend(given["token_type_ids"], length, 0)
    keep = given.get("logits_to_keep")
    if isinstance(keep, Tensor):
        given["logits_to_keep"] = keep + length
    # Without token ids a decoder's classifier reads the last position, so that must be a real token.
    decoder_classifier = type(module).__name__.endswith("ForSequenceClassification") and hasattr(module, "score")
    if decoder_classifier and not bool(mask[:, -1].all()):
        raise ModelError(
            f"{type(module).__name__} reads the last position, which is padding in this batch; with a prompt, pad "
            "on the left (tokenizer.padding_side = 'left')"
        )
    return given


def _continue(given: dict[str, Any], length: int) -> dict[str, Any]:
    """A later step of cached generation: the prompt is in the cache already, only mask and positions must know it."""
    mask = given.get("attention_mask")
    if mask is not None:
        if mask.dim() != 2:
            raise ModelError("a prompt needs the two-dimensional attention mask; this model was given a prepared one")
        given["attention_mask"] = _prepend(mask, length, 1)
    if given.get("position_ids") is not None:
        given["position_ids"] = given["position_ids"] + length
    return given


def _after(module: nn.Module, args: tuple, output: Any) -> None:
    """Leave the logits of the n tokens that the caller gave."""
    prompts = _prompts(module)
    length = sum(p.length for p in prompts)
    logits = getattr(output, "logits", None)
    widened = getattr(module.get_input_embeddings(), "prompted_length", None) if prompts else None
    if length and logits is not None and logits.dim() == 3 and logits.shape[1] == widened:
        output.logits = logits[:, length:]


def _widen_encoder_mask(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """An encoder-decoder's cross-attention must see the prompt that its encoder will put first."""
    length = sum(p.length for p in _prompts(model))
    if not length:
        return None
    given = dict(inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments)
    given.update(given.pop("kwargs", {}))
    mask = given.get("attention_mask")
    if mask is None and given.get("input_ids") is not None:
        mask = torch.ones_like(given["input_ids"])
    if mask is not None:
        given["attention_mask"] = _prepend(mask, length, 1)
    return (), given


def _token_mask(mask: Tensor | None, batch: int, n: int, device: torch.device) -> Tensor:
    if mask is None:
        return torch.ones(batch, n, dtype=torch.bool, device=device)
    if mask.dim() != 2:
        raise ModelError("a prompt needs the two-dimensional attention mask; this model was given a prepared one")
    return mask[:, -n:].bool()


def _check_room(module: nn.Module, needed: int, length: int) -> None:
    config = getattr(module, "config", None)
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if limit is not None and needed > limit:
        raise ModelError(
            f"prompt and input need {needed} positions, {length} of them the prompt's; {type(module).__name__} has "
            f"{limit}. Shorten the input (data.max_length) or the prompt."
        )


def _prepend(tensor: Tensor, length: int, value: int) -> Tensor:
    return torch.cat([tensor.new_full((tensor.shape[0], length), value), tensor], dim=1)
