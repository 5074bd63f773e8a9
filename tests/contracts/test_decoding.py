"""The decoding contract, for every part of the room on every family of generating models."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import transformers as T
from torch import Tensor

from tests.speech import BOS, EOS, PAD, lively, prompts, tokenizer
from tests.zoo import DECODERS, VOCABULARY
from tunesmith import catalog
from tunesmith.core.decoding import Decoder, Helper, Step, build
from tunesmith.core.part import Part
from tunesmith.core.sidemodel import SideModel
from tunesmith.errors import ModelError, RecipeError

METHODS = pytest.mark.parametrize("part", catalog.in_room("decoding"), ids=lambda p: p.slug)
ON = pytest.mark.parametrize("family", DECODERS)
STYLES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "cut sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


def made(part: Part, model: T.PreTrainedModel, **options: object) -> T.LogitsProcessorList:
    """The method with small llamas as helpers."""
    words = tokenizer()
    roles = [role.removesuffix("*") for role in part.target.roles]
    helpers = {role: Helper(lively("llama", seed=10 + i), words) for i, role in enumerate(roles)}
    return build(part.slug, model, words, helpers, **options)


def generate(model: T.PreTrainedModel, ids: Tensor, mask: Tensor, processors: Any = None, **given: Any) -> Tensor:
    torch.manual_seed(1)
    size = {"max_new_tokens": 8, **given}
    return model.generate(input_ids=ids, attention_mask=mask, logits_processor=processors, **size)


@ON
@METHODS
@pytest.mark.parametrize("style", STYLES)
def test_neutral_equals_plain_generate(part: Part, family: str, style: str) -> None:
    model = lively(family)
    ids, mask = prompts()
    plain = generate(model, ids, mask, **STYLES[style])
    neutral = generate(model, ids, mask, made(part, model, **part.target.neutral), **STYLES[style])
    assert torch.equal(neutral, plain)
    changed = generate(model, ids, mask, made(part, model), **STYLES[style])
    assert changed.shape != plain.shape or not torch.equal(changed, plain), "the method must do something"


@ON
@METHODS
def test_a_batch_equals_its_rows_alone(part: Part, family: str) -> None:
    model = lively(family)
    ids, mask = prompts()
    processors = made(part, model)
    together = generate(model, ids, mask, processors, min_new_tokens=8)
    for row, keep, expected in zip(ids, mask, together, strict=True):
        only = row[keep.bool()][None]
        alone = generate(model, only, torch.ones_like(only), processors, min_new_tokens=8)
        assert torch.equal(alone[0, only.shape[1] :], expected[7:])


@METHODS
@pytest.mark.parametrize("style", STYLES)
def test_cached_equals_uncached(part: Part, style: str) -> None:
    model = lively("gpt2")
    ids, mask = prompts()
    method = made(part, model)[0]
    rows = 3 * max(STYLES[style].get("num_beams", 1), 1)
    seen = []

    class Check(T.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            found = method(input_ids, scores)
            for side in method.helpers.values():
                side._cached = None  # the next call computes everything again
            seen.append((found, method(input_ids, scores)))
            return found

    generate(model, ids, mask, [Check()], **STYLES[style])
    assert len(seen) > 1
    for cached, uncached in seen:
        assert cached.shape[0] == rows
        assert torch.allclose(cached, uncached, atol=1e-4 * float(uncached[uncached.isfinite()].abs().max()))


@ON
@METHODS
def test_assisted_decoding_equals_greedy(part: Part, family: str) -> None:
    model, assistant = lively(family), lively("llama", seed=10)
    ids, mask = prompts((6,))
    greedy = generate(model, ids, mask, made(part, model), max_new_tokens=14)
    assisted = generate(model, ids, mask, made(part, model), max_new_tokens=14, assistant_model=assistant)
    assert torch.equal(assisted, greedy)


@METHODS
def test_it_runs_before_temperature_and_after_forbidden_words(part: Part) -> None:
    model = lively("llama")
    ids, mask = prompts()
    kept = {"output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 1}
    plain = generate(model, ids, mask, made(part, model), **kept).scores[0]
    halved = generate(model, ids, mask, made(part, model), do_sample=True, temperature=0.5, top_k=0, **kept).scores[0]
    assert torch.allclose(halved, plain / 0.5, atol=1e-4)
    best = int(plain[0].argmax())
    barred = generate(model, ids, mask, made(part, model), bad_words_ids=[[best]], **kept).scores[0]
    assert bool((barred[:, best] == -torch.inf).all())


@METHODS
def test_beams_add_up_log_probabilities(part: Part) -> None:
    model = lively("llama")
    ids, mask = prompts()
    kept = {"output_scores": True, "return_dict_in_generate": True, "num_beams": 2, "max_new_tokens": 3}
    for scores in generate(model, ids, mask, made(part, model), **kept).scores:
        assert torch.allclose(scores.logsumexp(1), torch.zeros(6), atol=1e-4)


@METHODS
def test_other_vocabularies_are_a_clear_error(part: Part) -> None:
    if not part.target.roles:
        pytest.skip("it has no helper")
    model, words, others = lively("llama"), tokenizer(), tokenizer(first="v")
    helpers = {role.removesuffix("*"): (lively("llama"), others) for role in part.target.roles}
    with pytest.raises(ModelError, match=r"vocabulary: 61 of 64 tokens differ"):
        build(part.slug, model, words, helpers)


@METHODS
def test_missing_and_unknown_helpers_are_a_clear_error(part: Part) -> None:
    model, words = lively("llama"), tokenizer()
    names = [role.removesuffix("*") for role in part.target.roles]
    with pytest.raises(RecipeError, match="needs the helper models"):
        build(part.slug, model, words, {**{n: (model, words) for n in names}, "stranger": (model, words)})
    if names:
        with pytest.raises(RecipeError, match=f"needs the helper models.*{names[-1]}"):
            build(part.slug, model, words, {n: (model, words) for n in names[:-1]})


@METHODS
def test_padded_heads_are_cut(part: Part) -> None:
    model, words = lively("llama", vocab_size=80), tokenizer()
    names = [role.removesuffix("*") for role in part.target.roles]
    helpers = {n: (lively("llama", vocab_size=70 + i), words) for i, n in enumerate(names)}
    ids, mask = prompts()
    kept = {"output_scores": True, "return_dict_in_generate": True}
    out = generate(model, ids, mask, build(part.slug, model, words, helpers), **kept)
    assert out.scores[0].shape == (3, 80)
    if names:
        assert bool((out.scores[0][:, VOCABULARY:] == -torch.inf).all())
    assert bool(out.scores[0][:, :VOCABULARY].isfinite().any())


# The base class, with a method made for the purpose -------------------------------------------------------------------


class Watch(Decoder):
    """Notes what it is shown; prefers the token after the last one."""

    roles: ClassVar[tuple[str, ...]] = ("guide*",)

    def combine(self, step: Step) -> Tensor:
        self.steps = [*getattr(self, "steps", []), step]
        return step.scores + 100 * torch.nn.functional.one_hot((step.ids[:, -1] + 1) % 64, step.scores.shape[1])


def test_a_step_knows_its_prompt_and_its_helpers() -> None:
    model = lively("llama")
    watch = Watch({"guide": SideModel(model), "guide_two": SideModel(lively("gpt2"))})
    ids, mask = prompts((4, 4))
    out = generate(model, ids, mask, [watch], eos_token_id=None)
    assert out[:, 4:].tolist() == [[(int(row[3]) + i) % 64 for i in range(1, 9)] for row in ids]
    assert [step.prompt_length for step in watch.steps] == [4] * 8
    assert [step.ids.shape[1] for step in watch.steps] == list(range(4, 12))
    last = watch.steps[-1]
    assert torch.allclose(last.logits["guide"], last.scores, atol=1e-4)
    assert not torch.allclose(last.logits["guide_two"], last.scores, atol=1e-1)
    again = generate(model, out[:, :6], torch.ones(2, 6), [watch], eos_token_id=None)
    assert torch.equal(again[:, :12], out)
    assert watch.steps[-1].prompt_length == 4, "a prompt that only goes on is the same sequence"
    watch.reset()
    generate(model, out[:, :6], torch.ones(2, 6), [watch], eos_token_id=None)
    assert watch.steps[-1].prompt_length == 6


def test_one_starred_role_needs_one_helper() -> None:
    with pytest.raises(RecipeError, match=r"needs the helper models guide\*; given none"):
        Watch({})


def test_prompts_that_begin_with_the_pad_token_need_their_mask() -> None:
    model, helper = lively("gpt2"), lively("llama")
    watch = Watch({"guide": SideModel(helper, pad_token_id=BOS)})
    ids, mask = prompts((4, 3))
    ids[0, 0] = ids[1, 0] = ids[1, 1] = BOS
    watch.mask_prompts(mask)
    for beams in (1, 2):
        watch.steps = []
        generate(model, ids, mask, [watch], num_beams=beams, eos_token_id=None)
        with torch.no_grad():
            expected = [helper(input_ids=row[None]).logits[0, -1] for row in (ids[0], ids[1, 1:])]
        found = watch.steps[0].logits["guide"]
        assert torch.allclose(found, torch.stack(expected).repeat_interleave(beams, 0), atol=1e-3)
    with pytest.raises(ModelError, match="mask_prompts was given a mask of"):
        generate(model, *prompts((5,)), [watch])


def test_masses_are_kept() -> None:
    scores = torch.randn(3, 64)
    scores[:, 5] = -torch.inf
    watch = Watch({"guide": SideModel(lively("llama"), pad_token_id=PAD)})
    ids, _ = prompts()
    out = watch(torch.cat([ids, torch.full((3, 1), 4)], 1), scores)
    assert torch.allclose(out.logsumexp(1), scores.logsumexp(1), atol=1e-5)
    assert bool((out[:, 5] == -torch.inf).all())
    assert EOS not in out.argmax(1)
