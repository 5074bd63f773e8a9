"""What the model knew before, to see what training makes it forget.

The user's own rows if `data.retain` names some. Otherwise, for an embedded language model, held-out items of the
families that it was trained on; for any other causal language model, running text that every machine has, by
perplexity alone. Other models have no such set unless the user gives one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset

from tunesmith import world
from tunesmith.engine.evaluate import spread
from tunesmith.inputs import Encoded, read_rows
from tunesmith.inputs.columns import meaning
from tunesmith.inputs.encode import Encode
from tunesmith.inputs.examples import Causal
from tunesmith.inputs.limits import Limit
from tunesmith.inputs.store import store
from tunesmith.models.embedded import EMBEDDED
from tunesmith.recipe import Recipe
from tunesmith.world import realtext

TEXT_CHARACTERS = 1200


@dataclass(frozen=True)
class Retained:
    """Encoded rows of what the model knew.

    Attributes:
        rows: As those of evaluation.
        generate: Whether they have answers to generate.
        what: In words, for the report.
    """

    rows: list[dict[str, Any]]
    generate: bool
    what: str


def rows(recipe: Recipe, data: Encoded, processor: Any, config: Any) -> Retained | None:
    """The rows, encoded; None where there is no such set."""
    count = recipe.report.retain_rows
    if data.retain is not None:
        found = list(data.retain)
        picked = [found[i] for i in spread(found, count)]
        return Retained(picked, data.task in ("causal-lm", "seq2seq"), str(recipe.data.retain))
    if data.task != "causal-lm":
        return None
    if recipe.model.name in EMBEDDED:
        families = list(world.families(pretraining=True))
        known = world.dataset(families, count, split="heldout", seed=1)
        what = "held-out items of the families that the embedded model was trained on"
        return Retained(_encode(known, data, processor, config), True, what)
    texts = islice(realtext.text_stream("heldout", 0, TEXT_CHARACTERS), count)
    what = "source text of the Python standard library, by perplexity"
    running = Dataset.from_dict({"text": list(texts)})
    return Retained(_encode(running, data, processor, config), False, what)


def _encode(dataset: Dataset, data: Encoded, tokenizer: Any, config: Any) -> list[dict[str, Any]]:
    assert data.limit is not None
    raw = read_rows(dataset, what="what the model knew")
    with TemporaryDirectory(prefix="tunesmith-") as folder:
        kept = store(raw, meaning(raw, data.task, {}), Path(folder), config=config).dataset
        encoder = Causal(tokenizer, config, kept.column_names)
        tokens, _, _ = Encode(encoder, Limit(data.limit, "the run"), "truncate", Path(folder))(kept, raw.name, False)
        return list(tokens)
