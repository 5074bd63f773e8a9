"""Folders and lists of pictures, pictures that cannot be opened, and batches of pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset as ArrowDataset
from datasets import Features, Image, Value
from PIL import Image as Pillow
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.inputs.conftest import prepare
from tests.zoo import tiny
from tunesmith.errors import DataError
from tunesmith.inputs import images, read_rows

Write = Callable[..., str]


@pytest.fixture(scope="module")
def processor() -> Any:
    return ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def draw(path: str, shade: int = 0, mode: str = "RGB", **options: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Pillow.new(mode, (12, 10), shade if mode == "L" else (shade,) * len(mode)).save(path, **options)


def folder(root: str, n: int = 4, start: int = 0) -> None:
    for label, shade in (("cat", 0), ("dog", 100)):
        for i in range(start, start + n):
            draw(f"{root}/{label}/{i}.png", shade + i)


def test_a_folder_of_classes(write: Write, vit: Any, processor: Any) -> None:
    folder("pets")
    write("pets/notes.txt", "")
    write("pets/.hidden/a.png", "")
    draw("pets/loose.png")
    found = prepare(vit, processor, train="pets", eval_fraction=0.25)
    assert (found.task, found.labels) == ("image-classification", ["cat", "dog"])
    assert (len(found.train), len(found.eval)) == (6, 2)
    assert found.report["notes"] == ["1 images lie beside the class folders of pets and were not read"]
    assert set(found.rows["train"]["where"]) <= {f"pets/{label}/{i}.png" for label in ("cat", "dog") for i in range(4)}
    batch = found.collator([found.train[i] for i in range(6)])
    assert batch["pixel_values"].shape == (6, 3, 8, 8)
    dark = batch["pixel_values"].mean((1, 2, 3)) < -0.8
    assert torch.equal(batch["labels"], (~dark).long())
    assert tiny("vit")(**batch).loss.isfinite()


def test_folders_of_splits(write: Write, vit: Any, processor: Any) -> None:
    write("other.txt", "")
    folder("pets/train")
    folder("pets/test", 2, start=20)
    found = prepare(vit, processor, train="pets")
    assert (len(found.train), len(found.eval)) == (8, 4)
    assert found.rows["eval"][0]["where"] == "pets/test/cat/20.png"
    assert next(where for where, _ in read_rows("pets", what="data.eval")) == "pets/test/cat/20.png"
    assert len(prepare(vit, processor, train="pets", max_eval_rows=3).eval) == 3


def test_a_list_of_paths_relative_to_its_file(write: Write, vit: Any, processor: Any) -> None:
    folder("data/pictures", 2)
    rows = [{"file": f"pictures/{label}/{i}.png", "label": label} for label in ("cat", "dog") for i in range(2)]
    write("data/list.jsonl", rows)
    found = prepare(vit, processor, train="data/list.jsonl", columns={"image": "file"}, eval_fraction=0.5)
    assert found.collator([found.train[0], found.train[1]])["pixel_values"].shape == (2, 3, 8, 8)


def test_pictures_inside_the_rows(write: Write, vit: Any, processor: Any) -> None:
    folder("pets", 2)
    paths = sorted(str(path) for path in Path("pets").rglob("*.png"))
    features = Features({"image": Image(), "label": Value("string")})
    rows = {"image": paths, "label": [Path(path).parent.name for path in paths]}
    ArrowDataset.from_dict(rows, features=features).save_to_disk("saved")
    ArrowDataset.from_dict(rows, features=features).to_parquet("r.parquet")
    for source in ("saved", "r.parquet"):
        found = prepare(vit, processor, train=source, eval_fraction=0.5)
        assert found.labels == ["cat", "dog"]
        assert found.collator([found.train[0]])["pixel_values"].shape == (1, 3, 8, 8)


def test_pictures_that_cannot_be_used(write: Write, vit: Any, processor: Any) -> None:
    folder("pets", 2)
    write("pets/cat/bad.png", b"\x89PNG no")
    whole = Path("pets/dog/0.png").read_bytes()
    write("pets/dog/half.png", whole[: len(whole) // 2])
    with pytest.raises(DataError) as caught:
        prepare(vit, processor, train="pets")
    assert str(caught.value).startswith("pets/cat/bad.png: field 'image': the image '")
    assert "pets/cat/bad.png' cannot be read: cannot identify image file" in str(caught.value)
    assert "1 more: pets/dog/half.png: " in str(caught.value)
    found = prepare(vit, processor, train="pets", skip_bad_rows=True)
    assert found.report["sources"]["train"]["bad_rows"]["kinds"] == {"image": 2}


@pytest.mark.parametrize(
    ("value", "kind", "reason"),
    [
        ("gone.png", "image", "there is no image 'gone.png'; paths are relative to the file"),
        ("", "empty", "expected the path of an image, found an empty text"),
        (3, "type", "expected the path of an image, found a number"),
        ({"size": 3}, "type", "expected the path of an image, found an object without `bytes` or `path`"),
    ],
)
def test_values_that_are_no_picture(write: Write, vit: Any, processor: Any, value: Any, kind: str, reason: str) -> None:
    draw("a.png"), draw("b.png", 9)
    write("r.jsonl", [{"image": "a.png", "label": 0}, {"image": value, "label": 1}, {"image": "b.png", "label": 1}])
    with pytest.raises(DataError, match=f"^r.jsonl:2: field 'image': {reason}"):
        prepare(vit, processor, train="r.jsonl")


def test_pictures_that_go_away_are_named(write: Write, vit: Any, processor: Any) -> None:
    folder("pets")
    found = prepare(vit, processor, train="pets")
    place = found.train[0]["image"]["path"]
    Path(place).unlink()
    with pytest.raises(DataError, match=f"{place} cannot be read: "):
        found.collator([found.train[0]])


def test_pictures_are_upright_and_in_the_models_colours(write: Write, processor: Any) -> None:
    write("other.txt", "")
    turned = Pillow.new("RGB", (12, 10))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save("turned.jpg", exif=exif)
    assert images.opened({"path": "turned.jpg", "bytes": None}, "RGB").size == (10, 12)
    draw("clear.png", 7, "RGBA")
    assert images.opened({"path": "clear.png", "bytes": None}, "RGB").mode == "RGB"
    assert np.asarray(images.opened({"path": "clear.png", "bytes": None}, "L")).ndim == 2


def test_models_with_one_channel(write: Write) -> None:
    folder("pets")
    config = tiny("vit", num_channels=1).config
    grey = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    found = prepare(config, grey, train="pets", task="image-classification")
    batch = found.collator([found.train[0], found.train[1]])
    assert batch["pixel_values"].shape == (2, 1, 8, 8)


def test_the_same_picture_in_both_splits_is_counted(write: Write, vit: Any, processor: Any) -> None:
    write("other.txt", "")
    folder("pets/train", 2)
    folder("pets/test", 2, start=1)
    assert prepare(vit, processor, train="pets").report["duplicates"] == {"within_train": 0, "eval_rows_in_train": 2}
