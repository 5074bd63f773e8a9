"""Intrinsic dimension: the map, its gradient and its count, exactly; how many coordinates the digits need."""

from __future__ import annotations

import copy
import hashlib
import itertools
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import tunesmith
from tunesmith.adapters.intrinsic_dimension import Dense, Fastfood, IntrinsicDimension, Subspace, d90
from tunesmith.core.bridge import register_peft
from tunesmith.core.seeds import generator
from tunesmith.evidence import kit_digits, kit_text
from tunesmith.evidence.claim import Check, Claim, Figures

GRID, STEPS = (5, 10, 20, 40, 80, 160), 300
RATES, FULL_RATES = (3e-2, 1e-1, 3e-1), (1e-3, 3e-3, 1e-2)

CLAIM = Claim(
    "intrinsic-dimension",
    says="Fine-tuning needs few dimensions: 200 numbers, projected at random into all weights, give 90 % of full "
    "fine-tuning on MRPC with a RoBERTa. Pretraining lowers the number that a task needs.",
    where="abstract; Table 1",
    ran="Identities on single maps, an MLP and a Llama with tied embeddings. Then an MLP of 26,122 weights learns the "
    "digits with d = 5 to 160 numbers (DID, dense map, 300 Adam steps of 64), from a random start and from one trained "
    "on mirrored digits; all weights beside it. Every run has three learning rates a factor of about 3 apart, chosen "
    "on other pictures than the accuracy reported. `said` is SAID with the Fastfood map at d = 160, without a "
    "threshold.",
    not_held="The margin of 10 points at d = 20 was set for the card's 0.47 against 0.26, found at the rate 0.1 alone. "
    "With three rates the random start gains too: its best at d = 20 is 0.3 on two seeds, and gives 33 to 39 %. Nor is "
    "the lead at d = 5 learned: the model of mirrored digits has 39, 41 and 41 % before any tuning, the random one 3 "
    "to 8, and 20 numbers add 1 to 6 points to it. From 40 numbers on it leads on two seeds of three; the d90 on this "
    "grid is 160 from both starts. That pretraining lowers the intrinsic dimension is not shown here.",
)


def _mlp(seed: int) -> nn.Sequential:
    def make() -> nn.Sequential:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    return kit_digits.seeded(make, seed)


def _adapted(base: nn.Module, **options: Any) -> Any:
    return get_peft_model(copy.deepcopy(base), tunesmith.adapter("intrinsic-dimension", **options))


def _moved(model: nn.Module, key: str = "move") -> Any:
    """The coordinates and scales moved off their start."""
    g = generator(0, key)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g))
    return model.eval()


def _held(model: nn.Module) -> list[IntrinsicDimension]:
    return [m for m in model.modules() if isinstance(m, IntrinsicDimension)]


def _space(model: nn.Module) -> Subspace:
    return _held(model)[0].subspace


def _matrix(drawn: Fastfood | Dense, d: int) -> Tensor:
    """A map as a matrix, a column at a time."""
    return drawn.P if isinstance(drawn, Dense) else torch.stack([drawn(e) for e in torch.eye(d)], 1)


@CLAIM.exact
def starts_at_the_base() -> Check:
    """Without training, the logits are the base's."""
    ids, base = kit_text.windows("heldout", 2, 16, 0), kit_text.model(2, 0)
    with torch.no_grad():
        apart = (_adapted(base).eval()(input_ids=ids).logits - base(input_ids=ids).logits).abs().max()
    return Check("largest difference", float(apart), "==", 0)


@CLAIM.exact
def maps_are_linear() -> list[Check]:
    """P(a) + P(b) = P(a + b), and the columns of P have norms around one."""
    apart, norms = 0.0, list[Tensor]()
    for size, d in ((50, 20), (10, 40), (4096, 100), (5000, 64)):
        g = generator(0, "maps", size)
        for made in (Fastfood(size, d, g, torch.device("cpu")), Dense(size, d, g, torch.device("cpu"), True)):
            a, b = torch.randn(2, d, generator=g)
            wanted = made(a + b)
            apart = max(apart, float((made(a) + made(b) - wanted).abs().max() / wanted.abs().max()))
            norms.append(_matrix(made, d).square().sum(0).mean().sqrt())
    return [
        Check("largest relative difference", apart, "<=", 1e-5),
        Check("smallest root mean square of a column norm", float(min(norms)), ">=", 0.8),
        Check("largest root mean square of a column norm", float(max(norms)), "<=", 1.2),
    ]


@CLAIM.exact
def gradient_is_the_projected_one() -> list[Check]:
    """z gets sum_i lambda_i P_i^T g_i of the weights' gradients g_i; the released backward pass gives 1 / L of it."""
    x, y = (t[:64] for t in kit_digits.load().train)
    checks = []
    for kind in ("fastfood", "dense"):
        model = _moved(_adapted(_mlp(0), d=40, map=kind))
        space, merged = _space(model), copy.deepcopy(model).merge_and_unload().requires_grad_(True)
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(merged(x), y).backward()
        wanted = torch.zeros_like(space.z)
        assert space.scales is not None
        for (name, which), (_, drawn) in space.maps.items():
            g = getattr(merged.get_submodule(name), which).grad.flatten()
            wanted += space.scales[space.index[space.groups[name, which]]] * (_matrix(drawn, len(wanted)).T @ g)
        assert space.z.grad is not None
        apart = (space.z.grad - wanted).norm() / wanted.norm()
        checks.append(Check(f"{kind}: relative difference", float(apart.detach()), "<=", 1e-4))
    return checks


@CLAIM.exact
def d_numbers_train() -> list[Check]:
    """The count is d, scales included, on a Llama with tied embeddings and on the MLP."""
    counts = [
        _adapted(base, d=d, structure_aware=aware).get_nb_trainable_parameters()[0] - d
        for base in (kit_text.model(2, 0), _mlp(0))
        for d, aware in ((7, True), (1, False), (5000, True))
    ]
    return [Check("largest difference from d", max(map(abs, counts)), "==", 0)]


@CLAIM.exact
def tied_weights_move_once() -> list[Check]:
    """Merged equals unmerged on a Llama with tied embeddings, and unmerging restores the weights."""
    ids, base = kit_text.windows("heldout", 2, 16, 0), kit_text.model(2, 0)
    model = _moved(_adapted(base, d=100))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.merge_adapter()
        apart = (model(input_ids=ids).logits - expected).abs().max() / expected.abs().max()
        model.unmerge_adapter()
        back = model.unload().state_dict()
    different = sum(not torch.equal(back[name], tensor) for name, tensor in base.state_dict().items())
    return [
        Check("largest relative difference of logits", float(apart), "<=", 1e-5),
        Check("tensors that differ after unmerging", different, "==", 0),
    ]


def fingerprint(folder: str) -> str:
    """SHA-256 of the MLP's weights with the adapter in `folder` merged in."""
    register_peft()
    merged: Any = PeftModel.from_pretrained(_mlp(0), folder).merge_and_unload()
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in merged.state_dict().values())).hexdigest()


@CLAIM.exact
def rebuilt_in_another_process() -> list[Check]:
    """The saved vector and the seed give the same weights, bit for bit, in a process of its own."""
    with TemporaryDirectory() as folder:
        model = _moved(_adapted(_mlp(0), d=100, map="fastfood"))
        model.save_pretrained(folder)
        code = f"from {__name__} import fingerprint; print(fingerprint({folder!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        size = Path(folder, "adapter_model.safetensors").stat().st_size
        merged = model.merge_and_unload().state_dict()
    here = hashlib.sha256(b"".join(t.numpy().tobytes() for t in merged.values())).hexdigest()
    return [
        Check("other weights in the other process", done.stdout.split()[-1] != here, "==", 0),
        Check("bytes saved of 26,122 weights moved by 100 numbers", size, "<=", 1000),
    ]


@CLAIM.comparison
def digits(seed: int) -> dict[str, float]:
    """Test accuracy of every d from both starts, and of full fine-tuning; the d90 of both."""
    data = kit_digits.load()
    (x, y), figures = data.train, dict[str, float]()

    def best(name: str, make: Any, rates: tuple[float, ...]) -> float:
        def run(lr: float) -> nn.Module:
            return kit_digits.train(make(), x, y, steps=STEPS, lr=lr, seed=seed)

        model, rate = kit_digits.search(run, rates, lambda model: kit_digits.accuracy(model, *data.validation))
        figures[name], figures[f"{name}_rate"] = kit_digits.accuracy(model, *data.test), rate
        return figures[name]

    scratch = _mlp(seed)
    related = kit_digits.train(copy.deepcopy(scratch), x.flip(3), y, steps=STEPS, lr=3e-3, seed=seed)
    full = best("full", lambda: copy.deepcopy(scratch), FULL_RATES)
    for start, base in (("random", scratch), ("related", related)):

        def at(d: int, base: nn.Module = base, start: str = start) -> float:
            options: dict[str, Any] = {"d": d, "structure_aware": False, "map": "dense", "seed": seed}
            return best(f"{start}_{d}", lambda: _adapted(base, **options), RATES)

        curve = {d: at(d) for d in GRID}
        figures[f"{start}_d90"] = d90(curve, full) or float("inf")
    best("said_160", lambda: _adapted(scratch, d=160, seed=seed), RATES)
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """The card's thresholds: the bar is 90 % of full fine-tuning; a margin of 10 points for the related start."""
    full, curve = figures.median("full"), [figures.median(f"random_{d}") for d in GRID]
    rises = [after - before for before, after in itertools.pairwise(curve)]
    checks = [
        Check("d = 20, share of full fine-tuning's accuracy", figures.median("random_20") / full, "<=", 0.9),
        Check("d = 160, share of full fine-tuning's accuracy", figures.median("random_160") / full, ">=", 0.9),
        Check("smallest rise from one d to the next, points", min(rises), ">=", 0),
    ]
    for d in (5, 20):
        gain = figures.median(f"related_{d}") - figures.median(f"random_{d}")
        checks.append(Check(f"d = {d}: related start - random start, points", gain, ">=", 10))
    return checks
