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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunesmith.core.packing import BOUNDS
from tunesmith.errors import ModelError

IGNORED = -100


@dataclass(frozen=True)
class PromptSpace:
    """Where a prompt lives.

    Attributes:
        embedding: The model's frozen input embedding.
        max_positions: Of the model; None if it has no limit.
    """

    embedding: nn.Embedding
    max_positions: int | None = None

    @property
    def dim(self) -> int:
        return self.embedding.embedding_dim

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def words(self, ids: Sequence[int]) -> Tensor:
        """The vectors of some tokens as the model sees them (Gemma scales its table), (len(ids), dim) float32.

        Raises:
            ModelError: no ids, or one that is not in the vocabulary.
        """
        rows = self.embedding.num_embeddings
        outside = [i for i in ids if not 0 <= i < rows]
        if outside or not ids:
            found = f"the token id {outside[0]}" if outside else "no ids"
            raise ModelError(f"a prompt starts from token ids between 0 and {rows - 1}; found {found}")
        with torch.no_grad():
            return self.embedding(torch.tensor(list(ids), device=self.device)).float()


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
    """A learned context. Trainable tensors are parameters; other tensors to save are persistent buffers.

    Attributes:
        every_token: Whether what `forward` adds belongs to every token by its position, also to those that follow a
            cached context; else a prompt is asked once, when a context is read, and lives on in the cache.
        neutral: Options under which the output at creation equals the base's.
        longest: The longest input in tokens that it is made for; None where it takes any.
    """

    every_token: ClassVar[bool] = False
    neutral: ClassVar[Mapping[str, object]] = {}
    longest: int | None = None

    def __init__(self, space: PromptSpace) -> None:
        super().__init__()
        self.dim = space.dim

    @classmethod
    def targets(cls, model: nn.Module) -> list[str]:
        """Always the input embedding; the encoder's in an encoder-decoder.

        Raises:
            ModelError: the model does not embed token ids.
        """
        embedding = _entry(model).get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        embedding = getattr(embedding, "base_layer", embedding)
        if not isinstance(embedding, nn.Embedding):
            raise ModelError(
                f"a prompt stands before embedded tokens, and {type(model).__name__} embeds none; use an adapter"
            )
        names = [name for name, module in model.named_modules() if module is embedding]
        return [name.removesuffix(".base_layer") for name in names]

    @property
    def length(self) -> int:
        """Number of positions that the prompt takes."""
        return 0

    def forward(self, context: PromptContext) -> PromptOut:
        raise TypeError(f"{type(self).__name__} does not define forward")

    def lr_ratios(self) -> Mapping[str, float]:
        """Own parameters that learn at another rate than the run's, and the factor for each."""
        return {}

    def trainable_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def space_of(model: nn.Module, embedding: nn.Embedding) -> PromptSpace:
    """The space of a model with this input embedding."""
    return PromptSpace(embedding, _limit(model))


# The driver -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """What the driver must know of the module whose inputs get the prompt.

    Attributes:
        first_position: The number that it gives to the first position.
        encoder: Whether it is the encoder of an encoder-decoder.
    """

    first_position: int
    encoder: bool


def hook(model: nn.Module) -> None:
    """Let the prompts on the model's input embedding act. Hooking a model twice does nothing."""
    if hasattr(model, "_tunesmith_prompt_hooks"):
        return
    entry = _entry(model)
    entry._tunesmith_prompt = _Entry(_first_position(entry), entry is not model)  # type: ignore[assignment]
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
        del model._tunesmith_prompt_hooks, _entry(model)._tunesmith_prompt


def _entry(model: nn.Module) -> nn.Module:
    """The module whose inputs get the prompt: the encoder of an encoder-decoder, else the model itself."""
    config = getattr(model, "config", None)
    return model.get_encoder() if getattr(config, "is_encoder_decoder", False) else model


def _prompts(module: nn.Module) -> list[Prompt]:
    embedding = module.get_input_embeddings()
    return embedding.active_prompts() if hasattr(embedding, "active_prompts") else []


def _arguments(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name, also those that only a decorator of `forward` knows (`return_dict`)."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def _before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    prompts = _prompts(module)
    if not prompts:
        return None
    given = _arguments(module, args, kwargs)
    if given.get(BOUNDS) is not None:
        raise ModelError("a prompt cannot stand before rows that are laid end to end; set `data.padding_free` to false")
    length = sum(p.length for p in prompts)
    cache = given.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    if past:
        return (), _continue(module, given, prompts, length, past)
    return (), _prefill(module, given, prompts, length)


def _prefill(module: nn.Module, given: dict[str, Any], prompts: list[Prompt], length: int) -> dict[str, Any]:
    ids, embeds = given.pop("input_ids", None), given.pop("inputs_embeds", None)
    if embeds is None:
        embeds = module.get_input_embeddings()(ids)
    batch, n, dim = embeds.shape
    # An encoder's mask was widened already when its encoder-decoder was called as a whole.
    mask = _token_mask(given.get("attention_mask"), batch, n, embeds.device)
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    outs = [prompt(PromptContext(embeds, mask, positions, ids)) for prompt in prompts]
    embeds = _added(embeds, outs)
    _check_room(module, length + n, length)
    # Without token ids a decoder's classifier reads the last position, so that must be a real token.
    decoder_classifier = type(module).__name__.endswith("ForSequenceClassification") and hasattr(module, "score")
    if decoder_classifier and not bool(mask[:, -1].all()):
        raise ModelError(
            f"{type(module).__name__} reads the last position, which is padding in this batch; with a prompt, pad "
            "on the left (tokenizer.padding_side = 'left')"
        )
    module.get_input_embeddings().prompted_length = length + n
    if not length:
        return {**given, "inputs_embeds": embeds}
    prefixes = [out.prefix.to(embeds.dtype).expand(batch, -1, dim) for out in outs if out.prefix is not None]
    given["inputs_embeds"] = torch.cat([*prefixes, embeds], dim=1)
    given["attention_mask"] = _prepend(mask.long(), length, 1)
    entry = module._tunesmith_prompt
    if "position_ids" in inspect.signature(module.forward).parameters:
        chosen = given.get("position_ids")
        before = torch.arange(length, device=mask.device).expand(batch, -1) + entry.first_position
        after = positions + entry.first_position if chosen is None else chosen.expand(batch, -1)
        given["position_ids"] = torch.cat([before, after + length], dim=1)
    elif entry.encoder and not bool(mask[:, 0].all()):
        raise ModelError(
            f"{type(module).__name__} measures distances by columns, and padding would stand between the prompt and "
            "the text; pad on the right (tokenizer.padding_side = 'right')"
        )
    labels = given.get("labels")
    if labels is not None and labels.shape == (batch, n) and not labels.is_floating_point():
        given["labels"] = _prepend(labels, length, IGNORED)
    if given.get("token_type_ids") is not None:
        given["token_type_ids"] = _prepend(given["token_type_ids"], length, 0)
    for name in ("start_positions", "end_positions"):
        if given.get(name) is not None:
            given[name] = given[name] + length
    keep = given.get("logits_to_keep")
    if keep is not None:
        given["logits_to_keep"] = keep + length if isinstance(keep, Tensor) else min(keep, n)
    return given


def _continue(
    module: nn.Module, given: dict[str, Any], prompts: list[Prompt], length: int, past: int
) -> dict[str, Any]:
    """A later step of cached generation: the prefix is in the cache already; mask and positions must know it."""
    module.get_input_embeddings().prompted_length = None
    ids, embeds, mask = given.get("input_ids"), given.get("inputs_embeds"), given.get("attention_mask")
    batch, n = (ids if embeds is None else embeds).shape[:2]
    _check_room(module, past + n, length)
    seen = _token_mask(mask, batch, past - length + n, (ids if embeds is None else embeds).device)
    lasting = [p for p in prompts if p.every_token]
    if lasting:
        given.pop("input_ids", None)
        embeds = module.get_input_embeddings()(ids) if embeds is None else embeds
        positions = (seen.long().cumsum(1) - 1).clamp_min(0)[:, -n:]
        context = PromptContext(embeds, seen[:, -n:], positions, ids)
        given["inputs_embeds"] = _added(embeds, [p(context) for p in lasting])
    if mask is not None:
        given["attention_mask"] = _prepend(mask, length, 1)
    if given.get("position_ids") is not None:
        given["position_ids"] = given["position_ids"] + length
    return given


def _added(embeds: Tensor, outs: Iterable[PromptOut]) -> Tensor:
    for out in outs:
        embeds = embeds if out.add is None else embeds + out.add.to(embeds.dtype)
    return embeds


def _after(module: nn.Module, args: tuple, output: Any) -> None:
    """Leave the logits of the n tokens that the caller gave."""
    prompts = _prompts(module)
    length = sum(p.length for p in prompts)
    widened = getattr(module.get_input_embeddings(), "prompted_length", None) if prompts else None
    if not length or widened is None:
        return
    for name, dims in (("logits", 3), ("start_logits", 2), ("end_logits", 2)):
        logits = getattr(output, name, None)
        if logits is not None and logits.dim() == dims and logits.shape[1] == widened:
            setattr(output, name, logits[:, length:])


def _widen_encoder_mask(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """An encoder-decoder's cross-attention must see the prompt that its encoder will put first."""
    length = sum(p.length for p in _prompts(_entry(model)))
    if not length:
        return None
    given = _arguments(model, args, kwargs)
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


def _limit(module: nn.Module) -> int | None:
    """Positions that the model has; None for relative ones without a limit."""
    limit = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    entry = getattr(module, "_tunesmith_prompt", None)
    return limit - (entry.first_position if entry else _first_position(module)) if limit else None


def _first_position(module: nn.Module) -> int:
    """The number of the first position: RoBERTa and its kin begin at padding_idx + 1, others at 0."""
    numbering = (m for m in module.modules() if hasattr(m, "create_position_ids_from_inputs_embeds"))
    return next((int(m.padding_idx) + 1 for m in numbering), 0)  # type: ignore[arg-type]


def _check_room(module: nn.Module, needed: int, length: int) -> None:
    limit = _limit(module)
    if limit is not None and needed > limit:
        raise ModelError(
            f"prompt and input need {needed} positions, {length} of them the prompt's; {type(module).__name__} has "
            f"{limit}. Shorten the input (data.max_length) or the prompt."
        )


def _prepend(tensor: Tensor, length: int, value: int) -> Tensor:
    return torch.cat([tensor.new_full((tensor.shape[0], length), value), tensor], dim=1)
