"""LeMo: tokens that receive little attention skip a block, so that long rows are tuned in less memory.

Wang, Chen, Li, Cao, Ren and Zhang, "LeMo: Enabling LEss Token Involvement for MOre Context Fine-tuning", 2025.

    s_l(b) = attention that group b of tokens receives in block l, relative to uniform                  (core/tokens.py)
    K_l    = {b: s_l(b) >= tau_l}  and the first group, the last group, every group whose logits the loss reads
    x_K   <- block_l(x_K) at the original positions, in causal order;     the others: x <- x, with their gradient

Each block chooses anew, so that a token that skipped one comes back in the next. s is computed from the block's own
queries and keys (`scores="exact"`, some queries at a time), or by two maps of low rank on the mean token of each group,
fitted to the logarithm of what was seen (`"predicted"`): then no score of a single pair of tokens is ever computed.
tau_l is such that on held-out batches the share `ratio` of the groups is kept.

The paper's abstract names token elimination by informativeness, pattern prediction and segment-based kernels; there is
no released code. Score, thresholds, predictors and the rules for groups are ours. Ours too: a batch keeps the same
number k of groups in every row, the largest that any row asks for, each row its k best; and attention is measured
relative to uniform, since attention itself falls with the length and a threshold would fit one length only. The
segmented loss is the objective `segmented-sft`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tunesmith.core import tokens
from tunesmith.core.inference import BlockCall, BlockInference
from tunesmith.core.loss import IGNORED, model_inputs, targets_of
from tunesmith.core.packing import to_device
from tunesmith.core.part import part
from tunesmith.core.patterns import Patterns, flat, unflat
from tunesmith.core.tokens import Pass, Sighting
from tunesmith.errors import ModelError

Share = Annotated[float, Field(gt=0, le=1)]
FILE = "lemo.safetensors"
_REMEMBERED = 4
"""Passes whose choice is kept, for blocks that run again in the backward pass."""


@part(
    paper="arXiv:2501.09767",
    refuses={
        "encoder-decoder": "it drops tokens of a decoder-only stack",
        "padding-free": "every row keeps the same number of tokens, and rows laid end to end are one row",
    },
)
class LeMo(BlockInference):
    """Uninformative tokens skip blocks while the model trains.

    Calibrated by `fit`, by `load`, or by itself: its first `calibration` training passes are scored exactly and keep
    the share `ratio` in every row, and then predictors and thresholds are fitted to what they saw.

    Args:
        ratio: Share of the groups of tokens that each block keeps; 1 drops nothing.
        block: Columns of a group.
        rank: Of the predictors.
        scores: Where scores come from; `"exact"` computes all attention, some queries at a time, without gradient.
        select: `"threshold"`: as many groups as lie above the block's threshold, more for a row that needs more.
            `"top-k"`: the share `ratio` of every row.
        when: `"training"`: only passes with gradients drop; evaluation and generation are the plain model. `"always"`:
            those too; of a cached generation the first pass, the prompt, with the same columns for all rows.
        calibration: Training passes to calibrate on; a quarter of them, the last, is held out for the thresholds.
        refresh: Training passes after which it calibrates anew, for models that move far; None for never.
        state: A file or folder of `save`, to start calibrated.
    """

    neutral: ClassVar[Mapping[str, object]] = {"ratio": 1.0}
    frugal: ClassVar[Mapping[str, object]] = {
        "ratio": 0.25,
        "block": 1,
        "scores": "exact",
        "select": "top-k",
        "when": "always",
    }

    def __init__(
        self,
        *,
        ratio: Share = 0.5,
        block: PositiveInt = 64,
        rank: PositiveInt = 32,
        scores: Literal["predicted", "exact"] = "predicted",
        select: Literal["threshold", "top-k"] = "threshold",
        when: Literal["training", "always"] = "training",
        calibration: PositiveInt = 8,
        refresh: PositiveInt | None = None,
        state: str | None = None,
    ) -> None:
        super().__init__()
        self.ratio, self.block, self.rank, self.when, self.calibration = ratio, block, rank, when, calibration
        self.mode, self.select, self.refresh = scores, select, refresh
        self.patterns = Patterns()
        self._seen: list[list[Sighting]] = []
        self._age = 0
        self._given: dict[str, Any] | None = None
        self._told: Tensor | None = None
        self._observing = False
        self._passes: list[Pass] = []
        self._hook: Any = None
        if state is not None:
            self.load(state)

    @staticmethod
    def refusals(options: Mapping[str, Any]) -> dict[str, str]:
        if options["when"] == "always":
            return {}
        return {"forward-only": 'without gradients nothing is dropped; give when="always" for cheaper forward passes'}

    @property
    def calibrated(self) -> bool:
        """Whether it has all that its options need; exact scores with top-k need nothing."""
        return bool(self.patterns) or (self.mode == "exact" and self.select == "top-k")

    def check(self, count: int) -> None:
        if self.patterns and len(self.patterns) != count:
            raise ModelError(f"lemo was calibrated on {len(self.patterns)} blocks; the model has {count}")

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        assert self.model is not None
        self._hook = self.model.register_forward_pre_hook(self._enter, with_kwargs=True)

    def detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._passes = None, []
        super().detach()

    @contextmanager
    def reading(self, positions: Tensor) -> Iterator[None]:
        """Say at which positions the loss reads logits, (B, n) bool, where neither labels nor `logits_to_keep` do."""
        self._told = positions
        try:
            yield
        finally:
            self._told = None

    # One pass ---------------------------------------------------------------------------------------------------------

    def _enter(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        names = inspect.signature(type(model).forward).parameters
        self._given = {**dict(zip(list(names)[1:], args, strict=False)), **kwargs, "grad": torch.is_grad_enabled()}

    def run(self, call: BlockCall) -> Tensor:
        here = self._begin(call) if call.index == 0 and self._given is not None else self._pass_of(call)
        rows, n, _ = call.hidden.shape
        if call.index not in here.chosen:
            here.chosen[call.index] = None if here.plain and not self._observing else self.columns(call, here)
        columns = None if here.plain else here.chosen[call.index]
        if not self._observing:
            self._cost.done += rows * (n if columns is None else columns.shape[-1])
            self._cost.full += rows * n
        if columns is not None:
            return call.run_columns(columns)
        if call.layer is None or len(call.layer.columns) == call.past:
            return call.run()
        if not len(call.layer.columns):
            raise ModelError("lemo left no keys in this cache, which comes from a pass with gradients; start a new one")
        return call.run_columns(torch.arange(n, device=call.hidden.device))

    def _begin(self, call: BlockCall) -> Pass:
        given, self._given = self._given, None
        assert given is not None
        plain = self.ratio == 1 or call.past > 0 or (self.when == "training" and not given["grad"])
        here = Pass(call.positions, plain or self._observing)
        if not plain or self._observing:
            self._look_at(call, given, here)
        others = [p for p in self._passes if p.positions is not call.positions]
        self._passes = [*others[1 - _REMEMBERED :], here]
        return here

    def _look_at(self, call: BlockCall, given: Mapping[str, Any], here: Pass) -> None:
        here.real = tokens.real_tokens(given, call)
        here.reads = tokens.read_positions(given, self._told, here.real)
        here.shared = call.layer is not None and not given["grad"]
        if given["grad"] and self.patterns and self.refresh is not None:
            self._age += 1
            self.patterns = self.patterns if self._age <= self.refresh else Patterns()
        if given["grad"] and not self.calibrated:
            if len(self._seen) >= self.calibration:
                self._calibrate(call.hidden.device)
                self._age = 1
            here.records = not self.calibrated
        if here.records or self._observing:
            self._seen.append([])

    def _pass_of(self, call: BlockCall) -> Pass:
        here = next((p for p in reversed(self._passes) if p.positions is call.positions), None)
        if here is None:
            raise ModelError(
                "lemo does not know this pass: run the causal language model itself, not its body, and at most "
                f"{_REMEMBERED} passes before a backward pass with activation checkpointing"
            )
        return here

    # Which columns ----------------------------------------------------------------------------------------------------

    def columns(self, call: BlockCall, here: Pass) -> Tensor | None:
        """The columns that a block keeps, (B, k) ascending, (k,) for all rows alike; None for all."""
        real = tokens.grouped(here.real.float(), self.block, 1)
        forced = tokens.forced_groups(here.real, here.reads, self.block)
        found = self.scores(call, here, real, forced)
        if here.shared:
            found, real, forced = found.mean(0, keepdim=True), real.sum(0, keepdim=True), forced.any(0, keepdim=True)
        tau = self.patterns.tau(call.index) if self.patterns and self.select == "threshold" else None
        kept = tokens.choose(found, real, forced, self.ratio, tau)
        if kept.shape[1] == real.shape[1]:
            return None
        columns = tokens.spread(kept, self.block, call.hidden.shape[1])
        return columns[0] if here.shared else columns

    def scores(self, call: BlockCall, here: Pass, real: Tensor, forced: Tensor) -> Tensor:
        """s of each group, (B, g) float32; `real` tokens and `forced` of each group, (B, g)."""
        sees = here.records or self._observing
        if self.mode == "exact" or sees or not self.patterns:
            lift = tokens.attention_lift(call, here.real, self.block)
            if sees:
                x = tokens.features(call.hidden, here.real, self.block)
                self._seen[-1].append(Sighting(*(value.cpu() for value in (x, lift, real, forced))))
        else:
            x = tokens.features(call.hidden, here.real, self.block)
            lift = self.patterns.lift(call.index, x)
        return tokens.score(lift, real)

    # Calibration ------------------------------------------------------------------------------------------------------

    def fit(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
        """Calibrate on batches with labels, without gradients and without dropping; attached before or not.

        Returns:
            For each block, on the held-out batches: `kept`, the share of groups above the threshold or forced, and
            `agreement`, the share of the exactly scored choice of the same size that is in it.
        """
        device = next(model.parameters()).device
        self._seen, self._observing = [], True
        try:
            with torch.no_grad():
                for batch in batches:
                    reads = nn.functional.pad(targets_of(batch) != IGNORED, (0, 1))
                    inputs = to_device(model_inputs(batch), device)
                    with self.reading(reads), self.on(model) if self.model is None else nullcontext():
                        model(**inputs, logits_to_keep=1, use_cache=False)
        finally:
            self._observing = False
        return self._calibrate(device)

    def _calibrate(self, device: torch.device) -> list[dict[str, float]]:
        seen, self._seen, self._age = self._seen, [], 0
        self.patterns, found = Patterns.of(seen, self.ratio, self.rank if self.mode == "predicted" else None, device)
        return found

    def save(self, folder: str | Path) -> Path:
        """Write predictors and thresholds as `lemo.safetensors`, next to a model say; returns the file.

        Raises:
            CheckpointError: it is not calibrated.
        """
        self.patterns.save(Path(folder) / FILE, self._key())
        return Path(folder) / FILE

    def load(self, path: str | Path) -> None:
        """Take what `save` wrote, from the file or its folder.

        Raises:
            CheckpointError: it is not there, or was made with other options.
            ModelError: it is of a model with another number of blocks.
        """
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        self.patterns = Patterns.load(file, self._key())
        if self.model is not None:
            self.check(len(self._blocks))

    def _key(self) -> dict[str, object]:
        return {"ratio": self.ratio, "block": self.block, "scores": self.mode}

    def training_state(self) -> dict[str, Tensor]:
        """Predictors and thresholds; before there are any, all that was seen for them."""
        found = {f"patterns/{name}": value for name, value in self.patterns.tensors.items()}
        return {"age": torch.tensor(self._age), **found, **flat(self._seen)}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        mine = {k.removeprefix("patterns/"): v for k, v in state.items() if k.startswith("patterns/")}
        self.patterns, self._seen, self._age = Patterns(mine), unflat(state), int(state["age"])
