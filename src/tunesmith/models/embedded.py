"""The small models that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from tunesmith.errors import ModelError, did_you_mean

WEIGHTS = Path(__file__).parent / "weights"

EMBEDDED: dict[str, str] = {
    "tiny-lm-m": "causal language model, 4.9 M parameters (Llama)",
    "tiny-lm-s": "causal language model, 1.0 M parameters (Llama)",
    "tiny-encoder": "masked language model, 1.1 M parameters (BERT)",
    "tiny-vit": "image classifier for 8 x 8 digits, 0.2 M parameters (ViT)",
    "tiny-unet": "diffusion model of captioned 8 x 8 digits, 1.3 M parameters (UNet)",
    "tokenizer": "the byte-level BPE tokenizer that the three language models share",
}
"""Name -> what it is."""


def path(name: str) -> Path:
    """The folder of an embedded model, which transformers' Auto classes load.

    Raises:
        ModelError: there is no embedded model of that name, or its files are missing from the installation.
    """
    if name not in EMBEDDED:
        raise ModelError(
            f"There is no embedded model {name!r}.{did_you_mean(name, EMBEDDED)} There are: {', '.join(EMBEDDED)}."
        )
    folder = WEIGHTS / name
    if not folder.is_dir():
        raise ModelError(
            f"The files of the embedded model {name!r} are missing: expected the folder {folder}. Reinstall the "
            f"package, or train it with `python -m tunesmith.models.pretrain {name}`."
        )
    return folder
