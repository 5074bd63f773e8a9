"""What is special to polarised gates."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import tunesmith
from tests.contracts.test_adapters import move
from tests.zoo import FAMILIES, batch, logits, tiny
from tunesmith.adapters.polarization_cuts import calibrate, cut, summary
from tunesmith.adapters.polarization_subnet import PolarizationSubnet
from tunesmith.adapters.polarization_units import Gates
from tunesmith.core.meters import flops
from tunesmith.errors import ModelError, RecipeError


def held(model: nn.Module) -> dict[str, Any]:
    return {m.layer.name: m for m in model.modules() if isinstance(m, PolarizationSubnet)}


def gated(family: str, base: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    given = base or tiny(family)
    return get_peft_model(copy.deepcopy(given), tunesmith.adapter("polarization-subnet", **options)).eval()


def closed(model: Any, seed: int = 0) -> Any:
    """With about half of the units closed by their recent means."""
    g = torch.Generator().manual_seed(seed)
    for made in held(model).values():
        made.p.copy_(torch.rand(made.p.shape, generator=g))
    return model


def sensitive(model: Any, size: float = 3.0) -> Any:
    """With gates that depend on the input."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for made in held(model).values():
            made.gates[2].weight.copy_(size * torch.randn(made.gates[2].weight.shape, generator=g))
            made.gates[2].bias.zero_()
    return model


def test_gates_are_hard_forward_and_smooth_backward() -> None:
    a = torch.tensor([[-9.0, -0.5, 0.0, 0.5, 9.0]], requires_grad=True)
    g = Gates.apply(a, 1)
    assert g.tolist() == [[0, 0, 0, 1, 1]]
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    (g * weights).sum().backward()
    s = torch.sigmoid(a.detach().clamp(-4, 4))
    assert a.grad is not None
    assert torch.allclose(a.grad, weights * s * (1 - s))
    assert float(a.grad[0, 0]) > 0.01  # far below zero, and not dead


def test_some_units_stay_open_for_every_input() -> None:
    a = torch.tensor([[-3.0, -1.0, -2.0], [1.0, -1.0, -2.0]])
    assert Gates.apply(a, 1).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert Gates.apply(a, 2).tolist() == [[0, 1, 1], [1, 1, 0]]
    model = gated("llama", least=2)
    for made in held(model).values():
        made.p.zero_()
        assert int(made.consensus().sum()) == 2
    assert logits(cut(model), batch("llama")).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cut_model_is_the_gated_one_in_evaluation(family: str) -> None:
    base, given = tiny(family), batch(family)
    model = move(closed(gated(family, groups=6)), 0.2)
    expected = logits(model, given)
    assert (expected - logits(base, given)).abs().max() > 1e-3 * expected.std()
    smaller = cut(model)
    assert torch.allclose(logits(smaller, given), expected, atol=1e-5 * float(expected.abs().max()))
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in base.parameters())
    assert not any("tunesmith_" in name for name, _ in smaller.named_modules())


@pytest.mark.parametrize(("family", "tokens"), [("vit", 17), ("llama", 9)])
def test_costs_are_the_flops_that_are_cut(family: str, tokens: int) -> None:
    base, given = tiny(family), batch(family)
    model = closed(gated(family, groups=7, length=tokens))  # 48 neurons: groups of 6 and 7
    share = summary(model).figure("FLOPs left").value
    found = held(model).values()
    gone = sum(float((made.costs * (1 - made.consensus())).sum()) for made in found)
    whole = sum(float(made.costs.sum()) for made in found)
    smaller = cut(model)
    with torch.no_grad():
        assert flops(lambda: base(**given)) - flops(lambda: smaller(**given)) == round(2 * tokens * gone)
    assert share == pytest.approx(1 - gone / whole)


def test_gates_of_a_row_do_not_see_padding() -> None:
    model, given = gated("bert"), batch("bert")
    del given["labels"]
    padded = {name: nn.functional.pad(value, (0, 4)) for name, value in given.items()}
    unsaid = {"input_ids": padded["input_ids"]}
    pooled: list[Tensor] = []
    first = next(iter(held(model).values()))
    first.gates[0].register_forward_hook(lambda m, args, out: pooled.append(args[0]))
    for inputs in (given, padded, unsaid):
        calibrate(model, [inputs])
    assert torch.allclose(pooled[0], pooled[1], atol=1e-6)
    assert not torch.allclose(pooled[0], pooled[2], atol=1e-3)


def test_gates_of_a_causal_model_do_not_see_the_future() -> None:
    model, given = sensitive(gated("llama")), batch("llama")
    for made in held(model).values():
        made.by_input = True
    expected = logits(model, given)
    other = {**given, "input_ids": given["input_ids"].clone()}
    other["input_ids"][:, 5:] = 7
    changed = logits(model, other)
    assert torch.allclose(changed[:, :5], expected[:, :5], atol=1e-6)
    pooled = sensitive(gated("llama", pool="row"))
    for made in held(pooled).values():
        made.by_input = True
    assert not torch.allclose(logits(pooled, other)[:, :5], logits(pooled, given)[:, :5], atol=1e-4)


def by_hand(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean gates of a ViT: every row pooled over all its tokens."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, made in held(model).items():
        first = model.base_model.model.get_submodule(made.shared.sites[name].inputs[0])

        def keep(module: nn.Module, args: tuple, name: str = name, made: Any = made) -> None:
            seen[name] = (made.gates(args[0].mean(1)) > 0).float().mean(0)

        handles.append(first.register_forward_pre_hook(keep))
    with torch.no_grad():
        for made in held(model).values():
            made.by_input = True
        model(**given)
        for made in held(model).values():
            made.by_input = False
    for handle in handles:
        handle.remove()
    return seen


def test_calibration_is_the_mean_over_all_inputs() -> None:
    model = sensitive(gated("vit"))
    batches = [batch("vit", rows=rows, seed=rows) for rows in (3, 5)]
    parts = [by_hand(model, b) for b in batches]
    report = calibrate(model, batches)
    for name, made in held(model).items():
        assert torch.allclose(made.p, (3 * parts[0][name] + 5 * parts[1][name]) / 8)
    p = torch.cat([made.p for made in held(model).values()])
    assert report.figure("agreement").value == pytest.approx(float(torch.maximum(p, 1 - p).mean()))
    assert report.figure("agreement").value < 1
    with pytest.raises(ModelError, match="no batch"):
        calibrate(model, [])


def test_recent_means_are_taken_over_the_micro_batches_of_a_step() -> None:
    model = sensitive(gated("vit", memory=0.75))
    batches = [batch("vit", rows=2, seed=seed) for seed in (3, 4)]
    parts = [by_hand(model, b) for b in batches]
    with tunesmith.step(model.train(), 0, 10):
        for b in batches:
            model(**b).loss.backward()
    for name, made in held(model).items():
        assert torch.allclose(made.p, 0.75 + 0.25 * (parts[0][name] + parts[1][name]) / 2)
    assert any(bool((made.p < 1).any()) for made in held(model).values())


def test_pressure_warms_up_and_grows() -> None:
    model, found = gated("vit", warmup=0.2, ramp=4), []
    for number in range(10):
        with tunesmith.step(model, number, 10):
            found.append(next(iter(held(model).values())).shared.pressure)
    assert found == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    with pytest.raises(tunesmith.errors.TunesmithError, match="total=STEPS"), tunesmith.step(model, 0):
        pass


def test_the_loss_can_open_a_closed_unit() -> None:
    model = gated("vit")
    made = held(model)["vit.layers.0.mlp.fc2"] if "vit.layers.0.mlp.fc2" in held(model) else [*held(model).values()][1]
    with torch.no_grad():
        made.gates[2].bias[0] = -20.0
    with tunesmith.step(model.train(), 0, 10):
        model(**batch("vit")).loss.backward()
    assert abs(float(made.gates[2].bias.grad[0])) > 1e-7


def test_saved_gates_cut_the_same_model(tmp_path: Path) -> None:
    base, given = tiny("llama"), batch("llama")
    model = move(closed(gated("llama", base)), 0.1)
    expected = logits(model, given)
    model.save_pretrained(tmp_path)
    smaller = cut(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path))
    assert torch.allclose(logits(smaller, given), expected, atol=1e-5)


def test_over_another_adapter_and_without_factors() -> None:
    config = tunesmith.stack(tunesmith.adapter("dylora", rank=2), tunesmith.adapter("polarization-subnet", scale=False))
    model, given = move(closed(get_peft_model(tiny("llama"), config).eval())), batch("llama")
    assert all(made.factors is None for made in held(model).values())
    expected = logits(model, given)
    assert torch.allclose(logits(cut(model), given), expected, atol=1e-5)


def test_errors() -> None:
    heads = ["encoder.block.0.layer.0.SelfAttention.o"]
    assert not set(heads) & set(held(gated("t5")))
    with pytest.raises(ModelError, match="position bias has an entry per head"):
        get_peft_model(tiny("t5"), tunesmith.adapter("polarization-subnet", target_modules=heads))
    with pytest.raises(ModelError, match="reads no heads or neurons"):
        get_peft_model(tiny("llama"), tunesmith.adapter("polarization-subnet", target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"least=3, and .* has 2 units"):
        gated("llama", least=3)
    with pytest.raises(RecipeError, match="start"):
        tunesmith.adapter("polarization-subnet", start=0.4)
    with pytest.raises(ModelError, match="no polarization-subnet in force"):
        cut(tiny("llama"))
    assert PolarizationSubnet.refusals({"pool": "row"})
