"""What is special to BA-LoRA's terms."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import tunesmith
from tests.train.conftest import rows as letters
from tests.train.conftest import write_rows
from tests.zoo import batch, logits, tiny
from tunesmith import catalog
from tunesmith.core.objective import ModelLoss
from tunesmith.core.reference import reference
from tunesmith.errors import DataError, ModelError, RecipeError
from tunesmith.objectives.ba_lora import FORMS, BALoRA
from tunesmith.objectives.density_finetuning import DensityFinetuning
from tunesmith.objectives.intuitive_finetuning import IntuitiveFineTuning
from tunesmith.objectives.sft import SFT
from tunesmith.train import run

WIDE = {"initializer_range": 0.3}
OFF = {"lambda1": 0.0, "lambda2": 0.0, "lambda3": 0.0}
TERMS = ("consistency", "diversity", "spectrum")
FORMS_AND_TASKS = pytest.mark.parametrize(("version", "kind"), FORMS)
Trainer = type("Trainer", (tunesmith.TrainerMixin, T.Trainer), {})


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Table(nn.Module):
    """A model whose logits are its only parameter."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.clone())

    def forward(self, **_: Any) -> Any:
        return SimpleNamespace(logits=self.table * 1)


def tuned(Z: Tensor, P: Tensor, given: dict[str, Tensor], term: BALoRA) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss, the figures and the slope at Z of a model that gave P at the first call."""
    model = Table(P)
    term(model, given)
    with torch.no_grad():
        model.table.copy_(Z)
    loss, figures = term(model, given)
    return loss, figures, torch.autograd.grad(loss, model.table)[0]


def pictures(rows: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.zeros(rows, 1), "labels": torch.arange(rows)}


def texts() -> dict[str, Tensor]:
    """Two rows of 12 and 5 tokens; the first 4 and 2 are a prompt."""
    ids = torch.randint(3, 30, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = labels[1, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


PREDICTING = ([(0, t) for t in range(3, 11)], [(1, t) for t in range(1, 4)])
"""(row, column) of the logits that predict a label of `texts`."""


def kl(Z: Tensor, P: Tensor, t: float) -> Tensor:
    p, q = (P / t).softmax(-1), (Z / t).softmax(-1)
    return t**2 * (p * (p.log() - q.log())).sum(-1)


def entropy(Z: Tensor) -> Tensor:
    p = Z.softmax(-1)
    return -(p * p.log()).sum(-1)


def covariance(Z: Tensor) -> Tensor:
    cov = torch.cov(Z.T)
    return sum(cov[i, j] ** 2 for i in range(len(cov)) for j in range(len(cov)) if i != j) / len(cov)


def classified(Z: Tensor, P: Tensor, version: str) -> list[Tensor]:
    s = torch.linalg.svdvals(Z)
    if version == "v1":
        distance = torch.stack([(z / z.norm() - p / p.norm()) ** 2 for z, p in zip(Z, P, strict=True)]).mean()
        return [distance, covariance(Z), -s[:3].sum() / s.sum()]
    return [kl(Z, P, 2.0).mean(), covariance(Z), -s[:5].sum() / s.sum()]


def generated(Z: Tensor, P: Tensor, version: str, pool: str = "row") -> list[Tensor]:
    groups = PREDICTING if pool == "row" else [PREDICTING[0] + PREDICTING[1]]
    z, p = ([torch.stack([x[at] for at in group]) for group in groups] for x in (Z, P))
    if version == "v1":
        wide = torch.zeros(2, 8, Z.shape[2], dtype=Z.dtype)
        for row, places in enumerate(PREDICTING):
            for i, at in enumerate(places):
                wide[row, i] = Z[at]
        s = torch.linalg.svdvals(wide.flatten(1))
        divergence = sum(kl(a, b, 1.0).sum() for a, b in zip(z, p, strict=True)) / 2
        return [divergence, -torch.stack([entropy(a).mean() for a in z]).mean(), -s[:3].sum() / s.sum()]
    top = [-entropy(a.topk(20).values).mean() for a in z]
    spectra = [-torch.linalg.svdvals(a)[:10].sum() / a.norm() for a in z]
    every = [torch.stack([kl(a, b, 2.0).mean() for a, b in zip(z, p, strict=True)]), *map(torch.stack, (top, spectra))]
    return [values.mean() for values in every]


def by_hand(Z: Tensor, P: Tensor, version: str, kind: str, pool: str = "row") -> list[Tensor]:
    return classified(Z, P, version) if kind == "classification" else generated(Z, P, version, pool)


def case(kind: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Z_F, Z_P and a batch."""
    shape = (9, 7) if kind == "classification" else (2, 12, 30)
    return random(*shape), random(*shape, seed=1), pictures(9) if kind == "classification" else texts()


@pytest.mark.parametrize("pool", ["row", "batch"])
@FORMS_AND_TASKS
def test_of_every_form_it_is_the_formula_and_its_slope(version: str, kind: str, pool: str) -> None:
    Z, P, given = case(kind)
    loss, figures, slope = tuned(Z, P, given, BALoRA(version=version, pool=pool))
    Z = Z.requires_grad_()
    terms = by_hand(Z, P, version, kind, pool)
    for name, expected in zip(TERMS, terms, strict=True):
        assert torch.allclose(figures[f"ba_{name}"], expected, rtol=1e-9), name
    weighted = sum(weight * value for weight, value in zip(FORMS[version, kind][:3], terms, strict=True))
    assert torch.allclose(loss, weighted, rtol=1e-9)
    assert torch.allclose(slope, torch.autograd.grad(weighted, Z)[0], rtol=1e-7, atol=1e-12)
    assert not any(value.requires_grad for value in figures.values())


@pytest.mark.parametrize("name", TERMS)
@FORMS_AND_TASKS
def test_slopes_are_finite_differences(version: str, kind: str, name: str) -> None:
    """Of each term alone, along random directions; of two rows, k = 2 would hold the whole spectrum."""
    Z, P, given = case(kind)
    term = BALoRA(version=version, **OFF | {f"lambda{TERMS.index(name) + 1}": 1.0}, k=1, iterations=0)
    _, _, slope = tuned(Z, P, given, term)
    for seed in range(3):
        step = 1e-6 * random(*Z.shape, seed=10 + seed)
        sides = [tuned(Z + sign * step, P, given, term)[0] for sign in (1, -1)]
        assert torch.allclose((slope * step).sum(), (sides[0] - sides[1]) / 2, rtol=1e-4, atol=1e-12)
    assert float(slope.abs().max()) > 1e-6


@pytest.mark.parametrize("name", TERMS)
def test_weights_turn_terms_off_and_on(name: str) -> None:
    Z, P, given = case("generation")
    loss, figures, _ = tuned(Z, P, given, BALoRA(**OFF | {f"lambda{TERMS.index(name) + 1}": 3.0}))
    assert list(figures) == [f"ba_{name}"]
    assert torch.allclose(loss, 3 * figures[f"ba_{name}"])
    nothing, figures, slope = tuned(Z, P, given, BALoRA(**OFF))
    assert (float(nothing.detach()), figures, bool(slope.any())) == (0, {}, False)


def test_a_covariance_by_hand() -> None:
    Z = torch.tensor([[1.0, 2.0], [3.0, 8.0], [5.0, 5.0]], dtype=torch.float64)
    # Centred: (-2, -3), (0, 3), (2, 0): the covariance of the columns is 6 / 2 = 3; 2 * 3^2 / 2 = 9.
    assert float(tuned(Z, Z, pictures(3), BALoRA())[1]["ba_diversity"]) == pytest.approx(9)


@pytest.mark.parametrize("version", ["iclr", "v1"])
def test_a_batch_of_one_row_has_no_covariance(version: str) -> None:
    Z = random(1, 4)
    loss, figures, slope = tuned(Z, Z, pictures(1), BALoRA(version=version))
    assert float(figures["ba_diversity"]) == 0
    assert float(figures["ba_spectrum"]) == pytest.approx(-1)
    assert bool(loss.isfinite())
    assert float(slope.abs().max()) < 1e-12


def test_the_spectrum_of_v1_is_that_of_whole_rows() -> None:
    """Two rows have two singular values: those of a Gram matrix of 2 x 2."""
    Z, P, given = case("generation")
    first, second = ([Z[at] for at in row] for row in PREDICTING)
    inner = sum((a * b).sum() for a, b in zip(first, second, strict=False))
    sizes = [sum((a * a).sum() for a in row) for row in (first, second)]
    s = torch.linalg.eigvalsh(torch.tensor([[sizes[0], inner], [inner, sizes[1]]])).sqrt()
    _, figures, _ = tuned(Z, P, given, BALoRA(version="v1", k=1))
    assert torch.allclose(figures["ba_spectrum"], -s[1] / s.sum(), rtol=1e-9)


def test_rank_that_is_not_there_has_no_slope() -> None:
    """Along directions of singular values that are 0 the sum of all has a kink."""
    Z = random(6, 1) @ random(1, 5, seed=1)
    _, figures, slope = tuned(Z, Z, pictures(6), BALoRA(**OFF | {"lambda3": 1.0}, k=2))
    assert float(figures["ba_spectrum"]) == pytest.approx(-1)
    assert float(slope.abs().max()) < 1e-9
    zero, _, slope = tuned(0 * Z, Z, pictures(6), BALoRA())
    assert bool(zero.isfinite())
    assert bool(slope.isfinite().all())


def long(tokens: int, rows: int = 1) -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (rows, tokens + 1), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def falling(tokens: int, width: int) -> Tensor:
    """Logits with singular values 0.8^i."""
    U, V = torch.linalg.qr(random(tokens, width))[0], torch.linalg.qr(random(width, width, seed=1))[0]
    return F.pad(U * 0.8 ** torch.arange(width) @ V.T, (0, 0, 0, 1))[None]


def test_randomised_svd_is_close_and_keyed() -> None:
    Z, given = falling(80, 60), long(80)
    state = torch.random.get_rng_state()
    exact, one, two, other = (
        tuned(Z, Z, given, BALoRA(**OFF | {"lambda3": 1.0}, **options))
        for options in ({"iterations": 0}, {}, {}, {"seed": 1})
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.allclose(one[0], exact[0], rtol=1e-4)
    assert float((one[2] - exact[2]).norm() / exact[2].norm()) < 1e-2
    assert torch.equal(one[2], two[2])
    assert not torch.equal(one[2], other[2])
    assert not torch.equal(one[0], exact[0])


@pytest.mark.parametrize("version", ["iclr", "v1"])
def test_long_rows_are_drawn_from_and_each_by_its_own_labels(version: str) -> None:
    term = BALoRA(version=version, **OFF | {"lambda3": 1.0}, k=1, svd_tokens=16)
    Z, given = random(2, 81, 8), long(80, rows=2)
    _, _, slope = tuned(Z, Z, given, term)
    seen = slope.abs().sum(-1) > 0
    assert seen.sum(1).tolist() == [16, 16]
    assert not torch.equal(seen[0], seen[1]) or version == "v1"
    if version == "iclr":
        _, _, alone = tuned(Z[:1], Z[:1], {name: value[:1] for name, value in given.items()}, term)
        assert torch.allclose(alone[0], 2 * slope[0])
    whole = tuned(Z, Z, given, BALoRA(version=version, **OFF | {"lambda3": 1.0}, k=1, svd_tokens=80))[2]
    assert int((whole.abs().sum(-1) > 0).sum()) == 160


ADAPTERS: dict[str, Any] = {
    "pissa": lambda: tunesmith.adapter("pissa", rank=4),
    "ssf": lambda: tunesmith.adapter("ssf"),
    "dylora": lambda: tunesmith.adapter("dylora", rank=4),
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear"),
}


def with_adapter(name: str, family: str = "llama") -> tuple[nn.Module, nn.Module]:
    """A base, and an adapter on a copy that has moved."""
    base = tiny(family, **WIDE)
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), ADAPTERS[name]())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    return base, model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert", "vit"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_reference_is_the_untouched_model(adapter: str, family: str) -> None:
    """The term of the tuned model equals that of its logits and the untouched model's, and gradients reach it."""
    base, model = with_adapter(adapter, family)
    given = batch(family, rows=3)
    moved = logits(model, given)
    assert not torch.allclose(moved, logits(base, given), atol=1e-2)
    with reference(model) as original:
        assert torch.allclose(original(**given).logits, logits(base, given), atol=1e-5)
    loss, figures = BALoRA()(model, given)
    last = -1 if family in ("llama", "gpt2") else None
    expected = kl(moved[:, :last], logits(base, given)[:, :last], 2.0).mean()
    assert float(expected) > 1e-3
    assert torch.allclose(figures["ba_consistency"], expected, rtol=1e-3)
    loss.backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)


def test_what_is_frozen_and_in_which_mode_it_was_stays() -> None:
    _, model = with_adapter("pissa")
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    trained[3].requires_grad_(False)
    before = [(p.requires_grad, id(p)) for p in model.parameters()]
    loss, _ = BALoRA()(model, batch("llama"))
    assert [(p.requires_grad, id(p)) for p in model.parameters()] == before
    assert all(module.training for module in model.modules())
    loss.backward()
    assert [p.grad is None for p in trained].count(True) == 1


def test_an_adapter_below_which_the_base_is_another_is_refused() -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(init_lora_weights="pissa", target_modules="all-linear"))
    with pytest.raises(ModelError, match=r"init_lora_weights='pissa'.*not the original"):
        BALoRA()(model, batch("llama"))
    assert bool(BALoRA(lambda1=0.0)(model, batch("llama"))[0].isfinite())


def test_consistency_is_zero_at_the_start_and_costs_no_pass_when_off() -> None:
    model = get_peft_model(tiny("llama", **WIDE), ADAPTERS["lora"]())
    given, count = batch("llama"), []
    model.register_forward_hook(lambda *_: count.append(1))
    loss, figures = BALoRA(lambda2=0.0, lambda3=0.0)(model, given)
    loss.backward()
    assert abs(float(figures["ba_consistency"])) < 1e-7
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-6
    assert len(count) == 2
    BALoRA(lambda1=0.0)(model, given)
    assert len(count) == 3


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("version", ["iclr", "v1"])
def test_padding_changes_no_term(version: str, family: str) -> None:
    _, model = with_adapter("pissa", family)
    given = batch(family, rows=3)
    expected = BALoRA(version=version)(model, given)
    empty = torch.zeros(3, 4, dtype=torch.long)
    wider = {name: torch.cat([given[name], empty], 1) for name in ("input_ids", "attention_mask")}
    wider["labels"] = given["labels"]
    if given["labels"].dim() == 2:
        wider["labels"] = torch.cat([given["labels"], empty - 100], 1)
    found = BALoRA(version=version)(model, wider)
    assert torch.allclose(found[0], expected[0], atol=1e-6)
    for name, value in expected[1].items():
        assert torch.allclose(found[1][name], value, rtol=1e-4, atol=1e-6), name
    assert int(BALoRA().count(wider)) == 3


def test_rows_without_labels_do_not_count() -> None:
    model, given = tiny("bert", **WIDE), batch("bert", rows=4)
    some = {**given, "labels": given["labels"].clone()}
    some["labels"][1] = -100
    fewer = {name: value[[0, 2, 3]] for name, value in given.items()}
    assert int(BALoRA().count(some)) == 3
    assert torch.allclose(BALoRA()(model, some)[0], BALoRA()(model, fewer)[0], atol=1e-6)
    some["labels"][:] = -100
    loss, figures = BALoRA()(model, some)
    assert (float(loss.detach()), figures, int(BALoRA().count(some))) == (0, {}, 0)
    loss.backward()


def test_labels_that_stand_where_they_are_predicted() -> None:
    """Token classification: nothing is shifted."""
    config = T.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_labels=6)
    torch.manual_seed(0)
    model = T.BertForTokenClassification(config).eval()
    given = {k: v for k, v in batch("bert", length=5).items() if k != "labels"}
    labels = torch.full((2, 5), -100)
    labels[0, 0], labels[1, 2] = 1, 2
    _, figures = BALoRA(lambda1=0.0)(model, {**given, "labels": labels})
    out = logits(model, given)
    expected = -torch.stack([entropy(out[0, 0]), entropy(out[1, 2])]).mean()
    assert torch.allclose(figures["ba_diversity"], expected, atol=1e-6)


def test_beside_an_objective_of_two_passes_the_last_is_compared() -> None:
    base, model = with_adapter("pissa")
    given, term, calls = texts(), BALoRA(), []

    def keep(_: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        calls.append((kwargs, out.logits.detach()))

    handle = model.register_forward_hook(keep, with_kwargs=True)
    with term.watching(model):
        IntuitiveFineTuning()(model, given)
    handle.remove()
    assert len(calls) == 2
    inputs, Z = calls[-1]
    with torch.no_grad():
        P = base(**inputs).logits
    columns = inputs["logits_to_keep"].tolist()
    rows = [[(row, columns.index(t)) for row, t in group] for group in PREDICTING]
    expected = sum(torch.stack([kl(Z[at], P[at], 2.0) for at in row]).mean() for row in rows) / 2
    assert torch.allclose(term(model, given)[1]["ba_consistency"], expected, rtol=1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_beside_another_watching_term(first: bool) -> None:
    """A model without adapters is copied without the hooks that other terms put on it for the pass."""
    model, given = tiny("llama", **WIDE), batch("llama")
    mine, other = BALoRA(), DensityFinetuning()
    alone = [BALoRA()(model, given)[0], DensityFinetuning()(model, given)[0]]
    for _ in range(2):
        terms = (mine, other) if first else (other, mine)
        with terms[0].watching(model), terms[1].watching(model):
            SFT()(model, given)
        assert torch.allclose(mine(model, given)[0], alone[0], atol=1e-6)
        assert torch.allclose(other(model, given)[0], alone[1], atol=1e-6)


def test_a_model_without_adapters_is_compared_with_its_first_state() -> None:
    model, given, term = tiny("llama", attention_dropout=0.5, **WIDE), batch("llama"), BALoRA()
    start = logits(model, given)
    term(model.train(), given)  # what is copied in training mode has no dropout either
    assert abs(float(term(model.eval(), given)[1]["ba_consistency"])) < 1e-7
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    expected = kl(logits(model, given)[:, :-1], start[:, :-1], 2.0).mean()
    assert torch.allclose(term(model, given)[1]["ba_consistency"], expected, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_in_half_precision_the_terms_are_taken_in_float32(family: str) -> None:
    base, given = tiny(family, **WIDE), batch(family, rows=4)
    expected, _ = BALoRA()(base, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = BALoRA()(base, given)
    half, _ = BALoRA()(copy.deepcopy(base).to(torch.bfloat16), given)
    assert cast.dtype == half.dtype == torch.float32
    assert torch.allclose(cast, expected, rtol=0.05)
    assert torch.allclose(half, expected, rtol=0.05)
    Z = random(9, 30).float()
    term = BALoRA(lambda1=0.0)
    plain, _, _ = tuned(Z, Z, pictures(9), term)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tuned(Z, Z, pictures(9), term)[0], plain)


def test_a_run_that_diverged_gives_no_number() -> None:
    """So that the trainer, which looks at the loss, says what to do."""
    Z = random(9, 7)
    Z[0, 0] = float("nan")
    assert not bool(tuned(Z, random(9, 7), pictures(9), BALoRA())[0].isfinite())


@pytest.mark.parametrize(
    ("given", "shape", "error", "message"),
    [
        ({"labels": torch.rand(3)}, (3, 4), DataError, "found torch.float32 of shape \\(3,\\)"),
        ({"labels": torch.rand(3, 4)}, (3, 4), DataError, "regression and multi-label"),
        ({}, (3, 4), DataError, "found none"),
        (pictures(3), (3, 1), ModelError, r"\(3, 1\) do not belong to labels of shape \(3,\)"),
        (pictures(3), (2, 4), ModelError, r"\(2, 4\) do not belong to labels of shape \(3,\)"),
        (texts(), (2, 6, 30), ModelError, r"\(2, 6, 30\) do not belong to labels of shape \(2, 12\)"),
    ],
)
def test_what_has_no_distribution_is_refused(given: Any, shape: tuple, error: type, message: str) -> None:
    model, term = Table(random(*shape)), BALoRA()
    with term.watching(model):
        model(**given)
    with pytest.raises(error, match=message):
        term(model, {"input_ids": torch.zeros(3, 2), **given})


def test_a_model_without_logits_is_refused_and_nothing_is_left() -> None:
    class Odd(nn.Module):
        def forward(self, **_: Any) -> Any:
            return (torch.ones(1),)

    model, term = Odd(), BALoRA()
    with pytest.raises(ModelError, match="Odd gives tuple, which has no `logits`"):
        term(model, pictures(3))
    assert term._seen is None
    assert not model._forward_hooks


@pytest.mark.parametrize("adapter", ["pissa", "ssf", "lora"])
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_in_a_trainer(family: str, adapter: str, tmp_path: Path) -> None:
    """A step of SGD with micro-batches is that of the sum, in generation whatever their size."""
    given, objective = batch(family, rows=4), SFT() if family == "llama" else ModelLoss()
    data = [{name: value[i] for name, value in given.items()} for i in range(4)]
    _, wanted = with_adapter(adapter, family)
    trained = [p for p in wanted.parameters() if p.requires_grad]
    term = BALoRA(lambda1=0.5, lambda2=0.1, lambda3=0.1)
    slopes = torch.autograd.grad(objective(wanted, given)[0] + 2 * term(wanted, given)[0], trained)
    named = {"output_dir": str(tmp_path), "max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
    named |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    for size in (4, 2) if family == "llama" else (4,):
        _, model = with_adapter(adapter, family)
        rows = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        args = T.TrainingArguments(**named, **rows, lr_scheduler_type="constant", remove_unused_columns=False)
        made = Trainer(model=model, args=args, train_dataset=data, objective=objective, regularisers=[(term, 2.0)])
        made.train()
        assert {f"ba_{name}" for name in TERMS} <= made.state.log_history[0].keys()
        after = [p.detach() for p in model.parameters() if p.requires_grad]
        for new, old, slope in zip(after, trained, slopes, strict=True):
            assert torch.allclose(new, old - 0.1 * slope, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"adapters": ["pissa"]},
        {"adapters": ["lora"], "train.gradient_checkpointing": True},
        {"adapters": ["ssf"], "optimizer": "mezo"},
        {"adapters": [], "prompts": ["dept"]},
        {"adapters": ["pissa"], "schedule": "lisa"},
    ],
)
def test_in_a_recipe(changes: dict[str, Any], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", letters(24))
    fields: dict[str, Any] = {"model": "tiny-lm-s", "data.train": str(data), "output": str(tmp_path / "run")}
    fields |= {"regularisers": [{"name": "ba-lora", "weight": 1.0}], "report.generate_rows": 0}
    fields |= {"train.steps": 4, "train.batch_size": 4, "train.max_grad_norm": 0.0}
    run(None, **fields, **changes)
    history = json.loads((tmp_path / "run" / "report.json").read_text())["details"]["history"]
    logged = [entry for entry in history if "ba_consistency" in entry]
    assert logged
    assert all(entry["ba_consistency"] >= -1e-6 and entry["ba_spectrum"] < 0 for entry in logged)


@pytest.mark.parametrize("option", [{"version": "v2"}, {"lambda1": -1.0}, {"k": 0}, {"temperature": 0.0}])
def test_options_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(option))):
        catalog.get("ba-lora").validate(option)
