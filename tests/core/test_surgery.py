"""Cut models equal masked ones, are saved and loaded, generate, and refuse what cannot be cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.zoo import DECODERS, FAMILIES, batch, checkpoint, logits, same, tiny
from tunesmith.core.surgery import Structure, cut, prune, recorded, sites
from tunesmith.errors import ModelError
from tunesmith.models.loader import load_base

TASKS = {"bert": "text-classification", "vit": "image-classification", "t5": "seq2seq"}
HEADS = tuple(family for family in FAMILIES if family != "t5")
KEPT_HEADS = ([0, 2, 3], [1])
KEPT_GROUPS = ([2, 3], [0, 1])


def wide(family: str, **changes: Any) -> nn.Module:
    """With weights large enough for every head and neuron to matter."""
    spread = {"initializer_factor": 2.0} if family == "t5" else {"initializer_range": 0.3}
    return tiny(family, **{**spread, **changes})


def uneven(model: nn.Module, heads: bool = True) -> Structure:
    """Different numbers in every block."""
    found: dict[str, dict[str, list[int]]] = {"heads": {}, "neurons": {}}
    for i, site in enumerate(sites(model).values()):
        if site.kind == "neurons":
            found["neurons"][site.output] = list(range(i % 3, site.count, 2 + i % 2))
        elif heads:
            found["heads"][site.output] = (KEPT_GROUPS if site.share == 2 else KEPT_HEADS)[i // 2 % 2]
    return Structure(found["heads"], found["neurons"])


@contextmanager
def masked(model: nn.Module, kept: Structure) -> Iterator[None]:
    """What is not kept multiplied by 0 where it is read."""
    handles = []
    for site in sites(model).values():
        mask = torch.zeros(site.count)
        mask[list(kept.of(site) or range(site.count))] = 1
        columns = mask.repeat_interleave(site.size)
        layer = model.get_submodule(site.output)
        handles.append(layer.register_forward_pre_hook(lambda _, args, m=columns: (args[0] * m,)))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_equals_the_masked_one(family: str, attention: str) -> None:
    model, given = wide(family), batch(family)
    model.set_attn_implementation(attention)
    kept = uneven(model, heads=family in HEADS)
    whole, count = logits(model, given), model.num_parameters()
    with masked(model, kept):
        expected = logits(model, given)
    assert (expected - whole).abs().max() > 0.1
    assert torch.allclose(logits(prune(model, kept), given), expected, atol=1e-5)
    assert model.num_parameters() < count
    for site in sites(model).values():
        assert kept.of(site) is None or site.count == len(kept.of(site) or ())


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_nothing(family: str) -> None:
    model = wide(family)
    before = checkpoint(model)
    every = {s.output: list(range(s.count)) for s in sites(model).values()}
    kinds = {s.output: s.kind for s in sites(model).values()}
    heads, neurons = ({n: v for n, v in every.items() if kinds[n] == k} for k in ("heads", "neurons"))
    prune(model, Structure(heads, neurons))
    assert same(checkpoint(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_is_exact(family: str, tmp_path: Path) -> None:
    model, given, task = wide(family), batch(family), TASKS.get(family, "causal-lm")
    expected = logits(prune(model, uneven(model, heads=family in HEADS)), given)
    model.save_pretrained(tmp_path)
    loaded = load_base(str(tmp_path), task)  # type: ignore[arg-type]
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, given), expected)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert same(checkpoint(load_base(str(again), task)), checkpoint(model))  # type: ignore[arg-type]
    assert load_base(str(again), task, dtype="bfloat16").dtype == torch.bfloat16  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="ismatch"):
        type(model).from_pretrained(tmp_path)


def test_a_new_head_for_other_labels(tmp_path: Path) -> None:
    model = wide("bert")
    prune(model, uneven(model))
    model.save_pretrained(tmp_path)
    loaded = load_base(str(tmp_path), "text-classification", labels=["a", "b", "c", "d", "e"])
    assert loaded.classifier.out_features == 5
    assert torch.equal(
        loaded.bert.encoder.layer[0].output.dense.weight, model.bert.encoder.layer[0].output.dense.weight
    )


@pytest.mark.parametrize("family", DECODERS)
def test_generation_with_a_cache_equals_generation_without(family: str) -> None:
    model = wide(family)
    prune(model, uneven(model))
    ids = batch(family)["input_ids"]
    told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    cached = model.generate(ids, use_cache=True, **told)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **told))
    assert cached.shape[1] == ids.shape[1] + 8


def test_cutting_twice_is_cutting_once() -> None:
    once, twice = wide("gpt2"), wide("gpt2")
    o, down = "transformer.h.1.attn.c_proj", "transformer.h.0.mlp.c_proj"
    prune(twice, Structure({o: [0, 2, 3]}, {down: list(range(0, 128, 2))}))
    prune(twice, Structure({o: [1, 2]}, {down: [0, 5, 63]}))
    prune(once, Structure({o: [2, 3]}, {down: [0, 10, 126]}))
    assert same(checkpoint(once), checkpoint(twice))
    assert recorded(once.config) == recorded(twice.config)


def test_a_cut_model_trains_with_lora() -> None:
    model, given = wide("llama"), batch("llama")
    prune(model, uneven(model))
    assert model.model.layers[0].mlp.down_proj.weight.requires_grad
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    tuned.train()(**given).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuned.parameters() if p.requires_grad)
    with pytest.raises(ModelError, match="before weights are quantised and adapters are attached"):
        cut(tuned.get_base_model(), Structure({"model.layers.0.self_attn.o_proj": [0, 1]}, {}))


@pytest.mark.parametrize(
    ("family", "kept", "message"),
    [
        ("llama", Structure({"model.layers.0.self_attn.o_proj": [0]}, {}), "2 heads each share their keys"),
        ("llama", Structure({"model.layers.0.self_attn.o_proj": [2, 3, 4, 5]}, {}), "has heads 0 to 3"),
        ("llama", Structure({"model.layers.0.self_attn.o_proj": []}, {}), "has heads 0 to 3"),
        ("llama", Structure({"model.layers.0.self_attn.o_proj": [1, 0]}, {}), "ascending"),
        ("llama", Structure({}, {"model.layers.0.mlp.down_proj": [3, 3]}), "has neurons 0 to 47"),
        ("llama", Structure({"model.layers.0.mlp.down_proj": [0]}, {}), "reads no heads of this LlamaForCausalLM"),
        ("t5", Structure({"encoder.block.1.layer.0.SelfAttention.o": [0]}, {}), "position bias has an entry per head"),
    ],
)
def test_what_cannot_be_cut_is_refused_and_nothing_changes(family: str, kept: Structure, message: str) -> None:
    model = tiny(family)
    before = checkpoint(model)
    with pytest.raises(ModelError, match=message):
        prune(model, kept)
    assert same(checkpoint(model), before)
    assert recorded(model.config) is None


class FixedAttention(nn.Module):
    """Reads the width of the model instead of the shapes of its layers."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = own.q_proj, own.k_proj, own.v_proj, own.o_proj
        self.head_dim, self.hidden_size = own.head_dim, 32

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return self.o_proj(self.v_proj(hidden_states).reshape(*hidden_states.shape[:-1], self.hidden_size)), None


def test_an_attention_that_reads_other_sizes_is_refused() -> None:
    model = tiny("llama", num_key_value_heads=4)
    model.model.layers[1].self_attn = FixedAttention(model.model.layers[1].self_attn)
    with pytest.raises(ModelError, match=r"FixedAttention reads 'hidden_size' instead of the shapes"):
        prune(model, Structure({"model.layers.1.self_attn.o_proj": [0]}, {}))


def test_what_belongs_to_heads_in_unknown_ways_is_refused() -> None:
    model = tiny("llama")
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(ModelError, match=r"self_attn\.sinks of shape \(4,\) belongs to heads"):
        prune(model, Structure({"model.layers.0.self_attn.o_proj": [0, 1]}, {}))


def test_fused_layers_of_another_layout_are_refused() -> None:
    model = tiny("gpt2")
    del model.transformer.h[0].attn.split_size
    with pytest.raises(ModelError, match="expected q, k and v, or GPT-2's fused layer"):
        sites(model)


def test_a_broken_plan_is_named() -> None:
    model = tiny("llama")
    model.config.tunesmith_structure = {"heads": [1]}
    with pytest.raises(ModelError, match="tunesmith_structure must hold `heads` and `neurons`"):
        recorded(model.config)
