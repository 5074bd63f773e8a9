"""APET: counts, places and untouched weights, exactly; accuracy over counts, structures and widths on the digits."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

import tunesmith
from tunesmith.adapters.apet import APET, Plan, spend, study
from tunesmith.core.layer import LayerSpec
from tunesmith.core.seeds import generator
from tunesmith.evidence import kit_digits, kit_text
from tunesmith.evidence.claim import Check, Claim, Figures

WIDTHS, SHARES, STRUCTURES = (32, 64, 128), (0.002, 0.02, 0.2), 3
STEPS, ROWS = 60, 32
RATES, FULL_RATES = (3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3)

CLAIM = Claim(
    "apet",
    says="The larger the model, the less it matters which parameters train, and the fewer are needed; all methods need "
    "about as many to leave chance level.",
    where="abstract",
    ran="Counts and places on small models, the published counts on the layers of BLOOM-7.1B. Then ViTs of 2 blocks "
    "and widths 32, 64 and 128, trained on mirrored digits, are tuned to the digits: three random structures at each "
    "of 0.2, 2 and 20 % of the blocks' linear layers, 60 AdamW steps of 32, and all weights beside. Each count and "
    "full fine-tuning get three learning rates, chosen on other pictures than the accuracy reported (of a count, by "
    "its first structure). Compared are means over structures; their spread at 2 % is reported without a threshold.",
)


def _adapted(base: nn.Module, **options: Any) -> Any:
    return get_peft_model(copy.deepcopy(base), tunesmith.adapter("apet", **options))


def _held(model: nn.Module) -> list[APET]:
    return [m for m in model.modules() if isinstance(m, APET)]


@CLAIM.exact
def exactly_n_entries_move() -> list[Check]:
    """After 50 AdamW steps with decay the drawn entries have moved and all others are the base's, bit for bit."""
    n, base = 3000, kit_text.model(2, 0)
    model = _adapted(base, budget=n)
    trained = model.get_nb_trainable_parameters()[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    for batch in kit_text.batches("train", 50, 2, 32, 0):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    drawn = {made.layer.name: made.weight_at for made in _held(model)}
    inside = outside = 0
    for name, tensor in model.merge_and_unload().state_dict().items():
        moved = tensor != base.state_dict()[name]
        at = drawn.get(name.removesuffix(".weight"))
        here = int(moved.flatten()[at.long()].sum()) if at is not None else 0
        inside, outside = inside + here, outside + int(moved.sum()) - here
    return [
        Check("numbers that train", trained, "==", n),
        Check("drawn entries that moved", inside, "==", n),
        Check("other entries that moved", outside, "==", 0),
    ]


def _bloom(blocks: int = 30, hidden: int = 4096) -> list[LayerSpec]:
    """Every layer of BLOOM-7.1B but the head, which is tied, under Llama's names for the output projections."""

    def spec(name: str, kind: str, *shape: int, bias: bool = True) -> LayerSpec:
        return LayerSpec(name, kind, shape, torch.float32, torch.device("meta"), bias, bias)

    layers = [spec("embed_tokens", "embedding", 250880, hidden, bias=False), spec("embed_norm", "norm", hidden)]
    for i in range(blocks):
        layers += [
            spec(f"layers.{i}.input_norm", "norm", hidden),
            spec(f"layers.{i}.self_attn.qkv_proj", "linear", 3 * hidden, hidden),
            spec(f"layers.{i}.self_attn.o_proj", "linear", hidden, hidden),
            spec(f"layers.{i}.post_norm", "norm", hidden),
            spec(f"layers.{i}.mlp.up_proj", "linear", 4 * hidden, hidden),
            spec(f"layers.{i}.mlp.down_proj", "linear", hidden, 4 * hidden),
        ]
    return [*layers, spec("norm", "norm", hidden)]


@CLAIM.exact
def published_counts() -> list[Check]:
    """The counts of the paper's methods on BLOOM-7.1B: LoRA of rank 8 on q, k, v; adapters of width 24; BitFit."""
    checks = []
    for budget, granularity, published in (
        ("lora", "tensor", 3932160),
        ("adapter", "tensor", 12043680),
        ("bitfit", "element", 1359872),
    ):
        layers = [s for s in _bloom() if budget != "lora" or "qkv" in s.name]
        options = {"budget": budget, "granularity": granularity, "lora_rank": 8, "bottleneck": 24, "seed": 0}
        plan = Plan(layers, options)
        checks.append(Check(f"{budget}: numbers of the budget", plan.n, "==", published))
    return [*checks, Check("entries drawn for BitFit's count", sum(map(len, plan.entries.values())), "==", published)]


@CLAIM.exact
def tensors_fill_the_budget() -> list[Check]:
    """Whole tensors never overshoot, and what is unspent is less than the smallest that was left out."""
    overshoot, wrong = -math.inf, 0
    for trial in range(300):
        g = generator(0, "groups", trial)
        kinds = ("lora", "bottleneck", "weight", "bias")
        sizes = {(str(i), kinds[i % 4]): int(torch.randint(1, 400, (), generator=g)) for i in range(40)}
        n = int(torch.randint(400, sum(sizes.values()), (), generator=g))
        chosen = spend(sizes, n, trial)
        spent = sum(sizes[group] for group in chosen)
        overshoot = max(overshoot, spent - n)
        wrong += n - spent >= min(size for group, size in sizes.items() if group not in chosen)
    return [
        Check("largest overshoot", overshoot, "<=", 0),
        Check("budgets of 300 into which one more tensor fits", wrong, "==", 0),
    ]


def places() -> str:
    """SHA-256 of the drawn places in a small Llama."""
    drawn = [made.weight_at for made in _held(_adapted(kit_text.model(2, 0), budget=5000))]
    return hashlib.sha256(b"".join(at.numpy().tobytes() for at in drawn if at is not None)).hexdigest()


@CLAIM.exact
def same_places_in_another_process() -> Check:
    """The seed gives the same places in a process of its own."""
    code = f"from {__name__} import places; print(places())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return Check("other places in the other process", done.stdout.split()[-1] != places(), "==", 0)


@CLAIM.exact
def saved_size() -> Check:
    """Each further entry adds its index and its value to the saved adapter, 4 bytes each."""
    sizes = []
    for n in (2000, 20000):
        with TemporaryDirectory() as folder:
            _adapted(kit_text.model(2, 0), budget=n).save_pretrained(folder)
            sizes.append(Path(folder, "adapter_model.safetensors").stat().st_size)
    return Check("bytes per further entry", (sizes[1] - sizes[0]) / 18000, "<=", 8.01)


def _tuned(base: nn.Module, options: dict[str, Any] | None, lr: float, seed: int) -> nn.Module:
    """Tuned to the digits: APET, or all weights if there are no options."""
    model = copy.deepcopy(base) if options is None else _adapted(base, **options)
    return kit_digits.train(model, *kit_digits.load().train, steps=STEPS, lr=lr, seed=seed, batch=ROWS)


@CLAIM.comparison
def widths(seed: int) -> dict[str, float]:
    """Test accuracy by width and share: mean over structures, spread; before tuning; of full fine-tuning."""
    data = kit_digits.load()
    (x, y), figures = data.train, dict[str, float]()

    def validated(model: nn.Module) -> float:
        return kit_digits.accuracy(model, *data.validation)

    for width in WIDTHS:
        base = kit_digits.vit(seed, width=width, blocks=2)
        base = kit_digits.train(base, x.flip(3), y, steps=200, lr=3e-3, seed=seed, batch=ROWS)
        figures[f"before_{width}"] = kit_digits.accuracy(base, *data.test)

        def run(lr: float, options: dict[str, Any] | None = None, base: nn.Module = base) -> nn.Module:
            return _tuned(base, options, lr, seed)

        model, rate = kit_digits.search(run, FULL_RATES, validated)
        figures |= {f"full_{width}": kit_digits.accuracy(model, *data.test), f"full_{width}_rate": rate}
        eligible = _eligible(base)
        counts = {math.ceil(share * eligible): share for share in SHARES}
        chosen: dict[int, float] = {}

        def score(n: int, structure: int, run: Any = run, chosen: dict[int, float] = chosen) -> float:
            options = {"budget": n, "seed": structure}
            if structure == 0:
                model, chosen[n] = kit_digits.search(lambda lr: run(lr, options), RATES, validated)
            else:
                model = run(chosen[n], options)
            return kit_digits.accuracy(model, *data.test)

        found = study(score, counts, STRUCTURES)
        for n, share in counts.items():
            key = f"{width}_{share:g}"
            figures |= {f"mean_{key}": found.mean(n), f"spread_{key}": found.spread(n), f"rate_{key}": chosen[n]}
    return figures


def _eligible(base: nn.Module) -> int:
    """Weights and biases of the layers that APET takes by default."""
    layers: list[nn.Module] = [base.get_submodule(name) for name in APET.targets(base)]
    tensors: list[Tensor] = [p for layer in layers for p in layer.parameters(recurse=False)]
    return sum(p.numel() for p in tensors)


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """The card's threshold: more numbers do not lose more than 2 points."""
    checks = []
    for width in WIDTHS:
        curve = [figures.median(f"mean_{width}_{share:g}") for share in SHARES]
        rise = min(after - before for before, after in itertools.pairwise(curve))
        checks.append(Check(f"width {width}: smallest rise from one count to the next, points", rise, ">=", -2))
    return checks
