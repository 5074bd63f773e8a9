"""Checkpoints read lazily, compared strictly, written all or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.zoo import same, tiny
from tunesmith.core.statedict import Checkpoint, Computed, check_alike, load_into, widened, write
from tunesmith.errors import CheckpointError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]


def tensors() -> dict[str, Tensor]:
    made = {f"layers.{i}.{d}".replace("torch.", ""): (torch.randn(3, 4) * 9).to(d) for i, d in enumerate(DTYPES)}
    return {**made, "scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4)}


@settings(deadline=None, max_examples=15)
@given(shard=st.sampled_from([1, 100, 200, 10**9]))
def test_written_and_read_is_exact_whatever_the_shards(tmp_path_factory: pytest.TempPathFactory, shard: int) -> None:
    held = tensors()
    folder = write(tmp_path_factory.mktemp("w") / "model", held.items(), shard_bytes=shard)
    read = Checkpoint(folder)
    assert same(dict(read), held)
    assert len(read) == len(held)
    for name, tensor in held.items():
        assert read.describe(name) == (tuple(tensor.shape), tensor.dtype)
    assert ((folder / "model.safetensors.index.json").exists()) == (shard < 10**9)


def test_transformers_loads_shards_that_were_written(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "a")
    folder = write(tmp_path / "b", Checkpoint(tmp_path / "a").items(), like=tmp_path / "a", shard_bytes=5_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert same(AutoModelForCausalLM.from_pretrained(folder).state_dict(), model.state_dict())


def test_one_file_is_a_checkpoint(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "some.safetensors")
    read = Checkpoint(tmp_path / "some.safetensors")
    assert list(read) == ["a"]
    assert read.folder == tmp_path


def test_tied_tensors_are_each_written(tmp_path: Path) -> None:
    shared = torch.randn(4, 2)
    read = Checkpoint(write(tmp_path / "m", [("embed", shared), ("head", shared), ("part", shared[:2])]))
    assert torch.equal(read["embed"], read["head"])
    assert torch.equal(read["part"], shared[:2])


def test_a_broken_stream_leaves_nothing_and_the_old_folder_whole(tmp_path: Path) -> None:
    write(tmp_path / "model", [("a", torch.ones(2))])

    def broken():
        yield "a", torch.zeros(2)
        raise CheckpointError("no")

    for name in ("model", "other"):
        with pytest.raises(CheckpointError, match="no"):
            write(tmp_path / name, broken(), shard_bytes=1)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert torch.equal(Checkpoint(tmp_path / "model")["a"], torch.ones(2))


def test_other_files_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    like = tmp_path / "like"
    like.mkdir()
    for file in ("config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "old.pt"):
        (like / file).write_text("{}")
    folder = write(
        tmp_path / "m", [("a", torch.ones(1))], like=like, extra=lambda f: (f / "merge.json").touch() or None
    )
    assert {p.name for p in folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors", "merge.json"}
    assert Checkpoint(folder)["a"].item() == 1


def test_what_is_not_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"found: notes\.txt"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00\x00")
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint(tmp_path)


def test_shards_and_their_index_must_agree(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"a": torch.ones(4), "b": torch.ones(4)}.items(), shard_bytes=1)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["c"] = content["weight_map"]["a"]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="lacks the tensor 'c'"):
        Checkpoint(folder)
    (folder / content["weight_map"]["b"]).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.*missing"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"a": torch.ones(2)}, r"second lacks the tensor 'b'"),
        ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, r"second has the tensor 'c'"),
        ({"a": torch.ones(2), "b": torch.ones(1, 3)}, r"'b' has shape \(1, 3\) in second and \(3,\) in first"),
    ],
)
def test_checkpoints_that_differ_are_named(other: dict[str, Tensor], says: str) -> None:
    first = Checkpoint({"a": torch.ones(2), "b": torch.ones(3)}, "first")
    with pytest.raises(CheckpointError, match=says):
        check_alike(first, [first, Checkpoint(other, "second")])


def test_wide_is_what_to_calculate_with() -> None:
    held = Checkpoint(tensors())
    for name in held:
        dtype = held[name].dtype
        expected = widened(dtype) if dtype.is_floating_point else dtype
        assert held.wide(name).dtype == expected
        assert torch.equal(held.wide(name), held[name].to(expected))
    assert widened(torch.bfloat16) == widened(torch.float8_e4m3fn) == torch.float32
    assert widened(torch.float64) == torch.float64


def test_memory_is_read_without_its_graph() -> None:
    assert not Checkpoint({"a": nn.Parameter(torch.ones(2))})["a"].requires_grad


def test_computed_is_made_when_asked_for_and_rounded_last() -> None:
    like = Checkpoint({"a": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)})
    asked: list[str] = []

    def value(name: str) -> Tensor:
        asked.append(name)
        return like.wide(name) * 1.001 if name == "a" else like[name]

    made = Computed(like, value, "made")
    assert list(made) == ["a", "n"]
    assert made.describe("a") == ((2,), torch.bfloat16)
    assert asked == []
    assert made["a"].dtype == torch.bfloat16
    assert made.wide("a").tolist() == pytest.approx([1.001, 1.001])
    assert Computed(made, lambda n: made.wide(n) - 1, "twice").wide("a").tolist() == pytest.approx(
        [0.001] * 2, rel=1e-3
    )
    assert asked == ["a", "a", "a"]


def test_load_into_fills_a_model_and_its_tied_head(tmp_path: Path) -> None:
    source, target = tiny("gpt2", 1), tiny("gpt2", 2)
    source.save_pretrained(tmp_path)
    read = Checkpoint(tmp_path)
    assert "lm_head.weight" not in read
    load_into(target, read)
    assert same(target.state_dict(), source.state_dict())
    assert target.lm_head.weight is target.transformer.wte.weight


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("weight"), "lacks the tensor 'weight'"),
        (lambda s: s.update(more=torch.ones(1)), "'more', which the model lacks"),
        (lambda s: s.update(bias=torch.ones(1)), r"'bias' has shape \(1,\)"),
    ],
)
def test_load_into_is_strict(change, says: str) -> None:
    state = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    change(state)
    with pytest.raises(CheckpointError, match=says):
        load_into(nn.Linear(3, 2), Checkpoint(state))
