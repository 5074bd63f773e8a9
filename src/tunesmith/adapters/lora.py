"""LoRA: a low-rank change of each weight, by PEFT's own implementation.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.

    W' = W + (alpha / r) B A

The baseline that other adapters are compared with; also the smallest example of a part that PEFT already has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from peft import LoraConfig, PeftConfig
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from tunesmith.core.part import part


@part(paper="arXiv:2106.09685", tags=("own-tuner", "mergeable", "low-rank", "baseline"))
def lora(
    common: Mapping[str, Any],
    *,
    rank: PositiveInt = 8,
    alpha: PositiveFloat = 16.0,
    dropout: NonNegativeFloat = 0.0,
    rslora: bool = False,
    dora: bool = False,
    init: Literal["default", "gaussian", "orthogonal"] = "default",
) -> PeftConfig:
    """PEFT's LoRA.

    Args:
        common: Targets, modules to save, task type and a rank per layer, as `tunesmith.adapter` passes them.
        rank: r.
        alpha: Scale.
        dropout: On the input of A while training.
        rslora: Scale by alpha / sqrt(r) instead of alpha / r.
        dora: Learn magnitudes apart from directions (DoRA).
        init: Of A and B, by PEFT's names; starts that change the base are parts of their own (`pissa`, `corda`, ...).
    """
    common = {"target_modules": "all-linear", **common}
    if table := common.pop("ranks", None):
        patterns = {name: given for name, given in table.items() if given}
        common |= {"target_modules": list(patterns), "rank_pattern": patterns}
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        init_lora_weights=True if init == "default" else init,
        **common,
    )
