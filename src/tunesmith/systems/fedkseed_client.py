"""A client: a folder with the model and rows of its own, which answers messages of K numbers with K numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith.core.packing import ATTENTION, BOUNDS, enable, to_device
from tunesmith.core.seeds import generator, integer
from tunesmith.errors import CheckpointError, ModelError, TunesmithError
from tunesmith.systems.fedkseed_space import SeedSpace, candidates, check_base, packed, unpacked

Batch = Mapping[str, Any]
_ASKED = {"client", "round", "master", "base", "lr", "eps", "steps", "clip", "failures"}
MODEL = "base"
"""Beside the clients' files: the model that the federation begins with."""


class ClientFailedError(TunesmithError):
    """A client gives no answer in this round."""


@dataclass
class Local:
    """What a client's steps came to.

    Attributes:
        found: h, (K,) float32: for each seed the sum of its scalar gradients.
        losses: Means of both sides, one per step.
        skipped: Steps without an update: a loss was not finite, or both were too far apart.
    """

    found: Tensor
    losses: list[float] = field(default_factory=list)
    skipped: int = 0


def local_steps(
    space: SeedSpace,
    loss: Callable[[int], Tensor],
    chosen: Sequence[int],
    *,
    eps: float,
    clip: float | None = None,
    exact: bool = False,
) -> Local:
    """Zeroth-order steps from where the space is, along the chosen seeds.

    Args:
        space: Moved in place.
        loss: `(step) -> ()`, the same function for both sides of a step.
        chosen: The number of the seed, for each step.
        eps: Size of the perturbation.
        clip: A step whose two losses differ by more than this is left out.
        exact: Bring back every bit after a probe.
    """
    total = torch.zeros(len(space.seeds), dtype=torch.float64)
    made = Local(total)
    for step, j in enumerate(chosen):
        probe = space.directions.probe(lambda step=step: loss(step), space.seeds[j], eps, exact=exact)
        plus, minus = float(probe.plus), float(probe.minus)
        if not math.isfinite(probe.coefficient) or (clip is not None and abs(plus - minus) > clip):
            made.skipped += 1
            continue
        total[j] += probe.coefficient
        made.losses.append((plus + minus) / 2)
        space.directions.add_(space.seeds[j], -space.lr * probe.coefficient)
    made.found = total.float()
    return made


def choices(count: int, steps: int, chances: Tensor | None, *keys: int | str) -> list[int]:
    """Numbers of seeds, with replacement, uniform or with the given chances."""
    drawn = generator(*keys)
    if chances is None:
        return torch.randint(count, (steps,), generator=drawn).tolist()
    return torch.multinomial(chances.double(), steps, replacement=True, generator=drawn).tolist()


class Client:
    """One client, or several in turn that hold the same model.

    Args:
        folder: With the model under `base` and `rows-NUMBER.safetensors`.
        device: Of the model.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        self.folder = Path(folder)
        self.model = opened(self.folder / MODEL).to(device).eval()
        self._space: tuple[tuple[Any, ...], SeedSpace] | None = None

    def answer(self, message: bytes, rows: int | None = None) -> bytes:
        """Take the server's sums, train, give back the sum of each seed's scalar gradients.

        Args:
            message: From the server.
            rows: The number of the file of rows; not given, the client's own number.

        Raises:
            ClientFailedError: it is this client's turn to fail (a rehearsal's `failures`).
            CheckpointError: the federation began with another model, or the message is not a server's.
            ModelError: its batches are rows end to end, and the model cannot keep these apart.
        """
        tensors, about = unpacked(message)
        asked: dict[str, Any] = dict(about)
        if lacks := _ASKED - asked.keys() | {"sums"} - tensors.keys():
            raise CheckpointError(f"expected the message of a server, found one without {sorted(lacks)}")
        number, turn, master = asked["client"], asked["round"], asked["master"]
        if asked["failures"] and integer(0, 10**6, master, "failure", turn, number) < asked["failures"] * 10**6:
            raise ClientFailedError(f"client {number} fails in round {turn}, as failures={asked['failures']} asks for")
        batches, count = load_rows(self.folder / f"rows-{number if rows is None else rows}.safetensors")
        if any(BOUNDS in b for b in batches) and self.model.config._attn_implementation != ATTENTION:
            enable(self.model)  # rows that are laid end to end must not see each other
        space = self._in(master, len(tensors["sums"]), asked["lr"])
        check_base(space.base, asked["base"])
        drawn = space.go(tensors["sums"])
        chosen = choices(len(space.seeds), asked["steps"], tensors.get("chances"), master, "seeds", turn, number)
        places = torch.randint(
            len(batches), (asked["steps"],), generator=generator(master, "rows", turn, number)
        ).tolist()
        device = next(self.model.parameters()).device

        def loss(step: int) -> Tensor:
            return self.model(**to_device(batches[places[step]], device)).loss

        made = local_steps(space, loss, chosen, eps=asked["eps"], clip=asked["clip"])
        mean = sum(made.losses) / len(made.losses) if made.losses else None
        told = {"round": turn, "rows": count, "loss": mean, "skipped": made.skipped, "drawn": drawn}
        return packed({"found": made.found}, told)

    def _in(self, *key: Any) -> SeedSpace:
        if self._space is None or self._space[0] != key:
            master, count, lr = key
            if self._space is not None:  # back to the start before another federation begins there
                self._space[1].go(torch.zeros(len(self._space[1].seeds)))
            self._space = (key, SeedSpace(self.model, candidates(master, count), lr))
        return self._space[1]


def opened(folder: Path) -> nn.Module:
    """A transformers model by its configuration's architecture, which has the head that it was saved with."""
    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or [""])[0]
    if not hasattr(transformers, name):
        raise ModelError(
            f"{folder}: transformers has no architecture {name!r}; fedkseed's clients load the model by its name, so a "
            "model with code of its own cannot take part"
        )
    return getattr(transformers, name).from_pretrained(folder, dtype="auto")


def save_rows(batches: Sequence[Batch], rows: int, file: Path) -> None:
    """Batches of a client, as a model takes them, and the number of rows in all of them."""
    # Copies: labels may be the input ids themselves, and such a file holds no tensor twice.
    named = [(f"{i}/{name}", v) for i, b in enumerate(batches) for name, v in b.items() if _tensor(v)]
    tensors = {name: v.detach().clone(memory_format=torch.contiguous_format) for name, v in named}
    plain = [{name: v for name, v in b.items() if not _tensor(v)} for b in batches]
    save_file(tensors, file, {"plain": json.dumps(plain), "rows": str(rows)})


def _tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def load_rows(file: Path) -> tuple[list[dict[str, Any]], int]:
    """What `save_rows` wrote.

    Raises:
        CheckpointError: this client has no rows here.
    """
    if not file.exists():
        raise CheckpointError(f"{file}: there are no rows of this client; it holds those of another, or none")
    with safe_open(str(file), framework="pt") as held:
        about = held.metadata()
        found: list[dict[str, Any]] = json.loads(about["plain"])
        for name in held.keys():  # noqa: SIM118
            number, _, key = name.partition("/")
            found[int(number)][key] = held.get_tensor(name)
    return found, int(about["rows"])
