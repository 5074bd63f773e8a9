"""TLoRA: the transform, its start and its counts, exactly; planted transforms against LoRA of the same size."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from peft import OFTConfig, get_peft_model
from torch import Tensor, nn

import tunesmith
from tunesmith.adapters.transformed_lora import TransformedLoRA, gram
from tunesmith.core.adapter import stacked
from tunesmith.core.layer import describe
from tunesmith.core.seeds import generator
from tunesmith.evidence import kit_digits
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.evidence.kit_bytes import LiveBytes

DIM, LORA_RANK = 32, 6
STEPS, ROWS, RATES = 800, 64, (3e-3, 1e-2, 3e-2)
KINDS = ("kronecker", "dense", "ring")

CLAIM = Claim(
    "transformed-lora",
    says="A dense, full-rank transform of the weight leaves a residual that a very compact structure can hold: better "
    "than LoRA and OFT on subject-driven and controllable generation, on SDXL with 0.4 M numbers, 27 % of LoRA's at "
    "rank 1, on Stable Diffusion 1.5 with 0.94 M.",
    where="abstract; Section 3; tables",
    ran="Identities; the counts on the attention layers of SD 1.5 and SDXL. Then a 32 x 32 linear layer W learns from "
    "white inputs to be W T + u v^T, 800 Adam steps with a cosine, for three planted T: a Kronecker product of a 4 x 4 "
    "and an 8 x 8 matrix, a tensor ring of rank 2, and an unstructured one, each the identity plus half as much noise. "
    "TLoRA with R_T = 2 and a LoRA of rank 1 as residual, from our start and from the paper's, and LoRA of rank 6: 384 "
    "numbers each, three rates each, the best by the loss itself. The loss is the squared distance left over that at "
    "the start; `svd` is the least that any LoRA of rank 6 can leave. The unstructured T has no threshold.",
    not_held="All that the paper claims held. What did not is a bound of ours on its start: with T a tensor ring of "
    "rank 2 we expected at least 0.2 to be left from there, 0.14 was (LoRA 0.24, from our start under 1e-12). The "
    "planted T is the identity plus noise, so that one Kronecker product, all that the paper's start can learn, and a "
    "residual come closer to it than we thought. That the slices stay equal holds to the last bit.",
)


def _random(*shape: int, key: str) -> Tensor:
    return torch.randn(shape, generator=generator(0, key))


def _made(layer: nn.Linear, moved: bool = True, **options: Any) -> TransformedLoRA:
    """TLoRA, moved off its start."""
    made = TransformedLoRA(describe(layer, "layer"), **options)
    if moved:
        with torch.no_grad():
            for i, p in enumerate(made.parameters()):
                p.add_(0.2 * _random(*p.shape, key=f"moved {i}"))
    return made


@CLAIM.exact
def starts_at_the_base() -> list[Check]:
    """T is the identity and the residual zero at creation, whatever the ranks, the start and the sizes."""
    apart = exactly = 0.0
    for (into, out), R, spread in itertools.product(((32, 48), (60, 7), (13, 8)), (1, 2, 3, 4), (0.0, 0.1, 0.5)):
        layer = nn.Linear(into, out)
        made = _made(layer, moved=False, transform_rank=R, spread=spread, shapes={13: [13]})
        T, x = made.transform().detach(), _random(5, into, key="x")
        apart = max(apart, float((T - torch.eye(into)).abs().max()))
        if R == 1:
            same = torch.equal(T, torch.eye(into)) and torch.equal(made(x, stacked(layer, made.layer, [])), layer(x))
            exactly += not same
    return [
        Check("largest difference of T from the identity", apart, "<=", 1e-6),
        Check("layers of R_T = 1 that do not start bit for bit at the base", exactly, "==", 0),
    ]


@CLAIM.exact
@torch.no_grad()
def transform_and_residual_are_tensor_rings() -> list[Check]:
    """Entries equal traces of products, index by index; R_T = 1 is a Kronecker product; T acts on the input."""
    layer = nn.Linear(12, 8, bias=False)
    made = _made(layer, transform_rank=2, rank=2, shapes={12: [3, 4], 8: [2, 4]}, alpha=3.0, rslora=False)
    T, D, A = torch.empty(12, 12), torch.empty(8, 12), list(made.cores)
    for i, j in itertools.product(range(12), range(12)):
        T[i, j] = (A[0][i // 4, j // 4] @ A[1][i % 4, j % 4]).trace()
    for o, j in itertools.product(range(8), range(12)):
        outer = made.left[0][o // 4] @ made.left[1][o % 4]
        D[o, j] = (outer @ made.right[0][j // 4] @ made.right[1][j % 4]).trace()
    W, x = layer.weight.detach(), _random(5, 12, key="x")
    wanted = (W @ T + 3 / 2 * D).detach()
    out = made(x, stacked(layer, made.layer, [])).detach()
    one = _made(layer, transform_rank=1, residual="none", shapes={12: [3, 4]})
    kron = torch.kron(one.cores[0][:, :, 0, 0], one.cores[1][:, :, 0, 0])
    return [
        Check("largest difference of T", float((made.transform() - T).abs().max()), "<=", 1e-5),
        Check("largest difference of the weight", float((made.weight(W) - wanted).abs().max()), "<=", 1e-5),
        Check("largest difference of an output", float((out - x @ wanted.T).abs().max()), "<=", 1e-5),
        Check("largest difference to a Kronecker product", float((one.transform() - kron).abs().max()), "<=", 1e-6),
    ]


@CLAIM.exact
@torch.no_grad()
def regularisers_measure_what_they_say() -> list[Check]:
    """The cores of T T^T are those of Proposition 2; penalties are 0 at the start and for what they allow."""
    layer = nn.Linear(DIM, 8)
    made = _made(layer, transform_rank=2, residual="none", dims=2)
    T = made.transform().detach()
    product = _made(layer, moved=False, transform_rank=4, residual="none", dims=2)
    with torch.no_grad():
        for core, A in zip(product.cores, made.cores, strict=True):
            core.copy_(gram(A))
    apart = float((product.transform() - T @ T.T).abs().max() / (T @ T.T).abs().max())
    start = max(
        float(_made(layer, moved=False, transform_rank=R, spread=spread).penalty(kind))
        for R in (1, 2, 3)
        for spread in (0.0, 0.1)
        for kind in ("identity", "orthogonal")
    )
    turned = _made(layer, moved=False, transform_rank=1, residual="none", dims=2)
    with torch.no_grad():
        for i, core in enumerate(turned.cores):
            core.copy_(torch.linalg.qr(_random(len(core), len(core), key=f"turned {i}"))[0][..., None, None])
    return [
        Check("largest relative difference of T T^T", apart, "<=", 1e-5),
        Check("largest penalty at the start", start, "<=", 1e-5),
        Check("orthogonal penalty of a rotation", float(turned.penalty("orthogonal")), "<=", 1e-4),
        Check("its identity penalty", float(turned.penalty("identity")), ">=", 1),
    ]


@CLAIM.exact
def nothing_of_the_size_of_the_weight_is_made() -> list[Check]:
    """Forward and backward of a layer with 2048 inputs and 2048 outputs keep a small part of T's bytes."""
    layer = nn.Linear(2048, 2048, bias=False).requires_grad_(False)
    made, x = _made(layer, transform_rank=2), _random(4, 2048, key="x").requires_grad_()
    below = stacked(layer, made.layer, [])
    with LiveBytes() as meter:
        made(x, below).sum().backward()
    found = (made.weight(layer.weight).detach() @ x.detach().T).T
    apart = float((made(x, below).detach() - found).abs().max() / found.abs().max())
    return [
        Check("peak of what is alive / bytes of T", meter.peak / (4 * 2048**2), "<=", 0.2),
        Check("largest relative difference of merged and unmerged outputs", apart, "<=", 1e-5),
    ]


SD15 = {320: 5, 640: 5, 1280: 6}
SDXL = {640: 10, 1280: 60}
"""Transformer blocks by width: each has self- and cross-attention, four linear layers each."""


def _count(blocks: dict[int, int], context: int, **options: Any) -> int:
    total = 0
    for width, number in blocks.items():
        for into, layers in ((width, 6), (context, 2)):
            made = TransformedLoRA(describe(nn.Linear(into, width, device="meta"), "layer"), **options)
            total += number * layers * made.trainable_count()
    return total


@CLAIM.exact
def published_counts() -> list[Check]:
    """On the attention layers of SDXL (the defaults) and SD 1.5 (TLoRA* (2, 4)) it has the numbers of the paper."""
    sdxl = _count(SDXL, 2048)
    lora = _count(SDXL, 2048, transform_rank=0, residual="lora", rank=1)
    shapes = {320: [4, 8, 10]}
    sd15 = _count(SD15, 768, transform_rank=2, residual="lora", rank=4, shapes=shapes)
    plain = _count(SD15, 768, transform_rank=0, residual="lora", rank=4)
    return [
        Check("SDXL, millions, to one decimal", round(sdxl / 1e6, 1), "==", 0.4),
        Check("SDXL, percent of LoRA at rank 1", round(100 * sdxl / lora), "==", 27),
        Check("SD 1.5, millions, to two decimals", round(sd15 / 1e6, 2), "==", 0.94),
        Check("SD 1.5, LoRA of rank 4, millions, to two decimals", round(plain / 1e6, 2), "==", 0.8),
    ]


def _kronecker_terms(T: Tensor) -> int:
    """How many Kronecker products of 4 x 4 and 8 x 8 matrices T is the sum of, to 1e-4."""
    return int(torch.linalg.matrix_rank(T.double().view(4, 8, 4, 8).transpose(1, 2).reshape(16, 64), rtol=1e-4))


@CLAIM.exact
def the_papers_start_wastes_the_ring() -> list[Check]:
    """From the paper's start the slices of a core stay equal in every step; from ours they do not."""
    apart, terms = {}, {}
    for spread in (0.0, 0.1):
        layer, wanted = _problem("ring", 0)
        made = _trained(layer, wanted, 1e-2, 0, 200, spread)
        apart[spread] = max(float((core - core[:, :, :1, :1]).detach().abs().max()) for core in made.cores)
        terms[spread] = _kronecker_terms(made.transform().detach())
    return [
        Check("largest difference of two slices, paper's start, R_T = 2", apart[0.0], "<=", 1e-6),
        Check("Kronecker products in T, paper's start", terms[0.0], "==", 1),
        Check("largest difference of two slices, our start", apart[0.1], ">=", 1e-2),
        Check("Kronecker products in T, our start", terms[0.1], ">=", 2),
    ]


@CLAIM.exact
def transform_is_dense_and_of_full_rank() -> list[Check]:
    """Trained, T has no zeros and full rank; PEFT's OFT of a similar size has blocks of zeros."""
    layer = nn.Linear(DIM, DIM, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(DIM))  # the changed weight is then the transform itself
    wanted = torch.linalg.qr(_random(DIM, DIM, key="rotation"))[0]
    config = tunesmith.adapter("transformed-lora", residual="none", dims=2, transform_rank=1, target_modules=["0"])
    theirs = OFTConfig(oft_block_size=4, target_modules=["0"])
    zeros, ranks, counts = [], [], []
    for chosen in (config, theirs):
        model = kit_digits.seeded(lambda c=chosen: get_peft_model(nn.Sequential(copy.deepcopy(layer)), c), 0)
        counts.append(model.get_nb_trainable_parameters()[0])
        _train(model, wanted, 1e-2, 0, 100)
        merged: Any = model.merge_and_unload()
        T = merged[0].weight.detach()
        zeros.append(100 * float((T == 0).float().mean()))
        ranks.append(int(torch.linalg.matrix_rank(T)))
    return [
        Check("zeros in T, percent", zeros[0], "==", 0),
        Check("rank of T", ranks[0], "==", DIM),
        Check("zeros in OFT's, percent", zeros[1], ">=", 80),
        Check("numbers of TLoRA's T / of OFT's", counts[0] / counts[1], "<=", 2),
    ]


def _problem(kind: str, seed: int) -> tuple[nn.Linear, Tensor]:
    """A layer and the weight that it is to have, W T + u v^T."""
    layer = kit_digits.seeded(lambda: nn.Linear(DIM, DIM, bias=False), seed)
    g = generator(seed, "planted", kind)

    def noise(n: int, *ring: int) -> Tensor:
        return 0.5 * torch.randn(n, n, *ring, generator=g) / n**0.5

    if kind == "dense":
        T = torch.eye(DIM) + noise(DIM)
    elif kind == "kronecker":
        T = torch.kron(torch.eye(4) + noise(4), torch.eye(8) + noise(8))
    else:
        first, second = (torch.einsum("ij,ab->ijab", torch.eye(n), torch.eye(2)) / 2**0.5 for n in (4, 8))
        first, second = first + noise(4, 2, 2), second + noise(8, 2, 2)
        T = torch.einsum("ijab,klba->ikjl", first, second).reshape(DIM, DIM)
    W = layer.weight.detach()
    u, v = torch.randn(DIM, 1, generator=g), torch.randn(1, DIM, generator=g)
    return layer, W @ T + u @ v / DIM * W.norm() / 2


def _train(model: nn.Module, wanted: Tensor, lr: float, seed: int, steps: int) -> None:
    """Outputs like those of the weight `wanted`, from white inputs."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    g = generator(seed, "inputs")
    for _ in range(steps):
        x = torch.randn(ROWS, wanted.shape[1], generator=g)
        (model(x) - x @ wanted.T).square().sum(1).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _tuned(config: Any, layer: nn.Linear, wanted: Tensor, lr: float, seed: int, steps: int = STEPS) -> nn.Module:
    model = kit_digits.seeded(lambda: get_peft_model(nn.Sequential(copy.deepcopy(layer)), config), seed)
    _train(model, wanted, lr, seed, steps)
    return model


def _tlora(spread: float) -> Any:
    """384 numbers on a layer of 32 x 32: 320 of T and 64 of the residual."""
    options: dict[str, Any] = {"transform_rank": 2, "residual": "lora", "rank": 1, "dims": 2, "spread": spread}
    return tunesmith.adapter("transformed-lora", target_modules=["0"], **options)


def _trained(layer: nn.Linear, wanted: Tensor, lr: float, seed: int, steps: int, spread: float) -> TransformedLoRA:
    model = _tuned(_tlora(spread), layer, wanted, lr, seed, steps)
    return next(m for m in model.modules() if isinstance(m, TransformedLoRA))


@CLAIM.comparison
def planted(seed: int) -> dict[str, float]:
    """What is left of each planted weight at each side's best rate."""
    figures = dict[str, float]()
    lora = tunesmith.adapter("lora", rank=LORA_RANK, alpha=2.0 * LORA_RANK, target_modules=["0"])
    for kind in KINDS:
        layer, wanted = _problem(kind, seed)
        change = wanted - layer.weight.detach()
        for name, config in (("tlora", _tlora(0.1)), ("tlora_paper", _tlora(0.0)), ("lora", lora)):
            found = {}
            for lr in RATES:
                model = _tuned(config, layer, wanted, lr, seed)
                figures[f"{name}_numbers"] = model.get_nb_trainable_parameters()[0]
                merged: Any = model.merge_and_unload()
                left = wanted - merged[0].weight.detach()
                found[lr] = float(left.square().sum() / change.square().sum())
            rate = min(RATES, key=found.__getitem__)
            figures |= {f"{kind}_{name}": found[rate], f"{kind}_{name}_rate": rate}
        S = torch.linalg.svdvals(change).square()
        figures[f"{kind}_svd"] = float(S[LORA_RANK:].sum() / S.sum())
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """The card's thresholds, and the same for the start on a transform that needs the ring."""
    names = {"kronecker": "a Kronecker product", "ring": "a tensor ring of rank 2"}
    checks = [
        Check("numbers of TLoRA and of LoRA", abs(figures["tlora_numbers"][0] - figures["lora_numbers"][0]), "==", 0)
    ]
    for kind, name in names.items():
        checks.append(Check(f"{name}, share left by TLoRA", figures.median(f"{kind}_tlora"), "<=", 0.02))
        checks.append(Check(f"{name}, share left by LoRA", figures.median(f"{kind}_lora"), ">=", 0.2))
    left = figures.median("ring_tlora_paper")
    checks.append(Check("a tensor ring of rank 2, share left by TLoRA from the paper's start", left, ">=", 0.2))
    return checks
