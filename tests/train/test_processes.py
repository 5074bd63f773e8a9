"""Two processes give what one gives with twice the batch, to 1e-5, whoever starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.train.resuming import QUICK
from tests.train.test_resume import METHODS
from tunesmith import catalog
from tunesmith.core.adapter import Adapter
from tunesmith.train import run


def _differs(name: str) -> bool:
    """Whether a part could differ between processes: all but adapters that are the same layer in every step."""
    found = catalog.parts().get(name)
    if found is None or not isinstance(found.target, type) or not issubclass(found.target, Adapter):
        return True
    hooks = ("begin", "end", "begin_step", "end_step", "share")
    plain = [getattr(getattr(Adapter, hook), "__func__", getattr(Adapter, hook)) for hook in hooks]
    own = [getattr(getattr(found.target, hook), "__func__", getattr(found.target, hook)) for hook in hooks]
    return own != plain or bool(found.target.statistics)


# Every trainable room, and both ways of adding adapters (peft's own and ours).
TOGETHER = {name: fields for name, fields in METHODS.items() if _differs(name)}
TOGETHER |= {"diversify-conquer": {"method": "lora", "data.select": [{"name": "diversify-conquer"}]}}
TOGETHER["lora"] = {"method": "lora"}  # dropout draws other masks in another process
TOGETHER |= {f"{name}-accumulated": {**METHODS[name], "train.gradient_accumulation": 2} for name in ("adalora", "lisa")}
TOGETHER["slimfit"] = {"schedule": {"name": "slimfit", "compress": False}}  # what it rounds are a process's own rows
LOCAL = {"greentrainer"}
"""Chooses by what the rows of the first process cost: it runs on two, and ends elsewhere than on one."""
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    # With --cpu accelerate starts one process, whatever the number; --multi_gpu is its way to start several.
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
}
JOBS = """
import json, sys, torch
torch.set_num_threads(1)
from tunesmith.cli.common import quiet
quiet()
from tunesmith import catalog
from tunesmith.core.adapter import Adapter
from tunesmith.train import run
for fields in json.loads(open(sys.argv[1]).read()):
    run(None, **fields)
"""
TOLERANCE = 1e-5


def launched(launcher: str, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Run the recipes one after the other in two processes."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "jobs.py").write_text(JOBS)
    command = [sys.executable, *LAUNCHERS[launcher], str(folder / "jobs.py"), str(folder / "jobs.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]


def farthest(one: str, other: str) -> float:
    """The largest difference of two runs' weights."""
    a, b = (load_file(next(Path(folder, "model").glob("*.safetensors"))) for folder in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a if a[name].numel())


@pytest.fixture
def compared(
    recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> Callable[[str, dict[str, dict[str, Any]]], dict[str, float]]:
    """`(launcher, changes by name) -> the largest difference by name`."""

    def compare(launcher: str, changes: dict[str, dict[str, Any]]) -> dict[str, float]:
        jobs = {}
        for name, change in changes.items():
            common = recipe(
                **{
                    "train.learning_rate": 1e-3,
                    **QUICK,
                    "train.save_every": 8,
                    **change,
                    "output": str(tmp_path / f"run-{name}" / "two"),
                }
            )
            jobs[name] = {**common, "train.batch_size": 2}
            run(None, **{**common, "output": str(tmp_path / f"run-{name}" / "one"), "train.fsdp": False})
        launched(launcher, list(jobs.values()), tmp_path)
        return {name: farthest(str(tmp_path / f"run-{name}" / "one"), job["output"]) for name, job in jobs.items()}

    return compare


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_with_a_method_of_every_room(compared: Any) -> None:
    found = compared("torchrun", TOGETHER)
    expected = {name: found[name] if name in LOCAL else 0.0 for name in TOGETHER}
    assert found == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.distributed
def test_accelerate_launch(compared: Any) -> None:
    found = compared("accelerate", {name: TOGETHER[name] for name in ("full", "lora")})
    assert found == pytest.approx({"full": 0.0, "lora": 0.0}, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.distributed
def test_weights_sharded_over_two_processes(compared: Any) -> None:
    sharded = {name: {**TOGETHER[name], "train.fsdp": True} for name in ("full", "lora")}
    assert compared("torchrun", sharded) == pytest.approx({"full": 0.0, "lora": 0.0}, abs=TOLERANCE)
