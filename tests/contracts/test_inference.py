"""The inference contract, for every part of the room on every family of models that it applies to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

from tests.speech import lively, prompts
from tests.zoo import DECODERS, FAMILIES, batch, checkpoint, logits, same, tiny
from tunesmith import catalog
from tunesmith.core import meters
from tunesmith.core.inference import Cost, Inference
from tunesmith.core.part import Part
from tunesmith.errors import ModelError

METHODS = pytest.mark.parametrize("part", catalog.in_room("inference"), ids=lambda p: p.slug)
ON = pytest.mark.parametrize("family", DECODERS)


def made(part: Part, options: Any) -> Inference:
    return part.target(**part.validate(options))


def generate(model: T.PreTrainedModel, ids: Tensor, mask: Tensor, **given: Any) -> Tensor:
    torch.manual_seed(1)
    size = {"max_new_tokens": 10, "min_new_tokens": 10, **given}
    return model.generate(input_ids=ids, attention_mask=mask, **size)


def traces(model: nn.Module) -> dict[str, Any]:
    """What attaching could leave behind: attributes of instances, and hooks."""
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    return {"hooks": hooks, "attributes": {n: set(m.__dict__) for n, m in model.named_modules()}}


@ON
@METHODS
def test_neutral_equals_the_plain_model(part: Part, family: str) -> None:
    model = lively(family, blocks=4)
    given, (ids, mask) = batch(family), prompts()
    plain = logits(model, given)
    styles: list[dict[str, Any]] = [{}, {"do_sample": True}, {"num_beams": 3}, {"use_cache": False}]
    expected = [generate(model, ids, mask, **style) for style in styles]
    method = made(part, part.target.neutral)
    with method.on(model):
        assert torch.allclose(logits(model, given), plain, atol=1e-5)
        for style, said in zip(styles, expected, strict=True):
            assert torch.equal(generate(model, ids, mask, **style), said)
    assert method.cost().share == 1


@pytest.mark.parametrize("family", FAMILIES)
@METHODS
def test_other_models_are_refused_or_run(part: Part, family: str) -> None:
    model, given = tiny(family), batch(family)
    plain, before = logits(model, given), traces(model)
    method = made(part, part.target.neutral)
    refusal = ""
    try:
        method.attach(model)
    except ModelError as error:
        refusal = str(error)
    if refusal:
        assert type(model).__name__ in refusal
        assert family not in DECODERS
        assert traces(model) == before
    assert torch.allclose(logits(model, given), plain, atol=1e-5)
    method.detach()


@ON
@METHODS
def test_detached_is_the_plain_model_bit_for_bit(part: Part, family: str) -> None:
    model = lively(family, blocks=4)
    given, (ids, mask) = batch(family), prompts()
    before, weights, plain = traces(model), checkpoint(model), logits(model, given)
    said = generate(model, ids, mask)
    method = made(part, part.target.frugal)
    with method.on(model):
        assert not torch.equal(generate(model, ids, mask), said), "the method must do something"
    assert torch.equal(logits(model, given), plain)
    assert same(checkpoint(model), weights)
    assert traces(model) == before
    assert torch.equal(generate(model, ids, mask), said)
    method.detach()
    method.attach(model)
    method.detach()


@METHODS
def test_it_is_taken_off_when_something_breaks(part: Part) -> None:
    model = lively("llama", blocks=4)
    before = traces(model)
    with pytest.raises(ZeroDivisionError), made(part, part.target.frugal).on(model):
        1 / 0
    assert traces(model) == before


@METHODS
def test_two_methods_on_one_model_are_refused(part: Part) -> None:
    model, method = lively("llama", blocks=4), made(part, part.target.frugal)
    with method.on(model):
        with pytest.raises(ModelError, match="attached already"):
            made(part, part.target.frugal).attach(model)
        with pytest.raises(ModelError, match="attached already"):
            method.attach(lively("llama", blocks=4))


@ON
@METHODS
def test_the_cost_falls_and_is_what_was_computed(part: Part, family: str) -> None:
    model = lively(family, blocks=4)
    ids, mask = prompts((8, 8))
    plain = meters.flops(lambda: generate(model, ids, mask))
    method = made(part, part.target.frugal)
    with method.on(model):
        method.reset_cost()
        cheap = meters.flops(lambda: generate(model, ids, mask))
        cost = method.cost()
        assert cost.unit == method.unit
        assert 0 < cost.done < cost.full
        assert cheap < plain
        generate(model, ids, mask)
        assert method.cost() == Cost(cost.unit, 2 * cost.done, 2 * cost.full)
        method.reset_cost()
        assert method.cost() == Cost(cost.unit)


@METHODS
def test_a_copied_model_has_a_method_of_its_own(part: Part) -> None:
    model = lively("llama", blocks=4)
    ids, mask = prompts()
    plain = generate(model, ids, mask)
    method = made(part, part.target.frugal)
    with method.on(model):
        cheap = generate(model, ids, mask)
        method.reset_cost()
        clone = copy.deepcopy(model)
        assert torch.equal(generate(clone, ids, mask), cheap)
        assert method.cost().full == 0
    assert torch.equal(generate(clone, ids, mask), cheap)
    assert torch.equal(generate(model, ids, mask), plain)
