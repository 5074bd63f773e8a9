"""What our Trainer does beside training: shows where it is, stops cleanly on a signal, measures."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tunesmith.core.meters import state_bytes


class Meters(TrainerCallback):
    """Seconds spent in steps (not in evaluating or saving), and the largest optimizer state seen."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.state_bytes = 0
        self._began = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any, **_: Any
    ) -> None:
        self.seconds += time.perf_counter() - self._began
        # Counting walks over the state: often enough to see what a schedule does, cheap enough for every run.
        if state.global_step <= 2 or state.global_step % 20 == 0 or state.global_step == state.max_steps:
            self.state_bytes = max(self.state_bytes, state_bytes(optimizer))


class StopCleanly(TrainerCallback):
    """On the first SIGINT or SIGTERM: finish the step, write a checkpoint, stop. On the second: stop at once.

    A callback, and the context in which to train: signals are caught inside of it.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopCleanly:
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # not the main thread: whoever owns the signals keeps them
                self._previous[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            self._restore()
            raise KeyboardInterrupt
        self.signal = number
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.signal is not None:
            control.should_save = True
            control.should_training_stop = True

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()


class Progress(TrainerCallback):
    """A live bar on a terminal; elsewhere a line every tenth of the run."""

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, quiet=quiet)
        self.bar: Any = None
        self.loss = ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            self.console.quiet = True
        if not self.console.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
        self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console)
        self.bar.start()
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, loss="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, loss=self.loss)
        elif state.global_step % max(state.max_steps // 10, 1) == 0:
            self.console.print(f"step {state.global_step}/{state.max_steps} {self.loss}", highlight=False)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        for key, label in (("loss", "loss"), ("eval_loss", "eval")):
            if logs and key in logs:
                rest = [w for w in self.loss.split("  ") if w and not w.startswith(f"{label} ")]
                self.loss = "  ".join(sorted([*rest, f"{label} {logs[key]:.4f}"], reverse=True))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
