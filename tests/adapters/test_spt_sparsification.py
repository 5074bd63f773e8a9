"""SPT in whole models: the dense model it comes from, by hand, its stages, caches, and what it refuses."""

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
from tests.train.conftest import data_file, model_folder, recipe  # noqa: F401
from tests.train.resuming import resumed, weights
from tests.train.test_processes import compared  # noqa: F401
from tests.zoo import DECODERS, FAMILIES, batch, checkpoint, logits, same, tiny
from tunesmith.adapters.spt_sparsification import SPTSparsification
from tunesmith.core import attend, product_codes
from tunesmith.core.product_codes import Sight
from tunesmith.errors import ModelError, RecipeError, TunesmithError
from tunesmith.recipe import load
from tunesmith.train import run

SLUG = "spt-sparsification"
ON = pytest.mark.parametrize("family", FAMILIES)
ALL: dict[str, Any] = {"keys": 1.0, "active": 4, "router": "even"}
FIRST = {  # the layers of the first feed-forward, last one last, and its nonlinearity
    "llama": ("model.layers.0.mlp", ("gate_proj", "up_proj", "down_proj"), F.silu),
    "qwen2": ("model.layers.0.mlp", ("gate_proj", "up_proj", "down_proj"), F.silu),
    "gpt2": ("transformer.h.0.mlp", ("c_fc", "c_proj"), lambda x: F.gelu(x, approximate="tanh")),
    "opt": ("model.decoder.layers.0", ("fc1", "fc2"), F.relu),
    "bert": ("bert.encoder.layer.0", ("intermediate.dense", "output.dense"), F.gelu),
    "t5": ("encoder.block.0.layer.1.DenseReluDense", ("wi", "wo"), F.relu),
    "vit": ("vit.layers.0.mlp", ("fc1", "fc2"), F.gelu),
}


def adapted(family: str = "llama", base: nn.Module | None = None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(base or tiny(family, initializer_range=0.3), tunesmith.adapter(SLUG, **options)).eval()


def ours(model: nn.Module) -> list[SPTSparsification]:
    return [m for m in model.modules() if isinstance(m, SPTSparsification)]


def books(model: nn.Module) -> list[product_codes.Codebook]:
    return [made.codebook for made in ours(model) if made.codebook is not None]


def sparse(model: nn.Module, used: bool = True) -> nn.Module:
    for book in books(model):
        book.used.fill_(used)
    return model


def move(model: nn.Module, size: float = 0.1) -> nn.Module:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=g))
    return model


def padded(family: str) -> dict[str, Tensor]:
    given = batch(family)
    if "attention_mask" in given:
        given["attention_mask"][1, 6:] = 0
    return given


def train(model: nn.Module, steps: range, total: int = 12, **changes: Any) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for t in steps:
        with tunesmith.step(model.train(), t, total):
            model(**batch("llama", seed=t)).loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@ON
def test_with_all_keys_and_blocks_it_is_the_dense_model(family: str, attention: str) -> None:
    """Also with padding; switched off it is the model to the bit, in either attention."""
    base, given = tiny(family), padded(family)
    base.set_attn_implementation(attention)
    expected = logits(base, given)
    model = sparse(adapted(base=copy.deepcopy(base), **ALL))
    real = given["attention_mask"].bool() if family in DECODERS else slice(None)
    difference = (logits(model, given) - expected)[real].abs().max()
    assert 0 < difference <= 1e-5 * max(1.0, float(expected.abs().max())), "another computation, the same function"
    with move(model).disable_adapter():
        assert torch.equal(logits(model, given), expected)
    bare = model.unload()
    assert bare.config._attn_implementation == attention
    assert same(checkpoint(bare), checkpoint(base))
    assert not any(m.__dict__.get("tunesmith_selectors") for m in bare.modules())


@ON
def test_the_routed_feed_forward_by_hand(family: str) -> None:
    """Token by token from the frozen layers, with LoRA on each: 2 p on the frozen parts alone, biases with theirs."""
    model = move(adapted(family, keys=0, rank=3, alpha=6.0))
    at, names, phi = FIRST[family]
    layers = [model.get_base_model().get_submodule(f"{at}.{name}") for name in names]
    seen: dict[str, Tensor] = {}
    layers[0].register_forward_pre_hook(lambda m, given: seen.__setitem__("x", given[0]))
    layers[-1].register_forward_hook(lambda m, given, out: seen.__setitem__("y", out))
    logits(model, padded(family))
    held = [layer.active()[0] for layer in layers]
    frozen = [(layer.original_weight(), layer.get_base_layer().bias) for layer in layers]
    router = held[-1].router
    x, y = (seen[name].flatten(0, -2) for name in ("x", "y"))
    width = len(frozen[0][0]) // 4
    routes = set()
    for token, found in zip(x, y, strict=True):
        p = torch.sigmoid(router.weight @ token + router.bias)
        blocks = p.topk(2).indices.tolist()
        routes.add(tuple(blocks))
        total = torch.zeros_like(found) if frozen[-1][1] is None else frozen[-1][1].clone()
        for g in blocks:
            rows = slice(g * width, (g + 1) * width)
            parts = []
            for made, (W, b) in zip(held[:-1], frozen[:-1], strict=True):
                own = W[rows] @ token + (0 if b is None else b[rows])
                parts.append(2 * p[g] * own + 2 * made.B[rows] @ (made.A @ token))
            h = phi(parts[0]) * (parts[1] if len(parts) == 2 else 1)
            total = total + 2 * p[g] * (frozen[-1][0][:, rows] @ h) + 2 * held[-1].B @ (held[-1].A[:, rows] @ h)
        assert torch.allclose(found, total, atol=1e-4, rtol=1e-4)
    assert len(routes) > 1


@pytest.mark.parametrize("keys", [0.25, 3])
def test_no_token_hears_of_later_ones_or_of_padding(keys: float) -> None:
    """A number of keys: any later token may change. A share: rows are what they are alone, padded on either side."""
    model = move(sparse(adapted(keys=keys)))
    ids = batch("llama", length=12)["input_ids"]
    whole = logits(model, {"input_ids": ids})
    if keys > 1:
        assert torch.allclose(logits(model, {"input_ids": ids[:, :7]}), whole[:, :7], atol=1e-5)
    short = ids[1:, :7]
    alone = logits(model, {"input_ids": short})
    rest = torch.zeros(1, 5, dtype=torch.long)
    for left in (False, True):
        row = torch.cat([rest, short] if left else [short, rest], 1)
        mask = torch.cat([ids[:1], row]).ne(0).long()
        given = {"input_ids": torch.cat([ids[:1], row]), "attention_mask": mask}
        given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        found = logits(model, given)[1]
        assert torch.allclose(found[5:] if left else found[:7], alone[0], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_generation_with_a_cache_is_generation_without(family: str) -> None:
    """With a number of keys; one query for many keys, beams, and a static cache. A share grows with the row."""
    model = move(sparse(adapted(family, keys=2)))
    ids = batch(family, length=7)["input_ids"]
    plain = model.generate(input_ids=ids, max_new_tokens=8, use_cache=False, do_sample=False)
    kinds: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}] if family == "llama" else [{}]
    for kind in kinds:
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, **kind), plain)
    search = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    beams = [model.generate(input_ids=ids, use_cache=cached, **search) for cached in (True, False)]
    assert torch.equal(*beams)
    share = move(sparse(adapted(family)))
    assert share.generate(input_ids=ids, max_new_tokens=4, do_sample=False).shape == (2, 11)


def test_queries_and_keys_are_told_apart_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A codebook per layer; keys are encoded once for the heads that share them."""
    model = sparse(adapted(keys=2))
    shapes: list[tuple[int, ...]] = []
    real = product_codes.Codebook.encode
    monkeypatch.setattr(
        product_codes.Codebook, "encode", lambda self, z: (shapes.append(tuple(z.shape)), real(self, z))[1]
    )
    logits(model, batch("llama"))
    assert shapes == [(2, 4, 9, 8), (2, 2, 9, 8)] * 2
    assert not torch.equal(books(model)[0].words, books(model)[1].words)
    assert books(model)[0].words.shape == (1, 16, 8)


def test_stages() -> None:
    """Dense and learning, then sparse and still; `codebook_every` goes on; a share of the run is at least a step."""
    for every in (0, 2):
        model = adapted(codebook_steps=3, codebook_every=every)
        dense = adapted(keys=0)
        for t in range(8):
            before = [book.words.clone() for book in books(model)]
            for one in (model, dense):
                train(one, range(t, t + 1))
            moved = {not torch.equal(a, book.words) for a, book in zip(before, books(model), strict=True)}
            learns = t < 3 or bool(every and (t - 3) % every == 0)
            assert moved == {learns}
            assert all(bool(book.used) == (t >= 3) for book in books(model))
            equal = torch.equal(logits(model, batch("llama")), logits(dense, batch("llama")))
            assert equal == (t < 3), "the codewords' loss reaches nothing else, and attention is dense, up to then"
    for total, until in ((12, 1), (40, 4), (1, 0)):
        model = adapted()
        for t in range(min(total, until + 1)):
            with tunesmith.step(model, t, total):
                assert all(bool(book.used) == (t >= until) for book in books(model))


def test_a_gradient_comes_through_kept_logits_and_the_factor() -> None:
    """In the sparse stage queries, keys and values train, and the router by 2 p; checkpointed the same."""
    found = []
    for checkpointing in (False, True):
        model = move(adapted(codebook_steps=1, codebook_every=1))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        with tunesmith.step(model.train(), 2, 12):
            model(**padded("llama")).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        found[-1] |= {str(i): book.words.clone() for i, book in enumerate(books(model))}
    for name, plain in found[0].items():
        assert bool(plain.any()), name
        assert torch.allclose(plain, found[1][name], atol=1e-6), name


def test_micro_batches_and_padding_count_by_their_tokens() -> None:
    given, results = padded("llama"), []
    for pieces in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        model = adapted(codebook_steps=3)
        with tunesmith.step(model.train(), 0, 12):
            for piece in pieces:
                model(**{name: value[piece] for name, value in given.items()})
        results.append([book.words.clone() for book in books(model)])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


def test_saved_in_either_stage_it_is_loaded_in_that_stage(tmp_path: Path) -> None:
    for steps in (2, 6):
        model = train(adapted(codebook_steps=3), range(steps))
        model.save_pretrained(tmp_path / str(steps))
        loaded = PeftModel.from_pretrained(tiny("llama", initializer_range=0.3), tmp_path / str(steps))
        assert torch.equal(logits(loaded, batch("llama")), logits(model, batch("llama")))
        assert {bool(book.used) for book in books(loaded)} == {steps == 6}


FIELDS: dict[str, Any] = {"adapters": [{"name": SLUG, "codebook_steps": 4, "codebook_every": 2}]}


def test_stopped_and_resumed_is_bitwise_the_same(
    recipe: Callable[..., dict[str, Any]],  # noqa: F811
    tmp_path: Path,
) -> None:
    fields = recipe(**FIELDS, **{"train.save_every": 1})
    run(None, **fields)
    expected = weights(fields["output"])
    assert any(name.endswith("words") for name in expected)
    # At step 6 attention is sparse, and codewords go on.
    assert same(resumed(fields, tmp_path / "stopped", 6), expected)


def test_what_cannot_be() -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"no layer among its targets is the output layer of a self-attention.*keys=0", {"target_modules": ["q_proj"]}),
        (
            r"no layer among its targets is the output layer of a feed-forward.*blocks=0",
            {"target_modules": ["o_proj"]},
        ),
        (
            r"'model.layers.0.mlp.gate_proj' is not among its targets",
            {"target_modules": ["o_proj", "up_proj", "down_proj"]},
        ),
        (r"48 neurons, which blocks=5 does not divide; take one of \[2, 3, 4, 6", {"blocks": 5}),
        (r"heads of 8 numbers.*subvector=3; take one of \[1, 2, 4, 8\]", {"subvector": 3}),
    ]
    for message, options in cases:
        with pytest.raises(ModelError, match=message):
            adapted(**options)
    for message, options in (("active=5 of blocks=4", {"active": 5}), ("keys=2.5", {"keys": 2.5})):
        with pytest.raises(RecipeError, match=message):
            adapted(**options)
    with (
        pytest.raises(TunesmithError, match="codebook_steps=9 leaves none of the 9 steps"),
        tunesmith.step(adapted(codebook_steps=9), 0, 9),
    ):
        pass
    with pytest.raises(TunesmithError, match="total=STEPS"), tunesmith.step(adapted(), 0):
        pass
    plugged = tiny("llama")
    attend.enable(plugged)
    with pytest.raises(ModelError, match="by 'tunesmith_plugged'; attention over selected keys goes with"):
        adapted(base=plugged)
    stacked = tunesmith.stack(tunesmith.adapter(SLUG), tunesmith.adapter("ssf"))
    with pytest.raises(ModelError, match="must be alone in its stack"):
        get_peft_model(tiny("llama"), stacked)
    for other in ({"adapters": [SLUG, "ssf"]}, {"adapters": [SLUG], "data": {"padding_free": True}}):
        with pytest.raises(RecipeError, match=SLUG):
            load(other).check()


def test_a_sparse_part_alone_and_none_at_all() -> None:
    """LoRA on some layers with routed feed-forwards alone; with neither it merges and exports."""
    model = move(adapted(keys=0, target_modules=["gate_proj", "up_proj", "down_proj", "q_proj"]))
    assert not books(model)
    assert model.get_base_model().config._attn_implementation == "sdpa"
    plain = move(adapted(keys=0, blocks=0))
    expected = logits(plain, batch("llama"))
    assert ours(plain)[0].to_lora() is not None
    merged = plain.merge_and_unload()
    assert torch.allclose(logits(merged, batch("llama")), expected, atol=1e-4)
    with pytest.raises(ModelError, match="cannot be merged: its LoRA is a change of weights, but the keys"):
        adapted(blocks=0).merge_adapter()


def test_cross_attention_stays_dense() -> None:
    model = adapted("t5")
    selecting = [name for name, m in model.named_modules() if m.__dict__.get("tunesmith_selectors")]
    assert len(selecting) == 4
    assert all(name.endswith("SelfAttention") for name in selecting)


def test_learning_needs_no_padding_mask_and_ignores_what_it_hides() -> None:
    """Numbers under the padding change no codeword."""
    results = []
    for filler in (0, 9):
        given = padded("llama")
        given["input_ids"][1, 6:] = filler
        model = adapted(codebook_steps=3)
        with tunesmith.step(model.train(), 0, 12):
            model(**given)
        results.append([book.words.clone() for book in books(model)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert Sight(3, 3, None, True).seen() is None


def test_more_of_sparse_attention_costs_no_matrix() -> None:
    """Attention of the sparse stage keeps two bytes a kept key and no (n, n) numbers; dropout a byte more."""
    base = tiny("llama", max_position_embeddings=256, attention_dropout=0.1)
    base.set_attn_implementation("eager")
    model = sparse(adapted(base=base, keys=0.125, blocks=0))
    ids = torch.randint(3, 64, (1, 256), generator=torch.Generator().manual_seed(0))
    kept: list[tuple[int, int]] = []

    def pack(t: Tensor) -> Tensor:
        kept.append((t.numel(), t.untyped_storage().nbytes()))
        return t

    with tunesmith.step(model, 5, 12), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.train()(input_ids=ids)
    assert max(size for _, size in kept) == 4 * 256 * 256, "the mask that all layers share"
    indices, stays = ([size for n, size in kept if n == size // one == 4 * 256 * 32] for one in (2, 1))
    assert len(indices) == len(stays) == 2
