"""What trains, when and how, in one run with the rest: pairs that go together, and pairs that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.test_pairs import GIVEN, better
from tests.zoo import logits
from tunesmith.core.meters import state_bytes
from tunesmith.core.schedule import Schedule
from tunesmith.core.sparse import SparseDelta
from tunesmith.core.statedict import Checkpoint
from tunesmith.engine.delta import extract
from tunesmith.errors import RecipeError
from tunesmith.models.loader import load_model
from tunesmith.train import run

Recipe = Callable[..., dict[str, Any]]


def adapter_weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model" / "adapter_model.safetensors")


def largest_state(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the bytes of optimizer state before every step of the runs that follow."""
    seen: list[int] = []
    real = Schedule.begin_step

    def begin_step(self: Schedule, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        assert self.optimizer is not None
        seen.append(state_bytes(self.optimizer))

    monkeypatch.setattr(Schedule, "begin_step", begin_step)
    return seen


@pytest.mark.parametrize("schedule", [{"name": "lisa"}, {"name": "owlore", "threshold": 1.5}], ids=lambda s: s["name"])
def test_blocks_of_lora_layers_in_turn(
    schedule: dict[str, Any], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = recipe(method="lora", schedule={**schedule, "layers": 1, "interval": 2}, optimizer="adamw_torch")
    seen = largest_state(monkeypatch)
    assert better(run(None, **fields))
    moved = {
        name.split(".layers.")[1][0]
        for name, t in adapter_weights(fields["output"]).items()
        if "_B" in name and t.any()
    }
    assert moved, "at least one block's adapters trained"
    one_block = 8 * sum(t.numel() for n, t in adapter_weights(fields["output"]).items() if ".layers.0." in n)
    assert max(seen) <= one_block * 1.1 + 4096


def test_galore_inside_lisa(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"schedule": {"name": "lisa", "layers": 1, "interval": 2, "freeze_embedding": True}}
    galore = {"optimizer": {"name": "galore", "rank": 4, "period": 2}, "train.learning_rate": 1e-2}
    seen = largest_state(monkeypatch)
    plain = recipe(method="full", **galore)
    plain["output"] += "-plain"
    assert better(run(None, **recipe(method="full", **options, **galore)))
    inside = max(seen)
    adam = recipe(method="full", **options, optimizer="adamw_torch")
    adam["output"] += "-adam"
    seen.clear()
    run(None, **adam)
    block = load_model(adam["model"]).model.get_submodule("model.layers.0")
    matrices = 8 * sum(p.numel() for p in block.parameters() if p.dim() == 2)
    assert max(seen) - inside > 0.5 * matrices, "the state of a block that trains is projected"


@pytest.mark.parametrize(
    "on", [{"method": "lora"}, {"prompts": [{"name": "dept", "num_virtual_tokens": 4, "max_length": 64}]}], ids=str
)
def test_mezo_on_adapters_and_prompts(on: dict[str, Any], recipe: Recipe) -> None:
    options = {"train.learning_rate": 3e-3, "train.max_grad_norm": 0, "train.steps": 12}
    fields = recipe(**on, optimizer={"name": "mezo", "eps": 1e-2, "samples": 4}, **options)
    run(None, **fields)
    moved = [name for name, t in adapter_weights(fields["output"]).items() if t.any()]
    assert moved
    base, tuned = load_model(fields["model"]).model, load_model(fields["output"]).model
    assert not torch.equal(logits(base, GIVEN), logits(tuned, GIVEN))


def test_spiel_on_a_base_in_four_bits(recipe: Recipe) -> None:
    options = {"name": "spiel", "density": 0.1, "interval": 2, "window": 1}
    fields = recipe(adapters=[options], model={"name": recipe()["model"], "quantization": "nf4"})
    assert better(run(None, **fields))
    held = adapter_weights(fields["output"])
    assert any(bool(t.any()) for name, t in held.items() if name.endswith("values"))


def test_the_density_loss_with_lora(recipe: Recipe) -> None:
    fields = recipe(method="lora", regularisers=[{"name": "density-finetuning", "weight": 1.0}])
    report = run(None, **fields)
    assert better(report)


def test_deltas_of_two_runs_compose_on_their_base(recipe: Recipe, tmp_path: Path) -> None:
    """As lottery tickets of two languages do: chosen entries of two tuned models, added on the base of both."""
    deltas = []
    for seed in (0, 1):
        fields = recipe(method="full", **{"train.seed": seed})
        fields["output"] += f"-{seed}"
        run(None, **fields)
        source = str(Path(fields["output"]) / "model")
        extract(source, tmp_path / f"{seed}.safetensors", base=fields["model"], keep=0.02)
        deltas.append(SparseDelta.load(tmp_path / f"{seed}.safetensors"))
    both = deltas[0] + deltas[1]
    base = Checkpoint(fields["model"])
    total = sum(base[name].numel() for name in base)
    assert all(d.count == round(0.02 * total) for d in deltas)
    assert both.count < deltas[0].count + deltas[1].count, "tuned on the same rows they share entries"
    model = load_model(fields["model"]).model
    before = logits(model, GIVEN)
    with both.applied(model):
        assert not torch.equal(logits(model, GIVEN), before)
    assert torch.equal(logits(model, GIVEN), before)


REFUSED = {
    "GaLore under an adapter": ({"method": "lora", "optimizer": "galore"}, r"galore cannot be combined with lora"),
    "LISA over sharded weights": ({"schedule": "lisa", "train": {"fsdp": True}}, r"lisa cannot run here \(train.fsdp"),
    "MeZO over sharded weights": (
        {"optimizer": "mezo", "train": {"fsdp": True}},
        r"mezo cannot run here \(train.fsdp",
    ),
    "GaLore by layers with micro-batches": (
        {
            "method": "full",
            "optimizer": {"name": "galore", "per_layer": True},
            "train": {"gradient_accumulation": 2, "max_grad_norm": 0},
        },
        r"galore cannot run here \(train.gradient_accumulation is 2",
    ),
    "dropped gradients without masks": (
        {"method": "full", "objective": "gradient-dropout"},
        r"gradient-dropout cannot run here .*the base weights train",
    ),
    "dropped gradients without gradients": (
        {"method": "mask-tuning", "objective": "gradient-dropout", "optimizer": "mezo"},
        r"gradient-dropout cannot be combined with mezo: it changes gradients",
    ),
    "SpIEL over sharded weights": ({"method": "spiel", "train": {"fsdp": True}}, r"spiel cannot run here \(train.fsdp"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_together_is_refused_before_loading(name: str, tmp_path: Path) -> None:
    fields, says = REFUSED[name]
    with pytest.raises(RecipeError, match=says):
        run({**fields, "output": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()
