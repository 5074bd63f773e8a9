"""The register of parts: what exists, in which room, from which paper.

A part registers by being a file in its room: `adapters/lora_ga.py` is `lora-ga`. The catalogue reads each file's
docstring and its `@part(...)` declaration from the source, so that listing two hundred parts imports none of them.
Another package adds parts through the entry point group `tunesmith.parts`, whose names are slugs and whose values
are `module:object`; the room is then the `tunesmith_room` attribute of that module.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from tunesmith.core.part import ROOMS, SETTING_TAGS, TAGS, Part
from tunesmith.errors import RecipeError, did_you_mean

ENTRY_POINT_GROUP = "tunesmith.parts"


@lru_cache
def parts() -> dict[str, Part]:
    """Every part by slug, ours by room and then the third parties'."""
    found = {part.slug: part for part in _own()}
    for part in _third_party():
        if part.slug in found:
            raise RecipeError(
                f"the entry point {part.slug!r} of {ENTRY_POINT_GROUP} ({part.module}) has the name of a part that "
                f"exists already ({found[part.slug].module}); give it another name"
            )
        found[part.slug] = part
    return found


def get(slug: str, room: str | None = None) -> Part:
    """The part of that name, checked to be in `room` if one is given."""
    every = parts()
    if slug not in every:
        where = [s for s, p in every.items() if room is None or p.room == room]
        raise RecipeError(
            f"there is no part {slug!r}.{did_you_mean(slug, where)} `tunesmith catalog` lists what there is."
        )
    part = every[slug]
    if room is not None and part.room != room:
        raise RecipeError(f"{slug!r} is in the room {part.room} ({ROOMS[part.room]}), not in {room} ({ROOMS[room]}).")
    return part


def in_room(room: str) -> list[Part]:
    """The parts of one room, by slug."""
    if room not in ROOMS:
        raise RecipeError(f"there is no room {room!r}.{did_you_mean(room, ROOMS)} Rooms: {', '.join(ROOMS)}.")
    return sorted((p for p in parts().values() if p.room == room), key=lambda p: p.slug)


def _own() -> Iterator[Part]:
    house = Path(__file__).parent
    for room in ROOMS:
        for file in sorted((house / room).glob("*.py")):
            part = read_part(file, room, f"tunesmith.{room}.{file.stem}")
            if part is not None:
                yield part


def _third_party() -> Iterator[Part]:
    for point in entry_points(group=ENTRY_POINT_GROUP):
        spec = find_spec(point.module)
        if spec is None or spec.origin is None:
            raise RecipeError(
                f"the entry point {point.name!r} of {ENTRY_POINT_GROUP} names the module {point.module!r}, which "
                "cannot be found; reinstall or remove the package that declares it"
            )
        file = Path(spec.origin)
        part = read_part(file, None, point.module)
        if part is None or part.name != point.attr:
            raise RecipeError(f"{file}: no `@part(...)` on {point.attr!r}, which the entry point {point.name!r} names")
        yield Part(**{**part.__dict__, "slug": point.name})


def read_part(file: Path, room: str | None, module: str) -> Part | None:
    """The part declared in `file`, read without importing it; None if it declares none (a room's helper file).

    Raises:
        RecipeError: two declarations in one file, a keyword that is not a literal, an unknown tag, no docstring.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    declared = [
        (node, call)
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        for call in node.decorator_list
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "part"
    ]
    if not declared:
        return None
    if len(declared) > 1:
        raise RecipeError(f"{file}: {len(declared)} parts in one file; give each a file of its own")
    node, call = declared[0]
    try:
        given = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
    except ValueError:
        raise RecipeError(f"{file}:{call.lineno}: the keywords of @part must be literals") from None
    room = room or _module_string(tree, "tunesmith_room")
    if room not in ROOMS:
        raise RecipeError(f"{file}: `tunesmith_room` is {room!r}; expected one of {', '.join(ROOMS)}")
    doc = ast.get_docstring(tree)
    if not doc:
        raise RecipeError(f"{file}: a part's file begins with a docstring: the paper and the equation")
    if unknown := set(given.get("tags", ())) - set(TAGS):
        raise RecipeError(f"{file}:{call.lineno}: unknown tags {sorted(unknown)}; known: {', '.join(TAGS)}")
    return Part(slug=file.stem.replace("_", "-"), room=room, module=module, name=node.name, doc=doc, **given)


def _module_string(tree: ast.Module, name: str) -> str | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return ast.literal_eval(node.value)
    return None


def unknown_refusals(part: Part) -> list[str]:
    """Keys of `part.refuses` that name nothing: a slug, a room, a tag or a tag of the settings is expected."""
    known = {*parts(), *ROOMS, *TAGS, *SETTING_TAGS}
    return sorted(set(part.refuses) - known)
