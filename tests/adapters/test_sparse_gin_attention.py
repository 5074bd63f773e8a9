"""What is special to Sparse-GIN attention."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache

import tunesmith
from tests.zoo import batch, logits, tiny
from tunesmith.adapters.sparse_gin_attention import SparseGINAttention
from tunesmith.core.layer import describe
from tunesmith.core.tuner_layer import TunesmithLayer
from tunesmith.errors import ModelError

SLUG = "sparse-gin-attention"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "opt post-norm": ("opt", {"do_layer_norm_before": False}),
    "bert": ("bert", {}),
    "t5": ("t5", {}),
    "vit": ("vit", {}),
}
CAUSAL = pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("bert", "t5", "vit")])


def adapted(kind: str, size: float = 0.2, **options: object) -> tuple[nn.Module, nn.Module]:
    """A base and the same with the adapter off its start; width 8, an edge where an attention of 0.12 is."""
    family, changes = KINDS[kind]
    base = tiny(family, **changes)
    with torch.no_grad():
        for name, p in base.named_parameters():  # tiny models attend evenly; these do not
            if any(word in name for word in ("q_proj", "k_proj", "c_attn", "query", "key", "SelfAttention.q")):
                p.mul_(8)
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), tunesmith.adapter(SLUG, **{"width": 8, "dropout": 0.0, **options}))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=g))
    return base, model.eval()


def layers(model: nn.Module) -> list[SparseGINAttention]:
    return [m for m in model.modules() if isinstance(m, SparseGINAttention)]


def alone(**options: Any) -> SparseGINAttention:
    """One adapter of width 4 on a layer of 6, in no model."""
    torch.manual_seed(0)
    return SparseGINAttention(describe(nn.Linear(6, 6), "layer"), **{"width": 4, "causal": True, **options}).eval()


def padded(family: str, left: bool = False) -> dict[str, Tensor]:
    given = batch(family)
    if "attention_mask" in given:
        given["attention_mask"][1, :3] = 0
        if not left:
            given = {k: v.flip(1) if k == "attention_mask" else v for k, v in given.items()}
    return given


def by_hand(made: SparseGINAttention, h: Tensor, A: Tensor) -> Tensor:
    """What is added to the output of every token, pair by pair."""
    n = made.project(h)
    B, T = h.shape[:2]
    u = made.epsilon * n
    for b in range(B):
        for i in range(T):
            for j in range(i + 1 if made.causal else T):
                E = float(torch.sigmoid(10 * (A[b, :, i, j].sum().clamp(max=1) - 0.1)))
                if E > 0.6:
                    u[b, i] = u[b, i] + E * n[b, j]
    v = made.phi(made.second(made.phi(made.first(u))) + u)
    out = made.back(v)
    return made.scale * out * (out.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * made.norm.weight


@pytest.mark.parametrize("kind", list(KINDS))
@torch.no_grad()
def test_adds_what_the_equations_say_in_every_family(kind: str) -> None:
    _, model = adapted(kind)
    read: dict[str, Tensor] = {}
    shown: dict[str, Tensor] = {}
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, TunesmithLayer)]
    checks = []

    def keep(name: str) -> Any:
        return lambda m, args, kwargs: read.__setitem__(name, args[0] if args else kwargs["hidden_states"])

    def show(name: str, made: SparseGINAttention) -> None:
        look = made.look

        def seen(A: Tensor) -> None:
            shown[name] = A
            look(A)

        made.look = seen  # type: ignore[method-assign, assignment]

    def compare(name: str, layer: TunesmithLayer) -> Any:
        def hook(m: nn.Module, args: tuple, out: Tensor) -> None:
            y = layer.base_layer(args[0])
            wanted = by_hand(layer.active()[0], read[name] + y, shown[name])  # type: ignore[arg-type]
            checks.append(float((out - y - wanted).abs().max() / wanted.abs().max()))

        return hook

    for name, layer in found:
        words = name.split(".")
        at = next(i for i, word in enumerate(words) if word.isdigit())
        model.get_submodule(".".join(words[: at + 1])).register_forward_pre_hook(keep(name), with_kwargs=True)
        show(name, layer.active()[0])  # type: ignore[arg-type]
        layer.register_forward_hook(compare(name, layer))
    model(**padded(KINDS[kind][0]))
    assert len(checks) == len(found) == (4 if kind == "t5" else 2)
    assert max(checks) < 1e-5


def test_stands_on_self_attention_alone() -> None:
    _, model = adapted("t5")
    names = [made.layer.name for made in layers(model)]
    assert [n.split(".")[0] for n in names] == ["encoder"] * 2 + ["decoder"] * 2
    assert all("SelfAttention.o" in n for n in names)
    assert [made.causal for made in layers(model)] == [False, False, True, True]
    for targets in (["EncDecAttention.o"], ["wi"]):
        with pytest.raises(ModelError, match=r"output layer of a block's self-attention, which"):
            get_peft_model(tiny("t5"), tunesmith.adapter(SLUG, target_modules=targets))


@CAUSAL
def test_no_token_hears_of_a_later_one(kind: str) -> None:
    _, model = adapted(kind)
    given = batch(KINDS[kind][0])
    for training in (False, True):
        outs = []
        for token in (5, 6):
            given["input_ids"][:, 4] = token
            model.train(training)
            torch.manual_seed(0)
            with torch.no_grad():
                outs.append(model(**given).logits)
        assert torch.allclose(outs[0][:, :4], outs[1][:, :4], atol=1e-6)
        assert not torch.allclose(outs[0][:, 5:], outs[1][:, 5:], atol=1e-3)


@CAUSAL
@pytest.mark.parametrize("left", [False, True])
def test_padding_does_not_change_a_row(kind: str, left: bool) -> None:
    _, model = adapted(kind, cut=0.0)  # every seen pair is joined
    given = padded(KINDS[kind][0], left)
    real = given["attention_mask"][1].bool()
    if left and kind not in ("opt", "opt post-norm"):
        given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    given["input_ids"][1, ~real] = 7
    found = logits(model, given)[1, real]
    row = {"input_ids": given["input_ids"][1:, real]}
    assert torch.allclose(found, logits(model, row)[0], atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "t5"])
@pytest.mark.parametrize("ways", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_generation_with_a_cache_is_generation_without(kind: str, ways: dict[str, int]) -> None:
    _, model = adapted(kind, 0.5)
    given = padded(KINDS[kind][0], left=True)
    given = {k: given[k] for k in ("input_ids", "attention_mask")}
    outs = [
        model.generate(
            **given,
            max_new_tokens=8,
            min_new_tokens=8,
            use_cache=cache,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            **ways,
        )
        for cache in (True, False)
    ]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    for a, b in zip(outs[0].scores, outs[1].scores, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@torch.no_grad()
def test_a_cache_is_cropped_reordered_and_reset_with_its_nodes() -> None:
    _, model = adapted("llama")
    ids = batch("llama")["input_ids"]
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache)
    cache.crop(-4)
    cache.reorder_cache(torch.tensor([1, 0]))
    kept = copy.deepcopy(cache)
    for held in (cache, kept):
        swapped = torch.cat([ids.flip(0)[:, :5], ids[:, 5:]], 1)
        out = model(input_ids=ids[:, 5:], past_key_values=held).logits
        assert torch.allclose(out, model(input_ids=swapped, use_cache=False).logits[:, 5:], atol=1e-5)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    out = model(input_ids=ids[:, :2], past_key_values=cache).logits
    row = torch.cat([swapped[1:].expand(2, -1), ids[:, :2]], 1)
    assert torch.allclose(out, model(input_ids=row, use_cache=False).logits[:, 9:], atol=1e-5)
    cache.reset()
    out = model(input_ids=ids, past_key_values=cache).logits
    assert torch.allclose(out, model(input_ids=ids, use_cache=False).logits, atol=1e-5)


@torch.no_grad()
def test_caches_that_do_not_hold_the_nodes_are_refused() -> None:
    _, model = adapted("llama")
    ids = batch("llama")["input_ids"]
    with model.disable_adapter():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ModelError, match=r"sees 11 tokens, of which the graph knows 2.*use_cache=False"):
        model(input_ids=ids[:, :2], past_key_values=cache)
    with pytest.raises(ModelError, match=r"not in a StaticLayer.*use_cache=False"):
        model.generate(input_ids=ids, max_new_tokens=2, cache_implementation="static", disable_compile=True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "opt", "opt post-norm", "gpt2"])
def test_checkpointing_with_two_passes_before_the_backward_pass(kind: str, reentrant: bool) -> None:
    """The recomputation of the first pass must not see what the second left."""
    grads, family = [], KINDS[kind][0]
    for checkpointing in (False, True):
        _, model = adapted(kind, dropout=0.1)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(0)
        (model(**batch(family)).loss - 2 * model(**batch(family, seed=1)).loss).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*grads, strict=True):
        assert plain is not None
        assert torch.allclose(plain, recomputed, atol=1e-5)


def test_aggregations() -> None:
    A = torch.tensor([[[[0.06, 0.0], [0.3, 0.09]], [[0.05, 0.0], [0.9, 0.03]]]])  # two heads
    for aggregation, wanted in (
        ("sum", [[0.11, 0.0], [1.0, 0.12]]),
        ("mean", [[0.055, 0.0], [0.6, 0.06]]),
        ("any", torch.sigmoid((A.amax(1)[0] - 0.1) / 0.01).tolist()),
    ):
        E = torch.sigmoid(10 * (torch.tensor(wanted) - 0.1)) * torch.tensor([[1, 0], [1, 1]])
        assert torch.allclose(alone(aggregation=aggregation, cut=0.0).edges(A)[0], E, atol=1e-5), aggregation
        kept = torch.where(E > 0.6, E, 0)
        assert torch.allclose(alone(aggregation=aggregation).edges(A)[0], kept, atol=1e-5), aggregation
    assert torch.allclose(alone(alpha=0, cut=0.115).edges(A)[0], torch.tensor([[0.0, 0], [1, 0.12]]))
    loops = alone(cut=0.0, self_loops_only=True).edges(A)[0]
    assert torch.equal(loops, alone(cut=0.0).edges(A)[0].diag().diag())


def test_the_learned_aggregation_learns_through_every_part_and_is_saved(tmp_path: Path) -> None:
    base, model = adapted("llama", aggregation="mlp", cut=0.0)
    expected = logits(model, batch("llama"))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path), batch("llama")), expected)
    made = layers(model)[1]
    assert made.heads is not None
    assert made.heads[0].weight.shape == (128, 4)
    model(**batch("llama")).loss.backward()
    assert all(bool(p.grad.any()) for p in made.heads.parameters())
    A = torch.softmax(torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0)), -1)
    wanted = torch.sigmoid(10 * (torch.sigmoid(made.heads(A.movedim(1, -1))).squeeze(-1) - 0.1)).tril()
    assert torch.allclose(made.edges(A), wanted, atol=1e-6)


def test_bidirectional_models_can_be_made_causal() -> None:
    A = torch.full((1, 2, 3, 3), 0.3)
    assert bool((alone(causal=False).edges(A) > 0).all())
    assert torch.equal(alone().edges(A) > 0, torch.ones(1, 3, 3).tril().bool())
    assert torch.equal(alone().edges(A[:, :, 1:]) > 0, torch.ones(1, 3, 3).tril().bool()[:, 1:]), "with a past"
    assert all(made.causal is True for made in layers(adapted("bert", causal=True)[1]))


def test_gradients_reach_the_attention_of_earlier_blocks_by_the_graph() -> None:
    A = torch.full((1, 2, 2, 2), 0.1).requires_grad_()
    alone().edges(A).sum().backward()
    assert A.grad is not None
    assert torch.equal(A.grad[0, 0] > 0, torch.ones(2, 2).tril().bool())


def test_scales_rise_over_depth_and_identity_is_zero() -> None:
    for count, wanted in ((1, [0.0]), (3, [0.0, 0.25, 0.5])):
        model = get_peft_model(tiny("llama", num_hidden_layers=count), tunesmith.adapter(SLUG))
        assert [float(made.scale) for made in layers(model)] == wanted
    model = get_peft_model(tiny("llama"), tunesmith.adapter(SLUG, first_scale=0.1, last_scale=0.3))
    assert [float(made.scale) for made in layers(model)] == pytest.approx([0.1, 0.3])
    model = get_peft_model(tiny("llama"), tunesmith.adapter(SLUG, init="identity"))
    assert [float(made.scale) for made in layers(model)] == [0, 0]


def test_the_width_of_the_model_needs_no_projection() -> None:
    model = get_peft_model(tiny("llama"), tunesmith.adapter(SLUG, width=32, hidden_multiplier=0.5))
    assert {n.split(".")[0] for n, _ in layers(model)[0].named_parameters()} == {
        *("first", "second", "norm", "phi", "epsilon", "scale")
    }
    assert layers(model)[0].trainable_count() == 32 * 16 + 16 + 16 * 32 + 32 + 32 + 1 + 1 + 1


def test_thresholds_that_leave_no_edge_are_refused() -> None:
    with pytest.raises(ModelError, match=r"weighs at most 0\.269.*lower `cut`"):
        alone(alpha=1.0, threshold=2.0, cut=0.6)


def test_it_cannot_be_merged() -> None:
    with pytest.raises(ModelError, match=r"cannot be merged: what it adds depends on all tokens"):
        adapted("llama")[1].merge_and_unload()


def test_attention_is_given_back_with_the_last_adapter() -> None:
    base, model = adapted("llama")
    before = base.config._attn_implementation
    assert model.config._attn_implementation != before
    plain = model.unload()
    assert plain.config._attn_implementation == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    assert torch.equal(logits(plain, batch("llama")), logits(base, batch("llama")))


def test_a_norm_wrapped_afterwards_is_an_error_and_before_is_not() -> None:
    given = batch("llama")
    ssf = tunesmith.adapter("ssf", target_modules=["input_layernorm"], std=0.5)
    gin = tunesmith.adapter(SLUG, width=8)
    logits(get_peft_model(tiny("llama"), tunesmith.stack(ssf, gin)), given)
    _, model = adapted("llama")
    model.add_adapter("norms", ssf)
    logits(model, given)
    model.base_model.set_adapter(["default", "norms"])
    with pytest.raises(ModelError, match=r"attach adapters of norms first"):
        logits(model, given)


@torch.no_grad()
def test_two_graphs_on_one_layer_keep_their_own_nodes() -> None:
    gins = [tunesmith.adapter(SLUG, width=width) for width in (8, 8)]
    model, ids = get_peft_model(tiny("llama"), tunesmith.stack(*gins)).eval(), batch("llama")["input_ids"]
    cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    out = model(input_ids=ids[:, 5:], past_key_values=cache).logits
    assert torch.allclose(out, model(input_ids=ids, use_cache=False).logits[:, 5:], atol=1e-5)


def test_switched_off_it_asks_for_nothing() -> None:
    _, model = adapted("llama")
    assert all(made.looks for made in layers(model))
    with model.disable_adapter():
        assert not any(made.looks for made in layers(model))
        logits(model, batch("llama"))
    assert all(made.run.heard is made.run.residual is None for made in layers(model))


def test_no_tensor_of_a_pass_is_kept() -> None:
    _, model = adapted("llama")
    model.train()(**batch("llama")).loss.backward()
    for made in layers(model):
        assert made.run.residual is made.run.edges is made.run.cache is None
        assert all(ref() is None for ref in made.run.heard or ())
    copy.deepcopy(model)


def test_outside_of_a_transformers_model_is_a_clear_error() -> None:
    made = alone()
    layer = nn.Linear(6, 6)
    with pytest.raises(ModelError, match=r"was not shown the attention weights"):
        made(torch.randn(1, 2, 6), lambda x: layer(x))
