"""Diversify and conquer: cluster the rows, take from every cluster, and ask the training model where to take more.

Yu, Chen, Ahmadian and Fadaee, "Diversify and Conquer: Diversity-Centric Data Selection with Iterative Refinement",
2024.

k-means on one vector per row gives clusters D_1 .. D_K. A budget of b rows is spent in R rounds of b / R. Each takes
b_j rows of cluster j, b_j in proportion to w_j, inside a cluster with probability p(x) in proportion to exp(q(x)), or
uniform without a quality q (kMQ, eq. 3; k-means-random). R = 1 is the static method. Before each later round the base
model is trained on all rows taken so far and answers their prompts x, and (eqs. 4 to 7)

    S(x, gen, gold) = r(x, gold) - r(x, gen)                        r a reward
                    = log PPL(gold | x) - log PPL(gen | x)          or perplexity
    s_j = mean of S over the rows taken from D_j
    w_j <- w_j softmax(s)_j / sum_c w_c softmax(s)_c

Where we differ. The paper divides s_j by the sum of all s (eq. 6) and multiplies by the weight of the round before; s
may be negative under both scores, so that these are no probabilities. The released code normalises by a softmax and
forgets the round before. Here it is the softmax, and the product; `update="softmax"` forgets. A cluster of which no row
has been taken keeps its weight, where the released code stops (its table of groups is then shorter than K). b_j is the
whole number above or below w_j b / R, drawn so that its mean is w_j b / R, where the released code rounds down, divides
the size of later rounds by K once more, and lets what an exhausted cluster cannot give be lost; here others give it, by
weight, and the budget is met. Rows are drawn without replacement; the paper says with. The perplexities are of the
answer alone: the released code's are of the prompt too, averaged over the batch, and of the gold answer only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from datasets import Dataset
from pydantic import PositiveInt

from tunesmith.core.part import part
from tunesmith.core.seeds import seed_of
from tunesmith.core.selection import (
    Budget,
    Services,
    answer_of,
    budget_rows,
    numbers,
    prompt_of,
    take,
    vectors,
    with_answer,
)
from tunesmith.errors import DataError

WHO = "diversify-conquer"
Judge = Callable[[Dataset], np.ndarray]


@part(paper="arXiv:2409.11378")
def diversify_conquer(
    dataset: Dataset,
    services: Services,
    *,
    budget: Budget = 0.1,
    clusters: PositiveInt | None = None,
    rounds: PositiveInt = 3,
    score: Literal["perplexity", "reward"] = "perplexity",
    first: Literal["equal", "size"] = "equal",
    update: Literal["product", "softmax"] = "product",
    quality: str | None = None,
    embedding: str | None = None,
    iterations: PositiveInt = 300,
    restarts: PositiveInt = 5,
    seed: int = 0,
) -> Dataset:
    """Rows from every cluster, more of them where training says so.

    The result is in the order of the rounds; `selection_score` is the weight that the row's cluster had in its round.

    Args:
        dataset: The rows.
        services: `embed` unless `embedding` is given; `fit` if `rounds` is above 1; `reward` for that score.
        budget: How many rows to keep, or which share of them.
        clusters: K; None takes the square root of the number of rows (443 for the paper's 196,000, where it has 512).
            Equal vectors are never parted, so that there are at most as many clusters as different ones.
        rounds: R; 1 trains nothing. Never more than rows in the budget.
        score: What an answer is judged by. Perplexity favours clusters whose answers the model finds unlikely, be
            they hard or wrong; only a reward tells these apart.
        first: The weights of the first round: the same for every cluster (Algorithm 1), or by size (section 2.1).
        update: Whether the weights of the round before stay a factor ("product", eq. 6) or not ("softmax").
        quality: Column of q; None draws uniformly inside a cluster.
        embedding: Column of vectors to cluster by; None asks the model for them.
        iterations: Of k-means, at most.
        restarts: Of k-means; the best of so many is kept.
        seed: Of k-means and of all draws.

    Raises:
        DataError: a budget or a number of clusters above the number of rows, a column that is missing or not
            numeric, a service that is not offered, rows without prompts, or scores that are infinite.
    """
    total = budget_rows(budget, len(dataset), WHO)
    rounds = min(rounds, total)
    judge = _judge(score, services, dataset) if rounds > 1 else None
    q = np.zeros(len(dataset)) if quality is None else numbers(dataset, quality, WHO)
    of = _clustered(vectors(dataset, services, embedding, WHO), clusters, iterations, restarts, seed)
    K = int(of.max()) + 1
    weights = np.full(K, 1 / K) if first == "equal" else np.bincount(of) / len(of)
    chosen = np.empty(0, dtype=np.int64)
    scores: list[float] = []
    stages: list[int] = []
    for number, count in enumerate(_even(total, rounds)):
        rng = np.random.default_rng(seed_of(seed, WHO, number))
        if judge is not None and number:
            found = _finite(judge(dataset.select(chosen)), len(chosen))
            weights = reweighted(weights, cluster_means(found, of[chosen], K), update)
        unused = np.setdiff1d(np.arange(len(of)), chosen)
        sizes = shares(weights, np.bincount(of[unused], minlength=K), count, rng)
        new = unused[draw(of[unused], q[unused], sizes, rng)]
        chosen = np.concatenate([chosen, new])
        scores += weights[of[new]].tolist()
        stages += [number] * count
    return take(dataset, chosen.tolist(), scores, stages, of[chosen].tolist())


def _judge(score: str, services: Services, dataset: Dataset) -> Judge:
    """`(rows taken so far) -> (n,)`, S of eqs. 4 and 7."""
    fit = services.need("fit", WHO, "Set rounds to 1 for the static method, which trains nothing.")
    prompt_of(dataset[0])  # rows that ask nothing are refused before anything is trained
    if score == "reward":
        reward = services.need("reward", WHO, "Set score to perplexity, or rounds to 1.")

    def perplexity(rows: Dataset) -> np.ndarray:
        tuned = fit(rows)
        own = [with_answer(row, text) for row, text in zip(rows, tuned.generate(rows), strict=True)]
        return tuned.loss(rows) - tuned.loss(own)

    def rewarded(rows: Dataset) -> np.ndarray:
        prompts = [prompt_of(row) for row in rows]
        gold = reward(prompts, [answer_of(row) for row in rows])
        return np.asarray(gold) - np.asarray(reward(prompts, fit(rows).generate(rows)))

    return rewarded if score == "reward" else perplexity


def _finite(found: np.ndarray, rows: int) -> np.ndarray:
    found = np.asarray(found, dtype=np.float64)
    if found.shape != (rows,) or np.isinf(found).any():
        raise DataError(f"{WHO}: expected {rows} scores that are finite or missing, found {found}")
    return found


def _clustered(E: np.ndarray, clusters: int | None, iterations: int, restarts: int, seed: int) -> np.ndarray:
    """The cluster of each row, (N,), numbered without gaps; equal rows are never parted."""
    from sklearn.cluster import KMeans

    rows = len(E)
    if clusters is not None and clusters > rows:
        raise DataError(f"{WHO}: {clusters} clusters were asked for; the data set has {rows} rows. Set clusters lower.")
    distinct, back = np.unique(E, axis=0, return_inverse=True)
    K = min(clusters or round(rows**0.5), len(distinct))
    weight = np.bincount(back)
    state = seed_of(seed, WHO, "k-means") % 2**32
    found = KMeans(K, n_init=restarts, max_iter=iterations, random_state=state).fit(distinct, sample_weight=weight)
    return np.unique(found.labels_, return_inverse=True)[1][back]


def _even(total: int, rounds: int) -> Iterator[int]:
    """`total` in `rounds` parts that differ by one at most, the larger first."""
    return (total // rounds + (number < total % rounds) for number in range(rounds))


def cluster_means(scores: np.ndarray, of: np.ndarray, clusters: int) -> np.ndarray:
    """s of eq. 5: the mean score of each cluster's rows, (K,); NaN for a cluster without any.

    Args:
        scores: (n,), NaN where a row has none.
        of: (n,), the cluster of each.
        clusters: K.
    """
    has = ~np.isnan(scores)
    counts = np.bincount(of[has], minlength=clusters)
    sums = np.bincount(of[has], weights=scores[has], minlength=clusters)
    return np.divide(sums, counts, out=np.full(clusters, np.nan), where=counts > 0)


def reweighted(weights: np.ndarray, means: np.ndarray, update: str) -> np.ndarray:
    """The weights of the next round, (K,), summing to what they summed to.

    Clusters with a mean share what they held together by softmax(s), times the old weights for "product"; those
    without keep theirs.
    """
    seen = ~np.isnan(means)
    logits = means[seen]
    if update == "product":
        logits = logits + np.log(np.maximum(weights[seen], np.finfo(np.float64).tiny))
    odds = np.exp(logits - logits.max(initial=-np.inf))
    changed = weights.copy()
    changed[seen] = weights[seen].sum() * odds / odds.sum()
    return changed


def shares(weights: np.ndarray, room: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """How many rows to take of each cluster, (K,) int64, `total` in all.

    While none is exhausted, cluster j gets w_j `total` rounded down or up, by systematic sampling, so that the mean
    over seeds is w_j `total` also where that is below one. What an exhausted cluster cannot give, the others do.

    Args:
        weights: (K,), not negative.
        room: (K,), the rows that are left in each; `total` at least in all.
        total: Rows.
        rng: Of the rounding.
    """
    given = np.zeros(len(weights), dtype=np.int64)
    while (left := total - int(given.sum())) > 0:
        part = np.where(given < room, weights, 0.0)
        part = part if part.sum() > 0 else (given < room).astype(np.float64)
        order = rng.permutation(len(part))
        marks = np.floor(np.cumsum(left * part[order] / part.sum()) + rng.random())
        marks[-1] = left
        more = np.diff(marks, prepend=0.0).astype(np.int64)
        given[order] = np.minimum(given[order] + more, room[order])
    return given


def draw(of: np.ndarray, q: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`sizes[j]` rows of each cluster j without replacement, one after the other with p in proportion to exp(q).

    The largest of q plus Gumbel noise are such a draw, and exp(q) is never computed.

    Args:
        of: (n,), the cluster of each row.
        q: (n,), its quality.
        sizes: (K,).
        rng: Of the noise.

    Returns:
        Positions among the n rows, ascending.
    """
    order = np.lexsort((-(q + rng.gumbel(size=len(q))), of))
    begins = np.cumsum(np.bincount(of, minlength=len(sizes))) - np.bincount(of, minlength=len(sizes))
    rank = np.arange(len(of)) - begins[of[order]]
    return np.sort(order[rank < sizes[of[order]]])
