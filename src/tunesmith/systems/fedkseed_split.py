"""Rows shared out among clients, each with its own mix of classes or families."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from datasets import Dataset

from tunesmith.core.seeds import seed_of
from tunesmith.errors import DataError


def kinds(rows: Dataset) -> list[Hashable]:
    """What kind each row is of: its class, its family, or all of one kind."""
    for column in ("label", "family"):
        if column in rows.column_names:
            return list(rows[column])
    return [0] * len(rows)


def share_out(of: Sequence[Hashable], clients: int, alpha: float, seed: int) -> list[list[int]]:
    """Row numbers of each client. Of each kind, clients get shares drawn from a symmetric Dirichlet distribution.

    Args:
        of: The kind of each row.
        clients: How many; every one gets a row at least, from the one that has most.
        alpha: Of the distribution: far below 1 a client has one kind only, far above all the same mix.

    Raises:
        DataError: fewer rows than clients.
    """
    if len(of) < clients:
        raise DataError(
            f"{len(of)} rows cannot be shared out among {clients} clients; give more rows, or fewer clients"
        )
    drawn = np.random.default_rng(seed_of(seed, "fedkseed", "split"))
    held: list[list[int]] = [[] for _ in range(clients)]
    for kind in sorted(set(of), key=str):
        members = drawn.permutation([i for i, other in enumerate(of) if other == kind])
        shares = drawn.dirichlet([alpha] * clients)
        # A tiny alpha can give 0/0: then one client has all of the kind.
        shares = shares if np.isfinite(shares).all() else np.eye(clients)[drawn.integers(clients)]
        cuts = (shares.cumsum()[:-1] * len(members)).round().astype(int)
        for client, part in zip(held, np.split(members, cuts), strict=True):
            client += part.tolist()
    for client in held:
        if not client:
            client.append(max(held, key=len).pop())
    return [sorted(rows) for rows in held]
