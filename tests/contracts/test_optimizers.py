"""The optimizer contract, for every part of the room."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn

from tests.zoo import FAMILIES, batch, checkpoint, same, tiny
from tunesmith import catalog
from tunesmith.core.meters import state_bytes
from tunesmith.core.objective import Objective
from tunesmith.core.optimizer import Optimizer
from tunesmith.core.part import Part
from tunesmith.core.trainer import TrainerMixin
from tunesmith.errors import TunesmithError
from tunesmith.objectives.sft import SFT

PARTS = catalog.in_room("optimizers")
OPTIMIZERS = pytest.mark.parametrize("part", PARTS, ids=lambda p: p.slug)
ON = pytest.mark.parametrize("family", FAMILIES)


def checked(part: Part, **more: Any) -> dict[str, Any]:
    """Checked options that fit a tiny model."""
    return part.validate({**part.target.brisk, **more})


def build(part: Part, model: nn.Module, lr: float, weight_decay: float = 0.0, **more: Any) -> Optimizer:
    """As a recipe does: options checked, the learning rate second."""
    chosen = checked(part, **more)
    return part.target(part.target.groups(model, weight_decay=weight_decay, **chosen), lr, **chosen)


def advance(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Tensor:
    """One step of a plain loop, the same for every kind of optimizer."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        if torch.is_grad_enabled():
            value.backward()
        return value

    return optimizer.step(closure)


def loss_of(model: nn.Module, given: dict[str, Any]) -> Callable[[], Tensor]:
    return lambda: model(**given).loss


@OPTIMIZERS
def test_converges_on_a_quadratic(part: Part) -> None:
    """With one of seven learning rates, the loss of 40 numbers falls below a hundredth in 400 steps."""
    g = torch.Generator().manual_seed(0)
    x, target = torch.randn(32, 8, generator=g), torch.randn(4, 8, generator=g)
    reached = []
    for lr in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0):
        model = nn.Sequential(nn.Linear(8, 4))
        optimizer = part.target(model.parameters(), lr, **checked(part))

        def loss(model: nn.Module = model) -> Tensor:
            return (model(x) - x @ target.T - 1).square().mean()

        start = loss().item()
        for _ in range(400):
            advance(optimizer, loss)
        reached.append(loss().item() / start)
    assert min(r for r in reached if r == r) < 0.01, reached


@OPTIMIZERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_saved_and_loaded_state_goes_on_bitwise(part: Part, dtype: torch.dtype) -> None:
    given = batch("llama")
    model = tiny("llama").to(dtype)
    optimizer = build(part, model, weight_decay=0.1, lr=1e-2)
    for _ in range(4):
        advance(optimizer, loss_of(model, given))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = copy.deepcopy(model)
    resumed = build(part, second, lr=0.5)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(4):
        advance(optimizer, loss_of(model, given))
        advance(resumed, loss_of(second, given))
    assert same(checkpoint(model), checkpoint(second))
    assert state_bytes(resumed) == state_bytes(optimizer)


@OPTIMIZERS
@ON
def test_state_bytes_are_the_formulas(part: Part, family: str) -> None:
    model = tiny(family)
    optimizer = build(part, model, lr=1e-3)
    if optimizer.forward_only:
        advance(optimizer, loss_of(model, batch(family)))
    else:
        # Not every weight of every family takes part in a forward pass; the formula is for all.
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert state_bytes(optimizer) == optimizer.state_formula()
    with torch.device("meta"):
        planned = build(part, tiny(family), lr=1e-3)
    assert planned.state_formula() == optimizer.state_formula()


@OPTIMIZERS
@ON
def test_groups_hold_what_trains_once_and_decay_no_bias_or_norm(part: Part, family: str) -> None:
    model = tiny(family)
    frozen = next(p for n, p in model.named_parameters() if n.endswith("bias") or p.dim() == 1)
    frozen.requires_grad_(False)
    groups = build(part, model, lr=1e-3, weight_decay=0.1).param_groups
    held = list(itertools.chain.from_iterable(group["params"] for group in groups))
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len({id(p) for p in held}) == len(held)
    for group in groups:
        assert group["weight_decay"] in (0.0, 0.1)
        for p in group["params"]:
            assert p.dim() > 1 or group["weight_decay"] == 0.0


@OPTIMIZERS
def test_works_inside_accelerate(part: Part) -> None:
    given, results = batch("llama"), []
    for prepared in (False, True):
        model = tiny("llama")
        optimizer: Any = build(part, model, lr=1e-2)
        if prepared:
            optimizer = Accelerator(cpu=True).prepare(optimizer)
        for _ in range(3):
            advance_prepared(optimizer, loss_of(model, given))
        results.append(checkpoint(model))
    assert same(*results)


def advance_prepared(optimizer: Any, loss: Callable[[], Tensor]) -> None:
    """As HF's loop: what the wrapper's `step` returns is lost, and a forward-only optimizer estimates beforehand."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if inner.forward_only:
        with torch.no_grad():
            inner.estimate(loss)
    else:
        loss().backward()
    optimizer.step()
    optimizer.zero_grad()


class Trainer(TrainerMixin, transformers.Trainer):
    pass


def train(
    part: Part,
    model: nn.Module,
    folder: Path,
    steps: int,
    *,
    rows_per_batch: int = 2,
    resume: bool = False,
    objective: Objective | None = None,
    options: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Trainer:
    """Some steps of the real Trainer over eight rows, a checkpoint after every step."""
    rows = [{name: value[0] for name, value in batch("llama", 1, seed=i).items()} for i in range(8)]
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=rows_per_batch,
        learning_rate=1e-2,
        max_grad_norm=0.0,
        save_steps=1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        **{"lr_scheduler_type": "constant", **arguments},
    )
    optimizers = (build(part, model, lr=1e-2, **options or {}), None)
    trainer = Trainer(model=model, args=args, train_dataset=rows, optimizers=optimizers, objective=objective)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@OPTIMIZERS
@pytest.mark.parametrize("accumulation", [1, 2])
def test_works_inside_the_trainer(part: Part, tmp_path: Path, accumulation: int) -> None:
    model = tiny("llama")
    before = checkpoint(model)
    trainer = train(part, model, tmp_path, 3, gradient_accumulation_steps=accumulation)
    assert trainer.state.global_step == 3
    assert all(row["loss"] > 0 for row in trainer.state.log_history if "loss" in row)
    after = checkpoint(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(not torch.equal(before[name], after[name]) for name in trained)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@OPTIMIZERS
@pytest.mark.parametrize("objective", [None, SFT()], ids=["the model's loss", "an objective"])
def test_accumulated_batches_give_the_step_of_one_large_batch(
    part: Part, objective: Objective | None, tmp_path: Path
) -> None:
    large, small = tiny("llama"), tiny("llama")
    train(part, large, tmp_path / "large", 2, rows_per_batch=4, objective=objective)
    train(part, small, tmp_path / "small", 2, gradient_accumulation_steps=2, objective=objective)
    assert all(torch.allclose(p, q, atol=1e-4) for p, q in zip(large.parameters(), small.parameters(), strict=True))


@OPTIMIZERS
def test_a_resumed_trainer_gives_the_same_bits(part: Part, tmp_path: Path) -> None:
    whole, stopped, resumed = tiny("llama"), tiny("llama"), tiny("llama")
    train(part, whole, tmp_path / "whole", 4)
    train(part, stopped, tmp_path / "parts", 2)
    train(part, resumed, tmp_path / "parts", 4, resume=True)
    assert same(checkpoint(whole), checkpoint(resumed))


@OPTIMIZERS
def test_a_scheduler_sets_the_learning_rate(part: Part) -> None:
    model, given = tiny("llama"), batch("llama")
    optimizer = build(part, model, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    advance(optimizer, loss_of(model, given))
    scheduler.step()
    before = checkpoint(model)
    advance(optimizer, loss_of(model, given))
    # A forward-only method moves the weights and brings them back.
    assert all(torch.allclose(before[n], t, rtol=1e-6, atol=1e-7) for n, t in checkpoint(model).items())


@OPTIMIZERS
def test_frozen_weights_stay_and_hold_no_state(part: Part) -> None:
    model, given = tiny("llama"), batch("llama")
    optimizer = build(part, model, lr=1e-2)
    frozen = [p for n, p in model.named_parameters() if "layers.0" in n]
    before = [p.detach().clone() for p in frozen]
    for p in frozen:
        p.requires_grad_(False)
    advance(optimizer, loss_of(model, given))
    assert all(torch.equal(a, p) for a, p in zip(before, frozen, strict=True))
    assert not any(p in optimizer.state for p in frozen)


@OPTIMIZERS
def test_leaves_the_global_random_numbers_alone_and_repeats(part: Part) -> None:
    given, results = batch("llama"), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        model = tiny("llama")
        optimizer = build(part, model, lr=1e-2)
        for _ in range(2):
            advance(optimizer, loss_of(model, given))
        assert torch.equal(state, torch.get_rng_state())
        results.append(checkpoint(model))
    assert same(*results)


@OPTIMIZERS
def test_the_loss_comes_back_from_a_step(part: Part) -> None:
    model, given = tiny("llama"), batch("llama")
    expected = loss_of(model, given)().item()
    returned = advance(build(part, model, lr=1e-3), loss_of(model, given))
    assert abs(returned.item() - expected) < 1e-3 * expected


@OPTIMIZERS
def test_only_a_forward_only_optimizer_estimates(part: Part) -> None:
    model, given = tiny("llama"), batch("llama")
    optimizer = build(part, model, lr=1e-3)
    if part.target.forward_only:
        assert "forward-only" in part.tags
        optimizer.estimate(loss_of(model, given))
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        with pytest.raises(TunesmithError, match="no estimate"):
            optimizer.step()
    else:
        assert "forward-only" not in part.tags
        with pytest.raises(TypeError, match="forward-only"):
            optimizer.estimate(loss_of(model, given))
