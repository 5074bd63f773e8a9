"""What is special to skill localization."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.zoo import FAMILIES, batch, checkpoint, same, tiny
from tunesmith.analysis.skill_localization import overlaps, skill_localization
from tunesmith.analysis.skill_mask import Mask, base_patch, chosen, localise
from tunesmith.analysis.skill_metrics import calibration_error, predictions
from tunesmith.core.analysis import Subjects
from tunesmith.core.report import Report
from tunesmith.core.seeds import generator
from tunesmith.core.sparse import SparseDelta
from tunesmith.core.statedict import Checkpoint, Computed, write
from tunesmith.errors import CheckpointError, DataError, ModelError, TunesmithError


def moved(model: nn.Module, by: float = 0.1, heads: bool = False) -> nn.Module:
    """A copy whose parameters without embedding and head (with the head, if asked) are others."""
    tuned = copy.deepcopy(model)
    names = set(chosen(Checkpoint(model.state_dict())))
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if name in names or (heads and "classifier" in name):
                p.copy_(p.mean().round() + by * torch.randn(p.shape, generator=generator(1, name)))
    return tuned


def both(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, ...]:
    base = tiny(family).to(dtype)
    tuned = moved(base, **options)
    return base, tuned, Checkpoint(checkpoint(base), "base"), Checkpoint(checkpoint(tuned), "tuned")


# What a graft may take, and the base patch ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_and_head_stay_out(family: str) -> None:
    model = tiny(family)
    names = chosen(Checkpoint(model.state_dict()))
    assert names == sorted(names)
    outer = ("embed", "lm_head", "classifier", "wte", "wpe", "shared", "cls_token", "relative_attention_bias")
    assert not [n for n in names if any(word in n for word in outer)]
    left = {n for n, _ in model.named_parameters()} - set(names)
    assert all(any(word in n for word in outer) for n in left)
    assert all(f".{i}." in " ".join(names) for i in range(2))


def test_norms_of_embedding_and_head_stay_out() -> None:
    import transformers as T

    config = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "max_position_embeddings": 8}
    for kind in (T.BertForMaskedLM(T.BertConfig(**config)), T.RobertaForMaskedLM(T.RobertaConfig(**config))):
        names = chosen(Checkpoint(kind.state_dict()))
        assert names
        assert all("encoder.layer.0" in name for name in names)
    electra = T.ElectraForPreTraining(T.ElectraConfig(**config, embedding_size=4))
    assert all("encoder.layer.0" in name for name in chosen(Checkpoint(electra.state_dict())))


def test_modules_are_chosen_by_their_endings() -> None:
    a = Checkpoint(tiny("llama").state_dict())
    assert chosen(a, ["mlp.up_proj"]) == [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    with pytest.raises(ModelError, match=r"ends in 'up_prj'. Did you mean 'up_proj'\?"):
        chosen(a, ["up_prj"])


def test_tied_tensors_count_once_and_computed_ones_each() -> None:
    w = torch.randn(4, 4)
    tied = Checkpoint({"layers.0.a.weight": w, "layers.0.b.weight": w, "layers.0.c.weight": torch.randn(4, 4)})
    assert chosen(tied) == ["layers.0.a.weight", "layers.0.c.weight"]
    computed = Computed(tied, lambda name: tied[name].clone() + 1, "computed")
    assert len(chosen(computed)) == 3


def test_the_patch_is_the_entries_that_moved_most() -> None:
    _, _, a, b = both()
    names = chosen(a)
    every = torch.cat([(b[n] - a[n]).abs().flatten() for n in names])
    graft = base_patch(a, b, share=0.03)
    count = int(0.03 * len(every))
    assert graft.count == count
    values = torch.cat([e.values.abs() for e in graft.values()]).sort().values
    assert torch.allclose(values, every.sort().values[-count:])
    assert base_patch(a, b, share=1e-9).count == 1
    assert base_patch(a, b, share=1).count == len(every)


def test_equal_sizes_do_not_stand_out() -> None:
    base = {"layers.0.up.weight": torch.zeros(4, 4)}
    tuned = torch.zeros(4, 4)
    tuned[0] = torch.tensor([3.0, -2.0, 2.0, 1.0])
    a = Checkpoint(base)
    b = Checkpoint({"layers.0.up.weight": tuned})
    assert base_patch(a, b, share=1 / 16)["layers.0.up.weight"].indices.tolist() == [0]
    # Two of size 2 are on the border: both stay out.
    assert base_patch(a, b, share=2 / 16)["layers.0.up.weight"].indices.tolist() == [0]
    assert base_patch(a, b, share=3 / 16)["layers.0.up.weight"].indices.tolist() == [0, 1, 2]
    assert base_patch(a, b, share=1.0)["layers.0.up.weight"].indices.tolist() == [0, 1, 2, 3]
    with pytest.raises(CheckpointError, match="all moved by 1, so that none stands out"):
        base_patch(a, Checkpoint({"layers.0.up.weight": torch.ones(4, 4)}), share=0.5)
    with pytest.raises(CheckpointError, match="do not differ outside of embedding and head"):
        base_patch(a, a)


def test_from_folders_as_from_memory(tmp_path: Path) -> None:
    _, _, a, b = both("gpt2")
    folders = [Checkpoint(write(tmp_path / name, c.items())) for name, c in (("a", a), ("b", b))]
    mine, theirs = base_patch(a, b, share=0.01), base_patch(*folders, share=0.01)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n].indices, theirs[n].indices) for n in mine)
    given = [batch("gpt2", rows=4)]
    found = [localise(*pair, tiny("gpt2"), given, share=0.01, epochs=2) for pair in ((a, b), folders)]
    assert found[0].about == found[1].about


def test_a_head_that_was_tuned_goes_whole_into_the_graft() -> None:
    base, tuned, a, b = both("bert", heads=True)
    graft = base_patch(a, b, share=0.999999)
    assert set(graft.whole) == {"classifier.weight", "classifier.bias"}
    with graft.applied(base), torch.no_grad():
        given = batch("bert")
        assert torch.allclose(base(**given).logits, tuned(**given).logits, atol=1e-5)
    assert not base_patch(a, b, head="base").whole
    _, _, c, _ = both("llama", heads=True)
    other = dict(c)
    other["model.embed_tokens.weight"] = other["lm_head.weight"] = c["lm_head.weight"] + 1
    other["model.layers.0.mlp.up_proj.weight"] = c["model.layers.0.mlp.up_proj.weight"] * 2
    assert not base_patch(c, Checkpoint(other), share=0.001).whole


# The mask -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_gamma_of_ones_is_the_tuned_model_and_of_zeros_the_base(family: str, dtype: torch.dtype) -> None:
    base, tuned, a, b = both(family, dtype)
    model = copy.deepcopy(base)
    mask = Mask(a, b, {}, chosen(a))
    for level, expected in ((1e3, tuned), (-1e3, base)):
        for score in mask.scores.values():
            score.fill_(level)
        mask.put(dict(model.named_parameters()))
        assert same(checkpoint(model), checkpoint(expected))


def test_gamma_starts_near_the_patch() -> None:
    _, _, a, b = both()
    patch = {n: e.indices.long() for n, e in base_patch(a, b, share=0.01).items()}
    mask = Mask(a, b, patch, chosen(a))
    name = next(iter(patch))
    gamma = mask.gamma(name).flatten()
    inside = torch.zeros(len(gamma), dtype=torch.bool)
    inside[patch[name]] = True
    soft = (mask.scores[name].flatten() - 10).sigmoid()
    assert torch.equal(gamma, torch.where(inside, 1 - soft, soft))
    assert float(gamma[inside].min()) > 1 - 2e-4
    assert float(gamma[~inside].max()) < 2e-4
    places = mask.places()
    assert all(torch.equal(places[n], patch[n]) for n in patch)
    assert all(float(s.min()) >= 0 and float(s.max()) < 1 for s in mask.scores.values())


def test_the_gradient_is_autograds() -> None:
    base, _, a, b = both(dtype=torch.float64)
    patch = {n: e.indices.long() for n, e in base_patch(a, b, share=0.1).items()}
    mask = Mask(a, b, patch, chosen(a), bias=1.0)
    leaves = {n: s.double().requires_grad_() for n, s in mask.scores.items()}
    grafted = {}
    for name, score in leaves.items():
        start = torch.zeros(score.numel(), dtype=torch.float64)
        start[patch.get(name, torch.empty(0, dtype=torch.long))] = 1
        gamma = start.view_as(score) + (1 - 2 * start.view_as(score)) * (score - 1).sigmoid()
        grafted[name] = a[name] + gamma * (b[name] - a[name])
    given = batch("llama")
    functional_call(base, grafted, (), given).loss.backward()
    held = dict(base.named_parameters())
    mask.put(held)
    base.zero_grad()
    base(**given).loss.backward()
    for name, leaf in leaves.items():
        error = (mask.gradient(name, held[name].grad) - leaf.grad).abs().max()
        assert float(error) <= 1e-6 * float(leaf.grad.abs().max())


class Line(nn.Module):
    """Two classes; of the two entries that tuning changed, the smaller change alone is right."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].up = nn.Linear(2, 2, bias=False)
        self.layers[0].up.weight.data = weight.clone()
        self.last_mode: list[bool] = []

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        from types import SimpleNamespace

        self.last_mode.append(self.training)
        logits = self.layers[0].up(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def line(lr: float, epochs: int, **options: Any) -> tuple[SparseDelta, Line]:
    pre, fine = torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    model = Line(pre).train()
    x, y = torch.eye(2), torch.tensor([1, 0])  # logits (0, 1) and, as of equal ones the first is the answer, (0, 0)
    name = "layers.0.up.weight"
    given = [{"x": x[i : i + 1], "labels": y[i : i + 1]} for i in range(2)]
    graft = localise(
        Checkpoint({name: pre}), Checkpoint({name: fine}), model, given, share=0.25, epochs=epochs, lr=lr, **options
    )
    return graft, model


def test_the_search_moves_entries_both_ways() -> None:
    start, _ = line(1e6, 0)
    assert start["layers.0.up.weight"].indices.tolist() == [3]
    graft, model = line(1e6, 30)
    assert graft["layers.0.up.weight"].indices.tolist() == [2]
    assert graft["layers.0.up.weight"].values.tolist() == [1]
    assert (graft.about["added"], graft.about["removed"], graft.about["base_patch"]) == (1, 1, 1)
    first = graft.about["history"][0]
    assert first[1] < 1 == max(one[1] for one in graft.about["history"])
    assert graft.about["epoch"] == next(one[0] for one in graft.about["history"] if one[1] == 1)
    assert not any(model.last_mode)
    assert model.training
    assert model.layers[0].up.weight.requires_grad
    assert model.layers[0].up.weight.grad is None
    assert not bool(model.layers[0].up.weight.any())


def test_gradients_of_an_epoch_are_averaged() -> None:
    """One epoch of two batches is one of their mean; with `accumulate`, of so many of them."""
    base, _, a, b = both("bert")
    one, two = batch("bert", rows=2, seed=1), batch("bert", rows=2, seed=2)
    joined = {key: torch.cat([one[key], two[key]]) for key in one}
    kept = {}
    for label, given, most in (("two", [one, two], 9), ("joined", [joined], 9), ("first", [one, two], 1)):
        from tunesmith.analysis import skill_mask

        mask = Mask(a, b, {}, chosen(a), bias=1.0)
        before = {n: s.clone() for n, s in mask.scores.items()}
        skill_mask._epoch(mask, base, dict(base.named_parameters()), given, 1e3, most, (0,))
        kept[label] = {n: mask.scores[n] - before[n] for n in before}
    assert all(torch.allclose(kept["two"][n], kept["joined"][n], atol=1e-5) for n in kept["two"])
    assert not all(torch.allclose(kept["two"][n], kept["first"][n], atol=1e-5) for n in kept["two"])


def test_the_models_own_tensors_may_be_the_base() -> None:
    base, _, a, b = both("bert")
    given = [batch("bert", rows=4)]
    first = localise(a, b, copy.deepcopy(base), given, share=0.05, epochs=3, lr=1e9)
    second = localise(Checkpoint(base.state_dict()), b, base, given, share=0.05, epochs=3, lr=1e9)
    assert first.about == second.about
    assert all(torch.equal(first[n].indices, second[n].indices) for n in first)
    assert same(checkpoint(base), dict(a))


def test_a_search_does_not_end_below_the_base_patch_and_says_when_it_breaks() -> None:
    base, _, a, b = both("bert")
    given = [batch("bert", rows=8, seed=i) for i in range(2)]
    graft = localise(a, b, base, given, share=0.1, epochs=3, lr=1e12, bias=10.0)
    history = graft.about["history"]
    assert [one[0] for one in history] == [0, 1, 2, 3]
    best = max(history, key=lambda one: one[1])
    assert graft.count == best[3]
    assert same(checkpoint(base), dict(a))
    with pytest.raises(TunesmithError, match="is not finite; lower lr"):
        localise(a, b, base, given, share=0.1, epochs=2, lr=1e300)
    assert same(checkpoint(base), dict(a))
    with pytest.raises(DataError, match="no batches"):
        localise(a, b, base, [])
    with pytest.raises(CheckpointError, match="LlamaForCausalLM lacks the parameter"):
        localise(a, b, tiny("llama"), given)


# Figures --------------------------------------------------------------------------------------------------------------


def test_calibration_error_is_its_definition() -> None:
    label, answer = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 1, 0, 0, 0])
    sure = torch.tensor([0.95, 0.91, 0.55, 0.6, 0.58])
    # Bins of a tenth: (0.9, 1]: accuracy 1, confidence 0.93; (0.5, 0.6]: accuracy 1/3, confidence 0.57666.
    expected = 2 / 5 * abs(1 - 0.93) + 3 / 5 * abs(1 / 3 - 1.73 / 3)
    assert calibration_error(label, answer, sure, 10) == pytest.approx(expected, abs=1e-6)
    assert calibration_error(label, answer, sure, 1) == pytest.approx(abs(3 / 5 - sure.mean().item()), abs=1e-6)
    assert calibration_error(label, label, torch.ones(5), 15) == 0


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_predictions_are_of_the_labelled_positions(family: str) -> None:
    model = tiny(family)
    given = batch(family, rows=3)
    if given["labels"].dim() > 1:
        given["labels"][:, 1:3] = -100
    with torch.no_grad():
        logits = model(**given).logits
    label, answer, sure = predictions(model, [given])
    if family == "llama":
        expected, logits = given["labels"][:, 1:], logits[:, :-1]
    else:
        expected = given["labels"]
    real = expected != -100
    assert torch.equal(label, expected[real])
    assert torch.equal(answer, logits.argmax(-1)[real])
    assert torch.allclose(sure, logits.softmax(-1).amax(-1)[real], atol=1e-6)


def look(family: str, rows: Any, processor: Any = None, dtype: torch.dtype = torch.float32, **options: Any) -> Report:
    base, tuned, a, b = both(family, dtype, by=0.3)
    models = {"base": base, "tuned": tuned}
    return skill_localization(Subjects(b, a, lambda which: (models[which], processor), rows), **options)


def rows_of(family: str, count: int = 12) -> list[dict[str, Any]]:
    given = batch(family, rows=count)
    return [{key: value[i] for key, value in given.items() if key != "attention_mask"} for i in range(count)]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("bert", torch.bfloat16), ("t5", torch.float32), ("vit", torch.float32)],
)
def test_all_of_the_change_is_the_tuned_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    file = tmp_path / "graft.safetensors"
    report = look(family, rows_of(family), dtype=dtype, share=1.0, epochs=0, save=str(file))
    models = {str(row[0]): row[1:] for row in report.tables[0].rows}
    assert models["tuned"] == pytest.approx(models["graft"], abs=1e-5)
    assert report.figure("agreement with tuned").value == 1
    assert report.figure("accuracy / tuned").value in (1, None)
    first = report.figure("entries in the graft")
    assert first.value == first.of if dtype == torch.float32 else first.value > 0.99 * first.of
    assert SparseDelta.load(file).count == first.value
    assert "3 more chose it, 3 others give figures" in report.notes[0]
    assert json.dumps(report.to_json(), allow_nan=False)


class Words:
    def __init__(self, first: int = 3) -> None:
        self.first = first

    def __call__(self, text: str, truncation: bool, max_length: int) -> dict[str, list[int]]:
        return {"input_ids": [self.first + ord(c) % 60 for c in text][:max_length]}

    def get_vocab(self) -> dict[str, int]:
        return {"a": self.first}


def test_rows_of_text() -> None:
    texts = ["one", "two two", "three", "for four", "five", "sixth", "seven", "ate"]
    labelled = [{"text": text, "label": i % 3} for i, text in enumerate(texts)]
    ids = [{**Words()(text, True, 99), "labels": i % 3} for i, text in enumerate(texts)]
    found = [look("bert", rows, Words(), epochs=1, share=0.1).to_json() for rows in (labelled, ids)]
    assert found[0] == found[1]
    pairs = [{"prompt": text[:2], "completion": text[2:]} for text in texts]
    ids = [
        {**Words()(text, True, 99), "labels": [-100, -100, *Words()(text[2:], True, 99)["input_ids"]]} for text in texts
    ]
    found = [look("llama", rows, Words(), epochs=1, share=0.1).to_json() for rows in (pairs, ids)]
    assert found[0] == found[1]
    with pytest.raises(DataError, match=r"row 0 has text; expected `text` with `label`, or `input_ids` with `labels`"):
        look("bert", [{"text": "a"}] * 8, Words())
    with pytest.raises(DataError, match="a number and not a class"):
        look("bert", [{"text": "a", "label": 0.5}] * 8, Words())
    with pytest.raises(DataError, match="leave none to learn from"):
        look("bert", labelled[:3], Words())


def test_another_tokeniser_is_refused() -> None:
    base, tuned, a, b = both("bert")
    found = {"base": (base, Words(3)), "tuned": (tuned, Words(4))}
    with pytest.raises(CheckpointError, match="tokenisers of base and tuned model differ"):
        skill_localization(Subjects(b, a, found.__getitem__, rows_of("bert")))


def test_grafts_of_several_tasks_are_compared(tmp_path: Path) -> None:
    _, _, a, b = both()
    small, large = (base_patch(a, b, share=share) for share in (0.01, 0.04))
    shown = overlaps({"small": small, "large": large})
    assert shown.matrix == [[1, pytest.approx(small.count / large.count)], [1, 1]]
    file = large.save(tmp_path / "large.safetensors")
    report = skill_localization(Subjects(b, a), share=0.01, others=[str(file)])
    assert report.tables[-1].rows == [[str(file), large.count, pytest.approx(small.count / large.count), 1]]
    assert "The base patch alone" in report.notes[0]
    assert report.figure("bytes of the graft").value == 8 * small.count
