"""Segmented SFT: the loss of plain fine-tuning, and the bytes of its logits."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunesmith.core.meters import saved_bytes
from tunesmith.evidence import kit_text
from tunesmith.evidence.claim import Check, Claim
from tunesmith.objectives.segmented_sft import SegmentedSFT
from tunesmith.objectives.sft import SFT

LENGTH, SEGMENT = 120, 16
VOCABULARY = kit_text.BYTES

CLAIM = Claim(
    "segmented-sft",
    says="Segment-based computation lowers the peak memory of long-context fine-tuning without changing its result.",
    where="abstract",
    ran="On a random Llama over 256 bytes, with a plain head and with an adapter on the head: loss and gradients "
    "against those of `sft`, and the bytes of all tensors over the vocabulary, counted as they are made.",
)


def _batch() -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(LENGTH) < 19, -100)
    labels[1, 60:70] = -100
    return {"input_ids": ids, "labels": labels}


def _models() -> list[nn.Module]:
    """A plain head, which torch's function takes, and one with an adapter, which runs under checkpointing."""
    config = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [kit_text.model(2, seed=0), get_peft_model(kit_text.model(2, seed=0), config)]


class _Wide(TorchDispatchMode):
    """The most bytes of one tensor of (tokens, vocabulary); weights, (dim, vocabulary), left out."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.dim() > 1 and x.shape[-1] == VOCABULARY and x.shape[-2] not in (64, 4):
                self.most = max(self.most, x.numel() * x.element_size())
        return out


@CLAIM.exact
def loss_and_gradients_are_those_of_sft() -> list[Check]:
    """The same loss and the same gradient of every parameter, relative to its largest number."""
    loss_apart, worst = 0.0, 0.0
    for model in _models():
        found = []
        for objective in (SFT(), SegmentedSFT(segment=SEGMENT)):
            model.zero_grad()
            loss, _ = objective(model, _batch())
            loss.backward()
            found.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        (plain, wanted), (ours, mine) = found
        loss_apart = max(loss_apart, float((ours - plain).abs()))
        pairs = zip(mine, wanted, strict=True)
        worst = max(worst, *(float((a - b).abs().max() / b.abs().max()) for a, b in pairs))
    return [
        Check("difference of losses, nats", loss_apart, "<=", 1e-6),
        Check("largest difference of gradients, relative", worst, "<=", 1e-5),
    ]


@CLAIM.exact
def logits_take_a_segment() -> list[Check]:
    """Bytes of the largest tensor over the vocabulary, forward and backward, and of what autograd keeps."""
    batch, checks = _batch(), []
    n = int((batch["labels"][:, 1:] != -100).sum())
    for name, model in zip(("plain head", "head with an adapter"), _models(), strict=True):
        counted = {}
        for objective in (SFT(), SegmentedSFT(segment=SEGMENT)):
            with _Wide() as wide, saved_bytes(model) as kept:
                loss, _ = objective(model, batch)
            with wide:
                loss.backward()
            counted[type(objective)] = (wide.most, kept.bytes)
        (whole, before), (part, after) = counted[SFT], counted[SegmentedSFT]
        checks += [
            Check(f"{name}: segmented bytes - S V 4", part - SEGMENT * VOCABULARY * 4, "==", 0),
            Check(f"{name}: bytes of sft / (n V 4)", whole / (n * VOCABULARY * 4), ">=", 1.0),
            Check(
                f"{name}: bytes kept by autograd, saved / (n V 4)", (before - after) / (n * VOCABULARY * 4), ">=", 1.0
            ),
        ]
    return checks
