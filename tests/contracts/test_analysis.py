"""The analysis contract, for every part of the room, and what the room shares."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from tests.zoo import FAMILIES, checkpoint, same, tiny
from tunesmith import catalog
from tunesmith.core.analysis import Subjects, matrices, transposed
from tunesmith.core.part import Part
from tunesmith.core.report import Report
from tunesmith.core.statedict import Checkpoint
from tunesmith.errors import CheckpointError, TunesmithError

PARTS = pytest.mark.parametrize("part", catalog.in_room("analysis"), ids=lambda p: p.slug)
ON = pytest.mark.parametrize("family", FAMILIES)


def weights(family: str = "llama", seed: int = 0, **changes: object) -> Checkpoint:
    return Checkpoint(checkpoint(tiny(family, seed=seed, **changes)), f"{family} {seed}")


def run(part: Part, subjects: Subjects, **options: object) -> Report:
    return part.target(subjects, **part.validate(options))


@ON
@PARTS
def test_a_report_is_data_and_the_subjects_are_left_alone(part: Part, family: str) -> None:
    subjects = Subjects(weights(family, 1), weights(family))
    before = [dict(subjects.tuned), dict(subjects.base)]
    state = torch.get_rng_state()
    report = run(part, subjects)
    assert torch.equal(torch.get_rng_state(), state)
    assert json.dumps(report.to_json(), allow_nan=False)
    assert report.figures
    assert report.tables
    for table in report.tables:
        assert table.rows
        assert all(len(row) == len(table.columns) for row in table.rows)
    for plot in report.plots:
        assert len(plot.matrix) == len(plot.row_labels)
        assert all(len(row) == len(plot.column_labels) for row in plot.matrix)
    assert same(before[0], dict(weights(family, 1)))
    assert same(before[1], dict(weights(family)))


@PARTS
def test_the_same_again_gives_the_same_report(part: Part) -> None:
    subjects = Subjects(weights(seed=1), weights())
    torch.manual_seed(1)
    first = run(part, subjects).to_json()
    torch.manual_seed(2)
    assert run(part, subjects).to_json() == first


@ON
@PARTS
def test_identical_models_show_nothing(part: Part, family: str) -> None:
    report = run(part, Subjects(weights(family), weights(family)))
    headline = next(iter(report.figures))
    assert report.figure(headline).value == 0, headline


@PARTS
def test_what_is_missing_is_said(part: Part) -> None:
    with pytest.raises(TunesmithError, match=f"{part.slug}.*base"):
        run(part, Subjects(weights()))


@PARTS
def test_another_architecture_is_named(part: Part) -> None:
    with pytest.raises(CheckpointError, match=r"gate_proj.weight' has shape \(40, 32\) in llama 0"):
        run(part, Subjects(weights(intermediate_size=40), Checkpoint(dict(weights()), "base")))
    with pytest.raises(CheckpointError, match="lacks the tensor"):
        run(part, Subjects(weights("opt"), weights()))


@PARTS
def test_values_that_are_not_finite_are_named(part: Part) -> None:
    broken = dict(weights(seed=1))
    broken["model.layers.1.mlp.up_proj.weight"][2, 3] = torch.inf
    with pytest.raises(
        CheckpointError, match=r"'model.layers.1.mlp.up_proj.weight' in bad has values that are not fin"
    ):
        run(part, Subjects(Checkpoint(broken, "bad"), weights()))


@ON
def test_matrices_are_the_linear_layers_but_the_head(family: str) -> None:
    model = tiny(family)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    expected = {f"{n}.weight" for n in linears} - {"lm_head.weight", "classifier.weight"}
    assert set(matrices(weights(family))) == expected


@ON
def test_transposed_is_what_conv1d_stores(family: str) -> None:
    expected = {f"{n}.weight" for n, m in tiny(family).named_modules() if isinstance(m, Conv1D)}
    assert transposed(weights(family)) == expected
    assert bool(expected) == (family == "gpt2")


def test_square_matrices_count_as_the_others_of_their_stack() -> None:
    def block(stack: str, out_first: bool) -> dict[str, Tensor]:
        wide = torch.zeros((8, 4) if out_first else (4, 8))
        return {
            f"{stack}.0.up.weight": wide,
            f"{stack}.0.up.bias": torch.zeros(8),
            f"{stack}.0.o_proj.weight": torch.zeros(4, 4),
            f"{stack}.0.o_proj.bias": torch.zeros(4),
        }

    mixed = Checkpoint({**block("encoder.layer", True), **block("decoder.h", False)})
    assert transposed(mixed) == {"decoder.h.0.up.weight", "decoder.h.0.o_proj.weight"}
    silent = Checkpoint({"layers.0.o_proj.weight": torch.zeros(4, 4), "layers.0.o_proj.bias": torch.zeros(4)})
    assert transposed(silent) == frozenset()
