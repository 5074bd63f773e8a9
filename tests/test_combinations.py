"""What parts refuse of each other and of a run's settings: every refusal that the catalogue declares is kept."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.fields import TRAINING, field_of, joined
from tunesmith.core.part import ROOMS, SETTING_TAGS, Part, Use
from tunesmith.errors import RecipeError
from tunesmith.recipe import load

SETTINGS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"train": {"fsdp": True}},
    "gradient-accumulation": {"train": {"gradient_accumulation": 4}},
    "gradient-clipping": {"train": {"max_grad_norm": 0.5}},
    "gradient-checkpointing": {"train": {"gradient_checkpointing": True}},
    "padding-free": {"data": {"padding_free": True}},
    "quantized-base": {"model": {"quantization": "nf4"}},
    "float-base": {"model": {"quantization": "none"}},
    "full-finetuning": {"method": "full"},
    "encoder-decoder": {"task": "seq2seq"},
}
QUIET = {"train": {"max_grad_norm": 0.0}}
"""Nothing that a part could refuse; clipping is on by default."""


def variants(part: Part) -> Iterator[dict[str, Any]]:
    """The defaults, and each switch and choice of a part turned once, as far as the part allows that."""
    yield {}
    for option in part.options.values():
        choices = [True, False] if option.annotation is bool else []
        if typing.get_origin(option.annotation) is typing.Literal:
            choices = list(typing.get_args(option.annotation))
        yield from ({option.name: choice} for choice in choices if choice != option.default)


def refusals() -> Iterator[Any]:
    """(part, its options, what it refuses, why) for all that training may meet."""
    for part in TRAINING:
        seen: set[str] = set()
        for options in variants(part):
            if any(option.required for option in part.options.values()):
                continue
            for key, reason in part.refusals(part.validate(options)).items():
                if key not in seen:
                    seen.add(key)
                    yield pytest.param(part, options, key, reason, id=f"{part.slug}-{key}")


def refused(key: str, part: Part) -> list[Part]:
    """The other parts that a refusal speaks of."""
    named = [p for p in TRAINING if key in (p.slug, p.room) or key in p.tags]
    # One field holds one part: two of the same room cannot even be asked for.
    single = part.room in ("schedules", "optimizers", "objectives")
    return [p for p in named if p.slug != part.slug and not (single and p.room == part.room)]


@pytest.mark.parametrize(("part", "options", "key", "reason"), refusals())
def test_what_a_part_refuses_is_refused_with_its_reason(
    part: Part, options: dict[str, Any], key: str, reason: str
) -> None:
    mine = field_of(part, **options)
    world = 2 if key == "ddp" else 1
    if key in SETTINGS:
        with pytest.raises(RecipeError) as raised:
            load(joined(mine, QUIET, SETTINGS[key])).check(world)
        assert f"{part.slug} cannot run here (" in str(raised.value)
        assert reason in str(raised.value)
        return
    others = refused(key, part)
    assert others or key in ROOMS, f"{part.slug} refuses {key}, which no part that trains has"
    for other in others:
        fields = joined(mine, QUIET, field_of(other))
        refuses = part.refusals(part.validate(options)) | other.refusals(other.validate({}))
        if "full-finetuning" in refuses and not {"adapters", "prompts"} & {part.room, other.room}:
            fields = joined(fields, {"adapters": ["lora"]})
        with pytest.raises(RecipeError) as raised:
            load(fields).check()
        assert part.slug in str(raised.value)
        assert other.slug in str(raised.value)
        assert "cannot be combined with" in str(raised.value)
        if not ({"own-tuner"} & {*part.tags, *other.tags}):
            back = other.refusals(other.validate({}))  # both may refuse: either's reason is right
            theirs = [back[name] for name in (part.slug, part.room, *part.tags) if name in back]
            assert any(why in str(raised.value) for why in (reason, *theirs))


def test_the_settings_tested_here_are_all_that_there_are() -> None:
    assert SETTINGS.keys() == SETTING_TAGS.keys()
    for key, fields in SETTINGS.items():
        recipe = load(joined({"adapters": ["lora"]} if key != "full-finetuning" else {}, QUIET, fields))
        base = set() if key == "quantized-base" else {"float-base"}
        assert set(recipe.settings(2 if key == "ddp" else 1)) == {key} | base


def test_two_processes_are_ddp_unless_sharded() -> None:
    assert "ddp" in load(QUIET).settings(2)
    assert "ddp" not in load({"train": {"fsdp": True}}).settings(2)
    assert "padding-free" in load({"data": {"packing": True}}).settings()


def test_pairs_that_refuse_nothing_of_each_other_pass() -> None:
    chosen = [part for part in TRAINING if not any(o.required for o in part.options.values())][:14]
    passed = 0
    for a, b in itertools.combinations(chosen, 2):
        fields = joined(QUIET, field_of(a), field_of(b))
        recipe = load(fields)
        if len([u for found in recipe.uses().values() for u in found if u.part.slug in (a.slug, b.slug)]) < 2:
            continue  # one field, one part
        layered = [p for p in (a, b) if p.room in ("adapters", "prompts")]
        every = [use for found in recipe.uses().values() for use in found]
        if clash(every, recipe.settings()) or (len(layered) == 2 and any("own-tuner" in p.tags for p in layered)):
            with pytest.raises(RecipeError, match="cannot"):
                recipe.check()
        else:
            recipe.check()
            passed += 1
    assert passed > 10


def clash(uses: list[Use], settings: Mapping[str, str]) -> bool:
    """Own reading of the rule: some part refuses a setting, or another part by slug, room or tag."""
    for use in uses:
        words = set(settings)
        for other in uses:
            if other is not use:
                words |= {other.part.slug, other.part.room, *other.part.tags}
        if words & set(use.part.refusals(use.options)):
            return True
    return False


def test_a_method_with_a_tuner_of_its_own_stands_alone() -> None:
    with pytest.raises(RecipeError, match="lora cannot be combined with dylora: PEFT injects lora by a tuner of its"):
        load({"adapters": ["lora", "dylora"]}).check()
    with pytest.raises(RecipeError, match="lora cannot be combined with lora"):
        load({"adapters": ["lora", "lora"]}).check()
    load({"adapters": ["dylora", "ssf"]}).check()


def test_codes_are_not_trained() -> None:
    with pytest.raises(RecipeError, match=r"model\.quantization is int8 and no adapter or prompt is given"):
        load({"method": "full", "model": {"quantization": "int8"}}).check()
    load({"model": {"quantization": "int8"}}).check()
