"""DSnoT: the swaps against a plain loop over rows, what they keep, and every option."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.zoo import batch, checkpoint, same, tiny
from tunesmith import catalog
from tunesmith.compression.dsnot import DSnoT, expected_loss
from tunesmith.core.compression import parse_pattern, smallest
from tunesmith.core.layer import describe, read_weight
from tunesmith.core.modelmap import block_linears
from tunesmith.core.statedict import Checkpoint
from tunesmith.errors import CheckpointError, ModelError, RecipeError


def layer(seed: int, rows: int = 12, columns: int = 24) -> tuple[Tensor, dict[str, Tensor]]:
    """A random weight, and statistics of inputs whose means are not zero; two features are constant."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, columns, generator=g) * torch.rand(columns, generator=g) + torch.randn(columns, generator=g)
    x[:, 3], x[:, 7] = 1.5, 0.0
    found = {"input_mean": x.mean(0), "input_variance": x.var(0, unbiased=False), "input_square": (x**2).sum(0)}
    found["input_variance"][[3, 7]] = 0.0
    return torch.randn(rows, columns, generator=g), found


def first_mask(W: Tensor, found: dict[str, Tensor], sparsity: float, pattern: str | None) -> Tensor:
    group = parse_pattern(pattern) if pattern else None
    return smallest(W.abs() * found["input_square"].sqrt(), sparsity, group, "layer")


def by_hand(W: Tensor, pruned: Tensor, found: dict[str, Tensor], method: DSnoT) -> tuple[Tensor, list[int]]:
    """The card's algorithm, a row and a swap at a time."""
    result, counts = pruned.clone(), []
    v, p = found["input_variance"], method.variance_power
    wanda = W.abs() * found["input_square"].sqrt()
    for r in range(len(W)):
        c = W[r] * found["input_mean"]
        growable = [j for j in range(W.shape[1]) if pruned[r, j] and (p == 0 or v[j] > 0)]
        prunable = [j for j in range(W.shape[1]) if not pruned[r, j]]
        e = c[pruned[r]].sum()
        began, swaps = e.sign(), 0
        while swaps < method.cycles and abs(e) > method.threshold:
            s = e.sign()
            pairs = []
            for g in (j for j in growable if c[j] * s > 0):
                if method.group is None:
                    cut = [j for j in prunable if c[j] * s < 0]
                else:
                    cut = [j for j in prunable if j // method.group[1] == g // method.group[1]]
                if not cut:
                    continue
                low = min(cut, key=lambda j: wanda[r, j])
                if method.group is None or (c[g] - c[low]) * s > 0:
                    pairs.append((float(c[g].abs() / v[g] ** p), -g, low))
            if not pairs:
                break
            _, minus, low = max(pairs)
            after = e + c[low] - c[-minus]
            if method.sign_stop and after * began < 0:
                break
            result[r, -minus], result[r, low] = False, True
            growable.remove(-minus)
            prunable.remove(low)
            e, swaps = after, swaps + 1
        counts.append(swaps)
    return result, counts


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 999),
    sparsity=st.sampled_from([0.1, 0.5, 0.7, 0.95]),
    pattern=st.sampled_from([None, "2:4", "1:4", "4:8"]),
    power=st.sampled_from([0.0, 1.0, 0.5]),
    sign_stop=st.booleans(),
    cycles=st.sampled_from([1, 3, 50]),
    threshold=st.sampled_from([0.0, 0.05, 0.5]),
)
def test_swaps_are_those_of_the_plain_loop(
    seed: int, sparsity: float, pattern: str | None, power: float, sign_stop: bool, cycles: int, threshold: float
) -> None:
    W, found = layer(seed)
    chosen = {"pattern": pattern} if pattern else {"sparsity": sparsity}
    method = DSnoT(cycles=cycles, threshold=threshold, variance_power=power, sign_stop=sign_stop, **chosen)
    start = first_mask(W, found, sparsity, pattern)
    mask, swaps = method.refined(W, start, found)
    expected, counts = by_hand(W, start, found, method)
    assert torch.equal(mask, expected)
    assert swaps.tolist() == counts
    assert torch.equal(mask.sum(1), start.sum(1))
    if pattern:
        M = int(pattern[2:])
        assert torch.equal(mask.unflatten(1, (-1, M)).sum(-1), start.unflatten(1, (-1, M)).sum(-1))
    before, after = (expected_loss(W, m, found["input_mean"]) for m in (start, mask))
    if sign_stop:
        assert bool((after.abs() <= before.abs() + 1e-6).all())
        assert bool((after * before >= -1e-6).all())
    assert swaps.max() <= cycles


def test_swaps_happen_and_help() -> None:
    W, found = layer(0, rows=64, columns=96)
    start = first_mask(W, found, 0.5, None)
    mask, swaps = DSnoT().refined(W, start, found)
    before, after = (expected_loss(W, m, found["input_mean"]).abs().mean() for m in (start, mask))
    assert swaps.sum() > 64
    assert after < 0.5 * before


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2", "bert"])
@pytest.mark.parametrize("options", [{"sparsity": 0.3}, {"initial": "magnitude"}, {"pattern": "2:4"}], ids=str)
def test_sparsity_is_exact_in_every_row_and_survivors_keep_their_bits(family: str, options: dict) -> None:
    model, start = tiny(family), tiny(family)
    report = DSnoT(refine="all", **options)(model, [batch(family, seed=i) for i in range(2)])
    assert [row[0] for row in report.tables[0].rows] == block_linears(model)
    for name in block_linears(model):
        W, W0 = (read_weight(m.get_submodule(name), describe(m.get_submodule(name), name)) for m in (model, start))
        zero = W == 0
        assert torch.equal(W[~zero], W0[~zero])
        if "pattern" in options:
            assert torch.equal(zero.unflatten(1, (-1, 4)).sum(-1), torch.full((len(W), W.shape[1] // 4), 2))
        else:
            assert set(zero.sum(1).tolist()) == {int(W.shape[1] * options.get("sparsity", 0.5) + 1e-9)}
    figures = report.figures
    assert figures["swaps"] > 0
    assert figures["mean |e| after"] < figures["mean |e| before"]


def test_attention_is_refined_and_the_rest_is_the_first_mask() -> None:
    given = [batch("llama")]
    refined, plain = tiny("llama"), tiny("llama")
    report = DSnoT(initial="magnitude")(refined, given)
    DSnoT(initial="magnitude", threshold=1e9, refine="all")(plain, given)
    marked = {row[0]: (row[4], row[5]) for row in report.tables[0].rows}
    for name in block_linears(refined):
        attention = "self_attn" in name
        equal = torch.equal(refined.get_submodule(name).weight, plain.get_submodule(name).weight)
        assert marked[name] == (attention, 0 if equal else marked[name][1])
        assert attention or equal
    assert any(swaps for _, swaps in marked.values())


def test_later_blocks_see_pruned_ones() -> None:
    """Statistics from the dense model give another mask for the second block."""
    given = [batch("llama", rows=4)]
    model, dense = tiny("llama"), tiny("llama")
    DSnoT(sparsity=0.7)(model, given)
    with torch.no_grad():
        for name in block_linears(dense):
            if ".layers.0." in name:
                dense.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
    first = checkpoint(model)
    name = "model.layers.1.self_attn.q_proj"
    from tunesmith.core.stats import collect

    want = ("input_mean", "input_variance", "input_square")
    W = dense.get_submodule(name).weight.detach()
    masks = []
    for source in (dense, tiny("llama")):
        found = collect(source, [name], given, want=want)[name]
        start = smallest(W.abs() * found["input_square"].sqrt(), 0.7, None, name)
        masks.append(DSnoT(sparsity=0.7).refined(W, start, found)[0])
    assert torch.equal(first[f"{name}.weight"] == 0, masks[0])
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_given_mask_is_refined(family: str, tmp_path: Path) -> None:
    pruned = tiny(family)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in block_linears(pruned):
            module = pruned.get_submodule(name)
            module.weight[torch.rand(module.weight.shape, generator=g) < 0.4] = 0
    pruned.save_pretrained(tmp_path)
    model = tiny(family)
    report = DSnoT(mask_from=str(tmp_path), refine="all")(model, [batch(family)])
    assert report.figures["swaps"] > 0
    for name in block_linears(model):
        spec = describe(model.get_submodule(name), name)
        now, start = (read_weight(m.get_submodule(name), spec) == 0 for m in (model, pruned))
        assert torch.equal(now.sum(1), start.sum(1))
    untouched = tiny(family)
    DSnoT(mask_from=Checkpoint(pruned.state_dict()), refine="all", threshold=1e9)(untouched, [batch(family)])
    assert same(checkpoint(untouched), checkpoint(pruned))


def test_a_given_mask_that_does_not_fit_is_named() -> None:
    model = tiny("llama")
    before = checkpoint(model)
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(CheckpointError, match="no zeros"):
        DSnoT(mask_from=Checkpoint(before, "dense"))(model, [batch("llama")])
    with pytest.raises(CheckpointError, match=rf"some lacks the tensor '{name}'"):
        DSnoT(mask_from=Checkpoint({n: t for n, t in before.items() if n != name}, "some"))(model, [batch("llama")])
    with pytest.raises(CheckpointError, match=rf"'{name}' is \(4, 32\)"):
        DSnoT(mask_from=Checkpoint({**before, name: before[name][:4]}))(model, [batch("llama")])
    assert same(checkpoint(model), before)


def test_next_to_no_sparsity_is_the_identity() -> None:
    model = tiny("llama")
    before = checkpoint(model)
    report = DSnoT(sparsity=0.001)(model, [batch("llama")])
    assert same(checkpoint(model), before)
    assert report.figures["sparsity of the pruned layers"] == 0


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5])
def test_sparsity_outside_of_0_to_1_is_refused(sparsity: float) -> None:
    with pytest.raises(RecipeError, match="sparsity"):
        catalog.get("dsnot").validate({"sparsity": sparsity})
    with pytest.raises(RecipeError, match=r"'sparsity': Input should be (greater|less) than [01]"):
        DSnoT(sparsity=sparsity)


@pytest.mark.parametrize("pattern", ["4:4", "5:4", "0:4", "2-4", "half", "2:"])
def test_a_pattern_that_is_none_is_refused(pattern: str) -> None:
    with pytest.raises(RecipeError, match="pattern"):
        DSnoT(pattern=pattern)


def test_a_pattern_that_does_not_divide_is_named_and_nothing_changes() -> None:
    model = tiny("llama", intermediate_size=50)
    before = checkpoint(model)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.down_proj.* has 50 inputs.*groups of 4"):
        DSnoT(pattern="2:4")(model, [batch("llama")])
    assert same(checkpoint(model), before)


def test_two_masks_at_once_are_refused() -> None:
    with pytest.raises(RecipeError, match="one of"):
        DSnoT(sparsity=0.5, pattern="2:4")


def test_a_model_without_attention_says_what_to_do() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)

    with pytest.raises(ModelError, match="no attention projections to refine; set `refine` to 'all'"):
        DSnoT()(Plain(), [{"x": torch.ones(3, 4)}])
    assert DSnoT(refine="all")(Plain(), [{"x": torch.rand(3, 4)}]).figures["sparsity of the pruned layers"] == 0.5


@pytest.mark.parametrize(("columns", "sparsity", "count"), [(100, 0.29, 29), (10, 0.19, 1), (7, 0.5, 3)])
def test_counts_are_rounded_down_but_not_by_floating_point(columns: int, sparsity: float, count: int) -> None:
    assert smallest(torch.rand(3, columns), sparsity, None, "").sum(1).tolist() == [count] * 3


def test_ties_go_to_the_first() -> None:
    assert smallest(torch.ones(1, 4), 0.5, None, "").tolist() == [[True, True, False, False]]
    assert smallest(torch.ones(1, 4), 0.5, (1, 4), "").tolist() == [[True, True, True, False]]
