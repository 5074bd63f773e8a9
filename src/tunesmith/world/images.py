"""Small real images that come with scikit-learn: 8 x 8 handwritten digits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tunesmith.errors import DataError
from tunesmith.world.base import Split

if TYPE_CHECKING:
    from datasets import Dataset

LABELS = tuple("0123456789")


def digits(split: Split = "train") -> tuple[np.ndarray, np.ndarray]:
    """(n, 8, 8) uint8 images, 0 black to 255 white, and (n,) int64 labels: 1437 for training, 360 held out.

    The split is fixed and holds each digit in equal shares.

    Raises:
        DataError: an unknown split.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if split not in ("train", "heldout"):
        raise DataError(f"digits: the split must be 'train' or 'heldout', found {split!r}.")
    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    train, heldout, train_labels, heldout_labels = train_test_split(
        images, data.target.astype(np.int64), test_size=360, random_state=0, stratify=data.target
    )
    return (train, train_labels) if split == "train" else (heldout, heldout_labels)


def image_dataset(n: int | None = None, *, split: Split = "train", seed: int = 0) -> Dataset:
    """`n` (None: all) rows (`image` PIL, `label` ClassLabel) of the digits, in an order that `seed` decides.

    Raises:
        DataError: there are fewer than `n`.
    """
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PILImage

    images, labels = digits(split)
    if n is not None and not 0 <= n <= len(images):
        raise DataError(f"digits: {n} {split} images were asked for, but there are {len(images)}.")
    order = np.random.default_rng(seed).permutation(len(images))[:n]
    rows = {"image": [PILImage.fromarray(images[i]) for i in order], "label": labels[order].tolist()}
    return Dataset.from_dict(rows, features=Features({"image": Image(), "label": ClassLabel(names=list(LABELS))}))
