"""`docs/evidence.md`, from the committed results alone."""

from __future__ import annotations

from pathlib import Path

from tunesmith import catalog
from tunesmith.core.part import ROOMS, Part
from tunesmith.evidence import results
from tunesmith.evidence.results import Result, figure, format_number

DOCUMENT = Path(__file__).parents[3] / "docs" / "evidence.md"

_HEAD = """# Evidence

One experiment per system, with its threshold fixed before the run. This page is made by `tunesmith evidence table` from
the results in `src/tunesmith/evidence/results`; the experiments are in `src/tunesmith/evidence`, and
`tunesmith evidence run NAME` runs one again. Figures are medians over the seeds, with their range.

What does not hold is published as it was measured. `stale` means that the part or its claim changed after the run.
"""


def render() -> str:
    """The whole page."""
    entries = [(part, results.load(part.slug)) for room in ROOMS for part in catalog.in_room(room)]
    entries = [(part, result) for part, result in entries if "baseline" not in part.tags]
    counts: dict[str, int] = {}
    for part, result in entries:
        word = results.status(part, result)
        counts[word] = counts.get(word, 0) + 1
    tally = ", ".join(f"{n} {word}" for word, n in sorted(counts.items()))
    lines = [_HEAD, f"{len(entries)} systems: {tally}.", ""]
    for room in ROOMS:
        chosen = [(part, result) for part, result in entries if part.room == room]
        if chosen:
            lines += [f"## {room}", "", "| system | verdict | checks held | seconds |", "| --- | --- | --- | --- |"]
            lines += [_row(part, result) for part, result in chosen] + [""]
    for part, result in entries:
        if result is not None:
            lines += _details(part, result)
    return "\n".join(lines).rstrip() + "\n"


def _row(part: Part, result: Result | None) -> str:
    word = results.status(part, result)
    if result is None:
        return f"| {part.slug} | {word} | | |"
    found = results.checks(result)
    n = sum(check["held"] for check in found)
    return f"| [{part.slug}](#{part.slug}) | {word} | {n} of {len(found)} | {result['seconds']:.0f} |"


def _details(part: Part, result: Result) -> list[str]:
    lines = [f"## {part.slug}", "", f"{part.title} ({part.paper}).", ""]
    lines += [f"**The paper** ({result['where']}): {result['says']}", "", f"**Run here**: {result['ran']}", ""]
    lines += ["| check | figure | threshold | |", "| --- | --- | --- | --- |"]
    for check in results.checks(result):
        mark = "holds" if check["held"] else "**does not hold**"
        bound = f"{check['operator']} {format_number(check['threshold'])}"
        lines.append(f"| {check['name']} | {format_number(check['value'])} | {bound} | {mark} |")
    figures = result["comparison"]["figures"]
    if figures:
        lines += ["", f"Figures over the seeds {', '.join(map(str, result['comparison']['seeds']))}:", ""]
        lines += ["| figure | median (range) |", "| --- | --- |"]
        lines += [f"| {name} | {figure(values)} |" for name, values in figures.items()]
    if not results.held(result):
        lines += ["", f"**What did not hold**: {results.explanation(part) or 'not explained yet.'}"]
    versions = result["environment"]["versions"]
    made = f"torch {versions['torch']}, transformers {versions['transformers']}, peft {versions['peft']}"
    lines += ["", f"{result['environment']['date']}, {made}, {result['environment']['threads']} threads.", ""]
    return lines
