"""Diversify and conquer: draws, shares and weights by their formulas, and the faults of the released code."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.core.selection import Rows, Services, Tuned, prompt_of
from tunesmith.data.diversify_conquer import cluster_means, diversify_conquer, draw, reweighted, shares
from tunesmith.errors import DataError

SIZES = (60, 40, 20)


def rows(sizes: tuple[int, ...] = SIZES, **columns: list[Any]) -> Dataset:
    """Clusters far from one another, in the order of their sizes; `of` is the true cluster."""
    rng = np.random.default_rng(0)
    of = [k for k, size in enumerate(sizes) for _ in range(size)]
    E = 10 * np.eye(len(sizes))[of] + 0.1 * rng.standard_normal((len(of), len(sizes)))
    prompts = [f"cluster {k}, row {i}" for i, k in enumerate(of)]
    pairs = {"prompt": prompts, "completion": [f"gold {k}" for k in of]}
    return Dataset.from_dict({**pairs, "of": of, "vector": E.tolist(), **columns})


def cluster_of(text: str) -> int:
    return int(text.split()[1].rstrip(","))


def services(gap: list[float], seen: list[list[str]] | None = None) -> Services:
    """A model and a reward by which S of a row is `gap[its cluster]`, in losses and in rewards."""

    def fit(given: Rows) -> Tuned:
        if seen is not None:
            seen.append([row["prompt"] for row in given])
        return Tuned(
            generate=lambda asked: ["own"] * len(asked),
            loss=lambda asked: np.array([2.0 if r["completion"] == "own" else 2 + gap[r["of"]] for r in asked]),
        )

    def reward(prompts: Any, answers: Any) -> np.ndarray:
        gold = [gap[cluster_of(prompt)] for prompt in prompts]
        return np.array([5.0 if a == "own" else 5 + g for a, g in zip(answers, gold, strict=True)])

    return Services(fit=fit, reward=reward)


def run(dataset: Dataset, offered: Services | None = None, **options: Any) -> Dataset:
    given = {"budget": 30, "embedding": "vector", "clusters": 3, "rounds": 1, **options}
    return diversify_conquer(dataset, offered or Services(), **given)


def weights_by_round(chosen: Dataset, stage: int) -> dict[int, float]:
    return {r["of"]: r["selection_score"] for r in chosen if r["selection_round"] == stage}


# The parts of the method ------------------------------------------------------------------------------------------

weighted = st.integers(1, 12).flatmap(
    lambda k: st.tuples(
        st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1)), min_size=k, max_size=k),
        st.lists(st.integers(0, 30), min_size=k, max_size=k),
        st.floats(0, 1),
        st.integers(0, 2**32),
    )
)


@given(weighted)
@settings(deadline=None)
def test_shares_meet_the_total_and_no_cluster_gives_more_than_it_has(case: tuple) -> None:
    weights, room, part, seed = np.array(case[0]), np.array(case[1]), case[2], case[3]
    total = round(part * room.sum())
    given = shares(weights, room, total, np.random.default_rng(seed))
    assert given.sum() == total
    assert ((given >= 0) & (given <= room)).all()


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=20), st.integers(1, 500), st.integers(0, 2**32))
@settings(deadline=None)
def test_shares_are_the_quotas_rounded_up_or_down(weights: list[float], total: int, seed: int) -> None:
    w = np.array(weights) / sum(weights)
    given = shares(w, np.full(len(w), total), total, np.random.default_rng(seed))
    assert (np.abs(given - w * total) < 1 + 1e-6).all()


def test_shares_are_the_quotas_in_the_mean_also_below_one() -> None:
    w = np.array([0.5, 0.3, 0.15, 0.04, 0.01])
    draws = np.stack([shares(w, np.full(5, 9), 3, np.random.default_rng(seed)) for seed in range(4000)])
    assert np.abs(draws.mean(0) - 3 * w).max() < 0.03
    assert draws.min() == 0


def test_what_an_exhausted_cluster_cannot_give_the_others_do_by_weight() -> None:
    given = shares(np.array([0.5, 0.3, 0.2]), np.array([10, 900, 900]), 100, np.random.default_rng(0))
    assert given.tolist() == [10, 54, 36]
    assert shares(np.array([1.0, 0.0, 0.0]), np.array([1, 2, 3]), 6, np.random.default_rng(0)).tolist() == [1, 2, 3]


@given(st.integers(0, 2**32), st.lists(st.integers(0, 4), min_size=1, max_size=5))
@settings(deadline=None)
def test_draw_takes_the_sizes_it_is_told(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    of = rng.permutation(np.repeat(np.arange(len(sizes)), 4))
    taken = draw(of, rng.standard_normal(len(of)), np.array(sizes), rng)
    assert np.bincount(of[taken], minlength=len(sizes)).tolist() == sizes
    assert (np.diff(taken) > 0).all()


def test_draw_takes_a_row_in_proportion_to_exp_of_its_quality() -> None:
    q, times = np.array([0.0, 1.0, -0.5, 2.0]), 20_000
    p = np.exp(q) / np.exp(q).sum()
    of, one = np.repeat(np.arange(times), 4), np.ones(times, dtype=np.int64)
    taken = draw(of, np.tile(q, times), one, np.random.default_rng(0))
    frequency = np.bincount(taken % 4, minlength=4) / times
    assert (np.abs(frequency - p) <= 3 * np.sqrt(p * (1 - p) / times)).all()


def test_pairs_are_drawn_one_after_the_other() -> None:
    q, times = np.log([4.0, 2.0, 1.0]), 20_000
    taken = draw(np.repeat(np.arange(times), 3), np.tile(q, times), np.full(times, 2), np.random.default_rng(1)) % 3
    left_out = 3 - taken.reshape(times, 2).sum(1)
    expected = np.array([2 / 7 * 1 / 5 + 1 / 7 * 2 / 6, 4 / 7 * 1 / 3 + 1 / 7 * 4 / 6, 4 / 7 * 2 / 3 + 2 / 7 * 4 / 5])
    assert np.abs(np.bincount(left_out, minlength=3) / times - expected).max() < 0.012


def test_large_qualities_do_not_overflow_and_only_differences_count() -> None:
    of, sizes = np.zeros(6, dtype=int), np.array([2])
    q = np.arange(6.0)
    small, large = (draw(of, q + shift, sizes, np.random.default_rng(5)) for shift in (0.0, 5000.0))
    assert small.tolist() == large.tolist()


def test_weights_by_hand() -> None:
    means = np.array([0.0, np.log(2), np.log(5)])
    even = np.full(3, 1 / 3)
    assert np.allclose(reweighted(even, means, "softmax"), [1 / 8, 2 / 8, 5 / 8], atol=1e-12)
    before = np.array([0.5, 0.25, 0.25])
    assert np.allclose(reweighted(before, means, "product"), [0.5 / 2.25, 0.5 / 2.25, 1.25 / 2.25], atol=1e-12)
    assert np.allclose(reweighted(before, means, "softmax"), [1 / 8, 2 / 8, 5 / 8], atol=1e-12)


def test_equal_scores_leave_the_weights_alone() -> None:
    before = np.array([0.5, 0.3, 0.2])
    assert np.allclose(reweighted(before, np.full(3, -7.0), "product"), before, atol=1e-12)


def test_scores_may_be_negative_or_huge() -> None:
    after = reweighted(np.full(3, 1 / 3), np.array([-2e4, 1e4, 1e4]), "product")
    assert np.allclose(after, [0, 0.5, 0.5])
    again = reweighted(after, np.array([0.0, -1e4, -1e4]), "product")
    assert np.isfinite(again).all()
    assert again.sum() == pytest.approx(1)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.one_of(st.just(np.nan), st.floats(-50, 50))), min_size=1, max_size=9),
    st.sampled_from(["product", "softmax"]),
)
@settings(deadline=None)
def test_weights_stay_a_distribution_and_unseen_clusters_keep_theirs(pairs: list, update: str) -> None:
    raw, means = np.array([p[0] for p in pairs]) + 1e-3, np.array([p[1] for p in pairs])
    before = raw / raw.sum()
    after = reweighted(before, means, update)
    assert after.sum() == pytest.approx(1)
    assert (after >= 0).all()
    assert (after[np.isnan(means)] == before[np.isnan(means)]).all()


def test_means_of_clusters() -> None:
    means = cluster_means(np.array([1.0, 3.0, np.nan, 4.0]), np.array([0, 0, 2, 3]), 5)
    assert np.allclose(means, [2, np.nan, np.nan, 4, np.nan], equal_nan=True)


# The whole method -------------------------------------------------------------------------------------------------


def test_static_takes_as_many_of_every_cluster() -> None:
    chosen = run(rows())
    assert Counter(chosen["of"]) == {0: 10, 1: 10, 2: 10}
    assert len({(r["of"], r["selection_cluster"]) for r in chosen}) == 3
    assert set(chosen["selection_score"]) == {1 / 3}
    assert set(chosen["selection_round"]) == {0}


def test_by_size_it_takes_in_proportion() -> None:
    chosen = run(rows(), first="size")
    assert Counter(chosen["of"]) == {0: 15, 1: 10, 2: 5}
    assert weights_by_round(chosen, 0) == pytest.approx({0: 1 / 2, 1: 1 / 3, 2: 1 / 6})


def test_quality_decides_inside_a_cluster() -> None:
    quality = [50.0 * (i % 4 == 0) for i in range(sum(SIZES))]
    chosen = run(rows(quality=quality), quality="quality", budget=15)
    assert set(chosen["quality"]) == {50.0}
    assert Counter(chosen["of"]) == {0: 5, 1: 5, 2: 5}


@pytest.mark.parametrize("score", ["perplexity", "reward"])
def test_rounds_follow_the_scores(score: str) -> None:
    gap = [np.log(6), 0.0, np.log(2)]
    chosen = run(rows((60, 60, 60)), services(gap), rounds=3, score=score, budget=54)
    counts = Counter(zip(chosen["of"], chosen["selection_round"], strict=True))
    product = np.array([36, 1, 4]) / 41
    quotas = [(6, 12, 18 * product[0]), (6, 2, 18 * product[1]), (6, 4, 18 * product[2])]
    assert all(abs(counts[k, r] - quotas[k][r]) < 1 for k in range(3) for r in range(3))
    assert weights_by_round(chosen, 1) == pytest.approx({0: 6 / 9, 1: 1 / 9, 2: 2 / 9})
    for cluster, weight in weights_by_round(chosen, 2).items():
        assert weight == pytest.approx(product[cluster])


def test_softmax_forgets_the_round_before() -> None:
    gap = [np.log(6), 0.0, np.log(2)]
    chosen = run(rows((60, 60, 60)), services(gap), rounds=3, update="softmax", budget=54)
    for stage in (1, 2):
        assert weights_by_round(chosen, stage) == pytest.approx({0: 6 / 9, 1: 1 / 9, 2: 2 / 9})


def test_the_model_is_trained_on_all_rows_so_far_and_not_after_the_last_round() -> None:
    seen: list[list[str]] = []
    chosen = run(rows(), services([0.0, 0.0, 0.0], seen), rounds=4, budget=30)
    assert [len(s) for s in seen] == [8, 16, 23]
    for stage, trained in enumerate(seen, 1):
        assert trained == [r["prompt"] for r in chosen if r["selection_round"] < stage]


def test_never_more_rounds_than_rows() -> None:
    seen: list[list[str]] = []
    chosen = run(rows(), services([0.0] * 3, seen), rounds=9, budget=2)
    assert chosen["selection_round"] == [0, 1]
    assert len(seen) == 1


def test_rows_without_a_loss_do_not_count() -> None:
    def fit(given: Rows) -> Tuned:
        loss = {0: 1.0, 1: np.nan, 2: 1.0}
        return Tuned(lambda asked: ["own"] * len(asked), lambda asked: np.array([loss[r["of"]] for r in asked]))

    chosen = run(rows((60, 60, 60)), Services(fit=fit), rounds=2)
    assert weights_by_round(chosen, 1) == pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 1 / 3})


def test_conversations_are_scored_by_their_last_answer() -> None:
    talks = rows()
    chat = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": c}]
        for p, c in zip(talks["prompt"], talks["completion"], strict=True)
    ]
    talks = talks.remove_columns(["prompt", "completion"]).add_column("messages", chat)
    asked: list[str] = []

    def reward(prompts: list[str], answers: list[str]) -> np.ndarray:
        asked.extend(prompts)
        return np.array([float(answer.startswith("gold")) for answer in answers])

    fit = Services(fit=lambda given: Tuned(lambda r: ["own"] * len(r), lambda r: np.zeros(len(r))), reward=reward)
    chosen = run(talks, fit, rounds=2, score="reward")
    first = [prompt_of(r) for r in chosen if r["selection_round"] == 0]
    assert asked == [*first, *first]


def test_equal_rows_share_a_cluster() -> None:
    twins = rows().select([0, 1, 2] * 5)
    chosen = run(twins, clusters=12, budget=12)
    by_prompt = {(r["prompt"], r["selection_cluster"]) for r in chosen}
    assert len(by_prompt) == 3
    assert Counter(chosen["prompt"]) == dict.fromkeys(twins["prompt"][:3], 4)


def test_k_is_the_square_root_of_the_rows_unless_given() -> None:
    rng = np.random.default_rng(0)
    spread = rows().remove_columns("vector").add_column("vector", rng.standard_normal((120, 4)).tolist())
    assert len(set(run(spread, clusters=None, budget=120)["selection_cluster"])) == 11
    assert len(set(run(spread, clusters=120, budget=120)["selection_cluster"])) == 120


def test_small_clusters_below_a_quota_of_one_are_sometimes_taken() -> None:
    """Of fifty clusters of one row and one of fifty, ten rows by size are not all of the large one."""
    far = rows(tuple([50] + [1] * 50))
    taken = [run(far, clusters=51, first="size", budget=10, seed=seed, restarts=1) for seed in range(8)]
    large = [Counter(chosen["of"])[0] for chosen in taken]
    assert set(large) == {5}
    assert len({k for chosen in taken for k in chosen["of"]}) > 20


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"clusters": 121}, "121 clusters.*120 rows"),
        ({"embedding": "of"}, "'of': expected 120 vectors"),
        ({"embedding": None}, "needs the service `embed`.*`embedding`"),
        ({"quality": "prompt"}, "'prompt': expected one number"),
        ({"rounds": 2}, "needs the service `fit`.*rounds to 1"),
        ({"budget": 121}, "121 rows.*120"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        run(rows(), **options)


def test_a_reward_that_is_not_offered_is_named_before_anything_is_trained() -> None:
    seen: list[list[str]] = []
    offered = services([0.0] * 3, seen)
    with pytest.raises(DataError, match="needs the service `reward`"):
        run(rows(), Services(fit=offered.fit), rounds=2, score="reward")
    plain = rows().remove_columns(["prompt", "completion"]).add_column("text", ["abc"] * 120)
    with pytest.raises(DataError, match="no prompt"):
        run(plain, offered, rounds=2)
    assert seen == []


def test_infinite_scores_are_refused() -> None:
    with pytest.raises(DataError, match="finite"):
        run(rows(), services([np.inf, 0.0, 0.0]), rounds=2, score="reward")


# What the released code does --------------------------------------------------------------------------------------


def released_size(N: int, portion: float, K: int, R: int, stage: int) -> int:
    """Rows of a round in the released code: per cluster in the first, of all clusters together later."""
    return K * int(round(N * portion) / R / K) if stage == 0 else int(N * portion / K / R)


def test_rounds_have_their_whole_budget() -> None:
    """The released code divides the size of later rounds by K though they are drawn from all clusters together."""
    N, portion, K, R = 120, 0.5, 3, 3
    chosen = run(rows(), services([0.0] * 3), rounds=R, budget=portion)
    ours = Counter(chosen["selection_round"])
    assert [ours[stage] for stage in range(R)] == [20, 20, 20]
    assert [released_size(N, portion, K, R, stage) for stage in range(R)] == [18, 6, 6]


def test_a_budget_below_the_number_of_clusters_is_not_rounded_to_nothing() -> None:
    assert released_size(120, 8 / 120, 12, 1, 0) == 0
    assert len(run(rows(), clusters=12, budget=8)) == 8


def test_a_cluster_without_a_row_keeps_its_weight() -> None:
    """The released code's table of clusters is then shorter than K, and its draw fails."""
    sampled = np.array([0, 0, 2])
    table = [np.exp(0.1)] * len(np.unique(sampled))
    with pytest.raises(ValueError, match="same size"):
        np.random.RandomState(0).choice(3, size=5, p=np.array(table) / sum(table))
    means = cluster_means(np.full(3, 0.1), sampled, 3)
    assert reweighted(np.array([0.5, 0.3, 0.2]), means, "product") == pytest.approx([0.5, 0.3, 0.2])
    chosen = run(rows(), services([0.0, 1.0, 2.0]), rounds=2, budget=4)
    assert len(set(chosen.filter(lambda r: r["selection_round"] == 0)["of"])) == 2
    assert len(chosen) == 4


def test_an_exhausted_cluster_does_not_cost_the_budget() -> None:
    """The released code takes what there is: here 5 rows of 20 in the second round, where the cluster has no more."""
    gap, sizes = [-60.0, -60.0, 0.0], (60, 40, 15)
    chosen = run(rows(sizes), services(gap), rounds=2, score="reward", budget=30)
    counts = Counter(zip(chosen["selection_round"], chosen["of"], strict=True))
    room = sizes[2] - counts[0, 2]
    assert min(15, room) == 10, "what the released code would take in the second round"
    assert counts[1, 2] == 10
    assert sum(n for (stage, _), n in counts.items() if stage == 1) == 15
