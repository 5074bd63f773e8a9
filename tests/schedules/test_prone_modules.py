"""Prone modules: which tensors are in which group, and statistics that rest or move."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as T
from torch import Tensor, nn

from tests.zoo import batch, checkpoint, tiny
from tunesmith.core.part import Part
from tunesmith.errors import TunesmithError
from tunesmith.recipe import load
from tunesmith.schedules.prone_modules import ProneModules, groups, pick


def resnet() -> T.PreTrainedModel:
    config = T.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return T.ResNetForImageClassification(config)


class Norms(nn.Module):
    """Batch and instance normalisation in one and two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.inner = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.plain = nn.InstanceNorm2d(4, affine=True)
        self.bn = nn.BatchNorm1d(4)
        self.group = nn.GroupNorm(2, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.out(self.group(self.bn(self.plain(self.inner(self.stem(x))).mean((2, 3)))))
        return h


def attached(model: nn.Module, **options: Any) -> ProneModules:
    schedule = ProneModules(**options)
    schedule.attach(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    schedule.begin_step(0)
    return schedule


def training(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def trained(model: nn.Module, **options: Any) -> set[str]:
    """Names of everything that three steps change."""
    before = checkpoint(model)
    schedule = attached(model, **options)
    given = batch("vit", rows=4)
    for step in range(3):
        model.train()  # after the schedule's own call, as a Trainer does
        schedule.begin_step(step)
        model.train()
        model(**given).loss.backward()
        assert schedule.optimizer is not None
        schedule.optimizer.step()
    schedule.detach()
    after = checkpoint(model)
    return {n for n, t in after.items() if not torch.equal(t, before[n])}


# Groups ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "first", "last"),
    [
        ("llama", {"model.embed_tokens.weight"}, {"lm_head.weight"}),
        ("gpt2", set(), {"transformer.wte.weight"}),  # the head is the embedding
        ("t5", set(), {"shared.weight"}),
        ("bert", None, {"classifier.weight", "classifier.bias"}),
        ("vit", None, {"classifier.weight", "classifier.bias"}),
    ],
)
def test_every_tensor_is_in_one_group(family: str, first: set[str] | None, last: set[str]) -> None:
    model = tiny(family)
    found = groups(model)
    names = [name for held in found.values() for name in held]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    assert set(found["last"]) == last
    if first is not None:
        assert set(found.get("first", ())) == first
    assert {n for n in found["norm.weight"]} == {
        n for n in names if n.endswith("weight") and ("norm" in n.lower() or "ln_" in n)
    }


def test_blocks_and_statistics_of_a_resnet() -> None:
    model = resnet()
    found = groups(model)
    assert found["first"] == ["resnet.embedder.embedder.convolution.weight"]
    assert found["last"] == ["classifier.1.weight", "classifier.1.bias"]
    assert len(found["conv.0"]) == 2
    assert len(found["conv.1"]) == 3  # with the shortcut's
    assert len(found["norm.mean"]) == len(found["norm.var"]) == len(found["norm.weight"]) == 6
    assert all(n.endswith("running_mean") for n in found["norm.mean"])
    assert pick(found, ["norm"]) == {n for label in found if label.startswith("norm.") for n in found[label]}
    assert pick(found, ["conv"]) == set(found["conv.0"] + found["conv.1"])
    with pytest.raises(TunesmithError, match=r"no group 'con'; the model has conv.0, conv.1, first, last, norm.bias"):
        pick(found, ["con"])


def test_the_last_layer_is_the_last_that_trains() -> None:
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules="all-linear"))
    found = groups(model)
    assert all(".layers.1.mlp.down_proj.lora_" in n for n in found["last"])
    assert len(found["last"]) == 2
    assert "first" not in found
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 2), nn.LayerNorm(2))
    assert groups(plain)["last"] == ["3.weight", "3.bias"]
    assert groups(plain)["first"] == ["0.weight", "0.bias"]
    plain[0].requires_grad_(False)
    assert "first" not in groups(plain), "what rests does not hand its role on"


# What moves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "modules",
    [["last"], ["norm.bias", "last"], ["norm.mean", "norm.var", "last"], ["norm.mean", "last"], ["conv.1"], None],
)
def test_what_is_not_chosen_keeps_its_bits(modules: list[str] | None) -> None:
    model = resnet()
    found = groups(model)
    chosen = pick(found, modules or ["norm", "last"])
    changed = trained(model, modules=modules)
    if any(n.endswith(("mean", "var")) for n in chosen):
        changed = {n for n in changed if not n.endswith("num_batches_tracked")}
    assert changed == chosen


def test_resting_layers_run_by_their_statistics_and_chosen_ones_by_the_batch() -> None:
    model, x = Norms(), torch.randn(6, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(0.3)
    both, calm = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    calm.inner.eval(), calm.bn.eval()
    expected = {"rest": calm(x), "batch": both(x)}
    schedule = attached(model.train(), modules=["last"])
    assert torch.equal(model(x), expected["rest"])
    assert model.bn.training
    model.eval()
    assert torch.equal(model(x), copy.deepcopy(calm).eval()(x))
    schedule.detach()
    assert torch.equal(model.train()(x), expected["batch"])
    assert torch.equal(model.bn.running_mean, both.bn.running_mean)  # one batch each


def test_mean_alone_moves_as_it_would_with_the_variance() -> None:
    model, x = Norms().train(), torch.randn(6, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(model)
    schedule = attached(model, modules=["norm.mean", "last"])
    held = model.bn.running_var
    loss = model(x).square().sum()
    model(x)
    loss.backward()  # also after a second pass
    assert model.bn.running_var is held
    assert torch.equal(held, torch.ones(4))
    other(x), other(x)
    assert torch.equal(model.bn.running_mean, other.bn.running_mean)
    schedule.detach()


def test_an_error_in_a_pass_puts_everything_back() -> None:
    model = Norms().train()
    schedule = attached(model, modules=["last"])
    with pytest.raises(RuntimeError):
        model.bn(torch.zeros(2, 3))
    assert model.bn.training
    schedule.detach()
    assert training(model) == {n for n, _ in model.named_parameters()}
    assert not model.bn._forward_pre_hooks
    assert not model.bn._forward_hooks


def test_statistics_alone_have_no_gradient() -> None:
    with pytest.raises(TunesmithError, match=r"no parameter is in norm.mean"):
        attached(resnet(), modules=["norm.mean"])
    with pytest.raises(TunesmithError, match=r"there is no group 'norm.mean'"):
        attached(tiny("llama"), modules=["norm.mean"])


def test_a_trainer_evaluates_in_between(tmp_path: Path) -> None:
    model = resnet()
    before = checkpoint(model)
    given = batch("vit", rows=8)
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(given["pixel_values"], given["labels"], strict=True)]
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "optim": "sgd"}
    arguments = T.TrainingArguments(
        str(tmp_path), max_steps=4, learning_rate=0.1, eval_strategy="steps", eval_steps=2, **settings
    )
    schedule = ProneModules(modules=["norm.weight", "last"])
    T.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, callbacks=[schedule]).train()
    changed = {n for n, t in checkpoint(model).items() if not torch.equal(t, before[n])}
    assert changed == pick(groups(model), ["norm.weight", "last"])
    assert F.cross_entropy(model.eval()(given["pixel_values"]).logits, given["labels"]).isfinite()


def test_a_recipe_names_groups() -> None:
    uses = load({"schedule": {"name": "prone-modules", "modules": ["norm", "down.1"]}, "method": "full"}).check()
    part: Part = uses["schedule"][0].part
    assert part.slug == "prone-modules"
    assert uses["schedule"][0].options["modules"] == ["norm", "down.1"]
