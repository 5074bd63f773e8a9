"""Searching a discrete space for what is best in two ways at once, by optuna, so that a killed search goes on.

Both values are minimised. What is suggested next is a function of the trials finished before, the seed and the trial's
number, whatever was killed in between.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tunesmith.core.seeds import generator, seed_of
from tunesmith.errors import RecipeError

Code = tuple[int, ...]
Values = tuple[float, float]
_DIRECTIONS: Sequence[Literal["minimize"]] = ["minimize", "minimize"]
_TRIES = 5
"""Suggestions of the model that were there before, in a row, after which a mutant of the best is taken."""


def pareto(points: Sequence[Values]) -> list[int]:
    """Indices of the points that no other dominates, by the first value; of equal points the first."""
    found, best = [], math.inf
    for i in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        if points[i][1] < best:
            found.append(i)
            best = points[i][1]
    return found


def hypervolume(points: Sequence[Values], reference: Values) -> float:
    """The area that the points dominate below the reference point, exactly."""
    area, low = 0.0, reference[1]
    for i in pareto(points):
        x, y = points[i]
        if x < reference[0] and y < low:
            area += (reference[0] - x) * (low - y)
            low = y
    return area


@dataclass(frozen=True)
class Trial:
    """One evaluation.

    Attributes:
        number: In the order of the search.
        code: The point of the space.
        values: Both objectives; None before the evaluation, and if it gave no number.
    """

    number: int
    code: Code
    values: Values | None = None


class Search:
    """A search in rounds: `while todo := search.next(): ...; search.tell(trial, values)`.

    Args:
        sizes: Values of each coordinate, 0 to size - 1.
        valid: Whether a point counts.
        total: Evaluations in all; fewer if the space has fewer points.
        start: Of them random ones, before the model suggests.
        batch: Suggested at once.
        sampler: `gp` a Gaussian process with expected hypervolume improvement, `tpe`, or `random`.
        seed: Of everything drawn.
        points: Valid points of the space.
        file: Where the trials are kept; None for memory alone.

    Raises:
        RecipeError: optuna is not installed.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        valid: Callable[[Code], bool],
        *,
        total: int,
        start: int,
        batch: int,
        sampler: Literal["gp", "tpe", "random"],
        seed: int,
        points: int,
        file: Path | None = None,
    ) -> None:
        try:
            import optuna
        except ImportError:
            raise RecipeError("autopeft needs optuna: pip install 'tunesmith[search]'") from None
        self.sizes, self.valid, self.sampler, self.seed = tuple(sizes), valid, sampler, seed
        self.total, self.start, self.batch = min(total, points), start, batch
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        kinds = {f"x{i:03d}": size for i, size in enumerate(self.sizes)}
        self.space: dict[str, Any] = {
            name: optuna.distributions.IntDistribution(0, size - 1) for name, size in kinds.items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            storage: Any = optuna.storages.InMemoryStorage()
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                _whole_lines(file)
                storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
            self.study = optuna.create_study(
                storage=storage,
                study_name="search",
                directions=_DIRECTIONS,
                load_if_exists=True,
            )

    def done(self) -> list[Trial]:
        """The evaluated trials, those that gave no number among them."""
        return [self._trial(t) for t in self._trials() if t.state.is_finished()]

    def next(self) -> list[Trial]:
        """The trials to evaluate now: what is left of this round, or a new one; empty at the end."""
        held = self._trials()
        last = max((t.user_attrs["round"] for t in held), default=0)
        mine = [t for t in held if t.user_attrs["round"] == last]
        left = [t for t in mine if not t.state.is_finished()]
        if not left:
            last, mine = last + 1, []
        elif len(left) < len(mine):
            return [self._trial(t) for t in left]
        before = len(held) - len(mine)
        bound = self.start if before < self.start else self.total  # a round is random or suggested, not both
        for _ in range(len(mine), min(self.batch, bound - before, self.total - before)):
            self._accept(last)
        return [self._trial(t) for t in self._trials() if t.user_attrs["round"] == last]

    def tell(self, trial: Trial, values: Values | None) -> None:
        """Keep what an evaluation gave."""
        import optuna

        finite = values is not None and all(map(math.isfinite, values))
        state = optuna.trial.TrialState.COMPLETE if finite else optuna.trial.TrialState.FAIL
        self.study.tell(trial.number, values if finite else None, state=state)

    def _trials(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False)

    def _trial(self, held: Any) -> Trial:
        return Trial(held.number, self._code(held.params), tuple(held.values) if held.values else None)

    def _code(self, params: dict[str, int]) -> Code:
        return tuple(int(params[name]) for name in self.space)

    def _accept(self, round_: int) -> None:
        """One more trial of a round, valid and new; written at once, so that a kill leaves all of it or nothing."""
        from optuna.trial import TrialState, create_trial

        seen = {self._code(t.params) for t in self._trials()}
        made = next(code for code in self._suggested(seen) if self.valid(code) and code not in seen)
        params = dict(zip(self.space, made, strict=True))
        held = create_trial(
            state=TrialState.RUNNING, params=params, distributions=self.space, user_attrs={"round": round_}
        )
        self.study.add_trial(held)

    def _suggested(self, seen: set[Code]) -> Iterator[Code]:
        """Points to take the first new one of; each is drawn with a key of its own."""
        import optuna

        informed = len(seen) >= self.start and self.sampler != "random"
        for attempt in range(_TRIES if informed else 0):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                asked = optuna.create_study(directions=_DIRECTIONS, sampler=self._sampler(len(seen), attempt))
                asked.add_trials(self._trials())
                yield self._code(asked.ask(self.space).params)
        yield self._fresh(seen, mutate=informed)

    def _sampler(self, *keys: int) -> Any:
        import optuna

        seed = seed_of(self.seed, "search", *keys) % 2**32
        if self.sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=2)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=2, multivariate=True, constant_liar=True)

    def _fresh(self, seen: set[Code], *, mutate: bool) -> Code:
        """A valid point that was not there: random, or one of the best with a few coordinates drawn anew."""
        g = generator(self.seed, "fresh", len(seen))

        def below(n: int) -> int:
            return int(torch.randint(n, (), generator=g))

        done = [t for t in self.done() if t.values is not None]
        best = [done[i].code for i in pareto([t.values for t in done if t.values is not None])] if mutate else []
        for attempt in range(1000):
            code = [below(size) for size in self.sizes]
            if best:
                kept, changed = best[below(len(best))], 1 + attempt // 50
                drawn = set(torch.randperm(len(code), generator=g)[:changed].tolist())
                code = [new if i in drawn else old for i, (new, old) in enumerate(zip(code, kept, strict=True))]
            if self.valid(tuple(code)) and tuple(code) not in seen:
                return tuple(code)
        every = itertools.product(*map(range, self.sizes))  # nearly all were there: the space is small
        return next(code for code in every if self.valid(code) and code not in seen)


def _whole_lines(file: Path) -> None:
    """Cut off a line that a killed process left half-written."""
    if file.exists() and (content := file.read_bytes()) and not content.endswith(b"\n"):
        file.write_bytes(content[: content.rfind(b"\n") + 1])
