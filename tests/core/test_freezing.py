"""The bottom of every family by name, and a prefix whose outputs are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
import pytest
import torch
import transformers as T
from torch import Tensor, nn

from tests.zoo import FAMILIES, batch, same, tiny
from tunesmith.core.freezing import Prefix, bottom, randomness
from tunesmith.core.meters import flops
from tunesmith.errors import ModelError, TunesmithError

EMBEDDINGS = {
    "llama": {"model.embed_tokens.weight"},
    "qwen2": {"model.embed_tokens.weight"},
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
    "opt": {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"},
    "bert": {
        f"bert.embeddings.{name}"
        for name in (
            "word_embeddings.weight",
            "position_embeddings.weight",
            "token_type_embeddings.weight",
            "LayerNorm.weight",
            "LayerNorm.bias",
        )
    },
    "t5": {"shared.weight"},
    "vit": {
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
        "vit.embeddings.patch_embeddings.projection.weight",
        "vit.embeddings.patch_embeddings.projection.bias",
    },
}
BLOCK = {
    "llama": "model.layers.",
    "qwen2": "model.layers.",
    "gpt2": "transformer.h.",
    "opt": "model.decoder.layers.",
    "bert": "bert.encoder.layer.",
    "t5": "encoder.block.",
    "vit": "vit.layers.",
}
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_embedding_and_the_first_blocks(family: str) -> None:
    model = tiny(family)
    names = {name for name, _ in model.named_parameters()}
    assert bottom(model, 0) == EMBEDDINGS[family]
    for k in (1, 2):
        blocks = {n for n in names if any(n.startswith(f"{BLOCK[family]}{i}.") for i in range(k))}
        assert bottom(model, k) == EMBEDDINGS[family] | blocks


def test_the_stacks_of_an_encoder_decoder() -> None:
    bart = T.BartForConditionalGeneration(T.BartConfig(**SMALL))
    mine = {n for n, _ in bart.named_parameters() if n.startswith(("model.encoder.embed", "model.encoder.layernorm"))}
    theirs = {n for n, _ in bart.named_parameters() if n.startswith(("model.decoder.embed", "model.decoder.layernorm"))}
    assert len(mine) == len(theirs) == 3
    assert bottom(bart, 0) == mine | {"model.shared.weight"}
    assert bottom(bart, 0, stack="all") == mine | theirs | {"model.shared.weight"}
    second = {n for n, _ in bart.named_parameters() if n.startswith("model.decoder.layers.0.")}
    assert bottom(bart, 1, stack="decoder.layers") == theirs | second | {"model.shared.weight"}
    both = bottom(bart, 2, stack="all")
    assert {".".join(n.split(".")[1:4]) for n in both if ".layers." in n} == {
        f"{side}.layers.{i}" for side in ("encoder", "decoder") for i in (0, 1)
    }
    with pytest.raises(
        ModelError, match=r"3 blocks were asked for at the bottom of 'model.encoder.layers', which has 2"
    ):
        bottom(bart, 3)
    with pytest.raises(
        ModelError, match=r"stack='layers' means 2 of the stacks .* model.encoder.layers, model.decoder"
    ):
        bottom(bart, 1, stack="layers")


def test_what_only_some_models_have_before_their_blocks() -> None:
    whisper = T.WhisperModel(T.WhisperConfig(**SMALL))
    assert bottom(whisper, 0) == {
        "encoder.embed_positions.weight",
        *(f"encoder.conv{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
    }
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = T.CLIPModel(T.CLIPConfig(text_config=size, vision_config=size))
    assert all(n.startswith("text_model.") for n in bottom(clip, 1))
    vision = bottom(clip, 0, stack="vision_model.encoder.layers")
    assert {"vision_model.pre_layrnorm.weight", "vision_model.embeddings.class_embedding"} < vision
    assert all(n.startswith("vision_model.") for n in vision)
    electra = T.ElectraModel(T.ElectraConfig(vocab_size=64, embedding_size=8, num_hidden_layers=1, **_drop(size)))
    assert {"embeddings_project.weight", "embeddings.LayerNorm.bias"} < bottom(electra, 0)


def _drop(size: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in size.items() if name != "num_hidden_layers"}


def test_a_head_belongs_to_it_only_where_it_is_tied() -> None:
    untied, tied = tiny("llama"), tiny("llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in bottom(untied, 1)
    tied_names = bottom(tied, 0)
    for name, p in tied.named_parameters():
        p.requires_grad_(name not in tied_names)
    assert not tied.lm_head.weight.requires_grad


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
    assert bottom(Named(), 0) == {"embed_in.weight"}


def test_layers_that_share_their_weights_have_no_bottom() -> None:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "embedding_size": 8}
    albert = T.AlbertModel(T.AlbertConfig(vocab_size=64, num_hidden_layers=4, **size))
    assert bottom(albert, 0)
    with pytest.raises(ModelError, match="the 4 layers of AlbertModel share the weights"):
        bottom(albert, 1)


def test_adapters_in_the_bottom_belong_to_it() -> None:
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules="all-linear"))
    names = bottom(model, 1)
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".layers.0." in n} < names
    assert not any(".layers.1." in n for n in names)


RANDOM = [
    ("bert", {"hidden_dropout_prob": 0.1}, "bert.embeddings.dropout"),
    ("bert", {"attention_probs_dropout_prob": 0.1}, "bert.encoder.layer.0.attention.self"),
    ("gpt2", {"embd_pdrop": 0.1}, "transformer.drop"),
    ("gpt2", {"attn_pdrop": 0.1}, "transformer.h.0.attn"),
    ("t5", {"dropout_rate": 0.1}, "encoder.block.0"),
    ("opt", {"dropout": 0.1}, "model.decoder.layers.0"),
    ("opt", {"layerdrop": 0.1}, "model.decoder"),
    ("llama", {"attention_dropout": 0.1}, "model.layers.0.self_attn"),
    ("vit", {"hidden_dropout_prob": 0.1}, "vit.embeddings.dropout"),
]


@pytest.mark.parametrize(("family", "changes", "where"), RANDOM, ids=lambda v: v if isinstance(v, str) else "")
def test_dropout_is_found_wherever_it_is(family: str, changes: dict[str, float], where: str) -> None:
    assert randomness(tiny(family), 1) == []
    found = randomness(tiny(family, **changes), 1)
    assert any(f"'{where}" in each for each in found)
    above = f"{BLOCK[family]}1."
    assert not any(above in each for each in found), "blocks above may drop"
    with pytest.raises(TunesmithError, match=r"gives another output each time: .* or do not keep outputs"):
        Prefix(tiny(family, **changes), 1, 1000).attach()


def test_batch_statistics_are_found() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj = nn.Sequential(nn.Linear(32, 48), nn.BatchNorm1d(9))
    assert len(randomness(model, 1)) == 1


def test_dropout_after_the_blocks_does_no_harm() -> None:
    assert randomness(tiny("bert", classifier_dropout=0.5), 1) == []


def frozen(family: str, k: int = 1, **changes: Any) -> T.PreTrainedModel:
    model = tiny(family, **changes).train()
    for name, p in model.named_parameters():
        p.requires_grad_(name not in bottom(model, k))
    return model


def trained(model: nn.Module, given: list[dict[str, Tensor]], epochs: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for one in given * epochs:
        loss = model(**one).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def padded(family: str, rows: int = 2, **options: int) -> list[dict[str, Tensor]]:
    given = [batch(family, rows=rows, seed=i, **options) for i in range(3)]
    for one in given:
        if "attention_mask" in one:
            one["attention_mask"][0, -3:] = 0
    return given


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_and_weights_are_the_same_bits(family: str, dtype: torch.dtype) -> None:
    results = []
    for keeping in (False, True):
        model, given = frozen(family, k=1).to(dtype), padded(family)
        for one in given:
            if family == "vit":
                one["pixel_values"] = one["pixel_values"].to(dtype)
        kept = Prefix(model, 1, 2**20)
        if keeping:
            kept.attach()
        losses = trained(model, given)
        if keeping:
            assert (kept.misses, kept.hits) == (6, 12)
            kept.detach()
            assert kept.bytes == 0
        results.append((losses, model.state_dict()))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


def test_later_epochs_do_not_compute_the_prefix() -> None:
    model, given = frozen("llama", k=3, num_hidden_layers=4), batch("llama")
    whole = flops(lambda: model(**given))
    one = flops(lambda: tiny("llama", num_hidden_layers=1).train()(**given))
    kept = Prefix(model, 3, 2**20)
    kept.attach()
    assert flops(lambda: model(**given)) == whole
    assert flops(lambda: model(**given)) == one


def test_rows_are_known_in_any_batch_and_order() -> None:
    model, given = frozen("llama", k=2, num_hidden_layers=3), batch("llama", rows=7)
    plain = model(**given).logits
    kept = Prefix(model, 2, 2**20)
    kept.attach()
    for rows in ([0, 1, 2], [3, 4, 5]):
        model(**{name: value[rows] for name, value in given.items()})
    order = [5, 0, 3, 0]
    again = model(**{name: value[order] for name, value in given.items()}).logits
    assert (kept.misses, kept.hits) == (6, 4)
    assert torch.allclose(again, plain[order], atol=1e-6)
    mixed = model(**{name: value[[2, 6]] for name, value in given.items()}).logits
    assert (kept.misses, kept.hits) == (8, 4), "one new row, and the batch runs as a whole"
    assert torch.allclose(mixed, plain[[2, 6]], atol=1e-6)


def test_whatever_the_blocks_see_tells_inputs_apart() -> None:
    model, given = frozen("bert"), batch("bert")
    kept = Prefix(model, 1, 2**20)
    kept.attach()
    model(**given)
    types = torch.zeros_like(given["input_ids"])
    types[:, -1] = 1
    mask = given["attention_mask"].clone()
    mask[0, -1] = 0
    longer = {name: torch.cat([v, v[:, -1:]], 1) for name, v in given.items() if name != "labels"}
    for changed in (
        {**given, "token_type_ids": types},
        {**given, "attention_mask": mask},
        {**given, "position_ids": torch.arange(9).flip(0)[None]},
        longer,
    ):
        before = kept.hits
        model(**changed)
        assert kept.hits == before
    model(**given, token_type_ids=torch.zeros_like(types))
    assert kept.hits == 2, "the types that are there anyway"


def test_the_same_tokens_in_another_order_are_another_input() -> None:
    """Llama's hidden states carry no position: any order has the same sum of bits."""
    model, given = frozen("llama"), batch("llama")
    kept = Prefix(model, 1, 2**20)
    kept.attach()
    model(**given)
    model(**{name: value.flip(1) for name, value in given.items()})
    swapped = given["input_ids"].clone()
    swapped[:, [2, 3]] = swapped[:, [3, 2]]
    model(input_ids=swapped, attention_mask=given["attention_mask"])
    assert (kept.misses, kept.hits) == (6, 0)


def test_what_cannot_be_skipped_is_not() -> None:
    model, given = frozen("llama"), batch("llama")
    kept = Prefix(model, 1, 2**20)
    kept.attach()
    model(**given)
    plain = frozen("llama")(**given, output_hidden_states=True).hidden_states
    watched = model(**given, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    seen: list[Tensor] = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(_[2]))
    model(**given)
    handle.remove()
    assert len(seen) == 1
    model.eval()
    model(**given)
    assert kept.hits == 0
    generated = model.generate(given["input_ids"][:, :4], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, tiny("llama").generate(given["input_ids"][:, :4], max_new_tokens=4, do_sample=False))
    assert kept.hits == 0


def test_changed_weights_and_a_full_store() -> None:
    model, given = frozen("llama"), batch("llama")
    kept = Prefix(model, 1, 2 * 9 * 32 * 4)
    kept.attach()
    model(**given)
    assert kept.bytes == 2 * 9 * 32 * 4
    model(**batch("llama", seed=1))
    assert kept.bytes == 2 * 9 * 32 * 4, "nothing is added to a full store"
    model(**given)
    assert kept.hits == 2
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    changed = model(**given).loss
    assert kept.hits == 2
    kept.detach()
    assert torch.equal(model(**given).loss, changed)
    assert "forward" not in vars(model.model.layers[0])


def test_something_that_trains_below_is_refused() -> None:
    model = frozen("llama")
    model.model.embed_tokens.weight.requires_grad_(True)
    Prefix(model, 1, 1000).attach()
    with pytest.raises(TunesmithError, match="something in them or before them trains"):
        model(**batch("llama"))
    checkpointed = frozen("llama")
    checkpointed.enable_input_require_grads()
    Prefix(checkpointed, 1, 1000).attach()
    with pytest.raises(TunesmithError, match="disable_input_require_grads"):
        checkpointed(**batch("llama"))


def test_no_blocks_and_several_stacks_are_refused() -> None:
    with pytest.raises(TunesmithError, match="freeze at least one"):
        Prefix(tiny("llama"), 0, 1000).attach()
    with pytest.raises(TunesmithError, match="the blocks of a decoder read an encoder that trains"):
        Prefix(tiny("t5"), 1, 1000, stack="all").attach()


def test_under_activation_checkpointing() -> None:
    results = []
    for keeping in (False, True):
        model, given = frozen("llama", k=2, num_hidden_layers=4), batch("llama")
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
        kept = Prefix(model, 2, 2**20)
        if keeping:
            kept.attach()
        results.append(trained(model, [given]))
        assert kept.hits == (4 if keeping else 0)
    assert results[0] == results[1]
