"""The stream of FPF as numbers of rows: order, reservoir, replay, and the moments of the fine-tuning phases.

All of it follows from the seed and the sizes, not from a model, so that it is known before anything is trained and a
resumed run finds the same. Rows are addressed by their index; slots are places of the buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from tunesmith.core.seeds import generator, integer, subset
from tunesmith.errors import RecipeError


class Reservoir:
    """A uniform sample of all items that went by (Vitter's algorithm R).

    After n items each of them is in the buffer with probability min(1, size / n).
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.seen = size, seed, 0
        self.rows: list[int] = []
        """The item in each slot."""

    def add(self, row: int) -> int | None:
        """Offer an item; its slot, or None if it was not taken."""
        n = self.seen
        self.seen += 1
        if n < self.size:
            self.rows.append(row)
            return n
        slot = integer(0, n, self.seed, "fpf reservoir", n)
        if slot >= self.size:
            return None
        self.rows[slot] = row
        return slot


@dataclass(frozen=True)
class Step:
    """One step of the stream.

    Attributes:
        number: From 0.
        task: Index of the task.
        epoch: Epoch of the whole stream, from 0; `tasks x epochs` in all.
        rows: That come by.
        replay: Rows of the buffer, as it was before, that are trained on with them.
        taken: `{slot: position in rows}` of what enters the buffer in this step and stays to its end.
        ends_epoch: Whether it is the last one of its epoch.
        ends_task: Whether it is the last one of its task.
        phase: Number of the fine-tuning phase that follows, from 1; 0 for none.
        buffer: The row in each slot after the step, where a phase follows or a task ends.
    """

    number: int
    task: int
    epoch: int
    rows: tuple[int, ...]
    replay: tuple[int, ...] = ()
    taken: dict[int, int] = field(default_factory=dict)
    ends_epoch: bool = False
    ends_task: bool = False
    phase: int = 0
    buffer: tuple[int, ...] = ()


class Stream:
    """Tasks one after the other, each for some epochs in random order.

    Args:
        tasks: Rows of each.
        epochs: Passes over each task.
        batch: Rows per step. What is left of an epoch is a smaller batch; a single row goes with the batch before it,
            since batch normalisation cannot use it alone.
        buffer: Slots of the reservoir.
        replay: Rows of the buffer in each step beside those of the stream; 0 for none.
        phases: k: how many fine-tuning phases, the last at the end.
        seed: Of order, reservoir and replay.

    Raises:
        RecipeError: a task without rows, or more phases than steps.
    """

    def __init__(
        self,
        tasks: Sequence[Sequence[int]],
        *,
        epochs: int,
        batch: int,
        buffer: int,
        replay: int = 0,
        phases: int = 1,
        seed: int = 0,
    ) -> None:
        if not tasks or not all(tasks):
            raise RecipeError(f"fpf: every task needs rows; they have {[len(task) for task in tasks]}")
        self.tasks, self.epochs, self.batch, self.seed = tasks, epochs, batch, seed
        self.buffer, self.replay = buffer, replay
        self.steps = epochs * sum(len(self._batches(list(task))) for task in tasks)
        if phases > self.steps:
            raise RecipeError(f"fpf: {phases} phases in a stream of {self.steps} steps; ask for fewer")
        self.moments = [self.steps * i // phases for i in range(1, phases + 1)]
        """Steps of the stream that are done when each phase begins."""

    def _batches(self, rows: list[int]) -> list[tuple[int, ...]]:
        cuts = list(range(0, len(rows), self.batch))
        if len(cuts) > 1 and len(rows) - cuts[-1] == 1:
            cuts.pop()
        return [tuple(rows[a:b]) for a, b in zip(cuts, [*cuts[1:], len(rows)], strict=True)]

    def __iter__(self) -> Iterator[Step]:
        held, number = Reservoir(self.buffer, self.seed), 0
        phase_at = {moment: i for i, moment in enumerate(self.moments, start=1)}
        for task, rows in enumerate(self.tasks):
            for turn in range(self.epochs):
                epoch = task * self.epochs + turn
                order = torch.randperm(len(rows), generator=generator(self.seed, "fpf order", epoch)).tolist()
                batches = self._batches([rows[i] for i in order])
                for i, batch in enumerate(batches):
                    replay = self._replayed(held, number)
                    taken: dict[int, int] = {}
                    for position, row in enumerate(batch):
                        slot = held.add(row)
                        if slot is not None:
                            taken[slot] = position
                    last = i == len(batches) - 1
                    number += 1
                    phase, ends = phase_at.get(number, 0), last and turn == self.epochs - 1
                    buffer = tuple(held.rows) if phase or ends else ()
                    yield Step(number - 1, task, epoch, batch, replay, taken, last, ends, phase, buffer)

    def _replayed(self, held: Reservoir, number: int) -> tuple[int, ...]:
        count = min(self.replay, len(held.rows))
        chosen = subset(len(held.rows), count, self.seed, "fpf replay", number) if count else []
        return tuple(held.rows[slot] for slot in chosen)

    def segments(self) -> Iterator[list[Step]]:
        """The steps in runs that end with a task or before a phase."""
        run: list[Step] = []
        for step in self:
            run.append(step)
            if step.phase or step.ends_task:
                yield run
                run = []


def slots(held: int, *, iterations: int, batch: int, seed: int, phase: int) -> list[list[int]]:
    """The slots of each batch of a fine-tuning phase: `batch` different ones, or all of a smaller buffer."""
    size = min(batch, held)
    return [subset(held, size, seed, "fpf draw", phase, i) for i in range(iterations)]
