"""Representation similarity: how much fine-tuning changed what each layer makes of the same inputs.

Shi, Wang, Zhang, Du, Han, Zhang and Sun, "Towards Efficient Fine-tuning of Pre-trained Code Models: An Experimental
Study and Beyond", ISSTA 2023 (the study before Telly: layers whose representations stay can be frozen). The measure is
representational similarity analysis (Kriegeskorte, Mur and Bandettini, 2008):

    C_l[i, j] = cos(h_l(x_i), h_l(x_j))           for n inputs, in either model; h_l is what leaves block l
    similarity of layer l = Pearson correlation of the upper triangles of C_l of the base and of the tuned model

It is 1 for layers that differ by a rotation and a positive factor: what later layers could undo does not count. The
paper's finding is that it falls in the top two layers alone; these, not the bottom ones, need to train.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tunesmith.core.analysis import Subjects, matrices, transposed
from tunesmith.core.merging import parameters, read
from tunesmith.core.modelmap import blocks
from tunesmith.core.part import part
from tunesmith.core.report import Plot, Report, Table
from tunesmith.core.seeds import generator
from tunesmith.core.statedict import Checkpoint
from tunesmith.errors import DataError, ModelError

Pool = Literal["mean", "first", "last"]
LEAST = 4
Layers = dict[tuple[str, str], Tensor]
"""(stack, layer) -> (n, dim) float32."""


@part(paper="arXiv:2304.05216")
def representation_similarity(
    subjects: Subjects,
    *,
    samples: Annotated[int, Field(ge=LEAST)] = 128,
    pool: Pool = "mean",
    length: PositiveInt = 64,
    device: str = "cpu",
    seed: int = 0,
) -> Report:
    """Compare the representations of base and tuned model, layer by layer.

    Three things can be looked at, and the report says which it was: the subjects' rows; without rows, random tokens (or
    pictures) through both models, which tells layers apart but not tasks; and where there is no way to load the models,
    each linear layer alone, on random vectors.

    Args:
        subjects: `tuned` and `base`, of one architecture; `load` to run them. Rows have `text`, or `prompt` with
            `completion`, or what the model takes (`input_ids`, `pixel_values`).
        samples: n, how many inputs at most; C has n (n - 1) / 2 different entries.
        pool: How the positions of an input become one vector: their mean, or the first (BERT's class token) or last.
        length: Tokens of an input at most, and of a random one.
        device: Where the models run.
        seed: Of random inputs.

    Returns:
        Similarity per layer, the largest change (1 - similarity), and the mean cosine in both models.

    Raises:
        TunesmithError: no base; rows that the models cannot take; tensors that differ in name or shape, or are not
            finite.
    """
    base, tuned = subjects.pair("representation-similarity")
    for checkpoint in (base, tuned):
        for name in parameters(checkpoint):
            read(checkpoint, name)
    if subjects.load is None:
        held = [_maps(checkpoint, samples, seed) for checkpoint in (base, tuned)]
        inputs = "random vectors through each linear layer alone: no way to load the models was given"
    else:
        held = []
        for which in ("base", "tuned"):
            model, processor = subjects.load(which)
            given = list(_inputs(model, processor, subjects, samples, length, seed))
            held.append(_representations(model.to(device), given, pool))
            del model
        kind = "of the given rows" if subjects.rows else "of random tokens or pixels: no rows were given"
        inputs = f"{len(given)} inputs {kind}"
    return _report(held[0], held[1], inputs)


def rsa_distance(a: Tensor, b: Tensor) -> float | None:
    """1 - the Pearson correlation of the pairwise cosines of `a` and `b`; exactly 0 for equal representations.

    Args:
        a: (n, dim).
        b: (n, another dim), of the same inputs.

    Returns:
        0 to 2; None where all pairs are alike in one of the two, so that there is nothing to correlate.
    """
    u, v = (_standardised(x) for x in (a, b))
    return None if u is None or v is None else float((u - v).square().sum() / 2)


def _cosines(x: Tensor) -> Tensor:
    x = F.normalize(x.double(), dim=1)
    i, j = torch.triu_indices(len(x), len(x), 1)
    return (x @ x.T)[i, j]


def _standardised(x: Tensor) -> Tensor | None:
    values = _cosines(x)
    centred = values - values.mean()
    norm = centred.norm()
    # Cosines are known to rounding; a spread below that is none.
    return centred / norm if float(norm) > 1e-12 * len(values) ** 0.5 else None


def _report(base: Layers, tuned: Layers, inputs: str) -> Report:
    table = Table("Layers", ["stack", "layer", "similarity", "change", "mean cosine, base", "mean cosine, tuned"])
    lines: dict[str, tuple[list[str], list[float]]] = {}
    changes: dict[str, float] = {}
    silent = 0
    for (stack, layer), a in base.items():
        b = tuned[stack, layer]
        change = rsa_distance(a, b)
        same = None if change is None else 1 - change
        table.rows.append([stack, layer, same, change, float(_cosines(a).mean()), float(_cosines(b).mean())])
        if change is None:
            silent += 1
            continue
        changes[f"{stack}.{layer}".removeprefix(".")] = change
        x, y = lines.setdefault(stack or "linear layers", ([], []))
        x.append(layer)
        y.append(1 - change)
    most = max(changes, key=lambda name: changes[name]) if changes else None
    report = Report(
        "Representation similarity",
        figures={
            "largest change": changes[most] if most else None,
            "layer that changed most": most if most and changes[most] else None,
            "mean similarity": 1 - sum(changes.values()) / len(changes) if changes else None,
            "layers": len(base),
        },
        tables=[table],
        plots=[Plot("Similarity to the base", "line", x="layer", y="Pearson correlation of cosines", series=lines)],
        notes=[f"Looked at {inputs}."],
        details={"changes": changes},
    )
    if silent:
        report.notes.append(
            f"{silent} layers make all inputs alike in one of the models; their similarity is undefined."
        )
    return report


def _maps(checkpoint: Checkpoint, samples: int, seed: int) -> Layers:
    """What each linear layer makes of the same random vectors."""
    flipped, held = transposed(checkpoint), {}
    for name in matrices(checkpoint):
        W = read(checkpoint, name).float()
        W = W.T if name in flipped else W
        held["", name.removesuffix(".weight")] = torch.randn(samples, W.shape[1], generator=generator(seed, name)) @ W.T
    if not held:
        raise ModelError(f"representation-similarity: {checkpoint.name} has no linear layers to look at")
    return held


def _inputs(
    model: nn.Module, processor: Any, subjects: Subjects, samples: int, length: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """One input after the other, with a first dimension of 1: without padding, nothing has to be left out again."""
    config: Any = model.config
    main = str(getattr(model, "main_input_name", "input_ids"))
    if not subjects.rows:
        for i in range(samples):
            g = generator(seed, "representation-similarity", i)
            if main == "input_ids":
                yield _complete(config, torch.randint(config.vocab_size, (1, length), generator=g))
            elif main == "pixel_values":
                side = config.image_size
                yield {main: torch.randn(1, config.num_channels, side, side, generator=g)}
            else:
                raise DataError(f"representation-similarity: {type(model).__name__} takes {main!r}; give rows with it")
        return
    if len(subjects.rows) < LEAST:
        raise DataError(f"representation-similarity compares pairs of inputs; give {LEAST} rows or more")
    for i, row in enumerate(list(subjects.rows)[:samples]):
        text = row.get("text", f"{row['prompt']}{row.get('completion', '')}" if "prompt" in row else None)
        if main in row:
            value = torch.as_tensor(row[main])
            yield _complete(config, value[None, :length]) if main == "input_ids" else {main: value[None]}
        elif isinstance(text, str) and main == "input_ids":
            found = processor(text, truncation=True, max_length=length)["input_ids"]
            yield _complete(config, torch.as_tensor(found).reshape(1, -1))
        else:
            raise DataError(
                f"representation-similarity: row {i} has {', '.join(row) or 'nothing'}; expected "
                f"{'`text`, `prompt` or ' if main == 'input_ids' else ''}`{main}`"
            )


def _complete(config: Any, ids: Tensor) -> dict[str, Tensor]:
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return given | ({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {})


@torch.no_grad()
def _representations(model: nn.Module, given: list[dict[str, Tensor]], pool: Pool) -> Layers:
    """The embedding, as it enters block 0, and every block of every stack."""
    seen: dict[tuple[str, str], list[Tensor]] = {}

    def keep(key: tuple[str, str], value: Any) -> None:
        hidden = (value[0] if isinstance(value, tuple) else value)[0].float()
        vector = hidden.mean(0) if pool == "mean" else hidden[0 if pool == "first" else -1]
        seen.setdefault(key, []).append(vector.cpu())

    def entering(stack: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            keep((stack, "embedding"), args[0] if args else kwargs["hidden_states"])

        return hook

    handles = []
    for stack, held in blocks(model).items():
        handles.append(held[0].register_forward_pre_hook(entering(stack), with_kwargs=True))
        for i, block in enumerate(held):
            key = (stack, str(i))
            handles.append(block.register_forward_hook(lambda _m, _a, out, key=key: keep(key, out)))
    was, like = model.training, next(p for p in model.parameters() if p.is_floating_point())
    model.eval()
    try:
        for one in given:
            # Token ids stay integers, pictures take the model's dtype.
            model(**{k: v.to(like if v.is_floating_point() else like.device) for k, v in one.items()})
    finally:
        model.train(was)
        for handle in handles:
            handle.remove()
    return {key: torch.stack(rows) for key, rows in seen.items()}
