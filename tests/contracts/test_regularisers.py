"""The contract of regularisers, for every part with that tag: added to an objective, from its own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import tunesmith
from tests.contracts.test_objectives import LAYOUTS, exact, laid_out, made, rows
from tests.zoo import DECODERS, same, tiny
from tunesmith import catalog
from tunesmith.core.objective import Objective
from tunesmith.core.part import Part
from tunesmith.objectives.sft import SFT

FOUND = [p for p in catalog.in_room("objectives") if "regulariser" in p.tags]
REGULARISERS = pytest.mark.parametrize("part", FOUND, ids=lambda p: p.slug)


def added(term: Objective, model: nn.Module, batch: dict[str, Any], total: Tensor | None = None) -> Tensor:
    """What the term adds, from the forward pass of plain fine-tuning."""
    with term.watching(model):
        SFT()(model, batch)
    loss, _ = term(model, batch, total)
    return loss


def test_there_is_one() -> None:
    assert FOUND


@LAYOUTS
@REGULARISERS
def test_micro_batches_add_up_to_one_large_batch(part: Part, layout: str) -> None:
    model, term = exact(), made(part)
    pieces = [laid_out(rows()[:2], layout), laid_out(rows()[2:], layout)]
    total = torch.stack([term.count(piece) for piece in pieces]).sum()
    whole = laid_out(rows(), layout)
    assert int(term.count(whole)) == int(total)
    parts = sum(added(term, model, piece, total) for piece in pieces)
    torch.testing.assert_close(parts, added(term, model, whole), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
@REGULARISERS
def test_padding_and_laying_end_to_end_are_the_same(part: Part, family: str) -> None:
    model, term = exact(family), made(part)
    found = [added(term, model, laid_out(rows(), layout)) for layout in ("right", "flat")]
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


@REGULARISERS
def test_the_watched_pass_is_enough(part: Part) -> None:
    model, term, batch = exact(), made(part), laid_out(rows(), "right")
    alone, _ = term(model, batch)
    torch.testing.assert_close(added(term, model, batch), alone)
    runs: list[int] = []
    with term.watching(model):
        SFT()(model, batch)
    handle = model.register_forward_pre_hook(lambda *_: runs.append(1))
    term(model, batch)
    handle.remove()
    assert not runs


@REGULARISERS
def test_gradients_reach_what_trains_and_nothing_else(part: Part) -> None:
    own = getattr(part.target, "regularises", None)  # some terms are for one adapter's parameters
    config = tunesmith.adapter(own) if own else LoraConfig(target_modules="all-linear")
    model = get_peft_model(tiny("llama", initializer_range=0.3), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    with tunesmith.step(model, 0, 40):
        added(made(part), model, laid_out(rows(), "right")).backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert same(before, {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad})


@REGULARISERS
def test_nothing_is_left_on_the_model(part: Part) -> None:
    model, batch = tiny("llama"), laid_out(rows(), "right")
    term = made(part)

    class Stopped(Exception):  # noqa: N818
        pass

    for stop in (False, True):
        try:
            with term.watching(model):
                SFT()(model, batch)
                if stop:
                    raise Stopped
        except Stopped:
            pass
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
