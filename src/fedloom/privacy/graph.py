"""Who shares secrets with whom in a secure sum, and how many of a group open one.

All with all up to 100 clients; above, k neighbours on a circle in an order that the attempt draws (Bell et al., "Secure
single-server aggregation with (poly)logarithmic overhead", 2020/704), with k from the tails of the hypergeometric law.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from functools import cache

from fedloom.errors import ConfigError

COMPLETE = 100
"""Clients up to which everybody is everybody's neighbour."""
CORRUPT, LOST = 0.1, 0.2
"""Shares of clients that collude with the server, and that drop out, which a sparse graph is made for."""


def threshold(group: int) -> int:
    """Shares that open a secret of a group of this size: more than half of the group and of its colluding third.

    >>> [threshold(h) for h in (2, 3, 4, 5, 7, 10, 20, 100)]
    [2, 2, 3, 4, 5, 7, 14, 67]
    """
    corrupt = (group - 1) // 3
    return (group + corrupt) // 2 + 1


@cache
def degree(n: int, corrupt: float = CORRUPT, lost: float = LOST) -> tuple[int, int]:
    """(neighbours of a client, threshold) of a sparse graph of n clients.

    The fewest for which a group that the server opens alone is as rare as 2^-40, and one that cannot be opened as 2^-20.
    """
    from scipy.stats import hypergeom

    bad, gone = round(corrupt * n), round(lost * n)
    for k in range(2, min(n, 255), 2):
        corrupted, alive = hypergeom(n - 1, bad, k), hypergeom(n - 1, n - 1 - gone, k)
        for t in range(1, k + 1):
            if n * float(corrupted.sf(t - 1)) < 2.0**-40:  # the smallest safe threshold is the most tolerant one
                if n * float(alive.cdf(t - 1)) < 2.0**-20:
                    return k, t
                break
    raise ConfigError(f"no group of at most 255 of {n} clients withstands {corrupt:.0%} colluding and {lost:.0%} lost")


def survivors_and_colluding(n: int) -> tuple[int, int]:
    """(clients that are in every sum of n that opens, clients of it that may collude with the server).

    >>> [survivors_and_colluding(n) for n in (3, 4, 10, 200)]
    [(2, 0), (3, 1), (7, 3), (160, 20)]
    """
    if n <= COMPLETE:
        return threshold(n), (n - 1) // 3
    return n - round(LOST * n), round(CORRUPT * n)


def neighbours(ids: Collection[str], attempt: bytes) -> tuple[dict[str, list[str]], int]:
    """(client -> its neighbours in the order of ids, threshold)."""
    n, order = len(ids), sorted(ids)
    if n <= COMPLETE:
        return {i: [j for j in order if j != i] for i in order}, threshold(n)
    k, t = degree(n)
    circle = sorted(ids, key=lambda i: hashlib.sha256(attempt + i.encode()).digest())
    steps = [s for s in range(-k // 2, k // 2 + 1) if s]
    return {i: sorted(circle[(at + s) % n] for s in steps) for at, i in enumerate(circle)}, t
