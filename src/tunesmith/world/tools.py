"""A request in plain words -> one JSON tool call on one line (kept for fine-tuning)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from tunesmith.world.base import Family, Item, whole

_CITIES = (
    "Tavro", "Ellmoor", "Quenby", "Sarnet", "Dunvale", "Orlix", "Brackwell", "Minford",
    "Halzen", "Pirna", "Westrow", "Korvane", "Lusk", "Yarrowby", "Zembla", "Fontaine",
)  # fmt: skip
_NAMES = (
    "Anna", "Omar", "Lena", "Ravi", "Noor", "Ivan", "Mei", "Paul", "Sara", "Juan", "Aisha", "Tom", "Yuki", "Olga",
)  # fmt: skip
_THINGS = ("milk", "bread", "stamps", "paint", "batteries", "tea", "soap", "candles", "rice", "apples", "tape", "ink")
_ROOMS = ("kitchen", "hall", "bedroom", "garage", "office", "attic", "cellar", "bathroom", "porch", "study")
_NOTES = ("call back", "dinner is ready", "the train is late", "see you there", "bring the keys", "all is well")
_WHENS = ("soon", "today", "tonight", "tomorrow", "on Sunday", "at noon")
_LABELS = ("tea", "eggs", "laundry", "nap", "bread", "meeting")
Call = tuple[str, dict[str, Any]]


def _timer(rng: random.Random) -> Call:
    minutes = rng.randint(1, 90)
    if rng.random() < 0.3:
        return f"Start a timer of {minutes} minutes", {"tool": "timer", "minutes": minutes}
    label = rng.choice(_LABELS)
    call = {"tool": "timer", "minutes": minutes, "label": label}
    return f"Start a timer of {minutes} minutes for {label}", call


def _weather(rng: random.Random) -> Call:
    city, days, wind = rng.choice(_CITIES), rng.randint(2, 9), rng.random() < 0.5
    call = {"tool": "weather", "city": city, "days": days, "wind": wind}
    return f"Show the weather in {city} for {days} days {'with' if wind else 'without'} wind", call


def _message(rng: random.Random) -> Call:
    to, text = rng.choice(_NAMES), f"{rng.choice(_NOTES)} {rng.choice(_WHENS)}"
    return f"Send {to} the message: {text}", {"tool": "message", "to": to, "text": text}


def _light(rng: random.Random) -> Call:
    room, percent = rng.choice(_ROOMS), rng.randint(0, 20) * 5
    return f"Set the light in the {room} to {percent} percent", {"tool": "light", "room": room, "percent": percent}


def _buy(rng: random.Random) -> Call:
    items = rng.sample(_THINGS, rng.randint(1, 3))
    return f"Put {', '.join(items)} on the shopping list", {"tool": "buy", "items": items}


def _heat(rng: random.Random) -> Call:
    room, degrees = rng.choice(_ROOMS), rng.randint(32, 50) / 2
    return f"Heat the {room} to {degrees} degrees", {"tool": "heat", "room": room, "degrees": degrees}


TOOLS: tuple[Callable[[random.Random], Call], ...] = (_timer, _weather, _message, _light, _buy, _heat)


class Tools(Family):
    """Calls of the first `tools` of: timer, weather, message, light, buy, heat.

    The arguments are whole numbers, decimals, strings, truth values and lists of strings. An output is right if it is
    one line of JSON that equals the answer's, types included; the order of the keys and the spacing are free.
    """

    name = "tools"
    summary = "a request as a JSON tool call"
    pretraining = False

    def __init__(self, *, tools: int = 6) -> None:
        self.tools = whole(self.name, "tools", tools, 1, len(TOOLS))

    def generate(self, rng: random.Random) -> Item:
        request, call = rng.choice(TOOLS[: self.tools])(rng)
        return Item(self.name, f"{request}.\n", json.dumps(call), {"call": call})

    def check(self, item: Item, output: str) -> bool:
        """One line of JSON that equals the answer, types included."""
        output = output.strip()
        if "\n" in output:
            return False
        try:
            found = json.loads(output)
        except (ValueError, RecursionError):
            return False
        return _canonical(found) == _canonical(item.meta["call"])


def _canonical(value: Any) -> str:
    # as text, because True == 1 == 1.0 in Python but not in JSON
    return json.dumps(value, sort_keys=True)
