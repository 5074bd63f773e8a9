"""S2FT: a few whole heads and feed-forward channels train, as one dense slice of each layer that reads or makes them.

Yang, Leng, Guo, Zhao, Nakada, Zhang, Yao and Chen, "S^2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by
Structured Sparsity", NeurIPS 2024 (section 3).

    o, down:   y = x W^T + x[S] D^T,     D (out, k), S the k columns of the chosen heads or channels   (section 3.2)
    v, up:     y = x W^T,  y[S] += x D^T,   D (k, in), S the k rows
    D = 0 at the start

How many of a layer is not fixed: floor(ratio * heads) of all heads of the model are drawn, and likewise channels, so
layers get different numbers, some none. A row-parallel slice (o, down) keeps k of the layer's inputs for the backward
pass and computes the gradient of k columns alone (partial backpropagation); the frozen product keeps nothing.

The paper permutes heads and channels so that S is one block, and trains that block of the weight in place. Here S is
gathered, k columns of the input, and W stays where it is: a model in its own order, under grouped-query attention too,
where the released permutation stops with an IndexError; and a base that may be quantised. The trained numbers, their
gradients and the bytes kept are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tunesmith.core.adapter import Adapter, Below
from tunesmith.core.layer import LayerSpec, kind_of, read_weight
from tunesmith.core.layer import describe as describe_layer
from tunesmith.core.part import part
from tunesmith.core.seeds import subset
from tunesmith.core.surgery import Site, sites
from tunesmith.errors import ModelError

Share = Annotated[float, Field(ge=0, le=1)]


class _Plan(nn.Module):
    """The chosen columns or rows of each layer, by its name: nothing that trains or is saved."""

    def __init__(self, chosen: Mapping[str, Tensor], rows: frozenset[str]) -> None:
        super().__init__()
        self.chosen, self.rows = dict(chosen), rows


@part(paper="arXiv:2412.06289", tags=("mergeable", "low-rank", "sparse"))
class S2FT(Adapter):
    """A dense slice of a layer.

    Args:
        layer: A linear layer: attention's output or value, the feed-forward part's down or up.
        o_ratio: Share of the heads whose columns of the output projection train.
        d_ratio: Share of the feed-forward channels whose columns of the down projection train.
        v_ratio: Share of the value heads whose rows of the value projection train.
        u_ratio: Share of the channels whose rows of the up projection train.
        selection: `random` (the paper's), or by the norm of what a head or channel reads out: `large` or `small`.
        seed: Of the draws.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    indices: Tensor

    def __init__(
        self,
        layer: LayerSpec,
        *,
        o_ratio: Share = 0.052,
        d_ratio: Share = 0.02,
        v_ratio: Share = 0.0,
        u_ratio: Share = 0.0,
        selection: Literal["random", "large", "small"] = "random",
        seed: int = 0,
    ) -> None:
        super().__init__(layer)
        self.by_rows = False
        self.register_buffer("indices", torch.empty(0, dtype=torch.int64, device=layer.device))
        self.D: nn.Parameter | None = None

    @classmethod
    def targets(cls, model: nn.Module) -> list[str]:
        """Every layer that reads or makes heads or channels; those of which nothing is chosen stay as they are."""
        names = [name for site in sites(model).values() for name in (site.output, *_made(site))]
        return [name for name in names if kind_of(_bare(model, name)) == "linear"]

    @classmethod
    def survey(cls, model: nn.Module, layers: Sequence[LayerSpec], options: Mapping[str, Any]) -> nn.Module:
        """Draw heads and channels over the layers that are changed.

        Raises:
            ModelError: a layer that neither reads nor makes heads or channels; or ratios that choose nothing.
        """
        wanted = {layer.name for layer in layers}
        known = sites(model)
        able = {name for site in known.values() for name in (site.output, *_made(site))}
        if strange := sorted(wanted - able):
            raise ModelError(
                f"s2ft trains heads and feed-forward channels; {strange[0]!r} neither reads nor makes any: name "
                "projections of attention's output or values, or of the feed-forward part, in `target_modules`"
            )
        chosen: dict[str, Tensor] = {}
        rows: set[str] = set()
        for kind, output, inputs in (("heads", "o_ratio", "v_ratio"), ("neurons", "d_ratio", "u_ratio")):
            of_kind = [site for site in known.values() if site.kind == kind]
            reading = {s.output: (s.count, s.size) for s in of_kind if s.output in wanted}
            chosen |= cls._drawn(model, reading, output, options, columns=True)
            making = {
                n: (s.units if kind == "heads" else s.count, s.size) for s in of_kind for n in _made(s) if n in wanted
            }
            found = cls._drawn(model, making, inputs, options, columns=False)
            rows |= found.keys()
            chosen |= found
        if not chosen:
            given = {name: options[name] for name in ("o_ratio", "d_ratio", "v_ratio", "u_ratio")}
            raise ModelError(f"s2ft: {given} choose no head and no channel of these {len(wanted)} layers; raise one")
        return _Plan(chosen, frozenset(rows))

    @classmethod
    def _drawn(
        cls,
        model: nn.Module,
        units: Mapping[str, tuple[int, int]],
        ratio: str,
        options: Mapping[str, Any],
        *,
        columns: bool,
    ) -> dict[str, Tensor]:
        """The columns or rows of each layer; `units` has how many units it has, and of what width."""
        every = [(name, unit) for name, (count, _) in units.items() for unit in range(count)]
        count = int(options[ratio] * len(every) + 1e-9)
        if options["selection"] == "random":
            taken = subset(len(every), count, options["seed"], "s2ft", ratio)
        else:
            norms = torch.cat(
                [_norms(model, name, *units[name], columns=columns) for name in units] or [torch.empty(0)]
            )
            taken = (
                norms.sort(descending=options["selection"] == "large", stable=True)
                .indices[:count]
                .sort()
                .values.tolist()
            )
        found: dict[str, list[int]] = {}
        for at in taken:
            name, unit = every[at]
            width = units[name][1]
            found.setdefault(name, []).extend(range(unit * width, (unit + 1) * width))
        return {name: torch.tensor(places) for name, places in found.items()}

    def join(self, shared: nn.Module | None, owner: bool) -> None:
        super().join(shared, owner)
        assert isinstance(shared, _Plan)
        places = shared.chosen.get(self.layer.name)
        if places is None:
            return
        self.by_rows = self.layer.name in shared.rows
        out, fan_in = self.layer.shape
        size = (len(places), fan_in) if self.by_rows else (out, len(places))
        del self.D  # torch refuses a parameter of the name of a plain attribute
        self.indices = places.to(self.layer.device)
        self.D = nn.Parameter(torch.zeros(size, device=self.layer.device))

    def weight(self, W: Tensor) -> Tensor:
        if self.D is None:
            return W
        return W.index_add(0 if self.by_rows else 1, self.indices, self.D.to(W.dtype))

    def forward(self, x: Tensor, below: Below) -> Tensor:
        y = below(x)
        if self.D is None:
            return y
        D = self.D.to(x.dtype)
        if self.by_rows:
            return y.index_add(-1, self.indices, F.linear(x, D).to(y.dtype))
        return y + F.linear(x.index_select(-1, self.indices), D).to(y.dtype)

    def to_lora(self) -> tuple[Tensor, Tensor]:
        out, fan_in = self.layer.shape
        if self.D is None:
            return torch.zeros(out, 0), torch.zeros(0, fan_in)
        D = self.D.detach()
        ones = torch.zeros(len(self.indices), out if self.by_rows else fan_in, device=D.device)
        ones[torch.arange(len(self.indices)), self.indices] = 1
        return (ones.T, D) if self.by_rows else (D, ones)

    def sparse(self, W: Tensor) -> tuple[Tensor, Tensor]:
        if self.D is None:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        out, fan_in = self.layer.shape
        if self.by_rows:
            places = self.indices[:, None] * fan_in + torch.arange(fan_in, device=self.indices.device)
        else:
            places = torch.arange(out, device=self.indices.device)[:, None] * fan_in + self.indices
        return places.flatten(), self.D.detach().flatten()


def _made(site: Site) -> tuple[str, ...]:
    """The layers whose rows make the site's units: values, or the up projection."""
    last = site.inputs[-1:]
    if site.kind == "heads":
        return last if len(site.inputs) == 3 else ()  # a fused q, k and v has rows of all three
    return last


def _bare(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    return getattr(module, "base_layer", module)


def _norms(model: nn.Module, name: str, count: int, width: int, *, columns: bool) -> Tensor:
    module = _bare(model, name)
    W = read_weight(module, describe_layer(module, name)).detach().float()
    units = (W.T if columns else W).reshape(count, -1)
    assert units.numel() == count * width * W.shape[0 if columns else 1]
    return units.norm(dim=1).cpu()
