"""What every family promises: answers that its checker accepts, seeds that decide, splits that do not meet."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith import world
from tunesmith.errors import DataError, RecipeError
from tunesmith.world.base import HELDOUT_IN

NAMES = sorted(world.families())
IN_PROCESS = [name for name in NAMES if name != "programs"]  # whose checker starts a process: see test_programs


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_item_has_the_promised_form(name: str, seed: int) -> None:
    item = world.get(name).generate(random.Random(seed))
    assert item.family == name
    assert item.prompt.endswith("\n")
    assert item.answer == item.answer.strip() != ""
    user, assistant = item.messages()
    assert user == {"role": "user", "content": item.prompt.rstrip()}
    assert assistant == {"role": "assistant", "content": item.answer}


@pytest.mark.parametrize("name", IN_PROCESS)
@given(seed=st.integers(0, 2**32), data=st.data())
@settings(max_examples=40, deadline=None)
def test_checker_accepts_the_answer_and_rejects_what_is_near_it(name: str, seed: int, data: st.DataObject) -> None:
    family = world.get(name)
    rng = random.Random(seed)
    item = family.generate(rng)
    assert family.check(item, item.answer)
    assert family.check(item, f"  {item.answer}\n")
    answer = item.answer
    place = data.draw(st.integers(0, len(answer) - 1))
    changed = answer[:place] + ("7" if answer[place] != "7" else "8") + answer[place + 1 :]
    wrong = ["", answer + " x", "x " + answer, answer[:-1], answer + "\n" + answer, changed]
    other = family.generate(rng)
    if other.answer != answer:
        wrong.append(other.answer)
    words = answer.split(" ")
    swapped = " ".join([*words[1:], words[0]])
    if swapped != answer and name not in ("tools",):
        wrong.append(swapped)
    for output in wrong:
        assert not family.check(item, output), (item, output)


@pytest.mark.parametrize("name", NAMES)
def test_seed_decides_everything(name: str) -> None:
    family = world.get(name)
    first = family.items(40, seed=3)
    assert first == world.get(name).items(40, seed=3)
    assert first != family.items(40, seed=4)
    assert family.items(15, seed=3) == first[:15]


@pytest.mark.parametrize("name", NAMES)
def test_splits_hold_no_duplicates_and_never_meet(name: str) -> None:
    family = world.get(name)
    heldout = family.items(250, split="heldout", seed=0)
    train = [item for seed in range(3) for item in family.items(400, split="train", seed=seed)]
    assert len({item.prompt for item in heldout}) == 250
    assert len({item.prompt for item in train[:400]}) == 400
    assert not {family.key(item) for item in heldout} & {family.key(item) for item in train}
    assert all(family.split_of(item) == "heldout" for item in heldout)


@pytest.mark.parametrize("name", NAMES)
def test_one_key_in_ten_is_held_out(name: str) -> None:
    family = world.get(name)
    rng = random.Random(0)
    drawn = {family.key(item): family.split_of(item) for item in (family.generate(rng) for _ in range(4000))}
    share = sum(split == "heldout" for split in drawn.values()) / len(drawn)
    spread = 4 * (0.09 / len(drawn)) ** 0.5
    assert abs(share - 1 / HELDOUT_IN) < spread


def in_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_split_does_not_depend_on_the_process() -> None:
    code = "from tunesmith import world; print([i.prompt for i in world.get('sort').items(5, split='heldout')])"
    assert in_new_process(code) == str([item.prompt for item in world.get("sort").items(5, split="heldout")])


def test_importing_the_world_loads_neither_torch_nor_datasets() -> None:
    heavy = "{'torch', 'datasets', 'transformers', 'numpy'}"
    assert in_new_process(f"import sys, tunesmith.world; print(sorted({heavy} & set(sys.modules)))") == "[]"


@pytest.mark.parametrize(
    ("name", "knobs"),
    [("addition", {"digits": 1}), ("facts", {"persons": 3}), ("copy", {"min_length": 1, "max_length": 1})],
)
def test_too_many_items_is_an_error_that_says_how_many_there_are(name: str, knobs: dict[str, int]) -> None:
    family = world.get(name, **knobs)
    everything = {family.generate(random.Random(seed)).prompt for seed in range(3000)}
    count = 0
    for split in get_args(world.Split):
        with pytest.raises(DataError, match=rf"{name}: 9999 distinct {split} items were asked for") as error:
            family.items(9999, split=split)
        there = int(str(error.value).split("only ")[1].split()[0])
        assert len(family.items(there, split=split)) == there
        count += there
    assert count == len(everything)


def test_listed_families_list_exactly_what_they_generate() -> None:
    for name in NAMES:
        family = world.get(name)
        listed = family.every_item()
        if listed is not None:
            prompts = {item.prompt: item for item in listed}
            for seed in range(200):
                item = family.generate(random.Random(seed))
                assert prompts[item.prompt] == item


@pytest.mark.parametrize(("split", "n"), [("test", 3), ("train", -1)])
def test_bad_split_or_count(split: str, n: int) -> None:
    with pytest.raises(DataError, match="copy: the"):
        world.get("copy").items(n, split=split)  # type: ignore[arg-type]


def test_unknown_names_are_errors_with_a_suggestion() -> None:
    with pytest.raises(RecipeError, match=r"no task family 'srot'\. Did you mean 'sort'"):
        world.get("srot")
    with pytest.raises(RecipeError, match=r"sort has no knob 'max_lenght'\. Did you mean 'max_length'"):
        world.get("sort", max_lenght=3)


def test_pretraining_flag_divides_the_families() -> None:
    shown = {"copy", "reverse", "sort", "addition", "facts", "sentiment", "translation"}
    kept = {"tools", "boxes", "steps", "rotate", "third_language", "programs", "requests", "new_facts", "intents"}
    assert set(world.families(pretraining=True)) == shown
    assert set(world.families(pretraining=False)) == kept
    assert set(world.families()) == shown | kept
    assert all(family.summary for family in world.families().values())
