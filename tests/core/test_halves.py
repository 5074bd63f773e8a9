"""Half of the parameters, counted, for every family; the same from a model, a wrapped model and a file."""

from __future__ import annotations

import collections
from pathlib import Path

import peft
import pytest
import transformers as T

import tunesmith
from tests.zoo import FAMILIES, tiny
from tunesmith.core.halves import canonical, chosen, places
from tunesmith.core.statedict import Checkpoint, write
from tunesmith.errors import ModelError


def llama(layers: int) -> list[str]:
    return [name for name, _ in tiny("llama", num_hidden_layers=layers).named_parameters()]


def counts(names: list[str], kept: frozenset[str]) -> dict[str, list[int]]:
    """Per category, how many are kept in each block."""
    found: dict[str, dict[int, int]] = collections.defaultdict(lambda: collections.defaultdict(int))
    for name, place in places(names).items():
        if place is not None:
            found[place.category][place.block] += name in kept
    return {category: [rows[i] for i in sorted(rows)] for category, rows in found.items()}


@pytest.mark.parametrize("layers", [1, 2, 4, 5, 7, 8])
@pytest.mark.parametrize("seed", range(5))
def test_counts_in_every_block(layers: int, seed: int) -> None:
    names = llama(layers)
    found = counts(names, chosen(names, seed=seed))
    assert found["attention"] == [2] * layers
    assert found["norms"] == [1] * layers
    assert sorted(found["ffn"]) == [1] * (layers - layers // 2) + [2] * (layers // 2)


def test_every_choice_is_as_likely() -> None:
    """Each of q, k, v, o in half of 400 draws; the blocks that train two matrices of the FFN change."""
    names = llama(4)
    attention: collections.Counter[str] = collections.Counter()
    pairs: collections.Counter[tuple[str, ...]] = collections.Counter()
    more: collections.Counter[int] = collections.Counter()
    for seed in range(400):
        kept = chosen(names, seed=seed)
        inside = [n.split(".")[4] for n in kept if ".layers.2.self_attn." in n]
        attention.update(inside)
        pairs.update([tuple(sorted(inside))])
        more.update(i for i, n in enumerate(counts(names, kept)["ffn"]) if n == 2)
    assert all(abs(n - 200) <= 40 for n in attention.values())
    assert len(pairs) == 6
    assert all(abs(n - 200) <= 40 for n in more.values())
    assert len(more) == 4


def test_blocks_draw_by_themselves() -> None:
    names = llama(8)
    kept = chosen(names)
    picked = {tuple(sorted(n.split(".")[4] for n in kept if f".{i}.self_attn." in n)) for i in range(8)}
    assert len(picked) > 2


def test_seed_stage_and_draw_choose_anew_and_order_does_not() -> None:
    names = llama(4)
    first = chosen(names)
    assert chosen(names) == first == chosen(reversed(names))
    for other in ({"seed": 1}, {"stage": 1}, {"draw": 1}):
        assert chosen(names, **other) != first
    few = [n for n in names if ".mlp." not in n]
    assert chosen(few) == first & set(few), "what else there is changes nothing"


def test_a_bias_goes_with_its_matrix() -> None:
    for family in ("qwen2", "gpt2", "opt", "bert", "vit"):
        names = [n for n, _ in tiny(family).named_parameters()]
        for level in ("category", "layer", "model"):
            kept = chosen(names, level=level)
            for name in names:
                if name.endswith(".bias") and name.replace(".bias", ".weight") in names:
                    assert (name in kept) == (name.replace(".bias", ".weight") in kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_the_tensors_of_every_family(family: str) -> None:
    changes = {"gpt2": {"n_layer": 4}, "t5": {"num_layers": 4, "num_decoder_layers": 4}}
    model = tiny(family, **changes.get(family, {"num_hidden_layers": 4}))
    names = [name for name, _ in model.named_parameters()]
    found = places(names)
    members = {p for p in found.values() if p}
    kept = {found[n] for n in chosen(names, outside="freeze")}
    assert None not in kept
    matrices = [p for p in members if p.category in ("attention", "ffn")]
    assert 2 * sum(p in kept for p in matrices) == len(matrices)
    outside = {n for n, p in found.items() if p is None}
    assert outside
    assert chosen(names) - chosen(names, outside="freeze") == outside
    assert not chosen(names, outside="freeze") & outside


def test_both_attentions_of_a_decoder_give_half() -> None:
    names = [n for n, _ in tiny("t5").named_parameters()]
    kept = chosen(names)
    for module in ("0.SelfAttention", "1.EncDecAttention"):
        inside = [n for n in kept if f"decoder.block.1.layer.{module}." in n and "relative" not in n]
        assert len(inside) == 2
    differing = 0
    for seed in range(10):
        kept = chosen(names, seed=seed)
        picked = [
            {n[-8] for n in kept if f"decoder.block.0.layer.{module}." in n and "relative" not in n}
            for module in ("0.SelfAttention", "1.EncDecAttention")
        ]
        differing += picked[0] != picked[1]
    assert differing >= 5, "each draws by itself"


def test_stacks_are_numbered_alike_in_every_process() -> None:
    names = [f"tower{t}.layers.{i}.mlp.fc1.weight" for t in (3, 0, 2, 5, 4, 1) for i in range(2)]
    found = places(names)
    assert all(place and place.stack == int(name[5]) for name, place in found.items())


def test_a_fused_matrix_trains_in_half_of_the_blocks() -> None:
    names = [n for n, _ in tiny("gpt2", n_layer=6).named_parameters()]
    kept = chosen(names)
    fused = {i for i in range(6) if f"transformer.h.{i}.attn.c_attn.weight" in kept}
    output = {i for i in range(6) if f"transformer.h.{i}.attn.c_proj.weight" in kept}
    assert len(fused) == 3
    assert output == set(range(6)) - fused
    phi = T.Phi3Config(hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, vocab_size=64)
    phi.pad_token_id = 0
    names = [n for n, _ in T.Phi3ForCausalLM(phi).named_parameters()]
    for pair in (("self_attn.qkv_proj", "self_attn.o_proj"), ("mlp.gate_up_proj", "mlp.down_proj")):
        found = [[f"model.layers.{i}.{name}.weight" in chosen(names) for i in range(4)] for name in pair]
        assert sum(found[0]) == sum(found[1]) == 2
        assert all(a != b for a, b in zip(*found, strict=True))


def test_every_expert_gives_half_of_its_own() -> None:
    names = [
        f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}.weight"
        for i in range(4)
        for e in range(3)
        for w in ("w1", "w2", "w3")
    ]
    names += [f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(4)]
    kept = chosen(names)
    for e in range(3):
        per_block = [sum(f".layers.{i}." in n and f"experts.{e}." in n for n in kept) for i in range(4)]
        assert sorted(per_block) == [1, 1, 2, 2]
    assert sum("gate.weight" in n for n in kept) == 2, "a router is something else: it trains in half of the blocks"
    picked = [
        {n.split("experts.")[1][2:] for n in kept if f".layers.0.block_sparse_moe.experts.{e}." in n} for e in (0, 1, 2)
    ]
    assert any(a != b for a in picked for b in picked), "experts choose by themselves"
    mixtral = T.MixtralConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2)
    mixtral.vocab_size, mixtral.num_key_value_heads, mixtral.num_local_experts = 64, 1, 3
    stored = [n for n, _ in T.MixtralForCausalLM(mixtral).named_parameters()]
    half = [n for n in chosen(stored) if ".experts." in n]
    assert len(half) == 4
    assert sum(n.endswith("gate_up_proj") for n in half) == 2


def test_levels() -> None:
    names = llama(5)
    found = places(names)
    layer = chosen(names, level="layer", outside="freeze")
    blocks = {found[n].block for n in layer}
    assert len(blocks) == 2
    assert layer == {n for n in names if found[n] and found[n].block in blocks}
    model = chosen(names, level="model", outside="freeze")
    matrices = [n for n in names if found[n] and found[n].category in ("attention", "ffn")]
    assert sum(n in model for n in matrices) == len(matrices) // 2 == 17
    assert sum("norm" in n for n in model) == 5
    per_block = {sum(f".layers.{i}." in n for n in model if "norm" not in n) for i in range(5)}
    assert len(per_block) > 1, "drawn over the whole model"


WRAPPED = {
    "model.layers.0.self_attn.q_proj.weight": [
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.tunesmith_adapters.default.0.scale",
        "module.model.layers.0.self_attn.q_proj.weight",
        "model.layers.0._orig_mod.self_attn.q_proj.weight",
    ],
    "score.weight": ["base_model.model.score.modules_to_save.default.weight", "score.original_module.weight"],
}


@pytest.mark.parametrize(("plain", "wrapped"), [(p, w) for p, many in WRAPPED.items() for w in many])
def test_wrappers_do_not_change_a_name(plain: str, wrapped: str) -> None:
    assert canonical(wrapped) == canonical(plain) == plain


def test_a_file_a_model_and_its_adapters_choose_alike(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=4)
    write(tmp_path / "m", model.state_dict().items())
    kept = chosen(n for n, _ in model.named_parameters())
    assert chosen(Checkpoint(tmp_path / "m")) == kept
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    names = [n for n, _ in lora.named_parameters()]
    assert {canonical(n) for n in chosen(names)} == kept
    assert {canonical(n) for n in names} - {canonical(n) for n in chosen(names)} == {canonical(n) for n in names} - kept
    ssf = peft.get_peft_model(tiny("llama", num_hidden_layers=4), tunesmith.adapter("ssf"))
    assert {canonical(n) for n in chosen([n for n, _ in ssf.named_parameters()])} == kept


def test_names_without_blocks_are_refused() -> None:
    with pytest.raises(ModelError, match=r"no name has a numbered block .* found \['fc1.weight', 'fc2.weight'\]"):
        chosen(["fc1.weight", "fc2.weight"])
