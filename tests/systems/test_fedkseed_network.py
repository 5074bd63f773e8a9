"""A federation of real processes over loopback: a SuperLink, two SuperNodes, the server in a ServerApp."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import data_file, model_folder, recipe  # noqa: F401
from tunesmith.recipe import load
from tunesmith.train import pipeline

OPTIONS = {"clients": 2, "share": 1.0, "steps": 4, "seeds": 8, "evaluate_rows": 4, "learning_rate": 1e-3}
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@contextmanager
def started(name: str, *arguments: str, environment: dict[str, str], log: Path) -> Iterator[None]:
    """A command of Flower's in a group of its own, which is ended with all that it started."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(BIN / name), *arguments], stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(process.pid, 15)
        process.wait(20)


def sums(folder: Path) -> torch.Tensor:
    return load_file(folder / "log" / "sums.safetensors")["sums"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_clients_over_loopback_are_those_of_one_process(
    recipe: Callable[..., dict[str, Any]],  # noqa: F811
    tmp_path: Path,
) -> None:
    fields = {**recipe(), "train.steps": None, "train.learning_rate": None}
    alone, over = tmp_path / "alone", tmp_path / "over"
    pipeline("fedkseed", load(None, {**fields, "output": str(alone)}), transport="here", rounds=2, **OPTIONS)
    asked = load(None, {**fields, "output": str(over)})
    waiting = pipeline("fedkseed", asked, transport="network", rounds=2, **OPTIONS)
    assert "flwr run" in waiting.notes[-1]
    assert not (over / "model").exists()

    port, home = free_port(), tmp_path / "flower"
    home.mkdir()
    address = f"127.0.0.1:{port}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n[superlink.local]\naddress = "{address}"\ninsecure = true\n'
    )
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    with ExitStack() as parties:

        def start(name: str, *arguments: str) -> None:
            log = tmp_path / f"{name}-{arguments[-1].replace('/', '_')[:20]}.log"
            parties.enter_context(started(name, "--insecure", *arguments, environment=environment, log=log))

        start("flower-superlink", "--disable-runtime-dependency-installation", "--port", str(port))
        config = f'folder="{over / "federation"}"'
        for _ in range(2):
            start("flower-supernode", "--superlink", address, "--node-config", config, "--port", str(free_port()))
        end = time.monotonic() + 240
        while subprocess.run(
            [BIN / "flwr", "run", over / "app", "local"], capture_output=True, env=environment
        ).returncode:
            assert time.monotonic() < end, "the SuperLink does not answer"
        while not (over / "log").exists():
            assert time.monotonic() < end, "".join(p.read_text()[-3000:] for p in tmp_path.glob("*.log"))
            time.sleep(0.5)
    assert torch.equal(sums(over), sums(alone))
    assert (
        load_file(over / "model" / "model.safetensors").keys()
        == load_file(alone / "model" / "model.safetensors").keys()
    )


def test_a_client_makes_its_own_folder(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:  # noqa: F811
    fields = {**recipe(), "train.steps": None, "train.learning_rate": None, "output": str(tmp_path / "mine")}
    made = pipeline("fedkseed", load(None, fields), rounds=0, **{**OPTIONS, "clients": 1})
    assert made.figures["loss"].value == made.figures["loss"].before
    held = sorted(p.name for p in (tmp_path / "mine" / "federation").iterdir())
    assert held == ["base", "rows-0.safetensors"]
