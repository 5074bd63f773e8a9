"""Adapters of ours as plain LoRA folders, for whatever loads those."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith.core.bridge import TunesmithConfig
from tunesmith.core.files import staged_folder
from tunesmith.core.tuner_layer import TunesmithLayer
from tunesmith.errors import ModelError


def export_lora(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> Path:
    """Write an adapter as PEFT's LoRA on the ORIGINAL weights: same outputs, no Tunesmith needed to load it.

    Args:
        model: A PEFT model with an adapter of ours. Several low-rank parts on one layer become one of their ranks' sum.
        folder: Replaced as a whole.
        adapter_name: Which adapter.

    Raises:
        ModelError: the adapter is not ours, or its change of some layer is not low rank.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, TunesmithConfig):
        raise ModelError(f"the adapter {adapter_name!r} is not one of Tunesmith's; there is nothing to convert")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    held = [(n, m) for n, m in model.named_modules() if isinstance(m, TunesmithLayer)]
    for name, layer in held:
        if adapter_name not in layer.tunesmith_adapters:
            continue
        made = list(layer.tunesmith_adapters[adapter_name])
        factors = [part.to_lora() for part in made]
        low = [pair for pair in factors if pair is not None]
        if len(low) < len(factors):
            slugs = " + ".join(entry["name"] for entry in config.parts)
            raise ModelError(
                f"{slugs} makes no low-rank change of {layer.spec.name!r} that a LoRA could hold; fold it into the "
                "weights instead (merge_and_unload, `tunesmith export --as merged`)"
            )
        if layer.spec.groups > 1:
            raise ModelError(
                f"{layer.spec.name!r} is a convolution in {layer.spec.groups} groups, for which PEFT's LoRA has no "
                "shape; fold the adapter into the weights instead (`tunesmith export --as merged`)"
            )
        if not any(A.shape[0] for _, A in low):
            continue  # nothing is left of its rank
        B, A = torch.cat([B for B, _ in low], dim=1), torch.cat([A for _, A in low])
        kind = "embedding_" if layer.spec.kind == "embedding" else ""
        suffix = "" if kind else ".weight"
        kernel = layer.spec.shape[2:] if layer.spec.kind == "conv" else ()
        A = A.reshape(A.shape[0], -1, *kernel) if kernel else A
        B = B.reshape(*B.shape, *[1] * len(kernel))
        tensors[f"{name}.lora_{kind}A{suffix}"] = A.detach().cpu().contiguous()
        tensors[f"{name}.lora_{kind}B{suffix}"] = B.detach().cpu().contiguous()
        ranks[layer.spec.name] = A.shape[0]
    if not ranks:
        raise ModelError(f"the adapter {adapter_name!r} changes no layer")
    # alpha = r makes PEFT's scale 1: the factor of the method is in B already.
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    pattern = {name: r for name, r in ranks.items() if r != rank}
    plain = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(ranks),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    tensors.update(_saved_modules(model, adapter_name))
    with staged_folder(folder) as staging:
        save_file({n: t.to(torch.float32) for n, t in tensors.items()}, staging / "adapter_model.safetensors")
        plain.save_pretrained(str(staging))
    return Path(folder)


def _saved_modules(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Whole modules that train beside the adapter, under the names that PEFT saves them by."""
    marker = f".modules_to_save.{adapter_name}."
    return {
        name.replace(marker, "."): tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if marker in name
    }
