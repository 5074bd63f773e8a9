"""The server of FedKSeed: it asks clients, adds up what they found, and keeps K numbers after each round as its log."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.core.files import write_text
from tunesmith.core.loss import IGNORED
from tunesmith.core.pipeline import Opened, Workshop
from tunesmith.core.seeds import forked, subset
from tunesmith.errors import TunesmithError
from tunesmith.systems.fedkseed_client import MODEL, Client, ClientFailedError, save_rows
from tunesmith.systems.fedkseed_space import SeedSpace, SeedSum, candidates, packed, unpacked

if TYPE_CHECKING:
    from tunesmith.systems.fedkseed import FedKSeed

MOST = 1000.0
"""A magnitude counts up to this for the chances of FedKSeed-Pro."""
Exchange = Callable[[int, Mapping[int, bytes]], Mapping[int, "Reply"]]
"""`(round, message for each client) -> reply of each`."""


class Reply:
    """An answer, and how many bytes went each way for it, envelopes included.

    Args:
        data: None where no answer came.
        down: Bytes to the client.
        up: Bytes from it.
        why: No answer came.
    """

    def __init__(self, data: bytes | None, down: int, up: int = 0, why: str = "") -> None:
        self.data, self.down, self.up, self.why = data, down, up, why


class Transport(Protocol):
    """How messages reach clients."""

    def missing(self) -> list[str]:
        """What somebody has to do before clients can be asked; nothing for most."""

    def run(self, work: Callable[[Exchange], None]) -> None:
        """Call `work` with a means to ask clients; end it when that is done. What `work` raises is raised here."""


class Here:
    """Clients in this process, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def missing(self) -> list[str]:
        return []

    def run(self, work: Callable[[Exchange], None]) -> None:
        client = Client(self.folder)

        def exchange(turn: int, messages: Mapping[int, bytes]) -> dict[int, Reply]:
            found = {}
            for number, message in messages.items():
                try:
                    answer = client.answer(message)
                except ClientFailedError as error:
                    found[number] = Reply(None, len(message), why=str(error))
                else:
                    found[number] = Reply(answer, len(message), len(answer))
            return found

        work(exchange)


def added(sums: Tensor, found: Mapping[int, Tensor], weights: Mapping[int, float]) -> Tensor:
    """a + the weighted mean of the clients' h, (K,) float32; a itself where nobody answered."""
    total = sum(weights[c] for c in found)
    more = sum((weights[c] / total * h.double() for c, h in found.items()), torch.zeros_like(sums, dtype=torch.float64))
    return (sums.double() + more).float()


def chances(magnitudes: Tensor, times: Tensor) -> Tensor:
    """p of FedKSeed-Pro: softmax of the mean magnitudes brought to [0, 1]; uniform before anything is known.

    Args:
        magnitudes: Sums of |h| up to 1000 each, (K,).
        times: How many each is of, (K,).
    """
    known = times > 0
    if not known.any():
        return torch.full_like(magnitudes, 1 / len(magnitudes))
    mean = magnitudes / times.clamp_min(1)
    mean = torch.where(known, mean, mean[known].mean())
    width = mean.max() - mean.min()
    return ((mean - mean.min()) / width if width > 0 else torch.zeros_like(mean)).softmax(0)


def note(magnitudes: Tensor, times: Tensor, found: Mapping[int, Tensor]) -> None:
    """Add what clients found to the sums of |h| and their counts, (K,) each, in place, as `chances` takes them."""
    for h in found.values():
        magnitudes += h.abs().clamp_max(MOST)
        times += h != 0


class Server:
    """A federation in a pipeline's folder; what it has done is there, so that it goes on when it starts again."""

    def __init__(self, options: FedKSeed, workshop: Workshop, held: Sequence[Sequence[int]], rate: float) -> None:
        self.options, self.workshop, self.held, self.rate = options, workshop, held, rate
        self.batch = workshop.recipe["train"]["batch_size"]
        with forked(workshop.seed, "fedkseed"):  # a new head is drawn while the model is loaded
            self.opened: Opened = workshop.open()
        model = self.opened.model
        # Before anything moves: the clients begin with these files.
        self.folder = workshop.files("federation", self._fill)
        self.space = SeedSpace(model, candidates(workshop.seed, options.seeds), rate)
        self.size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        self._rows: list[dict[str, Any]] | None = None

    # The folder ---------------------------------------------------------------------------------------------------

    def _fill(self, place: Path) -> None:
        self.opened.model.save_pretrained(place / MODEL)
        every = self._batches(self.workshop.rows, self.held, self.batch)
        for number, (rows, batches) in enumerate(zip(self.held, every, strict=True)):
            save_rows([_on_cpu(b) for b in batches], len(rows), place / f"rows-{number}.safetensors")

    def _batches(self, rows: Dataset, groups: Sequence[Sequence[int]], size: int) -> list[list[dict[str, Any]]]:
        """Batches of each group of rows. All are encoded in one go: rows of a single class alone would be refused."""
        full = [[*group, *[group[-1]] * (-len(group) % size)] for group in groups]
        order = rows.select([i for group in full for i in group])
        if self.workshop.task.endswith("classification"):
            labels = list(self.workshop.rows["label"])
            order = concatenate_datasets([order, self.workshop.rows.select([labels.index(n) for n in set(labels)])])
        made, found = iter(self.opened.batches(order, size)), []
        for group in groups:
            found.append([next(made) for _ in range(0, len(group), size)])
            if left := len(group) % size:
                found[-1][-1] = {k: v[:left] if isinstance(v, Tensor) else v for k, v in found[-1][-1].items()}
        return found

    def _at(self, turn: int) -> Path:
        return self.workshop.folder / "rounds" / f"{turn:05}"

    @property
    def done(self) -> int:
        """Rounds that are finished."""
        return next(n for n in range(self.options.rounds + 1) if not self._at(n).exists())

    def state(self, turn: int) -> dict[str, Tensor]:
        """`sums`, `magnitudes` and `times`, (K,) each, after so many rounds."""
        if turn == 0:
            return {name: torch.zeros(self.options.seeds) for name in ("sums", "magnitudes", "times")}
        return load_file(self._at(turn - 1) / "state.safetensors")

    def finished(self) -> list[dict[str, Any]]:
        """The numbers of every round."""
        return [_read(self._at(n)) for n in range(self.done)]

    def log(self) -> SeedSum:
        """What has been learnt so far."""
        return SeedSum(self.state(self.done)["sums"], self.workshop.seed, self.rate, self.space.base)

    def save_log(self, place: Path) -> None:
        """What makes the tuned model from the one at the start."""
        self.log().save(place / "sums.safetensors")

    def save(self, place: Path) -> None:
        """The tuned model, as transformers saves it."""
        self.space.go(self.state(self.done)["sums"])
        self.opened.model.save_pretrained(place)
        self.opened.processor.save_pretrained(place)

    # Rounds -------------------------------------------------------------------------------------------------------

    def transport(self) -> Transport:
        """As the option says."""
        if self.options.transport == "here":
            return Here(self.folder)
        if self.options.transport == "network":
            from tunesmith.systems.fedkseed_network import Network

            return Network(self.workshop.folder, self.options.clients, self.options.timeout)
        from tunesmith.systems.fedkseed_flower import Flower

        return Flower(self.folder, self.options.clients, self.options.workers, self.options.timeout)

    def work(self, exchange: Exchange) -> None:
        """All rounds that are not done yet."""
        begin, end = self.done, self.options.rounds
        for turn in self.workshop.track(range(begin, end), "rounds"):
            made = self.workshop.do(
                f"round-{turn}",
                lambda turn=turn: _read(
                    self.workshop.files(f"rounds/{turn:05}", lambda p: self._round(turn, exchange, p))
                ),
            )
            if made["missing"]:
                self.workshop.say(f"round {turn + 1}: {len(made['missing'])} of {len(made['asked'])} gave no answer")

    def _round(self, turn: int, exchange: Exchange, place: Path) -> None:
        options, state = self.options, self.state(turn)
        count = max(1, round(options.share * options.clients))
        asked = subset(options.clients, count, self.workshop.seed, "clients", turn)
        sent = {"sums": state["sums"]}
        if options.pro:
            sent["chances"] = chances(state["magnitudes"], state["times"])
        common = {
            "round": turn,
            "master": self.workshop.seed,
            "base": self.space.base,
            "lr": self.rate,
            "eps": options.eps,
            "steps": options.steps,
            "clip": options.clip,
            "failures": options.failures,
        }
        replies = exchange(turn, {c: packed(sent, {**common, "client": c}) for c in asked})
        found: dict[int, Tensor] = {}
        about: dict[int, Any] = {}
        missing: dict[str, str] = {}
        for c in asked:
            try:
                found[c], about[c] = self._read_reply(c, replies.get(c), turn)
            except TunesmithError as error:  # a client that answers nonsense must not end the federation
                missing[str(c)] = str(error)
        if not found and turn == 0 and not options.failures:
            why = next(iter(missing.values()))
            raise TunesmithError(f"fedkseed: none of {len(asked)} clients answered in the first round: {why}")
        weights = {c: float(about[c]["rows"]) if options.weights == "rows" else 1.0 for c in found}
        state["sums"] = added(state["sums"], found, weights)
        note(state["magnitudes"], state["times"], found)
        save_file(state, place / "state.safetensors")
        losses = [about[c]["loss"] for c in found if about[c]["loss"] is not None]
        numbers = {
            "round": turn,
            "asked": asked,
            "missing": missing,
            "down": [replies[c].down for c in found],
            "up": [replies[c].up for c in found],
            "drawn": sum(about[c]["drawn"] for c in found),
            "skipped": sum(about[c]["skipped"] for c in found),
            "client loss": sum(losses) / len(losses) if losses else None,
            **self._evaluated(turn, state["sums"]),
        }
        write_text(place / "round.json", json.dumps(numbers, indent=1, allow_nan=False) + "\n")

    def _read_reply(self, client: int, reply: Reply | None, turn: int) -> tuple[Tensor, Mapping[str, Any]]:
        if reply is None or reply.data is None:
            raise ClientFailedError((reply.why if reply else "") or "no answer within `timeout`")
        tensors, told = unpacked(reply.data)
        if lacks := {"round", "rows", "loss", "skipped", "drawn"} - told.keys() | {"found"} - tensors.keys():
            raise TunesmithError(f"fedkseed: the answer of client {client} in round {turn} lacks {sorted(lacks)}")
        h: Tensor = tensors["found"]
        if h.shape != (self.options.seeds,) or not bool(h.isfinite().all()) or told["round"] != turn:
            raise TunesmithError(
                f"fedkseed: client {client} was to answer round {turn} with {self.options.seeds} finite numbers, and "
                f"answered round {told['round']} with {tuple(h.shape)}, {int((~h.isfinite()).sum())} of them not finite"
            )
        return h, told

    # Evaluation ---------------------------------------------------------------------------------------------------

    def before(self) -> dict[str, Any]:
        """The evaluation rows before the first round."""
        return self._evaluated(self.options.evaluate_every - 1, torch.zeros(self.options.seeds))

    def _evaluated(self, turn: int, sums: Tensor) -> dict[str, Any]:
        if (turn + 1) % self.options.evaluate_every and turn + 1 < self.options.rounds:
            return {}
        self.space.go(sums)
        if self._rows is None:
            some = range(min(self.options.evaluate_rows, len(self.workshop.held_out)))
            self._rows = self._batches(self.workshop.held_out, [some], max(self.batch, 8))[0]
        found = evaluated(self.opened.model, self._rows, self.workshop.task)
        if not math.isfinite(found["loss"]):
            raise TunesmithError(
                f"fedkseed: the loss of the evaluation rows is {found['loss']}; lower `learning_rate` (now "
                f"{self.rate:g}), or, if this is before the first round, look at the model and the rows"
            )
        return found


@torch.no_grad()
def evaluated(model: torch.nn.Module, batches: Sequence[Mapping[str, Any]], task: str) -> dict[str, float]:
    """`loss` per label, and for classes `accuracy`."""
    loss = right = count = 0.0
    for batch in batches:
        found = model(**batch)
        labels = batch["labels"]
        known = int(((labels[..., 1:] if task == "causal-lm" else labels) != IGNORED).sum())
        if not known:  # its loss is 0 / 0
            continue
        loss += float(found.loss) * known
        count += known
        if task.endswith("classification"):
            right += int((found.logits.argmax(-1) == labels).sum())
    scores = {"accuracy": right / count} if task.endswith("classification") else {}
    return {"loss": loss / max(count, 1), **scores}


def _read(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "round.json").read_text(encoding="utf-8"))
    return found


def _on_cpu(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in batch.items()}
