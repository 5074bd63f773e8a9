"""What is special to TriAdaptLoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import tunesmith
from tests.train.conftest import data_file, model_folder, recipe  # noqa: F401
from tests.train.resuming import resumed, weights
from tests.zoo import batch, logits, same, tiny
from tunesmith.adapters.triadaptlora import TriAdaptLoRA, allocation
from tunesmith.core.adapter import Step
from tunesmith.core.layer import describe
from tunesmith.errors import RecipeError, TunesmithError
from tunesmith.recipe import load
from tunesmith.train import run

WIDE = {"initializer_range": 0.3}
BRISK: dict[str, Any] = {"reference_rank": 4, "warmup": 2, "interval": 2}
TOTAL = 30


def adapted(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(tiny("llama", **WIDE), tunesmith.adapter("triadaptlora", **{**BRISK, **options}))


def layers(model: nn.Module) -> list[TriAdaptLoRA]:
    return [m for m in model.modules() if isinstance(m, TriAdaptLoRA)]


def alone(**options: Any) -> TriAdaptLoRA:
    torch.manual_seed(0)
    return TriAdaptLoRA(describe(nn.Linear(7, 5), "layer"), **options)


def filled(made: TriAdaptLoRA) -> TriAdaptLoRA:
    """With a core that is not zero, as after some training."""
    g = torch.Generator().manual_seed(1)
    used = made.sizes[made.blocks - 1]
    with torch.no_grad():
        for p in (made.lower, made.upper):
            p[:used] = torch.randn(used, generator=g)
        for p in (made.A[: made.current], made.B[:, : made.current]):
            p.copy_(torch.randn(p.shape, generator=g))
    made.importance = made._norm() / made.blocks
    return made


def ranks(model: nn.Module) -> list[int]:
    return [made.current for made in layers(model)]


def train(model: nn.Module, steps: range, each: Callable[[int], None] = lambda t: None) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for t in steps:
        with tunesmith.step(model.train(), t, TOTAL):
            each(t)
            model(**batch("llama", seed=t)).loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    return model


# The core ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "stored"), [([4] * 4, 320), ([1] * 16, 272), ([16], 512), ([1, 3, 3, 2], 2 * (1 + 12 + 21 + 18))]
)
def test_the_core_is_laid_out_in_blocks(sizes: list[int], stored: int) -> None:
    """Against blocks put together one by one."""
    first, *more = sizes
    made = alone(init_rank=first, reference_rank=first, max_rank=sum(sizes), increment=more[0] if more else 1)
    assert made.lower.numel() + made.upper.numel() == stored
    with torch.no_grad():
        made.lower.copy_(torch.arange(1.0, made.lower.numel() + 1))
        made.upper.copy_(-100 * torch.arange(1.0, made.upper.numel() + 1))
    low, up = made.lower.detach(), made.upper.detach()
    expected = torch.zeros(0, 0)
    for i, size in enumerate(sizes):
        if i:
            made._grow(torch.Generator())
            with torch.no_grad():  # growth starts the new block at zero and rescales: put the numbers back
                made.lower.copy_(low := torch.arange(1.0, low.numel() + 1))
                made.upper.copy_(up := -100 * torch.arange(1.0, up.numel() + 1))
        end = len(expected) + size
        whole = torch.zeros(end, end)
        whole[: end - size, : end - size] = expected
        start = sum(s * sum(sizes[: k + 1]) for k, s in enumerate(sizes[:i]))
        whole[end - size :, :] += low[start : start + size * end].view(size, end)
        whole[:, end - size :] += up[start : start + size * end].view(size, end).T
        expected = whole
        assert torch.equal(made.core(), expected)
        assert made.current == end


def test_only_the_grown_part_has_gradients_and_moves() -> None:
    made = filled(alone(init_rank=2, reference_rank=4, increment=3))
    x = torch.randn(4, 7)
    (x @ made.weight(torch.randn(5, 7)).T).square().sum().backward()
    used = made.sizes[0]
    for p, grown in ((made.lower, made.lower[:used]), (made.upper, made.upper[:used]), (made.A, made.A[:2])):
        assert p.grad is not None
        assert int((p.grad != 0).sum()) == grown.numel()
        assert not p.detach().flatten()[grown.numel() :].any()
    assert int((made.B.grad != 0).sum()) == 5 * 2


def test_something_learns_in_the_first_step() -> None:
    for start in ("zero-core", "identity-core"):
        made = alone(start=start)
        (torch.randn(4, 7) @ made.weight(torch.randn(5, 7)).T).square().sum().backward()
        moving = {n for n, p in made.named_parameters() if bool(p.grad.any())}
        assert moving == ({"lower", "upper"} if start == "zero-core" else {"B"})


# Growth --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["zero-core", "identity-core"])
def test_growth_keeps_the_function(start: str) -> None:
    made = filled(alone(init_rank=1, reference_rank=6, increment=2, start=start))
    before = made.delta().detach()
    while made.blocks < len(made.ends):
        made._grow(torch.Generator().manual_seed(0))
        assert torch.allclose(made.delta(), before, atol=1e-6 * float(before.abs().max()))
    assert made.current == 12
    assert float(made.A[1:].detach().std()) == pytest.approx(0.02, rel=0.3)


def test_the_released_scale_halves_the_change() -> None:
    made = filled(alone(init_rank=1, reference_rank=2, increment=1, rescale_on_growth=False))
    before = made.delta()
    made._grow(torch.Generator().manual_seed(0))
    assert torch.allclose(made.delta(), before / 2)


@pytest.mark.parametrize("start", ["zero-core", "identity-core"])
def test_growing_is_no_importance(start: str) -> None:
    """A layer that grew and learned nothing since has moved by nothing; as released, it has lost half of its norm."""
    made = filled(alone(init_rank=2, reference_rank=4, increment=1, start=start))
    norm = made._norm()
    made._grow(torch.Generator())
    assert torch.allclose(made.importance, made._norm() / 2)
    if start == "zero-core":
        assert torch.allclose(made._norm(), 1.5 * norm)
    released = filled(alone(init_rank=2, reference_rank=4, increment=1, rescale_on_growth=False))
    released._grow(torch.Generator())
    assert torch.allclose(released.importance, norm)
    assert torch.allclose(released._norm() / 2 - released.importance, -norm / 2)


@pytest.mark.parametrize(("growth", "t", "expected"), [("linear", 4, 3), ("exponential", 10, 2), ("fixed", 4, 2)])
def test_as_many_layers_grow_as_the_formula_says(growth: str, t: int, expected: int) -> None:
    """14 layers of rank 1 and a budget of 56: 42 x 2 / 28 = 3; 42^(8 / 28) = 2.91; 2 as given."""
    model = adapted(growth=growth, top_k=2)
    assert len(layers(model)) == 14
    TriAdaptLoRA.begin(layers(model), Step(t, TOTAL))
    assert sum(r > 1 for r in ranks(model)) == expected


def test_the_layers_whose_core_moved_most_grow() -> None:
    """By what their norm over their blocks has gained, whatever it was; two blocks at half of the gain of one."""
    model = adapted(reference_rank=6, increment=1)
    gains = {1: 2.0, 4: 3.0, 7: 1.5, 9: 1.4, 10: -0.5, 12: 2.0}
    with torch.no_grad():
        for i, made in enumerate(layers(model)):
            made.lower[0] = 10.0 if i in (10, 13) else 1.0
            if i == 12:
                made._grow(torch.Generator())
            before = made._norm()
            made.importance = before / made.blocks
            made.lower *= 1 + gains.get(i, 0.1) / before
    TriAdaptLoRA.begin(layers(model), Step(4, TOTAL))  # a gap of 69 times 2 / 28 = 4 layers
    assert {i for i, r in enumerate(ranks(model)) if r > 1} == {1, 4, 7, 9, 12}
    assert layers(model)[12].current == 2, "it grew in this test and not by what it gained"


@pytest.mark.parametrize("growth", ["linear", "exponential", "fixed"])
def test_the_total_rank_only_rises_and_ends_in_the_budget(growth: str) -> None:
    model = adapted(growth=growth, top_k=4)
    seen: list[int] = []
    train(model, range(TOTAL), lambda t: seen.append(sum(ranks(model))))
    n, a = len(layers(model)), 2
    assert seen == sorted(seen)
    assert seen[:4] == [n] * 4, "not before the warm-up is over"
    assert 4 * n <= seen[-1] <= 4 * n + a * n - 1
    changes = [t for t in range(1, TOTAL) if seen[t] != seen[t - 1]]
    assert all(t % 2 == 0 for t in changes)
    assert len(changes) > 2


def test_a_full_layer_stays_as_it_is() -> None:
    model = adapted(max_rank=4, reference_rank=4, increment=2)
    train(model, range(TOTAL))
    assert ranks(model) == [4] * len(layers(model))


def test_what_grows_is_drawn_by_seed_and_block_alone() -> None:
    first, second, other = alone(), alone(), alone(seed=1)
    torch.manual_seed(7)
    for made in (first, second, other):
        TriAdaptLoRA.begin([made], Step(10, TOTAL))
        assert made.current == 5
        torch.randn(3)
    assert torch.equal(first.A, second.A)
    assert torch.equal(first.B, second.B)
    assert torch.equal(first.A[:1], other.A[:1])
    assert not torch.isclose(first.A[1:5], other.A[1:5]).any()


def test_wrong_ranks_and_an_unknown_length_are_clear_errors() -> None:
    with pytest.raises(RecipeError, match="found 9, 8 and 16"):
        alone(init_rank=9)
    with pytest.raises(RecipeError, match="found 1, 8 and 7"):
        alone(max_rank=7)
    model = adapted()
    with pytest.raises(TunesmithError, match=r"triadaptlora follows a schedule.*total=STEPS"), tunesmith.step(model, 0):
        pass


# The orthogonality term ----------------------------------------------------------------------------------------------


def test_the_term_is_the_mean_over_the_grown_parts() -> None:
    found = []
    for gamma in (0.0, 0.8):
        model = adapted(orthogonality=gamma)
        for made in layers(model)[::2]:
            made._grow(torch.Generator().manual_seed(0))
        with tunesmith.step(model.train(), 0, TOTAL):
            for _ in range(2):
                model(**batch("llama")).loss.backward()
            found.append([(made.A.grad, made.B.grad) for made in layers(model)])
    for made in layers(model):
        made.A.grad = made.B.grad = None
    n = 2 * len(layers(model))
    (0.8 * sum(made.orthogonality() for made in layers(model)) / n).backward()
    assert layers(model)[0].A.grad[5:].abs().max() == 0
    for made, plain, added in zip(layers(model), *found, strict=True):
        for p, without, with_ in zip((made.A, made.B), plain, added, strict=True):
            assert torch.allclose(with_ - without, p.grad, atol=1e-5)
    made = layers(model)[0]
    A, B = made.A[: made.current], made.B[:, : made.current]
    eye = torch.eye(made.current)
    assert torch.allclose(made.orthogonality(), torch.linalg.norm(A @ A.T - eye) + torch.linalg.norm(B.T @ B - eye))


def test_outside_of_a_step_nothing_is_added() -> None:
    model = adapted()
    with tunesmith.step(model.train(), 0, TOTAL):
        pass
    model(**batch("llama")).loss.backward()
    assert not any(made.A.grad.any() for made in layers(model)), "the core is zero, so that only the term has a slope"


# Saving and resuming -------------------------------------------------------------------------------------------------


def test_saved_and_loaded_with_what_has_grown(tmp_path: Path) -> None:
    model, given = train(adapted(), range(TOTAL)), batch("llama")
    assert len(set(ranks(model))) > 1
    model.save_pretrained(tmp_path / "own")
    loaded = PeftModel.from_pretrained(tiny("llama", **WIDE), tmp_path / "own")
    assert ranks(loaded) == ranks(model)
    assert torch.equal(logits(loaded, given), logits(model, given))
    assert ranks(copy.deepcopy(model)) == ranks(model)
    tunesmith.export_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny("llama", **WIDE), tmp_path / "lora")
    assert torch.allclose(logits(plain, given), logits(model, given), atol=1e-5)
    for name, rank in allocation(model).items():
        assert plain.base_model.model.get_submodule(name).lora_A["default"].weight.shape[0] == rank


FIELDS: dict[str, Any] = {
    "adapters": [{"name": "triadaptlora", "reference_rank": 4, "warmup": 1, "interval": 2}],
    "train.learning_rate": 1e-2,
}


@pytest.mark.parametrize("at", [3, 5])
def test_stopped_and_resumed_is_bitwise_the_same(
    at: int,
    recipe: Callable[..., dict[str, Any]],  # noqa: F811
    tmp_path: Path,
) -> None:
    """The step after the checkpoint (2 or 4) is one at which layers grow."""
    fields = recipe(**FIELDS)
    run(None, **fields)
    expected = weights(fields["output"])
    assert len({int(value) for name, value in expected.items() if name.endswith("grown")}) > 1
    assert same(resumed(fields, tmp_path / "stopped", at), expected)


def test_what_it_refuses() -> None:
    for more, why in (
        ({"regularisers": [{"name": "orthogonality", "weight": 0.1}]}, "adds that term itself"),
        ({"optimizer": "mezo", "train": {"max_grad_norm": 0.0}}, "set it to 0"),
    ):
        with pytest.raises(RecipeError, match=why):
            load({"adapters": ["triadaptlora"], **more}).check()
        load({"adapters": [{"name": "triadaptlora", "orthogonality": 0}], **more}).check()


def test_any_tensor_of_a_step_is_of_the_same_shape_throughout() -> None:
    model = adapted()
    shapes = {n: p.shape for n, p in model.named_parameters()}
    held: dict[str, Tensor] = dict(model.named_parameters())
    train(model, range(TOTAL))
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
    assert all(p is held[n] for n, p in model.named_parameters())
