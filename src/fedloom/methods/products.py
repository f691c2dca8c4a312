"""Sums of the clients' products as factors, and where the tail goes once such a sum is cut to the adapter's rank.

D = sum_k p_k s_k B_k A_k, s_k being the scale that client k trained with, has rank up to sum_k r_k; the adapter has fewer:
what its leading directions leave over is the tail. No (out, in) product is formed (see `lora.svd`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedloom import lora
from fedloom.core import Client, Each
from fedloom.state import Group, State, only

Tail = Literal["drop", "base", "error", "server"]
"""`drop`: it is lost (FlexLoRA, FLoRIST). `base`: it is added to the frozen weights, and nothing is lost (FedMomentum).
`error`: it is added to the next round's sum (ECLoRA). `server`: so is, besides, what clients of smaller rank were not sent of
the adapter, so that clients which learn nothing leave the server's model as it is."""

Stacks = dict[str, lora.Stack]
"""Site -> a sum of products."""
Triplets = dict[str, tuple[Tensor, Tensor, Tensor]]
"""Site -> (U, S, Vh), singular values falling."""


class Sum(NamedTuple):
    """What a round's uploads sum up to."""

    stacks: Stacks
    """D."""
    head: State
    """The weighted mean of the heads."""
    weights: dict[Client, float]
    """p_k, with sum 1."""


async def summed(asked: Each, scale: Callable[[Client], float]) -> Sum:
    """The sum over the answers to `asked`, one upload held at a time (apart from its factors)."""
    stacks: Stacks = {}
    head, weights = lora.Mean(), {}
    for upload in await asked:
        weights[upload.client] = upload.weight
        for site, A in upload.state["A"].items():
            stack = stacks.setdefault(site, lora.Stack())
            stack.add(upload.state["B"][site], A, upload.weight * scale(upload.client))
        head.add(only(upload.state, "head"), upload.weight)
    total = sum(weights.values())
    whole: Stacks = {}
    for site, stack in stacks.items():
        whole[site] = lora.Stack()
        whole[site].add(*stack.factors(), 1 / total)
    return Sum(whole, head.value, {client: weight / total for client, weight in weights.items()})


def cut(stacks: Stacks, keep: Callable[[Tensor], int]) -> tuple[Triplets, Triplets]:
    """The first keep(S) triplets of every sum, the best approximation of that rank, and the tail."""
    kept, tail = {}, {}
    for site, stack in stacks.items():
        U, S, Vh = lora.svd(*stack.factors())
        q = keep(S)
        kept[site] = U[:, :q], S[:q], Vh[:q]
        tail[site] = U[:, q:], S[q:], Vh[q:]
    return kept, tail


def energy_rank(S: Tensor, share: float) -> int:
    """The smallest q at which the first q of the singular values hold `share` of the sum of their squares.

    >>> [energy_rank(torch.tensor([3.0, 2.0, 1.0, 0.0]), share) for share in (0.6, 0.9, 1.0)]
    [1, 2, 3]
    """
    held = S.double().square().cumsum(0)
    return min(len(S), int((held < share * held[-1]).sum()) + 1)


def adapter(kept: Triplets, A: Group, power: float = 1.0) -> State:
    """A = S^(1 - power) Vh and B = U S^power at the rank of the `A` given.

    Ranks that the sum does not fill change nothing (B = 0) but keep their direction to learn in, that of the `A` given: a
    rank with both factors at zero has no gradient, ever.
    """
    after: State = {"A": {}, "B": {}}
    for site, (U, S, Vh) in kept.items():
        filled = int((S / S[:1] > torch.finfo(S.dtype).eps * len(S)).sum())
        U, S, Vh = U[:, :filled], S[:filled], Vh[:filled]
        after["A"][site] = torch.cat([(S ** (1 - power))[:, None] * Vh, A[site][filled:]])
        after["B"][site] = pad(U * S**power, (0, len(A[site]) - filled))
    return after


def merged(state: State, stacks: Stacks) -> State:
    """Roles `left` and `right` of the state, the offset to the original weights, with the sums added."""
    left, right = dict(state.get("left", {})), dict(state.get("right", {}))
    for site, stack in stacks.items():
        left[site], factor = lora.offset(left.get(site), right.pop(site, None), stack)
        if factor is not None:
            right[site] = factor
    return {"left": left, "right": right}


def stacked(triplets: Triplets) -> Stacks:
    """Triplets as sums of products."""
    stacks: Stacks = {}
    for site, (U, S, Vh) in triplets.items():
        stacks[site] = lora.Stack()
        stacks[site].add(U * S, Vh)
    return stacks


def shares(weights: dict[Client, float], rank: int) -> Tensor:
    """pi (rank,) float64: for each rank, the weight of the clients that hold it.

    >>> shares({Client("a", 1, 1): 0.25, Client("b", 3, 2): 0.75}, 3).tolist()
    [1.0, 0.75, 0.0]
    """
    pi = torch.zeros(rank, dtype=torch.float64)
    for client, weight in weights.items():
        pi[: client.rank] += weight
    return pi


def with_rest(total: Sum, state: State, tail: Tail) -> Stacks:
    """The sums with what earlier rounds left over: roles `rest_left` and `rest_right` of the server alone."""
    for site, stack in total.stacks.items():
        if tail in ("error", "server") and site in state.get("rest_left", {}):
            stack.add(state["rest_left"][site], state["rest_right"][site])
        if tail == "server":
            B = state["B"][site]
            stack.add(B * (1 - shares(total.weights, B.shape[1])).to(B.dtype), state["A"][site])
    return total.stacks


def placed(tail: Triplets, state: State, where: Tail, most: int | None = None) -> State:
    """The roles that hold the tail's first `most` directions from now on; the rest of it is dropped."""
    first = {site: (U[:, :most], S[:most], Vh[:most]) for site, (U, S, Vh) in tail.items()}
    if where == "base":
        return merged(state, stacked({site: x for site, x in first.items() if len(x[1])}))
    if where == "drop":
        return {}
    # Balanced: the directions of the smallest values, which rounding turns, are small in both factors.
    return {
        "rest_left": {site: U * S.sqrt() for site, (U, S, _) in first.items()},
        "rest_right": {site: S.sqrt()[:, None] * Vh for site, (_, S, Vh) in first.items()},
    }
