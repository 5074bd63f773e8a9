"""What is special to ZO personalisation."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from tests.zoo import batch, checkpoint, tiny
from tunesmith.core.directions import Directions
from tunesmith.core.meters import saved_bytes, state_bytes
from tunesmith.core.optimizer import Closure
from tunesmith.core.seeds import generator, seed_of
from tunesmith.core.trainer import TrainerMixin
from tunesmith.errors import RecipeError, TunesmithError
from tunesmith.optimizers.zo_personalization import ZOPersonalization, still_directions


def token(width: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(width, generator=generator("token", seed)).to(dtype))


def bowl(p: nn.Parameter) -> Closure:
    return lambda: (p.detach().double() ** 2).sum()


def slope(p: nn.Parameter, along: Tensor) -> Closure:
    """A loss whose gradient is `along` everywhere."""
    return lambda: p.detach().double() @ along.double()


def drawn(seed: int, step: int, sample: int, width: int) -> Tensor:
    z = nn.Parameter(torch.zeros(width))
    Directions([{"params": [z]}]).add_(seed_of(seed, "zo-personalization", step, sample), 1.0)
    return z.detach()


def test_steps_are_the_published_ones() -> None:
    """Five steps of three directions with a token's analysis after the third, against the equations in double."""
    p = nn.Parameter(torch.linspace(-1, 2, 12, dtype=torch.float64))
    optimizer = ZOPersonalization([p], lr=0.02, weight_decay=0.1, samples=3, period=3, nu=0.4, seed=5, eps=1e-2)
    e, m, v = p.detach().clone(), torch.zeros(12).double(), torch.zeros(12).double()
    loss = lambda at: (at**3).sum() + at.prod()  # noqa: E731
    basis, tokens = torch.zeros(0, 12).double(), []
    for step in range(5):
        z = [drawn(5, step, i, 12).double() for i in range(3)]
        g = sum((loss(e + 1e-3 * one) - loss(e)) / 1e-3 * one for one in z) / 3
        g = g / math.sqrt((12 - len(basis) + 3 - 1) / 3)
        g = g - basis.T @ (basis @ g)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        update = m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-2)
        e = e - 0.02 * (0.1 * e + update)
        tokens.append(e)
        optimizer.step(lambda: loss(p.detach()))
        assert torch.allclose(p.detach(), e, atol=1e-5), step
        if step == 2:
            basis = still_directions(torch.stack(tokens), 0.4).double()
            assert len(basis) == 1
    assert optimizer.basis is not None
    assert torch.allclose(optimizer.basis.double(), basis, atol=1e-3)


def test_the_root_makes_the_estimate_as_long_as_the_gradient() -> None:
    width, along = 300, torch.randn(300, generator=generator("along"))
    for samples, times in ((1, 2500), (2, 1200), (8, 300)):  # means within 3 % of the expectation, one sigma
        p, squares = token(width), []
        optimizer = ZOPersonalization([p], samples=samples, subspace=False)
        for step in range(times):
            optimizer.state["run"]["step"] = step
            optimizer.estimate(slope(p, along))
            assert optimizer._found is not None
            squares.append(float(optimizer.gradient(optimizer._found).square().sum()))
        assert np.mean(squares) == pytest.approx(float(along.square().sum()), rel=0.1), samples


def test_removed_directions_are_gone_and_counted() -> None:
    p = token(40)
    optimizer = ZOPersonalization([p], period=20)
    basis = torch.linalg.qr(torch.randn(40, 10, generator=generator("basis")))[0].T
    found = [(1, 0.5), (2, -2.0)]
    plain = optimizer.gradient(found)
    optimizer.state["run"]["basis"] = basis
    clean = optimizer.gradient(found)
    assert float((basis @ clean).abs().max()) < 1e-6 * float(clean.norm())
    whole = plain * math.sqrt((40 + 1) / (30 + 1))
    assert torch.allclose(clean, whole - basis.T @ (basis @ whole), atol=1e-6)


@pytest.mark.parametrize("nu", [0.0, 1e-3, 0.2, 0.9])
def test_directions_are_those_of_scikit_learn(nu: float) -> None:
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    g = generator("walk")
    scales = torch.logspace(-2, 1, 40)
    history = (torch.randn(12, 6, generator=g).cumsum(0) @ torch.randn(6, 40, generator=g)) * scales
    history += 0.05 * scales * torch.randn(12, 40, generator=g)
    fitted = PCA(n_components=12, svd_solver="full").fit(StandardScaler().fit_transform(history.double().numpy()))
    beyond = np.flatnonzero(np.cumsum(fitted.explained_variance_ratio_) > 1 - nu)
    first = beyond[0] if nu else 11
    expected = torch.from_numpy(fitted.components_[first + 1 : 11]).float()
    found = still_directions(history, nu)
    assert found.shape == expected.shape == (max(0, 10 - first), 40)
    assert torch.allclose((found @ expected.T).abs(), torch.eye(len(found)), atol=1e-4)
    assert torch.allclose(found @ found.T, torch.eye(len(found)), atol=1e-5)
    if nu == 0.2:
        assert len(found) >= 5


def test_numbers_that_never_moved_have_no_say() -> None:
    """Neither does rounding, divided by itself, make a variance of one, nor is there a division by zero."""
    history = torch.randn(7, 20, generator=generator("moving"))
    history[:, 10:] = torch.linspace(0.1, 3, 10)
    found = still_directions(history, 0.3)
    assert len(found)
    assert float(found[:, 10:].abs().max()) < 1e-6
    assert still_directions(torch.ones(7, 20) / 3, 0.3).shape == (0, 20)


def test_the_history_is_a_ring_of_updated_tokens() -> None:
    p, seen = token(6), []
    optimizer = ZOPersonalization([p], period=4)
    for _ in range(6):
        optimizer.step(bowl(p))
        seen.append(p.detach().clone())
    assert torch.equal(optimizer.state["run"]["history"], torch.stack([seen[4], seen[5], seen[2], seen[3]]))
    assert optimizer.basis is not None
    assert torch.equal(optimizer.basis, still_directions(torch.stack(seen[:4]), 1e-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_parameters_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    p = token(500, dtype=dtype)
    before, calls = p.detach().clone(), []

    def closure() -> Tensor:
        calls.append(p.detach().clone())
        if len(calls) == 6:
            raise KeyboardInterrupt
        return p.detach().square().sum()

    optimizer = ZOPersonalization([p], samples=3)
    assert torch.equal(optimizer.estimate(closure), before.square().sum())
    assert torch.equal(p, before)
    assert len(calls) == 4
    assert torch.equal(calls[0], before)
    assert not any(torch.equal(a, b) for a in calls[1:] for b in calls[:1])
    with pytest.raises(KeyboardInterrupt):
        optimizer.estimate(closure)
    assert torch.equal(p, before)


def test_a_half_precision_state_is_float32_and_survives_a_checkpoint() -> None:
    """Bitwise, with directions removed on both sides of the checkpoint."""
    p = token(64, dtype=torch.bfloat16)
    optimizer = ZOPersonalization([p], period=8, nu=0.3)
    for _ in range(10):
        optimizer.step(bowl(p))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(p)
    resumed = ZOPersonalization([other], lr=0.5, period=8, nu=0.3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.basis is not None
    assert len(resumed.basis) > 0
    assert all(t.dtype == torch.float32 for t in resumed.state["run"].values() if isinstance(t, Tensor))
    for _ in range(8):
        optimizer.step(bowl(p))
        resumed.step(bowl(other))
    assert torch.equal(p, other)
    assert torch.equal(optimizer.basis, resumed.basis)  # type: ignore[arg-type]
    assert state_bytes(resumed) == resumed.state_formula() == 4 * 64 * (2 + 8 + len(resumed.basis))


def test_without_the_subspace_nothing_is_kept_of_the_past() -> None:
    p = token(10)
    optimizer = ZOPersonalization([p], subspace=False)
    for _ in range(3):
        optimizer.step(bowl(p))
    assert state_bytes(optimizer) == optimizer.state_formula() == 8 * 10
    assert optimizer.basis is None


def test_tensors_are_one_vector_in_their_order_with_the_rates_of_their_groups() -> None:
    a, b, frozen = token(3, 1), nn.Parameter(torch.randn(2, 4).t()), token(5, 2).requires_grad_(False)
    before = [p.detach().clone() for p in (a, b, frozen)]
    optimizer = ZOPersonalization([{"params": [a, frozen]}, {"params": [b], "lr": 0.0}], lr=0.1, period=4)
    optimizer.step(lambda: (a.detach() ** 2).sum() + b.detach().sum())
    assert not torch.equal(a, before[0])
    assert torch.equal(b, before[1])
    assert torch.equal(frozen, before[2])
    row = optimizer.state["run"]["history"][0]
    assert torch.equal(row, torch.cat([a.detach(), b.detach().flatten()]))


def test_shared_memory_trains_once() -> None:
    p = token(6)
    twin = nn.Parameter(p.data)
    optimizer = ZOPersonalization([p, twin], period=4)
    alone = ZOPersonalization([other := copy.deepcopy(p)], period=4)
    optimizer.step(bowl(p))
    alone.step(bowl(other))
    assert torch.equal(p, other)
    assert state_bytes(optimizer) == state_bytes(alone)


def test_what_it_is_not_for_is_refused() -> None:
    with pytest.raises(TunesmithError, match=r"262,145 numbers train.*token's vector or a soft prompt.*mezo"):
        ZOPersonalization([nn.Parameter(torch.zeros(2**18 + 1))])
    ZOPersonalization([nn.Parameter(torch.zeros(2**18))])
    with pytest.raises(TunesmithError, match=r"history of 128 tokens.*127 train; set `period` to at most 127"):
        ZOPersonalization([token(127)])
    ZOPersonalization([token(127)], subspace=False)
    with pytest.raises(RecipeError, match="period"):
        ZOPersonalization([token(10)], period=1)
    p, q = token(10), token(10, 1)
    for now in (True, False):  # more of it, and as many others
        optimizer = ZOPersonalization([p.requires_grad_(now), q.requires_grad_(True)], period=5)
        optimizer.step(bowl(q))
        p.requires_grad_(not now)
        q.requires_grad_(now)
        with pytest.raises(
            TunesmithError, match=rf"other numbers train than before \(10 now, {20 if now else 10} then"
        ):
            optimizer.step(bowl(q))
    p.requires_grad_(False)
    q.requires_grad_(True)
    other = ZOPersonalization([p, q], period=6)
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(TunesmithError, match="another `period`"):
        other.step(bowl(q))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_loss_that_is_not_finite_is_left_out() -> None:
    p = token(20)
    losses = iter([1.0, math.nan, 1.0 + 1e-3, math.inf, 1.0, 1.0])
    optimizer = ZOPersonalization([p], period=4)
    before = p.detach().clone()
    optimizer.estimate(lambda: torch.tensor(next(losses), dtype=torch.float64))
    assert optimizer.skipped == 1
    assert optimizer._found is not None
    g = optimizer.gradient(optimizer._found)
    assert torch.allclose(g, drawn(0, 0, 1, 20) / math.sqrt(20), atol=1e-4)
    optimizer.step()
    assert not torch.equal(p, before)
    after = p.detach().clone()
    optimizer.step(lambda: torch.tensor(next(losses), dtype=torch.float64))
    assert optimizer.skipped == 3
    assert torch.equal(p, after)
    assert optimizer.state["run"]["step"] == 2
    assert optimizer.state["run"]["moved"] == 1


class Trainer(TrainerMixin, transformers.Trainer):
    pass


def test_a_soft_prompt_of_a_language_model_learns_in_the_trainer(tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model: Any = get_peft_model(tiny("llama"), config)
    rows = [{name: value[0] for name, value in batch("llama", 1, seed=0).items()} for _ in range(4)]
    given = batch("llama", 2, seed=0)
    prompt = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in prompt) == 128
    before, loss = checkpoint(model), float(model(**batch("llama", 1, seed=0)).loss.detach())
    optimizer = ZOPersonalization(prompt, lr=0.1, period=20)
    with saved_bytes(model) as saved:
        optimizer.estimate(lambda: model(**given).loss)
    assert saved.bytes == 0
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=80,
        per_device_train_batch_size=4,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    changed = [name for name, tensor in checkpoint(model).items() if not torch.equal(before[name], tensor)]
    assert len(changed) == 1
    assert "prompt" in changed[0]
    assert optimizer.basis is not None
    model.eval()
    assert float(model(**batch("llama", 1, seed=0)).loss.detach()) < loss - 0.02
