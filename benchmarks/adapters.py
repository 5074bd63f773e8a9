"""Forward and backward of one layer with each adapter, against PEFT's LoRA of the same parameter count.

    python benchmarks/adapters.py                     # every adapter, both dtypes: about ten minutes
    python benchmarks/adapters.py dylora eva --dtype float32 --repetitions 3

A linear layer of 1024 x 1024 and 2048 tokens. For each adapter, with its default options, a PEFT LoRA of the nearest
rank stands beside it in the same process; the two are timed in turns. Counted are the median seconds of a forward and
backward pass, as a ratio, and the bytes that autograd keeps for the backward pass, the layer's own parameters left out.
Results go to `benchmarks/results/adapters.json` and `adapters.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import tunesmith
from tunesmith import catalog
from tunesmith.core.meters import saved_bytes
from tunesmith.errors import TunesmithError

RESULTS = Path(__file__).parent / "results"
WIDTH, TOKENS, STEPS = 1024, 2048, 1000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Layer(nn.Module):
    """A layer as a model has it: what goes in carries a gradient."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return self.layer(x)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]).float().square().mean()


def contender(slug: str, dtype: torch.dtype) -> nn.Module:
    """The layer with the adapter, prepared, moved off its start."""
    torch.manual_seed(0)
    model = get_peft_model(Layer(dtype), tunesmith.adapter(slug, target_modules=["layer"]))
    x = torch.randn(4, TOKENS // 4, WIDTH).to(dtype)
    tunesmith.initialise(model, [{"x": x}], loss=loss)
    return model.train()


def peer(count: int, dtype: torch.dtype) -> tuple[nn.Module, int]:
    """PEFT's LoRA of the nearest parameter count, and its rank."""
    torch.manual_seed(0)
    rank = max(round(count / (2 * WIDTH)), 1)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"])
    return get_peft_model(Layer(dtype), config).train(), rank


def passes(model: nn.Module, x: Tensor, number: int) -> float:
    """Seconds of one forward and backward pass, what is done at every step included."""
    began = time.perf_counter()
    with tunesmith.step(model, number, STEPS):
        model(x).backward(torch.ones((), dtype=x.dtype).expand(x.shape))
    spent = time.perf_counter() - began
    model.zero_grad()
    x.grad = None
    return spent


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that the forward pass keeps."""
    with tunesmith.step(model, 0, STEPS), saved_bytes(model) as found:
        out = model(x)
    del out
    return found.bytes


def measured(slug: str, name: str, repetitions: int) -> dict[str, Any]:
    """One adapter in one dtype, beside its peer."""
    dtype = DTYPES[name]
    ours = contender(slug, dtype)
    count = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    theirs, rank = peer(count, dtype)
    x = torch.randn(1, TOKENS, WIDTH).to(dtype).requires_grad_()
    seconds: dict[str, list[float]] = {"ours": [], "peft": []}
    for number in range(repetitions + 2):
        for side, model in (("ours", ours), ("peft", theirs)):
            spent = passes(model, x, number)
            if number >= 2:
                seconds[side].append(spent)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "adapter": slug,
        "dtype": name,
        "parameters": count,
        "peft_rank": rank,
        "seconds": medians["ours"],
        "peft_seconds": medians["peft"],
        "time_ratio": medians["ours"] / medians["peft"],
        "saved_bytes": kept(ours, x),
        "peft_saved_bytes": kept(theirs, x),
        "every": seconds,
    }


def table(rows: list[dict[str, Any]], skipped: dict[str, str]) -> str:
    """Markdown."""
    by = {(row["adapter"], row["dtype"]): row for row in rows}
    lines = [
        "| adapter | parameters | PEFT's rank | time, float32 | time, bfloat16 | kept, float32 | kept, bfloat16 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for slug in dict.fromkeys(row["adapter"] for row in rows):
        first = next(row for row in rows if row["adapter"] == slug)
        cells = [slug, f"{first['parameters']:,}", str(first["peft_rank"])]
        for dtype in DTYPES:
            row = by.get((slug, dtype))
            cells.append(f"{row['time_ratio']:.2f}" if row else "")
        for dtype in DTYPES:
            row = by.get((slug, dtype))
            cells.append(f"{row['saved_bytes'] / 2**20:.1f} / {row['peft_saved_bytes'] / 2**20:.1f}" if row else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Forward and backward of one layer, {WIDTH} x {WIDTH}, {TOKENS} tokens, {torch.get_num_threads()} threads; "
        "time as a ratio to PEFT's LoRA, bytes kept for the backward pass in MiB, ours / PEFT's.",
    ]
    lines += [f"Not measured: {slug} ({reason})." for slug, reason in skipped.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapters", nargs="*", help="names of the catalogue; all without any")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    wanted = asked.adapters or [part.slug for part in catalog.in_room("adapters")]
    rows, skipped = [], dict[str, str]()
    for slug in wanted:
        for dtype in asked.dtype or DTYPES:
            try:
                row = measured(slug, dtype, asked.repetitions)
            except (TunesmithError, ValueError) as error:
                skipped[slug] = str(error).split(":")[0]
                break
            rows.append(row)
            size, theirs = (row[key] / 2**20 for key in ("saved_bytes", "peft_saved_bytes"))
            print(
                f"{slug:24} {dtype:9} time {row['time_ratio']:5.2f}  kept {size:6.1f} / {theirs:6.1f} MiB", flush=True
            )
    print("\n" + table(rows, skipped))
    if not asked.adapters:
        RESULTS.mkdir(exist_ok=True)
        content = {"torch": torch.__version__, "threads": asked.threads, "rows": rows, "skipped": skipped}
        (RESULTS / "adapters.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "adapters.md").write_text(table(rows, skipped), encoding="utf-8")


if __name__ == "__main__":
    main()
