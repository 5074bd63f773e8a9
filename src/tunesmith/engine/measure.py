"""What is measured before and after training, the same way both times."""

from __future__ import annotations

from typing import Any

from torch import nn

from tunesmith.engine import evaluate
from tunesmith.engine.retain import Retained
from tunesmith.models.loader import Task
from tunesmith.recipe import Recipe

_GENERATES = ("causal-lm", "seq2seq")


class Measurer:
    """Measures a model on the evaluation rows and on what it knew before.

    Args:
        recipe: Of the run.
        data: Encoded rows (`tunesmith.inputs`).
        retained: What the model knew before, or None.
        processor: Tokenizer or image processor.
        task: Of the run.
    """

    def __init__(self, recipe: Recipe, data: Any, retained: Retained | None, processor: Any, task: Task) -> None:
        self.recipe, self.data, self.retained, self.processor, self.task = recipe, data, retained, processor, task
        self.rows = list(data.eval)

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """Plain data: `metrics` and `answers` on the evaluation rows, `retained` likewise if there are such rows.

        `answers` is a list of `{row, prompt, expected, text}`; `match` the share of exact ones by group.
        """
        found = self._on(model, self.rows, self.recipe.report.generate_rows)
        if self.retained is not None:
            count = len(self.retained.rows) if self.retained.generate else 0
            found["retained"] = self._on(model, self.retained.rows, count)
        return found

    def _on(self, model: nn.Module, rows: list[dict[str, Any]], count: int) -> dict[str, Any]:
        size = self.recipe.train.batch_size
        metrics = evaluate.metrics(model, rows, self.data.collator, self.task, size)
        found: dict[str, Any] = {"metrics": metrics, "answers": [], "match": {}}
        if self.task not in _GENERATES or not count:
            return found
        asked = [(i, q) for i in evaluate.spread(rows, count) if (q := evaluate.question(rows[i], self.task))]
        if not asked:
            return found
        decode = self.processor.decode
        texts = evaluate.answers(
            model,
            self.processor,
            [prompt for _, (prompt, _) in asked],
            max_new_tokens=self.recipe.report.max_new_tokens,
            batch_size=max(size, 16),
            task=self.task,
            limit=self.data.limit,
            groups=[rows[i].get(evaluate.GROUP) for i, _ in asked],
        )
        for (i, (prompt, expected)), text in zip(asked, texts, strict=True):
            entry = {"row": i, "prompt": decode(prompt), "expected": decode(expected, skip_special_tokens=True)}
            found["answers"].append({**entry, "text": text})
        found["match"] = evaluate.exact_match(
            rows, [i for i, _ in asked], texts, [a["expected"] for a in found["answers"]]
        )
        return found
