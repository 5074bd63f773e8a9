"""Fresh top: the top blocks and the pooler begin anew before the first step; the bottom may rest.

One of the stabilisers compared by Tinn, Cheng, Gu, Usuyama, Liu, Naumann, Gao and Poon, "Fine-tuning large neural
language models for biomedical natural language processing", Patterns 2023, which recommends it for the smallest data:
what the top blocks learnt is closest to the pretraining task, and moves least well.

    blocks L - r + 1, ..., L and the pooler    drawn as the model's own `_init_weights` draws them: for BERT, matrices
                                               from N(0, initializer_range^2), biases 0, norms 1 and 0
    embedding, blocks 1, ..., k                do not train

Drawing happens once, when the schedule meets a model for the first time, in place, and never in a run that goes on from
a checkpoint. transformers marks what it loaded as initialised and then draws nothing; the marks are taken off for it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from tunesmith.core.freezing import bottom, chosen_stacks
from tunesmith.core.modelmap import blocks as stacks_of
from tunesmith.core.part import part
from tunesmith.core.schedule import Schedule
from tunesmith.core.seeds import forked
from tunesmith.errors import ModelError, TunesmithError

LAST = "last"
_LOADED = "_is_hf_initialized"


@part(
    paper="arXiv:2112.07869",
    refuses={
        "fsdp": "a shard of a weight cannot be drawn by itself",
        "adapters": "weights that rest under an adapter cannot begin anew; tune the weights themselves (method: full)",
        "prompts": "weights that rest behind a prompt cannot begin anew; tune the weights themselves (method: full)",
    },
)
class FreshTop(Schedule):
    """Draws the top blocks anew, and freezes the embedding and the bottom blocks.

    Args:
        blocks: r, how many blocks at the top begin anew; 1 to 6 in the study. 0 draws nothing, not the pooler either.
        pooler: Whether a pooler behind the blocks begins anew with them.
        frozen: k, how many blocks at the bottom rest, with the embedding; 0 for the embedding alone, None for nothing.
        stack: Of the top: `last` in the order of execution (the decoder of an encoder-decoder), `all` (r of each), or
            the path of one, such as `encoder.block`. The bottom is that of the first stack.
        seed: Of what is drawn; each module has its own stream, the same in every process.
    """

    def __init__(
        self,
        *,
        blocks: NonNegativeInt = 1,
        pooler: bool = True,
        frozen: NonNegativeInt | None = 1,
        stack: str = LAST,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.blocks, self.pooler, self.frozen, self.stack, self.seed = blocks, pooler, frozen, stack, seed
        self.rests: frozenset[str] = frozenset()
        """Names of what is frozen, also of what did not train anyway."""
        self.fresh: tuple[str, ...] = ()
        """Names of the parameters that were drawn anew, in this process and for this model."""
        self._met: weakref.ref[nn.Module] | None = None
        self._goes_on = False

    def on_attach(self) -> None:
        """Draw, unless the run goes on or the model is known; find what rests.

        Raises:
            ModelError: not enough blocks, blocks that share weights, a model without `_init_weights`.
            TunesmithError: nothing is left to train.
        """
        model = self.model
        assert model is not None
        self.rests = frozenset() if self.frozen is None else bottom(model, self.frozen)
        if self.eligible and not self.eligible.keys() - self.rests:
            raise TunesmithError(
                f"fresh-top: all of the {len(self.eligible)} parameters that train are in the embedding or the bottom "
                f"{self.frozen} blocks of {type(model).__name__}; freeze fewer"
            )
        known = self._met is not None and self._met() is model
        if not known:
            self._met, self.fresh = weakref.ref(model), ()
            if not self._goes_on and self._restored is None:
                self._draw(model)

    def _draw(self, model: nn.Module) -> None:
        modules = top(model, self.blocks, stack=self.stack, pooler=self.pooler)
        inside = [n for m in modules for n, _ in model.get_submodule(m).named_parameters(prefix=m)]
        if rests := sorted(self.rests & set(inside)):
            raise ModelError(
                f"fresh-top: {rests[0]!r} is in the top {self.blocks} blocks, which begin anew, and in the bottom "
                f"{self.frozen}, which rest; ask for fewer"
            )
        # What an adapter put there has its own start, and the weights below it rest.
        changed = tuple(f"{n}." for n, m in model.named_modules() if hasattr(m, "base_layer"))
        own = {n for n in self.eligible if not n.startswith(changed) and "tunesmith_" not in n}
        drawn: list[str] = []
        for name in modules:
            drawn += draw_anew(model, name, self.seed, own)
        self.fresh = tuple(drawn)
        if modules and not drawn:
            warnings.warn(
                f"fresh-top: nothing in the top {self.blocks} blocks of {type(model).__name__} trains; they stay as "
                "they are",
                stacklevel=2,
            )

    def active(self, step: int) -> Collection[str]:
        return self.eligible.keys() - self.rests

    def training_state(self) -> dict[str, Tensor]:
        """That the top was drawn: a checkpoint holds what became of it."""
        return {"drawn": torch.ones((), dtype=torch.bool)}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing: `on_attach` saw that there is a state."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, optimizer: Any,
        **more: Any,
    ) -> None:  # fmt: skip
        # A Trainer without our mixin restores no state, and tells by its step that it goes on.
        self._goes_on = state.global_step > 0
        super().on_train_begin(args, state, control, model, optimizer, **more)
        self._goes_on = False


def top(model: nn.Module, count: int, *, stack: str = LAST, pooler: bool = True) -> list[str]:
    """Names of the modules of the top `count` blocks, and of the pooler behind them.

    Raises:
        ModelError: a stack has fewer blocks, or its blocks share their weights (ALBERT); no such stack.
    """
    if not count:
        return []
    held = stacks_of(model)
    wanted = list(held)[-1:] if stack == LAST else list(chosen_stacks(model, stack))
    found = []
    for path in wanted:
        if hasattr(getattr(model, "config", None), "num_hidden_groups"):
            raise ModelError(f"the layers of {type(model).__name__} share the weights of {path!r}; none is at the top")
        if count > len(held[path]):
            raise ModelError(f"{count} blocks were asked for at the top of {path!r}, which has {len(held[path])}")
        found += [f"{path}.{i}" for i in range(len(held[path]) - count, len(held[path]))]
    if pooler:
        found += [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "pooler"]
    return found


@torch.no_grad()
def draw_anew(model: nn.Module, name: str, seed: int, eligible: Collection[str]) -> list[str]:
    """Initialise a module and all in it by the model's own rule, in place, where it trains.

    Returns:
        Names of the parameters that were drawn.

    Raises:
        ModelError: no model of transformers is around it; a tensor in it is tied to one outside.
    """
    module, owner = model.get_submodule(name), _owner(model, name)
    mine = {id(p) for p in module.parameters()}
    for other, p in model.named_parameters(remove_duplicate=False):
        if id(p) in mine and not other.startswith(f"{name}."):
            raise ModelError(f"{other!r} is tied to a tensor of {name!r}, which cannot begin anew by itself")
    before = {n: p.detach().clone() for n, p in module.named_parameters(prefix=name) if n not in eligible}
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with _unmarked(module), forked(seed, "fresh-top", name, device=device):
        # What is inside first, as transformers does: GPT-2 draws its output projections again from outside.
        for inner in reversed(list(module.modules())):
            owner._init_weights(inner)
    held = dict(model.named_parameters())
    for n, value in before.items():
        held[n].copy_(value)
    return [n for n, _ in module.named_parameters(prefix=name) if n not in before]


def _owner(model: nn.Module, name: str) -> PreTrainedModel:
    """The innermost model of transformers around a module: that of its own stack, where models are composed."""
    words = name.split(".")
    for i in range(len(words) - 1, -1, -1):
        module = model.get_submodule(".".join(words[:i]))
        if isinstance(module, PreTrainedModel):
            return module
    raise ModelError(f"{type(model).__name__} is no model of transformers, whose `_init_weights` draws {name!r}")


@contextmanager
def _unmarked(module: nn.Module) -> Iterator[None]:
    """Without the marks of what was loaded."""
    tensors = [*module.parameters(), *module.buffers(), *module.modules()]
    marked = [t for t in tensors if getattr(t, _LOADED, False)]
    for t in marked:
        delattr(t, _LOADED)
    try:
        yield
    finally:
        for t in marked:
            setattr(t, _LOADED, True)
