"""`python -m tunesmith.models.pretrain NAME`: make one of the embedded models."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from tunesmith.errors import TunesmithError
from tunesmith.models.embedded import EMBEDDED, WEIGHTS
from tunesmith.models.pretrain import encoder, lm, tokenizer, unet, vit


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tunesmith.models.pretrain", description=__doc__)
    parser.add_argument("name", choices=list(EMBEDDED), help="which model")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the model's own number")
    parser.add_argument("--threads", type=int, default=1, help="processor threads (default 1)")
    parser.add_argument("--output", type=Path, help="folder of the finished model (default: inside the package)")
    parser.add_argument("--checkpoints", type=Path, help="folder of the run (default: runs/pretrain/NAME)")
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    parser.add_argument("--compile", action="store_true", help="compile the model; needs a C++ compiler, 1.6 x faster")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    output = options.output or WEIGHTS / options.name
    checkpoints = options.checkpoints or Path("runs", "pretrain", options.name)
    try:
        if options.name == "tokenizer":
            tokenizer.make(output)
            return 0
        plans = {**lm.PLANS, "tiny-encoder": encoder.PLAN, "tiny-vit": vit.PLAN, "tiny-unet": unet.PLAN}
        plan = plans[options.name]
        if options.steps is not None:
            plan = replace(plan, steps=options.steps)
        others = {"tiny-encoder": encoder.make, "tiny-vit": vit.make, "tiny-unet": unet.make}
        make = others.get(options.name, lm.make)
        make(plan, output, checkpoints, resume=options.resume, compiled=options.compile)
    except TunesmithError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
