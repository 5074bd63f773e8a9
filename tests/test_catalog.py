"""The catalogue: what a part's file must say, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith import catalog
from tunesmith.core.part import TAGS, Part, Use, argument_help, check_combination
from tunesmith.errors import RecipeError

EVERY = pytest.mark.parametrize("part", catalog.parts().values(), ids=lambda p: p.slug)


@EVERY
def test_a_part_explains_itself(part: Part) -> None:
    assert part.title
    assert part.paper.startswith("arXiv:") or "baseline" in part.tags
    assert part.target.__tunesmith_part__ is True
    for option in part.options.values():
        assert option.help, f"option {option.name} is not explained under Args:"


@EVERY
def test_what_a_part_refuses_exists(part: Part) -> None:
    assert catalog.unknown_refusals(part) == []


@EVERY
def test_defaults_pass_their_own_checks(part: Part) -> None:
    if not any(option.required for option in part.options.values()):
        given = {name: option.default for name, option in part.options.items()}
        assert part.validate(given) == part.validate({})


@EVERY
def test_unknown_options_are_refused(part: Part) -> None:
    with pytest.raises(RecipeError, match=r"no option 'no_such_option'"):
        part.validate({"no_such_option": 1})


def test_unknown_part_suggests() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'dylora'"):
        catalog.get("dylra")


def test_wrong_room_says_which() -> None:
    with pytest.raises(RecipeError, match=r"room adapters.*not in optimizers"):
        catalog.get("dylora", "optimizers")


def test_wrong_value_names_part_option_and_value() -> None:
    with pytest.raises(RecipeError, match=r"dylora: option 'rank': .*greater than 0.*found -1"):
        catalog.get("dylora").validate({"rank": -1})


def write(folder: Path, text: str) -> Path:
    file = folder / "some_part.py"
    file.write_text(text)
    return file


GOOD = '"""Some: a part."""\n@part(paper="arXiv:0000.00000", tags=("mergeable",))\nclass Some:\n    pass\n'


def test_a_file_is_read_without_importing_it(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD + "raise RuntimeError('imported')\n")
    part = catalog.read_part(file, "adapters", "nowhere.some_part")
    assert part is not None
    assert (part.slug, part.name, part.tags) == ("some-part", "Some", ("mergeable",))


def test_a_helper_file_is_no_part(tmp_path: Path) -> None:
    assert catalog.read_part(write(tmp_path, '"""Helper."""\nclass A: pass\n'), "adapters", "m") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + '@part(paper="")\nclass Other: pass\n', "2 parts in one file"),
        ('"""D."""\nX = ()\n@part(paper="", tags=X)\nclass A: pass\n', "must be literals"),
        ('@part(paper="")\nclass A: pass\n', "docstring"),
        ('"""D."""\n@part(paper="", tags=("fast",))\nclass A: pass\n', r"unknown tags \['fast'\]"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        catalog.read_part(write(tmp_path, text), "adapters", "m")


def made(slug: str, **fields: object) -> Use:
    return Use(Part(slug, "adapters", "tests.test_catalog", "_Target", "Doc", **fields), {})  # type: ignore[arg-type]


class _Target:
    pass


def test_refusals_name_both_and_why() -> None:
    a, b = made("a", refuses={"low-rank": "it would be undone"}), made("b", tags=("low-rank",))
    with pytest.raises(RecipeError, match="a cannot be combined with b: it would be undone"):
        check_combination([a, b], {})
    check_combination([a, made("c")], {})


def test_a_part_does_not_refuse_itself() -> None:
    check_combination([made("a", refuses={"adapters": "one adapter only"})], {})


def test_settings_are_refused_with_the_words_of_the_recipe() -> None:
    with pytest.raises(RecipeError, match=r"a cannot run here \(train.fsdp is true\): states are sharded"):
        check_combination([made("a", refuses={"fsdp": "states are sharded"})], {"fsdp": "train.fsdp is true"})


def test_argument_help_reads_google_style() -> None:
    doc = "Title.\n\nArgs:\n    one: First\n        line two.\n    two (int): Second.\n\nReturns:\n    three: no"
    assert argument_help(doc) == {"one": "First line two.", "two": "Second."}


def test_tags_are_sentences() -> None:
    assert all(text and not text.endswith(".") for text in TAGS.values())
