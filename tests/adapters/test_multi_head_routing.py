"""What is special to MHR."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PolyConfig, get_peft_model
from torch import Tensor, nn
from torch.distributions.relaxed_bernoulli import RelaxedBernoulli
from transformers import Trainer, TrainingArguments

import tunesmith
from tests.zoo import FAMILIES, batch, logits, tiny
from tunesmith import world
from tunesmith.adapters.multi_head_routing import MultiHeadRouting, add_task, average, choose, gradient_alignment
from tunesmith.core.adapter import stacked
from tunesmith.core.layer import describe
from tunesmith.core.optimizer import set_lr_ratios
from tunesmith.core.side import Context
from tunesmith.core.stats import model_loss
from tunesmith.errors import DataError, ModelError, RecipeError, TunesmithError
from tunesmith.train import run

TASKS = ["one", "two", "three"]
SMALL: dict[str, Any] = {"rank": 2, "skills": 3, "splits": 4, "alpha": 3.0, "groups": TASKS}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers(model: nn.Module) -> list[MultiHeadRouting]:
    return [m for m in model.modules() if isinstance(m, MultiHeadRouting)]


def moved(model: nn.Module) -> nn.Module:
    """Off its start, the routing of the tasks far apart."""
    with torch.no_grad():
        for i, made in enumerate(layers(model)):
            made.A.copy_(0.3 * random(*made.A.shape, seed=3 * i))
            made.B.copy_(0.3 * random(*made.B.shape, seed=3 * i + 1))
            made.Z.copy_(3 * random(*made.Z.shape, seed=3 * i + 2))
    return model.eval()


def adapted(family: str = "llama", **options: Any) -> nn.Module:
    return moved(get_peft_model(tiny(family), tunesmith.adapter("multi-head-routing", **{**SMALL, **options})))


def single(module: nn.Module, **options: Any) -> MultiHeadRouting:
    made = MultiHeadRouting(describe(module, "layer"), **{**SMALL, **options})
    made.side_context = Context()
    moved(made)
    return made


def by_hand(made: MultiHeadRouting, Z: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) of one task entry by entry, from its Z of (splits, skills): (r, in) and (r, out)."""
    gates = 1 / (1 + torch.exp(-Z))
    w = gates / gates.sum(1, keepdim=True)
    found = []
    for inventory in (made.A.detach(), made.B.detach()):
        total = torch.zeros(inventory.shape[1:])
        size = -(-inventory.shape[2] // made.splits)
        for i in range(inventory.shape[2]):
            for s in range(made.skills):
                total[:, i] += w[i // size, s] * inventory[s, :, i]
        found.append(total)
    return found[0], found[1]


# The mixture -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@torch.no_grad()
def test_each_row_is_mixed_for_its_own_task(splits: int, kind: str) -> None:
    """Also where the number of blocks does not divide the sizes, and for rows of no known task."""
    module: nn.Module = nn.Linear(12, 7) if kind == "linear" else nn.Conv2d(4, 7, 3, stride=2, padding=1)
    made = single(module, splits=splits)
    x = random(5, 3, 12) if kind == "linear" else random(5, 4, 6, 6)
    made.side_context.values = {"group": torch.tensor([2, 0, -1, 2, 1])}
    base = stacked(module, made.layer, [])
    out = made(x, base)
    factors = [by_hand(made, Z) for Z in made.Z]
    factors.append(tuple(torch.stack(f).mean(0) for f in zip(*factors, strict=True)))  # type: ignore[arg-type]
    for row, task in enumerate([2, 0, 3, 2, 1]):
        A, B = factors[task]
        W = base.weight + (3.0 / 2 * B.T @ A).view(base.weight.shape)
        assert torch.allclose(out[row : row + 1], base.apply(x[row : row + 1], W, module.bias), atol=1e-5), row  # type: ignore[arg-type]


@pytest.mark.parametrize("splits", [1, 2, 8])
def test_is_peft_poly_where_that_is_defined(splits: int) -> None:
    """Eval outputs of a batch of several tasks; peft has the factor 1 / r."""
    names = ["q_proj", "down_proj"]
    model = adapted(splits=splits, alpha=1.0, target_modules=names)
    config = PolyConfig(r=2, n_tasks=3, n_skills=3, n_splits=splits, target_modules=names, task_type="CAUSAL_LM")
    theirs = get_peft_model(tiny("llama"), config).eval()
    for made in layers(model):
        poly: Any = theirs.get_submodule(f"base_model.model.{made.layer.name}")
        with torch.no_grad():
            blocks = [t.unflatten(2, (splits, -1)) for t in (made.A, made.B)]  # (skills, r, splits, size)
            poly.poly_lora_A["default"].copy_(blocks[0].permute(2, 0, 3, 1))
            poly.poly_lora_B["default"].copy_(blocks[1].permute(2, 0, 1, 3))
            poly.poly_router["default"].module_logits.copy_(made.Z.flatten(1))
    given, ids = batch("llama", rows=4), torch.tensor([1, 0, 2, 1])
    ours = logits(model, {**given, "group": ids})
    assert torch.allclose(ours, logits(theirs, {**given, "task_ids": ids}), atol=1e-6)
    assert not torch.allclose(ours, logits(theirs, {**given, "task_ids": ids.flip(0)}), atol=1e-2)


TOLD = {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}
"""PEFT calls the model in another way once it is told the task."""


@pytest.mark.parametrize(("family", "task_type"), [*((f, None) for f in FAMILIES), *TOLD.items()])
def test_a_batch_of_several_tasks_is_each_task_alone(family: str, task_type: str | None) -> None:
    """Encoder and decoder of T5, OPT with its flattened rows, and pictures included."""
    model, given = adapted(family, task_type=task_type), batch(family, rows=5)
    ids = [1, 0, 2, -1, 1]
    together = logits(model, {**given, "group": torch.tensor(ids)})
    results = []
    for task in (*TASKS, None):
        choose(model, task)
        results.append(logits(model, given))
    for row, task_id in enumerate(ids):
        assert torch.allclose(together[row], results[task_id][row], atol=1e-5 * float(together.abs().max())), row
    assert min(float((a - b).abs().max()) for i, a in enumerate(results) for b in results[:i]) > 1e-4


@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_generation_with_beams_is_that_of_each_task(family: str) -> None:
    model, given = adapted(family), batch(family, rows=3)
    asked = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    how = {"max_new_tokens": 5, "num_beams": 2, "num_return_sequences": 2, "do_sample": False}
    ids = [2, -1, 0]
    with tunesmith.side(model, group=torch.tensor(ids)):
        together = model.generate(**asked, **how)
    alone = []
    for row, task_id in enumerate(ids):
        choose(model, None if task_id < 0 else TASKS[task_id])
        alone.append(model.generate(**{k: v[row : row + 1] for k, v in asked.items()}, **how))
    assert torch.equal(together, torch.cat(alone))


def test_merged_and_exported_for_a_task(tmp_path: Path) -> None:
    for task in (*TASKS, None):
        model, given = adapted(), batch("llama")
        ids = torch.full((2,), -1 if task is None else TASKS.index(task))
        expected = logits(model, {**given, "group": ids})
        assert choose(model, task) == len(layers(model))
        tunesmith.export_lora(model, tmp_path / "lora")
        exported = PeftModel.from_pretrained(tiny("llama"), tmp_path / "lora")
        assert exported.peft_config["default"].r == 2
        assert torch.allclose(logits(exported, given), expected, atol=1e-5)
        assert torch.allclose(logits(model.merge_and_unload(), given), expected, atol=1e-5)


def test_routing_stays_a_mixture_where_sigmoids_underflow() -> None:
    made = single(nn.Linear(8, 8))
    with torch.no_grad():
        made.Z.fill_(-200.0)
        made.Z[0, 0, 0] = 200.0
    w = made.weights()
    assert torch.allclose(w.sum(-1), torch.ones(4, 4))
    assert torch.allclose(w[0, 0], torch.tensor([1.0, 0, 0]))
    assert torch.allclose(w[1], torch.full((4, 3), 1 / 3))


def test_start() -> None:
    """A skill starts as a LoRA does, whatever the number of blocks; the routing is all but uniform."""
    made = MultiHeadRouting(describe(nn.Linear(400, 40), "layer"), rank=4, splits=8)
    assert float(made.A.detach().abs().max()) == pytest.approx(400**-0.5, rel=0.01)
    assert not bool(made.B.any())
    assert 0.9e-3 < float(made.Z.detach().abs().max()) <= 1e-3


# Draws -------------------------------------------------------------------------------------------------------------


def test_draws_are_relaxed_bernoulli() -> None:
    made = single(nn.Linear(8, 8), splits=1, skills=2, groups=["one"])
    made.train()
    Z, gates = torch.tensor([1.0, -2.0]), []
    for step in range(4000):
        made.begin_step(step)
        assert made.drawn is not None
        gates.append(torch.sigmoid(Z + made.drawn[0, 0]))
    torch.manual_seed(0)
    theirs = RelaxedBernoulli(torch.tensor(1.0), logits=Z).sample(torch.Size([4000]))
    at = torch.linspace(0.05, 0.95, 10)
    assert torch.allclose(torch.stack(gates).quantile(at, 0), theirs.quantile(at, 0), atol=0.03)
    with torch.no_grad():
        made.Z.copy_(Z.view(1, 1, 2))
    assert torch.allclose(made.weights()[0, 0], gates[-1] / gates[-1].sum(), atol=1e-6)


def test_draws_depend_on_seed_step_layer_and_task() -> None:
    def drawn(step: int, **options: Any) -> list[Tensor]:
        model = adapted(**options)
        with tunesmith.step(model.train(), step):
            model(**batch("llama"))  # what happens in between has no part in it
            return [made.drawn.clone() for made in layers(model) if made.drawn is not None]

    first = drawn(7)
    assert len(first) == 14
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(7), strict=True))
    for others in (drawn(8), drawn(7, seed=1), first[1:]):
        assert not any(torch.equal(a, b) for a, b in zip(first, others, strict=False))
    assert not torch.equal(first[0][0], first[0][1])


def test_only_training_within_a_step_is_random() -> None:
    model, given = adapted(), {**batch("llama"), "group": torch.tensor([0, 1])}
    expected = logits(model, given)
    model.train()
    with tunesmith.step(model, 0):
        assert not torch.allclose(model(**given).logits, expected, atol=1e-2)
        assert torch.equal(logits(model, given), expected)
    assert torch.equal(model(**given).logits, expected), "outside of steps, such as for merging, nothing is random"
    fixed = adapted(routing="sigmoid").train()
    assert torch.equal(fixed(**given).logits, expected)
    assert tunesmith.callbacks(adapted(routing="sigmoid", router_lr=1.0)) == []


def test_micro_batches_of_a_step_share_the_draws() -> None:
    model, given = adapted(), {**batch("llama", rows=4), "group": torch.tensor([0, 1, 2, 0])}
    halves = [{name: tensor[i : i + 2] for name, tensor in given.items()} for i in (0, 2)]
    grads = []
    for parts in ([given], halves):
        with tunesmith.step(model.train(), 5):
            for part in parts:
                (model(**part).loss / len(parts)).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert len(grads[0]) == 3 * len(layers(model))
    for whole, summed in zip(*grads, strict=True):
        assert torch.allclose(whole, summed, atol=1e-6)


def test_a_task_learns_its_own_routing_alone() -> None:
    model = adapted().train()
    with tunesmith.step(model, 0):
        model(**batch("llama"), group=torch.tensor([2, 2])).loss.backward()
    for made in layers(model):
        assert made.Z.grad is not None
        assert [bool(row.any()) for row in made.Z.grad] == [False, False, True]


# New tasks ---------------------------------------------------------------------------------------------------------


def saved_and_loaded(model: nn.Module, folder: Path) -> nn.Module:
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(tiny("llama"), folder, is_trainable=True)


def trained(model: nn.Module, task: int, steps: int = 3) -> nn.Module:
    """Momentum and weight decay would move what only has no gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for step in range(steps):
        with tunesmith.step(model.train(), step):
            model(**batch("llama"), group=torch.full((2,), task)).loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_z_moves_the_new_row_alone(tmp_path: Path) -> None:
    model, given = adapted(), batch("llama")
    old = {**given, "group": torch.tensor([0, 2])}
    before = logits(model, old)
    assert add_task(model, "four", "z") == len(layers(model))
    assert model.get_nb_trainable_parameters()[0] == 4 * 3 * len(layers(model))
    assert torch.equal(logits(model, old), before)
    model = saved_and_loaded(model, tmp_path)
    held = [(made.A.clone(), made.B.clone(), made.logits().clone()) for made in layers(model)]
    trained(model, 3)
    for made, (A, B, Z) in zip(layers(model), held, strict=True):
        assert torch.equal(made.A, A)
        assert torch.equal(made.B, B)
        assert torch.equal(made.logits()[:3], Z[:3])
        assert float(Z[3].abs().max()) <= 1e-3
        assert bool((made.logits()[3] != Z[3]).all())
    assert torch.equal(logits(model, old), before)
    expected = logits(model, {**given, "group": torch.tensor([3, 1])})
    add_task(model, "five", "mhr")
    assert all(made.Z.shape[0] == 5 and made.Z_kept is None for made in layers(model))
    assert len([p for p in model.parameters() if p.requires_grad]) == 3 * len(layers(model))
    loaded = saved_and_loaded(model, tmp_path).eval()
    assert torch.equal(logits(loaded, {**given, "group": torch.tensor([3, 1])}), expected)
    assert layers(loaded)[0].groups == [*TASKS, "four", "five"]


def test_z_without_an_inventory_is_a_clear_error() -> None:
    for routing in ("bernoulli", "sigmoid"):
        config = tunesmith.adapter("multi-head-routing", **{**SMALL, "variant": "z", "routing": routing})
        model = get_peft_model(tiny("llama"), config)
        with pytest.raises(ModelError, match="B is zero everywhere; train with `mhr`"), tunesmith.step(model, 0):
            pass
        with pytest.raises(ModelError, match=r"tunesmith\.callbacks"):
            model.train()(**batch("llama"))


def test_average_is_uniform_routing_and_a_lora_of_its_own(tmp_path: Path) -> None:
    model, given = adapted(), batch("llama")
    choose(model, "two")
    with torch.no_grad():
        for made in layers(model):
            made.Z.zero_()
    expected = logits(model, {**given, "group": torch.tensor([0, 2])})
    products = [torch.einsum("sro,sri->oi", made.B, made.A) / 3 * 1.5 for made in layers(model)]
    assert average(model) == len(layers(model))
    assert torch.allclose(logits(model, {**given, "group": torch.tensor([0, 2])}), expected, atol=1e-6)
    assert torch.allclose(logits(model, given), expected, atol=1e-6)
    for made, product in zip(layers(model), products, strict=True):
        assert not torch.allclose(made.delta(), product, atol=0.1), "the mean of products is another matrix"
    lora = sum(2 * sum(made.layer.shape) for made in layers(model))
    assert model.get_nb_trainable_parameters()[0] == sum(made.trainable_count() for made in layers(model)) == lora
    assert tunesmith.callbacks(model) == []
    loaded = saved_and_loaded(model, tmp_path)
    assert torch.equal(logits(loaded, given), logits(model, given))
    loaded.train()(**given).loss.backward()
    add_task(loaded, "four")
    assert layers(loaded)[0].groups[-1] == "four"
    with pytest.raises(TunesmithError, match="cannot add the task 'five' as 'z': one skill"):
        add_task(loaded, "five", "z")


def test_only_the_adapter_in_force_is_changed() -> None:
    model = adapted()
    model.add_adapter("second", tunesmith.adapter("multi-head-routing", **SMALL))
    model.set_adapter("second")
    average(model)
    assert {made.skills for made in layers(model) if made.group == "second"} == {1}
    assert {made.skills for made in layers(model) if made.group == "default"} == {3}
    options = {name: config.parts[0]["options"]["skills"] for name, config in model.peft_config.items()}
    assert options == {"default": 3, "second": 1}


# Training ----------------------------------------------------------------------------------------------------------


def test_the_router_has_its_own_rate(tmp_path: Path) -> None:
    model = adapted(router_lr=50.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    set_lr_ratios(optimizer, model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for made in layers(model):
        assert rates[id(made.Z)] == pytest.approx(5e-2)
        assert rates[id(made.A)] == rates[id(made.B)] == pytest.approx(1e-3)
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    rows = [{k: v[0] for k, v in batch("llama", rows=1).items()}]
    plain = Trainer(model=model, args=args, train_dataset=rows, callbacks=tunesmith.callbacks(model))
    with pytest.raises(TunesmithError, match="learn at a rate of their own"):
        plain.train()


def test_a_run_learns_to_route(tmp_path: Path) -> None:
    """The same prompts, another answer in each family: the routing alone can tell, when answers are generated too."""
    items = world.get("copy", min_length=4, max_length=4).items(60, split="train", seed=0)
    words = {"a": "north", "b": "south"}
    pairs = [(item, family) for item in items for family in words]
    rows = [{"prompt": item.prompt, "completion": words[family], "family": family} for item, family in pairs]
    for name, chosen in (("train", rows[:96]), ("eval", rows[96:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    fields: dict[str, Any] = {
        "model": "tiny-lm-s",
        "data.train": str(tmp_path / "train.jsonl"),
        "data.eval": str(tmp_path / "eval.jsonl"),
        "output": str(tmp_path / "run"),
        "train.steps": 60,
        "train.batch_size": 8,
        "train.learning_rate": 1e-2,
        "report.generate_rows": 8,
        "report.retain_rows": 2,
        "report.max_new_tokens": 8,
    }
    found = run(None, adapters=[{"name": "multi-head-routing", "rank": 2, "skills": 4, "splits": 4}], **fields)
    for family in words:
        assert found.figure(f"exact match, {family}").value == 1.0
    config = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert config["parts"][0]["options"]["groups"] == ["a", "b"]


# Gradient alignment ------------------------------------------------------------------------------------------------


def test_gradient_alignment_by_hand() -> None:
    model = adapted(target_modules=["q_proj"])
    given = {name: batch("llama", seed=i) for i, name in enumerate(TASKS)}
    gradients = []
    for i, name in enumerate(TASKS):
        model(**given[name], group=torch.tensor([i, i])).loss.backward()
        gradients.append(torch.cat([t.grad.flatten() for made in layers(model) for t in (made.A, made.B)]))
        model.zero_grad()
    cosine = torch.nn.functional.cosine_similarity
    pairs = [cosine(gradients[i], gradients[j], dim=0) for i, j in ((0, 1), (0, 2), (1, 2))]
    model.train()
    assert gradient_alignment(model, given) == pytest.approx(float(sum(pairs) / 3), abs=1e-5)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_gradient_alignment_of_other_models() -> None:
    model = get_peft_model(tiny("llama"), tunesmith.adapter("lora", rank=2))
    same = {"one": batch("llama"), "two": batch("llama")}
    assert gradient_alignment(model, same) == pytest.approx(1, abs=1e-5)
    signs = {"one": {**batch("llama"), "sign": 1}, "two": {**batch("llama"), "sign": -1}}

    def signed(model: nn.Module, given: Any) -> Tensor:
        given = dict(given)
        return given.pop("sign") * model(**given).loss

    assert gradient_alignment(model, signs, loss=signed) == pytest.approx(-1, abs=1e-5)
    for wrong in ({"one": batch("llama")}, {**signs, "one": {**batch("llama"), "sign": 0}}):
        with pytest.raises(TunesmithError, match="two tasks or more, none zero"):
            gradient_alignment(model, wrong, loss=signed if len(wrong) > 1 else model_loss)


# Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [3, -2])
def test_a_group_that_does_not_exist_is_an_error(index: int) -> None:
    with pytest.raises(DataError, match=r"0 to 2 \(one, two, three\), and -1 for any other; `group` is \[0, "):
        adapted()(**batch("llama"), group=torch.tensor([0, index]))


def test_another_number_of_groups_than_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="group has 3 entries; the batch has 2 rows"):
        adapted()(**batch("llama"), group=torch.tensor([0, 1, 2]))


def test_wrong_options_and_tasks_are_clear_errors() -> None:
    with pytest.raises(ModelError, match=r"9 splits needs as many dimensions; 'layer' of shape \(8, 12\) has 8"):
        single(nn.Linear(12, 8), splits=9)
    for groups in ([], ["one", "one"]):
        with pytest.raises(RecipeError, match="names each task once"):
            single(nn.Linear(12, 8), groups=groups)
    model = adapted()
    with pytest.raises(TunesmithError, match=r"no task 'thre'. Did you mean 'three'\? Its tasks: one, two, three"):
        choose(model, "thre")
    with pytest.raises(TunesmithError, match="cannot add the task 'two' as 'mhr': it knows that"):
        add_task(model, "two")


def test_without_groups_there_is_one() -> None:
    model = get_peft_model(tiny("llama"), tunesmith.adapter("multi-head-routing", rank=2))
    moved(model)
    given = batch("llama")
    one = logits(copy.deepcopy(model), {**given, "group": torch.tensor([0, -1])})
    assert torch.allclose(logits(model, given), one, atol=1e-6)
