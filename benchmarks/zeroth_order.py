"""Optimizers without backpropagation at one budget of forward passes: accuracy, passes, FLOPs and bytes.

    python benchmarks/zeroth_order.py                       # both schemes, every method: about ten minutes
    python benchmarks/zeroth_order.py sgd adam --scheme lora --passes 300

A residual MLP of 17 thousand parameters, pretrained on scikit-learn's digits, is moved to digits that are shifted by
up to a pixel, by full fine-tuning or by LoRA. Every method has the same number of forward passes of 64 pictures, a
backward pass counting for two, and the best of its learning rates by 360 pictures; the accuracy is on 360 others. FLOPs
are those of one step, a tangent beside every activation included. Bytes are exact: the state, and the peak of what a
step makes and still holds beside the weights (activations, gradients, tangents, blocks of noise; matrix products
without their workspaces).
Results go to `benchmarks/results/zeroth_order.json` and `zeroth_order.md`.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tunesmith.core.meters import flops, state_bytes
from tunesmith.evidence import kit_digits
from tunesmith.evidence.kit_bytes import LiveBytes
from tunesmith.evidence.optimizers.zo_benchmark import METHODS, ROWS, adapt, held, made
from tunesmith.optimizers.zo_benchmark import ZOBenchmark

RESULTS = Path(__file__).parent / "results"
RATES = {"full": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "lora": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
NAMES = (*METHODS, "first_order")


def start() -> nn.Module:
    """The pretrained model."""
    return kit_digits.train(kit_digits.mlp(0), *kit_digits.load().train, steps=300, lr=2e-3, seed=0)


def scheme(model: nn.Module, name: str) -> nn.Module:
    """The model with what trains under a tuning scheme."""
    if name == "full":
        return model
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["stem", "linear"])
    torch.manual_seed(0)
    return get_peft_model(model, config)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: kit_digits.Rows) -> Callable[[], None]:
    """A step on the first batch."""
    x, y = (part[:ROWS] for part in rows)

    def closure() -> Tensor:
        return F.cross_entropy(kit_digits.logits(model, x), y)

    def run() -> None:
        if isinstance(optimizer, ZOBenchmark):
            optimizer.step(closure)
        else:
            closure().backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def measured(
    name: str, kind: str, passes: int, weights: dict[str, Tensor], target: kit_digits.Digits
) -> dict[str, Any]:
    """One method under one scheme."""

    def fresh() -> nn.Module:
        model = kit_digits.mlp(0)
        model.load_state_dict(weights)
        return scheme(model, kind).eval()

    runs = []
    for lr in RATES[kind]:
        model = fresh()
        optimizer, each = made(model, name, lr, 0)
        adapt(model, optimizer, target.train, passes // each, 0)
        score = held(model, target.validation), held(model, target.test), kit_digits.accuracy(model, *target.test), lr
        runs.append(score)
    _, loss, accuracy, rate = min(runs)
    model = fresh()
    optimizer, each = made(model, name, 0.0, 0)
    run = one_step(model, optimizer, target.train)
    run()  # state is there from the second step on
    with LiveBytes() as live:
        run()
    return {
        "method": name,
        "scheme": kind,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "accuracy": accuracy,
        "loss": loss,
        "learning_rate": rate,
        "steps": passes // each,
        "passes_per_step": each,
        "mflops_per_step": flops(run) / 1e6,
        "state_bytes": state_bytes(optimizer),
        "peak_bytes": live.peak,
    }


def table(rows: list[dict[str, Any]], before: float, passes: int) -> str:
    """Markdown."""
    lines = [
        "| scheme | method | accuracy, % | loss, nats | learning rate | passes a step | MFLOPs a step | state, KiB | "
        "peak of a step, KiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [
            f"{row['scheme']} ({row['trained']:,})",
            row["method"].replace("_", " "),
            f"{row['accuracy']:.1f}",
            f"{row['loss']:.3f}",
            f"{row['learning_rate']:g}",
            str(row["passes_per_step"]),
            f"{row['mflops_per_step']:.1f}",
            f"{row['state_bytes'] / 1024:.1f}",
            f"{row['peak_bytes'] / 1024:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"A residual MLP pretrained on digits, moved to shifted ones by {passes:,} forward passes of {ROWS} pictures "
        f"(a backward pass counts for two), best of five learning rates; {before:.1f} % before. One seed: small "
        "differences say nothing. First order is SGD with the true gradient.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(NAMES)}; all without any")
    parser.add_argument("--scheme", choices=RATES, action="append")
    parser.add_argument("--passes", type=int, default=3000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*gives no slope")  # too high a learning rate loses the search
    model, data = start(), kit_digits.load()
    target = data.each(lambda x: kit_digits.shifted(x, 0))
    before, weights = kit_digits.accuracy(model, *target.test), dict(kit_digits.snapshot(model))
    rows = []
    for kind in asked.scheme or RATES:
        for name in asked.methods or NAMES:
            rows.append(measured(name, kind, asked.passes, weights, target))
            print(f"{kind:5} {name:20} {rows[-1]['accuracy']:5.1f} % at {rows[-1]['learning_rate']:g}", flush=True)
    print("\n" + table(rows, before, asked.passes))
    if not asked.methods and not asked.scheme:
        RESULTS.mkdir(exist_ok=True)
        content = {"torch": torch.__version__, "before": before, "passes": asked.passes, "rows": rows}
        (RESULTS / "zeroth_order.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "zeroth_order.md").write_text(table(rows, before, asked.passes), encoding="utf-8")


if __name__ == "__main__":
    main()
