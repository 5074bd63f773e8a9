"""The run's own model at the service of the parts of the room `data`."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from datasets import Dataset, Features
from torch import Tensor, nn
from transformers import set_seed

from tunesmith.core.loss import IGNORED, labelled, token_losses
from tunesmith.core.packing import to_device
from tunesmith.core.selection import Rows, Services, Tuned
from tunesmith.engine import arguments as engine_arguments
from tunesmith.engine import building, evaluate
from tunesmith.errors import DataError, ModelError
from tunesmith.inputs import Gathered
from tunesmith.inputs.batches import Pad
from tunesmith.inputs.example import Example
from tunesmith.inputs.examples import Causal, Encoder, Seq2Seq, TextClassifier
from tunesmith.inputs.limits import token_limit
from tunesmith.inputs.rows import RowError
from tunesmith.inputs.store import GROUP, WHERE
from tunesmith.inputs.text import end_token
from tunesmith.recipe import Recipe

_AT_A_TIME = 16


class ModelServices:
    """Vectors of rows from the base model, and models trained on some of the rows as the run would train.

    Args:
        recipe: Of the run.
        base: As loaded, with nothing of the recipe on it; it is moved to the run's device, and never changed.
        processor: Its tokenizer.
        gathered: The run's rows. Rows that a service is asked about have the columns of its training rows, their place
            and family aside, and may have others.
    """

    def __init__(self, recipe: Recipe, base: nn.Module, processor: Any, gathered: Gathered) -> None:
        self.recipe, self.base, self.tokenizer, self.gathered = recipe, base, processor, gathered
        self.task, self.config = gathered.task, base.config
        self.device = PartialState(cpu=not torch.cuda.is_available()).device
        self.size = max(recipe.train.batch_size, _AT_A_TIME)
        self.limit = token_limit(base.config, recipe.data.max_length).tokens

    def offered(self) -> Services:
        """`embed` and `fit` for models of text; a run on pictures offers nothing, and no run offers a reward."""
        if self.task == "image-classification":
            return Services()
        return Services(embed=self.embed, fit=self.fit)

    @torch.no_grad()
    def embed(self, rows: Rows) -> np.ndarray:
        """The mean, over a row's tokens, of the base model's last hidden state: (N, D) float32.

        The tokens are those that the run would train on, prompt and answer; what is over the limit is left out. Of an
        encoder-decoder they all go through the encoder.

        Raises:
            DataError: a row that cannot be encoded.
            ModelError: the model has no hidden state of one width.
        """
        joined = self.task == "seq2seq"
        examples = self._examples(rows)
        ids = [[*e.ids, *e.labels] if joined and isinstance(e.labels, list) else e.ids for e in examples]
        base: Any = self.base.to(self.device)
        network = base.get_encoder() if self.config.is_encoder_decoder else base.base_model
        found: list[Tensor] = [torch.empty(0)] * len(ids)
        with _evaluating(self.base):
            for at in self._alike([len(row) for row in ids]):
                batch = self._batch([Example(ids[i], ids[i]) for i in at])
                state = getattr(network(**{k: v for k, v in batch.items() if k != "labels"}), "last_hidden_state", None)
                if state is None:
                    raise ModelError(f"{type(network).__name__} gives no last hidden state; its rows have no vectors")
                mask = batch["attention_mask"][:, :, None]
                means = (state.float() * mask).sum(1) / mask.sum(1)
                for i, mean in zip(at, means.cpu(), strict=True):
                    found[i] = mean
        return torch.stack(found).numpy()

    def fit(self, rows: Rows) -> Tuned:
        """A copy of the base model trained on these rows as the run would train on its own.

        Same adapters, objective, optimizer, schedule, epochs (or steps, if the recipe counts those) and seed, so that
        the same rows give the same model; nothing is evaluated or saved, and the random state is as it was before.

        Raises:
            DataError, ModelError: as a run of the same recipe on these rows.
        """
        recipe, uses = self.recipe, self.recipe.uses()
        chosen = replace(self.gathered.train, dataset=self._dataset(rows))
        gathered = replace(self.gathered, train=chosen, eval=chosen, retain=None)
        with _seeded(recipe.train.seed), TemporaryDirectory(prefix="tunesmith-") as folder:
            base = copy.deepcopy(self.base).to(self.device)
            built = building.build(base, recipe, uses, gathered, config=self.config, processor=self.tokenizer)
            args = engine_arguments.arguments(
                recipe,
                Path(folder),
                steps=engine_arguments.total_steps(recipe, len(built.data.train), PartialState().num_processes),
                own_optimizer=bool(uses.get("optimizer")),
                unused_parameters=bool(uses.get("schedule")),
            )
            args = args.set_evaluate(strategy="no").set_save(strategy="no").set_logging(strategy="no")
            building.trainer(built, recipe, uses, args, processor=self.tokenizer, evaluate=False).train()
        model, limit = built.model.eval(), built.data.limit  # with prompts, less than that of the base
        return Tuned(lambda asked: self._answers(model, asked, limit), lambda asked: self._losses(model, asked, limit))

    def _answers(self, model: nn.Module, rows: Rows, limit: int | None = None) -> list[str]:
        if self.task == "text-classification":
            raise DataError("a text classifier writes no answers; take a causal or encoder-decoder model")
        prompts = []
        for number, example in enumerate(self._examples(rows, limit)):
            ids = example.ids if self.task == "seq2seq" else example.ids[: example.prompt_length]
            if not ids:
                raise DataError(f"row {number} has no prompt that could be answered; it is plain text")
            prompts.append(ids)
        return evaluate.answers(
            model,
            self.tokenizer,
            prompts,
            max_new_tokens=self.recipe.report.max_new_tokens,
            batch_size=self.size,
            task=self.task,
            limit=limit or self.limit,
        )

    @torch.no_grad()
    def _losses(self, model: nn.Module, rows: Rows, limit: int | None = None) -> np.ndarray:
        examples = [self._last_answer(example) for example in self._examples(rows, limit)]
        found = np.full(len(examples), np.nan)
        with _evaluating(model):
            for at in self._alike([example.length for example in examples]):
                found[at] = self._batch_losses(model, self._batch([examples[i] for i in at])).cpu()
        return found

    def _last_answer(self, example: Example) -> Example:
        """The labels of the last answer alone, whatever the run takes loss on."""
        if example.prompt_length is None or not isinstance(example.labels, list):
            return example
        start = example.prompt_length
        return replace(example, labels=[IGNORED] * start + example.labels[start:])

    def _batch_losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """(B,), the mean over each row's labels; NaN where it has none."""
        if self.task == "causal-lm":
            labels = labelled(model, batch)
            losses, row = token_losses(labels), labels.segment
        else:
            logits = model(**batch).logits.float().flatten(0, -2)
            targets = batch["labels"].flatten()
            kept = targets != IGNORED
            losses = F.cross_entropy(logits[kept], targets[kept], reduction="none")
            per_row = batch["labels"].numel() // len(batch["labels"])
            row = torch.arange(len(targets), device=targets.device)[kept] // per_row
        count = torch.zeros(len(batch["labels"]), dtype=torch.float64, device=losses.device)
        total = count.index_add(0, row, losses.double())
        return total / count.index_add(0, row, torch.ones_like(losses, dtype=torch.float64))

    def _examples(self, rows: Rows, limit: int | None = None) -> list[Example]:
        """Rows as tokens, cut to `limit`, or to that of the base model.

        Raises:
            DataError: a row that cannot be encoded.
        """
        encoder, listed, limit = self._encoder(), list(rows), limit or self.limit
        wanted = [name for name in self.gathered.train.dataset.column_names if name not in (WHERE, GROUP)]
        columns = {name: [row[name] for row in listed] for name in wanted}
        examples = []
        for number, found in enumerate(encoder.batch(columns)):
            if isinstance(found, RowError):
                raise DataError(f"row {number}: {found.reason}")
            examples.append(encoder.cut(found, limit) if found.length > limit else found)
        return examples

    def _encoder(self) -> Encoder:
        spec = self.recipe.data
        if self.task == "seq2seq":
            return Seq2Seq(self.tokenizer, self.config)
        if self.task == "text-classification":
            return TextClassifier(self.tokenizer)
        columns = self.gathered.train.dataset.column_names
        return Causal(self.tokenizer, self.config, columns, spec.chat, spec.system)

    def _dataset(self, rows: Rows) -> Dataset:
        if isinstance(rows, Dataset):
            return rows
        known = self.gathered.train.dataset.features
        features = Features({name: known[name] for name in known if name not in (WHERE, GROUP) or name in rows[0]})
        return Dataset.from_list([{name: row[name] for name in features} for row in rows], features=features)

    def _alike(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Row numbers in batches of like length, for less padding."""
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        return (order[at : at + self.size] for at in range(0, len(order), self.size))

    def _batch(self, examples: Sequence[Example]) -> dict[str, Any]:
        pad = self.tokenizer.pad_token_id
        pad = end_token(self.tokenizer, self.config) if pad is None else pad
        return to_device(Pad(pad)([{"input_ids": e.ids, "labels": e.labels} for e in examples]), self.device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global random state from `seed` inside the block, and afterwards what it was before."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
