"""What is special to half-reset."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from tests.zoo import FAMILIES, tiny
from tunesmith.core.halves import chosen
from tunesmith.core.lora_folder import adapted, merge_adapters
from tunesmith.core.merging import merge, merged
from tunesmith.core.statedict import Checkpoint, write
from tunesmith.errors import CheckpointError, ModelError
from tunesmith.merging.half_reset import HalfReset


def pair(family: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Checkpoint, Checkpoint]:
    base = {n: t.to(dtype) for n, t in tiny(family).state_dict().items()}
    return Checkpoint(base), Checkpoint({n: t + 1 for n, t in base.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_tensor_is_one_of_the_two_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    base, tuned = pair(family, dtype)
    kept = chosen(base, seed=3)
    result = merged(HalfReset(seed=3), [tuned], base)
    assert 0 < len(kept) < len(base)
    for name in base:
        assert torch.equal(result[name], tuned[name] if name in kept else base[name]), name


def test_the_other_half_is_what_a_reset_of_the_reset_leaves() -> None:
    """Resetting twice with the same half changes nothing more; with another stage, the kept halves intersect."""
    base, tuned = pair()
    once = merged(HalfReset(), [tuned], base)
    twice = merged(HalfReset(), [once], base)
    assert all(torch.equal(once[n], twice[n]) for n in base)
    other = merged(HalfReset(stage=1), [once], base)
    changed = {n for n in base if not torch.equal(other[n], base[n])}
    assert changed == chosen(base) & chosen(base, stage=1)


def test_levels_and_what_stands_outside() -> None:
    base, tuned = pair()
    for level in ("category", "layer", "model"):
        result = merged(HalfReset(level=level, outside="freeze"), [tuned], base)
        changed = {n for n in base if not torch.equal(result[n], base[n])}
        assert changed == chosen(base, level=level, outside="freeze")
        assert not changed & {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_the_record_counts() -> None:
    base, tuned = pair()
    method = HalfReset()
    merged(method, [tuned], base)
    found, kept = method.record(), chosen(base)
    assert (found["tensors kept"], found["tensors reset"]) == (len(kept), len(base) - len(kept))
    numbers = {n: t.numel() for n, t in base.items()}
    assert found["share of the numbers kept"] == sum(numbers[n] for n in kept) / sum(numbers.values())


def test_shards_on_disk_give_the_same(tmp_path: Path) -> None:
    base, tuned = pair()
    for name, checkpoint in (("base", base), ("tuned", tuned)):
        write(tmp_path / name, reversed(list(checkpoint.items())), shard_bytes=5_000)
    (tmp_path / "base" / "config.json").write_text("{}")
    output = merge(HalfReset(), [Checkpoint(tmp_path / "tuned")], tmp_path / "out", Checkpoint(tmp_path / "base"))
    expected, found = merged(HalfReset(), [tuned], base), Checkpoint(output)
    assert all(torch.equal(found[n], expected[n]) for n in base)


def test_half_of_an_adapter(tmp_path: Path) -> None:
    """A LoRA folder becomes one whose product is zero where the half is reset."""
    model = tiny("llama")
    base = Checkpoint({n: t.clone() for n, t in model.state_dict().items()})
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    merge_adapters(HalfReset(), [tmp_path / "lora"], tmp_path / "half", base)
    whole, half = adapted(base, tmp_path / "lora"), adapted(base, tmp_path / "half")
    kept = chosen(base)
    for name in base:
        assert torch.allclose(half[name], whole[name] if name in kept else base[name], atol=1e-6), name


def test_a_checkpoint_without_blocks_and_two_models_are_refused() -> None:
    flat = Checkpoint({"fc1.weight": torch.ones(2, 2)})
    with pytest.raises(ModelError, match="no name has a numbered block"):
        merged(HalfReset(), [flat], flat)
    base, tuned = pair()
    with pytest.raises(CheckpointError, match="changes one model, 2 were given"):
        merged(HalfReset(), [tuned, tuned], base)
