"""Take a part of the factors and put it back: the one slicing code of FSLoRA, FedLoDrop, HetLoRA and FlexLoRA.

A cut names, for one site, the ranks, the rows of B (outputs) and the columns of A (inputs) that a client sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.state import State


@dataclass(frozen=True)
class Cut:
    """Sorted int64 indices into one site's factors; None stands for all."""

    rank: Tensor | None = None
    """Rows of A and columns of B."""
    rows: Tensor | None = None
    """Rows of B, the outputs."""
    cols: Tensor | None = None
    """Columns of A, the inputs."""


Cuts = dict[str, Cut]
"""Site -> cut."""


def prefix(state: State, rank: int) -> Cuts:
    """The first `rank` ranks of every site."""
    return {site: Cut(rank=torch.arange(rank)) for site in state["A"]}


def _pick(x: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    if rows is not None:
        x = x.index_select(0, rows)
    return x if cols is None else x.index_select(1, cols)


def _fill(x: Tensor, part: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    rows = torch.arange(x.shape[0]) if rows is None else rows
    cols = torch.arange(x.shape[1]) if cols is None else cols
    x = x.clone()
    x[rows[:, None], cols] = part
    return x


def take(state: State, cuts: Cuts) -> State:
    """The state with A and B cut; other roles as they are. Without a cut for a site its factors pass unchanged."""
    whole = Cut()
    A, B = {}, {}
    for site, x in state["A"].items():
        cut = cuts.get(site, whole)
        A[site] = _pick(x, cut.rank, cut.cols)
    for site, x in state["B"].items():
        cut = cuts.get(site, whole)
        B[site] = _pick(x, cut.rows, cut.rank)
    return state | {"A": A, "B": B}


def put(full: State, part: State, cuts: Cuts) -> State:
    """`part` at full size: A and B of `full` with the cut's entries replaced; the other roles are the part's.

    Inverse of `take`: take(put(full, part, cuts), cuts) has the part's A and B.
    """
    whole = Cut()
    A, B = {}, {}
    for site, x in part["A"].items():
        cut = cuts.get(site, whole)
        A[site] = _fill(full["A"][site], x, cut.rank, cut.cols)
    for site, x in part["B"].items():
        cut = cuts.get(site, whole)
        B[site] = _fill(full["B"][site], x, cut.rows, cut.rank)
    return part | {"A": A, "B": B}
