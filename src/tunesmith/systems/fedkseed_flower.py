"""FedKSeed over Flower: the server's rounds in a ServerApp, clients in a ClientApp; a message is bytes in a record."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import TunesmithError
from tunesmith.systems.fedkseed_client import Client, ClientFailedError
from tunesmith.systems.fedkseed_server import Exchange, Reply

# Neither may call home from a training run; both read this when they are imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

try:
    from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.common.serde import message_to_proto
    from flwr.serverapp import Grid, ServerApp
except ImportError as error:
    raise TunesmithError(
        f"fedkseed with transport=flower needs Flower ({error}): pip install 'tunesmith[federated]', or take "
        "transport=here"
    ) from None

_RECORD, _KEY, _FAILED = "fedkseed", "message", 1000


@lru_cache(maxsize=1)
def _client(folder: str) -> Client:
    """One model per process, for all the clients that it plays."""
    torch.set_num_threads(1)
    return Client(folder, "cuda" if torch.cuda.is_available() else "cpu")


def answer(folder: str, message: Message, context: Context) -> Message:
    """What a ClientApp does with a message; a node that is one client names its folder in its configuration."""
    held, rows = str(context.node_config.get("folder", folder)), context.node_config.get("rows")
    data = message.content.config_records[_RECORD][_KEY]
    assert isinstance(data, bytes)
    try:
        found = _client(held).answer(data, None if rows is None else int(rows))
    except ClientFailedError as failed:
        return Message(Error(_FAILED, str(failed)), reply_to=message)
    return Message(RecordDict({_RECORD: ConfigRecord({_KEY: found})}), reply_to=message)


def client_app(folder: str = "") -> ClientApp:
    """A Flower ClientApp.

    Args:
        folder: Of the clients; one that is given in a node's configuration (`folder`) comes first.
    """
    app = ClientApp()
    app.train()(partial(answer, folder))
    return app


def exchange(grid: Grid, clients: int, timeout: float, turn: int, messages: Mapping[int, bytes]) -> dict[int, Reply]:
    """Send each client its message, and wait for the answers.

    Raises:
        TunesmithError: fewer nodes than clients are connected within the time.
    """
    nodes = _nodes(grid, clients, timeout)
    client_of = {nodes[number]: number for number in messages}
    sent = {
        number: Message(RecordDict({_RECORD: ConfigRecord({_KEY: data})}), nodes[number], "train", group_id=str(turn))
        for number, data in messages.items()
    }
    size = {number: message_to_proto(message).ByteSize() for number, message in sent.items()}
    found = {}
    for reply in grid.send_and_receive(list(sent.values()), timeout=timeout):
        number = client_of[reply.metadata.src_node_id]
        if reply.has_error():
            found[number] = Reply(None, size[number], why=reply.error.reason or f"error {reply.error.code}")
            continue
        data = reply.content.config_records[_RECORD][_KEY]
        assert isinstance(data, bytes)
        found[number] = Reply(data, size[number], message_to_proto(reply).ByteSize())
    return found


def _nodes(grid: Grid, clients: int, timeout: float) -> list[int]:
    end = time.monotonic() + timeout
    while len(found := sorted(grid.get_node_ids())) < clients:
        if time.monotonic() > end:
            raise TunesmithError(f"fedkseed: {clients} clients were to connect, and {len(found)} did in {timeout:g} s")
        time.sleep(0.2)
    return found


def server_app(work: Callable[[Exchange], None], clients: int, timeout: float) -> tuple[ServerApp, list[BaseException]]:
    """A Flower ServerApp that does the work, and what it raised, which Flower would only log."""
    app, raised = ServerApp(), []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            work(partial(exchange, grid, clients, timeout))
        except BaseException as error:
            raised.append(error)

    return app, raised


class Flower:
    """A simulation: clients are played by a few processes.

    Args:
        folder: Of the clients.
        clients: How many.
        workers: Processes; the machine's cores if not given.
        timeout: Seconds to wait for the answers of a round.
    """

    def __init__(self, folder: Path, clients: int, workers: int | None, timeout: float) -> None:
        self.folder, self.clients, self.timeout = folder, clients, timeout
        self.workers = min(workers or os.cpu_count() or 1, clients)

    def missing(self) -> list[str]:
        return []

    def run(self, work: Callable[[Exchange], None]) -> None:
        from flwr.simulation import run_simulation

        server, raised = server_app(work, self.clients, self.timeout)
        gpus = 1 / self.workers if torch.cuda.is_available() else 0.0
        config: dict[str, Any] = {
            "init_args": {"num_cpus": self.workers, "include_dashboard": False, "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": gpus},
        }
        logging.getLogger("flwr").setLevel(logging.ERROR)  # a banner and a line per message, and its own deprecation
        held = signal.getsignal(signal.SIGTERM)  # Ray puts a handler of its own there, and leaves it
        try:
            run_simulation(server, client_app(str(self.folder.resolve())), self.clients, backend_config=config)
        finally:
            if held is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, held)
        if raised:
            raise raised[0]
