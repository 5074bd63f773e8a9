"""LiNeS: the factor of every tensor, and where it is read from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.zoo import tiny
from tunesmith.core.merging import Judges, merged
from tunesmith.core.modelmap import depths
from tunesmith.core.statedict import Checkpoint
from tunesmith.errors import CheckpointError, RecipeError
from tunesmith.merging.lines import Lines
from tunesmith.merging.model_soups import ModelSoups


def named(*names: str, by: float = 0.0) -> Checkpoint:
    g = torch.Generator().manual_seed(0)
    return Checkpoint({name: torch.randn(3, generator=g) + by for name in names})


def factors(base: Checkpoint, **options: object) -> dict[str, float]:
    """The factor that each tensor's change was multiplied by."""
    tuned = Checkpoint({name: base[name] + 1 for name in base})
    result = merged(Lines(**options), [tuned], base)
    return {name: round(float((result[name] - base[name]).mean()), 3) for name in base}


def test_factors_of_four_blocks() -> None:
    base = named("embed.weight", *(f"blocks.{i}.w" for i in range(4)), "norm.weight", "head.weight")
    got = factors(base, form="multi-task", alpha=0.2, beta=0.8)
    assert list(got.values()) == [0.2, 0.2, 0.467, 0.733, 1.0, 0.2, 0.2]


def test_inner_numbers_are_not_depths() -> None:
    """The released code takes the smallest number in the name: block 7 would be scaled as block 0."""
    base = named(*(f"blocks.{i}.mlp.{j}.weight" for i in range(8) for j in (0, 2)))
    got = factors(base, gamma=0.3)
    released = {name: 0.3 + 0.7 * min(int(w) for w in name.split(".") if w.isdigit()) / 7 for name in base}
    assert got["blocks.7.mlp.0.weight"] == got["blocks.7.mlp.2.weight"] == 1.0
    assert released["blocks.7.mlp.0.weight"] == pytest.approx(0.3)
    assert released["blocks.7.mlp.2.weight"] == pytest.approx(0.5)
    assert got["blocks.0.mlp.2.weight"] == 0.3


def test_each_stack_of_an_encoder_decoder_has_its_own_depth() -> None:
    base = Checkpoint(tiny("t5", num_layers=3, num_decoder_layers=2).state_dict())
    place = depths(base)
    for name, factor in factors(base, gamma=0.4).items():
        d = place[name]
        expected = 0.4 if d is None else 0.4 + 0.6 * d.index / ((3 if d.stack == "encoder.block" else 2) - 1)
        assert factor == pytest.approx(expected, abs=2e-3)


def test_a_single_block_is_the_last_one() -> None:
    assert factors(named("blocks.0.w", "head.weight"), gamma=0.25) == {"blocks.0.w": 1.0, "head.weight": 0.25}


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no numbered blocks"):
        factors(named("fc1.weight", "fc2.weight"), gamma=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neutral_settings_are_exact(dtype: torch.dtype) -> None:
    base = Checkpoint({n: t.to(dtype) for n, t in tiny("llama").state_dict().items()})
    tuned = Checkpoint({n: t.to(dtype) for n, t in tiny("llama", seed=1).state_dict().items()})
    for options in ({"gamma": 1.0}, {"form": "multi-task", "alpha": 1.0, "beta": 0.0}):
        assert all(torch.equal(t, tuned[n]) for n, t in merged(Lines(**options), [tuned], base).items())
    zero = merged(Lines(form="multi-task", alpha=0.0, beta=0.0), [tuned], base)
    assert all(torch.equal(t, base[n]) for n, t in zero.items())


def test_beta_of_zero_is_uniform_scaling() -> None:
    base, tuned = Checkpoint(tiny("llama").state_dict()), Checkpoint(tiny("llama", seed=1).state_dict())
    got = merged(Lines(form="multi-task", alpha=0.3, beta=0.0), [tuned], base)
    for name in base:
        assert torch.allclose(got[name], base[name] + 0.3 * (tuned[name] - base[name]), atol=1e-6)


def tasks(count: int) -> tuple[Checkpoint, list[Checkpoint]]:
    base = tiny("llama").state_dict()
    made = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        made.append(Checkpoint({n: t + torch.randn(t.shape, generator=g) for n, t in base.items()}))
    return Checkpoint(base), made


def test_alpha_of_one_task_is_one() -> None:
    base, (task,) = tasks(1)
    method = Lines(form="multi-task", beta=0.5)
    merged(method, [task, task], base)
    assert method.record()["alpha"] == pytest.approx(1.0, abs=1e-9)


def test_alpha_by_norms_over_a_merge_of_tasks() -> None:
    """Behind the mean of n tasks alpha is 1; behind half of their sum it is 2 / n."""
    base, made = tasks(3)
    method = Lines(form="multi-task", beta=0.5)
    result = merged(method, [merged(ModelSoups(), made), *made], base)
    assert method.record()["alpha"] == pytest.approx(1.0, abs=1e-6)
    half = Checkpoint({n: base[n] + sum(m[n] - base[n] for m in made) / 2 for n in base})
    merged(method, [half, *made], base)
    assert method.record()["alpha"] == pytest.approx(2 / 3, abs=1e-6)
    name = "model.layers.1.mlp.up_proj.weight"
    mean = torch.stack([m[name] for m in made]).mean(0)
    assert torch.allclose(result[name], base[name] + 1.5 * (mean - base[name]), atol=1e-5)


def test_the_grid_is_searched_by_score_and_recorded() -> None:
    base, (task,) = tasks(1)
    embedding = "model.embed_tokens.weight"
    wanted = base[embedding] + 0.7 * (task[embedding] - base[embedding])

    def score(state: dict[str, Tensor]) -> float:
        return -float((state[embedding] - wanted).abs().max())

    method = Lines()
    merged(method, [task], base, Judges(score=score))
    assert method.record()["alpha"] == 0.7
    assert method.record()["beta"] == pytest.approx(0.3)
    assert len(method.record()["scores"]) == 11
    last = "model.layers.1.mlp.up_proj.weight"
    wanted_last = base[last] + 0.9 * (task[last] - base[last])
    method = Lines(form="multi-task", alpha=0.5)
    merged(method, [task, task], base, Judges(score=lambda s: -float((s[last] - wanted_last).abs().max())))
    assert (method.record()["alpha"], method.record()["beta"]) == (0.5, 0.4)


def test_options_of_the_other_form_are_refused() -> None:
    with pytest.raises(RecipeError, match="belong to the multi-task form"):
        Lines(gamma=0.5, beta=0.5)
    with pytest.raises(RecipeError, match="belongs to the single-task form"):
        Lines(form="multi-task", gamma=0.5)


def test_the_multi_task_form_needs_the_tasks_or_alpha() -> None:
    base, (task,) = tasks(1)
    with pytest.raises(CheckpointError, match="give them after the merged model, or set `alpha`"):
        merged(Lines(form="multi-task", beta=0.5), [task], base)
    with pytest.raises(CheckpointError, match="does not differ"):
        merged(Lines(form="multi-task", beta=0.5), [base, task], base)
