"""FedKSeed over the network: the pipeline runs inside a Flower ServerApp, clients are Flower's SuperNodes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tunesmith.core.files import staged_folder, write_text
from tunesmith.systems.fedkseed_flower import Exchange, Grid, exchange

_grid: Grid | None = None

PROJECT = """\
[project]
name = "tunesmith-fedkseed"
version = "1.0.0"
description = "A federation of tunesmith"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "tunesmith"

[tool.flwr.app.components]
serverapp = "federation:server"
clientapp = "federation:client"

[tool.flwr.app.config]
"""

APP = """\
# The server goes on with the pipeline in FOLDER; a client has its folder from its node's configuration.
import os
from pathlib import Path

import yaml
from flwr.serverapp import ServerApp

from tunesmith.systems.fedkseed_flower import client_app

FOLDER, DIRECTORY = Path({folder!r}), {directory!r}
client = client_app()
server = ServerApp()


@server.main()
def main(grid, context):
    from tunesmith.recipe import load
    from tunesmith.systems.fedkseed_network import serving
    from tunesmith.train import pipeline

    os.chdir(DIRECTORY)
    asked = yaml.safe_load((FOLDER / "pipeline.yaml").read_text(encoding="utf-8"))
    recipe = load({{**asked["recipe"], "output": str(FOLDER)}})
    with serving(grid):
        pipeline("fedkseed", recipe, resume=True, **asked["options"])
"""


@contextmanager
def serving(grid: Grid) -> Iterator[None]:
    """Inside the block, this process is the server, and asks its clients over this grid."""
    global _grid
    _grid = grid
    try:
        yield
    finally:
        _grid = None


class Network:
    """Clients behind a Flower SuperLink.

    Args:
        folder: Of the pipeline.
        clients: How many must be connected.
        timeout: Seconds to wait for them, and for the answers of a round.
    """

    def __init__(self, folder: Path, clients: int, timeout: float) -> None:
        self.folder, self.clients, self.timeout = folder.resolve(), clients, timeout

    def missing(self) -> list[str]:
        """Write the Flower app, and say how to start the parties; nothing inside of its ServerApp."""
        if _grid is not None:
            return []
        app = self.folder / "app"
        with staged_folder(app) as place:
            write_text(place / "pyproject.toml", PROJECT)
            write_text(place / "federation.py", APP.format(folder=str(self.folder), directory=os.getcwd()))
        return [
            "on the server: flower-superlink --insecure (or with certificates)",
            f"on each of {self.clients} clients: flower-supernode --insecure --superlink SERVER:8000 "
            "--node-config 'folder=\"CLIENT_FOLDER\" rows=0', where CLIENT_FOLDER is the `federation` of a fedkseed "
            "pipeline over the client's own rows with clients=1 and rounds=0",
            f"then, with the SuperLink's address in Flower's configuration: flwr run {app}; again to go on where it "
            "was stopped",
        ]

    def run(self, work: Callable[[Exchange], None]) -> None:
        assert _grid is not None
        work(partial(exchange, _grid, self.clients, self.timeout))
