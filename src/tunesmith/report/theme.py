"""The shades of heatmaps as CSS variables and rules, for a light and a dark page."""

from __future__ import annotations

from tunesmith.report.heatmap import LEVELS

Stops = tuple[str, ...]
# One hue from the page's own colour to the ink's: more is always further from the page.
_SEQUENTIAL: tuple[Stops, Stops] = (
    ("eaf1f8", "a9cae6", "4a8cc4", "1d5f9c", "0b3767"),
    ("1d2833", "1f4a73", "2f72ad", "7fbdf0", "d3e9ff"),
)
_DIVERGING: tuple[Stops, Stops] = (
    ("8a3b06", "dc8b47", "f3f1ee", "5b9bcf", "0b3767"),
    ("ffd2ab", "c8722d", "262b31", "2f77b3", "d3e9ff"),
)


def shades() -> str:
    """`--h0 ...` and `--v0 ...` for both themes, and the classes `.h0 ...` and `.v0 ...` that fill with them."""
    light, dark = (
        "".join(
            f"--{kind}{i}:{colour};"
            for kind, stops in (("h", _SEQUENTIAL[theme]), ("v", _DIVERGING[theme]))
            for i, colour in enumerate(_ramp(stops))
        )
        for theme in (0, 1)
    )
    rules = "".join(f".{kind}{i}{{fill:var(--{kind}{i})}}" for kind in "hv" for i in range(LEVELS))
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{rules}\n"


def _ramp(stops: Stops) -> list[str]:
    """`LEVELS` colours, evenly along the stops."""
    colours = [[int(stop[i : i + 2], 16) for i in (0, 2, 4)] for stop in stops]
    made = []
    for level in range(LEVELS):
        at = level / (LEVELS - 1) * (len(stops) - 1)
        first = min(int(at), len(stops) - 2)
        part = at - first
        mixed = [round(a + (b - a) * part) for a, b in zip(colours[first], colours[first + 1], strict=True)]
        made.append("#" + "".join(f"{channel:02x}" for channel in mixed))
    return made
