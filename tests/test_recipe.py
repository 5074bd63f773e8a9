"""Recipes: what is read, what is refused before anything is loaded, and that none of it is lost on the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.fields import TRAINING, field_of, joined
from tunesmith import catalog
from tunesmith.core.part import Part
from tunesmith.errors import RecipeError
from tunesmith.recipe import Recipe, load
from tunesmith.recipe_fields import PartSpec

EVERY = pytest.mark.parametrize("part", TRAINING, ids=lambda p: p.slug)


# Reading ----------------------------------------------------------------------------------------------------------


def test_nothing_is_lora_on_the_embedded_model() -> None:
    recipe = load(None)
    assert recipe == Recipe()
    assert [spec.name for spec in recipe.adapters] == ["lora"]
    assert recipe.model.name == "tiny-lm-m"
    assert not recipe.full


def test_a_yaml_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {name: ./somewhere, dtype: bfloat16}\n"
        "adapters: [{name: dylora, rank: 4, target_modules: [q_proj]}]\n"
        "schedule: lisa\n"
        "train: {learning_rate: 1e-4, steps: 7}\n"
    )
    recipe = load(file)
    assert (recipe.model.name, recipe.model.dtype) == ("./somewhere", "bfloat16")
    assert recipe.adapters[0].options == {"rank": 4}
    assert recipe.adapters[0].target_modules == ["q_proj"]
    assert recipe.schedule == PartSpec(name="lisa")
    assert recipe.train.learning_rate == 1e-4, "YAML 1.1 reads 1e-4 as text"
    assert recipe.uses()["adapters"][0].options["rank"] == 4
    assert load(str(file)) == recipe


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("# nothing\n")
    assert load(file) == Recipe()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: [1, 2", r"(?s)recipe\.yaml is not YAML: .*line 1"),
        (b"\xff\xfe\x00", r"recipe\.yaml is not YAML: .*utf-8"),
        (b"- lora\n", r"recipe\.yaml: a recipe is a mapping of fields; found a list"),
        (b"train: {steps: no}\n", r"recipe\.yaml: train\.steps: "),
        (b"!!python/object/apply:os.getcwd []\n", r"(?s)recipe\.yaml is not YAML: .*could not determine a constructor"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no recipe file .*nowhere\.yaml"):
        load(tmp_path / "nowhere.yaml")


def test_a_mapping_is_read_and_left_as_it_was() -> None:
    given_ = {"train": {"steps": 3}, "data": {"train": "rows.jsonl"}}
    recipe = load(given_, {"train.steps": 9, "train.batch_size": 2, "data.train": "other.jsonl"})
    assert (recipe.train.steps, recipe.train.batch_size, recipe.data.train) == (9, 2, "other.jsonl")
    assert given_ == {"train": {"steps": 3}, "data": {"train": "rows.jsonl"}}


# Overrides --------------------------------------------------------------------------------------------------------


def test_overrides_reach_any_depth_and_make_what_is_missing() -> None:
    overrides = {"train.steps": 5, "schedule.layers": 1, "output": "there", "data.columns.prompt": "question"}
    recipe = load({"schedule": "lisa"}, overrides)
    assert recipe.train.steps == 5
    assert recipe.schedule == PartSpec(name="lisa", layers=1)
    assert recipe.output == "there"
    assert recipe.data.columns == {"prompt": "question"}


@pytest.mark.parametrize("field", ["schedule", "optimizer", "objective"])
def test_an_option_can_be_set_beside_a_bare_name(field: str) -> None:
    name = {"schedule": "lisa", "optimizer": "galore", "objective": "sft"}[field]
    held = getattr(load({field: name}, {f"{field}.some_option": 3}), field)
    assert (held.name, held.options) == (name, {"some_option": 3})


def test_a_bare_model_name_keeps_its_name() -> None:
    assert load({"model": "tiny-lm-s"}, {"model.dtype": "bfloat16"}).model.name == "tiny-lm-s"
    assert load({"model": Path("a/b")}).model.name == "a/b"


def test_an_override_below_what_is_no_mapping_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"--set train\.steps\.x: train\.steps is not a mapping"):
        load({"train": {"steps": 3}}, {"train.steps.x": 1})
    with pytest.raises(RecipeError, match=r"--set adapters\.rank: adapters is not a mapping; write the whole field"):
        load({"adapters": ["lora"]}, {"adapters.rank": 4})


# The shorthand ----------------------------------------------------------------------------------------------------


@EVERY
def test_method_is_what_its_field_would_be(part: Part) -> None:
    short, written = Recipe(method=part.slug), load(field_of(part))
    assert short == written
    assert short.method is None
    if part.room == "data":
        assert [spec.name for spec in short.data.select] == [part.slug]


def test_full_trains_the_weights() -> None:
    recipe = Recipe(method="full")
    assert recipe.full
    assert (recipe.adapters, recipe.method) == ([], "full")
    assert Recipe(method="full", schedule="lisa", objective="sft").full


def test_full_beside_what_freezes_the_weights_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"method: full trains the weights themselves, and dylora, dept leaves them"):
        Recipe(method="full", adapters=["dylora"], prompts=["dept"])


def test_method_beside_other_parts() -> None:
    recipe = Recipe(method="lisa", adapters=["dylora"])
    assert (recipe.adapters[0].name, recipe.schedule) == ("dylora", PartSpec(name="lisa"))
    recipe = Recipe(method="dylora", adapters=[{"name": "dylora", "rank": 2}])
    assert [(spec.name, spec.options) for spec in recipe.adapters] == [("dylora", {"rank": 2})]
    assert [spec.name for spec in Recipe(method="ssf", adapters=["dylora"]).adapters] == ["dylora", "ssf"]
    assert Recipe(method="lisa", schedule={"name": "lisa", "layers": 1}).schedule == PartSpec(name="lisa", layers=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "galore", "optimizer": "mezo"}, "method: galore and optimizer: mezo ask for two different"),
        ({"method": "sft", "objective": "intuitive-finetuning"}, "method: sft and objective: intuitive-finetuning"),
        (
            {"method": "galore", "optimizer": {"name": "adamw_torch", "adam_beta1": 0.5}},
            "method: galore and optimizer: adamw_torch",
        ),
        ({"method": "model-soups"}, r"'model-soups' is in the room merging, which has its own command"),
        ({"method": "dylra"}, r"there is no part 'dylra'\. Did you mean 'dylora'"),
        ({"method": 3}, r"recipe: method: Input should be a valid string, found 3\."),
    ],
)
def test_a_shorthand_that_cannot_be_placed_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(fields)


# Refused by name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trian": {}}, r"recipe: there is no field 'trian'\. Did you mean 'train'\? Fields there: model, data, task"),
        (
            {"train": {"stps": 2}},
            r"there is no field 'train\.stps'\. Did you mean 'steps'\? Fields there: epochs, steps",
        ),
        ({"data": {"zzzz": 2}}, r"there is no field 'data\.zzzz'\. Fields there: train, eval"),
        ({"model": {"adaptr": "x"}}, r"'model\.adaptr'\. Did you mean 'adapter'"),
        ({"report": {"sample": 1}}, r"'report\.sample'\. Did you mean 'samples'"),
    ],
)
def test_an_unknown_field_is_named_with_a_suggestion(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": {"steps": "many"}}, r"train\.steps: .*valid integer.*, found 'many'\."),
        ({"train": {"steps": 0}}, r"train\.steps: .*greater than 0, found 0\."),
        ({"train": {"learning_rate": float("nan")}}, r"train\.learning_rate: .*found nan"),
        ({"train": None}, r"recipe: train: .*found None"),
        ({"data": {"eval_fraction": 1.5}}, r"data\.eval_fraction: .*less than 1, found 1\.5"),
        ({"data": {"too_long": "cut"}}, r"data\.too_long: .*'drop', 'truncate' or 'error', found 'cut'"),
        (
            {"data": {"padding_free": "maybe"}},
            r"data\.padding_free: .*boolean.* or Input should be 'auto', found 'maybe'",
        ),
        ({"model": {"quantization": "int3"}}, r"model\.quantization: .*found 'int3'"),
        ({"task": "classification"}, r"recipe: task: .*'text-classification'.*found 'classification'"),
        (
            {"adapters": [{"name": "lora", "target_modules": 3}]},
            r"adapters\.0\.target_modules: .*list or .*string, found 3",
        ),
        ({"adapters": "lora"}, r"adapters: .*valid list, found 'lora'"),
        ({"schedule": {"layers": 2}}, r"schedule\.name: Field required"),
        ({"data": {"columns": {"prompt": 3}}}, r"data\.columns\.prompt: .*valid string, found 3"),
    ],
)
def test_a_wrong_value_is_named_with_its_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(fields)


def test_assignment_is_checked_too() -> None:
    recipe = Recipe()
    with pytest.raises(ValueError, match="greater than 0"):
        recipe.train.steps = -1


@EVERY
def test_a_wrong_option_is_refused_with_the_parts_name(part: Part) -> None:
    with pytest.raises(RecipeError, match=rf"{part.slug} has no option 'no_such_option'.*Its options: "):
        load(field_of(part, no_such_option=1)).check()


def test_a_wrong_value_of_an_option_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"dylora: option 'rank': .*greater than 0.*found -1"):
        load({"adapters": [{"name": "dylora", "rank": -1}]}).check()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapters": ["dylra"]}, r"there is no part 'dylra'\. Did you mean 'dylora'"),
        ({"prompts": ["dylora"]}, r"'dylora' is in the room adapters .*, not in prompts"),
        ({"schedule": "galore"}, r"'galore' is in the room optimizers .*, not in schedules"),
        ({"data": {"select": ["lora"]}}, r"'lora' is in the room adapters .*, not in data"),
        ({"optimizer": "galor"}, r"optimizer: there is no 'galor'\. Did you mean 'galore'\? Known: .*adamw_torch"),
        ({"optimizer": "dylora"}, r"'dylora' is in the room adapters .*, not in optimizers"),
        ({"train": {"lr_schedule": "cosin"}}, r"train\.lr_schedule: there is no 'cosin'\. Did you mean 'cosine'"),
    ],
)
def test_an_unknown_or_misplaced_part_is_refused_before_anything_is_loaded(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load(fields).check()


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", "adafactor"])
def test_transformers_optimizers_and_schedules_pass(name: str) -> None:
    load({"optimizer": name, "train": {"lr_schedule": "cosine"}}).check()


def test_regularisers_are_told_from_objectives() -> None:
    with pytest.raises(RecipeError, match="'sft' replaces the objective; it is not a regulariser"):
        load({"regularisers": ["sft"]}).check()


@pytest.mark.parametrize("weight", ["heavy", None, True, float("nan"), [1]])
def test_a_regularisers_weight_is_a_number(monkeypatch: pytest.MonkeyPatch, weight: Any) -> None:
    marked = dataclasses.replace(catalog.get("sft"), tags=("regulariser",))
    monkeypatch.setattr(catalog, "get", lambda slug, room=None: marked if slug == "sft" else catalog.parts()[slug])
    use = load({"regularisers": [{"name": "sft", "weight": "1e-1"}]}).uses()["regularisers"][0]
    assert use.options == {}
    with pytest.raises(RecipeError, match=r"the weight of sft must be a number, found"):
        load({"regularisers": [{"name": "sft", "weight": weight}]}).check()


# Round trips ------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("extra", [{}, {"method": "full"}], ids=["alone", "full"])
def test_every_part_survives_yaml_and_copying(part: Part, extra: dict[str, Any]) -> None:
    if extra and part.room in ("adapters", "prompts"):
        return
    recipe = load(joined(field_of(part), extra)) if extra else Recipe(method=part.slug)
    assert load(yaml.safe_load(recipe.to_yaml())) == recipe
    assert load(recipe) == recipe
    assert load(recipe, {"train.steps": 5}).model_copy(update={"train": recipe.train}) == recipe


_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "model": st.sampled_from(["tiny-lm-s", "./a model", "org/name", {"name": "x", "dtype": "auto"}]),
        "adapters": st.lists(
            st.sampled_from(["ssf", {"name": "dylora", "rank": 3, "target_modules": r".*q_proj|k: {x}"}]), max_size=3
        ),
        "optimizer": st.sampled_from(["adamw_torch", "galore", {"name": "sgd", "momentum": 0.5}]),
        "schedule": st.sampled_from([None, "lisa", {"name": "lisa", "layers": 1}]),
        "task": st.sampled_from([None, "causal-lm"]),
        "output": st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs")), min_size=1),
        "train": st.fixed_dictionaries(
            {},
            optional={
                "epochs": st.floats(1e-3, 1e3),
                "steps": st.none() | st.integers(1, 10**9),
                "learning_rate": st.floats(1e-12, 1.0),
                "warmup": st.floats(0, 100),
                "seed": st.integers(-5, 5),
                "fsdp": st.booleans(),
            },
        ),
        "data": st.fixed_dictionaries(
            {},
            optional={
                "train": st.text(st.characters(codec="utf-8", exclude_categories=("C",)), min_size=1),
                "columns": st.dictionaries(st.sampled_from(["prompt", "completion"]), st.text(max_size=5)),
                "padding_free": st.sampled_from([True, False, "auto"]),
                "eval_fraction": st.floats(0.01, 0.99),
            },
        ),
    },
)


@given(_FIELDS)
def test_yaml_and_back_is_the_same_recipe(fields: dict[str, Any]) -> None:
    recipe = load(fields)
    assert load(yaml.safe_load(recipe.to_yaml()) or {}) == recipe
    assert load(recipe) == recipe


def test_yaml_is_written_to_a_file_and_leaves_defaults_out(tmp_path: Path) -> None:
    recipe = Recipe(method="ssf", train={"steps": 3})
    text = recipe.to_yaml(tmp_path / "made" / "recipe.yaml")
    assert yaml.safe_load(text) == {"adapters": [{"name": "ssf"}], "train": {"steps": 3}}
    assert load(tmp_path / "made" / "recipe.yaml") == recipe


def test_the_implied_lora_gives_way_to_an_override() -> None:
    assert load(Recipe(), {"method": "full"}).full
    assert load(Recipe(), {"method": "galore"}).adapters == []
