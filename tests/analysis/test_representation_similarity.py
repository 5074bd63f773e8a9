"""What is special to representation similarity."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.zoo import FAMILIES, tiny
from tunesmith.analysis.representation_similarity import representation_similarity, rsa_distance
from tunesmith.core.analysis import Subjects
from tunesmith.core.modelmap import depths
from tunesmith.core.report import Report
from tunesmith.core.statedict import Checkpoint
from tunesmith.errors import DataError


def changed(family: str, block: int, by: float = 0.5) -> nn.Module:
    """A copy whose block `block` (of each stack) has other weights."""
    model = tiny(family)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        place = depths(name for name, _ in model.named_parameters())
        for name, p in model.named_parameters():
            if (depth := place[name]) and depth.index == block and p.dim() == 2:
                p.add_(by * torch.randn(p.shape, generator=g))
    return model


def subjects(tuned: nn.Module, base: nn.Module, rows: Any = ()) -> Subjects:
    models = {"tuned": tuned, "base": base}
    checkpoints = (Checkpoint(m.state_dict()) for m in (tuned, base))
    return Subjects(*checkpoints, lambda which: (models[which], tokenize), rows)


def tokenize(text: str, truncation: bool, max_length: int) -> dict[str, list[int]]:
    return {"input_ids": [3 + ord(c) % 60 for c in text][:max_length]}


def reference(a: np.ndarray, b: np.ndarray) -> float:
    def triangle(x: np.ndarray) -> list[float]:
        norms = np.linalg.norm(x, axis=1)
        n = len(x)
        return [float(x[i] @ x[j] / norms[i] / norms[j]) for i in range(n) for j in range(i + 1, n)]

    return float(np.corrcoef(triangle(a), triangle(b))[0, 1])


@pytest.mark.parametrize("seed", range(4))
def test_the_measure_is_its_definition(seed: int) -> None:
    draw = np.random.default_rng(seed)
    a = draw.normal(size=(9, 5)) + 0.5
    b = a @ draw.normal(size=(5, 7)) + draw.normal(size=(9, 7))
    found = rsa_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert 1 - found == pytest.approx(reference(a, b), abs=1e-12)


def test_rotations_and_scales_do_not_count() -> None:
    x = torch.randn(12, 6, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    assert rsa_distance(x, x) == 0
    assert rsa_distance(x, 3 * x @ Q) < 1e-12
    assert rsa_distance(x, x * torch.rand(12, 1, dtype=torch.float64).add(0.1)) < 1e-12
    assert rsa_distance(x, x + 1) > 1e-3
    assert rsa_distance(x, x @ torch.diag(torch.arange(1.0, 7).double())) > 1e-3


def test_where_all_inputs_are_alike_nothing_is_said() -> None:
    assert rsa_distance(torch.ones(5, 3), torch.randn(5, 3)) is None
    assert rsa_distance(torch.zeros(5, 3), torch.randn(5, 3)) is None


def layers(report: Report) -> dict[tuple[str, str], float]:
    return {(row[0], row[1]): row[3] for row in report.tables[0].rows}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_shows_from_its_block_upwards(family: str) -> None:
    base, tuned = tiny(family), changed(family, block=1)
    report = representation_similarity(subjects(tuned, base), samples=8, length=6)
    found = layers(report)
    for (stack, layer), change in found.items():
        if stack.startswith("decoder.block"):
            continue  # it reads the encoder, which changed
        assert (change > 1e-6) == (layer == "1"), (stack, layer)
    assert len(found) == 3 * (2 if family == "t5" else 1)
    assert report.figure("largest change").value == max(found.values())
    assert "random tokens or pixels: no rows were given" in report.notes[0]
    assert json.dumps(report.to_json(), allow_nan=False)


def test_representations_are_those_of_a_plain_pass() -> None:
    base, tuned = tiny("llama"), changed("llama", block=0)
    rows = [{"input_ids": [3 + i, 4, 5 + i, 6 + 2 * i]} for i in range(6)]
    for pool in ("mean", "first", "last"):
        report = representation_similarity(subjects(tuned, base, rows), pool=pool)
        with torch.no_grad():
            states = [
                [m(torch.tensor([r["input_ids"]]), output_hidden_states=True).hidden_states[:2] for r in rows]
                for m in (base, tuned)
            ]

        def pooled(hidden: Tensor, pool: str = pool) -> Tensor:
            return hidden[0].mean(0) if pool == "mean" else hidden[0, 0 if pool == "first" else -1]

        for index, layer in enumerate(("embedding", "0")):
            a, b = (torch.stack([pooled(one[index]) for one in side]) for side in states)
            expected = rsa_distance(a, b)
            assert layers(report)["model.layers", layer] == pytest.approx(expected, abs=1e-12)
        assert "6 inputs of the given rows" in report.notes[0]


def test_rows_of_text_are_tokenised() -> None:
    base, tuned = tiny("llama"), changed("llama", block=0)
    texts = ["one", "two two", "three", "for four", "five"]
    by_text = representation_similarity(subjects(tuned, base, [{"text": t} for t in texts]))
    by_ids = representation_similarity(subjects(tuned, base, [tokenize(t, True, 64) for t in texts]))
    halves = [{"prompt": t[:2], "completion": t[2:]} for t in texts]
    assert layers(by_text) == layers(by_ids) == layers(representation_similarity(subjects(tuned, base, halves)))
    with pytest.raises(DataError, match="row 0 has messages; expected `text`, `prompt` or `input_ids`"):
        representation_similarity(subjects(tuned, base, [{"messages": []}] * 4))
    with pytest.raises(DataError, match="give 4 rows or more"):
        representation_similarity(subjects(tuned, base, [{"text": "a"}]))


def test_pictures_in_half_precision() -> None:
    base, tuned = tiny("vit").bfloat16(), changed("vit", block=0).bfloat16()
    g = torch.Generator().manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 8, 8, generator=g)} for _ in range(5)]
    report = representation_similarity(subjects(tuned, base, rows))
    assert layers(report)["vit.layers", "embedding"] == 0
    assert layers(report)["vit.layers", "0"] > 0


def test_weights_alone_are_looked_at_layer_by_layer() -> None:
    for family in ("llama", "gpt2"):
        base, tuned = (Checkpoint(m.state_dict()) for m in (tiny(family), changed(family, block=1)))
        report = representation_similarity(Subjects(tuned, base), samples=16)
        for (_, name), change in layers(report).items():
            assert (change > 1e-3) == (".1." in name), name
        assert "each linear layer alone" in report.notes[0]
    rotated = dict(tiny("gpt2").state_dict())
    name = "transformer.h.0.mlp.c_fc.weight"  # stored (in, out): rotating its outputs does not count
    rotated[name] = rotated[name] @ torch.linalg.qr(torch.randn(128, 128))[0]
    report = representation_similarity(Subjects(Checkpoint(rotated), Checkpoint(tiny("gpt2").state_dict())))
    assert layers(report)["", name.removesuffix(".weight")] < 1e-6


def test_models_are_left_as_they_were() -> None:
    base = tiny("llama").train()
    representation_similarity(subjects(changed("llama", 0), base), samples=4)
    assert base.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.model.layers)
