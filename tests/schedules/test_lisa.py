"""What is special to LISA."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.zoo import batch, tiny
from tunesmith import catalog
from tunesmith.core.meters import state_bytes
from tunesmith.errors import RecipeError, TunesmithError
from tunesmith.schedules.lisa import LISA


def attached(model: nn.Module, **options: Any) -> LISA:
    schedule = LISA(**options)
    schedule.attach(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    return schedule


def training(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


@given(n=st.integers(1, 8), gamma=st.integers(1, 8), interval=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_gamma_of_n_in_each_period(n: int, gamma: int, interval: int, seed: int) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(n))
    if gamma > n:
        with pytest.raises(TunesmithError, match=f"only {n} of the {n} blocks"):
            attached(model, layers=gamma)
        return
    schedule = attached(model, layers=gamma, interval=interval, seed=seed)
    for step in range(12):
        blocks = {name.split(".")[1] for name in schedule.active(step)}
        assert len(blocks) == gamma
        assert schedule.active(step) == schedule.active(step - step % interval)


def test_draws_follow_the_weights() -> None:
    """Inclusion frequencies against the exact law of drawing one after the other, enumerated."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
    weights = [4.0, 2.0, 1.0, 1.0, 0.0]
    schedule = attached(model, layers=2, weights=weights)
    total, exact = sum(weights), [0.0] * 5
    for a, b in itertools.permutations(range(5), 2):
        chance = weights[a] / total * weights[b] / (total - weights[a])
        exact[a] += chance
        exact[b] += chance
    n = 3000
    counts = [0] * 5
    for period in range(n):
        for block in schedule.chosen(period):
            counts[block] += 1
    for count, p in zip(counts, exact, strict=True):
        assert abs(count / n - p) <= 4 * math.sqrt(p * (1 - p) / n)
    assert counts[4] == 0


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 0.0]])
def test_weights_must_fit_the_blocks(weights: list[float]) -> None:
    with pytest.raises(TunesmithError, match="each of the 2 blocks a number, at least layers=2 of them above zero"):
        attached(tiny("llama"), layers=2, weights=weights)


@pytest.mark.parametrize("options", [{"layers": 0}, {"interval": 0}, {"weights": []}, {"weights": [-1.0]}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        catalog.get("lisa").validate(options)


def test_what_stands_outside_of_the_blocks_trains_always() -> None:
    model = tiny("llama")
    schedule = attached(model, layers=1, interval=1)
    for step in range(4):
        assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} < set(schedule.active(step))


def test_the_embedding_and_what_is_tied_to_it_can_be_left_out() -> None:
    untied = attached(tiny("llama"), freeze_embedding=True)
    assert untied.always == {"model.norm.weight", "lm_head.weight"}
    tied = attached(tiny("gpt2"), freeze_embedding=True)
    assert tied.always == {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    bert = attached(tiny("bert"), freeze_embedding=True)
    assert not any("embeddings" in name for name in bert.always)
    assert "classifier.weight" in bert.always


class Named(nn.Module):
    """A model whose head is called an embedding, as GPT-NeoX's was."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_in, self.embed_out = nn.Embedding(5, 2), nn.Linear(2, 5)
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_in

    def get_output_embeddings(self) -> nn.Module:
        return self.embed_out


def test_a_head_that_is_called_an_embedding_is_a_head() -> None:
    assert attached(Named(), freeze_embedding=True).always == {"embed_out.weight", "embed_out.bias"}


def test_both_stacks_of_an_encoder_decoder_are_one_urn() -> None:
    model = tiny("t5")
    schedule = attached(model, layers=1, interval=1)
    assert len(schedule.members) == 4
    seen = {name.split(".")[0] for step in range(20) for name in schedule.active(step) if ".block." in name}
    assert seen == {"encoder", "decoder"}


def test_adapters_inside_the_blocks_take_turns() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[1, 2, 3])
    model = peft.get_peft_model(tiny("llama", num_hidden_layers=5), config)
    schedule = attached(model, layers=1, interval=1)
    assert len(schedule.members) == 3, "a block without an adapter cannot be chosen"
    for step in range(6):
        schedule.begin_step(step)
        assert len(training(model)) == 4
        assert len({name.split("layers.")[1][0] for name in training(model)}) == 1


def test_nothing_in_the_blocks_is_a_clear_error() -> None:
    model = tiny("llama")
    for name, p in model.named_parameters():
        p.requires_grad_(".layers." not in name)
    with pytest.raises(TunesmithError, match="only 0 of the 2 blocks of LlamaForCausalLM"):
        attached(model, layers=1)


def test_a_layer_shared_by_two_blocks_trains_with_either() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    model.layers[2].weight = model.layers[0].weight
    schedule = attached(model, layers=1, interval=1)
    for step in range(20):
        if schedule.chosen(step)[0] in (0, 2):
            assert "layers.0.weight" in schedule.active(step)


def test_state_never_exceeds_that_of_the_largest_choice() -> None:
    model, inputs = tiny("llama", num_hidden_layers=6), batch("llama")
    schedule = attached(model, layers=2, interval=1)
    assert schedule.optimizer is not None
    seen = set()
    for step in range(20):
        schedule.begin_step(step)
        model(**inputs).loss.backward()
        schedule.optimizer.step()
        schedule.optimizer.zero_grad()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert state_bytes(schedule.optimizer) == 8 * sum(p.numel() for p in trained) + 4 * len(trained)
        seen |= set(schedule.chosen(step))
    assert seen == set(range(6))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("freeze", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool, freeze: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = tiny("llama", num_hidden_layers=4).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        attached(model, layers=2, freeze_embedding=freeze).begin_step(0)
        model(**batch("llama")).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    assert any(".layers." in name for name in results[0])
    for name, grad in results[0].items():
        assert torch.allclose(grad, results[1][name], atol=1e-6)


@pytest.mark.distributed
def test_under_data_parallel(tmp_path: Path) -> None:
    """What is left out would stop a reducer that waits for every gradient: `find_unused_parameters` is needed."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        plain, wrapped = tiny("llama", num_hidden_layers=4), tiny("llama", num_hidden_layers=4)
        parallel = DistributedDataParallel(wrapped, find_unused_parameters=True)
        for model, call in ((plain, plain), (wrapped, parallel)):
            schedule = attached(model, layers=1, interval=1)
            assert schedule.optimizer is not None
            for step in range(6):
                schedule.begin_step(step)
                call(**batch("llama")).loss.backward()
                assert {n for n, p in model.named_parameters() if p.grad is not None} == training(model)
                schedule.optimizer.step()
                schedule.optimizer.zero_grad()
        for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    finally:
        dist.destroy_process_group()
