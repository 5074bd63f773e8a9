"""The objective contract, for every part of the room: against a float64 reference of its own, padded and flattened."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers as T
from torch import Tensor, nn

from tests.zoo import DECODERS, VOCABULARY, checkpoint, tiny
from tunesmith import catalog
from tunesmith.core.objective import Objective
from tunesmith.core.packing import Flatten, enable
from tunesmith.core.part import Part
from tunesmith.core.trainer import TrainerMixin
from tunesmith.objectives.sft import SFT

# Regularisers, which add to an objective, have a contract of their own: test_regularisers.py.
MAIN = [p for p in catalog.in_room("objectives") if "regulariser" not in p.tags]
OBJECTIVES = pytest.mark.parametrize("part", MAIN, ids=lambda p: p.slug)
LAYOUTS = pytest.mark.parametrize("layout", ["right", "left", "flat"])
WIDE = {"initializer_range": 0.3}
Row = dict[str, list[int]]


class Trainer(TrainerMixin, T.Trainer):
    pass


def rows() -> list[Row]:
    """Prompts and answers of different lengths: two turns, an answer of one token, a whole row, none at all."""
    g = torch.Generator().manual_seed(3)
    shape = [(3, 5), (6, 1), (0, 7), (4, 0), (2, 3)]
    made = []
    for prompt, answer in shape:
        ids = torch.randint(3, VOCABULARY, (prompt + answer,), generator=g).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    made[0]["labels"][5] = -100  # a question between two answers
    return made


def padded(some: list[Row], side: str) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in some) + 2
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in some:
        n = len(row["input_ids"])
        filled = {**row, "attention_mask": [1] * n}
        for name, empty in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            rest = [empty] * (width - n)
            batch[name].append(rest + filled[name] if side == "left" else filled[name] + rest)
    return {name: torch.tensor(values) for name, values in batch.items()}


def laid_out(some: list[Row], layout: str) -> dict[str, Any]:
    return Flatten()(some) if layout == "flat" else padded(some, layout)


def exact(family: str = "opt") -> nn.Module:
    """A model in float64 that takes flattened batches; OPT rounds nothing to less and takes positions from the mask."""
    model = tiny(family, **WIDE)
    enable(model)
    return model.double()


def made(part: Part, **options: Any) -> Objective:
    return part.target(**part.validate(options))


# References: the loss of whole rows, one at a time, by loops; `(model, rows, objective) -> (sum, count)` --------------


def logits_of(model: nn.Module, ids: list[int], guessed: list[int] | None = None, lam: float = 0.0) -> Tensor:
    embed = model.get_input_embeddings()
    e = embed(torch.tensor([ids]))
    if guessed is not None:
        e = (1 - lam) * e + lam * embed(torch.tensor([guessed]))
    return model(inputs_embeds=e).logits[0].log_softmax(-1)


def answers(row: Row) -> list[int]:
    return [t for t, label in enumerate(row["labels"]) if label != -100 and t > 0]


def sft(model: nn.Module, some: list[Row], objective: Any) -> tuple[Tensor, int]:
    terms = [-logits_of(model, row["input_ids"])[t - 1, row["labels"][t]] for row in some for t in answers(row)]
    return torch.stack(terms).sum(), len(terms)


def intuitive(model: nn.Module, some: list[Row], objective: Any) -> tuple[Tensor, int]:
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in some:
        at, ids = answers(row), row["input_ids"]
        if not at:
            continue
        first = logits_of(model, ids)
        guessed = [int(first[t - 1].argmax()) if t in at else ids[t] for t in range(len(ids))]
        second = logits_of(model, ids, guessed, objective.lam)
        loss = {t: -second[t - 1, ids[t]] for t in at}
        u = {t: sum(objective.gamma ** (k - t) * loss[k] / len(at) for k in at if k >= t) for t in at}
        total = total + sum(u[t] / sum(u.values()) * loss[t] for t in at)
        count += 1
    return total, count


REFERENCES: Mapping[str, Callable[..., tuple[Tensor, int]]] = {
    "sft": sft,
    "segmented-sft": sft,
    "intuitive-finetuning": intuitive,
    "gradient-dropout": sft,  # of a model without masks; tests/objectives has the rest
}


# Tests -------------------------------------------------------------------------------------------------------------


@LAYOUTS
@OBJECTIVES
def test_equals_its_reference(part: Part, layout: str) -> None:
    assert part.slug in REFERENCES, "write the paper's formula, row by row, into REFERENCES"
    model, objective = exact(), made(part)
    total, count = REFERENCES[part.slug](model, rows(), objective)
    batch = laid_out(rows(), layout)
    loss, scalars = objective(model, batch)
    assert int(objective.count(batch)) == count
    assert torch.allclose(loss, total / count, rtol=1e-9)
    assert torch.allclose(objective(model, batch, torch.tensor(2 * count))[0], total / (2 * count), rtol=1e-9)
    assert loss.shape == ()
    assert all(value.shape == () and not value.requires_grad for value in scalars.values())


@OBJECTIVES
def test_equals_its_reference_on_random_logits(part: Part) -> None:
    """A model whose logits have nothing to do with its input."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 2, dtype=torch.float64)
            g = torch.Generator().manual_seed(6)
            self.table = nn.Parameter(3 * torch.randn(12, VOCABULARY, generator=g, dtype=torch.float64))

        def get_input_embeddings(self) -> nn.Module:
            return self.embed

        def forward(
            self, input_ids: Any = None, inputs_embeds: Any = None, logits_to_keep: Any = None, **_: Any
        ) -> Any:
            e = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
            logits = self.table[: e.shape[1]].expand(e.shape[0], -1, -1)
            return SimpleNamespace(logits=logits if logits_to_keep is None else logits[:, logits_to_keep])

    model, objective = Table(), made(part)
    total, count = REFERENCES[part.slug](model, rows(), objective)
    assert torch.allclose(objective(model, padded(rows(), "right"))[0], total / count, rtol=1e-12)


@OBJECTIVES
def test_gradient_is_the_slope(part: Part) -> None:
    model, objective = exact(), made(part)
    batch = padded(rows(), "right")
    objective(model, batch)[0].backward()
    g = torch.Generator().manual_seed(8)
    eps = 1e-6
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, generator=g, dtype=p.dtype)
        if "embed_tokens" in name:
            direction[0] = 0  # an embedding gives its padding row no gradient
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(sign * eps * direction)
                sides.append(objective(model, batch)[0])
                p.sub_(sign * eps * direction)
        slope = (sides[0] - sides[1]) / (2 * eps)
        assert torch.allclose((p.grad * direction).sum(), slope, rtol=1e-4, atol=1e-7), name


def gradients(part: Part, batches: list[dict[str, Any]], model: nn.Module) -> dict[str, Tensor]:
    """As accumulated over micro-batches that share one total."""
    objective = made(part)
    total = torch.stack([objective.count(batch) for batch in batches]).sum()
    model.zero_grad()
    for batch in batches:
        objective(model, batch, total)[0].backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@LAYOUTS
@OBJECTIVES
def test_micro_batches_add_up_to_one_large_batch(part: Part, layout: str) -> None:
    model = exact()
    whole = gradients(part, [laid_out(rows(), layout)], model)
    split = gradients(part, [laid_out(rows()[:3], layout), laid_out(rows()[3:], layout)], model)
    assert all(torch.allclose(whole[n], split[n], atol=1e-9) for n in whole)
    assert any(bool(g.any()) for g in whole.values())


@pytest.mark.parametrize("family", DECODERS)
@OBJECTIVES
def test_padding_and_laying_end_to_end_are_the_same(part: Part, family: str) -> None:
    model = exact(family)
    right, flat = (gradients(part, [laid_out(rows(), layout)], model) for layout in ("right", "flat"))
    assert all(torch.allclose(right[n], flat[n], atol=1e-9) for n in right)


@pytest.mark.parametrize("family", DECODERS)
def test_sft_is_the_loss_of_transformers(family: str) -> None:
    model, batch = tiny(family, **WIDE), padded(rows(), "right")
    ours = SFT()(model, batch)[0]
    theirs = model(**batch).loss
    assert torch.allclose(ours, theirs, atol=1e-6)
    mine, other = (torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in (ours, theirs))
    for a, b in zip(mine, other, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-6)


@OBJECTIVES
def test_in_a_trainer_accumulation_is_one_large_batch(part: Part, tmp_path: Path) -> None:
    results = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        model = tiny("llama", **WIDE)
        args = T.TrainingArguments(
            output_dir=str(tmp_path / str(size)),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.1,
            max_grad_norm=0.0,
            optim="sgd",
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            remove_unused_columns=False,
        )
        data = [{k: v[i] for k, v in padded(rows(), "right").items()} for i in (0, 1, 2, 4)]
        Trainer(model=model, args=args, train_dataset=data, objective=made(part)).train()
        results.append(checkpoint(model))
    start = checkpoint(tiny("llama", **WIDE))
    for other in results[1:]:
        assert all(torch.allclose(results[0][n], other[n], atol=1e-6) for n in start)
    assert any(not torch.equal(results[0][n], start[n]) for n in start)


@OBJECTIVES
def test_adapters_and_wrappers(part: Part) -> None:
    base, batch = tiny("llama", **WIDE), padded(rows(), "right")
    expected = made(part)(base, batch)[0]
    wrapped = SimpleWrapper(base)
    assert torch.allclose(made(part)(wrapped, batch)[0], expected, atol=1e-6)
    tuned = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2))
    loss, _ = made(part)(tuned, batch)
    assert torch.allclose(loss, expected, atol=1e-6)
    loss.backward()
    assert {n for n, p in tuned.named_parameters() if p.grad is not None} == {
        n for n, p in tuned.named_parameters() if p.requires_grad
    }


class SimpleWrapper(nn.parallel.DataParallel):
    """What a data-parallel wrapper is to an objective: the model is under `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.device_ids = []


@OBJECTIVES
def test_without_gradients_and_in_evaluation(part: Part) -> None:
    model, batch = tiny("llama", **WIDE), padded(rows(), "left")
    expected = made(part)(model, batch)[0].detach()
    with torch.no_grad():
        loss = made(part)(model.eval(), batch)[0]
    assert not loss.requires_grad
    assert torch.equal(loss, expected)


@LAYOUTS
@OBJECTIVES
def test_rows_without_labels_cost_nothing(part: Part, layout: str) -> None:
    model, objective = exact(), made(part)
    batch = laid_out([rows()[3]], layout)
    assert int(objective.count(batch)) == 0
    loss, scalars = objective(model, batch)
    assert float(loss.detach()) == 0
    loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    assert all(bool(value.isfinite()) for value in scalars.values())


@OBJECTIVES
def test_autocast_and_checkpointing(part: Part) -> None:
    batch = padded(rows(), "right")
    results = []
    for checkpointing in (False, True):
        model = tiny("llama", **WIDE).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        made(part)(model, batch)[0].backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.allclose(results[0][n], results[1][n], atol=1e-6) for n in results[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = made(part)(tiny("llama", **WIDE), batch)
    assert loss.dtype == torch.float32
    assert bool(loss.isfinite())
