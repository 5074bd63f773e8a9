"""The compression contract, for every part of the room on every family of models."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import batch, checkpoint, logits, same, tiny
from tunesmith import catalog
from tunesmith.core.compression import Compressor, walk
from tunesmith.core.modelmap import block_linears
from tunesmith.core.part import Part
from tunesmith.core.stats import collect
from tunesmith.errors import TunesmithError

PARTS = pytest.mark.parametrize("part", catalog.in_room("compression"), ids=lambda p: p.slug)
ON = pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2", "bert", "t5", "vit"])


def made(part: Part, **options: object) -> Compressor:
    return part.target(**part.validate(options))


def batches(family: str, count: int = 2) -> list[dict[str, Tensor]]:
    return [batch(family, seed=i) for i in range(count)]


def padded(family: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same rows without padding and with tokens on the right that the mask leaves out."""
    plain = batch(family)
    n = len(plain["input_ids"])
    wide = {"input_ids": torch.cat([plain["input_ids"], torch.full((n, 4), 7)], 1)}
    wide["attention_mask"] = torch.cat([plain["attention_mask"], torch.zeros(n, 4, dtype=torch.long)], 1)
    return {"input_ids": plain["input_ids"], "attention_mask": plain["attention_mask"]}, wide


@ON
@PARTS
def test_names_shapes_and_dtypes_are_kept_and_the_model_still_runs(part: Part, family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(family).to(dtype).train()
        before = checkpoint(model)
        given = [{n: t.to(dtype) if t.is_floating_point() else t for n, t in b.items()} for b in batches(family)]
        report = made(part)(model, given)
        after = checkpoint(model)
        assert {n: (t.shape, t.dtype) for n, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
        assert not same(before, after)
        assert model.training
        assert bool(logits(model, given[0]).isfinite().all())
        assert json.dumps(report.to_json(), allow_nan=False)
        assert report.tables


@PARTS
def test_only_linear_layers_in_the_blocks_change(part: Part) -> None:
    model = tiny("llama")
    before = checkpoint(model)
    made(part)(model, batches("llama"))
    changed = {n for n, t in checkpoint(model).items() if not torch.equal(t, before[n])}
    assert changed == {f"{name}.weight" for name in block_linears(model)}


@PARTS
def test_the_same_data_gives_the_same_model_and_leaves_no_trace(part: Part) -> None:
    first, second = tiny("llama"), tiny("llama")
    torch.manual_seed(1)
    made(part)(first, batches("llama"))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    made(part)(second, batches("llama"))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(checkpoint(first), checkpoint(second))
    for module in second.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__
    assert second.config.use_cache
    assert all(p.requires_grad and p.grad is None for p in second.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "opt"])
@PARTS
def test_padding_is_left_out(part: Part, family: str) -> None:
    models = []
    for given in padded(family):
        models.append(tiny(family))
        made(part)(models[-1], [given])
    assert same(*map(checkpoint, models))


@PARTS
def test_rows_may_come_in_any_number_of_batches(part: Part) -> None:
    whole = batch("llama", rows=4)
    parts = [{n: t[i : i + 2] for n, t in whole.items()} for i in (0, 2)]
    models = [tiny("llama"), tiny("llama")]
    made(part)(models[0], [whole])
    made(part)(models[1], parts)
    agree = [torch.equal(a == 0, b == 0) for a, b in zip(*(m.state_dict().values() for m in models), strict=True)]
    assert all(agree)


@PARTS
def test_no_data_and_broken_weights_are_clear_and_change_nothing(part: Part) -> None:
    model = tiny("llama")
    before = checkpoint(model)
    with pytest.raises(TunesmithError, match="at least one batch"):
        made(part)(model, [])
    empty = {n: t * 0 if n == "attention_mask" else t for n, t in batch("llama").items()}
    with pytest.raises(TunesmithError, match="saw no tokens"):
        made(part)(model, [empty])
    assert same(checkpoint(model), before)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    before = checkpoint(model)
    with pytest.raises(TunesmithError, match=r"model\.layers\.1\.mlp\.down_proj.*not finite"):
        made(part)(model, batches("llama"))
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, before["model.layers.0.mlp.down_proj.weight"])


DEEP = {
    "llama": {"num_hidden_layers": 4},
    "gpt2": {"n_layer": 4},
    "opt": {"num_hidden_layers": 4},
    "bert": {"num_hidden_layers": 4},
    "t5": {"num_layers": 3, "num_decoder_layers": 3},
    "vit": {"num_hidden_layers": 4},
}


@pytest.mark.parametrize("family", list(DEEP))
def test_walk_gives_each_block_what_the_changed_blocks_before_it_make(family: str) -> None:
    """Against whole forward passes through the model as it is at that moment."""
    model, given = tiny(family, **DEEP[family]), batches(family)
    seen = []
    for number, block in enumerate(walk(model, given)):
        want = ("input_mean", "input_variance", "input_square", "tokens")
        found = block.statistics(want)
        expected = collect(model, list(block.linears), given, want=want)
        for name in block.linears:
            for statistic in want:
                assert torch.allclose(found[name][statistic], expected[name][statistic], atol=1e-6), name
        with torch.no_grad():
            for name in block.linears:
                model.get_submodule(name).weight.mul_(0.3 + 0.2 * number)
        seen += block.linears
    assert seen == block_linears(model)


def test_walk_runs_every_block_twice_per_batch() -> None:
    model, given = tiny("llama", num_hidden_layers=6), batches("llama", 3)
    calls = [0] * 6
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    for block in walk(model, given):
        block.statistics(("input_mean",))
        block.statistics(("input_mean",))
    assert calls == [9] * 5 + [6]


def test_walk_of_a_model_without_blocks_is_one_step() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    (block,) = walk(Plain(), [{"x": torch.ones(5, 4)}])
    assert (block.name, block.linears) == ("", ("first",))
    assert torch.equal(block.statistics(("input_square",))["first"]["input_square"], torch.full((4,), 5.0))


def test_an_abandoned_walk_leaves_the_model_as_it_was() -> None:
    model = tiny("llama")
    expected = logits(copy.deepcopy(model), batch("llama"))
    for block in walk(model, batches("llama")):
        block.statistics(("input_mean",))
        break
    assert torch.equal(logits(model, batch("llama")), expected)
    assert model.config.use_cache
