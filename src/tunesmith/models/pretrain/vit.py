"""The embedded image classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tunesmith.models.pretrain import card, loop
from tunesmith.world.images import LABELS, digits

BATCH = {"images": 64}
PLAN = loop.Plan("tiny-vit", steps=3000, lr=1e-3, seed=14, batch=BATCH)
SUMMARY = (
    "A small ViT (8 x 8 pixels, patches of 2 x 2) trained on scikit-learn's handwritten digits. The image processor "
    "scales any PIL image to 8 x 8 and needs no torchvision; digits are white on black."
)


def build(seed: int) -> ViTForImageClassification:
    """An untrained model."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=3,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    model = loop.seeded(lambda: ViTForImageClassification(config), seed)
    assert isinstance(model, ViTForImageClassification)
    return model


def processor() -> ViTImageProcessorPil:
    """Any PIL image -> (3, 8, 8) float32 in -1 to 1."""
    half = [0.5, 0.5, 0.5]
    return ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=half, image_std=half, do_convert_rgb=True)


def pixels(images: np.ndarray, process: Any) -> torch.Tensor:
    """(n, 3, 8, 8) float32 of (n, 8, 8) uint8 images."""
    return process([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by -1, 0 or 1 pixel in both directions, black moving in."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    across, down = torch.randint(3, (2, len(images)), generator=generator).tolist()
    return torch.stack([padded[i, :, y : y + 8, x : x + 8] for i, (x, y) in enumerate(zip(across, down, strict=True))])


@torch.no_grad()
def measure(model: PreTrainedModel) -> card.Figures:
    """Accuracy on the 360 held-out digits."""
    images, labels = digits("heldout")
    model.eval()
    said = model(pixels(images, processor()).to(model.dtype)).logits.argmax(-1)
    return {"images": len(images), "accuracy": round((said.numpy() == labels).mean().item(), 4)}


def make(plan: loop.Plan, output: Path, checkpoints: Path, *, resume: bool, compiled: bool) -> None:
    """Train, measure and write the model."""
    process = processor()
    images, labels = digits("train")
    inputs, targets = pixels(images, process), torch.from_numpy(labels)
    model = build(plan.seed)
    trained = build(plan.seed)
    if compiled:
        model.compile()

    def loss(step: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
        chosen = torch.randint(len(inputs), (BATCH["images"],), generator=generator)
        logits = model(shifted(inputs[chosen], generator)).logits.float()
        return F.cross_entropy(logits, targets[chosen], label_smoothing=0.05), 0

    spent = loop.train(model, plan, loss, checkpoints=checkpoints, resume=resume)
    trained.load_state_dict(model.state_dict())
    card.publish(
        trained,
        process,
        output,
        measure=measure,
        render=lambda figures: f"Accuracy on {figures['images']} held-out digits: {figures['accuracy']:.1%}.",
        plan=plan,
        spent=spent,
        summary=SUMMARY,
        task="image-classification",
        auto="AutoModelForImageClassification",
    )
