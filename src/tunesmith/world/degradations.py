"""Random sequences of synthetic degradations of images, after PROD, pre-training with random-order degradations.

Park, Kim and Chun, "Contribution-based Low-Rank Adaptation with Pre-training Model for Real Image Restoration", ECCV
2024: a restoration network is pre-trained on clean images that each went through a random non-empty subset of
operators, in random order and of random strengths.

    degraded = degrade(clean, seed=0)                               # clean and degraded: (n, c, h, w) float in [0, 1]
    degraded = apply(clean, sequences(len(clean), seed=0), seed=0)  # the same; `sequences` says what was done
    psnr(degraded, clean)                                           # dB

Subsets are drawn uniformly, then their order: of N operators, N / 2 or a little more are used on average. Drawing
uniformly from the ordered subsets (13,699 of 7) would use at least 6 of the 7 in 74 % of images. Which operators the
paper has, and how strong, was not to be found; these are ours. Strength 0 is the identity of each, 1 its strongest.
After each operator the image is clamped to [0, 1], as a stored picture would be. Everything is a function of the
images, their place in the batch, and the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.seeds import generator
from tunesmith.errors import DataError

Operator = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(images (n, c, h, w), strengths (n,), normal (n, c, h, w), uniform (n, 4)) -> images`; the last two are random."""


@dataclass(frozen=True)
class Step:
    """One operator of a sequence.

    Attributes:
        name: In `OPERATORS`.
        strength: From 0, nothing, to 1.
    """

    name: str
    strength: float


def noise(x: Tensor, strength: Tensor, normal: Tensor, uniform: Tensor) -> Tensor:
    """Normal noise of a standard deviation up to 0.2."""
    return x + 0.2 * _each(strength) * normal


def blur(x: Tensor, strength: Tensor, normal: Tensor, uniform: Tensor) -> Tensor:
    """A Gaussian of a standard deviation up to 2 pixels, cut off at 3 of them; the border is repeated."""
    n, c, h, w = x.shape
    radius = 6
    at = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-((at / (2 * strength.clamp(min=1e-3))[:, None]) ** 2) / 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)[:, None]
    flat = F.pad(x.reshape(1, n * c, h, w), (radius,) * 4, mode="replicate")
    flat = F.conv2d(F.conv2d(flat, kernel[..., None, :], groups=n * c), kernel[..., None], groups=n * c)
    return flat.view(n, c, h, w)


def resample(x: Tensor, strength: Tensor, normal: Tensor, uniform: Tensor) -> Tensor:
    """Down by a factor of up to 4, with antialiasing, and up again, both bilinear."""
    size = x.shape[-2:]
    sides = [tuple(max(1, round(side / (1 + 3 * s))) for side in size) for s in strength.tolist()]
    out = x.clone()
    for small in sorted(set(sides)):
        rows = [i for i, side in enumerate(sides) if side == small]
        low = F.interpolate(x[rows], small, mode="bilinear", antialias=True)
        out[rows] = F.interpolate(low, size, mode="bilinear")
    return out


def compress(x: Tensor, strength: Tensor, normal: Tensor, uniform: Tensor) -> Tensor:
    """The discrete cosine transform of 8 x 8 blocks, rounded as JPEG does: to steps that grow with the frequency.

    The step of frequency (u, v) is up to (1 + u + v) / 10, of coefficients whose largest are 4 for a range of 1.
    """
    n, c, h, w = x.shape
    D = _cosines().to(x)
    padded = F.pad(x, (0, -w % 8, 0, -h % 8), mode="replicate")
    H, W = padded.shape[-2:]
    blocks = padded.view(n, c, H // 8, 8, W // 8, 8).transpose(3, 4) - 0.5
    frequency = torch.arange(8, dtype=x.dtype, device=x.device)
    step = strength.view(-1, 1, 1, 1, 1, 1) * (1 + frequency[:, None] + frequency) / 10
    coefficients = D @ blocks @ D.T
    rounded = torch.where(step > 0, (coefficients / step.clamp(min=1e-9)).round() * step, coefficients)
    back = (D.T @ rounded @ D + 0.5).transpose(3, 4).reshape(n, c, H, W)
    return back[..., :h, :w]


def brightness(x: Tensor, strength: Tensor, normal: Tensor, uniform: Tensor) -> Tensor:
    """Brighter or darker by a factor of up to 2.5."""
    sign = torch.where(uniform[:, 0] < 0.5, -1.0, 1.0)
    return x * _each(2.5 ** (sign * strength))


def mosaic(x: Tensor, strength: Tensor, normal: Tensor, uniform: Tensor) -> Tensor:
    """The four pixels of each 2 x 2 cell darkened differently, by up to 80 %: a colour filter before one sensor."""
    h, w = x.shape[-2:]
    gains = (1 - 0.8 * strength[:, None] * uniform).view(-1, 1, 2, 2)
    return x * gains.repeat(1, 1, -(-h // 2), -(-w // 2))[..., :h, :w]


def stripes(x: Tensor, strength: Tensor, normal: Tensor, uniform: Tensor) -> Tensor:
    """An offset to each row or each column, normal with a standard deviation up to 0.25."""
    rows, columns = normal[:, :1, :, :1], normal[:, :1, :1, :]
    across = (uniform[:, 0] < 0.5).view(-1, 1, 1, 1)
    return x + 0.25 * _each(strength) * torch.where(across, rows.expand_as(x), columns.expand_as(x))


OPERATORS: dict[str, Operator] = {
    each.__name__: each for each in (noise, blur, resample, compress, brightness, mosaic, stripes)
}


def count_sequences(n: int) -> int:
    """The number of ordered non-empty subsets of `n` operators: sum over k of n! / (n - k)!."""
    return sum(math.perm(n, k) for k in range(1, n + 1))


def sequences(
    n: int, seed: int, operators: Sequence[str] = tuple(OPERATORS), weakest: float = 0.2
) -> list[tuple[Step, ...]]:
    """One random sequence of operators for each of `n` images.

    Args:
        n: Images.
        seed: Of the draws.
        operators: Names to draw from.
        weakest: Strengths are uniform from here to 1.

    Raises:
        DataError: an unknown operator, one twice, or none.
    """
    names = list(operators)
    if not names or len(set(names)) < len(names) or not set(names) <= OPERATORS.keys():
        raise DataError(f"degradations: expected different names of {', '.join(OPERATORS)}; found {names}")
    g, drawn = generator(seed, "degradations"), []
    for _ in range(n):
        subset = int(torch.randint(1, 2 ** len(names), (), generator=g))
        order = torch.randperm(len(names), generator=g).tolist()
        strengths = (weakest + (1 - weakest) * torch.rand(len(names), generator=g)).tolist()
        drawn.append(tuple(Step(names[i], strengths[i]) for i in order if subset >> i & 1))
    return drawn


def apply(images: Tensor, done: Sequence[Sequence[Step]], seed: int) -> Tensor:
    """The images after their sequences of operators.

    Args:
        images: (n, c, h, w) float in [0, 1]; not changed.
        done: A sequence for each image, as `sequences` draws them; an empty one leaves its image as it is.
        seed: Of what the operators draw.

    Returns:
        The same shape, dtype and device, in [0, 1].

    Raises:
        DataError: other images, an unknown operator, a strength outside [0, 1], or a sequence too many or too few.
    """
    _check(images)
    if len(done) != len(images):
        raise DataError(f"degradations: expected a sequence for each of {len(images)} images, found {len(done)}")
    for step in (step for steps in done for step in steps):
        if step.name not in OPERATORS or not 0 <= step.strength <= 1:
            raise DataError(
                f"degradations: expected an operator of {', '.join(OPERATORS)} and a strength in [0, 1]; found {step}"
            )
    x = images.clone() if images.dtype == torch.float64 else images.to(torch.float32, copy=True)
    for place in range(max(map(len, done), default=0)):
        for name, operator in OPERATORS.items():
            rows = [i for i, steps in enumerate(done) if place < len(steps) and steps[place].name == name]
            if not rows:
                continue
            # Drawn for all images, so that what one meets does not depend on what the others do.
            g = generator(seed, name, place)
            normal, uniform = torch.randn(x.shape, generator=g)[rows], torch.rand(len(x), 4, generator=g)[rows]
            strength = torch.tensor([done[i][place].strength for i in rows])
            x[rows] = operator(x[rows], *(t.to(x) for t in (strength, normal, uniform))).clamp(0, 1)
    return x.to(images.dtype)


def degrade(images: Tensor, seed: int, operators: Sequence[str] = tuple(OPERATORS), weakest: float = 0.2) -> Tensor:
    """Each image after a random sequence of its own: `apply` of `sequences`, with their arguments and errors."""
    return apply(images, sequences(len(images), seed, operators, weakest), seed)


def psnr(x: Tensor, y: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio, in dB, for a range of 1.

    Args:
        x: (n, c, h, w); clamped to [0, 1], as it would be stored.
        y: The clean images, in [0, 1].

    Raises:
        DataError: shapes that differ, or clean images outside [0, 1].
    """
    _check(y)
    if x.shape != y.shape:
        raise DataError(f"psnr: expected images of one shape, found {tuple(x.shape)} and {tuple(y.shape)}")
    error = (x.clamp(0, 1).double() - y.double()).square().flatten(1).mean(1)
    return float(-10 * error.clamp(min=1e-12).log10().mean())


def _check(images: Tensor) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise DataError(
            f"degradations: expected float images of shape (n, c, h, w), found {images.dtype} of shape "
            f"{tuple(images.shape)}"
        )
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise DataError(
            f"degradations: expected values in [0, 1], found {float(images.min()):.4g} to {float(images.max()):.4g}; "
            "divide pictures of 0 to 255 by 255"
        )


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _cosines() -> Tensor:
    """(8, 8), the orthonormal matrix of the discrete cosine transform."""
    k, i = torch.arange(8.0)[:, None], torch.arange(8.0)
    D = torch.cos(math.pi * (2 * i + 1) * k / 16) / 2
    D[0] /= math.sqrt(2)
    return D
