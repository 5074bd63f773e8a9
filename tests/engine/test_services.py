"""What parts of the room `data` may ask of the run's model, against the same worked out row by row."""

from __future__ import annotations

import copy
import inspect
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as T
from torch import nn
from transformers import set_seed

from tests.zoo import checkpoint, same, tiny
from tunesmith import inputs
from tunesmith.core.selection import Services, with_answer
from tunesmith.engine import arguments, building, select
from tunesmith.engine.services import ModelServices
from tunesmith.errors import DataError
from tunesmith.models.embedded import WEIGHTS
from tunesmith.recipe import Recipe

DECODERS = ("llama", "gpt2", "opt", "qwen2")
PAIRS = [{"prompt": f"Copy {'a b ' * (i % 5)}{i}\n", "completion": f"{i} {'c ' * (i % 3)}d"} for i in range(40)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"First {i}?"},
            {"role": "assistant", "content": "A long and certain answer to it."},
            {"role": "user", "content": "Second?"},
            {"role": "assistant", "content": f"Number {i}."},
        ]
    }
    for i in range(12)
]
TEXTS = [{"text": f"text {i} " + "a " * (i % 9), "label": "abc"[i % 3]} for i in range(24)]
CHANGED = {"data": {"eval_fraction": 0.1}, "train": {"steps": 3, "batch_size": 4, "learning_rate": 1e-2}}


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return T.AutoTokenizer.from_pretrained(WEIGHTS / "tokenizer")


@pytest.fixture
def make(tokenizer: Any, tmp_path: Path) -> Any:
    """`(family, rows, recipe) -> ModelServices` of a tiny random model."""

    def made(family: str = "llama", rows: list[dict] = PAIRS, task: Any = None, **recipe: Any) -> ModelServices:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        size = {} if family in ("t5", "gpt2") else {"max_position_embeddings": 256}
        size = {"n_positions": 256} if family == "gpt2" else size
        base = tiny(family, vocab_size=len(tokenizer), **size)
        base.config.architectures = [type(base).__name__]
        given = {**CHANGED, **recipe}
        given = {**given, "data": {**CHANGED["data"], **given["data"], "train": str(file)}}
        asked = Recipe.model_validate(given)
        gathered = inputs.gather(asked.data, config=base.config, task=task)
        return ModelServices(asked, base, tokenizer, gathered)

    return made


def rows_of(services: ModelServices, count: int = 12) -> Any:
    return services.gathered.train.dataset.select(range(count))


def tokens(services: ModelServices, text: str) -> list[int]:
    return services.tokenizer(text, add_special_tokens=False)["input_ids"]


def whole(services: ModelServices, row: dict) -> list[int]:
    return [*tokens(services, row["prompt"] + row["completion"]), services.tokenizer.eos_token_id]


# Vectors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_vectors_are_the_mean_hidden_state_of_prompt_and_answer(make: Any, family: str) -> None:
    services = make(family)
    rows = rows_of(services, 21)
    found = services.offered().embed(rows)
    assert (found.dtype, found.shape) == (np.float32, (21, 32))
    for row, vector in zip(rows, found, strict=True):
        ids = torch.tensor([whole(services, row)])
        hidden = services.base(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        assert np.allclose(vector, hidden[0].mean(0), atol=1e-5)


@torch.no_grad()
def test_vectors_of_encoders_and_of_encoder_decoders(make: Any) -> None:
    bert = make("bert", TEXTS, "text-classification")
    for row, vector in zip(rows_of(bert), bert.embed(rows_of(bert)), strict=True):
        ids = torch.tensor([bert.tokenizer(row["text"])["input_ids"]])
        assert np.allclose(vector, bert.base.bert(input_ids=ids).last_hidden_state[0].mean(0), atol=1e-5)
    t5 = make("t5")
    eos = [t5.tokenizer.eos_token_id]
    for row, vector in zip(rows_of(t5), t5.embed(rows_of(t5)), strict=True):
        ids = torch.tensor([[*tokens(t5, row["prompt"]), *eos, *tokens(t5, row["completion"]), *eos]])
        assert np.allclose(vector, t5.base.encoder(input_ids=ids).last_hidden_state[0].mean(0), atol=1e-5)


@torch.no_grad()
def test_vectors_of_conversations_and_of_long_rows(make: Any) -> None:
    chat = make("llama", CHATS, data={"max_length": 30})
    row = rows_of(chat, 1)[0]
    template = chat.tokenizer.apply_chat_template(row["messages"], return_dict=True)
    ids = torch.tensor([template["input_ids"][:30]])
    assert len(template["input_ids"]) > 30
    hidden = chat.base(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
    assert np.allclose(chat.embed([row])[0], hidden, atol=1e-5)


def test_vectors_leave_model_and_random_state_alone(make: Any) -> None:
    services = make()
    services.base.train()
    before, state = checkpoint(services.base), torch.get_rng_state()
    services.embed(rows_of(services))
    assert services.base.training
    assert same(checkpoint(services.base), before)
    assert torch.equal(torch.get_rng_state(), state)


# Training ---------------------------------------------------------------------------------------------------------


def trained_by_hand(services: ModelServices, rows: Any, folder: Path) -> nn.Module:
    """What a run does with these rows."""
    recipe, uses = services.recipe, services.recipe.uses()
    chosen = copy.copy(services.gathered.train)
    object.__setattr__(chosen, "dataset", rows)
    gathered = copy.copy(services.gathered)
    object.__setattr__(gathered, "train", chosen)
    set_seed(recipe.train.seed)
    base = copy.deepcopy(services.base)
    built = building.build(base, recipe, uses, gathered, config=base.config, processor=services.tokenizer)
    steps = arguments.total_steps(recipe, len(built.data.train), 1)
    args = arguments.arguments(
        recipe, folder, steps=steps, own_optimizer="optimizer" in uses, unused_parameters="schedule" in uses
    )
    building.trainer(built, recipe, uses, args, processor=services.tokenizer).train()
    return built.model.eval()


RECIPES = {
    "lora": {},
    "full": {"method": "full"},
    "ssf": {"method": "ssf"},
    "galore": {"method": "full", "optimizer": {"name": "galore", "rank": 4}},
    "lora-ga, padded": {"method": "lora-ga", "data": {"padding_free": False}},
    "lisa and ift": {"method": "full", "schedule": {"name": "lisa", "layers": 1}, "objective": "intuitive-finetuning"},
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_fit_is_what_the_run_would_train(make: Any, tmp_path: Path, recipe: dict) -> None:
    services = make("llama", PAIRS, None, **recipe)
    rows = rows_of(services)
    tuned = services.offered().fit(rows)
    by_hand = trained_by_hand(services, rows, tmp_path / "run")
    theirs = services._losses(by_hand, rows)
    assert np.array_equal(tuned.loss(rows), theirs)
    untouched = services._losses(services.base, rows)
    assert np.abs(theirs - untouched).max() > 1e-3, "training must change something for this test to say anything"


def test_a_fit_leaves_nothing_behind(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    services = make()
    before, config = checkpoint(services.base), services.base.config.to_dict()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = (random.random(), np.random.rand(), torch.rand(1))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    services.fit(rows_of(services))
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert same(checkpoint(services.base), before)
    assert services.base.config.to_dict() == config
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]


def test_equal_rows_give_an_equal_model_and_other_rows_another(make: Any) -> None:
    services = make()
    rows = rows_of(services)
    torch.manual_seed(1)
    first = services.fit(rows).loss(rows)
    torch.manual_seed(2)
    bare = [{"prompt": row["prompt"], "completion": row["completion"], "kept": 1} for row in rows]
    again = services.fit(bare).loss(bare)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, services.fit(rows.select(range(4, 12))).loss(rows))


def test_a_fit_sees_every_row_as_often_as_the_recipe_says(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    original = building.Trainer.train
    monkeypatch.setattr(building.Trainer, "train", lambda self: steps.append(self.args.max_steps) or original(self))
    services = make(train={"epochs": 2, "batch_size": 4, "learning_rate": 1e-3})
    for count in (4, 12):
        services.fit(rows_of(services, count))
    assert steps == [2, 6]


# What a trained model is asked ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_loss_is_per_token_of_the_completion(make: Any, family: str) -> None:
    services = make(family)
    rows = rows_of(services, 20)
    found = services._losses(services.base, rows)
    for row, loss in zip(rows, found, strict=True):
        ids = torch.tensor([whole(services, row)])
        start = len(tokens(services, row["prompt"]))
        logits = services.base(input_ids=ids).logits[0]
        assert loss == pytest.approx(float(F.cross_entropy(logits[start - 1 : -1], ids[0, start:])), abs=1e-5)


@torch.no_grad()
def test_loss_of_encoder_decoders_and_of_classifiers(make: Any) -> None:
    t5 = make("t5")
    for row, loss in zip(rows_of(t5), t5._losses(t5.base, rows_of(t5)), strict=True):
        ids, labels = (torch.tensor([[*tokens(t5, row[name]), t5.tokenizer.eos_token_id]]) for name in _NAMES)
        assert loss == pytest.approx(float(t5.base(input_ids=ids, labels=labels).loss), abs=1e-5)
    bert = make("bert", TEXTS, "text-classification")
    for row, loss in zip(rows_of(bert), bert._losses(bert.base, rows_of(bert)), strict=True):
        ids = torch.tensor([bert.tokenizer(row["text"])["input_ids"]])
        assert loss == pytest.approx(
            float(bert.base(input_ids=ids, labels=torch.tensor([row["label"]])).loss), abs=1e-5
        )


_NAMES = ("prompt", "completion")


@pytest.mark.parametrize("loss_on", ["completion", "all"])
@torch.no_grad()
def test_loss_of_a_conversation_is_that_of_its_last_answer(make: Any, loss_on: str) -> None:
    services = make("llama", CHATS, data={"loss_on": loss_on})
    row = rows_of(services, 1)[0]
    apply = services.tokenizer.apply_chat_template
    ids = torch.tensor([apply(row["messages"], return_dict=True)["input_ids"]])
    start = len(apply(row["messages"][:-1], add_generation_prompt=True, return_dict=True)["input_ids"])
    logits = services.base(input_ids=ids).logits[0]
    expected = float(F.cross_entropy(logits[start - 1 : -1], ids[0, start:]))
    assert services._losses(services.base, [row])[0] == pytest.approx(expected, abs=1e-5)
    other = with_answer(row, "Something else.")
    assert services._losses(services.base, [other])[0] != pytest.approx(expected, abs=1e-3)


def test_a_row_whose_answer_is_cut_off_has_no_loss(make: Any) -> None:
    services = make(data={"max_length": 12})
    rows = rows_of(services, 4)
    long = {**rows[0], "prompt": "a " * 40}
    found = services._losses(services.base, [rows[1], long, rows[2]])
    assert np.isnan(found).tolist() == [False, True, False]
    assert np.array_equal(found[[0, 2]], services._losses(services.base, [rows[1], rows[2]]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_answers_are_greedy_and_in_the_order_of_the_rows(make: Any, family: str) -> None:
    services = make(family, report={"max_new_tokens": 5})
    rows = rows_of(services, 20)
    tuned = services.fit(rows)
    model = inspect.getclosurevars(tuned.generate).nonlocals["model"]
    found = tuned.generate(rows)
    for row, text in zip(rows, found, strict=True):
        ids = tokens(services, row["prompt"])
        ids = torch.tensor([[*ids, services.tokenizer.eos_token_id] if family == "t5" else ids])
        out = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0]
        out = out if family == "t5" else out[ids.shape[1] :]
        assert text == services.tokenizer.decode(out, skip_special_tokens=True)
    assert len(set(found)) > 1


def test_a_model_with_a_prompt_is_asked_within_its_length(make: Any) -> None:
    services = make(prompts=[{"name": "dept", "num_virtual_tokens": 2, "rank": 2, "max_length": 16}])
    tuned = services.fit(rows_of(services))
    long = {**rows_of(services)[0], "prompt": "a " * 20}
    assert np.isnan(tuned.loss([long, rows_of(services)[1]])).tolist() == [True, False]
    assert len(tuned.generate([rows_of(services)[1]])) == 1


def test_a_tuned_model_answers_what_it_was_trained_on(make: Any) -> None:
    services = make(method="full", train={"steps": 60, "batch_size": 4, "learning_rate": 1e-2})
    rows = rows_of(services, 4)
    tuned = services.fit(rows)
    assert tuned.loss(rows).max() < 0.1
    assert tuned.generate(rows) == rows["completion"][:]


def test_what_cannot_be_asked_is_refused(make: Any) -> None:
    text = make("llama", [{"text": "abc def " * 3}] * 12)
    with pytest.raises(DataError, match="row 0 has no prompt"):
        text.fit(rows_of(text, 4)).generate(rows_of(text, 4))
    bert = make("bert", TEXTS, "text-classification")
    with pytest.raises(DataError, match="writes no answers"):
        bert.fit(rows_of(bert, 4)).generate(rows_of(bert, 4))
    chat = make("llama", CHATS)
    broken = {**rows_of(chat, 1)[0], "messages": [{"role": "nobody", "content": "x"}]}
    with pytest.raises(DataError, match=r"row 1: .*role"):
        chat.embed([rows_of(chat, 1)[0], broken])


def test_a_run_on_pictures_offers_nothing(make: Any) -> None:
    services = make()
    services.task = "image-classification"
    assert services.offered() == Services()


# In a run ---------------------------------------------------------------------------------------------------------


def test_a_recipe_selects_with_its_own_model(make: Any) -> None:
    chosen = {"select": [{"name": "diversify-conquer", "budget": 9, "rounds": 2, "clusters": 3}]}
    services = make(data=chosen)
    recipe, gathered = services.recipe, services.gathered
    found = select.apply(gathered, recipe.uses()["select"], recipe, services.base, services.tokenizer)
    assert found.report["selected"] == [{"part": "diversify-conquer", "from": 36, "to": 9}]
    assert set(found.train.dataset["selection_round"]) == {0, 1}
    for row in found.train.dataset:
        assert row["prompt"] == gathered.train.dataset[row["source_index"]]["prompt"]
    encoded = inputs.encode(found, recipe.data, config=services.config, processor=services.tokenizer)
    assert len(encoded.train) == 9
