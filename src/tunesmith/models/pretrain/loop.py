"""A plain training loop that can be killed at any moment and continued."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import nn

from tunesmith.core.files import remove_staging, staged_folder
from tunesmith.errors import CheckpointError

CHECKPOINT_SECONDS = 300.0
REPORT_STEPS = 100


@dataclass(frozen=True)
class Plan:
    """How a model is trained. `batch` names the sizes of a step's batches, for the record."""

    name: str
    steps: int
    lr: float
    seed: int
    batch: dict[str, int]
    warmup: int = 100
    horizon: int = 0  # where the cosine would reach zero; 0: at `steps`
    cooldown: int = 1  # last steps, over which the rate also falls linearly to zero
    weight_decay: float = 0.1
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: warm-up, cosine, cool-down."""
        horizon = self.horizon or self.steps
        if step < self.warmup:
            factor = step / self.warmup
        else:
            factor = 0.5 + 0.5 * math.cos(math.pi * (step - self.warmup) / (horizon - self.warmup))
        return self.lr * factor * min(1.0, (self.steps - step) / self.cooldown)


@dataclass
class Spent:
    """What a run has used so far, interruptions left out."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def train(
    model: nn.Module,
    plan: Plan,
    loss_of: Callable[[int], tuple[torch.Tensor, int]],
    *,
    checkpoints: Path,
    resume: bool,
) -> Spent:
    """AdamW in bfloat16 autocast; weights stay float32.

    Args:
        loss_of: step -> (scalar loss, tokens in the batch); all randomness must come from the step.
        checkpoints: a folder of this run's own; the checkpoint in it is replaced every five minutes.
        resume: continue from the checkpoint if there is one.

    Raises:
        CheckpointError: the checkpoint belongs to another plan.
    """
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": plan.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.95), fused=True)
    remove_staging(checkpoints)
    last = checkpoints / "last"
    spent = _load(model, optimizer, plan, last) if resume and last.is_dir() else Spent()
    model.train()
    console = Console()
    saved_at = time.monotonic()
    recent: list[float] = []
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(plan.name, total=plan.steps, completed=spent.step)
        while spent.step < plan.steps:
            began = time.monotonic()
            with torch.autocast("cpu", torch.bfloat16):
                loss, tokens = loss_of(spent.step)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
            for group in optimizer.param_groups:
                group["lr"] = plan.rate(spent.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            spent.step += 1
            spent.tokens += tokens
            spent.seconds += time.monotonic() - began
            recent.append(loss.item())
            progress.advance(task)
            if spent.step % REPORT_STEPS == 0:
                speed = f", {spent.tokens} tokens, {spent.tokens / spent.seconds:.0f} a second" if spent.tokens else ""
                console.print(f"step {spent.step}: loss {sum(recent) / len(recent):.4f}{speed}")
                recent.clear()
            if time.monotonic() - saved_at > CHECKPOINT_SECONDS or spent.step == plan.steps:
                _save(model, optimizer, plan, spent, last)
                saved_at = time.monotonic()
    return spent


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model whose initial weights `seed` decides, without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _record(plan: Plan) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(plan)))


def _save(model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, spent: Spent, folder: Path) -> None:
    with staged_folder(folder) as staging:
        # clones: tied weights share memory, which safetensors refuses
        save_file({name: p.detach().clone() for name, p in model.named_parameters()}, staging / "model.safetensors")
        torch.save(optimizer.state_dict(), staging / "optimizer.pt")
        (staging / "run.json").write_text(json.dumps({"plan": _record(plan), "spent": asdict(spent)}))


def _load(model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, folder: Path) -> Spent:
    run = json.loads((folder / "run.json").read_text())
    then, now = run["plan"], _record(plan)
    if then != now:
        changed = ", ".join(f"{key}: {then.get(key)} then, {now[key]} now" for key in now if then.get(key) != now[key])
        raise CheckpointError(
            f"{folder} holds a run with another plan ({changed}). Give the same options as for that run, another "
            f"--checkpoints folder, or leave out --resume to begin again."
        )
    weights = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    return Spent(**run["spent"])
