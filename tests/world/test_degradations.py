"""PROD's operators and sequences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tunesmith.errors import DataError
from tunesmith.world.degradations import OPERATORS, Step, apply, count_sequences, degrade, psnr, sequences

EACH = pytest.mark.parametrize("name", OPERATORS)


def images(n: int = 6, channels: int = 1, h: int = 16, w: int = 16, seed: int = 0) -> Tensor:
    """Smooth pictures in [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    small = torch.rand(n, channels, 5, 5, generator=g)
    return torch.nn.functional.interpolate(small, (h, w), mode="bilinear")


def one(x: Tensor, name: str, strength: float, seed: int = 0) -> Tensor:
    return apply(x, [(Step(name, strength),)] * len(x), seed)


@EACH
def test_strength_nought_is_the_identity_and_more_is_worse(name: str) -> None:
    x = images(40)
    assert torch.allclose(one(x, name, 0.0), x, atol=1e-6)
    quality = [psnr(one(x, name, strength), x) for strength in (0.1, 0.4, 1.0)]
    assert quality[0] > quality[1] > quality[2]
    assert 8 < quality[2] < 32


@EACH
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 8, 8), (2, 11, 13), (1, 1, 3)])
def test_any_shape_stays_in_range(name: str, shape: tuple[int, int, int]) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = images(3, *shape).to(dtype)
        before = x.clone()
        out = one(x, name, 0.9)
        assert torch.equal(x, before)
        assert out.shape == x.shape
        assert out.dtype == dtype
        assert out.min() >= 0
        assert out.max() <= 1


@EACH
def test_seeded(name: str) -> None:
    x = images()
    assert torch.equal(one(x, name, 0.7), one(x, name, 0.7))
    differs = not torch.equal(one(x, name, 0.7, seed=1), one(x, name, 0.7))
    assert differs == (name in ("noise", "brightness", "mosaic", "stripes"))


def test_degrade_is_apply_of_sequences_and_leaves_the_random_state_alone() -> None:
    x = images(30)
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    out = degrade(x, 5)
    assert torch.equal(torch.rand(()), expected)
    assert torch.equal(out, apply(x, sequences(30, 5), 5))
    assert not torch.equal(out, degrade(x, 6))
    assert all(not torch.equal(a, b) for a, b in zip(out, x, strict=True))


@EACH
def test_each_image_has_its_own_strength(name: str) -> None:
    x = images(4, 3)
    steps = [(Step(name, strength),) for strength in (0.9, 0.1, 0.5, 0.3)]
    out = apply(x, steps, 0)
    for i in range(4):
        alone = apply(x, [steps[j] if j == i else () for j in range(4)], 0)
        assert torch.allclose(out[i], alone[i], atol=1e-6)
    quality = [psnr(out[i : i + 1], x[i : i + 1]) for i in range(4)]
    assert quality[0] < quality[1]


def test_operators_are_applied_in_order_and_what_one_image_meets_does_not_depend_on_the_others() -> None:
    x = images(4)
    a, b = Step("blur", 0.8), Step("stripes", 0.8)
    out = apply(x, [(a, b), (b, a), (), (a,)], 0)
    assert torch.equal(out[2], x[2])
    assert torch.allclose(out[3], one(x, "blur", 0.8)[3])
    assert torch.allclose(out[1], apply(one(x, "stripes", 0.8), [(), (a,), (), ()], 0)[1], atol=1e-6)
    swapped = apply(x, [(b, a), (a, b), (), ()], 0)
    assert not torch.allclose(out[0], swapped[0], atol=1e-3)
    assert torch.equal(apply(x, [(), (b, a), (a, b), ()], 0)[1], out[1])


def test_counts() -> None:
    assert (count_sequences(7), count_sequences(8)) == (13_699, 109_600)
    listed = [order for k in range(1, 5) for order in itertools.permutations(range(4), k)]
    assert count_sequences(4) == len(listed)


def test_draws_are_uniform_subsets_in_uniform_order() -> None:
    drawn = [tuple(step.name for step in steps) for steps in sequences(7000, 1, ("noise", "blur", "mosaic"))]
    assert all(names and len(set(names)) == len(names) for names in drawn)
    for subset in (("noise",), ("noise", "blur"), ("noise", "blur", "mosaic")):
        found = [names for names in drawn if set(names) == set(subset)]
        assert len(found) == pytest.approx(1000, abs=120)
        for order in itertools.permutations(subset):
            share = 1 / math.factorial(len(subset))
            assert sum(names == order for names in found) / len(found) == pytest.approx(share, abs=0.06)
    strengths = torch.tensor([s.strength for steps in sequences(2000, 0, weakest=0.4) for s in steps])
    assert 0.4 <= strengths.min() < 0.42
    assert 0.98 < strengths.max() <= 1
    assert float(strengths.mean()) == pytest.approx(0.7, abs=0.01)


def test_noise_has_its_deviation_and_stripes_run_along_rows_or_columns() -> None:
    grey = torch.full((200, 1, 8, 8), 0.5)
    assert float((one(grey, "noise", 0.5) - 0.5).std()) == pytest.approx(0.1, rel=0.03)
    out = one(grey, "stripes", 0.4)
    rows, columns = ((out.std(dim) < 1e-6).flatten(1).all(1) for dim in (3, 2))
    assert bool((rows ^ columns).all())
    assert 60 < int(rows.sum()) < 140
    assert float((out - 0.5).std()) == pytest.approx(0.1, rel=0.1)


def test_brightness_mosaic_and_blur_do_what_they_say() -> None:
    x = 0.3 * images(50)
    factor = one(x, "brightness", 1.0).flatten(1).sum(1) / x.flatten(1).sum(1)
    assert {round(f, 3) for f in factor.tolist()} == {0.4, 2.5}
    gains = one(torch.ones(20, 3, 7, 9), "mosaic", 1.0)
    assert torch.equal(gains[..., :5, :7], gains[..., 2:, 2:])
    assert 0.2 <= gains.min() < 0.3
    point = torch.zeros(1, 1, 21, 21)
    point[..., 10, 10] = 1
    spread, at = one(point, "blur", 0.5)[0, 0], torch.arange(21.0) - 10
    assert float(spread.sum()) == pytest.approx(1, abs=1e-4)
    assert float((spread.sum(0) * at**2).sum()) == pytest.approx(1.0, rel=0.02)  # a deviation of 2 x 0.5 pixels
    assert torch.allclose(spread, spread.T, atol=1e-6)


def test_compression_rounds_the_transform_of_each_block() -> None:
    flat = torch.full((1, 1, 16, 8), 0.5)
    flat[..., 8:, :] = 0.71
    out = one(flat, "compress", 1.0)
    # A flat block has one coefficient, 8 (x - 1/2), which is rounded to steps of 1/10.
    assert torch.allclose(out[..., :8, :], torch.tensor(0.5), atol=1e-6)
    assert torch.allclose(out[..., 8:, :], torch.tensor(0.5 + 1.7 / 8), atol=1e-5)
    wave = 0.5 + 0.05 * torch.cos(torch.pi * (2 * torch.arange(8.0) + 1) * 7 / 16).expand(1, 1, 8, 8)
    assert torch.allclose(one(wave, "compress", 1.0), torch.tensor(0.5), atol=1e-6)


def test_psnr() -> None:
    x = torch.full((2, 1, 4, 4), 0.5)
    assert psnr(x + 0.1, x) == pytest.approx(20, abs=1e-4)
    assert psnr(torch.cat([x[:1] + 0.1, x[1:] + 0.01]), x) == pytest.approx(30, abs=1e-3)
    assert psnr(x + 9, x) == pytest.approx(-20 * math.log10(0.5), abs=1e-4)


def test_errors() -> None:
    with pytest.raises(DataError, match="found 0 to 255; divide pictures"):
        degrade(torch.tensor([0.0, 255.0]).view(1, 1, 1, 2), 0)
    with pytest.raises(DataError, match=r"torch\.uint8 of shape"):
        degrade(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), 0)
    with pytest.raises(DataError, match=r"shape \(2, 2\)"):
        degrade(torch.zeros(2, 2), 0)
    with pytest.raises(DataError, match="found nan"):
        degrade(torch.full((1, 1, 2, 2), float("nan")), 0)
    for names in ((), ("noise", "noise"), ("fog",)):
        with pytest.raises(DataError, match="different names of noise, blur"):
            sequences(1, 0, names)
    with pytest.raises(DataError, match="sequence for each of 6 images, found 1"):
        apply(images(), [()], 0)
    for step in (Step("fog", 0.5), Step("noise", 1.5)):
        with pytest.raises(DataError, match="a strength in"):
            apply(images(1), [(step,)], 0)
    with pytest.raises(DataError, match="one shape"):
        psnr(images(2), images(3))
