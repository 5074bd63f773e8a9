"""ZO personalisation: memory, the estimate and its cleaning exactly; a token learnt on an eight-bit diffusion model."""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunesmith.core.meters import grad_bytes, saved_bytes, state_bytes
from tunesmith.core.seeds import generator
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.models.diffusion import Diffusion, invert, load, window_timesteps
from tunesmith.optimizers.zo_personalization import ZOPersonalization, still_directions
from tunesmith.world.images import digits

STEPS, BATCH, FEW, RATE = 256, 4, 5, 1e-2
WORD, SAID = "<mine>", ("<mine>", "a <mine>")

CLAIM = Claim(
    "zo-personalization",
    says="Personalises a quantised diffusion model by forward passes alone, at image and text alignment like that of "
    "methods with gradients, in up to 8.2 times less memory; removing the directions in which the token has hardly "
    "moved takes noise out of the estimate.",
    where="abstract; sections 4.1 to 4.3, Algorithm 1",
    ran="Byte counts and bit-equality on `tiny-unet`, a UNet of 1.3 million weights that makes 8 x 8 digits from "
    "captions, with its weights in int8; length, orthogonality and angle of the estimate on linear losses of 768 "
    "numbers; the window of timesteps. Then an invented subject, threes in a mirror, of which five images are given: "
    "a new word that starts as `three` learns for 256 steps of 4 images at the paper's learning rate 1e-2 (no search), "
    "mu 1e-3, n 2, tau 128. Reported is the denoising loss on the held-out threes in the same mirror, noise and "
    "timesteps fixed, of the window; beside it the same steps without the cleaning, and Adam with the true gradient at "
    "the same rate. FID-like alignment scores cannot be had for digits and are not measured.",
)


# Exact ----------------------------------------------------------------------------------------------------------------


def _pixels(images: Tensor) -> Tensor:
    return images.float()[:, None] / 127.5 - 1


def _mirrored(split: str, digit: int = 3) -> Tensor:
    """(n, 1, 8, 8) images of a digit in a mirror, -1 to 1."""
    images, labels = digits(split)  # type: ignore[arg-type]
    return _pixels(torch.from_numpy(images[labels == digit])).flip(-1)


@CLAIM.exact
def one_row_changes_and_nothing_is_stored() -> list[Check]:
    """Five steps on the eight-bit UNet save no activation, make no gradient, and change one row bit for bit."""
    model = load("tiny-unet", int8=True)
    row = model.captions.add_word(WORD, like="three")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = ZOPersonalization([row], lr=RATE)
    with saved_bytes(model) as saved, grad_bytes(model) as grads:
        invert(model, optimizer, _mirrored("train")[:FEW], SAID, steps=5)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    whole = load("tiny-unet")
    sizes = [
        sum(t.numel() * t.element_size() for t in (*m.unet.parameters(), *m.unet.buffers())) for m in (model, whole)
    ]
    return [
        Check("bytes saved for a backward pass", saved.bytes, "==", 0),
        Check("bytes of gradients", grads.bytes, "==", 0),
        Check("tensors changed", len(changed), "==", 1),
        Check("of them, the new word's row", changed.count("captions.own.0"), "==", 1),
        Check("bytes of state / bytes of (2 + tau) rows", state_bytes(optimizer) / (4 * 130 * row.numel()), "==", 1.0),
        Check("bytes of the UNet in int8 / in float32", sizes[0] / sizes[1], "<=", 0.28),
    ]


def _walk(width: int, period: int) -> Tensor:
    """(period, width) tokens that move mostly in 3 directions, and a little in all."""
    g = generator("zo-personalization", "walk")
    steps = torch.randn(period, 3, generator=g) @ torch.randn(3, width, generator=g)
    return (steps + 0.003 * torch.randn(period, width, generator=g)).cumsum(0)


@CLAIM.exact
def the_removed_directions_are_removed() -> list[Check]:
    """V has orthonormal rows, is not empty, leaves the main directions alone, and the estimate has no part in it."""
    token = nn.Parameter(torch.zeros(768))
    optimizer = ZOPersonalization([token])
    walk = _walk(768, 128)
    basis = still_directions(walk, 1e-3)
    optimizer.state["run"]["basis"] = basis
    g = optimizer.gradient([(1, 0.7), (2, -0.2)])
    standard = (walk - walk.mean(0)) / walk.std(0, correction=0)
    apart = float((basis @ basis.T - torch.eye(len(basis))).abs().max())
    left = (standard @ basis.T).square().sum() / standard.square().sum()
    return [
        Check("directions removed", len(basis), ">=", 64),
        Check("largest difference of V V^T from 1", apart, "<=", 1e-5),
        Check("length of the estimate in V / its length", float((basis @ g).norm() / g.norm()), "<=", 1e-5),
        Check("share of the tokens' variance in V", float(left), "<=", 1e-3),
    ]


@CLAIM.exact
def the_estimate_is_as_long_as_the_gradient() -> list[Check]:
    """Mean squared length over 2000 estimates of two directions, and of 768 numbers, over the gradient's."""
    along = torch.randn(768, generator=generator("zo-personalization", "gradient"))
    token = nn.Parameter(torch.zeros(768))
    optimizer = ZOPersonalization([token], subspace=False)
    total = 0.0
    for step in range(2000):
        optimizer.state["run"]["step"] = step
        optimizer.estimate(lambda: token.detach().double() @ along.double())
        assert optimizer._found is not None
        total += float(optimizer.gradient(optimizer._found).square().sum()) / 2000
    ratio = total / float(along.square().sum())
    return [Check("ratio, off 1", abs(ratio - 1), "<=", 0.1)]


@CLAIM.exact
def timesteps_are_of_the_window() -> list[Check]:
    """40,000 timesteps: the smallest, the largest, and chi square over 400 of them (one in a thousand is above 491)."""
    drawn = torch.cat([window_timesteps(100, 0, step) for step in range(400)])
    counts = torch.bincount(drawn - 500, minlength=400).double()
    uneven = float((counts - 100).square().sum() / 100)
    return [
        Check("smallest", int(drawn.min()), "==", 500),
        Check("largest", int(drawn.max()), "==", 899),
        Check("chi square of uniformity, 399 degrees of freedom", uneven, "<=", 491),
    ]


@CLAIM.exact
def cleaning_turns_the_estimate_to_the_gradient() -> list[Check]:
    """A gradient orthogonal to V: its mean cosine with the estimate, 300 seeds, grows by sqrt(d / (d - r))."""
    g, token = generator("zo-personalization", "cosine"), nn.Parameter(torch.zeros(768))
    basis = torch.linalg.qr(torch.randn(768, 126, generator=g))[0].T.contiguous()
    along = torch.randn(768, generator=g)
    along -= (basis @ along) @ basis
    optimizer = ZOPersonalization([token])
    cosines: dict[bool, list[float]] = {False: [], True: []}
    for step in range(300):
        optimizer.state["run"]["step"] = step
        optimizer.estimate(lambda: token.detach().double() @ along.double())
        assert optimizer._found is not None
        for clean in cosines:
            optimizer.state["run"].pop("basis", None)
            if clean:
                optimizer.state["run"]["basis"] = basis
            cosines[clean].append(float(F.cosine_similarity(optimizer.gradient(optimizer._found), along, dim=0)))
    grown = statistics.mean(cosines[True]) / statistics.mean(cosines[False])
    return [Check("growth / sqrt(768 / 642), off 1", abs(grown / math.sqrt(768 / 642) - 1), "<=", 0.03)]


# Comparison -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _loss(model: Diffusion, images: Tensor, caption: str) -> float:
    """Of four noises per image, timesteps of the window; the same for every caption, method and seed."""
    images = images.repeat(4, 1, 1, 1)
    noise = torch.randn(images.shape, generator=generator("zo-personalization", "held"))
    return float(model.loss(images, [caption] * len(images), noise, window_timesteps(len(images), "held")))


@CLAIM.comparison
def mirror(seed: int) -> dict[str, float]:
    given, held = _mirrored("train"), _mirrored("heldout")
    few = given[torch.randperm(len(given), generator=generator("zo-personalization", "few", seed))[:FEW]]
    figures = {}
    for name in ("cleaned", "plain", "gradient"):
        model = load("tiny-unet", int8=True)
        row = model.captions.add_word(WORD, like="three")
        figures["before"] = _loss(model, held, f"a {WORD}")
        optimizer: torch.optim.Optimizer = torch.optim.Adam([row], lr=RATE, eps=1e-3)
        if name != "gradient":
            optimizer = ZOPersonalization([row], lr=RATE, subspace=name == "cleaned", seed=seed)
        invert(model, optimizer, few, SAID, steps=STEPS, batch=BATCH, seed=seed)
        figures[name] = _loss(model, held, f"a {WORD}")
        if isinstance(optimizer, ZOPersonalization) and optimizer.basis is not None:
            figures["removed"] = len(optimizer.basis)
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    fallen = [after - before for after, before in zip(figures["cleaned"], figures["before"], strict=True)]
    return [Check("denoising loss of the learnt word - of the class word, worst seed", max(fallen), "<=", 0.0)]
