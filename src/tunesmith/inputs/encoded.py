"""From the `data` section of a recipe to encoded rows and their collator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from tunesmith.core.packing import Flatten
from tunesmith.errors import DataError
from tunesmith.inputs.batches import Pad, Pictures, pack
from tunesmith.inputs.encode import Encode
from tunesmith.inputs.examples import Causal, Encoder, Seq2Seq, TextClassifier
from tunesmith.inputs.gathered import Gathered, gather
from tunesmith.inputs.limits import Limit, token_limit
from tunesmith.inputs.rows import Problems
from tunesmith.inputs.store import Rows, progress
from tunesmith.inputs.text import end_token

if TYPE_CHECKING:
    from tunesmith.recipe import Task
    from tunesmith.recipe_fields import DataSpec

Transform = Callable[[Dataset], Dataset]


@dataclass(frozen=True)
class Encoded:
    """What a trainer takes.

    Attributes:
        task: Given or inferred.
        train: Columns `input_ids`, `labels`, of causal models `prompt_length` (tokens before the last answer), packed
            `lengths` instead; of image classification `image` and `labels`. `group` if the rows have a family.
        eval: The same, never packed.
        retain: The same; None if the recipe names none.
        rows: The rows behind `train` (before packing), `eval` and `retain`, in our columns, one to one.
        collator: Rows -> batch. It takes the columns that it needs: tell the trainer not to remove any.
        labels: Class names in the order of their numbers, or None.
        limit: The longest row in tokens; None for images.
        pad_token: What inputs are padded with; the model's `pad_token_id` must be the same for a text classification.
        report: All that was read, left out, cut and counted, as plain data.
        folder: Holds the rows' files; they are deleted with this object.
    """

    task: Task
    train: Dataset
    eval: Dataset
    retain: Dataset | None
    rows: dict[str, Dataset]
    collator: Callable[[Any], dict[str, Any]]
    labels: list[str] | None
    limit: int | None
    pad_token: int | None
    report: dict[str, Any]
    folder: TemporaryDirectory


def prepare(
    spec: DataSpec,
    *,
    config: Any,
    processor: Any,
    task: Task | None = None,
    reserved: int = 0,
    longest: int | None = None,
    padding_free: bool = False,
    select: Transform | None = None,
    verbose: bool = False,
) -> Encoded:
    """Read, check, split, select and encode the rows of a recipe.

    Args:
        spec: The recipe's `data`; its `select` is done by the caller, through `select`.
        config: The model's `PreTrainedConfig`.
        processor: Its tokenizer, or for images its image processor.
        task: None: inferred from model and columns.
        reserved: Virtual tokens that prompts put before each row.
        longest: The longest row that the prompts are made for, if there is such a limit.
        padding_free: Lay the rows of a batch end to end.
        select: Chooses or makes training rows from the checked ones.
        verbose: Show progress.

    Raises:
        DataError: names the source, the row, the field or the setting that is at fault.
    """
    found = gather(spec, config=config, task=task, verbose=verbose)
    if select is not None:
        chosen = select(found.train.dataset)
        if not len(chosen):
            raise DataError("data.select: no training row is left after it.")
        found.report["selected"] = [{"part": "select", "from": len(found.train.dataset), "to": len(chosen)}]
        found = replace(found, train=replace(found.train, dataset=chosen))
    return encode(
        found,
        spec,
        config=config,
        processor=processor,
        reserved=reserved,
        longest=longest,
        padding_free=padding_free,
        verbose=verbose,
    )


def encode(
    found: Gathered,
    spec: DataSpec,
    *,
    config: Any,
    processor: Any,
    reserved: int = 0,
    longest: int | None = None,
    padding_free: bool = False,
    verbose: bool = False,
) -> Encoded:
    """Gathered rows as tokens, or as pictures to be opened; the other arguments are those of `prepare`.

    Raises:
        DataError: as `prepare`.
    """
    if (spec.packing or padding_free) and found.task != "causal-lm":
        asked = "data.packing" if spec.packing else "data.padding_free"
        raise DataError(f"{asked} is for causal language models; the task is {found.task}. Set it to false.")
    if found.task == "image-classification":
        return _pictures(found, config, processor)
    with progress(verbose):
        limit = token_limit(config, spec.max_length, reserved, longest)
        return _tokens(found, spec, config, processor, limit, padding_free)


def _tokens(found: Gathered, spec: DataSpec, config: Any, tokenizer: Any, limit: Limit, padding_free: bool) -> Encoded:
    place = Path(found.folder.name)
    report = {**found.report, "limit": {"tokens": limit.tokens, "from": limit.origin}}
    notes: list[str] = list(report["notes"])
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = end_token(tokenizer, config)
        also = "; the model's `pad_token_id` must be set to it" if found.task == "text-classification" else ""
        notes.append(f"the tokenizer has no padding token: the end-of-sequence token pads, behind the mask{also}")
    sources = {"train": found.train, "eval": found.eval, **({"retain": found.retain} if found.retain else {})}
    tokens, rows = {}, {}
    for use, source in sources.items():
        encoder = _encoder(found.task, use, source.dataset.column_names, spec, config, tokenizer)
        encode_rows = Encode(encoder, limit, spec.too_long, place)
        tokens[use], tally, problems = encode_rows(source.dataset, source.raw.name, spec.skip_bad_rows)
        rows[use] = source.dataset.select(tally.kept)
        report[use] = tally.summary()
        report["sources"][use]["bad_rows"] = Problems(True, source.problems.rows + problems.rows).summary()
        notes += _remarks(encoder, use)
    if spec.packing:
        tokens["train"], report["packing"] = pack(tokens["train"], limit.tokens, place)
    return Encoded(
        task=found.task,
        train=tokens["train"],
        eval=tokens["eval"],
        retain=tokens.get("retain"),
        rows=rows,
        collator=Flatten() if spec.packing or padding_free else Pad(pad),
        labels=found.labels,
        limit=limit.tokens,
        pad_token=pad,
        report={**report, "notes": list(dict.fromkeys(notes))},
        folder=found.folder,
    )


def _encoder(task: Task, use: str, columns: list[str], spec: DataSpec, config: Any, tokenizer: Any) -> Encoder:
    if task == "seq2seq":
        return Seq2Seq(tokenizer, config)
    if task == "text-classification":
        return TextClassifier(tokenizer)
    if use == "retain" and "text" in columns:
        return Causal(tokenizer, config, columns)  # what a chat model knew before may well be plain text
    return Causal(tokenizer, config, columns, spec.chat, spec.system, spec.loss_on)


def _remarks(encoder: Encoder, use: str) -> list[str]:
    template = getattr(encoder, "chat", None)
    if template is None:
        return []
    remarks = [f"the assistant's tokens of {use} are told by {template.method}"]
    if not template.stops:
        remarks.append(
            "the chat template leaves the token that ends a turn without loss, so the model may not learn to stop: "
            "put it inside {% generation %}"
        )
    return remarks


def _pictures(found: Gathered, config: Any, processor: Any) -> Encoded:
    def shown(rows: Rows) -> Dataset:
        dataset = rows.dataset.rename_column("label", "labels")
        return dataset.select_columns([column for column in dataset.column_names if column != "where"])

    retain = shown(found.retain) if found.retain else None
    rows = {"train": found.train, "eval": found.eval, **({"retain": found.retain} if found.retain else {})}
    return Encoded(
        task=found.task,
        train=shown(found.train),
        eval=shown(found.eval),
        retain=retain,
        rows={use: source.dataset for use, source in rows.items()},
        collator=Pictures(processor, "L" if getattr(config, "num_channels", 3) == 1 else "RGB"),
        labels=found.labels,
        limit=None,
        pad_token=None,
        report={**found.report, **{use: {"rows": len(source.dataset)} for use, source in rows.items()}},
        folder=found.folder,
    )
