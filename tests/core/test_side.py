"""Side information: from a batch or a block around `generate` to the adapters that ask for it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import tunesmith
from tests.zoo import batch, tiny
from tunesmith import catalog
from tunesmith.core.adapter import Adapter, Below
from tunesmith.core.part import Part
from tunesmith.core.side import UNKNOWN, Context, Grouped, groups_of, indices
from tunesmith.errors import DataError


class Shift(Adapter):
    """Adds the row's group, times a trained number, to every output."""

    side = ("group",)

    def __init__(self, layer: object, *, groups: Sequence[str] = ("a", "b")) -> None:
        super().__init__(layer)  # type: ignore[arg-type]
        self.groups = tuple(groups)
        self.by = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, below: Below) -> Tensor:
        group = self.side_context.get("group", x.shape[0])
        add = 0.0 if group is None else (group * self.by).view(-1, *[1] * (x.dim() - 1))
        return below(x) + add


@pytest.fixture(params=[None, "CAUSAL_LM"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    real = catalog.get
    made = Part(slug="shift", room="adapters", module="", name="Shift", doc="", paper="")
    made.__dict__["target"] = Shift
    monkeypatch.setattr(catalog, "get", lambda slug, room=None: made if slug == "shift" else real(slug, room))
    # PEFT's forward pass takes another way for each.
    config = tunesmith.adapter("shift", target_modules=["lm_head"], task_type=request.param)
    return get_peft_model(tiny("llama"), config).eval()


def shifts(model: nn.Module, **given: Tensor) -> list[float]:
    with torch.no_grad():
        plain = model(**batch("llama")).logits
        found = model(**batch("llama"), **given).logits
    return (found - plain).mean((1, 2)).round().tolist()


def test_a_forward_pass_takes_it_as_a_keyword_and_forgets_it(model: nn.Module) -> None:
    assert shifts(model, group=torch.tensor([2, 5])) == [2.0, 5.0]
    assert shifts(model) == [0.0, 0.0]


def test_a_block_gives_it_to_whatever_runs_inside(model: nn.Module) -> None:
    plain = model(**batch("llama")).logits
    with tunesmith.side(model, group=torch.tensor([1, 3])):
        inside = model(**batch("llama")).logits
        named = model(**batch("llama"), group=torch.tensor([4, 4])).logits
        ids = batch("llama")["input_ids"]
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, num_beams=2)
    assert (inside - plain).mean((1, 2)).round().tolist() == [1.0, 3.0]
    assert (named - plain).mean((1, 2)).round().tolist() == [4.0, 4.0]
    assert out.shape[0] == 2
    assert torch.equal(model(**batch("llama")).logits, plain)


def test_copies_have_contexts_of_their_own(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    with tunesmith.side(other, group=torch.tensor([1, 1])):
        assert shifts(model) == [0.0, 0.0]
        plain = model(**batch("llama")).logits
        assert (other(**batch("llama")).logits - plain).mean().round() == 1.0


def test_beams_share_and_wrong_counts_are_refused() -> None:
    context = Context()
    context.values = {"group": torch.tensor([3, 4])}
    assert context.get("group", 4).tolist() == [3, 3, 4, 4]
    assert context.get("task", 4) is None
    with pytest.raises(DataError, match="2 entries; the batch has 3 rows"):
        context.get("group", 3)


def test_a_collator_with_groups(model: nn.Module) -> None:
    assert groups_of(model) == ("a", "b")
    assert groups_of(tiny("llama")) is None
    made = Grouped(lambda rows: {"n": len(rows)}, ("a", "b"))
    found = made([{"group": "b"}, {"group": "zebra"}, {}])
    assert found["n"] == 3
    assert found["group"].tolist() == [1, UNKNOWN, UNKNOWN]
    assert indices(("x",), ["x", None]).tolist() == [0, UNKNOWN]
