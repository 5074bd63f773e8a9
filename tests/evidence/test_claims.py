"""Every part has a claim; its exact checks hold; its comparison can be judged."""

from __future__ import annotations

import inspect
import math

import pytest

from tunesmith import catalog
from tunesmith.core.part import Part
from tunesmith.evidence import results, runner
from tunesmith.evidence.claim import Check, Claim

# What others are compared with stands in their claims.
PARTS = [part for part in catalog.parts().values() if "baseline" not in part.tags]
EVERY = pytest.mark.parametrize("part", PARTS, ids=lambda p: p.slug)


def claim_of(part: Part) -> Claim:
    file = results.claim_file(part)
    if not file.exists():
        pytest.fail(f"{part.slug} has no claim: write {file.relative_to(file.parents[4])}", pytrace=False)
    return runner.claim_of(part)


@EVERY
def test_a_part_has_a_claim(part: Part) -> None:
    claim = claim_of(part)
    assert claim.slug == part.slug
    for name in ("says", "where", "ran"):
        text = getattr(claim, name)
        assert text, f"{part.slug}: `{name}` is empty"
        assert text == text.strip()
    assert claim.exacts or claim.compare, f"{part.slug}: the claim checks nothing"
    assert (claim.compare is None) == (claim.judge is None), f"{part.slug}: a comparison and its verdict go together"
    if claim.compare is not None:
        assert len(set(claim.seeds)) >= 3, f"{part.slug}: a comparison takes at least three seeds"
        assert len(inspect.signature(claim.compare).parameters) == 1
    titles = [(inspect.getdoc(run) or "").split("\n")[0] for run in claim.exacts.values()]
    assert all(titles), f"{part.slug}: every exact check says in its docstring what it shows"
    assert len(set(titles)) == len(titles), f"{part.slug}: two exact checks say the same"


@EVERY
def test_its_exact_checks_hold(part: Part) -> None:
    claim = claim_of(part)
    runner.seed_everything(0)
    done = claim.run_exact()
    assert done, f"{part.slug}: no exact check"
    assert len(done) == len(claim.exacts)
    for title, found in done.items():
        assert found, f"{part.slug}: {title}: no figure"
        for check in found:
            assert isinstance(check, Check)
            assert check.name
            assert math.isfinite(check.threshold)
            assert check.held, f"{part.slug}: {title}: {check.name} = {check.value} {check.operator} {check.threshold}"


def test_every_claim_is_of_a_part() -> None:
    folder = results.FOLDER.parent
    known = {results.claim_file(part) for part in PARTS}
    rooms = {part.room for part in catalog.parts().values()}
    found = {file for room in rooms for file in (folder / room).glob("*.py") if file.stem != "__init__"}
    stray = sorted(
        str(file.relative_to(folder)) for file in found - known if "CLAIM = " in file.read_text(encoding="utf-8")
    )
    assert not stray, "claims of parts that do not exist"


def test_every_result_is_of_a_claim() -> None:
    slugs = {part.slug for part in PARTS}
    assert {file.stem for file in results.FOLDER.glob("*.json")} <= slugs
