"""SaRA: which weights train, what they start as and their gradient; the second choice; and what comes out of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import tunesmith
from tests.train import resuming
from tests.train.conftest import data_file, model_folder, recipe  # noqa: F401 (fixtures)
from tests.zoo import batch, logits, same, tiny
from tunesmith.adapters.sara import SaRA, paper_rate, threshold_of
from tunesmith.core.adapter import stacked
from tunesmith.core.layer import describe
from tunesmith.core.meters import saved_bytes, state_bytes
from tunesmith.core.sparse_export import sparse_delta
from tunesmith.errors import CheckpointError, ModelError, RecipeError, TunesmithError
from tunesmith.train import run


class Net(nn.Module):
    """A convolution, an embedding and two linear layers; a bias of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(9, 6), nn.Conv2d(3, 4, 3)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)
        nn.init.zeros_(self.first.bias)
        nn.init.normal_(self.table.weight, std=0.2)

    def forward(self, ids: Tensor, images: Tensor) -> Tensor:
        return self.second(self.first(self.table(ids)).tanh()).sum((0, 1)) + self.conv(images).mean((0, 2, 3)).sum()


EVERY = ["table", "conv", "first", "second"]
GIVEN = (torch.arange(8).view(2, 4), torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(2)))


def made(dtype: torch.dtype = torch.float32, base: nn.Module | None = None, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    base = Net().to(dtype) if base is None else base
    options = {"target_modules": EVERY, **options}
    return base, get_peft_model(copy.deepcopy(base), tunesmith.adapter("sara", **options)).eval()


def layers(model: nn.Module) -> dict[str, SaRA]:
    return {m.layer.name: m for m in model.modules() if isinstance(m, SaRA)}


def weights(base: nn.Module) -> dict[str, Tensor]:
    return {name: base.get_submodule(name).weight.detach() for name in EVERY}


def test_the_smallest_of_all_layers_together_train_as_they_are() -> None:
    base, model = made(density=0.15)
    every = torch.cat([W.flatten() for W in weights(base).values()])
    limit = every.abs().sort().values[int(0.15 * len(every)) - 1]
    assert sum(len(found.values) for found in layers(model).values()) == int(0.15 * len(every))
    for name, W in weights(base).items():
        found = layers(model)[name]
        assert found.indices.tolist() == (W.flatten().abs() <= limit).nonzero()[:, 0].tolist()
        assert torch.equal(found.values, W.flatten()[found.indices.long()])
    assert torch.equal(model(*GIVEN), base(*GIVEN)), "bit for bit"
    assert any(bool((found.values < 0).any()) for found in layers(model).values())


def test_released_codes_absolute_values_are_another_model() -> None:
    """It scatters |v|: the base model is changed before anything has trained."""
    base, model = made()
    with torch.no_grad():
        for found in layers(model).values():
            found.values.abs_()
    assert float((model(*GIVEN) - base(*GIVEN)).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_threshold_is_strict_and_not_rounded(dtype: torch.dtype) -> None:
    W = torch.tensor([[2.002e-3, -1.999e-3, 0.0, 1.0], [2e-3, -2.01e-3, 1.9e-3, -1.0]]).to(dtype)
    base = nn.Sequential(nn.Linear(4, 2)).to(dtype)
    with torch.no_grad():
        base[0].weight.copy_(W)
    model = get_peft_model(base, tunesmith.adapter("sara", threshold=2e-3, target_modules=["0"])).eval()
    (found,) = layers(model).values()
    limit = float(torch.tensor(2e-3))
    assert found.indices.tolist() == [i for i, w in enumerate(W.flatten().tolist()) if abs(w) < limit]
    assert found.values.dtype == torch.promote_types(dtype, torch.float32)
    x = torch.randn(3, 4, dtype=dtype)
    assert torch.equal(model(x), F.linear(x, W, base[0].base_layer.bias))


def test_the_threshold_of_a_share_is_exact_with_ties_and_zeros() -> None:
    g = torch.Generator().manual_seed(0)
    for share in (0.001, 0.1, 0.5, 1.0):
        parts = [torch.randn(37, 11, generator=g), 1e-3 * torch.randn(200, generator=g).bfloat16()]
        every = torch.cat([p.float().flatten() for p in parts]).abs().sort().values
        theta = threshold_of(lambda parts=parts: parts, share)
        count = max(int(share * len(every)), 1)
        assert int((every < theta).sum()) == int((every <= every[count - 1]).sum()) >= count
        assert theta == float(torch.nextafter(every[count - 1], torch.tensor(9.0)))
    assert 0 < threshold_of(lambda: [torch.zeros(9)], 0.5) < 1e-40


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_those_of_the_dense_weight_at_the_places(name: str) -> None:
    base, model = made(density=0.3)
    model.train()
    with tunesmith.step(model, 0, 10):
        model(*GIVEN).square().sum().backward()
    base(*GIVEN).square().sum().backward()
    found, dense = layers(model)[name], base.get_submodule(name).weight.grad
    torch.testing.assert_close(found.values.grad, dense.flatten()[found.indices.long()], atol=1e-6, rtol=1e-5)


def test_targets_are_matrices_and_convolutions_and_no_head() -> None:
    for family in ("llama", "gpt2", "bert", "vit", "t5"):
        found = set(SaRA.targets(tiny(family)))
        assert found
        assert not [name for name in found if "norm" in name or "head" in name or "classifier" in name]
    assert "vit.embeddings.patch_embeddings.projection" in SaRA.targets(tiny("vit"))
    model = get_peft_model(tiny("llama"), tunesmith.adapter("ssf"))
    assert SaRA.targets(model.base_model.model) == SaRA.targets(tiny("llama"))


def trained(model: nn.Module, steps: int, total: int, start: int = 0, lr: float = 0.03, optimizer: Any = None) -> Any:
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for number in range(start, start + steps):
        with tunesmith.step(model.train(), number, total, optimizer):
            (model(*GIVEN) - 1).square().sum().backward()
            optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_what_has_grown_is_frozen_bit_for_bit_and_the_state_begins_anew() -> None:
    base, model = made(density=0.4, reselect=4)
    optimizer = trained(model, 3, 12)
    assert all(found.frozen is None for found in layers(model).values())
    trained(model, 1, 12, start=3, optimizer=optimizer)
    assert not any(found.values in optimizer.state for found in layers(model).values())
    held = {name: (found.frozen.clone(), found.values.detach().clone()) for name, found in layers(model).items()}
    for name, (frozen, values) in held.items():
        theta = layers(model)[name].threshold
        assert torch.equal(frozen, values.abs() >= theta)
        whole = layers(model)[name].weight(weights(base)[name])
        assert int((~frozen).sum()) == int((whole.abs() < theta).sum()), "no other weight is below theta"
    assert 0 < sum(int(frozen.sum()) for frozen, _ in held.values()) < sum(len(frozen) for frozen, _ in held.values())
    trained(model, 5, 12, start=4, lr=0.03, optimizer=optimizer)
    assert {float(optimizer.state[found.values]["step"]) for found in layers(model).values()} == {5.0}
    moved = 0
    for name, (frozen, values) in held.items():
        now = layers(model)[name].values.detach()
        assert torch.equal(now[frozen], values[frozen]), "neither gradient nor weight decay"
        assert not optimizer.state[layers(model)[name].values]["exp_avg"][frozen].any()
        moved += int((now[~frozen] != values[~frozen]).sum())
    assert moved


def test_outside_of_the_choice_nothing_moves_and_weight_decay_pulls_to_zero() -> None:
    base, model = made(density=0.2, reselect=None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    for name, W in weights(base).items():
        found = layers(model)[name]
        changed = found.weight(W).detach().flatten()
        expected = W.clone().flatten()
        expected[found.indices.long()] *= 1 - 0.1 * 0.5
        torch.testing.assert_close(changed, expected, atol=0, rtol=1e-6)


def test_merged_and_exported_are_the_same_model(tmp_path: Path) -> None:
    base, model = made(density=0.3, reselect=3)
    trained(model, 6, 12)
    expected = model.eval()(*GIVEN).detach()
    delta = sparse_delta(model)
    assert delta.count == sum(len(found.values) for found in layers(model).values())
    with delta.applied(copy.deepcopy(base)) as tuned:
        torch.testing.assert_close(tuned(*GIVEN), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(again.eval()(*GIVEN), expected)
    values = {name: (found.indices.long(), found.values.detach()) for name, found in layers(model).items()}
    merged = model.merge_and_unload()
    for name, (places, v) in values.items():
        assert torch.equal(merged.get_submodule(name).weight.flatten()[places], v), "exactly the trained weights"


def test_a_base_in_another_dtype_takes_the_places_of_the_file(tmp_path: Path) -> None:
    base, model = made(torch.bfloat16, threshold=0.08)
    assert all(found.values.dtype == torch.float32 for found in layers(model).values())
    wide = Net()
    wide.load_state_dict({n: t.float() * (1 + 0.05 * torch.sin(t.float() * 1e4)) for n, t in base.state_dict().items()})
    counts = {name: len(found.values) for name, found in layers(model).items()}
    assert counts != {name: len(found.values) for name, found in layers(made(base=wide, threshold=0.08)[1]).items()}
    model.save_pretrained(tmp_path)
    again = layers(PeftModel.from_pretrained(wide, tmp_path))
    for name, found in layers(model).items():
        assert torch.equal(again[name].indices, found.indices)
        assert torch.equal(again[name].values, found.values)


def test_another_base_is_refused(tmp_path: Path) -> None:
    _, model = made()
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    with pytest.raises(CheckpointError, match="load the base that it was trained on"):
        PeftModel.from_pretrained(Net(), tmp_path)


def test_bytes_of_state_and_of_what_autograd_keeps() -> None:
    torch.manual_seed(0)
    module = nn.Linear(64, 64).requires_grad_(False)
    model = get_peft_model(nn.Sequential(module), tunesmith.adapter("sara", target_modules=["0"], reselect=None))
    (found,) = layers(model).values()
    x = torch.randn(2, 64, requires_grad=True)
    with tunesmith.step(model.train(), 0, 9), saved_bytes(module) as kept:
        y = stacked(module, describe(module, "0"), [found])(x)
    k = len(found.values)
    assert kept.bytes == 4 * x.numel() + 4 * k <= 4 * x.numel() + module.weight.numel()
    y.sum().backward()
    optimizer = torch.optim.AdamW([found.values])
    optimizer.step()
    assert state_bytes(optimizer) == 8 * k + 4  # torch's count of steps


def test_errors_say_what_to_do() -> None:
    with pytest.raises(RecipeError, match="both given"):
        made(threshold=1e-3, density=0.1)
    with pytest.raises(ModelError, match=r"none of the 54 weights of 'table' is below 1e-12.*exclude_modules"):
        made(threshold=1e-12)
    _, model = made(reselect=20)
    with pytest.raises(RecipeError, match="reselect=20 is not within the run's 20 steps"):
        trained(model, 1, 20)
    _, model = made()
    with pytest.raises(TunesmithError, match="total=STEPS"), tunesmith.step(model, 0):
        pass
    with pytest.raises(TunesmithError, match="optimizer=optimizer"), tunesmith.step(model, 4, 10):
        pass
    with pytest.raises(RecipeError, match=r"density"):
        made(density=0.0)


def test_the_papers_rate() -> None:
    _, model = made(threshold=0.1)
    assert paper_rate(model) == pytest.approx(1e-3 * 2.718281828459045**-35)
    with pytest.raises(ModelError, match="no adapter of sara"):
        paper_rate(Net())


def test_a_second_adapter_chooses_by_the_original_weights() -> None:
    given = batch("llama")
    model = get_peft_model(tiny("llama"), tunesmith.adapter("sara", density=0.2))
    first = {name: found.indices.clone() for name, found in layers(model).items()}
    with torch.no_grad():
        for found in layers(model).values():
            found.values.add_(0.1)
    model.add_adapter("second", tunesmith.adapter("sara", density=0.2))
    model.set_adapter("second")
    for name, found in layers(model).items():  # the second of a layer comes last
        assert found.group == "second"
        assert torch.equal(found.indices, first[name])
    assert torch.equal(logits(model, given), logits(tiny("llama"), given))


def test_a_run_resumes_bitwise_after_the_second_choice(
    recipe: Callable[..., dict[str, Any]],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part = {"name": "sara", "density": 0.3, "reselect": 3}
    term = [{"name": "nuclear-norm", "weight": 1e-3}]
    fields = recipe(adapters=[part], regularisers=term)
    fields["train.learning_rate"], fields["train.weight_decay"] = 3e-3, 0.01
    seen: list[SaRA] = []
    real_freeze = SaRA._freeze
    monkeypatch.setattr(SaRA, "_freeze", lambda self, frozen: (seen.append(self), real_freeze(self, frozen))[1])

    run(None, **fields)
    expected = resuming.weights(fields["output"])
    assert seen
    assert 0 < sum(int(s.frozen.sum()) for s in seen) < sum(len(s.frozen) for s in seen)
    assert same(resuming.resumed(fields, tmp_path / "stopped", 5), expected)
