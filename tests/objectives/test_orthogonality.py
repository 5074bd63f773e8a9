"""What is special to the orthogonality term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

import tunesmith
from tests.contracts.test_objectives import laid_out, rows
from tests.zoo import batch, tiny
from tunesmith.adapters.adalora import AdaLoRA
from tunesmith.errors import ModelError, RecipeError
from tunesmith.objectives.orthogonality import Orthogonality
from tunesmith.recipe import load


def apart(A: Tensor, B: Tensor) -> Tensor:
    eye = torch.eye(len(A), dtype=A.dtype)
    return (A @ A.T - eye).square().sum() + (B.T @ B - eye).square().sum()


def value(model: nn.Module, family: str = "llama") -> Tensor:
    return Orthogonality()(model, batch(family))[0]


def test_of_peft_lora_on_every_kind_of_layer() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.linear = nn.Embedding(9, 4), nn.Linear(4, 6)
            self.conv = nn.Conv2d(3, 5, 2)

    config = LoraConfig(r=2, target_modules=["table", "linear", "conv"], init_lora_weights=False)
    model = get_peft_model(Layers(), config)
    held = model.base_model.model
    expected = apart(held.table.lora_embedding_A["default"], held.table.lora_embedding_B["default"])
    expected = expected + apart(held.linear.lora_A["default"].weight, held.linear.lora_B["default"].weight)
    expected = expected + apart(
        held.conv.lora_A["default"].weight.flatten(1), held.conv.lora_B["default"].weight.flatten(1)
    )
    assert torch.allclose(value(model), expected)


def test_of_peft_adalora() -> None:
    config = AdaLoraConfig(init_r=3, target_r=2, total_step=9, tinit=1, tfinal=1, target_modules=["q_proj"])
    model = get_peft_model(tiny("llama"), config)
    held = [m for m in model.modules() if hasattr(m, "lora_E")]
    assert torch.allclose(value(model), sum(apart(m.lora_A["default"], m.lora_B["default"]) for m in held))


@pytest.mark.parametrize("slug", ["adalora", "triadaptlora"])
def test_of_ours_only_what_is_switched_on(slug: str) -> None:
    model = get_peft_model(tiny("llama"), tunesmith.adapter(slug, orthogonality=0))
    found = sum(made.orthogonality() for made in model.modules() if hasattr(made, "orthogonality"))
    model.add_adapter("second", tunesmith.adapter(slug, orthogonality=0))
    assert torch.allclose(value(model), found)


@pytest.mark.parametrize("slug", ["adalora", "triadaptlora"])
def test_twice_is_refused(slug: str) -> None:
    model = get_peft_model(tiny("llama"), tunesmith.adapter(slug))
    with pytest.raises(ModelError, match=r"adds this term itself; set its option orthogonality to 0"):
        value(model)
    with torch.no_grad():
        assert float(value(model)) > 0  # to look at it is allowed
    with pytest.raises(RecipeError, match="adds that term itself"):
        load({"adapters": [slug], "regularisers": [{"name": "orthogonality"}]}).check()


def test_what_has_no_factors_is_refused() -> None:
    with pytest.raises(ModelError, match="no adapter on this model has factors"):
        value(get_peft_model(tiny("llama"), tunesmith.adapter("ssf")))
    with pytest.raises(RecipeError, match="there is no adapter"):
        load({"method": "full", "regularisers": [{"name": "orthogonality"}]}).check()


def test_named_or_added_by_the_adapter_is_the_same() -> None:
    """Over three steps of two micro-batches with labels of different numbers."""
    pieces = [laid_out(rows()[:2], "right"), laid_out(rows()[2:], "right")]
    term, trained = Orthogonality(), []
    total = torch.stack([term.count(piece) for piece in pieces]).sum()
    for own in (0.3, 0.0):
        torch.manual_seed(0)
        options: dict[str, Any] = {"init_rank": 3, "target_rank": 2, "orthogonality": own}
        model = get_peft_model(tiny("llama"), tunesmith.adapter("adalora", **options))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for t in range(3):
            with tunesmith.step(model.train(), t, 3):
                for piece in pieces:
                    loss = model(**piece).loss
                    if not own:
                        loss = loss + 0.3 * term(model, piece, total)[0]
                    loss.backward()
                optimizer.step()
            optimizer.zero_grad()
        trained.append([p.detach() for m in model.modules() if isinstance(m, AdaLoRA) for p in (m.A, m.B, m.E)])
    for one, other in zip(*trained, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_without_labels_rows_count() -> None:
    given = batch("vit", rows=3)
    assert int(Orthogonality().count(given)) == 3
    assert int(Orthogonality().count({"pixel_values": given["pixel_values"]})) == 3
