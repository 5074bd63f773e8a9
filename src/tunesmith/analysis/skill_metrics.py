"""Rows as batches, and what a model says to them: accuracy and calibration, for skill localization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tunesmith.core.loss import IGNORED, labelled, model_inputs
from tunesmith.errors import DataError

Row = Mapping[str, Any]


def batches_of(
    rows: Sequence[Row], model: nn.Module, processor: Any, length: int, size: int
) -> list[dict[str, Tensor]]:
    """Keyword arguments of the model with labels, `size` rows at a time, padded on the right.

    Raises:
        DataError: a row has no labels, or nothing that the model takes.
    """
    config: Any = model.config
    pad = getattr(config, "pad_token_id", None) or 0
    found = [_encoded(i, row, model, processor, length) for i, row in enumerate(rows)]
    batches = []
    for start in range(0, len(found), size):
        some = found[start : start + size]
        batch = {}
        for key in some[0]:
            values = [row[key] for row in some]
            fill = {"labels": IGNORED, "input_ids": pad}.get(key, 0)
            same = all(value.shape == values[0].shape for value in values)
            batch[key] = torch.stack(values) if same else pad_sequence(values, batch_first=True, padding_value=fill)
        batches.append(batch)
    return batches


def _encoded(i: int, row: Row, model: nn.Module, processor: Any, length: int) -> dict[str, Tensor]:
    main = str(getattr(model, "main_input_name", "input_ids"))
    labels = row.get("labels", row.get("label"))
    own, enc_dec = _generates(model), _encoder_decoder(model)

    def ids(text: str) -> list[int]:
        return list(processor(text, truncation=True, max_length=length)["input_ids"])

    if main in row and labels is not None:
        value = torch.as_tensor(row[main])
        value = value[:length] if main == "input_ids" else value
        kept = torch.as_tensor(labels)
        kept = kept[:length] if kept.dim() and main == "input_ids" else kept
    elif main == "input_ids" and "text" in row and labels is not None:
        value, kept = torch.tensor(ids(row["text"])), torch.as_tensor(labels)
    elif main == "input_ids" and own and "prompt" in row and "completion" in row:
        prompt, answer = ids(row["prompt"]), ids(row["completion"])
        whole = torch.tensor(prompt + answer)[:length]
        value = torch.tensor(prompt) if enc_dec else whole
        kept = torch.tensor(answer) if enc_dec else whole.clone()
        kept[: 0 if enc_dec else len(prompt)] = IGNORED
    else:
        forms = "`text` with `label`, or " if main == "input_ids" else ""
        forms += "`prompt` with `completion`, or " if own and main == "input_ids" else ""
        raise DataError(
            f"skill-localization: row {i} has {', '.join(row) or 'nothing'}; expected {forms}`{main}` with `labels`"
        )
    if kept.is_floating_point():
        raise DataError(
            f"skill-localization: the label of row {i} is {kept.tolist()}, a number and not a class; accuracy and "
            "calibration are of classes"
        )
    given = {main: value, "labels": kept.long()}
    return given | ({"attention_mask": torch.ones_like(value)} if main == "input_ids" else {})


def _generates(model: nn.Module) -> bool:
    return bool(getattr(model, "can_generate", lambda: False)())


def _encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


@torch.no_grad()
def predictions(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """(label, answer, confidence) of every labelled row or token: (n,) int64, (n,) int64, (n,) float32 in 0 to 1.

    Args:
        model: Of classes, of tokens' classes, of masked tokens, or a language model; it runs in evaluation mode.
        batches: Its keyword arguments with labels, of classes (B,) or of tokens (B, T).
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    device = next(model.parameters()).device
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        for batch in batches:
            logits, labels = _logits(model, {key: value.to(device) for key, value in batch.items()})
            confidence, answer = logits.float().softmax(-1).max(-1)
            found.append((labels.cpu(), answer.cpu(), confidence.cpu()))
    finally:
        for module, was in training.items():
            module.training = was
    label, answer, confidence = (torch.cat(column) for column in zip(*found, strict=True))
    return label, answer, confidence


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    labels = batch["labels"]
    if labels.dim() == 1:
        return model(**model_inputs(batch)).logits, labels
    if _generates(model) and not _encoder_decoder(model):
        held = labelled(model, batch)
        return held.logits, held.labels
    real = labels != IGNORED
    return model(**batch).logits[real], labels[real]


def accuracy(label: Tensor, answer: Tensor) -> float:
    """The share of equal ones, 0 to 1."""
    return float((label == answer).double().mean())


def calibration_error(label: Tensor, answer: Tensor, confidence: Tensor, bins: int = 15) -> float:
    """Expected calibration error: |accuracy - mean confidence| per bin of confidence, weighted by its rows.

    Args:
        label: (n,).
        answer: (n,).
        confidence: (n,) in 0 to 1, of the answer.
        bins: Equally wide; a confidence on a border counts to the lower one.
    """
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = (label == answer).double() - confidence.double()
    return float(torch.zeros(bins, dtype=torch.float64).index_add(0, place, gap).abs().sum() / len(gap))
