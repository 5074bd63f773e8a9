"""Bottlenecks and prefixes: by hand on every family, where they stand, what is refused."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn

import tunesmith
from tests.zoo import FAMILIES, batch, checkpoint, logits, same, tiny
from tunesmith.adapters.bottleneck import Bottleneck, blocks_of
from tunesmith.core import attend
from tunesmith.errors import ModelError, RecipeError
from tunesmith.recipe import load

ON = pytest.mark.parametrize("family", FAMILIES)
ALL: dict[str, Any] = {"serial": 6, "parallel": 4, "prefix": 3}
BLOCKS = {family: 4 if family == "t5" else 2 for family in FAMILIES}
FEED_FORWARD = {  # the first layer and the last of block 0
    "llama": ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"),
    "qwen2": ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"),
    "gpt2": ("transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"),
    "opt": ("model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2"),
    "bert": ("bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"),
    "t5": ("encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block.0.layer.1.DenseReluDense.wo"),
    "vit": ("vit.layers.0.mlp.fc1", "vit.layers.0.mlp.fc2"),
}


def made(family: str, moved: bool = True, **options: Any) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """A base model, the same with bottlenecks moved off their start, and inputs, one row padded."""
    base, given = tiny(family), batch(family)
    if "attention_mask" in given:
        given["attention_mask"][1, 6:] = 0
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), tunesmith.adapter("bottleneck", **options)).eval()
    if moved:
        move(model)
    return base, model, given


def move(model: nn.Module, size: float = 0.3) -> None:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=g))


def ours(model: nn.Module) -> list[Bottleneck]:
    return [m for m in model.modules() if isinstance(m, Bottleneck)]


@ON
def test_bottlenecks_start_as_the_identity_and_a_prefix_does_not(family: str) -> None:
    base, model, given = made(family, moved=False, serial=6, parallel=4)
    expected = logits(base, given)
    assert torch.allclose(logits(model, given), expected, atol=1e-6)
    _, model, _ = made(family, moved=False, **ALL)
    assert (logits(model, given) - expected).abs().max() > 1e-4 * expected.std()


@ON
def test_the_last_feed_forward_layer_gives_the_formula(family: str) -> None:
    """f + serial(f) + 4 parallel(x), each by hand from what the plain layers saw."""
    base, model, given = made(family, serial=6, parallel=4, layers=[0])
    first, last = FEED_FORWARD[family]
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: seen.__setitem__(name, (inputs[0], output))

    base.get_submodule(first).register_forward_hook(keep("first"))
    base.get_submodule(last).register_forward_hook(keep("last"))
    model.get_base_model().get_submodule(last).register_forward_hook(keep("ours"))
    logits(base, given)
    logits(model, given)
    x, f = seen["first"][0], seen["last"][1]
    held = ours(model)[0]
    expected = f
    for narrow, read, scale in ((held.serial, f, 1.0), (held.parallel, x, 4.0)):
        hidden = F.relu(read @ narrow.down.weight.T + narrow.down.bias)
        expected = expected + scale * (hidden @ narrow.up.weight.T + narrow.up.bias)
    assert torch.allclose(seen["ours"][1], expected, atol=1e-5)
    assert (expected - f).abs().max() > 0.1


@ON
def test_a_prefix_is_attention_over_concatenated_keys(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output of the first attention of block 0, from its own queries, keys and values, softmax by hand."""
    _, model, given = made(family, serial=0, prefix=3, layers=[0])
    seen: list[tuple] = []

    class Spy:
        looks = False

        def before(self, query: Tensor, key: Tensor) -> None:
            seen.append((query, key))

        def look(self, probabilities: Tensor) -> None: ...

    attention = next(m for m in model.modules() if "tunesmith_plugs" in m.__dict__)
    values: list[Tensor] = []
    real = attend.plugged_attention

    def spied(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> Any:
        out = real(module, query, key, value, mask, **rest)
        if module is attention:
            values.extend([value, out[0], mask if rest.get("position_bias") is None else rest["position_bias"] + mask])
            values.append(query.shape[-1] ** -0.5 if rest.get("scaling") is None else rest["scaling"])
        return out

    monkeypatch.setitem(attend.AttentionInterface._global_mapping, attend.NAME, spied)
    attend.plug(attention, Spy())
    logits(model, given)
    (query, key), (value, found, mask, scaling) = seen[0], values
    held = ours(model)[0]
    heads, dim = key.shape[1], key.shape[3]
    own = held.prefix.detach().view(2, 3, heads, dim).transpose(1, 2)
    repeats = query.shape[1] // heads
    expected = torch.zeros_like(found)
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            at = head // repeats
            k, v = torch.cat([own[0, at], key[row, at]]), torch.cat([own[1, at], value[row, at]])
            scores = query[row, head] @ k.T * scaling
            if mask is not None:
                of = mask.expand(query.shape[0], query.shape[1], *mask.shape[2:])[row, head]
                scores = scores + F.pad(of[:, : key.shape[2]], (3, 0))
            expected[row, :, head] = scores.softmax(-1) @ v
    assert torch.allclose(found, expected, atol=1e-5)


@ON
def test_counts_and_numbers_of_blocks(family: str) -> None:
    base = tiny(family)
    blocks = blocks_of(base)
    assert len(blocks) == BLOCKS[family]
    for layers in (None, [1], [0, BLOCKS[family] - 1]):
        _, model, _ = made(family, **ALL, layers=layers)
        on = range(len(blocks)) if layers is None else layers
        assert model.get_nb_trainable_parameters()[0] == sum(blocks[i].count(6, 4, 3) for i in on)
        held = [i for i, adapter in enumerate(ours(model)) if adapter.serial is not None]
        assert held == list(on)
    sizes = {"t5": (32, 32), "llama": (32, 16), "qwen2": (32, 16)}.get(family, (32, 32))
    assert (blocks[0].width, blocks[0].keys) == sizes
    assert blocks[0].count(6, 4, 3) == 2 * 32 * 6 + 6 + 32 + 2 * 32 * 4 + 4 + 32 + 2 * sizes[1] * 3


@ON
def test_saved_reloaded_disabled_and_unloaded(family: str, tmp_path: Path) -> None:
    base, model, given = made(family, **ALL)
    before = getattr(base.config, "_attn_implementation", None)
    expected, plain = logits(model, given), logits(base, given)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded, given), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert (expected - plain).abs().max() > 1e-2 * plain.std()
    with model.disable_adapter():
        assert torch.allclose(logits(model, given), plain, atol=1e-5)
    assert all(held._taken is None for held in ours(model)), "a disabled adapter looks at nothing"
    with pytest.raises(ModelError, match="cannot be merged: bottlenecks are not linear"):
        model.merge_adapter()
    bare = model.unload()
    assert same(checkpoint(bare), checkpoint(base))
    assert bare.config._attn_implementation == before
    assert torch.equal(logits(bare, given), plain)
    assert not any(m.__dict__.get("tunesmith_plugs") or m._forward_pre_hooks for m in bare.modules())


@ON
def test_gradients_reach_everything(family: str) -> None:
    _, model, given = made(family, **ALL)
    model.train()(**given).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not missing
    assert all(not p.requires_grad or "tunesmith_" in n for n, p in model.named_parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_generation_with_a_cache_is_generation_without(family: str) -> None:
    _, model, given = made(family, **ALL)
    ids = given["input_ids"]
    found = [model.generate(input_ids=ids, max_new_tokens=6, use_cache=c, do_sample=False) for c in (True, False)]
    assert torch.equal(*found)


def test_checkpointing_gives_the_same_gradients_and_a_copy_is_independent() -> None:
    grads = []
    for checkpointing in (False, True):
        _, model, given = made("llama", **ALL)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()(**given).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))
    expected = logits(model, given)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for held in ours(clone):
            held.prefix.zero_()
            held.parallel.up.weight.zero_()
    changed = logits(clone, given)
    assert torch.equal(logits(model, given), expected)
    assert not torch.equal(changed, expected)
    del model
    gc.collect()
    assert torch.equal(logits(clone, given), changed)


def test_bf16_weights_and_autocast() -> None:
    for cast in (False, True):
        base, given = tiny("llama"), batch("llama")
        model = get_peft_model(base if cast else base.to(torch.bfloat16), tunesmith.adapter("bottleneck", **ALL))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            loss = model(**given).loss
        loss.backward()
        assert all(p.dtype == torch.float32 for held in ours(model) for p in held.parameters())
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_in_one_stack_with_a_lora_on_the_same_layers() -> None:
    base, given = tiny("llama"), batch("llama")
    first = tunesmith.adapter("dylora", rank=2, alpha=2)
    model = get_peft_model(copy.deepcopy(base), tunesmith.stack(first, tunesmith.adapter("bottleneck", parallel=4)))
    expected = logits(model, given)
    with torch.no_grad():
        for held in ours(model):
            held.parallel.up.weight.normal_(generator=torch.Generator().manual_seed(0))
    assert (logits(model, given) - expected).abs().max() > 1e-2
    assert torch.allclose(expected, logits(base, given), atol=1e-6)


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ModelError, match="all 0"):
        made("llama", serial=0)
    with pytest.raises(ModelError, match="numbered 0 to 1"):
        made("llama", layers=[2])
    with pytest.raises(ModelError, match="numbered 0 to 1"):
        made("llama", layers=[])
    with pytest.raises(ModelError, match=r"o_proj' is not the last.*target_modules"):
        made("llama", parallel=4, target_modules=["o_proj"])
    with pytest.raises(RecipeError, match=r"bottleneck cannot run here.*a prefix stands"):
        load({"adapters": [{"name": "bottleneck", "prefix": 2}], "data": {"padding_free": True}}).check()
    load({"adapters": [{"name": "bottleneck"}], "data": {"padding_free": True}}).check()
    _, model, given = made("llama", parallel=4)
    held = ours(model)[0]
    with pytest.raises(ModelError, match="did not see the input"):
        held(torch.zeros(1, 2, 48), lambda x: torch.zeros(1, 2, 32))
    with pytest.raises(ModelError, match="no change of a weight"):
        held.weight(torch.zeros(32, 48))
    logits(model, given)
    assert all(adapter._taken is None for adapter in ours(model)), "nothing is held from pass to pass"


def test_a_prefix_is_pefts_prefix_tuning() -> None:
    """PEFT puts its prefix into the cache, so that its rows begin at the position after it; ours begin at 0."""
    base, model, given = made("llama", serial=0, prefix=3)
    ids = given["input_ids"]
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs = get_peft_model(copy.deepcopy(base), config).eval()
    rows = [held.prefix.detach()[which] for held in ours(model) for which in (0, 1)]  # keys, values by block
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(torch.cat(rows, dim=1))
    expected = logits(theirs, {"input_ids": ids})
    assert (expected - logits(base, {"input_ids": ids})).abs().max() > 1e-2
    moved = {"input_ids": ids, "position_ids": torch.arange(3, 12).expand(2, -1)}
    assert torch.allclose(logits(model, moved), expected, atol=1e-5)
