"""Statistics of layers over a few batches, streamed: each layer keeps its running sums, never a batch's activations.

    found = collect(model, ["model.layers.0.mlp.up_proj"], batches, want=("gradient",))
    found["model.layers.0.mlp.up_proj"]["gradient"]        # (out, in), float32

Padding is left out of every activation statistic through the batch's attention mask. Memory beyond the model is one
tensor per layer and statistic; `layers_per_pass` bounds it further by reading the batches several times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.core.layer import LayerSpec, describe
from tunesmith.core.loss import IGNORED, count_labels
from tunesmith.errors import ModelError, TunesmithError

STATISTICS = {
    "gradient": "mean gradient of the loss with respect to the canonical weight, in the weight's shape",
    "input_mean": "mean of each input feature over tokens, (in,)",
    "input_variance": "population variance of each input feature over tokens, (in,)",
    "input_square": "sum of squares of each input feature over tokens, (in,)",
    "input_covariance": "population covariance of the input features over tokens, (in, in)",
    "input_gram": "mean over rows of X^T X, X a row's tokens divided by |max X| (CorDA, section 3.1), (in, in)",
    "tokens": "number of tokens (or pixels) seen, ()",
}
_OF_INPUTS = frozenset(STATISTICS) - {"gradient"}

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that a transformers model returns for a batch with labels, a mean over them."""
    return model(**batch).loss


def _weight(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """What the loss of a batch is a mean over: its labels; 1 for a batch that has none."""
    labels = batch.get("labels")
    if labels is None or labels.is_floating_point():
        return 1 if labels is None else len(labels)
    # transformers names the loss of some causal models nowhere, and then takes this one.
    causal = getattr(model, "loss_type", None) in (None, "ForCausalLM") and "input_ids" in batch
    return int(count_labels(batch) if causal else (labels != IGNORED).sum())


def collect(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Mapping[str, Any]],
    *,
    want: Sequence[str],
    loss: Loss = model_loss,
    layers_per_pass: int | None = None,
) -> dict[str, dict[str, Tensor]]:
    """One pass (or a few) over `batches` in evaluation mode, so that dropout does not enter.

    Args:
        model: Any model; left as it was, requires_grad flags and training mode included.
        names: Dotted paths of the layers.
        batches: Keyword arguments of the model, each a batch; more than one row and padding are handled.
        want: Names from `STATISTICS`.
        loss: `(model, batch) -> scalar`, a mean over the batch's labels, for the gradient; batches weigh by their
            labels, so that it does not matter how rows are batched.
        layers_per_pass: Bound on the layers whose sums are held at a time.

    Returns:
        `{layer: {statistic: float32 tensor on the layer's device}}`.

    Raises:
        TunesmithError: an unknown statistic, or no batches.
        ModelError: a layer got no gradient or saw no input.
    """
    if unknown := set(want) - set(STATISTICS):
        raise TunesmithError(f"unknown statistics {sorted(unknown)}; known: {', '.join(STATISTICS)}")
    if not batches:
        raise TunesmithError("statistics need at least one batch; none was given")
    found: dict[str, dict[str, Tensor]] = {}
    size = layers_per_pass or max(len(names), 1)
    for start in range(0, len(names), size):
        group = names[start : start + size]
        found.update(_one_pass(model, group, batches, set(want), loss))
    return found


def _one_pass(
    model: nn.Module, names: Sequence[str], batches: Iterable[Mapping[str, Any]], want: set[str], loss: Loss
) -> dict[str, dict[str, Tensor]]:
    modules = {name: model.get_submodule(name) for name in names}
    specs = {name: describe(module, name) for name, module in modules.items()}
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    gradients, inputs = "gradient" in want, bool(want & _OF_INPUTS)
    count = 0
    with ExitStack() as exits:
        exits.enter_context(_evaluating(model))
        if gradients:
            exits.enter_context(_frozen_but(model, [m for m in modules.values()]))
        mask_holder: dict[str, Tensor | None] = {"mask": None}
        for name, module in modules.items():
            if inputs:
                handle = module.register_forward_pre_hook(_input_sums(sums[name], mask_holder, want))
                exits.callback(handle.remove)
            if gradients:
                for handle in _gradient_sums(module, specs[name], sums[name]):
                    exits.callback(handle.remove)
        with torch.set_grad_enabled(gradients):
            for batch in batches:
                mask_holder["mask"] = batch.get("attention_mask")
                if gradients:
                    value, size = loss(model, batch), _weight(model, batch)
                    count += size
                    if value.requires_grad:
                        (value * size).backward()
                else:
                    model(**batch)
    return {name: _finish(name, sums[name], want, count) for name in names}


def _input_sums(sums: dict[str, Tensor], holder: Mapping[str, Tensor | None], want: set[str]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            x = x.movedim(1, -1)
        rows = _without_padding(x, holder["mask"])
        if "input_gram" in want:
            _add_gram(sums, rows)
        x = torch.cat(rows).double()
        # Welford's pooled update: the variance of features with a large mean keeps its digits.
        n, seen = x.shape[0], sums.get("tokens", torch.zeros((), dtype=torch.float64, device=x.device))
        if n == 0:
            return
        mean, total = x.mean(0), seen + n
        centred = x - mean
        delta = mean - sums["mean"] if "mean" in sums else torch.zeros_like(mean)
        if "input_covariance" in want:
            between = torch.outer(delta, delta) * (seen * n / total)
            sums["products"] = sums.get("products", 0) + centred.T @ centred + between
        if "input_variance" in want:
            sums["spread"] = sums.get("spread", 0) + (centred**2).sum(0) + delta**2 * (seen * n / total)
        sums["mean"] = sums["mean"] + delta * (n / total) if "mean" in sums else mean
        sums["tokens"] = total
        if "input_square" in want:
            sums["square"] = sums.get("square", 0) + (x**2).sum(0)

    return hook


def _without_padding(x: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The tokens of each row of a batch, (n, features) each."""
    if mask is not None and x.dim() == 2 and x.shape[0] == mask.numel():
        x = x.view(*mask.shape, x.shape[-1])  # OPT lays rows end to end before its feed-forward layers
    if mask is not None and mask.shape == x.shape[:2]:
        return [row[real] for row, real in zip(x, mask.bool(), strict=True)]
    return list(x.reshape(x.shape[0], -1, x.shape[-1]))


def _add_gram(sums: dict[str, Tensor], rows: Sequence[Tensor]) -> None:
    for row in rows:
        if not row.numel():
            continue
        row = row.double()
        largest = row.max().abs()
        row = row / largest if largest > 0 else row
        sums["gram"] = sums.get("gram", 0) + row.T @ row
        sums["rows"] = sums.get("rows", torch.zeros((), dtype=torch.float64, device=row.device)) + 1


def _gradient_sums(module: nn.Module, spec: LayerSpec, sums: dict[str, Tensor]) -> list[Any]:
    def add(gradient: Tensor) -> None:
        sums["gradient"] = sums["gradient"] + gradient.float() if "gradient" in sums else gradient.float().clone()

    if not spec.quantized:
        weight: nn.Parameter = module.weight  # type: ignore[assignment]

        def on_weight(p: Tensor) -> None:
            assert p.grad is not None
            add(p.grad.T if isinstance(module, Conv1D) else p.grad)
            p.grad = None

        return [weight.register_post_accumulate_grad_hook(on_weight)]

    # Codes have no gradient; that of the weight they stand for is grad_output^T input.
    held: list[Tensor] = []

    def forward(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        held.append(args[0].detach())
        out.register_hook(lambda g: add(g.reshape(-1, g.shape[-1]).T.float() @ _rows(held.pop())))

    return [module.register_forward_hook(forward)]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).float()


def _finish(name: str, sums: dict[str, Tensor], want: set[str], count: int) -> dict[str, Tensor]:
    if "gradient" in want and "gradient" not in sums:
        raise ModelError(f"the layer {name!r} got no gradient: the loss of the given batches does not depend on it")
    if want & _OF_INPUTS and "tokens" not in sums:
        raise ModelError(
            f"the layer {name!r} saw no tokens: every position of the given batches is padding, or it never ran"
        )
    made = {
        "gradient": lambda: sums["gradient"] / count,
        "input_mean": lambda: sums["mean"].float(),
        "input_variance": lambda: (sums["spread"] / sums["tokens"]).float(),
        "input_square": lambda: sums["square"].float(),
        "input_covariance": lambda: (sums["products"] / sums["tokens"]).float(),
        "input_gram": lambda: (sums["gram"] / sums["rows"]).float(),
        "tokens": lambda: sums["tokens"].float(),
    }
    return {statistic: made[statistic]() for statistic in want}


@contextmanager
def _evaluating(model: nn.Module):
    was = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was.items():
            module.training = training


@contextmanager
def _frozen_but(model: nn.Module, modules: Sequence[nn.Module]):
    """Only the weights of `modules` get gradients; the graph still reaches them when the weights are codes."""
    was = {p: p.requires_grad for p in model.parameters()}
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    handle = None
    try:
        for p in was:
            p.requires_grad_(False)
        for module in modules:
            weight: nn.Parameter = module.weight  # type: ignore[assignment]
            if weight.is_floating_point() and type(weight) is nn.Parameter:
                weight.requires_grad_(True)
            elif embedding is not None and handle is None:
                handle = embedding.register_forward_hook(lambda m, a, out: out.requires_grad_(True))
        yield
    finally:
        if handle is not None:
            handle.remove()
        for p, required in was.items():
            if p.is_floating_point():
                p.requires_grad_(required)
