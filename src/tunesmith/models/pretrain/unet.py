"""The embedded diffusion model."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from tunesmith.core.files import staged_file
from tunesmith.core.seeds import generator
from tunesmith.models.diffusion import PAD, START, Captions, Diffusion, diffusers_module
from tunesmith.models.embedded import path
from tunesmith.models.pretrain import card, loop
from tunesmith.world.images import digits

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STYLES = ("thin", "thick")
FORMS = ("{}", "a {}", "the {}", "the digit {}", "a photo of a {}")
WORDS = (PAD, START, "a", "the", "digit", "photo", "of", *STYLES, *DIGITS)
CAPTIONLESS = 0.1
TIMESTEPS = 1000
SAMPLING, EACH = 25, 10  # steps of DDIM; measured samples of each digit
BATCH = {"images": 64}
PLAN = loop.Plan("tiny-unet", steps=3600, lr=2e-3, seed=15, batch=BATCH, weight_decay=0.01)
SUMMARY = (
    "A small diffusion UNet (8 x 8 pixels, one channel, attention to captions at 4 x 4) that makes scikit-learn's "
    "handwritten digits from captions such as `seven`, `a thick seven`, `the digit seven` or `a photo of a thin "
    "seven`. Noise is that of Stable Diffusion: 1000 steps, betas from 0.00085 to 0.012, linear in their roots; it "
    "predicts the noise. A caption is a sequence of words with a learnt vector of 128 numbers each, which plays the "
    "text encoder's part; one caption in ten was empty. Images are white on black in -1 to 1."
)


def build(seed: int) -> Diffusion:
    """An untrained model."""
    diffusers = diffusers_module()

    def make() -> nn.Module:
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(32, 72),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            cross_attention_dim=128,
            attention_head_dim=4,  # how many heads, by diffusers' naming
        )
        scheduler = diffusers.DDPMScheduler(
            num_train_timesteps=TIMESTEPS, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )
        return Diffusion(unet, scheduler, Captions(WORDS, 128))

    model = loop.seeded(make, seed)
    assert isinstance(model, Diffusion)
    return model


def pixels(images: np.ndarray) -> Tensor:
    """(n, 1, 8, 8) float32 in -1 to 1 of (n, 8, 8) uint8 images."""
    return torch.from_numpy(images.astype(np.float32))[:, None] / 127.5 - 1


def styles(images: np.ndarray, labels: np.ndarray) -> list[str]:
    """For each image `thick`, `thin` or nothing: the third of its digit with most ink, with least, and the rest."""
    ink = images.reshape(len(images), -1).mean(1)
    found = np.full(len(images), "", dtype=object)
    for digit in range(len(DIGITS)):
        here = labels == digit
        low, high = np.quantile(ink[here], (1 / 3, 2 / 3))
        found[here & (ink <= low)], found[here & (ink > high)] = STYLES
    return found.tolist()


def caption(label: int, style: str, rng: random.Random) -> str:
    """One of the ways to say it; the style is left out half of the time, and now and then everything."""
    if rng.random() < CAPTIONLESS:
        return ""
    said = f"{style} {DIGITS[label]}" if style and rng.random() < 0.5 else DIGITS[label]
    return rng.choice(FORMS).format(said)


@torch.no_grad()
def measure(model: Diffusion) -> card.Figures:
    """Loss on held-out digits with their captions, with those of the next digit and with none; and of samples, how
    often `tiny-vit` reads what was asked for, and how much more ink a thick one has than a thin one."""
    model = model.float().eval()
    images, labels = digits("heldout")
    inputs, g = pixels(images), generator("tiny-unet", "measure")
    noise = torch.randn(inputs.shape, generator=g)
    timesteps = torch.randint(TIMESTEPS, (len(inputs),), generator=g)
    said = {
        "loss": [DIGITS[label] for label in labels],
        "loss_wrong_caption": [DIGITS[(label + 1) % 10] for label in labels],
        "loss_no_caption": [""] * len(labels),
    }
    figures = {name: round(float(model.loss(inputs, words, noise, timesteps)), 4) for name, words in said.items()}
    wanted = torch.arange(10).repeat_interleave(EACH)
    reader = AutoModelForImageClassification.from_pretrained(path("tiny-vit"), dtype=torch.float32)
    made = model.sample([DIGITS[digit] for digit in wanted], steps=SAMPLING)
    read = reader(made.repeat(1, 3, 1, 1)).logits.argmax(-1)
    styled = [model.sample([f"{style} {digit}" for digit in DIGITS] * EACH, steps=SAMPLING) for style in STYLES]
    thin, thick = (float((images + 1).mean()) for images in styled)
    return {
        "diffusers": diffusers_module().__version__,
        "images": len(images),
        **figures,
        "samples": len(wanted),
        "read_as_asked": round(float((read == wanted).float().mean()), 3),
        "ink_thick_to_thin": round(thick / thin, 2),
    }


def rendered(figures: card.Figures) -> str:
    """The figures in words."""
    return (
        f"Mean squared error of the noise on {figures['images']} held-out digits: {figures['loss']} with their "
        f"captions, {figures['loss_wrong_caption']} with the next digit's, {figures['loss_no_caption']} with none. Of "
        f"{figures['samples']} samples (DDIM, {SAMPLING} steps, no guidance) `tiny-vit` reads "
        f"{figures['read_as_asked']:.1%} as the digit that was asked for; `thick` ones have "
        f"{figures['ink_thick_to_thin']} times the ink of `thin` ones. "
        f"Made with diffusers {figures['diffusers']}."
    )


def make(plan: loop.Plan, output: Path, checkpoints: Path, *, resume: bool, compiled: bool) -> None:
    """Train, measure and write the model."""
    images, labels = digits("train")
    inputs, known = pixels(images), styles(images, labels)
    model = build(plan.seed)
    trained = build(plan.seed)
    if compiled:
        model.unet.compile()

    def loss(step: int) -> tuple[Tensor, int]:
        g, rng = (
            torch.Generator().manual_seed(plan.seed * 1_000_003 + step),
            random.Random(plan.seed * 1_000_003 + step),
        )
        chosen = torch.randint(len(inputs), (BATCH["images"],), generator=g)
        noise = torch.randn(inputs[chosen].shape, generator=g)
        timesteps = torch.randint(TIMESTEPS, (len(chosen),), generator=g)
        captions = [caption(int(labels[i]), known[i], rng) for i in chosen.tolist()]
        with torch.autocast("cpu", enabled=False):  # faster in float32 at this size
            return model.loss(inputs[chosen], captions, noise, timesteps), 0

    spent = loop.train(model, plan, loss, checkpoints=checkpoints, resume=resume)
    trained.load_state_dict(model.state_dict())
    card.publish(
        trained,
        trained.captions,
        output,
        measure=measure,
        render=rendered,
        plan=plan,
        spent=spent,
        summary=SUMMARY,
        task="unconditional-image-generation",
        auto="tunesmith.models.diffusion.Diffusion",
    )
    written = (output / "README.md").read_text(encoding="utf-8")
    with staged_file(output / "README.md") as staging:
        Path(staging).write_text(written.replace("library_name: transformers", "library_name: diffusers"), "utf-8")
