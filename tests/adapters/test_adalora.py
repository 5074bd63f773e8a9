"""What is special to AdaLoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tunesmith
from tests.train.conftest import data_file, model_folder, recipe  # noqa: F401
from tests.train.resuming import resumed, weights
from tests.zoo import batch, logits, same, tiny
from tunesmith.adapters.adalora import AdaLoRA, Penalty, allocation
from tunesmith.errors import ModelError, RecipeError, TunesmithError
from tunesmith.recipe import load
from tunesmith.train import run

WIDE = {"initializer_range": 0.3}
BRISK: dict[str, Any] = {"init_rank": 4, "target_rank": 2, "tinit": 4, "tfinal": 6, "delta_t": 2}
TOTAL = 20


def adapted(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(tiny("llama", **WIDE), tunesmith.adapter("adalora", **{**BRISK, **options}))


def layers(model: nn.Module) -> list[AdaLoRA]:
    return [m for m in model.modules() if isinstance(m, AdaLoRA)]


def live(model: nn.Module) -> int:
    return sum(int((made.E != 0).sum()) for made in layers(model))


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def train(
    model: nn.Module, steps: range, total: int = TOTAL, each: Callable[[int], None] = lambda t: None
) -> nn.Module:
    optimizer = adamw(model)
    for t in steps:
        with tunesmith.step(model.train(), t, total):
            model(**batch("llama", seed=t)).loss.backward()
            optimizer.step()
        each(t)
        optimizer.zero_grad()
    return model


# Equality with peft --------------------------------------------------------------------------------------------------


def theirs(ours: nn.Module, total: int, **options: Any) -> nn.Module:
    """peft's AdaLoRA with the same factors. Without a task type it would leave its penalty out."""
    config = AdaLoraConfig(
        total_step=total, target_modules=[m.layer.name for m in layers(ours)], task_type="CAUSAL_LM", **options
    )
    model = get_peft_model(tiny("llama", **WIDE), config)
    with torch.no_grad():
        for made in layers(ours):
            held = model.base_model.model.get_submodule(made.layer.name)
            held.lora_A["default"].copy_(made.A)
            held.lora_B["default"].copy_(made.B)
    return model


@pytest.mark.parametrize("delta_t", [1, 4])
def test_trajectories_are_those_of_peft(delta_t: int) -> None:
    total, r0 = 40, 5
    options = {"init_rank": r0, "target_rank": 2, "tinit": 6, "tfinal": 10, "delta_t": delta_t}
    ours = adapted(**options, alpha=16 * r0 / (r0 + 1e-5), orthogonality=0.3, penalty="norm")
    other = theirs(
        ours, total, init_r=r0, target_r=2, tinit=6, tfinal=10, deltaT=delta_t, lora_alpha=16, orth_reg_weight=0.3
    )
    mine, his = adamw(ours), adamw(other)
    masked = set()
    for t in range(total):
        given = batch("llama", seed=t)
        with tunesmith.step(ours.train(), t, total):
            ours(**given).loss.backward()
            mine.step()
        mine.zero_grad()
        other.train()(**given).loss.backward()
        his.step()
        other.base_model.update_and_allocate(t)
        his.zero_grad()
        masked.add(live(ours))
        for made in layers(ours):
            held = other.base_model.model.get_submodule(made.layer.name)
            for name in "EAB":
                expected = getattr(held, f"lora_{name}")["default"]
                assert torch.allclose(getattr(made, name), expected, atol=2e-6), (t, made.layer.name, name)
            if t >= 30 or (t > 6 and t % delta_t == 0):
                assert torch.equal(made.E == 0, held.lora_E["default"] == 0)
    assert len(masked) > 4


# The budget ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["smoothed", "mean", "sensitivity", "magnitude"])
def test_the_budget_is_met_at_every_allocation_and_at_the_end(score: str) -> None:
    model = adapted(score=score)
    n = len(layers(model))
    counts: list[int] = []
    train(model, range(TOTAL), each=lambda t: counts.append(live(model)))
    by_hand = [int(2 * n * (1 - (t - 4) / 10) ** 3 + 2 * n) for t in range(TOTAL)]
    assert counts[:5] == [4 * n] * 5, "nothing is taken away before tinit"
    assert [counts[t] for t in (6, 8, 10, 12)] == [by_hand[t] for t in (6, 8, 10, 12)]
    assert counts[14:] == [2 * n] * 6
    assert counts[7] == counts[9] == 4 * n, "what was set to zero comes back between two allocations"
    assert sum(int(made.kept.sum()) for made in layers(model)) == 2 * n
    assert not any(made.training_state() for made in layers(model))


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("smoothed", [1.06, 2.21, 0.15]),
        ("mean", [5.5, 9.0, 1.5]),
        ("sensitivity", [10.0, 14.0, 3.0]),
        ("magnitude", [1.0, 2.0, 3.0]),
    ],
)
def test_scores_by_hand(score: str, expected: list[float]) -> None:
    """Two steps with beta1 = beta2 = 1/2; only lambda has gradients of a size that matters."""
    made = layers(adapted(init_rank=3, target_rank=1, score=score, beta1=0.5, beta2=0.5))[0]
    with torch.no_grad():
        made.E.copy_(torch.tensor([[1.0], [-2.0], [3.0]]))
    seen = []
    for gradient in ([2.0, 4.0, 0.0], [10.0, -7.0, 1.0]):
        made.E.grad = torch.tensor(gradient)[:, None]
        made.A.grad = made.B.grad = None
        seen.append((made.E.detach() * made.E.grad).abs().squeeze(1))
        made._observe()
    mean1, mean2 = seen[0] / 2, seen[0] / 4 + seen[1] / 2
    deviation = (seen[0] - mean1).abs() / 4 + (seen[1] - mean2).abs() / 2
    by_formula = {"smoothed": mean2 * deviation, "mean": mean2, "sensitivity": seen[1]}
    assert torch.allclose(made._scores(), by_formula.get(score, torch.tensor([1.0, 2.0, 3.0])))
    if score != "smoothed":
        assert made._scores().tolist() == pytest.approx(expected)


def test_the_score_takes_the_means_of_column_and_row() -> None:
    made = layers(adapted(init_rank=2, target_rank=1, score="sensitivity"))[0]
    for p in (made.E, made.A, made.B):
        p.grad = torch.rand(p.shape)
    made._observe()
    s = {n: (getattr(made, n) * getattr(made, n).grad).abs() for n in "EAB"}
    expected = [s["E"][i, 0] + s["A"][i].mean() + s["B"][:, i].mean() for i in range(2)]
    assert torch.allclose(made._scores(), torch.stack(expected))


@torch.no_grad()
def test_equal_scores_meet_the_budget_all_the_same() -> None:
    """peft takes away every triplet of the score at the border."""
    model = adapted(score="magnitude")
    for made in layers(model):
        made.E.fill_(1.0)
    AdaLoRA._allocate(layers(model), 13)
    assert [int((made.E != 0).sum()) for made in layers(model)][:5] == [4, 4, 4, 1, 0]


@pytest.mark.parametrize("total", [1, 2, 3, 5])
def test_short_runs_end_at_the_target(total: int) -> None:
    model = train(adapted(tinit=0.1, tfinal=0.5), range(total), total)
    assert live(model) == 2 * len(layers(model))


def test_without_final_steps_the_last_step_meets_the_target() -> None:
    model = train(adapted(tfinal=0), range(TOTAL))
    assert live(model) == 2 * len(layers(model))


def test_equal_ranks_take_nothing_away() -> None:
    model = train(adapted(target_rank=4), range(TOTAL))
    assert live(model) == 4 * len(layers(model))


def test_a_schedule_that_does_not_fit_is_a_clear_error() -> None:
    with pytest.raises(TunesmithError, match=r"tinit \(12\) and tfinal \(8\) leave none of the 20 steps"):
        train(adapted(tinit=12, tfinal=8), range(1))
    with pytest.raises(TunesmithError, match=r"adalora follows a schedule.*total=STEPS"), tunesmith.step(adapted(), 0):
        pass
    with pytest.raises(RecipeError, match=r"target_rank \(8\) can be at most init_rank \(4\)"):
        adapted(target_rank=8)


def test_no_gradients_at_all_is_a_clear_error() -> None:
    model = adapted()

    def run_with_zero_grad_inside() -> None:
        for t in range(TOTAL):
            with tunesmith.step(model.train(), t, TOTAL):
                model(**batch("llama")).loss.backward()
                model.zero_grad()

    with pytest.raises(TunesmithError, match=r"zero_grad\(\) after the block"):
        run_with_zero_grad_inside()


def test_a_layer_that_gets_no_gradient_is_taken_from_first() -> None:
    model = adapted()
    idle = layers(model)[3]
    for p in idle.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        idle.E.fill_(1e-3)
    train(model, range(TOTAL))
    assert not idle.kept.any()
    assert live(model) == 2 * len(layers(model))


# The orthogonality term ----------------------------------------------------------------------------------------------


def gradients(model: nn.Module, pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    with tunesmith.step(model.train(), 0, TOTAL):
        for piece in pieces:
            (model(**piece).loss / len(pieces)).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("penalty", ["squared", "norm"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_term_is_added_once_per_step(penalty: str, checkpointing: bool) -> None:
    """Whatever the micro-batches and recomputed blocks; against autograd on the formula."""
    whole = batch("llama", rows=4)
    halves = [{name: value[i : i + 2] for name, value in whole.items()} for i in (0, 2)]
    found = {}
    for gamma in (0.0, 0.7):
        model = adapted(orthogonality=gamma, penalty=penalty)
        with torch.no_grad():
            for made in layers(model):
                made.E.fill_(0.1)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        found[gamma] = [gradients(copy.deepcopy(model), pieces) for pieces in ([whole], halves)]
    terms = []
    for made in layers(model):
        eye = torch.eye(made.rank)
        terms += [torch.linalg.norm(m - eye) for m in (made.A @ made.A.T, made.B.T @ made.B)]
    loss = sum(t**2 for t in terms) if penalty == "squared" else sum(terms) / len(terms)
    (0.7 * loss).backward()
    for n, p in model.named_parameters():
        if p.requires_grad:
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            for plain, added in zip(found[0.0], found[0.7], strict=True):
                assert torch.allclose(added[n] - plain[n], expected, atol=2e-5), n


@pytest.mark.parametrize("again", [False, True])
def test_a_layer_that_runs_twice_gets_the_term_once(again: bool) -> None:
    """Also where each of its two runs is run again in the backward pass."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = checkpoint(self.layer, x, use_reentrant=False) if again else self.layer(x)
            return x.square().mean()

    grads = []
    for gamma in (0.0, 0.5):
        torch.manual_seed(0)
        config = tunesmith.adapter("adalora", target_modules=["layer"], **{**BRISK, "orthogonality": gamma})
        model = get_peft_model(Twice(), config)
        with tunesmith.step(model.train(), 0, TOTAL):
            model(torch.ones(2, 6, requires_grad=True)).backward()
            grads.append(layers(model)[0].A.grad)
    (made,) = layers(model)
    assert torch.allclose(grads[1] - grads[0], 0.5 * made.penalty.slope(made.A.detach()), atol=1e-6)


def test_orthonormal_factors_are_left_alone() -> None:
    factor = torch.linalg.qr(torch.randn(9, 4))[0].T
    for squared in (True, False):
        penalty = Penalty(squared)
        assert float(penalty.value(factor)) < 1e-5
        assert bool(penalty.slope(factor).isfinite().all())
    assert float(Penalty(True).slope(factor).abs().max()) < 1e-5


def test_outside_of_a_step_nothing_is_added() -> None:
    model = adapted()
    with tunesmith.step(model.train(), 0, TOTAL):
        pass  # nothing went backward: what was owed is owed no more
    model(**batch("llama")).loss.backward()
    assert not any(made.A.grad.any() for made in layers(model)), "lambda is zero, so that only the term has a slope"


def test_fp16_is_refused_with_a_reason() -> None:
    model = adapted()
    with (
        pytest.raises(ModelError, match=r"fp16.*orthogonality=0"),
        torch.autocast("cpu", dtype=torch.float16),
        tunesmith.step(model.train(), 0, TOTAL),
    ):
        model(**batch("llama"))


# What comes of it ----------------------------------------------------------------------------------------------------


def test_export_holds_the_live_triplets_alone(tmp_path: Path) -> None:
    model, given = train(adapted(score="magnitude"), range(TOTAL)), batch("llama")
    made = layers(model)[0]
    with torch.no_grad():
        made.E.zero_()  # a layer may end with no rank
    table = allocation(model)
    assert table[made.layer.name] == 0
    expected = logits(model, given)
    tunesmith.export_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny("llama", **WIDE), tmp_path / "lora")
    assert torch.allclose(logits(plain, given), expected, atol=1e-5)
    for name, rank in table.items():
        held = plain.base_model.model.get_submodule(name)
        assert held.lora_A["default"].weight.shape[0] == max(rank, 1)
    assert len(set(table.values())) > 1
    assert tunesmith.adapter("lora", ranks={n: r for n, r in table.items() if r}).r


def test_saved_and_loaded_it_goes_on_where_it_was(tmp_path: Path) -> None:
    """In the last phase the mask alone says what stays zero."""
    model = train(adapted(), range(16))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama", **WIDE), tmp_path, is_trainable=True)
    for one, other in zip(layers(model), layers(loaded), strict=True):
        assert torch.equal(one.kept, other.kept)
    assert live(train(loaded, range(16, TOTAL))) == 2 * len(layers(loaded))


def test_the_state_of_scores_is_what_a_resumed_run_needs() -> None:
    whole = train(adapted(), range(10))
    half = train(adapted(), range(10))
    resumed = copy.deepcopy(half)
    for old, new in zip(layers(half), layers(resumed), strict=True):
        new.smoothed.mean, new.smoothed.deviation = {}, {}
        new.load_training_state(old.training_state())
        assert bool(old._scores().any())
        assert torch.equal(old._scores(), new._scores())
    for model in (whole, resumed):
        train(model, range(10, TOTAL))
    assert all(torch.equal(a.E, b.E) for a, b in zip(layers(whole), layers(resumed), strict=True))


FIELDS: dict[str, Any] = {"adapters": [{"name": "adalora", **BRISK, "tinit": 1, "tfinal": 2}]}


@pytest.mark.parametrize("at", [2, 4, 7])
def test_stopped_and_resumed_is_bitwise_the_same(
    at: int,
    recipe: Callable[..., dict[str, Any]],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Before, between and after the allocations."""
    fields = recipe(**FIELDS, **{"train.save_every": 1})
    run(None, **fields)
    expected = weights(fields["output"])
    assert same(resumed(fields, tmp_path / "stopped", at), expected)
    kept = [value for name, value in expected.items() if name.endswith("kept")]
    assert sum(int(value.sum()) for value in kept) == 2 * len(kept)


def test_the_regulariser_beside_it_is_refused() -> None:
    both = {"adapters": ["adalora"], "regularisers": [{"name": "orthogonality", "weight": 0.1}]}
    with pytest.raises(RecipeError, match="adds that term itself"):
        load(both).check()
    load({**both, "adapters": [{"name": "adalora", "orthogonality": 0}]}).check()
