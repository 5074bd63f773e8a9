"""Diffusion models: the embedded one, its denoising loss, sampling, and a word of one's own learnt from a few images.

    diffusion = load("tiny-unet", int8=True)
    images = diffusion.sample(["a thick seven"], seed=0)
    row = diffusion.captions.add_word("<mine>", like="seven")
    invert(diffusion, ZOPersonalization([row], lr=1e-2), my_images, ["a <mine>"], steps=500)

A model folder is flat: `config.json` and `diffusion_pytorch_model.safetensors` (what `UNet2DConditionModel` loads),
`scheduler_config.json` (what diffusers' schedulers load), `captions.json` and `captions.safetensors`. Captions are
words of a small vocabulary, a learnt vector each; the UNet attends to them, as it would to a text encoder's output.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tunesmith.core.files import staged_file
from tunesmith.core.seeds import Key, generator
from tunesmith.errors import ModelError, did_you_mean
from tunesmith.models import embedded

CAPTIONS, VOCABULARY, SCHEDULER = "captions.safetensors", "captions.json", "scheduler_config.json"
PAD, START = "<pad>", "<start>"
LOW, MARGIN = 500, 100


def diffusers_module() -> Any:
    """The library diffusers, or a ModelError that says how to get it."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise ModelError(f"this needs diffusers ({error}): pip install 'tunesmith[diffusion]'") from None


class Captions(nn.Module):
    """Captions to vectors: one learnt vector per word, a start token first.

    Args:
        words: The vocabulary; its first two are the padding and the start token.
        width: Numbers in a vector: the UNet's `cross_attention_dim`.
        length: Tokens that a caption may have, the start token included.
    """

    def __init__(self, words: Sequence[str], width: int, length: int = 8) -> None:
        super().__init__()
        if tuple(words[:2]) != (PAD, START) or len(set(words)) < len(words):
            raise ModelError(f"a vocabulary begins with {PAD} and {START} and has each word once, found {list(words)}")
        self.words, self.length = list(words), length
        self.table = nn.Embedding(len(words), width, padding_idx=0)
        self.own = nn.ParameterList()

    def add_word(self, word: str, *, like: str) -> nn.Parameter:
        """A new word that means for now what `like` means; all other words are frozen.

        Returns:
            (width,) float32, also in a half-precision model, where a change of 1e-3 would round away: convert the
            model before and not after.

        Raises:
            ModelError: the word exists, or is not one word; or `like` is unknown.
        """
        if word.lower().split() != [word] or word in self.words:
            raise ModelError(f"expected a single lower-case word that is new, such as '<mine>', found {word!r}")
        start = self.vectors()[self.ids_of(like)[0]].detach().float().clone()
        self.requires_grad_(False)
        self.words.append(word)
        self.own.append(nn.Parameter(start))
        return self.own[-1]

    def vectors(self) -> Tensor:
        """(words, width) the whole table, float32 where there are words of one's own."""
        return torch.cat([self.table.weight, *(row[None] for row in self.own)])

    def ids_of(self, caption: str) -> list[int]:
        """The places of a caption's words in the vocabulary, without the start token.

        Raises:
            ModelError: a word is unknown, or there are too many.
        """
        said, known = caption.lower().split(), self.words[2:]
        for word in said:
            if word not in known:
                near = f"{did_you_mean(word, known)} There are: {', '.join(known)}; `add_word` makes a new one."
                raise ModelError(f"the caption {caption!r} has the unknown word {word!r}.{near}")
        if len(said) >= self.length:
            raise ModelError(f"the caption {caption!r} has {len(said)} words, and at most {self.length - 1} fit")
        return [self.words.index(word) for word in said]

    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(n, tokens, width) vectors and (n, tokens) mask, True at tokens; an empty caption has the start token."""
        if isinstance(captions, str):
            raise ModelError(f"expected a list of captions, found the text {captions!r}")
        rows = [[1, *self.ids_of(caption)] for caption in captions]
        longest = max(map(len, rows), default=1)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.table.weight.device)
        return F.embedding(ids, self.vectors()), ids != 0

    def save_word(self, word: str, path: str | Path) -> None:
        """Write a word of one's own to a safetensors file, as diffusers keeps learnt tokens: its name and its row.

        Raises:
            ModelError: there is no such word that was added.
        """
        if word not in (added := self.words[len(self.words) - len(self.own) :]):
            raise ModelError(f"{word!r} was not added; there are: {', '.join(added) or 'none'}")
        with staged_file(path) as staging:
            save_file({word: self.own[added.index(word)].detach().contiguous()}, staging)

    @torch.no_grad()
    def load_words(self, path: str | Path) -> list[str]:
        """Add the words of a file that `save_word` wrote; their names.

        Raises:
            ModelError: the file cannot be read, is of another width, or a word exists.
        """
        try:
            rows = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: expected a safetensors file of words; it cannot be read ({error})") from None
        for word, row in rows.items():
            if row.shape != self.table.weight.shape[1:]:
                raise ModelError(f"{path}: {word!r} has {row.numel()} numbers, expected {self.table.embedding_dim}")
            self.add_word(word, like=self.words[2]).copy_(row)
        return list(rows)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `captions.json` and `captions.safetensors` into a folder."""
        with staged_file(Path(folder) / VOCABULARY) as staging:
            info = {"words": self.words, "own": len(self.own), "length": self.length}
            staging.write_text(json.dumps(info) + "\n", encoding="utf-8")
        with staged_file(Path(folder) / CAPTIONS) as staging:
            save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, staging)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Captions:
        """Read what `save_pretrained` wrote, in the dtype that was saved.

        Raises:
            ModelError: a file is missing or damaged.
        """
        try:
            info = json.loads((Path(folder) / VOCABULARY).read_text(encoding="utf-8"))
            tensors = load_file(Path(folder) / CAPTIONS)
            count = len(info["words"]) - info["own"]
            made = cls(info["words"][:count], tensors["table.weight"].shape[1], info["length"])
            made.words = info["words"]
            made.own.extend(nn.Parameter(tensors[f"own.{i}"]) for i in range(info["own"]))
            made.load_state_dict(tensors, assign=True)
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"{folder}: {VOCABULARY} and {CAPTIONS} cannot be used: {reason}") from None
        return made


class Diffusion(nn.Module):
    """A UNet, the noise that it was trained with, and the captions that it understands.

    Args:
        unet: A `UNet2DConditionModel`, or a PEFT model of one.
        scheduler: Its `DDPMScheduler`.
        captions: Words to vectors.
    """

    def __init__(self, unet: Any, scheduler: Any, captions: Captions) -> None:
        super().__init__()
        self.unet, self.scheduler, self.captions = unet, scheduler, captions

    @property
    def dtype(self) -> torch.dtype:
        """Of what the UNet computes."""
        return self.unet.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.unet.config["in_channels"], *[self.unet.config["sample_size"]] * 2

    def loss(self, images: Tensor, captions: Sequence[str], noise: Tensor, timesteps: Tensor) -> Tensor:
        """`denoising_loss` of images (n, channels, height, width) in -1 to 1, each with its caption."""
        states, mask = self.captions(captions)
        return denoising_loss(self.unet, self.scheduler, images, states, noise, timesteps, mask)

    @torch.no_grad()
    def sample(self, captions: Sequence[str], *, seed: int = 0, steps: int = 50, guidance: float = 1.0) -> Tensor:
        """(n, channels, height, width) images in -1 to 1, made by DDIM; equal seeds and captions give equal images.

        Args:
            steps: Of the sampler.
            guidance: Of the caption against none (classifier-free). 1 is off, and best for `tiny-unet`.

        Raises:
            ModelError: more steps than the noise has, or an unknown word.
        """
        if (total := self.scheduler.config["num_train_timesteps"]) < steps or steps < 1:
            raise ModelError(f"expected 1 to {total} sampling steps, found {steps}")
        sampler = diffusers_module().DDIMScheduler.from_config(self.scheduler.config, timestep_spacing="trailing")
        states, mask = self.captions([*captions, *([""] * len(captions) if guidance != 1 else [])])
        sampler.set_timesteps(steps, device=states.device)
        g = generator("diffusion", "sample", seed)
        images = torch.randn(len(captions), *self.shape, generator=g).to(states.device)
        for t in sampler.timesteps:
            given = torch.cat([images, images]) if guidance != 1 else images
            said = _ask(self.unet, given, t, states, mask)
            if guidance != 1:
                said = torch.lerp(*reversed(said.chunk(2)), guidance)
            images = sampler.step(said, t, images).prev_sample
        return images.clamp(-1, 1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `load` reads."""
        for one in (self.unet, self.scheduler, self.captions):
            one.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype | None = None) -> Diffusion:
        """What `save_pretrained` wrote, in evaluation mode, converted to `dtype` (None: that of the files).

        Raises:
            ModelError: diffusers is not installed, or the folder holds no such model.
        """
        source, diffusers, captions = str(folder), diffusers_module(), Captions.from_pretrained(folder)
        dtype = dtype or captions.table.weight.dtype
        try:
            unet = diffusers.UNet2DConditionModel.from_pretrained(source, torch_dtype=dtype, use_safetensors=True)
            scheduler = diffusers.DDPMScheduler.from_pretrained(source)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise ModelError(f"{source} cannot be loaded as a diffusion model: {str(error).splitlines()[0]}") from None
        captions.table.to(dtype)  # words of one's own stay float32
        return cls(unet, scheduler, captions).eval()


def load(name: str | Path, *, dtype: torch.dtype = torch.float32, int8: bool = False) -> Diffusion:
    """An embedded diffusion model, or the folder of one, in evaluation mode.

    Args:
        dtype: Of the weights, and of what is computed.
        int8: Hold the weights of the UNet's linear layers and convolutions in int8, and freeze the model.

    Raises:
        ModelError: there is no such model, diffusers is not installed, or the folder holds something else.
    """
    source = embedded.path(str(name)) if name in embedded.EMBEDDED else Path(name)
    if not source.is_dir():
        raise ModelError(f"there is no diffusion model {str(name)!r}.{did_you_mean(str(name), embedded.EMBEDDED)}")
    if not (source / SCHEDULER).is_file():
        raise ModelError(
            f"{name} has no {SCHEDULER}, so it is none that `Diffusion.save_pretrained` wrote; load others with "
            "tunesmith.models.load_model, and pipelines with diffusers.DiffusionPipeline"
        )
    diffusion = Diffusion.from_pretrained(source, dtype=dtype)
    if int8:
        freeze_in_int8(diffusion.requires_grad_(False).unet)
    return diffusion


class Int8Layer(nn.Module):
    """A frozen linear layer or 2-D convolution: int8 codes, a scale per output channel, inputs in floating point."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        weight, convolves = layer.weight.detach().float(), isinstance(layer, nn.Conv2d)
        scale = weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True).clamp_min(1e-12) / 127
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.to(layer.weight.dtype))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        names = ("stride", "padding", "dilation", "groups") if convolves else ()
        self.options = {name: getattr(layer, name) for name in names}
        self.run: Any = F.conv2d if convolves else F.linear

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.codes.to(x.dtype) * self.scale.to(x.dtype), self.bias, **self.options)


def freeze_in_int8(module: nn.Module) -> nn.Module:
    """Hold the weights of all linear layers and 2-D convolutions below `module` in int8, in place; all is frozen.

    A weight is in floating point only while its layer runs: about a quarter of float32's memory, and no less time.

    """
    for parent in [*module.modules()]:
        for name, child in [*parent.named_children()]:
            if type(child) in (nn.Linear, nn.Conv2d):
                setattr(parent, name, Int8Layer(child))
    return module.requires_grad_(False)


def denoising_loss(
    unet: Any, scheduler: Any, clean: Tensor, states: Tensor, noise: Tensor, timesteps: Tensor, mask: Any = None
) -> Tensor:
    """Mean squared error of what the UNet says about noised images, (): the same for the same noise and timesteps.

    Args:
        unet: Any `UNet2DConditionModel`.
        scheduler: The one it was trained with; its `prediction_type` says what the UNet is asked for.
        clean: (n, channels, height, width) images or latents.
        states: (n, tokens, cross_attention_dim) what the UNet attends to.
        noise: As `clean`, standard normal.
        timesteps: (n,) int64 in 0 to `num_train_timesteps` - 1.
        mask: (n, tokens) True where it may attend.

    Raises:
        ModelError: shapes or timesteps do not fit, or the prediction type is unknown.
    """
    total, kind = scheduler.config["num_train_timesteps"], scheduler.config["prediction_type"]
    if noise.shape != clean.shape or not len(timesteps) == len(states) == len(clean):
        shapes = [tuple(t.shape) for t in (clean, noise, timesteps, states)]
        raise ModelError(f"expected n images, noise of their shape, n timesteps and n captions, found {shapes}")
    if not bool(((timesteps >= 0) & (timesteps < total)).all()):
        raise ModelError(f"expected timesteps in 0 to {total - 1}, found {timesteps.tolist()}")
    wanted = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, timesteps)}
    if kind not in wanted:
        raise ModelError(f"the scheduler's prediction_type is {kind!r}, expected one of {', '.join(wanted)}")
    said = _ask(unet, scheduler.add_noise(clean, noise, timesteps), timesteps, states, mask)
    return F.mse_loss(said, wanted[kind].float())


def _ask(unet: Any, noisy: Tensor, timesteps: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
    said = unet(noisy.to(unet.dtype), timesteps, states.to(unet.dtype), encoder_attention_mask=mask)
    return said.sample.float()


def window_timesteps(n: int, *keys: Key, total: int = 1000, low: int = LOW, margin: int = MARGIN) -> Tensor:
    """(n,) timesteps, uniform over low..total - margin - 1: where a subject's form is decided (ZOODiP's sampling).

    Args:
        keys: What the numbers depend on, such as a seed and the step.

    Raises:
        ModelError: the window is empty or reaches out of the noise's range.
    """
    if not 0 <= low < total - margin <= total:
        raise ModelError(f"timesteps {low} to {total - margin - 1} of {total} are no window; set `low` and `margin`")
    return torch.randint(low, total - margin, (n,), generator=generator("timesteps", *keys))


def invert(
    diffusion: Diffusion,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    captions: Sequence[str],
    *,
    steps: int,
    batch: int = 1,
    seed: int = 0,
    start: int = 0,
    low: int = LOW,
    margin: int = MARGIN,
) -> list[float]:
    """Textual inversion: train what `optimizer` holds, such as the row of `add_word`, on a few images of a subject.

    A step draws its images, captions, noise and timesteps once, from (seed, step): a forward-only optimizer measures
    the same loss every time, and a run that goes on at `start` with its optimizer's state is the same run.

    Args:
        images: (n, channels, height, width) in -1 to 1. Those of a person need the consent of that person.
        captions: Ways to say it, such as `["<mine>", "a <mine>"]`; one is drawn for each image.
        steps: Of the optimizer.
        batch: Images in a step, drawn with replacement.
        seed: Of the run.
        start: Number of the first step.
        low, margin: Of `window_timesteps`.

    Returns:
        The losses before each step; the model is left in evaluation mode.

    Raises:
        ModelError: images of another shape, no captions, or an unknown word.
    """
    if images.shape[1:] != diffusion.shape or not len(images) or not captions:
        found = f"{tuple(images.shape)} and {len(captions)}"
        raise ModelError(f"expected images (n, *{diffusion.shape}) and one or more captions, found {found}")
    total = diffusion.scheduler.config["num_train_timesteps"]
    diffusion.eval()
    losses = []
    for step in range(start, start + steps):
        g = generator("invert", seed, step)
        chosen = torch.randint(len(images), (batch,), generator=g)
        said = [captions[i] for i in torch.randint(len(captions), (batch,), generator=g).tolist()]
        noise = torch.randn(batch, *diffusion.shape, generator=g).to(images)
        timesteps = window_timesteps(batch, seed, step, total=total, low=low, margin=margin).to(images.device)

        def closure(given: Any = (images[chosen], said, noise, timesteps)) -> Tensor:
            optimizer.zero_grad()
            loss = diffusion.loss(*given)
            if torch.is_grad_enabled():  # a forward-only optimizer measures without
                loss.backward()
            return loss

        losses.append(float(optimizer.step(closure).detach()))  # type: ignore[arg-type]
    return losses
