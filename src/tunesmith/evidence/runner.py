"""Running claims and keeping their results."""

from __future__ import annotations

import importlib
import json
import os
import platform
import random
import resource
import traceback
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from rich.console import Console

from tunesmith import catalog
from tunesmith.core.files import write_text
from tunesmith.core.part import Part
from tunesmith.errors import RecipeError
from tunesmith.evidence import results
from tunesmith.evidence.claim import Check, Claim

_LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "numpy", "scikit-learn")


def choose(slugs: list[str], room: str | None, every: bool) -> list[Part]:
    """The parts whose claims to run.

    Raises:
        RecipeError: nothing was named, or more than one way; or a part has no claim.
    """
    if bool(slugs) + bool(room) + every != 1:
        raise RecipeError("name parts, or give --room ROOM, or --all")
    if every:
        wanted = [part for part in catalog.parts().values() if results.claim_file(part).exists()]
    elif room:
        wanted = [part for part in catalog.in_room(room) if results.claim_file(part).exists()]
    else:
        wanted = [catalog.get(slug) for slug in slugs]
    for part in wanted:
        if not results.claim_file(part).exists():
            raise RecipeError(f"{part.slug} has no claim: expected {results.claim_file(part)}")
    if not wanted:
        raise RecipeError(f"no part of {room or 'the catalogue'} has a claim yet")
    return wanted


def claim_of(part: Part) -> Claim:
    """The claim object of a part."""
    name = f"tunesmith.evidence.{part.room}.{part.slug.replace('-', '_')}"
    return importlib.import_module(name).CLAIM


def seed_everything(seed: int) -> None:
    """Every claim starts from the same global random state, whatever ran before it."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def run_claims(wanted: list[Part], *, exact_only: bool = False, console: Console | None = None) -> bool:
    """Run the claims one after the other; write each result as soon as it is there.

    Returns:
        Whether all ran to their end; with `exact_only`, whether all exact checks hold.
    """
    console = console or Console()
    fine = True
    for part in wanted:
        try:
            result = run_claim(part, exact_only=exact_only, console=console)
        except Exception:  # one broken experiment must not take the others with it
            console.print(f"[bold red]{part.slug}: did not run[/]")
            console.print(traceback.format_exc(), markup=False)
            fine = False
            continue
        if exact_only:
            fine = fine and results.held(result)
        else:
            write_text(results.result_file(part.slug), json.dumps(result, indent=1) + "\n")
    return fine


def run_claim(part: Part, *, exact_only: bool = False, console: Console | None = None) -> results.Result:
    """Run one claim; the result as it is committed."""
    console = console or Console(quiet=True)
    claim = claim_of(part)
    began = _seconds()
    seed_everything(0)
    exact = claim.run_exact()
    exact_seconds = _seconds() - began
    for title, found in exact.items():
        _say(console, part.slug, title, found)
    comparison: dict[str, Any] = {"seeds": [], "figures": {}, "checks": []}
    if claim.compare is not None and not exact_only:
        rows = []
        for seed in claim.seeds:
            at = _seconds()
            seed_everything(seed)
            rows.append(claim.compare(seed))
            console.print(f"{part.slug}: seed {seed} took {_seconds() - at:.0f} s", highlight=False)
        figures = claim.figures(rows)
        verdict = list(claim.judge(figures)) if claim.judge else []
        _say(console, part.slug, "comparison", verdict)
        comparison = {
            "seeds": list(claim.seeds),
            "figures": {name: list(values) for name, values in figures.values.items()},
            "checks": [check.to_json() for check in verdict],
        }
    return {
        "slug": part.slug,
        "fingerprint": results.fingerprint(part),
        "says": claim.says,
        "where": claim.where,
        "ran": claim.ran,
        "exact": {title: [check.to_json() for check in found] for title, found in exact.items()},
        "comparison": comparison,
        "seconds": round(_seconds() - began, 1),
        "exact_seconds": round(exact_seconds, 1),
        "environment": environment(),
    }


def _seconds() -> float:
    """Processor time of this process and those that it started: what else the machine does adds little to it."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def environment() -> dict[str, Any]:
    """What the figures depend on besides the source."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in _LIBRARIES},
    }


def _say(console: Console, slug: str, title: str, found: list[Check]) -> None:
    for check in found:
        colour, word = ("green", "holds") if check.held else ("red", "does not hold")
        value, bound = results.format_number(float(check.value)), results.format_number(check.threshold)
        console.print(
            f"{slug}: {title}: {check.name} = {value} {check.operator} {bound} [{colour}]{word}[/]", highlight=False
        )
