"""Grafts and their masks, for skill localization: which entries, in which order of search, and the model with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tunesmith.analysis.skill_metrics import accuracy, predictions
from tunesmith.core.entries import Entries, digest, largest
from tunesmith.core.merging import parameters, read
from tunesmith.core.modelmap import Role, roles_from_names
from tunesmith.core.seeds import generator, subset
from tunesmith.core.sparse import SparseDelta
from tunesmith.core.statedict import Checkpoint, Computed, check_alike
from tunesmith.errors import CheckpointError, DataError, ModelError, TunesmithError, did_you_mean

Head = Literal["tuned", "base"]
Places = dict[str, Tensor]
"""(k,) int64 by parameter: places in the flattened tensor, ascending."""
_HEADS = ("head", "predictions", "classifier", "score", "cls", "embed_out")


def chosen(base: Checkpoint, target_modules: Sequence[str] | None = None) -> list[str]:
    """Names of the parameters that a graft may take: all but embedding, positions and head; tied ones once.

    Raises:
        ModelError: there are none, or none of a target.
    """
    kinds = roles_from_names(base)
    names = [name for name in sorted(parameters(base)) if not _fixed(name, kinds[name])]
    if target_modules is not None:
        modules = {name: name.rpartition(".")[0] for name in names}
        for target in target_modules:
            if not any(f".{module}".endswith(f".{target}") for module in modules.values()):
                last = {module.rpartition(".")[2] for module in modules.values()}
                raise ModelError(
                    f"skill-localization: no module of {base.name} with parameters to graft ends in {target!r}."
                    f"{did_you_mean(target, last)} There are: {', '.join(sorted(last))}."
                )
        names = [n for n in names if any(f".{modules[n]}".endswith(f".{t}") for t in target_modules)]
    if base.folder is None and not isinstance(base, Computed):
        first = {(base[name].data_ptr() or name, base.describe(name)[0]): name for name in reversed(names)}
        names = sorted(first.values())
    if not names:
        raise ModelError(f"skill-localization: {base.name} has no parameters but embedding and head")
    return names


def _fixed(name: str, role: Role) -> str:
    """`embedding` or `head` for what belongs to one, their norms and projections too; empty for all else."""
    outside = role.depth is None
    if role.kind == "head" or (outside and any(word.endswith(_HEADS) for word in name.split("."))):
        return "head"
    embedding = role.kind in ("embedding", "position") or (outside and "embed" in name.lower())
    return "embedding" if embedding else ""


def base_patch(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    share: float = 1e-5,
    target_modules: Sequence[str] | None = None,
    head: Head = "tuned",
) -> SparseDelta:
    """The entries that moved most, a tensor at a time: those whose size is above the (share * N + 1)-th largest.

    Raises:
        CheckpointError: names or shapes differ, a value is not finite, nothing moved, or no entry stands out.
    """
    check_alike(base, [tuned])
    names = chosen(base, target_modules)
    places = _patch(base, tuned, names, share)
    return _delta(base, tuned, places, head, {"method": "skill-localization", "share": share})


def _patch(base: Checkpoint, tuned: Checkpoint, names: Sequence[str], share: float) -> Places:
    def size(name: str) -> Tensor:
        return (read(tuned, name) - read(base, name)).abs().float()

    count = max(1, int(share * sum(torch.Size(base.describe(name)[0]).numel() for name in names)))
    found = largest(((name, size(name)) for name in names), count + 1)
    sizes = {name: size(name).flatten()[places] for name, places in found.items()}
    if not found:
        raise CheckpointError(f"{tuned.name} and {base.name} do not differ outside of embedding and head")
    if sum(map(len, found.values())) > count:
        least = min(float(value.min()) for value in sizes.values())
        found = {name: places[sizes[name] > least] for name, places in found.items()}
        found = {name: places for name, places in found.items() if len(places)}
    if not found:
        raise CheckpointError(
            f"the {count + 1} entries of {tuned.name} that moved most all moved by {least:g}, so that none stands out; "
            "take a larger share"
        )
    return found


def _delta(base: Checkpoint, tuned: Checkpoint, places: Places, head: Head, about: Mapping[str, Any]) -> SparseDelta:
    entries = {name: Entries.of(read(tuned, name) - read(base, name), at) for name, at in places.items() if len(at)}
    return SparseDelta(entries, {n: digest(base[n]) for n in entries}, _heads(base, tuned, head), dict(about))


def _heads(base: Checkpoint, tuned: Checkpoint, head: Head) -> dict[str, Tensor]:
    """The tensors of the tuned head that differ from the base's; none of a head that is tied to the embedding."""
    kinds = roles_from_names(base)
    floating = list(parameters(base))
    embeddings = [name for name in floating if kinds[name].kind == "embedding"]
    found = {n: read(tuned, n) for n in floating if head == "tuned" and _fixed(n, kinds[n]) == "head"}
    return {
        name: tuned[name]
        for name, value in found.items()
        if not torch.equal(value, read(base, name))
        and not any(value.shape == tuned.describe(e)[0] and torch.equal(value, read(tuned, e)) for e in embeddings)
    }


class Mask:
    """gamma over some parameters: the places of the base patch, and S, the one dense tensor per parameter.

    Args:
        base: theta_pre; read anew whenever it is needed.
        tuned: theta_ft; the same.
        patch: Places of gamma_b in each flattened parameter; none for parameters that are left out.
        names: The parameters.
        bias: b.
        device: Of S and of what is calculated.
        seed: Of S; each parameter has its own stream.
    """

    def __init__(
        self, base: Checkpoint, tuned: Checkpoint, patch: Places, names: Sequence[str], *,
        bias: float = 10.0, device: str | torch.device = "cpu", seed: int = 0,
    ) -> None:  # fmt: skip
        self.base, self.tuned, self.patch, self.names, self.bias = base, tuned, patch, names, bias
        self.device = torch.device(device)
        self.scores = {
            name: torch.rand(base.describe(name)[0], generator=generator(seed, "skill", name)).to(device)
            for name in names
        }

    def gamma(self, name: str, *, rounded: bool = False) -> Tensor:
        """gamma of a parameter, float32; of ones and zeros if rounded (a half is 0)."""
        soft = (self.scores[name] - self.bias).sigmoid()
        gamma = torch.where(self._patched(name), 1 - soft, soft)
        return (gamma > 0.5).float() if rounded else gamma

    def _patched(self, name: str) -> Tensor:
        flat = torch.zeros(self.scores[name].numel(), dtype=torch.bool, device=self.device)
        if name in self.patch:
            flat[self.patch[name].to(self.device)] = True
        return flat.view_as(self.scores[name])

    def _ends(self, name: str) -> tuple[Tensor, Tensor]:
        return read(self.base, name).to(self.device), read(self.tuned, name).to(self.device)

    @torch.no_grad()
    def put(self, held: Mapping[str, Tensor], *, rounded: bool = False) -> None:
        """theta(gamma) into the parameters of a model; at gamma 0 and 1 without any rounding."""
        for name in self.names:
            pre, fine = self._ends(name)
            held[name].copy_(torch.lerp(pre, fine, self.gamma(name, rounded=rounded).to(pre.dtype)))

    @torch.no_grad()
    def gradient(self, name: str, grad: Tensor) -> Tensor:
        """dL/dS of a parameter from dL/dtheta."""
        pre, fine = self._ends(name)
        soft = (self.scores[name] - self.bias).sigmoid()
        found = grad.to(pre.dtype) * (fine - pre) * (soft * (1 - soft))
        return torch.where(self._patched(name), -found, found)

    def places(self) -> Places:
        """Where the rounded gamma is 1, in each flattened parameter."""
        found = {name: self.gamma(name, rounded=True).flatten().nonzero()[:, 0].cpu() for name in self.names}
        return {name: at for name, at in found.items() if len(at)}


def localise(
    base: Checkpoint,
    tuned: Checkpoint,
    model: nn.Module,
    train: Sequence[Mapping[str, Tensor]],
    dev: Sequence[Mapping[str, Tensor]] = (),
    *,
    share: float = 1e-5,
    epochs: int = 100,
    lr: float = 1e7,
    bias: float = 10.0,
    accumulate: int = 128,
    target_modules: Sequence[str] | None = None,
    head: Head = "tuned",
    seed: int = 0,
) -> SparseDelta:
    """The graft: the rounded mask with the best accuracy on `train` plus that on `dev`; of equal ones the first.

    Beside the model and its gradients, memory holds S, float32, of the parameters without embedding and head; both
    checkpoints are read a tensor at a time.

    Args:
        base: theta_pre.
        tuned: theta_ft.
        model: The base model; it runs in evaluation mode, and is as it was afterwards.
        train: Keyword arguments of the model with labels, of classes (B,) or of tokens (B, T).
        dev: The same, to choose by.
        share: As in the analysis, also what follows.
        epochs: As in the analysis.
        lr: As in the analysis.
        bias: As in the analysis.
        accumulate: As in the analysis.
        target_modules: As in the analysis.
        head: As in the analysis.
        seed: As in the analysis.

    Returns:
        Its `about` has the epoch that was kept (0 is the base patch), entries of the base patch, `added` and `removed`
        by the search, and the history: epoch, both accuracies, entries.

    Raises:
        CheckpointError: as `base_patch`; or the model lacks a parameter.
        DataError: no batches.
        TunesmithError: a score is not finite.
    """
    if not train:
        raise DataError("skill-localization: there are no batches to learn the mask from")
    check_alike(base, [tuned])
    names = chosen(base, target_modules)
    held = dict(model.named_parameters(remove_duplicate=False))
    if lacking := [name for name in names if name not in held]:
        raise CheckpointError(f"{type(model).__name__} lacks the parameter {lacking[0]!r} of {base.name}")
    if base.folder is None and not isinstance(base, Computed):
        own = {p.data_ptr() for p in held.values()}
        if any(base[name].data_ptr() in own for name in names):  # the model's own tensors, which are about to change
            base = Checkpoint({name: base[name].clone() for name in base}, base.name)
    device = held[names[0]].device
    start = _patch(base, tuned, names, share)
    mask = Mask(base, tuned, start, names, bias=bias, device=device, seed=seed)
    asked, training = {n: p.requires_grad for n, p in held.items()}, {m: m.training for m in model.modules()}
    heads = _heads(base, tuned, head)
    history: list[tuple[int, float, float, int]] = []
    best, kept, best_epoch = -1.0, start, 0
    model.eval()
    try:
        model.requires_grad_(False)
        for name, value in heads.items():
            held[name].copy_(value)
        for epoch in range(epochs + 1):
            if epoch:
                _epoch(mask, model, held, train, lr, accumulate, (seed, "skill", epoch))
            mask.put(held, rounded=True)
            places = mask.places()
            on_train, on_dev = (accuracy(*predictions(model, given)[:2]) if given else 0.0 for given in (train, dev))
            history.append((epoch, on_train, on_dev, sum(map(len, places.values()))))
            if on_train + on_dev > best:
                best, kept, best_epoch = on_train + on_dev, places, epoch
    finally:
        for name in [*names, *heads]:
            held[name].data.copy_(base[name])
            held[name].grad = None
        for name, p in held.items():
            p.requires_grad_(asked[name])
        for module, was in training.items():
            module.training = was
    about = {"method": "skill-localization", "share": share, "epochs": epochs, "lr": lr, "bias": bias, "seed": seed}
    found = {"epoch": best_epoch, "base_patch": sum(map(len, start.values()))}
    found |= {"added": _count(kept, start), "removed": _count(start, kept)}
    return _delta(base, tuned, kept, head, {**about, **found, "history": history})


def _epoch(
    mask: Mask, model: nn.Module, held: Mapping[str, Tensor], train: Sequence[Mapping[str, Tensor]], lr: float,
    accumulate: int, keys: tuple[int | str, ...],
) -> None:  # fmt: skip
    mask.put(held)
    for name in mask.names:
        held[name].requires_grad_(True)
    order = subset(len(train), min(accumulate, len(train)), *keys)
    for i in order:
        model(**{k: v.to(mask.device) for k, v in train[i].items()}).loss.backward()
    for name in mask.names:
        grad, held[name].grad = held[name].grad, None
        held[name].requires_grad_(False)
        if grad is not None:
            mask.scores[name] -= lr / len(order) * mask.gradient(name, grad)
        if not bool(mask.scores[name].isfinite().all()):
            raise TunesmithError(f"skill-localization: a score of {name!r} is not finite; lower lr ({lr:g})")


def _count(left: Places, right: Places) -> int:
    """Places of `left` that `right` lacks."""
    return sum(int((~torch.isin(at, right.get(name, at[:0]))).sum()) for name, at in left.items())
