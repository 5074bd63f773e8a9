"""A helper model with its own cache, beside a generating one.

A `LogitsProcessor` is handed token ids and nothing else. So a helper works out for itself what `generate` knows: which
leading columns are padding, which position a token has, where the prompt ends, and what of its cache still holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, set_adapter
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tunesmith.errors import ModelError

Retarget = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""`(prompt ids, mask) -> (ids, mask)`, all (B, any length); a mask is true where a token is."""

_PADDING = -1


class Prompts:
    """Where the prompt ends, told from the ids alone.

    `generate` shows its processors the prompt, then the same with one more token at each step; beams exchange what
    follows the prompt, and assisted decoding goes back and forth behind it. So a call goes on with the prompt seen
    before if its rows begin with that prompt, it is longer, and it has at most one token more than any call since.
    Any other call begins a new prompt.
    """

    def __init__(self) -> None:
        self._prompt: Tensor | None = None
        self._longest = 0

    def see(self, ids: Tensor) -> bool:
        """Whether a call with these ids, (B, T), begins a new prompt; then all of them are the prompt."""
        known, length = self._prompt, ids.shape[1]
        if (
            known is not None
            and known.shape[0] == ids.shape[0]
            and known.shape[1] < length <= self._longest + 1
            and torch.equal(known, ids[:, : known.shape[1]])
        ):
            self._longest = max(self._longest, length)
            return False
        self._prompt, self._longest = ids, length
        return True

    @property
    def length(self) -> int:
        """Columns of the prompt, padding included."""
        return 0 if self._prompt is None else self._prompt.shape[1]

    def forget(self) -> None:
        """The next call begins a new prompt."""
        self._prompt, self._longest = None, 0


def prompt_mask(prompt: Tensor, pad_token_id: int | None) -> Tensor:
    """Which columns of a left-padded prompt, (B, P), are tokens: all but each row's leading run of the pad token.

    A pad token further right is a token, and the last column always is one. Where the pad token is also the first
    token of real prompts, the ids cannot tell them apart: a mask must then be given.
    """
    if pad_token_id is None:
        return torch.ones_like(prompt, dtype=torch.bool)
    mask = (prompt != pad_token_id).long().cumsum(1) > 0
    mask[:, -1] = True
    return mask


def pad_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows with every padding column on the left and no more of them than needed; (B, T) both."""
    width = int(mask.sum(1).max())
    # A stable sort by the mask keeps the tokens' order and moves what is not one to the front.
    order = mask.long().argsort(dim=1, stable=True)
    return ids.gather(1, order)[:, -width:], mask.gather(1, order)[:, -width:]


class SideModel:
    """Next-token logits of a helper model for the sequences that another model is generating.

    The helper has a cache of its own, so that a step costs one token. When the sequences are not the cached ones with
    tokens appended, as much of the cache as still holds is kept: rows that beam search exchanged are fetched from
    where they are, columns that assisted decoding took back are cut off. A new prompt, or another number of rows,
    begins with an empty cache.

    The model runs in evaluation mode without gradients, and is left as it was found: its mode, its adapters and what
    of it trains. It may be the generating model itself.

    Args:
        model: A causal language model.
        pad_token_id: What the generating model pads with, on the left.
        adapter: None runs the model as it is; False with its PEFT adapters disabled; a name with that adapter. One set
            of weights so serves as a tuned and an untuned helper.
        retarget: If the helper reads the prompt in other words (its own chat template): ids and mask of the prompt to
            those of the helper's prompt; the tokens generated later are appended to both.
        vocabulary: Number of token ids that count; the columns of a head that was padded further are cut off.

    Attributes:
        forwards: Forward passes so far.
        tokens: Tokens that went through them, padding left out: the cost of the method.

    Raises:
        ModelError: the model is not a causal language model, or has no such adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pad_token_id: int | None = None,
        adapter: str | bool | None = None,
        retarget: Retarget | None = None,
        vocabulary: int | None = None,
    ) -> None:
        _check_model(model, adapter)
        self.model = model
        self.pad_token_id = pad_token_id
        self.adapter = adapter
        self.retarget = retarget
        self.vocabulary = vocabulary
        self.forwards = 0
        self.tokens = 0
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        accepted = inspect.signature(base.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._room: int | None = getattr(base.config, "max_position_embeddings", None)
        layered = DynamicCache(config=base.config).layers
        self._croppable = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layered)
        self._prompts = Prompts()
        self.reset()

    def reset(self) -> None:
        """Forget the cached sequences, for instance after the model's weights changed."""
        self._prompts.forget()
        self._cache: DynamicCache | None = None
        self._cached: Tensor | None = None
        self._reworded: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of the next token.

        Args:
            input_ids: (B, T) prompts and what was generated so far, padded on the left.
            attention_mask: (B, T'), T' <= T, of the prompts; derived from the pad token if None.

        Returns:
            (B, vocabulary) float32, on the device of `input_ids`.

        Raises:
            ModelError: the sequences are longer than the helper's positions, its head is smaller than the
                vocabulary, or an adapter is merged that would have to be switched off.
        """
        device = next(self.model.parameters()).device
        ids, mask = self._sequences(input_ids.to(device), attention_mask)
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        needed = int(positions.max()) + 1
        if self._room is not None and needed > self._room:
            raise ModelError(
                f"the helper {type(self.model).__name__} has {self._room} positions, and the sequences now need "
                f"{needed}; shorten the prompt or lower max_new_tokens"
            )
        # Padding is one id of its own here, so that comparing ids compares masks too.
        wanted = ids.masked_fill(~mask, _PADDING)
        known = self._reuse(wanted)
        cached, self._cached = self._cache, None
        given = {"position_ids": positions[:, known:]} if self._takes_positions else {}
        with self._as_helper():
            out = self.model(
                input_ids=ids[:, known:],
                attention_mask=mask.long(),
                past_key_values=cached,
                use_cache=True,
                **given,
                **self._last_only,
            )
        self._cached = wanted
        self.forwards += 1
        self.tokens += int(mask[:, known:].sum())
        scores = out.logits[:, -1]
        if self.vocabulary is not None and scores.shape[-1] < self.vocabulary:
            raise ModelError(
                f"the head of the helper {type(self.model).__name__} scores {scores.shape[-1]} tokens, and the "
                f"vocabulary has {self.vocabulary}; call its resize_token_embeddings({self.vocabulary}) and tune it"
            )
        return scores[:, : self.vocabulary].to(input_ids.device, torch.float32, copy=True)

    def _sequences(self, ids: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids and mask, (B, any length), as the helper reads them."""
        if self._prompts.see(ids):
            self._cache = self._cached = self._reworded = None
        length = self._prompts.length
        if given is None:
            mask = prompt_mask(ids[:, :length], self.pad_token_id)
        else:
            mask = given.to(ids.device).bool()
        if self.retarget is not None:
            if self._reworded is None:
                reworded, reworded_mask = self.retarget(ids[:, :length], mask[:, :length])
                self._reworded = pad_left(reworded.to(ids.device), reworded_mask.to(ids.device).bool())
            ids, mask = torch.cat([self._reworded[0], ids[:, length:]], dim=1), self._reworded[1]
        generated = mask.new_ones(ids.shape[0], ids.shape[1] - mask.shape[1])
        return ids, torch.cat([mask, generated], dim=1)

    def _reuse(self, wanted: Tensor) -> int:
        """Bring the cache to a common prefix with `wanted`, (B, T); the number of columns it then holds."""
        if self._cache is None or self._cached is None:
            return self._start()
        held = self._cached.shape[1]
        most = min(held, wanted.shape[1] - 1)
        if most == held and torch.equal(self._cached, wanted[:, :held]):
            return held
        if not self._croppable:
            return self._start()
        # For each row, the cached row that shares the longest prefix with it: beams exchange their rows.
        found = [(self._cached[:, :most] == row[:most]).long().cumprod(1).sum(1).max(0) for row in wanted]
        shared = min(int(best.values) for best in found)
        if shared == 0:
            return self._start()
        self._cache.reorder_cache(torch.stack([best.indices for best in found]))
        self._cache.crop(shared - held)
        return shared

    def _start(self) -> int:
        # A sliding window's own cache forgets what a crop would need again; full layers under its mask do not.
        self._cache = DynamicCache() if self._croppable else DynamicCache(config=self.model.config)
        return 0

    @contextmanager
    def _as_helper(self) -> Iterator[None]:
        """In evaluation mode and with the helper's adapter; everything as before afterwards."""
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with _adapter(self.model, self.adapter):
                yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def _adapter(model: nn.Module, wanted: str | bool | None) -> Iterator[None]:
    if wanted is None:
        yield
        return
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ModelError("the helper's adapter is merged into its weights; call unmerge_adapter() first")
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    before = [(layer, layer.disable_adapters, list(layer.active_adapters)) for layer in layers]
    try:
        # peft's model-wide switches forget which of them were on, and set what trains.
        for layer in layers:
            layer.enable_adapters(wanted is not False)
        if isinstance(wanted, str):
            set_adapter(model, wanted)
        yield
    finally:
        for layer, disabled, active in before:
            layer.set_adapter(active)
            layer.enable_adapters(not disabled)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def _check_model(model: nn.Module, adapter: str | bool | None) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    can_generate = getattr(base, "can_generate", None)
    if can_generate is None or not can_generate() or base.config.is_encoder_decoder:
        raise ModelError(
            f"a helper must be a causal language model with a language-modelling head; {type(base).__name__} is not"
        )
    configs = getattr(model, "peft_config", {})
    known = ", ".join(configs) or "none: it is not a PEFT model"
    if adapter is True or (adapter is False and not configs) or (isinstance(adapter, str) and adapter not in configs):
        raise ModelError(
            f"a helper's adapter is None, False or the name of one of its adapters; found {adapter!r}, it has {known}"
        )
    prompted = [name for name, config in configs.items() if getattr(config, "is_prompt_learning", False)]
    if prompted:
        raise ModelError(
            f"the adapter {prompted[0]!r} of the helper is one of peft's learned prompts, which put their tokens "
            "before every cached step again; use a prompt of this package, or pass get_base_model() for the model "
            "without it"
        )


def reworded(tokenizer: PreTrainedTokenizerBase, rewrite: Callable[[str], str]) -> Retarget:
    """A `retarget` that decodes each prompt, rewrites its text and encodes it again.

        template = lambda text: tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        SideModel(expert, retarget=reworded(tokenizer, template))

    Special tokens are left out of the text that `rewrite` sees, and none are added to what it returns: a chat
    template writes its own.
    """

    def retarget(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        texts = [tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(ids, mask, strict=True)]
        rows = [tokenizer(rewrite(text), add_special_tokens=False)["input_ids"] for text in texts]
        if empty := [text for text, row in zip(texts, rows, strict=True) if not row]:
            raise ModelError(f"the prompt {empty[0]!r} became empty when it was rewritten for the helper")
        longest = max(len(row) for row in rows)
        padded = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=ids.device)
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        return padded, torch.arange(longest, device=ids.device) >= (longest - lengths)[:, None]

    return retarget


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, whose: str) -> None:
    """Check that a helper's tokenizer gives every token of the generating model's the same id.

    Sizes say nothing: two vocabularies of one size may differ, and equal ones may be padded to different sizes. Tokens
    that only the helper has are allowed, since their logits are cut off or never used.

    Raises:
        ModelError: names the first tokens that differ.
    """
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    different = sorted((i, token) for token, i in ours.items() if theirs.get(token) != i)
    if not different:
        return
    shown = "; ".join(
        f"{token!r} is {i} and {'missing' if (there := theirs.get(token)) is None else there}"
        for i, token in different[:3]
    )
    raise ModelError(
        f"the tokenizer of {whose} does not share the generating model's vocabulary: {len(different)} of {len(ours)} "
        f"tokens differ ({shown} there). Logits can only be added between models of one vocabulary: use a helper of "
        "the same model family"
    )
