"""What the prompt driver does to each kind of model; a plain prefix (dept of rank 0) stands for any prompt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as T
from peft import get_peft_model
from torch import nn

import tunesmith
from tests.zoo import VOCABULARY, batch, logits, tiny
from tunesmith.core.prompt import Prompt, PromptSpace
from tunesmith.core.tuner_layer import TunesmithLayer
from tunesmith.errors import ModelError

LENGTH = 3
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def prefixed(base: nn.Module, **options: Any) -> nn.Module:
    settings = {"num_virtual_tokens": LENGTH, "rank": 0, "std": 0.5, **options}
    return get_peft_model(copy.deepcopy(base), tunesmith.adapter("dept", **settings)).eval()


def prompt_of(model: nn.Module) -> Prompt:
    return next(m for m in model.modules() if isinstance(m, Prompt))


def roberta(cls: type = T.RobertaForTokenClassification, **changes: Any) -> nn.Module:
    config = {**SMALL, "pad_token_id": 1, "max_position_embeddings": 20, "num_labels": 4, **changes}
    torch.manual_seed(0)
    return cls(T.RobertaConfig(**config)).eval()


def words_as_prompt(model: nn.Module, ids: list[int]) -> list[int]:
    """Make the prompt the vectors of some words, so that the model must do as if they had been typed."""
    made = prompt_of(model)
    table = next(m for m in model.modules() if isinstance(m, TunesmithLayer)).get_base_layer()
    with torch.no_grad():
        made.P.copy_(PromptSpace(table).words(ids))
    return ids


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2"])
def test_a_prompt_of_word_vectors_is_as_typing_the_words(family: str) -> None:
    base, given = tiny(family, initializer_range=0.3), batch(family)
    model = prefixed(base)
    typed = torch.tensor(words_as_prompt(model, [7, 8, 9])).expand(2, -1)
    ids = torch.cat([typed, given["input_ids"]], dim=1)
    expected = logits(base, {"input_ids": ids})[:, LENGTH:]
    assert torch.allclose(logits(model, {"input_ids": given["input_ids"]}), expected, atol=1e-5)


def test_words_are_scaled_as_the_model_scales_them() -> None:
    torch.manual_seed(0)
    base = T.Gemma2ForCausalLM(T.Gemma2Config(**SMALL)).eval()
    model = prefixed(base, init_ids=[7, 8, 9])
    ids = torch.randint(3, VOCABULARY, (2, 6))
    expected = logits(base, {"input_ids": torch.cat([torch.tensor([[7, 8, 9]] * 2), ids], dim=1)})[:, LENGTH:]
    assert torch.allclose(logits(model, {"input_ids": ids}), expected, atol=1e-5)


def test_an_encoder_reads_the_prompt_as_words_and_its_decoder_attends_to_it() -> None:
    base, given = tiny("t5", initializer_factor=1.0), batch("t5")
    model = prefixed(base)
    typed = torch.tensor(words_as_prompt(model, [7, 8, 9])).expand(2, -1)
    decoder = {"decoder_input_ids": torch.tensor([[0, 4, 5]] * 2)}
    expected = logits(base, {"input_ids": torch.cat([typed, given["input_ids"]], dim=1), **decoder})
    masked = {name: given[name] for name in ("input_ids", "attention_mask")}
    assert torch.allclose(logits(model, {"input_ids": given["input_ids"], **decoder}), expected, atol=1e-5)
    assert torch.allclose(logits(model, {**masked, **decoder}), expected, atol=1e-5)


def test_encoder_decoders_have_no_limit_of_positions_but_their_own() -> None:
    base = tiny("t5", n_positions=8)
    model = prefixed(base)
    assert (
        logits(model, {"input_ids": torch.full((1, 30), 5), "decoder_input_ids": torch.tensor([[0]])}).isfinite().all()
    )


def test_roberta_numbers_positions_from_its_padding_index() -> None:
    base = roberta()
    model = prefixed(base)
    typed = torch.tensor(words_as_prompt(model, [7, 8, 9])).expand(2, -1)
    ids = torch.randint(3, VOCABULARY, (2, 6))
    expected = logits(base, {"input_ids": torch.cat([typed, ids], dim=1)})[:, LENGTH:]
    assert torch.allclose(logits(model, {"input_ids": ids}), expected, atol=1e-5)
    logits(model, {"input_ids": torch.full((1, 18 - LENGTH), 5)})
    with pytest.raises(
        ModelError, match="need 19 positions, 3 of them the prompt's; RobertaForTokenClassification has 18"
    ):
        logits(model, {"input_ids": torch.full((1, 19 - LENGTH), 5)})


def test_token_labels_are_shifted_and_row_labels_are_not() -> None:
    ids = torch.randint(3, VOCABULARY, (2, 4))
    tokens = prefixed(roberta())
    labels = torch.randint(0, 4, (2, 4))
    out = tokens(input_ids=ids, labels=labels)
    expected = nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    assert torch.allclose(out.loss, expected, atol=1e-6)
    several = prefixed(
        roberta(T.RobertaForSequenceClassification, num_labels=4, problem_type="multi_label_classification")
    )
    out = several(input_ids=ids, labels=labels.float())
    expected = nn.functional.binary_cross_entropy_with_logits(out.logits, labels.float())
    assert torch.allclose(out.loss, expected, atol=1e-6)


def test_answer_spans_move_with_the_text() -> None:
    model = prefixed(roberta(T.RobertaForQuestionAnswering, num_labels=2))
    ids = torch.randint(3, VOCABULARY, (2, 6))
    first, last = torch.tensor([1, 2]), torch.tensor([3, 5])
    out = model(input_ids=ids, start_positions=first, end_positions=last)
    assert out.start_logits.shape == out.end_logits.shape == (2, 6)
    handle = prompt_of(model)
    bare = model.get_base_model()(input_ids=ids)
    assert torch.equal(bare.start_logits, out.start_logits)
    # The loss is over prompt and text together, so the prompt's own scores are asked for.
    wide: dict[str, torch.Tensor] = {}
    model.get_base_model().qa_outputs.register_forward_hook(lambda m, a, o: wide.update(scores=o))
    out = model(input_ids=ids, start_positions=first, end_positions=last)
    start, end = wide["scores"].unbind(-1)
    expected = sum(nn.functional.cross_entropy(s, p + handle.length) for s, p in ((start, first), (end, last)))
    assert torch.allclose(out.loss, expected / 2, atol=1e-6)


def test_logits_to_keep_counts_the_callers_tokens() -> None:
    model, ids = prefixed(tiny("llama")), batch("llama")["input_ids"]
    every = logits(model, {"input_ids": ids})
    assert torch.allclose(logits(model, {"input_ids": ids, "logits_to_keep": 2}), every[:, -2:], atol=1e-6)
    some = torch.tensor([0, 4, 5])
    assert torch.allclose(logits(model, {"input_ids": ids, "logits_to_keep": some}), every[:, some], atol=1e-6)
    assert torch.equal(logits(model, {"input_ids": ids, "logits_to_keep": ids.shape[1] + 1}), every)


def test_embeddings_and_positional_arguments_are_taken_as_ids_are() -> None:
    model, given = prefixed(tiny("gpt2")), batch("gpt2")
    expected = logits(model, {"input_ids": given["input_ids"]})
    embeds = model.get_input_embeddings()(given["input_ids"])
    assert torch.equal(logits(model, {"inputs_embeds": embeds}), expected)
    with torch.no_grad():
        assert torch.equal(model.get_base_model()(given["input_ids"]).logits, expected)
        assert torch.equal(model.get_base_model()(given["input_ids"], return_dict=True).logits, expected)


def test_chosen_positions_are_kept() -> None:
    model, ids = prefixed(tiny("gpt2", initializer_range=0.3)), batch("gpt2")["input_ids"]
    usual = logits(model, {"input_ids": ids})
    same = logits(model, {"input_ids": ids, "position_ids": torch.arange(9)[None]})
    assert torch.equal(same, usual)
    other = logits(model, {"input_ids": ids, "position_ids": torch.arange(9)[None] + 4})
    assert not torch.allclose(other, usual, atol=1e-3)


@pytest.mark.parametrize("cls", [T.LlamaForSequenceClassification, T.GPT2ForSequenceClassification])
def test_a_decoders_classifier_wants_padding_on_the_left(cls: type) -> None:
    torch.manual_seed(0)
    config = tiny("llama" if "Llama" in cls.__name__ else "gpt2").config
    config.num_labels, config.pad_token_id = 3, 0
    model = prefixed(cls(config).eval())
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 4]])
    mask = (ids != 0).long()
    together = logits(model, {"input_ids": ids, "attention_mask": mask})
    assert torch.allclose(together[1:], logits(model, {"input_ids": ids[1:, 2:]}), atol=1e-5)
    with pytest.raises(ModelError, match="pad on the left"):
        logits(model, {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)})


def test_a_prepared_mask_is_refused() -> None:
    model, ids = prefixed(tiny("llama")), batch("llama")["input_ids"]
    with pytest.raises(ModelError, match="two-dimensional"):
        logits(model, {"input_ids": ids, "attention_mask": torch.ones(2, 1, 9, 9, dtype=torch.bool)})


def test_a_conversation_goes_on_from_its_cache() -> None:
    model, ids = prefixed(tiny("llama", initializer_range=0.3), rank=2), batch("llama")["input_ids"]
    with torch.no_grad():
        prompt_of(model).B.normal_()
        first = model(input_ids=ids[:, :5], use_cache=True)
        rest = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values, use_cache=True).logits
    assert torch.allclose(rest, logits(model, {"input_ids": ids})[:, 5:], atol=1e-4)


@pytest.mark.parametrize("ids", [[], [VOCABULARY]])
def test_words_outside_the_vocabulary_are_a_clear_error(ids: list[int]) -> None:
    with pytest.raises(ModelError, match="token ids between 0 and 63; found"):
        prefixed(tiny("llama"), init_ids=ids)
