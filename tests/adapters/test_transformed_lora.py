"""What is special to TLoRA."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import tunesmith
from tests.zoo import batch, logits, tiny
from tunesmith.adapters.transformed_lora import TransformedLoRA, near_equal, penalty
from tunesmith.core.adapter import stacked
from tunesmith.core.layer import describe
from tunesmith.errors import ModelError, RecipeError


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fresh(into: int = 12, out: int = 8, **options: Any) -> tuple[nn.Linear, TransformedLoRA]:
    layer = nn.Linear(into, out)
    return layer, TransformedLoRA(describe(layer, "layer"), **options)


def moved(into: int = 12, out: int = 8, **options: Any) -> tuple[nn.Linear, TransformedLoRA]:
    layer, made = fresh(into, out, **options)
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.add_(0.3 * random(*p.shape, seed=i))
    return layer, made


def entry(cores: list[Tensor], index: list[int]) -> Tensor:
    """The trace of one product of matrices."""
    product = torch.eye(cores[0].shape[-1])
    for core, i in zip(cores, index, strict=True):
        product = product @ core[i]
    return product.trace()


def by_hand(made: TransformedLoRA) -> tuple[Tensor, Tensor]:
    """T and the residual, entry by entry, the last index running fastest."""
    out_features, in_features = made.layer.shape
    inputs = list(itertools.product(*(range(n) for n in made.in_shape)))
    T, D = torch.eye(in_features), torch.zeros(out_features, in_features)
    if made.transform_rank:
        flat = [core.detach().flatten(0, 1) for core in made.cores]
        for (i, at), (j, to) in itertools.product(enumerate(inputs), enumerate(inputs)):
            T[i, j] = entry(flat, [a * n + b for a, b, n in zip(at, to, made.in_shape, strict=True)])
    if made.residual == "lora":
        D = (made.left[0] @ made.right[0]).detach()
    elif made.residual == "tensor-ring":
        cores = [core.detach() for core in (*made.left, *made.right)]
        outputs = itertools.product(*(range(len(core)) for core in made.left))
        for (o, at), (j, to) in itertools.product(enumerate(outputs), enumerate(inputs)):
            D[o, j] = entry(cores, [*at, *to])
    return T, D


@pytest.mark.parametrize("residual", ["tensor-ring", "lora", "none"])
@pytest.mark.parametrize("transform_rank", [0, 1, 2, 3])
@pytest.mark.parametrize("in_shape", [[12], [3, 4], [2, 3, 2], [2, 2, 1, 3]])
def test_weight_and_output_are_those_of_the_definition(residual: str, transform_rank: int, in_shape: list[int]) -> None:
    if residual == "none" and not transform_rank:
        return
    options: dict[str, Any] = {"rank": 3, "alpha": 5.0, "shapes": {12: in_shape, 8: [2, 4]}}
    layer, made = moved(residual=residual, transform_rank=transform_rank, **options)
    T, D = by_hand(made)
    wanted = layer.weight.detach() @ T + 5 / 3**0.5 * D
    assert torch.allclose(made.weight(layer.weight), wanted, atol=1e-5)
    assert torch.allclose(made.transform(), T, atol=1e-5)
    for shape in ((12,), (5, 12), (2, 3, 12), (0, 12)):
        x = random(*shape)
        out = made(x, stacked(layer, made.layer, []))
        assert out.shape == (*shape[:-1], 8)
        assert torch.allclose(out, x @ wanted.T + layer.bias, atol=1e-4)
        assert torch.allclose(made.apply_transform(x), x @ T.T, atol=1e-5)
        assert torch.allclose(made.apply_transform(x, transposed=True), x @ T, atol=1e-5)


def test_scale_without_rslora() -> None:
    _, made = fresh(rank=4, alpha=3.0, rslora=False)
    assert made.scaling == pytest.approx(3 / 4)
    assert fresh(rank=4, alpha=3.0)[1].scaling == pytest.approx(3 / 2)


@given(n=st.integers(1, 400), dims=st.integers(2, 4))
@settings(max_examples=60, deadline=None)
def test_near_equal_factors_have_the_smallest_squares(n: int, dims: int) -> None:
    factors = near_equal(n, dims)
    assert math.prod(factors) == n
    assert list(factors) == sorted(factors)
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    every = (c for c in itertools.combinations_with_replacement(divisors, dims) if math.prod(c) == n)
    assert sum(f * f for f in factors) == min(sum(f * f for f in c) for c in every)


@pytest.mark.parametrize(
    ("n", "factors"), [(640, (8, 8, 10)), (768, (8, 8, 12)), (1280, (8, 10, 16)), (2048, (8, 16, 16))]
)
def test_factors_of_the_papers_sizes(n: int, factors: tuple[int, ...]) -> None:
    assert near_equal(n, 3) == factors


def test_counts() -> None:
    _, made = fresh(640, 1280, rank=3, transform_rank=2)
    ring = (8 + 8 + 10 + 8 + 10 + 16) * 3**2
    assert made.trainable_count() == (64 + 64 + 100) * 2**2 + ring
    assert fresh(640, 1280, rank=3, residual="lora")[1].trainable_count() == 228 + 3 * (640 + 1280)


def test_prime_inputs_are_refused_unless_the_matrix_is_wanted() -> None:
    with pytest.raises(ModelError, match=r"'layer' has 13 inputs, a prime.*`shapes=\{13: \[13\]\}`"):
        fresh(13, 8)
    with pytest.raises(ModelError, match="a prime"):
        fresh(13, 8, shapes={8: [2, 4]})
    assert fresh(13, 8, shapes={13: [13]})[1].cores[0].shape == (13, 13, 1, 1)
    assert fresh(13, 8, transform_rank=0)[1].trainable_count() == (1 + 1 + 13 + 2 + 2 + 2) * 4
    assert fresh(12, 13)[1].layer.shape == (13, 12), "a prime number of outputs costs little"
    assert fresh(1, 8)[1].in_shape == (1, 1, 1)


def test_wrong_options_are_clear_errors() -> None:
    with pytest.raises(RecipeError, match=r"shapes\[12\] = \[3, 5\] is 15, not 12"):
        fresh(12, 8, shapes={12: [3, 5]})
    with pytest.raises(RecipeError, match="nothing to train"):
        fresh(transform_rank=0, residual="none")
    with pytest.raises(RecipeError, match="dims"):
        fresh(dims=1)


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("transform_rank", [1, 2, 5])
def test_starts_at_the_identity(spread: float, transform_rank: int) -> None:
    layer, made = fresh(60, 8, spread=spread, transform_rank=transform_rank)
    assert torch.allclose(made.transform(), torch.eye(60), atol=1e-5)
    x = random(3, 60)
    assert torch.allclose(made(x, stacked(layer, made.layer, [])), layer(x), atol=1e-5)
    if transform_rank == 1:
        assert all(torch.equal(core[:, :, 0, 0], torch.eye(len(core))) for core in made.cores), "nothing to set apart"


@pytest.mark.parametrize(("spread", "together"), [(0.0, True), (0.1, False)])
def test_slices_go_apart_from_our_start_only(spread: float, together: bool) -> None:
    layer, made = fresh(spread=spread, transform_rank=2)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(30):
        x = random(16, 12, seed=step)
        made(x, stacked(layer, made.layer, [])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    same = all(torch.allclose(core, core[:, :, :1, :1].expand_as(core), atol=1e-6) for core in made.cores)
    assert same == together


def test_the_first_step_moves_the_transform_and_one_core_of_the_residual() -> None:
    layer, made = fresh(transform_rank=2)
    made(random(5, 12), stacked(layer, made.layer, [])).square().sum().backward()
    assert all(bool(core.grad.any()) for core in made.cores)
    assert [bool(core.grad.any()) for core in (*made.left, *made.right)] == [True] + [False] * 5


def test_released_standard_deviations() -> None:
    _, made = fresh(64**2, 36**2, rank=3, shapes={64**2: [64, 64], 36**2: [36, 36]})
    assert not bool(made.left[0].any())
    assert float(made.left[1].detach().std()) == pytest.approx(6 / 9, rel=0.2)
    for core in made.right:
        assert float(core.detach().std()) == pytest.approx(1 / 8, rel=0.2)
    _, made = fresh(64, 36, rank=300, residual="lora")
    assert float(made.right[0].detach().std()) == pytest.approx(1 / math.sqrt(3 * 64), rel=0.05)


def test_small_changes_of_the_transform_survive_16_bits() -> None:
    """T is the identity plus little: as a bf16 number, 1.001 would be 1."""
    layer = nn.Linear(12, 8, bias=False)
    made = TransformedLoRA(describe(layer, "layer"), residual="none")
    with torch.no_grad():
        for core in made.cores:
            core.mul_(1.001)
    x = random(4, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = made.apply_transform(x)
    assert z.dtype == torch.float32
    assert torch.allclose(z, x * 1.001**3, rtol=1e-5)
    half = layer.to(torch.bfloat16)
    assert made(x.bfloat16(), stacked(half, made.layer, [])).dtype == torch.bfloat16


def penalty_by_hand(made: TransformedLoRA, kind: str) -> float:
    total, start = 0.0, TransformedLoRA(made.layer, transform_rank=made.transform_rank, residual="none").cores
    for core, first in zip(made.cores, start, strict=True):
        n, R = len(core), made.transform_rank
        pairs = itertools.product(range(R), range(R)) if kind == "identity" else itertools.product(range(n), range(n))
        for i, j in pairs:
            if kind == "identity":
                apart = core[:, :, i, j] - first[0, 0, i, j] * torch.eye(n)
            else:
                apart = sum(torch.kron(core[i, k], core[j, k]) for k in range(n))
                apart = apart - (i == j) * torch.kron(first[0, 0], first[0, 0])
            total += float(apart.detach().norm())
    return total


@pytest.mark.parametrize("kind", ["identity", "orthogonal"])
@pytest.mark.parametrize("transform_rank", [1, 2])
def test_penalties(kind: Any, transform_rank: int) -> None:
    _, made = moved(transform_rank=transform_rank)
    assert float(made.penalty(kind).detach()) == pytest.approx(penalty_by_hand(made, kind), rel=1e-4)
    _, made = fresh(transform_rank=transform_rank)
    value = made.penalty(kind)
    assert float(value.detach()) == pytest.approx(0, abs=1e-6)
    value.backward()
    assert all(bool(core.grad.isfinite().all()) for core in made.cores), "a norm has no slope at zero"


def test_penalty_of_a_model_pulls_it_back() -> None:
    model = get_peft_model(tiny("llama"), tunesmith.adapter("transformed-lora"))
    layers = [m for m in model.modules() if isinstance(m, TransformedLoRA)]
    assert float(penalty(model).detach()) == 0
    with torch.no_grad():
        for core in (core for made in layers for core in made.cores):
            core.add_(0.1)
    before = penalty(model)
    assert float(before.detach()) == pytest.approx(sum(float(made.penalty().detach()) for made in layers), rel=1e-5)
    before.backward()
    torch.optim.SGD([core for made in layers for core in made.cores], lr=1e-3).step()
    assert float(penalty(model).detach()) < float(before.detach())


def test_penalty_of_nothing_is_a_clear_error() -> None:
    with pytest.raises(ModelError, match="no layer adapted"):
        penalty(tiny("llama"))
    with pytest.raises(ModelError, match="no transform"):
        fresh(transform_rank=0)[1].penalty()


def test_transform_acts_on_the_inputs_of_conv1d() -> None:
    """GPT-2 stores the transpose: `c_attn` has 32 inputs, 96 outputs."""
    config = tunesmith.adapter("transformed-lora", target_modules=["c_attn"])
    model = get_peft_model(tiny("gpt2"), config)
    for made in (m for m in model.modules() if isinstance(m, TransformedLoRA)):
        assert [len(core) for core in made.cores] == [2, 4, 4]
        assert [len(core) for core in made.left] == [4, 4, 6]


def test_given_shapes_are_saved(tmp_path: Path) -> None:
    """JSON has no integer keys."""
    base, inputs = tiny("llama"), batch("llama")
    config = tunesmith.adapter("transformed-lora", shapes={32: [4, 8]}, transform_rank=2, target_modules=["q_proj"])
    model = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    made = next(m for m in loaded.modules() if isinstance(m, TransformedLoRA))
    assert [tuple(core.shape) for core in made.cores] == [(4, 4, 2, 2), (8, 8, 2, 2)]
