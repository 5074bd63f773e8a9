"""PEFT LoRA folders beside checkpoints: a base with one merged in, and several merged into one.

adapted(base, folder)                             the base plus the adapter, a lazily computed checkpoint
merge_adapters(method, folders, "out", base)      LoRA folders to a LoRA folder, without the product B A
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor

from tunesmith.core.files import staged_folder
from tunesmith.core.merging import Judges, LinearMerge, merged
from tunesmith.core.reference import CHANGES_BASE
from tunesmith.core.statedict import Checkpoint, Computed
from tunesmith.errors import CheckpointError

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_FACTORS = (".lora_A.weight", ".lora_embedding_A")
# What these do to a weight is not base + scale B A.
_NOT_PLAIN = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
)


class LoRAFolder:
    """The tensors of a PEFT LoRA folder, under the names that the base's checkpoint has for them.

    Attributes:
        config: `adapter_config.json`.
        modules: `{weight name: scale}`; the scale is alpha / r, or alpha / sqrt(r) with rsLoRA.
        replaced: Names of whole tensors that it holds instead of the base's: `modules_to_save` and trained biases.

    Raises:
        CheckpointError: not a plain LoRA, or a base that the adapter itself changes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / ADAPTER).exists() or not (self.folder / ADAPTER_CONFIG).exists():
            raise CheckpointError(f"{folder} is not an adapter folder: expected {ADAPTER} and {ADAPTER_CONFIG} there")
        self.config = json.loads((self.folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        self._check()
        self._tensors = Checkpoint(self.folder / ADAPTER)
        self.modules: dict[str, float] = {}
        self.replaced: dict[str, str] = {}
        self._keys: dict[str, str] = {}
        for key in self._tensors:
            name = key.removeprefix(_PREFIX)
            ending = next((e for e in _FACTORS if name.endswith(e)), None)
            if ending is not None:
                module = name.removesuffix(ending)
                self.modules[f"{module}.weight"] = self._scale(module, self._tensors.describe(key)[0][0])
                self._keys[f"{module}.weight"] = key
            elif "lora_" in name:
                if name.replace("_B", "_A").endswith(_FACTORS):
                    continue
                raise CheckpointError(f"{self.folder}: the tensor {key!r} is not part of a plain LoRA")
            else:
                self.replaced[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = key

    def _check(self) -> None:
        kind, start = self.config.get("peft_type"), self.config.get("init_lora_weights")
        odd = [option for option in _NOT_PLAIN if self.config.get(option)]
        if kind != "LORA" or odd:
            what = f"`{odd[0]}` is set" if odd else f"its peft_type is {kind}"
            raise CheckpointError(f"{self.folder} is not a plain LoRA ({what}); merge it into its base model first")
        if isinstance(start, str) and start.startswith(CHANGES_BASE):
            raise CheckpointError(
                f"{self.folder}: {start} changes the base weights; save it with "
                "`path_initial_model_for_weight_conversion`, or merge it into its base model first"
            )

    def _scale(self, module: str, rank: int) -> float:
        pattern = self.config.get("alpha_pattern") or {}
        alpha = pattern.get(get_pattern_key(list(pattern), module), self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def key(self, name: str) -> str:
        """What the folder calls the factor A of a weight."""
        return self._keys[name]

    @staticmethod
    def partner(key: str) -> str:
        """What the folder calls the factor B that belongs to the factor A called `key`."""
        return key.replace(".lora_A.", ".lora_B.").replace(".lora_embedding_A", ".lora_embedding_B")

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(B, A) of a weight, float32 with the scale in B: (out, r, ...) and (r, in, ...); their product is the change
        of the weight in PEFT's orientation."""
        key = self._keys[name]
        return self._tensors.wide(self.partner(key)) * self.modules[name], self._tensors.wide(key)

    def replacement(self, name: str) -> Tensor:
        """A tensor of `replaced`, float32 or wider."""
        return self._tensors.wide(self.replaced[name])

    def delta(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The change of a weight as the base's checkpoint stores it, in `shape`.

        Raises:
            CheckpointError: the factors make another shape.
        """
        B, A = self.factors(name)
        product = B.flatten(1) @ A.flatten(1)
        # GPT-2's layers and embeddings store the transpose.
        flipped = "embedding" in self._keys[name] or bool(self.config.get("fan_in_fan_out"))
        if len(shape) == 2 and (product.shape[::-1] == shape and (flipped or product.shape != shape)):
            product = product.T
        if product.numel() != math.prod(shape) or (len(shape) == 2 and product.shape != shape):
            raise CheckpointError(
                f"{self.folder} changes {name!r} by a matrix of shape {tuple(product.shape)}; the base has {shape}"
            )
        return product.reshape(shape)


def adapted(base: Checkpoint, folder: str | Path | LoRAFolder) -> Checkpoint:
    """The base with a PEFT LoRA folder merged in, a tensor at a time.

    As with PEFT's own merging, a change of an embedding that the head is tied to becomes one of the head as well.

    Raises:
        CheckpointError: the adapter changes a tensor that the base lacks or has in another shape.
    """
    lora = folder if isinstance(folder, LoRAFolder) else LoRAFolder(folder)
    if lacking := sorted((set(lora.modules) | set(lora.replaced)) - set(base)):
        raise CheckpointError(
            f"{lora.folder} changes {lacking[0]!r}, which {base.name} lacks; give the "
            "model that it was trained on, head included"
        )

    def value(name: str) -> Tensor:
        if name in lora.replaced:
            return lora.replacement(name)
        weight = base.wide(name)
        return weight + lora.delta(name, tuple(weight.shape)) if name in lora.modules else weight

    return Computed(base, value, str(lora.folder))


def merge_adapters(
    method: LinearMerge,
    folders: Sequence[str | Path],
    output: str | Path,
    base: Checkpoint,
    judges: Judges | None = None,
    *,
    rank: int | None = None,
) -> Path:
    """Merge PEFT LoRA folders into one, exactly: sum_i c_i s_i B_i A_i as the product of the factors laid side by side.

    Averaging the A's and the B's apart gives another matrix: mean(B) mean(A) is not mean(B A).

    Args:
        method: Sees the base with each adapter merged in; only its coefficients enter the result.
        folders: Adapters of the same base; they may differ in rank, scale and targets.
        output: Folder to make: rank sum_i r_i, alpha = rank, float32.
        base: What they were trained on; read only as far as the method and its judges ask.
        judges: As for `merged`.
        rank: Reduce each product to this rank by its singular value decomposition, the best approximation there is.

    Raises:
        CheckpointError: a method that is no weighted sum, folders that are no plain LoRA, or what `merged` raises.
    """
    if not isinstance(method, LinearMerge):
        raise CheckpointError(
            f"{type(method).__name__} is not a weighted sum, so it does not make a LoRA of LoRAs; merge the adapters "
            "into their base and merge those models"
        )
    loras = [LoRAFolder(folder) for folder in folders]
    whole = merged(method, [adapted(base, lora) for lora in loras], base if method.needs_base else None, judges)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, template in {name: lora.key(name) for lora in reversed(loras) for name in lora.modules}.items():
        weights = method.coefficients(name, len(loras))
        held = [(c, lora) for c, lora in zip(weights, loras, strict=True) if name in lora.modules]
        held = [pair for pair in held if pair[0]] or held[:1]
        pairs = [(c, *lora.factors(name)) for c, lora in held]
        B, A = torch.cat([c * b for c, b, _ in pairs], dim=1), torch.cat([a for _, _, a in pairs])
        if rank is not None and rank < A.shape[0]:
            B, A = _reduced(B, A, rank)
        tensors[template], tensors[LoRAFolder.partner(template)] = A.contiguous(), B.contiguous()
        ranks[name.removesuffix(".weight")] = A.shape[0]
    for name, key in {name: key for lora in loras for name, key in lora.replaced.items()}.items():
        tensors[key] = whole.wide(name).float()
    most = max(ranks.values(), default=1)
    other = {module: r for module, r in ranks.items() if r != most}
    config = {**loras[0].config, "r": most, "lora_alpha": most, "use_rslora": False, "init_lora_weights": True}
    config |= {"rank_pattern": other, "alpha_pattern": other, "target_modules": sorted(ranks)}
    config |= {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    kept = {module for lora in loras for module in lora.config.get("modules_to_save") or ()}
    config["modules_to_save"] = sorted(kept) or None
    with staged_folder(output) as staging:
        save_file(tensors, staging / ADAPTER, metadata={"format": "pt"})
        (staging / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return Path(output)


def _reduced(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of `rank` for B A, through the small middle matrix of two QR decompositions."""
    Qb, Rb = torch.linalg.qr(B.flatten(1).double())
    Qa, Ra = torch.linalg.qr(A.flatten(1).double().T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
    root = S[:rank].sqrt()
    left, right = (Qb @ U[:, :rank]) * root, (root[:, None] * Vh[:rank]) @ Qa.T
    return left.float().reshape(len(B), -1, *B.shape[2:]), right.float().reshape(-1, *A.shape[1:])
