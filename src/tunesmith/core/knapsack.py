"""Which tensors to train under a bound on the backward pass: a knapsack in which the deepest choice has a price too.

Tensors stand in order of execution. Training a set S costs its own gradients, and the way of the gradient from the loss
down to its deepest tensor, the first of the order:

    cost(S) = sum over k in S of own_k  +  sum over k >= min(S) of passing_k        (GreenTrainer, section 3)

For each possible deepest tensor the way is a constant, and the rest is a 0/1 knapsack over what stands above it, whose
table grows by one tensor from one candidate to the next: O(N states) in all, and exact if costs are whole multiples of
the unit in which they are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import gcd

import torch

STATES = 100_000
"""Units that a budget is counted in, at most: rounding then wastes less than a thousandth per hundred tensors."""


def best_subset(
    values: Sequence[float], own: Sequence[int], passing: Sequence[int], budget: int, states: int = STATES
) -> list[int]:
    """The non-empty set of the largest total value that costs no more than the budget.

    Costs are rounded up where they do not fit into `states` units, so the budget holds whatever the rounding. With no
    value above zero, it is the best single tensor that the budget allows.

    Args:
        values: Of each tensor, in order of execution; of any sign.
        own: FLOPs of the tensor's gradient, or any other cost; not negative.
        passing: FLOPs of bringing the gradient to the tensor's output from that of the next tensor.
        budget: In the same unit.
        states: Units that the budget is divided into at most.

    Returns:
        Places of the chosen, ascending; empty if no tensor alone fits.
    """
    count = len(values)
    depth = list(accumulate(reversed(passing)))[::-1]
    common = gcd(*own) or 1
    unit = common if budget // common <= states else -(-budget // states)
    sizes = [-(-cost // unit) for cost in own]
    # best[t]: the largest value of a set above the tensor at hand whose gradients cost at most t units.
    best = torch.zeros(max(budget, 0) // unit + 1, dtype=torch.float64)
    taken: dict[int, torch.Tensor] = {}
    found, deepest, room_left = float("-inf"), -1, 0
    for k in reversed(range(count)):
        room = budget - depth[k] - own[k]
        if budget < depth[k]:
            break  # and everything deeper is further away
        if room >= 0 and values[k] + float(best[room // unit]) > found:
            found, deepest, room_left = values[k] + float(best[room // unit]), k, room // unit
        if values[k] > 0 and sizes[k] < len(best):
            with_it = best[: len(best) - sizes[k]] + values[k]
            taken[k] = with_it > best[sizes[k] :]
            best[sizes[k] :] = torch.maximum(with_it, best[sizes[k] :])
    if deepest < 0:
        return []
    chosen = [deepest]
    for k in range(deepest + 1, count):
        at = room_left - sizes[k]
        if k in taken and at >= 0 and bool(taken[k][at]):
            chosen.append(k)
            room_left = at
    return chosen
