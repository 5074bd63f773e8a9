"""Sharded weights where accelerate's FSDP2 wants a GPU: torch's own `fully_shard` over gloo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import Trainer

from tunesmith.core.modelmap import blocks


def by_torch() -> bool:
    """Whether sharding is done here instead of by accelerate."""
    return not torch.cuda.is_available()


def shard(model: nn.Module) -> None:
    """Shard a model over all processes, block by block, in place; the optimizer must be built afterwards."""
    for stack in blocks(model).values():
        for block in stack:
            fully_shard(block)
    fully_shard(model)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")


def leave_alone(trainer: Trainer) -> None:
    """Tell the Trainer that the model places itself and reduces its own gradients, so that nothing wraps it again."""
    trainer.is_distributed_loading_by_transformers = True


def gathered(model: nn.Module) -> dict[str, Any]:
    """The whole state dict on the CPU of the first process; empty on the others. A collective call."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # Tied tensors are named once by named_parameters and twice in the state.
    own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and name in own}
