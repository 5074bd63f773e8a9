"""Model soups: which models are averaged, with which weights, and what refuses to be averaged."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from tunesmith.core.merging import Judges, merged, reestimate_batch_norm
from tunesmith.core.statedict import Checkpoint
from tunesmith.errors import CheckpointError, RecipeError
from tunesmith.merging.model_soups import ModelSoups


def some(count: int, seed: int = 0) -> list[Checkpoint]:
    g = torch.Generator().manual_seed(seed)
    return [
        Checkpoint(
            {"blocks.0.weight": torch.randn(3, 4, generator=g), "head.bias": torch.randn(3, generator=g)}, f"m{i}"
        )
        for i in range(count)
    ]


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 9), seed=st.integers(0, 99), data=st.data())
def test_uniform_is_the_mean_in_any_order_bit_for_bit(count: int, seed: int, data: st.DataObject) -> None:
    models = some(count, seed)
    order = data.draw(st.permutations(range(count)))
    one, other = merged(ModelSoups(), models), merged(ModelSoups(), [models[i] for i in order])
    for name in one:
        assert torch.equal(one[name], other[name])
        mean = torch.stack([m[name] for m in models]).double().mean(0)
        assert torch.allclose(one[name].double(), mean, atol=1e-7)


def scripted(scores: Mapping[tuple[int, ...], float], models: list[Checkpoint]) -> tuple[Judges, list[tuple[int, ...]]]:
    """A score given by which models a candidate is the mean of, and the list of what was asked."""
    asked: list[tuple[int, ...]] = []

    def score(state: Mapping[str, Tensor]) -> float:
        for chosen in scores:
            mean = torch.stack([models[i]["head.bias"] for i in chosen]).mean(0)
            if torch.allclose(state["head.bias"], mean, atol=1e-6):
                asked.append(chosen)
                return scores[chosen]
        raise AssertionError("an unexpected candidate")

    return Judges(score=score), asked


def test_greedy_takes_what_raises_the_score_and_nothing_else() -> None:
    models = some(4)
    scores = {(0,): 1.0, (1,): 4.0, (2,): 3.0, (3,): 2.0, (1, 2): 4.0, (1, 3): 5.0, (0, 1, 3): 4.9}
    judges, asked = scripted(scores, models)
    soup = ModelSoups(kind="greedy")
    result = merged(soup, models, judges=judges)
    # (1, 2) scores as much as (1,) and is refused: strictly higher is asked for.
    assert asked == [(0,), (1,), (2,), (3,), (1, 2), (1, 3), (0, 1, 3)]
    assert soup.record()["kept"] == [1, 3]
    assert soup.record()["weights"] == [0.0, 0.5, 0.0, 0.5]
    assert soup.record()["score"] == 5.0
    assert torch.allclose(result["head.bias"], (models[1]["head.bias"] + models[3]["head.bias"]) / 2)


def test_greedy_with_equal_scores_starts_with_the_first() -> None:
    models = some(2)
    soup = ModelSoups(kind="greedy")
    merged(soup, models, judges=Judges(score=lambda s: 1.0))
    assert soup.record()["kept"] == [0]


def test_a_score_that_is_no_number_is_named() -> None:
    with pytest.raises(CheckpointError, match="score of m0 is no number"):
        merged(ModelSoups(kind="greedy"), some(2), judges=Judges(score=lambda s: math.nan))


def classifier() -> tuple[nn.Module, list[Checkpoint], Tensor, Tensor]:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    models = []
    for i in range(3):
        g = torch.Generator().manual_seed(i)
        models.append(Checkpoint({n: torch.randn(p.shape, generator=g).double() for n, p in net.named_parameters()}))
    return net, models, torch.randn(20, 6).double(), torch.randint(3, (20,))


@pytest.mark.parametrize("per", ["model", "layer", "tensor"])
def test_learned_weights_follow_the_gradient_through_the_whole_sum(per: str) -> None:
    """The gradient by inner products equals autograd's through the sum of all models, weights and temperature."""
    net, models, x, y = classifier()
    judges = Judges(loss=lambda s, scale: F.cross_entropy(scale * functional_call(net, dict(s), (x,)), y))
    soup = ModelSoups(kind="learned", per=per, steps=4, learning_rate=0.3)
    merged(soup, models, judges=judges)

    names = list(models[0])
    group = {"model": [0] * 4, "layer": [0, 0, 1, 1], "tensor": [0, 1, 2, 3]}[per]
    raw = torch.zeros(max(group) + 1, 3, dtype=torch.float64, requires_grad=True)
    log_scale = torch.zeros((), requires_grad=True)
    optimizer, losses = torch.optim.AdamW([raw, log_scale], lr=0.3, weight_decay=0.0), []
    for _ in range(4):
        weights = raw.softmax(1)
        state = {n: sum(weights[k, i] * models[i][n] for i in range(3)) for n, k in zip(names, group, strict=True)}
        loss = judges.loss(state, log_scale.exp())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    record = soup.record()
    assert record["losses"] == pytest.approx(losses, abs=1e-9)
    assert record["temperature"] == pytest.approx(math.exp(-log_scale.item()))
    expected = raw.softmax(1).tolist()
    assert torch.allclose(torch.tensor(record["weights"]), torch.tensor(expected[0] if per == "model" else expected))
    assert losses[-1] < losses[0]


def test_learned_weights_go_to_the_model_that_fits() -> None:
    net, models, x, _ = classifier()
    y = functional_call(net, dict(models[1]), (x,)).argmax(1)
    judges = Judges(loss=lambda s, scale: F.cross_entropy(scale * functional_call(net, dict(s), (x,)), y))
    soup = ModelSoups(kind="learned", steps=60, learning_rate=0.2)
    merged(soup, models, judges=judges)
    weights = soup.record()["weights"]
    assert max(weights) == weights[1] > 0.8
    assert sum(weights) == pytest.approx(1)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="finite scalar"):
        merged(ModelSoups(kind="learned"), some(2), judges=Judges(loss=lambda s, scale: scale * math.inf))


def test_per_belongs_to_the_learned_soup() -> None:
    with pytest.raises(RecipeError, match="`per` is 'layer'"):
        ModelSoups(kind="greedy", per="layer")


def batch_normed(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        for _ in range(seed + 1):
            net(torch.randn(16, 4) * (seed + 1))
    return net


class Keyword(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_batch_norm_statistics_are_refused_or_reestimated() -> None:
    nets = [batch_normed(seed) for seed in range(3)]
    models = [Checkpoint(net.state_dict(), f"net {i}") for i, net in enumerate(nets)]
    with pytest.raises(
        CheckpointError, match=r"'1.running_mean' differ between net 0 and net 1.*reestimate_batch_norm"
    ):
        merged(ModelSoups(), models)
    result = merged(ModelSoups(), models, batch_norm="re-estimate")
    assert torch.equal(result["1.running_mean"], models[0]["1.running_mean"])
    soup = copy.deepcopy(nets[0])
    soup.load_state_dict(dict(result))
    data = torch.randn(64, 4)
    soup[2].eval()
    reestimate_batch_norm(Keyword(soup), [{"x": part} for part in data.split(16)])
    hidden = soup[0](data)
    assert torch.allclose(soup[1].running_mean, hidden.mean(0), atol=1e-6)
    variances = torch.stack([part.var(0) for part in hidden.split(16)])
    assert torch.allclose(soup[1].running_var, variances.mean(0), atol=1e-5)
    assert not soup[2].training
    assert soup[0].training


def test_equal_batch_norm_statistics_are_no_obstacle() -> None:
    net = batch_normed(0)
    moved = {n: t + 1 if n.endswith("weight") else t for n, t in net.state_dict().items()}
    result = merged(ModelSoups(), [Checkpoint(net.state_dict()), Checkpoint(moved)])
    assert torch.equal(result["1.running_var"], net[1].running_var)
    assert torch.allclose(result["0.weight"], net[0].weight + 0.5)
