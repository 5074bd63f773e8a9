"""The committed results of the claims: where they are, whether they are still about the code that stands here."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

from tunesmith import catalog
from tunesmith.core.part import Part

FOLDER = Path(__file__).parent / "results"
Result = dict[str, Any]


def claim_file(part: Part) -> Path:
    """Where a part's claim stands, whether or not it is there yet."""
    return Path(__file__).parent / part.room / f"{part.slug.replace('-', '_')}.py"


def result_file(slug: str) -> Path:
    """Where a part's result is committed."""
    return FOLDER / f"{slug}.json"


def fingerprint(part: Part) -> str:
    """Of the source of the part and of its claim: a result made with other source is stale."""
    part_file = Path(__file__).parents[1] / part.room / f"{part.slug.replace('-', '_')}.py"
    digest = hashlib.sha256()
    for file in (part_file, claim_file(part)):
        digest.update(file.read_bytes() if file.exists() else b"absent")
    return digest.hexdigest()[:16]


def load(slug: str) -> Result | None:
    """The committed result of a part's claim, with `stale` said; None if there is none."""
    file = result_file(slug)
    if not file.exists():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    result["stale"] = result["fingerprint"] != fingerprint(catalog.get(slug))
    return result


def checks(result: Result) -> list[dict[str, Any]]:
    """Every check of a result, exact ones first."""
    return [c for found in result["exact"].values() for c in found] + result["comparison"]["checks"]


def held(result: Result) -> bool:
    """Whether there is something to check, and every check holds."""
    found = checks(result)
    return bool(found) and all(check["held"] for check in found)


def status(part: Part, result: Result | None) -> str:
    """One word for the table: held, not held, stale, no result, no claim, or baseline."""
    if "baseline" in part.tags:
        return "baseline"
    if not claim_file(part).exists():
        return "no claim"
    if result is None:
        return "no result"
    if result["stale"]:
        return "stale"
    return "held" if held(result) else "not held"


def figure(values: list[float]) -> str:
    """Median and range of one figure over the seeds."""
    middle = format_number(statistics.median(values))
    if len(values) == 1 or max(values) == min(values):
        return middle
    return f"{middle} ({format_number(min(values))} to {format_number(max(values))})"


def format_number(value: float) -> str:
    """Short, without losing what a threshold is compared with."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1e-2 or abs(value) >= 1e5 else f"{value:,.4g}"


def summary(slug: str, result: Result | None) -> str:
    """A part's evidence in a few lines of Markdown."""
    part = catalog.get(slug)
    word = status(part, result)
    if result is None:
        return f"\nEvidence: {word}."
    lines = [f"\nEvidence: **{word}** ({result['seconds']:.0f} s; `tunesmith evidence run {slug}`)."]
    for check in checks(result):
        mark = "holds" if check["held"] else "DOES NOT HOLD"
        value, bound = format_number(check["value"]), format_number(check["threshold"])
        lines.append(f"- {check['name']}: {value} {check['operator']} {bound}, {mark}")
    return "\n".join(lines)
