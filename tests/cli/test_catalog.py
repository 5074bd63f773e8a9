"""`catalog`, `show` and `evidence`: what there is, one part in full, and what its experiments found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith import catalog
from tunesmith.core.part import ROOMS, Part
from tunesmith.evidence import results, runner, table
from tunesmith.evidence.claim import Check, Claim

Say = Callable[..., Any]
PARTS = list(catalog.parts().values())
EVERY = pytest.mark.parametrize("part", PARTS, ids=lambda p: p.slug)


def flat(text: str) -> str:
    return " ".join(text.split())


def test_every_part_is_listed(tunesmith: Say) -> None:
    said = tunesmith("catalog")
    assert said.status == 0
    for part in PARTS:
        assert f" {part.slug} " in said.out
        assert part.title[:25] in said.out
    assert f"{len(PARTS)} parts." in said.out
    for room in ROOMS:
        assert (f"{room}: {ROOMS[room]}" in said.out) == bool(catalog.in_room(room))


def test_one_room(tunesmith: Say) -> None:
    said = tunesmith("catalog", "--room", "merging")
    assert "model-soups" in said.out
    assert "dylora" not in said.out
    assert "there is no room 'mergin'. Did you mean 'merging'?" in tunesmith("catalog", "--room", "mergin").error


def test_as_json(tunesmith: Say) -> None:
    held = json.loads(tunesmith("catalog", "--json").out)
    assert [entry["slug"] for entry in held] == [p.slug for room in ROOMS for p in catalog.in_room(room)]
    first = next(entry for entry in held if entry["slug"] == "galore")
    part = catalog.get("galore")
    assert first == {
        "slug": "galore", "room": "optimizers", "title": part.title, "paper": part.paper,
        "tags": list(part.tags), "refuses": dict(part.refuses), "extras": list(part.extras),
    }  # fmt: skip
    room = json.loads(tunesmith("catalog", "--json", "--room", "prompts").out)
    assert {entry["room"] for entry in room} == {"prompts"}


@EVERY
def test_a_part_is_explained(tunesmith: Say, part: Part) -> None:
    said = tunesmith("show", part.slug)
    assert said.status == 0, said.err
    text = flat(said.out.replace("│", " "))
    assert flat(part.doc)[:200] in text
    assert part.room in text
    assert part.paper in text
    for name, option in part.options.items():
        assert f"{name} " in said.out
        # Brackets are markup to the terminal library: `list[str]` must not lose them.
        assert option.type_name.split(" ")[0][:20] in text
    for reason in part.refuses.values():
        assert reason in text
    assert "Evidence:" in text


@EVERY
def test_a_part_as_json(tunesmith: Say, part: Part) -> None:
    held = json.loads(tunesmith("show", part.slug, "--json").out)
    assert (held["slug"], held["room"], held["paper"], held["doc"]) == (part.slug, part.room, part.paper, part.doc)
    assert [option["name"] for option in held["options"]] == list(part.options)
    for shown, option in zip(held["options"], part.options.values(), strict=True):
        assert shown["help"] == option.help
        assert shown["required"] == option.required
        assert ("default" in shown) is not option.required
    assert held["refuses"] == dict(part.refuses)


def test_brackets_in_an_option_are_shown(tunesmith: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    part = next(p for p in PARTS if any("[" in o.type_name for o in p.options.values()))
    option = next(o for o in part.options.values() if "[" in o.type_name)
    assert option.type_name[:12] in tunesmith("show", part.slug).out


def test_an_unknown_part_is_suggested(tunesmith: Say) -> None:
    assert "there is no part 'dylra'. Did you mean 'dylora'?" in tunesmith("show", "dylra").error


# Evidence ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page and the results somewhere else, empty."""
    monkeypatch.setattr(table, "DOCUMENT", tmp_path / "docs" / "evidence.md")
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    return tmp_path / "docs" / "evidence.md"


def test_the_table_is_checked_and_written(tunesmith: Say, document: Path) -> None:
    missing = tunesmith("evidence", "table", "--check")
    assert missing.status == 1
    assert "is not what the results say; run `tunesmith evidence table`" in missing.err
    assert not document.exists()
    written = tunesmith("evidence", "table")
    assert written.status == 0
    assert str(document) in flat(written.out)
    assert tunesmith("evidence", "table", "--check").status == 0
    document.write_text(document.read_text() + "\n")
    assert tunesmith("evidence", "table", "--check").status == 1


@pytest.fixture
def claim(monkeypatch: pytest.MonkeyPatch) -> Claim:
    """A claim of a part, in the place of the real one."""
    made = Claim("lisa", says="It holds.", where="Table 1", ran="A number.", seeds=(0, 1, 2))
    monkeypatch.setattr(runner, "claim_of", lambda part: made)
    return made


def test_running_writes_a_result_that_show_and_the_table_read(tunesmith: Say, document: Path, claim: Claim) -> None:
    claim.exact(lambda: Check("one, points", 1.0, "==", 1.0))
    claim.comparison(lambda seed: {"ours": 2.0 + seed, "base": 1.0})
    claim.verdict(lambda found: [Check("gain, points", found.median("ours") - found.median("base"), ">=", 5.0)])
    said = tunesmith("evidence", "run", "lisa")
    assert said.status == 0, said.err
    assert "one, points = 1 == 1 holds" in said.out
    assert "gain, points = 2 >= 5 does not hold" in said.out, "published, not a failure"
    assert "gain, points: 2 >= 5, DOES NOT HOLD" in tunesmith("show", "lisa").out
    tunesmith("evidence", "table")
    page = document.read_text()
    assert "| [lisa](#lisa) | not held | 1 of 2 |" in page
    assert "| ours | 3 (2 to 4) |" in page


def test_exact_checks_alone_write_nothing_and_fail_loudly(tunesmith: Say, document: Path, claim: Claim) -> None:
    claim.exact(lambda: Check("one", 1.0, "==", 1.0))
    claim.comparison(lambda seed: pytest.fail("the comparison ran"))
    assert tunesmith("evidence", "run", "lisa", "--exact").status == 0
    claim.exacts["other"] = lambda: Check("two", 2.0, "<=", 1.0)
    assert tunesmith("evidence", "run", "lisa", "--exact").status == 1
    assert not results.FOLDER.exists()


def test_an_experiment_that_breaks_is_reported_and_the_others_run(
    tunesmith: Say, document: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def claim_of(part: Part) -> Claim:
        made = Claim(part.slug, says="", where="", ran="")
        made.exact(lambda: Check("one", 1.0 / (part.slug != "lisa"), "==", 1.0))
        return made

    monkeypatch.setattr(runner, "claim_of", claim_of)
    said = tunesmith("evidence", "run", "lisa", "galore")
    assert said.status == 1
    assert "lisa: did not run" in said.out
    assert "ZeroDivisionError" in said.out
    assert [file.name for file in results.FOLDER.iterdir()] == ["galore.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name parts, or give --room ROOM, or --all"),
        (["lisa", "--all"], "name parts, or give --room ROOM, or --all"),
        (["lisaa"], "there is no part 'lisaa'. Did you mean 'lisa'?"),
        (["--room", "mergin"], "there is no room 'mergin'"),
        (["lora"], "lora has no claim: expected"),
    ],
)
def test_what_cannot_be_run_is_refused(tunesmith: Say, document: Path, arguments: list[str], message: str) -> None:
    assert message in tunesmith("evidence", "run", *arguments).error
