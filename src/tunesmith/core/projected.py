"""The AdamW of `core/gradspace.py` over the projected gradients of a model's weight matrices.

What GaLore and its relatives share: which weights are projected, on which side, what updating inside the backward pass
rules out. A subclass may keep more than the projection by another `projected_space`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from tunesmith.core.gradspace import GradSpace, SingularSpace, SpaceAdamW
from tunesmith.core.modelmap import block_linears
from tunesmith.core.optimizer import decay_groups
from tunesmith.errors import ModelError

Beta = Annotated[float, Field(ge=0, lt=1)]
Projection = Literal["std", "reverse_std", "left", "right", "full"]


class ProjectedAdamW(SpaceAdamW):
    """AdamW with low-rank moments for matrices.

    A group whose `rank` is None gets plain AdamW, and so does every tensor that is not 2-D. Groups have the keys
    `rank`, `period`, `scale` and `proj_type`.
    """

    brisk: ClassVar[Mapping[str, object]] = {"rank": 4, "period": 3}

    @classmethod
    def groups(cls, model: nn.Module, *, weight_decay: float = 0.0, **options: Any) -> list[dict[str, Any]]:
        """The weights of the blocks' linear layers, projected; then all else in two groups of plain AdamW.

        Raises:
            ModelError: no weight of a linear layer in the blocks trains.
        """
        inside = {id(model.get_submodule(name).weight) for name in block_linears(model)}
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        projected = [(name, p) for name, p in named if id(p) in inside and p.dim() == 2]
        if not projected:
            raise ModelError(
                f"{cls.__name__} projects the weights of the linear layers in the blocks, and in this "
                f"{type(model).__name__} none of them trains; unfreeze them (an adapter over frozen weights has "
                "nothing to project)"
            )
        taken = {id(p) for _, p in projected}
        name_of = {id(p): name for name, p in named}
        rest = decay_groups([(name, p) for name, p in named if id(p) not in taken], model, weight_decay)
        for group in rest:
            group["params"] = [(name_of[id(p)], p) for p in group["params"]]
            group["rank"] = None
        return [{"params": projected, "weight_decay": weight_decay}, *rest]

    @staticmethod
    def refusals(options: Mapping[str, Any]) -> dict[str, str]:
        """What `per_layer` rules out."""
        if not options.get("per_layer"):
            return {}
        at_once = "per_layer applies each gradient inside the backward pass and frees it"
        return {
            "gradient-accumulation": f"{at_once}, so micro-batches cannot be added up",
            "ddp": f"{at_once}, before the processes have averaged it",
            "gradient-clipping": f"{at_once}, so the norm over all of them is never known",
        }

    def space(self, p: Tensor, group: dict[str, Any]) -> GradSpace:
        if group["rank"] is None or p.dim() != 2:
            return GradSpace()
        tall = p.shape[0] >= p.shape[1]
        kind = group["proj_type"]
        left = kind in ("left", "full") or kind == ("reverse_std" if tall else "std")
        right = kind in ("right", "full") or kind == ("std" if tall else "reverse_std")
        return self.projected_space(group, left=left, right=right)

    def projected_space(self, group: dict[str, Any], *, left: bool, right: bool) -> SingularSpace:
        """The space of a projected weight."""
        return SingularSpace(group["rank"], group["period"], group["scale"], left=left, right=right)

    def _tell_of_clipped_ranks(self) -> None:
        clipped = [
            f"{tuple(p.shape)} with rank {group['rank']}"
            for group in self.param_groups
            for p in group["params"]
            if group["rank"] is not None and p.dim() == 2 and group["rank"] > min(p.shape)
        ]
        if clipped:
            warnings.warn(
                f"{type(self).__name__}: the rank is more than the smaller side of {len(clipped)} weights (the first: "
                f"{clipped[0]}); they use their smaller side, where the projection saves nothing. Lower `rank`.",
                stacklevel=3,
            )
