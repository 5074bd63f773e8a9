"""What is special to the polarisation of gates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

import tunesmith
from tests.zoo import batch, tiny
from tunesmith.errors import ModelError
from tunesmith.objectives.polarization import Polarization


def gated(seed: int = 0, **options: Any) -> Any:
    """A ViT whose gates depend on the input, in evaluation mode."""
    torch.manual_seed(seed)
    model = get_peft_model(tiny("vit"), tunesmith.adapter("polarization-subnet", groups=4, **options)).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for made in gates(model):
            made.gates[2].weight.copy_(3 * torch.randn(made.gates[2].weight.shape, generator=g))
            made.gates[2].bias.zero_()
            made.p.copy_(torch.rand(made.p.shape, generator=g))
    return model


def gates(model: Any) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__ == "PolarizationSubnet"]


def means(model: Any, given: dict[str, Tensor]) -> Tensor:
    term = Polarization()
    with term.watching(model):
        model(**given)
    return torch.cat([made.seen for made in gates(model)])


def slopes(model: Any) -> Tensor:
    found = torch.cat([made.gates[2].bias.grad for made in gates(model)])
    model.zero_grad()
    return found


def test_the_formula_over_a_batch() -> None:
    model, given = gated(length=17), batch("vit", rows=5)
    p = means(model, given).detach()
    assert ((p > 0) & (p < 1)).any()
    cost = torch.cat([made.costs for made in gates(model)])
    assert len(cost.unique()) == 2
    apart = float((cost * p).sum() / cost.sum()) - 0.7
    term = Polarization(sparsity=0.3, polarity=2.0, activity=3.0, over="batch")
    value, scalars = term(model, given)
    assert float(value.detach()) == pytest.approx(2 * float((p * (1 - p)).mean()) + 3 * apart**2, rel=1e-5)
    assert float(scalars["polarization"]) == pytest.approx(float(value.detach()))
    recent = torch.cat([made.p for made in gates(model)])
    assert float(scalars["gates_open"]) == pytest.approx(float((recent > 0.5).float().mean()))
    assert float(scalars["gates_agree"]) == pytest.approx(float(torch.maximum(recent, 1 - recent).mean()))


def test_recent_means_give_the_value_and_the_batch_the_slope() -> None:
    model, given = gated(), batch("vit", rows=5)
    p = torch.cat([made.p for made in gates(model)])
    cost = torch.cat([made.costs for made in gates(model)])
    excess = (cost * p).sum() / cost.sum() - 0.5
    value, _ = Polarization(over="recent")(model, given)
    assert float(value.detach()) == pytest.approx(float((p * (1 - p)).mean() + 20 * excess**2), rel=1e-5)
    value.backward()
    found = slopes(model)
    seen = means(model, given)
    outer = (1 - 2 * p) / len(p) + 40 * excess * cost / cost.sum()
    (seen * outer).sum().backward()
    assert torch.allclose(found, slopes(model), atol=1e-7)
    assert bool(found.any())


def test_micro_batches_have_the_slope_of_the_whole_over_recent_steps_alone() -> None:
    whole = batch("vit", rows=6)
    pieces = [{name: value[at] for name, value in whole.items()} for at in (slice(0, 1), slice(1, 4), slice(4, 6))]
    for over, same in (("recent", True), ("batch", False)):
        model, term = gated(), Polarization(over=over, activity=0.0)  # type: ignore[arg-type]
        term(model, whole)[0].backward()
        expected, total = slopes(model), term.count(whole)
        for piece in pieces:
            term(model, piece, total)[0].backward()
        assert torch.allclose(slopes(model), expected, atol=1e-7) is same


def test_one_row_has_no_polarisation_of_its_own() -> None:
    model, given = gated(), batch("vit", rows=1)
    assert float(Polarization(over="batch", activity=0.0)(model, given)[0]) == 0
    assert float(Polarization(over="recent", activity=0.0)(model, given)[0]) > 0


def test_pressure_and_weights_scale_it() -> None:
    model, given = gated(), batch("vit")
    whole = Polarization()(model, given)[0]
    apart = Polarization(polarity=0.0)(model, given)[0] + Polarization(activity=0.0)(model, given)[0]
    assert torch.allclose(apart, whole)
    gates(model)[0].shared.pressure = 0.25
    assert torch.allclose(Polarization()(model, given)[0], 0.25 * whole)


def test_descending_it_closes_half_of_the_flops_and_polarises() -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny("vit"), tunesmith.adapter("polarization-subnet", groups=8, warmup=0, ramp=0))
    term, given = Polarization(), [batch("vit", rows=8, seed=seed) for seed in range(4)]
    parameters = [p for made in gates(model) for p in made.gates.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    for number in range(150):
        with tunesmith.step(model, number, 150, optimizer):
            value, scalars = term(model, given[number % 4])
            value.backward()
            optimizer.step()
        optimizer.zero_grad()
    cost = torch.cat([made.costs for made in gates(model)])
    kept = torch.cat([made.consensus() for made in gates(model)])
    assert float(scalars["gates_agree"]) > 0.95
    assert abs(float((cost * kept).sum() / cost.sum()) - 0.5) < 0.1


def test_the_watched_pass_and_evaluation() -> None:
    model, given, term = gated(), batch("vit"), Polarization()
    plain = model(**given).logits.detach()
    with term.watching(model):
        watched = model(**given).logits.detach()
    assert not torch.equal(watched, plain)  # gates followed the input
    value, _ = term(model, given)
    assert all(made.seen is None and not made.by_input for made in gates(model))
    assert torch.equal(model(**given).logits, plain)
    assert torch.allclose(term(copy.deepcopy(model), given)[0], value)


def test_checkpointed_blocks_give_the_same_slopes() -> None:
    found = []
    for checkpointing in (False, True):
        model, given = gated(), batch("vit")
        if checkpointing:
            model.base_model.model.activation_checkpointing_enable()
        term = Polarization()
        with tunesmith.step(model.train(), 9, 10):
            with term.watching(model):
                loss = model(**given).loss
            (loss + term(model, given)[0]).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*found, strict=True):
        assert plain is not None
        assert again is not None
        assert torch.allclose(plain, again, atol=1e-6)


def test_errors() -> None:
    bare = get_peft_model(tiny("vit"), tunesmith.adapter("ssf"))
    with pytest.raises(ModelError, match="add `polarization-subnet`"):
        Polarization()(bare, batch("vit"))
    with pytest.raises(ModelError, match="does something at every optimizer step"):
        Polarization()(gated().train(), batch("vit"))
    model = gated()
    term = Polarization()
    with torch.no_grad(), term.watching(model):
        model(**batch("vit"))
    with pytest.raises(ModelError, match="use_reentrant"):
        term(model, batch("vit"))
    assert Polarization.refusals({"over": "batch"}).keys() == {"gradient-accumulation"}
    assert not Polarization.refusals({"over": "recent"})
