"""FedKSeed: K numbers make the weights, messages hold nothing else, and a federation goes on from its log."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, ViTImageProcessor

from tests.contracts.test_recipes import recipe  # noqa: F401
from tests.train.conftest import data_file, model_folder, rows, write_rows  # noqa: F401
from tests.zoo import batch, same, tiny
from tunesmith.core.directions import Directions
from tunesmith.core.meters import grad_bytes, saved_bytes
from tunesmith.core.packing import Flatten
from tunesmith.core.seeds import seed_of
from tunesmith.engine.pipeline import run_pipeline
from tunesmith.errors import CheckpointError, DataError, RecipeError, TunesmithError
from tunesmith.optimizers.mezo import MeZO
from tunesmith.recipe import Recipe
from tunesmith.systems import fedkseed_server
from tunesmith.systems.fedkseed import FedKSeed, check
from tunesmith.systems.fedkseed_client import (
    MODEL,
    Client,
    ClientFailedError,
    choices,
    load_rows,
    local_steps,
    save_rows,
)
from tunesmith.systems.fedkseed_server import Reply, added, chances, evaluated, note
from tunesmith.systems.fedkseed_space import SeedSpace, SeedSum, candidates, packed, unpacked
from tunesmith.systems.fedkseed_split import kinds, share_out
from tunesmith.train import run

Make = Callable[..., Recipe]
SEEDS, LR, EPS = candidates(0, 8), 1e-2, 1e-3


def loss_of(model: nn.Module, family: str = "llama") -> Callable[[int], Tensor]:
    return lambda step: model(**batch(family, seed=step % 5)).loss


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def drawn(model: nn.Module, seed: int) -> Tensor:
    """z(seed) over all weights, (d,), drawn as MeZO draws it."""
    zero = [nn.Parameter(torch.zeros_like(p, dtype=torch.float32)) for p in model.parameters()]
    Directions([{"params": zero}], noise="cpu").add_(seed, 1.0)
    return torch.cat([p.detach().double().flatten() for p in zero])


# Weights are a start and K numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit"])
def test_a_clients_weights_are_rebuilt_from_its_sums(family: str) -> None:
    model, again, lr = tiny(family), tiny(family), 1e-3
    start = weights(model)
    made = local_steps(SeedSpace(model, SEEDS, lr), loss_of(model, family), choices(8, 40, None, "test"), eps=EPS)
    assert SeedSpace(again, SEEDS, lr).go(made.found) == int((made.found != 0).sum())
    assert (weights(model) - start).abs().max() > 1e-3
    assert (weights(again) - weights(model)).abs().max() < 1e-5
    exact = start - lr * sum(h * drawn(model, s) for s, h in zip(SEEDS, made.found.tolist(), strict=True))
    assert ((weights(again) - exact).abs() <= 1e-6 * (1 + exact.abs())).all()


def test_half_precision_weights_are_summed_in_float32_and_rounded_once() -> None:
    model, again = tiny("llama").bfloat16(), tiny("llama").bfloat16()
    start = weights(model)
    made = local_steps(SeedSpace(model, SEEDS, LR), loss_of(model), choices(8, 40, None, "test"), eps=1e-2)
    SeedSpace(again, SEEDS, LR).go(made.found)
    exact = start - LR * sum(h * drawn(model, s) for s, h in zip(SEEDS, made.found.tolist(), strict=True))
    assert (exact - start).abs().max() > 1e-2
    assert ((weights(again) - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()  # half of the last place, and no more
    apart = (weights(model) - exact).abs().mean() / (exact - start).abs().mean()
    assert apart < 0.2, "the client's own way, rounded at every step, leads elsewhere"


def test_one_client_with_the_seeds_of_mezo_goes_its_way() -> None:
    model, other = tiny("llama"), tiny("llama")
    seeds = [seed_of(3, "mezo", step, 0) for step in range(12)]
    made = local_steps(SeedSpace(model, seeds, LR), loss_of(model), range(12), eps=EPS)
    optimizer, loss = MeZO(list(other.parameters()), lr=LR, eps=EPS, seed=3, noise="cpu"), loss_of(other)
    losses = [float(optimizer.step(lambda step=step: loss(step))) for step in range(12)]
    assert torch.equal(weights(model), weights(other))
    assert made.losses == pytest.approx(losses, rel=1e-6)


def test_a_federation_of_one_client_is_mezo(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """The whole pipeline; only the seeds and the order of the batches are told to MeZO."""
    asked = recipe(**{"train.learning_rate": 1e-3, "train.batch_size": 4})
    steps, k = 6, 5
    options = {"clients": 1, "share": 1.0, "rounds": 1, "steps": steps, "seeds": k, "transport": "here"}
    run_pipeline("fedkseed", asked, {**options, "eps": EPS}, run)
    folder, seed = Path(asked.output), asked.train.seed
    chosen = choices(k, steps, None, seed, "seeds", 0, 0)
    monkeypatch.setattr("tunesmith.optimizers.mezo.seed_of", lambda _s, _m, step, _n: candidates(seed, k)[chosen[step]])
    batches, count = load_rows(folder / "federation" / "rows-0.safetensors")
    assert count == len(Dataset.load_from_disk(str(folder / "rows" / "train")))
    order = choices(len(batches), steps, None, seed, "rows", 0, 0)
    model = AutoModelForCausalLM.from_pretrained(asked.model.name).eval()
    optimizer = MeZO(list(model.parameters()), lr=1e-3, eps=EPS, noise="cpu")
    start = weights(model)
    for i in order:
        optimizer.step(lambda i=i: model(**batches[i]).loss)
    tuned = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert (weights(tuned) - start).abs().max() > 1e-4
    assert (weights(tuned) - weights(model)).abs().max() < 1e-5


def test_the_order_of_the_seeds_does_not_matter() -> None:
    model, other = tiny("gpt2"), tiny("gpt2")
    g = torch.Generator().manual_seed(0)
    sums, order = torch.randn(8, generator=g), torch.randperm(8, generator=g)
    SeedSpace(model, SEEDS, LR).go(sums)
    SeedSpace(other, [SEEDS[i] for i in order.tolist()], LR).go(sums[order])
    assert (weights(model) - weights(other)).abs().max() < 1e-5
    other = tiny("gpt2")
    SeedSpace(other, [SEEDS[i] for i in order.tolist()], LR).go(sums)  # the same numbers under other seeds
    assert (weights(model) - weights(other)).abs().max() > 1e-2


def test_what_is_learnt_lies_in_the_span_of_the_k_vectors() -> None:
    model = tiny("llama")
    start = weights(model)
    local_steps(SeedSpace(model, SEEDS[:5], LR), loss_of(model), [i % 5 for i in range(20)], eps=EPS)
    moved = (weights(model) - start)[:, None]
    Z = torch.stack([drawn(model, s) for s in SEEDS[:5]], 1)

    def residual(Z: Tensor) -> float:
        return float((moved - Z @ torch.linalg.lstsq(Z, moved).solution).norm() / moved.norm())

    assert residual(Z) < 1e-5
    assert min(residual(Z[:, [i for i in range(5) if i != out]]) for out in range(5)) > 1e-2


def test_going_somewhere_else_is_from_the_start_and_the_same_place_costs_nothing() -> None:
    model = tiny("llama")
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = -0.0
    space, g = SeedSpace(model, SEEDS, LR), torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 8, generator=g)
    a[2] = 0
    assert space.go(a) == 7
    first = weights(model)
    assert space.go(b) == 8
    local_steps(space, loss_of(model), [0, 1], eps=EPS)
    assert space.go(a) == 7
    assert torch.equal(weights(model), first)
    local_steps(space, loss_of(model), [0, 1], eps=EPS)
    assert space.go(a) == 0
    assert torch.equal(weights(model), first)
    assert space.go(torch.zeros(8)) == 0
    assert space.directions.contents() == space.base, "not every bit of the start: -0.0 has become 0.0"


class Slope(nn.Module):
    """A loss of one's own for each step, and a weight that it depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))


def test_steps_without_a_slope_are_left_out_and_counted() -> None:
    model = Slope()
    space = SeedSpace(model, SEEDS, 0.5)
    factors = [1.0, torch.nan, 1e9, torch.inf, 2.0]

    def loss(step: int) -> Tensor:
        return model.w.sum() * factors[step]

    made = local_steps(space, loss, [0, 1, 2, 3, 0], eps=1e-2, clip=1.0)
    along = drawn(model, SEEDS[0]).sum().item()
    assert made.skipped == 3
    assert made.found.tolist() == pytest.approx([3 * along, *[0.0] * 7], rel=1e-3)
    assert weights(model).tolist() == pytest.approx((-0.5 * 3 * along * drawn(model, SEEDS[0])).tolist(), rel=1e-3)
    assert len(made.losses) == 2
    unclipped = local_steps(SeedSpace(Slope(), SEEDS, 0.5), lambda step: torch.tensor(torch.inf), [0, 1], eps=1e-2)
    assert (unclipped.skipped, unclipped.losses) == (2, [])
    assert not unclipped.found.any()
    model = Slope()
    assert local_steps(SeedSpace(model, SEEDS, 0.5), loss, [0, 0, 0], eps=1e-2).skipped == 1  # without clip


# A client -------------------------------------------------------------------------------------------------------------

PAD = [{"input_ids": [3 + i, 9, 7 + i, 5][: 3 + i % 2]} for i in range(4)]


def client_folder(place: Path, model: nn.Module, batches: Sequence[Mapping[str, Any]] | None = None) -> Path:
    model.save_pretrained(place / MODEL)  # type: ignore[operator]
    given = [batch("llama", seed=i) for i in range(3)] if batches is None else batches
    save_rows(given, 6, place / "rows-0.safetensors")
    return place


def asked_of(asked: Client, k: int, tensors: Mapping[str, Tensor] | None = None, **changes: Any) -> bytes:
    base = asked._space[1].base if asked._space else SeedSpace(asked.model, [0], 1.0).base
    about = {"client": 0, "round": 0, "master": 0, "base": base, "lr": LR, "eps": EPS, "steps": 4}
    about |= {"clip": None, "failures": 0.0}
    return packed({"sums": torch.zeros(k)} if tensors is None else tensors, {**about, **changes})


def test_a_client_answers_with_the_sums_of_its_steps_from_where_the_server_is(tmp_path: Path) -> None:
    client = Client(client_folder(tmp_path, tiny("llama")))
    sums = torch.tensor([0.3, 0.0, -2.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    p = torch.tensor([0.0, 0.5, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0])
    with saved_bytes(client.model) as saved, grad_bytes(client.model) as grads:
        tensors, told = unpacked(client.answer(asked_of(client, 8, {"sums": sums, "chances": p}, round=3)))
    assert (saved.bytes, grads.bytes) == (0, 0)
    assert all(q.grad is None for q in client.model.parameters())
    model = tiny("llama")
    space = SeedSpace(model, SEEDS, LR)
    space.go(sums)
    batches, _ = load_rows(tmp_path / "rows-0.safetensors")
    rows_of = choices(3, 4, None, 0, "rows", 3, 0)
    chosen = choices(8, 4, p, 0, "seeds", 3, 0)
    assert set(chosen) <= {1, 5}
    made = local_steps(space, lambda step: model(**batches[rows_of[step]]).loss, chosen, eps=EPS)
    assert torch.equal(tensors["found"], made.found)
    assert made.found.any()
    assert told == {
        "round": 3, "rows": 6, "loss": pytest.approx(float(np.mean(made.losses))), "skipped": 0, "drawn": 3,
    }  # fmt: skip
    # The same process, another federation: it goes back to the start first.
    again = unpacked(client.answer(asked_of(client, 8, round=0, lr=1e-3)))[0]["found"]
    (tmp_path / "new").mkdir()
    new = Client(client_folder(tmp_path / "new", tiny("llama")))
    assert torch.equal(again, unpacked(new.answer(asked_of(new, 8, round=0, lr=1e-3)))[0]["found"])


@pytest.mark.parametrize("pro", [False, True])
def test_a_message_is_k_numbers_whatever_the_model(pro: bool, tmp_path: Path) -> None:
    k, sizes = 4096, []
    for width in (32, 64):
        client = Client(client_folder(tmp_path / str(width), tiny("llama", hidden_size=width)))
        tensors = {"sums": torch.zeros(k).index_fill(0, torch.tensor([5]), 0.25)}
        if pro:
            tensors["chances"] = torch.full((k,), 1 / k)
        message = asked_of(client, k, tensors)
        answer = client.answer(message)
        for data, numbers in ((message, k + pro * k), (answer, k)):
            header = int.from_bytes(data[:8], "little")
            assert len(data) - 8 - header == 4 * numbers
        assert len(answer) < 18_000
        assert len(message) < 18_000 * (1 + pro)
        sizes.append((len(message), len(answer) // 32))  # the mean loss is told in a digit more or less
    assert sizes[0] == sizes[1]


def test_padded_and_flattened_batches_give_the_same(tmp_path: Path) -> None:
    rows_ = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in ([3, 9, 7, 5, 11], [8, 6, 4])]
    more = [5 - len(r["input_ids"]) for r in rows_]
    padded = {
        "input_ids": torch.tensor([r["input_ids"] + [0] * n for r, n in zip(rows_, more, strict=True)]),
        "attention_mask": torch.tensor([[1] * (5 - n) + [0] * n for n in more]),
        "labels": torch.tensor([r["labels"] + [-100] * n for r, n in zip(rows_, more, strict=True)]),
    }
    flat = Flatten()(rows_)
    assert any(not isinstance(v, Tensor) for v in flat.values())
    found = []
    for name, given_ in (("padded", padded), ("flat", flat)):
        client = Client(client_folder(tmp_path / name, tiny("llama", initializer_range=0.5), [given_]))
        read, count = load_rows(tmp_path / name / "rows-0.safetensors")
        assert count == 6
        assert read[0].keys() == given_.keys()
        assert all(type(read[0][k]) is type(v) for k, v in given_.items())
        found.append(unpacked(client.answer(asked_of(client, 8, eps=1e-2)))[0]["found"])
    assert found[0].abs().max() > 1e-2
    assert torch.allclose(found[0], found[1], rtol=2e-3), "rows that are laid end to end see each other"


def test_labels_that_are_the_inputs_themselves_are_kept(tmp_path: Path) -> None:
    ids = torch.arange(3, 11).view(2, 4)
    save_rows([{"input_ids": ids, "labels": ids}, {"input_ids": ids.T}], 2, tmp_path / "rows.safetensors")
    (one, two), _ = load_rows(tmp_path / "rows.safetensors")
    assert torch.equal(one["labels"], ids)
    assert torch.equal(two["input_ids"], ids.T)


def test_a_client_of_another_base_refuses(tmp_path: Path) -> None:
    client = Client(client_folder(tmp_path, tiny("llama")))
    message = asked_of(client, 8)
    other = tiny("llama")
    with torch.no_grad():
        list(other.parameters())[3].view(-1)[7] += 1e-6
    for name, model in (("moved", other), ("half", tiny("llama").bfloat16())):
        with pytest.raises(CheckpointError, match="must hold the same model"):
            Client(client_folder(tmp_path / name, model)).answer(message)
    with pytest.raises(CheckpointError, match="no rows of this client"):
        client.answer(asked_of(client, 8, client=1))
    with pytest.raises(ClientFailedError, match="client 0 fails in round 0"):
        client.answer(asked_of(client, 8, failures=1 - 1e-9))


def test_a_malformed_message_is_refused(tmp_path: Path) -> None:
    client = Client(client_folder(tmp_path, tiny("llama")))
    good = asked_of(client, 8)
    client.answer(good)
    listed = b"[1]"
    for wrong in (
        b"", b"hello", good[:-1], good[:40], b"\xff" * 60, save({"sums": torch.zeros(8)}),
        save({"sums": torch.zeros(8)}, {"format": "tunesmith.trace/1"}),
        save({"sums": torch.zeros(8)}, {"format": "tunesmith.fedkseed/1", "about": "[1]"}),
        len(listed).to_bytes(8, "little") + listed,
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="expected a tunesmith"):
            client.answer(wrong)
    with pytest.raises(CheckpointError, match=r"without \['sums'\]"):
        client.answer(asked_of(client, 8, {"sum": torch.zeros(8)}))
    about = {n: v for n, v in unpacked(good)[1].items() if n not in ("eps", "steps")}
    with pytest.raises(CheckpointError, match=r"without \['eps', 'steps'\]"):
        client.answer(packed({"sums": torch.zeros(8)}, about))


@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20),
    st.dictionaries(st.text(), st.one_of(st.none(), st.integers(), st.text(), st.floats(allow_nan=False))),
)
def test_what_is_packed_is_unpacked(numbers: list[float], about: dict[str, Any]) -> None:
    tensors, told = unpacked(packed({"sums": torch.tensor(numbers)}, about))
    assert torch.equal(tensors["sums"], torch.tensor(numbers))
    assert told == about


@given(st.binary(max_size=100))
def test_no_bytes_crash_the_reader(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        unpacked(data)


# What is learnt, as a file --------------------------------------------------------------------------------------------


def test_a_sum_makes_the_tuned_model_of_its_own_base_only(tmp_path: Path) -> None:
    model = tiny("llama")
    space = SeedSpace(model, SEEDS, LR)
    sums = torch.tensor([0.3, 0.0, -2.0, 1.0, 0.0, 0.5, 0.0, 7e-7])
    space.go(sums)
    path = SeedSum(sums, 0, LR, space.base).save(tmp_path / "sums.safetensors")
    assert path.stat().st_size < 400
    found = SeedSum.load(path)
    assert (found.master, found.lr, found.base) == (0, LR, space.base)
    other = tiny("llama")
    found.apply_(other)
    assert torch.equal(weights(other), weights(model))
    for wrong in (other, tiny("llama", 1), tiny("llama").bfloat16()):
        before = weights(wrong)
        with pytest.raises(CheckpointError, match="began with weights of the fingerprint"):
            found.apply_(wrong)
        assert torch.equal(weights(wrong), before)


def test_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        SeedSum.load(tmp_path / "missing.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckpointError, match="cannot be read"):
        SeedSum.load(tmp_path / "text")
    save_file({"sums": torch.zeros(3)}, tmp_path / "other", {"format": "tunesmith.trace/1"})
    with pytest.raises(CheckpointError, match=r"found 'tunesmith.trace/1'"):
        SeedSum.load(tmp_path / "other")


# Adding up and drawing ------------------------------------------------------------------------------------------------


def test_sums_are_weighted_means_over_those_who_answered() -> None:
    a, h = torch.tensor([1.0, -1.0]), {0: torch.tensor([4.0, 0.0]), 2: torch.tensor([0.0, 8.0])}
    assert added(a, h, {0: 1.0, 2: 3.0}).tolist() == [2.0, 5.0]
    assert added(a, h, {0: 1.0, 1: 100.0, 2: 1.0}).tolist() == [3.0, 3.0]
    assert added(a, {}, {}).tolist() == a.tolist()


def test_chances_are_a_softmax_of_mean_magnitudes() -> None:
    magnitudes, times = torch.zeros(4), torch.zeros(4)
    assert chances(magnitudes, times).tolist() == [0.25] * 4
    note(magnitudes, times, {0: torch.tensor([-2.0, 5000.0, 0.0, 4.0])})
    note(magnitudes, times, {3: torch.tensor([4.0, -600.0, 0.0, 0.0]), 5: torch.tensor([0.0, 200.0, 0.0, 0.0])})
    assert magnitudes.tolist() == [6.0, 1800.0, 0.0, 4.0]
    assert times.tolist() == [2, 3, 0, 1]
    mean = np.array([3.0, 600.0, (3 + 600 + 4) / 3, 4.0])
    scaled = np.exp((mean - 3) / 597)
    assert chances(magnitudes, times).tolist() == pytest.approx((scaled / scaled.sum()).tolist(), rel=1e-5)
    assert chances(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 2.0])).tolist() == [0.5, 0.5]


def test_choices_follow_their_chances() -> None:
    p = torch.tensor([0.7, 0.0, 0.2, 0.1])
    counts = np.bincount(choices(4, 20_000, p, "a"), minlength=4) / 20_000
    assert counts == pytest.approx(p.numpy(), abs=0.02)
    assert np.bincount(choices(4, 20_000, None, "a")) / 20_000 == pytest.approx([0.25] * 4, abs=0.02)
    assert choices(50, 20, None, "a", 1, 2) != choices(50, 20, None, "a", 1, 3)


def test_evaluation_is_per_label() -> None:
    model = tiny("llama", initializer_range=0.5)
    long, short = batch("llama", rows=2, length=9), batch("llama", rows=1, length=5, seed=1)
    short["labels"][:, :2] = -100
    nothing = {**short, "labels": torch.full_like(short["labels"], -100)}
    with torch.no_grad():
        lost = [
            F.cross_entropy(model(**b).logits[:, :-1].flatten(0, 1), b["labels"][:, 1:].flatten(), reduction="sum")
            for b in (long, short)
        ]
    assert evaluated(model, [long, short, nothing], "causal-lm") == {"loss": pytest.approx(float(sum(lost)) / 19)}
    bert, given_ = tiny("bert"), batch("bert", rows=5)
    with torch.no_grad():
        right = float((bert(**given_).logits.argmax(-1) == given_["labels"]).float().mean())
    assert evaluated(bert, [given_], "text-classification")["accuracy"] == pytest.approx(right)


# The split ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 12), st.floats(1e-4, 100), st.integers(0, 99))
def test_every_row_belongs_to_one_client_and_no_client_has_none(
    of: list[int], clients: int, alpha: float, seed: int
) -> None:
    if len(of) < clients:
        with pytest.raises(DataError, match="cannot be shared out"):
            share_out(of, clients, alpha, seed)
        return
    held = share_out(of, clients, alpha, seed)
    assert len(held) == clients
    assert all(held)
    assert sorted(row for own in held for row in own) == list(range(len(of)))
    assert held == share_out(of, clients, alpha, seed)


def test_a_small_alpha_is_more_uneven() -> None:
    of = [i % 4 for i in range(800)]

    def purity(alpha: float) -> float:
        """Mean share of a client's most frequent class, over rows and three splits."""
        splits = [share_out(of, 10, alpha, seed) for seed in range(3)]
        return float(np.mean([sum(max(np.bincount([of[i] for i in own])) for own in held) for held in splits])) / 800

    small, middle, large = (purity(alpha) for alpha in (0.02, 0.5, 100.0))
    assert large < 0.35 < middle < 0.7 < small, (small, middle, large)
    assert max(map(len, share_out(of, 10, 100.0, 0))) < 120


def test_kinds_are_classes_or_families_or_one() -> None:
    assert kinds(Dataset.from_dict({"label": [1, 0], "family": ["a", "b"]})) == [1, 0]
    assert kinds(Dataset.from_dict({"family": ["a", "b"]})) == ["a", "b"]
    assert kinds(Dataset.from_dict({"text": ["a", "b"]})) == [0, 0]
    assert sorted(row for own in share_out(["x", "y", 3], 2, 0.5, 0) for row in own) == [0, 1, 2]


# Rounds ---------------------------------------------------------------------------------------------------------------

Answers = Callable[[int, int], tuple[Sequence[float], int] | None]


class Played:
    """Clients whose answers a test makes up."""

    def __init__(self, answers: Answers) -> None:
        self.answers, self.messages = answers, {}

    def __call__(self, folder: Path) -> Played:
        return self

    def missing(self) -> list[str]:
        return []

    def run(self, work: Callable[..., None]) -> None:
        def exchange(turn: int, messages: Mapping[int, bytes]) -> dict[int, Reply]:
            found = {}
            for number, message in messages.items():
                self.messages[turn, number] = unpacked(message)
                made = self.answers(turn, number)
                if made is None:
                    found[number] = Reply(None, len(message), why="asleep")
                else:
                    told = {"round": turn, "rows": made[1], "loss": 1.0, "skipped": 0, "drawn": 0}
                    answer = packed({"found": torch.tensor(made[0])}, told)
                    found[number] = Reply(answer, len(message), len(answer))
            return found

        work(exchange)


def sums_after(folder: str, turn: int) -> list[float]:
    return load_file(Path(folder) / "rounds" / f"{turn - 1:05}" / "state.safetensors")["sums"].tolist()


@pytest.mark.parametrize("way", ["rows", "equal"])
def test_the_dropped_are_not_added_and_the_others_count_for_more(
    way: str,
    recipe: Make,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Client 0 has 1 row, client 1 has 3, client 2 has 4; client 2 sleeps in round 1, all in round 2."""
    size = {0: 1, 1: 3, 2: 4}

    def answers(turn: int, client: int) -> tuple[list[float], int] | None:
        if turn == 2 or (turn == 1 and client == 2):
            return None
        return [float(10**client), float(turn), 0.0], size[client]

    played = Played(answers)
    monkeypatch.setattr(fedkseed_server, "Here", played)
    asked = recipe()
    options = {"clients": 3, "share": 1.0, "rounds": 4, "seeds": 3, "steps": 7, "weights": way, "transport": "here"}
    report = run_pipeline("fedkseed", asked, {**options, "learning_rate": 1e-5, "clip": 2.0}, run)
    w = {c: n / 8 if way == "rows" else 1 / 3 for c, n in size.items()}
    first = w[0] + 10 * w[1] + 100 * w[2]
    second = first + (w[0] + 10 * w[1]) / (w[0] + w[1])
    found = [sums_after(asked.output, turn) for turn in (1, 2, 3, 4)]
    assert found[0] == pytest.approx([first, 0, 0])
    assert found[1] == pytest.approx([second, 1, 0])
    assert found[2] == found[1], "nobody answered, and the sums did not stay"
    assert found[3] == pytest.approx([second + first, 4, 0])
    assert SeedSum.load(Path(asked.output) / "log" / "sums.safetensors").sums.tolist() == found[3]
    tensors, about = played.messages[3, 1]
    assert tensors["sums"].tolist() == found[2]
    assert about == {
        "client": 1, "round": 3, "master": asked.train.seed, "lr": 1e-5, "eps": 5e-4, "steps": 7, "clip": 2.0,
        "failures": 0.0, "base": SeedSpace(tiny_of(asked), [0], 1.0).base,
    }  # fmt: skip
    assert report.figure("answers that did not come").value == 4
    assert report.figure("from a client").value < 1000
    assert report.figure("sending all weights instead").value == 2 * 8 * report.figure("from a client").of


def tiny_of(asked: Recipe) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(asked.model.name)


def test_pro_sends_its_chances(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    played = Played(lambda turn, client: ([1.0 + client, -3000.0, 0.0, 0.0], 5))
    monkeypatch.setattr(fedkseed_server, "Here", played)
    options = {"clients": 2, "share": 1.0, "rounds": 2, "seeds": 4, "pro": True, "transport": "here"}
    run_pipeline("fedkseed", recipe(), {**options, "learning_rate": 1e-9}, run)
    assert played.messages[0, 0][0]["chances"].tolist() == [0.25] * 4
    expected = chances(torch.tensor([3.0, 2000.0, 0.0, 0.0]), torch.tensor([2.0, 2.0, 0.0, 0.0]))
    assert played.messages[1, 1][0]["chances"].tolist() == expected.tolist()


def test_nobody_in_the_first_round_is_an_error_and_bad_answers_too(
    recipe: Make,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"clients": 2, "share": 1.0, "rounds": 1, "seeds": 3, "transport": "here"}
    for number, (answer, message) in enumerate(
        {
            None: "none of 2 clients answered in the first round: asleep",
            ((1.0, 2.0), 1): r"answered round 0 with \(2,\)",
            ((1.0, float("nan"), 2.0), 1): "1 of them not finite",
        }.items()
    ):
        monkeypatch.setattr(fedkseed_server, "Here", Played(lambda turn, client, answer=answer: answer))
        asked = recipe(f"run-{number}")
        with pytest.raises(TunesmithError, match=message):
            run_pipeline("fedkseed", asked, options, run)
        assert not [*Path(asked.output).glob("rounds/*"), *Path(asked.output).glob("model")]
    # A rehearsal of failures goes on.
    monkeypatch.undo()
    asked = recipe("rehearsal")
    report = run_pipeline("fedkseed", asked, {**options, "failures": 0.999999}, run)
    assert report.figure("answers that did not come").value == 2
    assert sums_after(asked.output, 1) == [0.0] * 3
    start, tuned = (load_file(f / "model.safetensors") for f in (Path(asked.model.name), Path(asked.output) / "model"))
    assert same(start, tuned)


def test_a_loss_that_is_no_number_ends_the_federation(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(fedkseed_server, "Here", Played(lambda turn, client: ([1e38, 1e38], 1)))
    options = {"clients": 2, "share": 1.0, "rounds": 1, "seeds": 2, "learning_rate": 1.0, "transport": "here"}
    with pytest.raises(TunesmithError, match="lower `learning_rate`"):
        run_pipeline("fedkseed", recipe(), options, run)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("where", ["asking", "writing"])
def test_a_server_that_was_killed_goes_on_with_the_same_bits(
    where: str,
    recipe: Make,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"clients": 4, "share": 0.5, "rounds": 3, "steps": 3, "seeds": 8, "pro": True, "transport": "here"}
    options |= {"learning_rate": 1e-3, "evaluate_every": 2, "evaluate_rows": 4}
    whole, stopped = recipe("whole"), recipe("stopped")
    one = run_pipeline("fedkseed", whole, options, run)
    if where == "asking":
        real = Client.answer

        def answer(self: Client, message: bytes) -> bytes:
            if unpacked(message)[1]["round"] == 1:
                raise StoppedError
            return real(self, message)

        monkeypatch.setattr(Client, "answer", answer)
    else:

        def write(path: Path, text: str) -> None:
            if '"round": 1' in text:
                raise StoppedError
            path.write_text(text)

        monkeypatch.setattr(fedkseed_server, "write_text", write)
    with pytest.raises(StoppedError):
        run_pipeline("fedkseed", stopped, options, run)
    assert [f.name for f in (Path(stopped.output) / "rounds").iterdir()] == ["00000"]
    monkeypatch.undo()
    two = run_pipeline("fedkseed", stopped, options, run, resume=True)
    rounds = [f"rounds/0000{n}/state.safetensors" for n in range(3)]
    for file in ("model/model.safetensors", "log/sums.safetensors", *rounds):
        assert same(load_file(Path(whole.output) / file), load_file(Path(stopped.output) / file)), file
    assert {n: f.value for n, f in one.figures.items() if "catch up" not in n} == {
        n: f.value for n, f in two.figures.items() if "catch up" not in n
    }
    # The log and the start are the tuned model, and the log of a round is the one of a shorter federation.
    model = AutoModelForCausalLM.from_pretrained(Path(whole.output) / "federation" / MODEL)
    before = weights(model)
    SeedSum.load(Path(whole.output) / "log" / "sums.safetensors").apply_(model)
    assert (weights(model) - before).abs().max() > 1e-5
    assert torch.equal(weights(model), weights(AutoModelForCausalLM.from_pretrained(Path(whole.output) / "model")))
    looked = [json.loads((Path(whole.output) / "rounds" / f"0000{n}" / "round.json").read_text()) for n in range(3)]
    assert ["loss" in made for made in looked] == [False, True, True]
    assert [len(made["asked"]) for made in looked] == [2, 2, 2]


# Refusals and tasks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train.weight_decay": 0.1}, r"train.weight_decay 0.1"),
        ({"train.gradient_accumulation": 2}, r"gradient_accumulation 2"),
        ({"train.precision": "fp16"}, "precision"),
        ({"train.fsdp": True}, "fsdp"),
        ({"train.torch_compile": True}, "torch_compile"),
        ({"method": "ssf"}, "leave out ssf"),
        ({"method": "galore"}, "leave out galore"),
        ({"schedule": "lisa"}, "leave out lisa"),
        ({"regularisers": ["density-finetuning"]}, "leave out density-finetuning"),
        ({"model.quantization": "nf4"}, "run it unquantised"),
        ({"model.adapter": "some/adapter"}, "merge model.adapter"),
        ({"method": "dept"}, "leave prompts out"),
        ({"optimizer": {"name": "mezo", "eps": 1e-2}}, r"leave optimizer.eps out"),
        ({"data.packing": True, "data.max_length": 64}, "leave data.packing out"),
    ],
)
def test_what_clients_cannot_do_is_refused(changes: dict[str, Any], match: str, recipe: Make) -> None:  # noqa: F811
    content = recipe(**changes).model_dump(mode="json")
    with pytest.raises(RecipeError, match=match):
        check(content, None)


def test_the_rate_is_the_options_or_the_recipes_or_the_papers(recipe: Make) -> None:  # noqa: F811
    content = recipe(method="mezo").model_dump(mode="json")
    assert check(content, None) == 1e-2
    assert check(content, 1e-5) == 1e-5
    content["train"]["learning_rate"] = None
    assert check(content, None) == 3e-7


def test_more_clients_than_rows_are_refused(recipe: Make) -> None:  # noqa: F811
    with pytest.raises(DataError, match="cannot be shared out among 500"):
        run_pipeline("fedkseed", recipe(), {**FedKSeed.brisk, "clients": 500}, run)


def pictures(folder: Path) -> Path:
    g = np.random.default_rng(0)
    images = [g.integers(0, 255, (8, 8, 3), dtype=np.uint8) for _ in range(24)]
    named = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    Dataset.from_dict({"image": images, "label": [i % 3 for i in range(24)]}, features=named).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("task", ["seq2seq", "text-classification", "image-classification"])
def test_other_tasks(task: str, recipe: Make, model_folder: Any, tmp_path: Path) -> None:  # noqa: F811
    if task == "image-classification":
        folder = tmp_path / "vit"
        tiny("vit").save_pretrained(folder)
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
        data = pictures(tmp_path / "pictures")
    else:
        folder = model_folder("t5" if task == "seq2seq" else "bert")
        content = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": str(i % 2)} for i in range(24)]
        data = write_rows(tmp_path / "rows.jsonl", rows(24) if task == "seq2seq" else content)  # type: ignore[arg-type]
    asked = recipe(**{"model": str(folder), "data.train": str(data)})
    report = run_pipeline("fedkseed", asked, {**FedKSeed.brisk, "failures": 0.0, "alpha": 0.01}, run)
    place = Path(asked.output)
    held = json.loads((place / "stages" / "split.json").read_text())
    labels = Dataset.load_from_disk(str(place / "rows" / "train"))["label"] if task != "seq2seq" else None
    if labels is not None:
        assert any(len({labels[i] for i in own}) == 1 for own in held), "no client of one class, and none is tested"
    for number, own in enumerate(held):
        batches, count = load_rows(place / "federation" / f"rows-{number}.safetensors")
        assert count == len(own)
        assert [len(b["labels"]) for b in batches] == [4] * (count // 4) + [count % 4] * (count % 4 > 0)
        if labels is not None:
            assert torch.cat([b["labels"] for b in batches]).tolist() == [labels[i] for i in own]
    assert ("accuracy" in report.figures) == (task != "seq2seq")
    start, tuned = (load_file(place / n / "model.safetensors") for n in ("federation/base", "model"))
    assert start.keys() == tuned.keys()
    assert not same(start, tuned)
    assert SeedSum.load(place / "log" / "sums.safetensors").sums.any()
    if task != "seq2seq":  # the mix of classes is shown
        assert [plot.title for plot in report.plots] == ["Loss", "Rows of the clients"]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_simulation_by_flower_is_what_happens_here(recipe: Make) -> None:  # noqa: F811
    found, handler = {}, signal.getsignal(signal.SIGTERM)
    for transport in ("here", "flower"):
        asked = recipe(transport)
        options = {"clients": 20, "share": 0.25, "rounds": 3, "steps": 4, "seeds": 16, "failures": 0.3, "workers": 2}
        options |= {"learning_rate": 1e-3, "evaluate_rows": 4, "transport": transport, "pro": True}
        report = run_pipeline("fedkseed", asked, options, run)
        place = Path(asked.output)
        figures = {n: report.figure(n).value for n in ("loss", "answers that did not come", "steps without an update")}
        found[transport] = (load_file(place / "model" / "model.safetensors"), sums_after(asked.output, 3), figures)
    assert same(found["here"][0], found["flower"][0])
    assert found["here"][1:] == found["flower"][1:]
    assert 0 < found["here"][2]["answers that did not come"] < 15
    assert signal.getsignal(signal.SIGTERM) == handler, "Ray's own would end a later run without a checkpoint"
