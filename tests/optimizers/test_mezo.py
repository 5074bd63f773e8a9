"""What is special to MeZO."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.zoo import batch, checkpoint, same, tiny
from tunesmith.core.directions import Directions
from tunesmith.core.optimizer import Closure
from tunesmith.core.schedule import Schedule
from tunesmith.core.seeds import seed_of
from tunesmith.core.trace import Trace
from tunesmith.errors import TunesmithError
from tunesmith.optimizers.mezo import MeZO


def loss_of(model: nn.Module, given: dict[str, Any]) -> Closure:
    return lambda: model(**given).loss


def bowl(p: nn.Parameter) -> Closure:
    return lambda: (p.detach() ** 2).sum()


def test_a_step_is_the_published_one() -> None:
    """Two directions, weight decay on one group: against the equation, with z taken from the seeds of the run."""
    a, b = nn.Parameter(torch.ones(3, 4, dtype=torch.float64)), nn.Parameter(torch.ones(5, dtype=torch.float64))
    before = [a.detach().clone(), b.detach().clone()]
    groups = [{"params": [a], "weight_decay": 0.1}, {"params": [b], "weight_decay": 0.0, "lr": 0.03}]
    optimizer = MeZO(groups, lr=0.01, eps=1e-3, samples=2, seed=5)

    def closure() -> Tensor:
        return (a.detach() ** 3).sum() + b.detach().prod()

    optimizer.step(closure)
    total = [torch.zeros_like(a), torch.zeros_like(b)]
    for sample in range(2):
        z = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(5))]
        Directions([{"params": z}]).add_(seed_of(5, "mezo", 0, sample), 1.0)
        sides = [((before[0] + s * z[0]) ** 3).sum() + (before[1] + s * z[1]).prod() for s in (1e-3, -1e-3)]
        g = (sides[0] - sides[1]).item() / 2e-3
        for mean, direction in zip(total, z, strict=True):
            mean += g * direction.detach() / 2
    assert torch.allclose(a, before[0] - 0.01 * (total[0] + 0.1 * before[0]), atol=1e-5)
    assert torch.allclose(b, before[1] - 0.03 * total[1], atol=1e-5)


def test_more_samples_estimate_better() -> None:
    cosines = []
    for samples in (1, 64):
        p = nn.Parameter(torch.ones(40, dtype=torch.float64))
        optimizer = MeZO([p], lr=1.0, samples=samples)
        optimizer.step(bowl(p))
        cosines.append(float(torch.cosine_similarity(1 - p.detach(), torch.ones(40, dtype=torch.float64), dim=0)))
    assert cosines[1] > 0.7 > cosines[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_restore_keeps_every_bit(dtype: torch.dtype) -> None:
    model, given = tiny("llama").to(dtype), batch("llama")
    before = checkpoint(model)
    optimizer = MeZO(MeZO.groups(model), lr=0.0, eps=1e-2, samples=3, restore="exact")
    for _ in range(3):
        optimizer.step(loss_of(model, given))
    assert same(before, checkpoint(model))


def test_a_loss_that_is_not_finite_is_left_out_and_counted() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = MeZO([p], lr=0.1, samples=2, weight_decay=0.5, trace=True)
    values = iter([1.0, math.nan, math.inf, 1.0, 1.0, math.nan, 2.0, 1.0])

    def closure() -> Tensor:
        return torch.tensor(next(values))

    with pytest.warns(UserWarning, match=r"step 0.*2 so far"):
        optimizer.step(closure)
    assert torch.allclose(p, torch.ones(4), atol=1e-6), "with nothing measured nothing moves, the decay included"
    with pytest.warns(UserWarning, match="step 1"):
        optimizer.step(closure)
    assert optimizer.skipped == 3
    assert optimizer.trace.columns["ends"] == [1], "the one that was measured counts fully"
    assert optimizer.trace.columns["rates"] == [[0.1, 0.05]]
    assert not torch.allclose(p, torch.full((4,), 0.95), atol=1e-6)
    resumed = MeZO([nn.Parameter(torch.ones(4))])
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.skipped == 3


def test_tied_weights_are_visited_once() -> None:
    tied, untied = tiny("gpt2"), tiny("gpt2")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone().requires_grad_(False))
    assert tied.lm_head.weight is tied.transformer.wte.weight
    sizes = []
    for model in (tied, untied):
        before = model.transformer.wte.weight.detach().clone()
        Directions(MeZO.groups(model)).add_(1, 1.0)
        sizes.append(float((model.transformer.wte.weight.detach() - before).std()))
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-6)


def test_an_adapters_weights_move_and_the_base_stays() -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
    before = checkpoint(model)
    optimizer = MeZO(MeZO.groups(model), lr=1e-2, eps=1e-2)
    for _ in range(2):
        optimizer.step(loss_of(model, batch("llama")))
    for name, tensor in checkpoint(model).items():
        assert torch.equal(tensor, before[name]) == ("lora_" not in name), name


@pytest.mark.parametrize("outside", [False, True])
def test_runs_in_inference_mode(outside: bool) -> None:
    results = []
    for inference in (False, True):
        model, given = tiny("llama"), batch("llama")
        optimizer = MeZO(MeZO.groups(model), lr=1e-2, restore="exact")

        def closure(model: nn.Module = model, given: dict = given, inference: bool = inference) -> Tensor:
            with torch.inference_mode(inference):
                return model(**given).loss

        for _ in range(2):
            with torch.inference_mode(inference and outside):
                loss = optimizer.step(closure)
        assert loss is not None
        results.append(checkpoint(model))
        model(**given).loss.backward()
    assert same(*results)


def test_a_trace_replays_the_run(tmp_path: Path) -> None:
    model, start, given = tiny("llama"), tiny("llama"), batch("llama")
    options = {"lr": 1e-3, "samples": 2, "restore": "exact", "trace": True, "block_size": 100}
    groups = MeZO.groups(model, weight_decay=0.1)
    optimizer = MeZO(groups, **options)
    for step in range(6):
        if step == 3:  # stopped and resumed: the trace goes on
            saved = optimizer.state_dict()
            optimizer = MeZO(groups, **options)
            optimizer.load_state_dict(saved)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.9**step
        optimizer.step(loss_of(model, given))
    path = optimizer.trace.save(tmp_path / "trace.safetensors")
    Trace.load(path).replay_(MeZO.groups(start, weight_decay=0.1))
    assert same(checkpoint(model), checkpoint(start))


def test_a_trace_that_was_not_kept_says_so() -> None:
    with pytest.raises(TunesmithError, match="trace=True"):
        _ = MeZO([nn.Parameter(torch.ones(2))]).trace


class Alternate(Schedule):
    """One layer at a time."""

    def active(self, step: int) -> list[str]:
        return [name for name in self.eligible if f"layers.{step % 2}." in name]


def test_a_schedule_may_freeze_but_not_under_a_trace() -> None:
    given = batch("llama")
    for trace in (False, True):
        model = tiny("llama")
        optimizer = MeZO(MeZO.groups(model), lr=1e-2, restore="exact", trace=trace)
        schedule = Alternate()
        schedule.attach(model, optimizer)
        schedule.begin_step(0)
        before = checkpoint(model)
        if trace:
            with pytest.raises(TunesmithError, match="leave `trace` off"):
                optimizer.step(loss_of(model, given))
            continue
        optimizer.step(loss_of(model, given))
        changed = {n for n, t in checkpoint(model).items() if not torch.equal(t, before[n])}
        assert changed
        assert all("layers.0." in name for name in changed)
        schedule.begin_step(1)
        assert optimizer.state["run"]["step"] == 1, "the seeds go on"
