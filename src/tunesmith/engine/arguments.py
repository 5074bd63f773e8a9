"""A recipe's `train` section as transformers' TrainingArguments."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from tunesmith.engine.sharding import by_torch
from tunesmith.errors import RecipeError
from tunesmith.models.embedded import EMBEDDED
from tunesmith.recipe import DEFAULT_OPTIMIZER, Recipe

ADAPTER_LR, FULL_LR = 2e-4, 2e-5
# Models this small want larger rates. At 2e-3 the embedded task is learnt and much of what came before is kept.
EMBEDDED_ADAPTER_LR, EMBEDDED_FULL_LR = 2e-3, 5e-4
_NUMBERS = ("adam_beta1", "adam_beta2", "adam_epsilon")
_ADAM = (*_NUMBERS, "optim_target_modules")


def total_steps(recipe: Recipe, rows: int, world_size: int) -> int:
    """Optimizer steps of the run: as transformers counts them, an incomplete last step of an epoch included."""
    train = recipe.train
    if train.steps is not None:
        return train.steps
    batches = math.ceil(math.ceil(rows / train.batch_size) / world_size)
    return max(math.ceil(math.ceil(batches / train.gradient_accumulation) * (train.epochs or 3.0)), 1)


def learning_rate(recipe: Recipe) -> float:
    """The peak learning rate: the recipe's, else a usual one for what trains and the size of the model."""
    if recipe.train.learning_rate:
        return recipe.train.learning_rate
    if recipe.model.name in EMBEDDED:
        return EMBEDDED_FULL_LR if recipe.full else EMBEDDED_ADAPTER_LR
    return FULL_LR if recipe.full else ADAPTER_LR


def arguments(
    recipe: Recipe, checkpoints: Path, *, steps: int, own_optimizer: bool, unused_parameters: bool
) -> TrainingArguments:
    """The arguments of the run.

    Args:
        recipe: The run.
        checkpoints: Folder for checkpoints.
        steps: From `total_steps`.
        own_optimizer: The optimizer is a part of ours, so `optim` does not apply.
        unused_parameters: Some parameters get no gradient in some steps (a schedule); several processes must know.

    Raises:
        RecipeError: transformers refuses a value.
    """
    train = recipe.train
    options: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "max_steps": steps,
        "per_device_train_batch_size": train.batch_size,
        "per_device_eval_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "learning_rate": learning_rate(recipe),
        "weight_decay": train.weight_decay,
        "lr_scheduler_type": train.lr_schedule,
        "warmup_steps": train.warmup if train.warmup < 1 else int(train.warmup),
        "max_grad_norm": train.max_grad_norm,
        "bf16": train.precision == "bf16",
        "fp16": train.precision == "fp16",
        "gradient_checkpointing": train.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "eval_strategy": "steps",
        "eval_steps": train.eval_every or max(steps // 8, 1),
        "save_strategy": "steps",
        "save_steps": train.save_every or max(steps // 4, 1),
        "save_total_limit": train.keep_checkpoints,
        "logging_steps": train.log_every or max(steps // 100, 1),
        "logging_nan_inf_filter": False,
        "seed": train.seed,
        "data_seed": train.seed,
        "dataloader_num_workers": train.workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "report_to": "none",
        "disable_tqdm": True,
        "torch_compile": train.torch_compile,
        "ddp_find_unused_parameters": unused_parameters,
        "restore_callback_states_from_checkpoint": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    if not own_optimizer:
        given = recipe.optimizer.options
        options["optim"] = DEFAULT_OPTIMIZER if nothing_to_page(recipe) else recipe.optimizer.name
        options |= {k: _float(k, v) if k in _NUMBERS else v for k, v in given.items() if k in _ADAM}
        rest = {k: v for k, v in given.items() if k not in _ADAM}
        if rest and recipe.optimizer.name.startswith("adamw_torch"):
            raise RecipeError(f"{recipe.optimizer.name} has no option {next(iter(rest))!r}; it has {', '.join(_ADAM)}")
        options["optim_args"] = ",".join(f"{k}={v}" for k, v in rest.items()) or None
    if train.fsdp and by_torch():
        options["save_strategy"] = "no"
    elif train.fsdp:
        options["fsdp"] = "full_shard"
        options["fsdp_config"] = {"fsdp_version": 2, "reshard_after_forward": True}
    try:
        return TrainingArguments(**options)
    except ValueError as error:
        raise RecipeError(f"train: {error}") from None


def nothing_to_page(recipe: Recipe) -> str | None:
    """What to say where a paged optimizer was asked for and there is no GPU; None elsewhere."""
    if not recipe.optimizer.name.startswith("paged_adamw") or torch.cuda.is_available():
        return None
    return (
        f"{recipe.optimizer.name} moves its state to the computer's memory when the GPU's is short; here is no GPU, "
        "so it is AdamW, whose update is the same"
    )


def _float(name: str, value: Any) -> float:
    """YAML 1.1 reads 1e-8 as text, and transformers would hand it on as such."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RecipeError(f"optimizer.{name}: expected a number, found {value!r}") from None
