"""What is special to OwLore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from torch import Tensor, nn

import tunesmith
from tests.zoo import batch, checkpoint, same, tiny
from tunesmith import catalog
from tunesmith.core.meters import state_bytes
from tunesmith.core.modelmap import block_linears, blocks
from tunesmith.errors import CheckpointError, RecipeError, TunesmithError
from tunesmith.optimizers.galore import GaLore
from tunesmith.recipe import load
from tunesmith.schedules.owlore import OwLore, outlier_ratio


def attached(model: nn.Module, family: str = "llama", **options: Any) -> OwLore:
    schedule = OwLore(**{"layers": 1, "interval": 1, "threshold": 2.0, **options})
    if schedule.statistics:
        schedule.calibrate(model, [batch(family)])
    schedule.attach(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    return schedule


def shares(model: nn.Module, family: str, threshold: float) -> list[float]:
    """D by its definition, from recorded inputs."""
    kept: dict[str, list[Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: kept.setdefault(name, []).append(args[0].double().flatten(0, -2))
        )
        for name in block_linears(model)
    ]
    with torch.no_grad():
        model(**batch(family))
    for handle in handles:
        handle.remove()
    found = []
    for stack, held in blocks(model).items():
        for i in range(len(held)):
            scores = []
            for name, rows in kept.items():
                if name.startswith(f"{stack}.{i}."):
                    layer = model.get_submodule(name)
                    W = layer.weight.double().abs()
                    W = W.T if isinstance(layer, T.pytorch_utils.Conv1D) else W
                    scores.append((W * torch.cat(rows).norm(dim=0)).flatten())
            A = torch.cat(scores)
            found.append(float((A.gt(threshold * A.mean())).double().mean()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5", "vit"])
def test_shares_by_definition(family: str, dtype: torch.dtype) -> None:
    """One feature and one matrix stand out, so that transposing, or a mean per matrix, gives other numbers."""
    model = tiny(family).to(dtype)
    name = block_linears(model)[0]
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        weight *= 5
        weight[3] *= 5
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch(family).items()}
    schedule = OwLore(layers=1, threshold=3.0)
    schedule.calibrate(model, [given])
    assert schedule.scores is not None
    if dtype is torch.float32:
        assert schedule.scores.tolist() == pytest.approx(shares(model, family, 3.0), abs=1e-9)
    assert schedule.scores[0] > 0
    assert len(set(schedule.scores.tolist())) > 1


def test_a_share_is_over_all_tensors_together() -> None:
    small, large = torch.ones(2, 5), torch.full((10,), 10.0)
    assert outlier_ratio(lambda: iter([small, large]), 1.5) == 0.5, "each for itself has no outlier"
    assert outlier_ratio(lambda: iter([small, large]), 2.0) == 0
    at = torch.tensor([0.0, 2.0])
    assert outlier_ratio(lambda: iter([at]), 2.0) == 0, "at the limit is not above it"
    with pytest.raises(TunesmithError, match="a block has 0 numbers in linear layers"):
        outlier_ratio(lambda: iter([]), 2.0)
    with pytest.raises(TunesmithError, match="finite weights"):
        outlier_ratio(lambda: iter([torch.tensor([float("nan")])]), 2.0)


def test_many_batches_are_one() -> None:
    model, given = tiny("llama"), batch("llama", rows=4)
    found = []
    for batches in ([given], [{k: v[i : i + 1] for k, v in given.items()} for i in range(4)]):
        schedule = OwLore(layers=1, threshold=2.0)
        schedule.calibrate(model, batches)
        assert schedule.scores is not None
        found.append(schedule.scores)
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["peft", "ours", "both ends"])
def test_below_adapters_the_base_is_scored(kind: str) -> None:
    plain = OwLore(layers=1, threshold=2.0)
    plain.calibrate(tiny("llama"), [batch("llama")])
    config = (
        tunesmith.adapter("ssf", std=0.0)
        if kind == "ours"
        else peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"] if kind == "both ends" else "all-linear")
    )
    model = peft.get_peft_model(tiny("llama"), config)
    schedule = attached(model)
    assert plain.scores is not None
    assert schedule.scores is not None
    assert torch.allclose(schedule.scores, plain.scores, atol=1e-4)
    assert {n for n in schedule.active(0) if ".layers." in n} == schedule.members[schedule.chosen(0)[0]]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_below_adapters_a_quantised_base_is_scored(quantization: str, tmp_path: Path) -> None:
    from tunesmith.models.loader import load_base

    tiny("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    model = load_base(str(tmp_path), "causal-lm", dtype="float32", quantization=quantization)
    schedule = attached(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear")))
    assert schedule.scores is not None
    assert bool((schedule.scores > 0.03).all())


def test_a_layer_without_an_adapter_is_not_drawn_and_keeps_its_place() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1, 3])
    schedule = attached(peft.get_peft_model(tiny("llama", num_hidden_layers=4), config))
    assert schedule.scores is not None
    assert schedule.weights_of_members() == [schedule.scores[1], schedule.scores[3]]


def test_modes() -> None:
    scores = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    expected = {
        "outlier": [0.1, 0.4, 0.2, 0.3],
        "reversed": [0.5, 0.0, 1 / 3, 1 / 6],
        "increasing": [0.1, 0.2, 0.3, 0.4],
        "decreasing": [0.4, 0.3, 0.2, 0.1],
        "uniform": [0.25] * 4,
    }
    for mode, p in expected.items():
        schedule = attached(tiny("llama", num_hidden_layers=4), mode=mode)
        if mode in ("outlier", "reversed"):
            schedule.scores = scores
        assert schedule.probabilities() == pytest.approx(p), mode
        assert bool(schedule.statistics) == (mode in ("outlier", "reversed"))


def test_weight_norm_is_of_the_linear_layers() -> None:
    model = tiny("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight *= 100
        for p in model.model.layers[2].mlp.parameters():
            p *= 3
    schedule = attached(model, mode="weight-norm")
    norms = []
    for i in range(3):
        inside = [n for n in block_linears(model) if n.startswith(f"model.layers.{i}.")]
        squares = [model.get_submodule(n).weight.detach().double().square().sum() for n in inside]
        norms.append(float(torch.stack(squares).sum().sqrt()))
    assert schedule.probabilities() == pytest.approx([n / sum(norms) for n in norms], rel=1e-5)


def test_reversed_never_draws_the_block_with_the_largest_share() -> None:
    schedule = attached(tiny("llama", num_hidden_layers=3), mode="reversed")
    assert schedule.scores is not None
    largest = int(schedule.scores.argmax())
    drawn = {block for period in range(40) for block in schedule.chosen(period)}
    assert drawn == {0, 1, 2} - {largest}
    with pytest.raises(TunesmithError, match=r"layers=3 .* only 2 of the 3"):
        attached(tiny("llama", num_hidden_layers=3), mode="reversed", layers=3)


def test_without_outliers_it_says_what_to_do() -> None:
    with pytest.raises(TunesmithError, match=r"only 0 of the 2 .* lower `threshold` \(now 13\)"):
        attached(tiny("llama"), threshold=13.0)


def test_without_calibration_it_says_what_to_do() -> None:
    model = tiny("llama")
    schedule = OwLore(layers=1)
    schedule.attach(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(TunesmithError, match=r"call `schedule.calibrate\(model, batches\)` before the first step"):
        schedule.begin_step(0)


def test_scores_of_another_model_are_refused() -> None:
    schedule = attached(tiny("llama"))
    deeper = tiny("llama", num_hidden_layers=3)
    with pytest.raises(TunesmithError, match="scored are 2, but LlamaForCausalLM has 3"):
        schedule.attach(deeper, torch.optim.AdamW(deeper.parameters()))
    other = attached(tiny("llama", num_hidden_layers=3))
    with pytest.raises(CheckpointError, match="scores of 2 blocks, but the model has 3"):
        other.load_training_state(schedule.training_state())


@pytest.mark.parametrize("mode", ["outlier", "weight-norm"])
def test_a_resumed_run_draws_by_what_was_seen_at_first(mode: str) -> None:
    model = tiny("llama", num_hidden_layers=4)
    schedule = attached(model, mode=mode)
    kept = schedule.training_state()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 50
    resumed = OwLore(layers=1, interval=1, threshold=2.0, mode=mode)
    resumed.restore(kept)
    resumed.attach(model, torch.optim.AdamW(model.parameters()))
    assert resumed.probabilities() == schedule.probabilities()
    assert [resumed.chosen(i) for i in range(9)] == [schedule.chosen(i) for i in range(9)]


def test_galore_inside_begins_anew_on_every_return() -> None:
    """State is that of what trains; the projection is of the first gradient after the return, the count is 1."""
    model, given = tiny("llama", num_hidden_layers=4), batch("llama")
    optimizer = GaLore(GaLore.groups(model), lr=1e-2, rank=4, period=100, scale=1.0)
    schedule = OwLore(layers=1, interval=1, threshold=2.0)
    schedule.calibrate(model, [given])
    schedule.attach(model, optimizer)
    bases: dict[str, list[Tensor]] = {}
    sizes = set()
    for step in range(12):
        schedule.begin_step(step)
        model(**given).loss.backward()
        (block,) = schedule.chosen(step)
        p = model.get_parameter(f"model.layers.{block}.mlp.up_proj.weight")
        again = step > 0 and schedule.chosen(step - 1) == [block]
        optimizer.step()
        state = optimizer.state[p]
        assert state["step"] == 1 or again
        if not again:
            bases.setdefault(str(block), []).append(state["right"].clone())
        optimizer.zero_grad()
        sizes.add(state_bytes(optimizer))
    assert len(sizes) == 1, "blocks are alike here, and each leaves with its state"
    assert any(len(held) > 1 and not torch.equal(held[0], held[1]) for held in bases.values())


def test_a_recipe_gets_galore_unless_it_names_another() -> None:
    assert load({"schedule": "owlore"}).optimizer.name == "galore"
    assert load({"method": "owlore"}).full
    assert load({"schedule": "owlore", "optimizer": "adamw_torch"}).optimizer.name == "adamw_torch"
    over_lora = load({"adapters": ["lora"], "schedule": "owlore", "optimizer": "adamw_torch"})
    assert {use.part.slug for uses in over_lora.check().values() for use in uses} == {"lora", "owlore"}
    with pytest.raises(RecipeError, match=r"owlore cannot run here \(train.fsdp is true\)"):
        load({"schedule": "owlore", "train": {"fsdp": True}}).check()


def test_options_are_checked() -> None:
    for options in ({"layers": 0}, {"threshold": 0}, {"mode": "best"}, {"interval": 0}):
        with pytest.raises(RecipeError, match=next(iter(options))):
            catalog.get("owlore").validate(options)


def test_calibration_leaves_the_model_as_it_was() -> None:
    model = tiny("llama").train()
    before = checkpoint(model)
    OwLore(layers=1).calibrate(model, [batch("llama")])
    assert same(checkpoint(model), before)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
