"""What is special to Natural GaLore: the history, the inverse, lambda, and what a new projection does to them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.zoo import batch, checkpoint, same, tiny
from tunesmith import catalog
from tunesmith.core.gradspace import SingularSpace
from tunesmith.core.meters import state_bytes
from tunesmith.core.part import Use, check_combination
from tunesmith.errors import ModelError, RecipeError, TunesmithError
from tunesmith.optimizers import natural_galore
from tunesmith.optimizers.galore import GaLore
from tunesmith.optimizers.natural_galore import FisherSpace, NaturalGaLore

PROJECTIONS = ("std", "reverse_std", "left", "right", "full")


def weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def gradients(p: Tensor, steps: int, size: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(7)
    return [(size * torch.randn(p.shape, generator=g, dtype=torch.float64)).to(p.dtype) for _ in range(steps)]


def sides(shape: torch.Size, kind: str) -> tuple[bool, bool]:
    wide = shape[0] < shape[1]
    left = {"std": wide, "reverse_std": not wide, "left": True, "right": False, "full": True}[kind]
    right = {"std": not wide, "reverse_std": wide, "left": False, "right": True, "full": True}[kind]
    return left, right


def reference(
    W: Tensor, grads: list[Tensor], kind: str, rank: int, period: int, s: int, damping: float, refresh: str
) -> Tensor:
    """The published formulas in float64 with a dense Fisher matrix, side by side with nothing of ours."""
    W, (m, n) = W.detach().double().clone(), W.shape
    uses_left, uses_right = sides(W.shape, kind)
    first = second = P = Q = None
    past: list[Tensor] = []
    for k, grad in enumerate(grads):
        G = grad.double()
        if k % period == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            old = P, Q
            P = U[:, :rank] if uses_left else torch.eye(m, dtype=torch.float64)
            Q = Vh[:rank] if uses_right else torch.eye(n, dtype=torch.float64)
            if refresh == "clear":
                past = []
            if refresh == "rotate" and k:
                past = [P.T @ old[0] @ low @ old[1] @ Q.T for low in past]
        R = P.T @ G @ Q.T
        past = [*past, R][-s:]
        columns = torch.stack([low.flatten() for low in past], dim=1)
        fisher = damping * torch.eye(len(columns), dtype=torch.float64) + columns @ columns.T
        N = torch.linalg.solve(fisher, R.flatten()).view_as(R)
        first = 0.1 * N if first is None else 0.9 * first + 0.1 * N
        second = 0.001 * N**2 if second is None else 0.999 * second + 0.001 * N**2
        size = 0.03 * (1 - 0.999 ** (k + 1)) ** 0.5 / (1 - 0.9 ** (k + 1))
        W = W - size * 0.25 * (P @ (first / (second.sqrt() + 1e-6)) @ Q)
        W = W - 0.03 * 0.1 * W
    return W


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8),
    st.integers(2, 8),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([0.01, 1.0, 100.0]),
    st.sampled_from(PROJECTIONS),
    st.sampled_from(["clear", "rotate", "keep"]),
)
def test_follows_the_published_formulas(
    m: int, n: int, rank: int, period: int, s: int, damping: float, kind: Any, refresh: Any
) -> None:
    p, rank = weight(m, n, dtype=torch.float64), min(rank, m, n)
    grads = gradients(p, 7)
    expected = reference(p, grads, kind, rank, period, s, damping, refresh)
    options = {"rank": rank, "period": period, "scale": 0.25, "proj_type": kind}
    fisher = {"history": s, "damping": damping, "on_refresh": refresh}
    optimizer = NaturalGaLore([p], lr=0.03, weight_decay=0.1, **options, **fisher)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    assert torch.allclose(p, expected, atol=1e-7)


def test_the_oldest_gradient_leaves_and_a_new_projection_empties_the_history() -> None:
    p = weight(6, 9)
    optimizer = NaturalGaLore([p], rank=3, history=4, period=6)
    grads = gradients(p, 8)
    for step, grad in enumerate(grads):
        p.grad = grad
        optimizer.step()
        state = optimizer.state[p]
        since = 6 * (step // 6)
        expected = [(state["left"].T @ g).flatten() for g in grads[max(since, step - 3) : step + 1]]
        held = [row for row in state["history"] if bool(row.any())]
        assert len(held) == len(expected)
        assert all(any(torch.allclose(row, low) for row in held) for low in expected)


def test_inner_products_are_exact_where_float32_fails() -> None:
    """Gradients that nearly agree, of norm 300, with lambda = 1e-3: the released formula in float32 has lost all."""
    p = weight(8, 12)
    common = 30 * gradients(p, 1)[0]
    grads = [common + 0.01 * g for g in gradients(p, 12)]
    optimizer = NaturalGaLore([p], rank=8, history=12, damping=1e-3)
    space, state = optimizer.space(p, optimizer.param_groups[0]), {"step": 0}
    assert isinstance(space, FisherSpace)
    for step, grad in enumerate(grads):
        p.grad, state["step"] = grad, step
        if not step:
            space.refresh(p, state, "W")
        natural = space.project(grad, state).flatten()
    G32 = torch.stack([(state["left"].T @ g).flatten() for g in grads], dim=1)
    G, g32 = G32.double(), G32[:, -1]
    exact = torch.linalg.solve(1e-3 * torch.eye(len(G), dtype=torch.float64) + G @ G.T, G[:, -1])
    S = torch.eye(12) + G32.T @ G32 / 1e-3
    released = g32 / 1e-3 - G32 @ torch.linalg.solve(S, G32.T @ g32) / 1e-6
    assert float((natural - exact).norm() / exact.norm()) < 1e-5
    assert float((released - exact).norm() / exact.norm()) > 0.1


def test_a_long_history_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for columns in (10**6, 7):
        monkeypatch.setattr(natural_galore, "_COLUMNS", columns)
        p = weight(9, 6)
        optimizer = NaturalGaLore([p], rank=3, history=4)
        for grad in gradients(p, 6):
            p.grad = grad
            optimizer.step()
        results.append(p.detach())
    assert torch.allclose(*results, rtol=1e-5, atol=1e-7)


def test_a_large_lambda_is_galore_and_a_small_one_is_not() -> None:
    def run(optimizer: Any, p: nn.Parameter) -> Tensor:
        start = p.detach().clone()
        common = 3 * gradients(p, 1)[0]
        for grad in gradients(p, 10):
            p.grad = common + grad
            optimizer.step()
        return p.detach() - start

    moves = {}
    for damping in (None, 1e6, 1e-3):
        p = weight(10, 7)
        # Without eps Adam has no scale at all.
        made = {"rank": 7, "scale": 1.0, "eps": 0.0}
        optimizer = GaLore([p], **made) if damping is None else NaturalGaLore([p], damping=damping, **made)
        moves[damping] = run(optimizer, p)
    assert torch.allclose(moves[1e6], moves[None], rtol=1e-2, atol=1e-5)
    assert float(torch.cosine_similarity(moves[1e-3].flatten(), moves[None].flatten(), dim=0)) < 0.9


def test_a_relative_lambda_has_no_scale() -> None:
    results, ratios = [], []
    for size in (1.0, 1e-3, 1e3):
        p = weight(10, 7, dtype=torch.float64)
        start = p.detach().clone()
        optimizer = NaturalGaLore([p], rank=4, damping=0.5, relative=True, eps=0.0)
        for grad in gradients(p, 8, size):
            p.grad = grad
            optimizer.step()
        results.append(p.detach() - start)
        ratios += optimizer.damping_ratios()
    assert torch.allclose(results[0], results[1], rtol=1e-6)
    assert torch.allclose(results[0], results[2], rtol=1e-6)
    assert ratios == pytest.approx([ratios[0]] * 3)
    assert 0.2 < ratios[0] < 1.2


def test_damping_ratios_are_lambda_over_the_newest_squared_norm() -> None:
    p, plain = weight(10, 7), weight(4, 4)
    optimizer = NaturalGaLore([{"params": [p]}, {"params": [plain], "rank": None}], rank=4, damping=0.5, history=3)
    assert optimizer.damping_ratios() == []
    for grad in gradients(p, 5):
        p.grad, plain.grad = grad, torch.ones(4, 4)
        optimizer.step()
    low = SingularSpace(4, 1, 1.0, left=False, right=True).project(p.grad, optimizer.state[p])
    assert optimizer.damping_ratios() == pytest.approx([0.5 / float(low.square().sum())], rel=1e-5)
    optimizer.param_groups[0]["relative"] = True  # in the unit of the three, and of two where only two are there
    squares = optimizer.state[p]["history"].square().sum(1)
    assert optimizer.damping_ratios() == pytest.approx([0.5 * float(squares.mean() / low.square().sum())], rel=1e-5)
    optimizer.state[p]["history"][2] = 0.0
    two = squares[:2].mean() / low.square().sum()
    assert optimizer.damping_ratios() == pytest.approx([0.5 * float(two)], rel=1e-5)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("history", [1, 3])
def test_a_zero_gradient_after_the_projection_moves_nothing_new(relative: bool, history: int) -> None:
    p = weight(6, 5)
    optimizer = NaturalGaLore([p], rank=3, betas=(0.0, 0.9), relative=relative, history=history)
    p.grad = gradients(p, 1)[0]
    optimizer.step()
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, before)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    p = weight(6, 5)
    optimizer = NaturalGaLore([p], rank=3)
    p.grad = gradients(p, 1)[0]
    optimizer.step()
    p.grad = torch.full_like(p, float("nan"))
    with pytest.raises(TunesmithError, match=r"\(6, 5\) has no inverse at step 1.*norm nan"):
        optimizer.step()


def test_bf16_weights_keep_a_float32_history_through_a_checkpoint() -> None:
    p = weight(64, 32, dtype=torch.bfloat16)
    optimizer = NaturalGaLore([p], rank=4, history=3)
    grads = gradients(p, 6)
    for grad in grads[:4]:
        p.grad = grad
        optimizer.step()
    assert optimizer.state[p]["history"].dtype == torch.float32
    assert state_bytes(optimizer) == optimizer.state_formula() == 2 * 4 * 32 + 4 * 4 * 64 * (2 + 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    q = nn.Parameter(p.detach().clone())
    resumed = NaturalGaLore([q], rank=9, history=2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for grad in grads[4:]:
        p.grad, q.grad = grad, grad
        optimizer.step()
        resumed.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("options", [{"bits": 8}, {"on_refresh": "rotate"}, {"history": 0}], ids=str)
def test_other_options_train_a_model_and_resume_bitwise(options: dict[str, Any]) -> None:
    model, inputs = tiny("gpt2"), batch("gpt2")
    twin = tiny("gpt2")
    small = {"rank": 4, "period": 3, "damping": 1.0, "relative": True}
    first = NaturalGaLore(NaturalGaLore.groups(model), lr=1e-2, **{**small, **options})
    second = NaturalGaLore(NaturalGaLore.groups(twin), lr=1e-2, **{**small, **options})
    start = model(**inputs).loss.item()
    for step in range(8):
        model(**inputs).loss.backward()
        first.step()
        first.zero_grad()
        if step == 3:
            twin.load_state_dict(model.state_dict())
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        if step > 3:
            twin(**inputs).loss.backward()
            second.step()
            second.zero_grad()
    assert same(checkpoint(model), checkpoint(twin))
    assert model(**inputs).loss.item() < start


def test_per_layer_makes_the_same_steps() -> None:
    results = []
    for per_layer in (False, True):
        model, inputs = tiny("llama"), batch("llama")
        optimizer = NaturalGaLore(NaturalGaLore.groups(model), lr=1e-2, rank=4, period=2, per_layer=per_layer)
        for _ in range(4):
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(checkpoint(model))
    assert same(*results)


def test_what_cannot_run_is_refused() -> None:
    part = catalog.get("natural-galore")
    for setting, options in (("fsdp", {}), ("ddp", {"per_layer": True}), ("gradient-clipping", {"per_layer": True})):
        with pytest.raises(RecipeError, match="natural-galore cannot run here"):
            check_combination([Use(part, part.validate(options))], {setting: "x"})
    check_combination([Use(part, part.validate({}))], {"ddp": "x", "gradient-clipping": "x"})
    model = tiny("llama")
    for name, p in model.named_parameters():
        p.requires_grad_("embed" in name)
    with pytest.raises(ModelError, match="NaturalGaLore projects"):
        NaturalGaLore.groups(model)
