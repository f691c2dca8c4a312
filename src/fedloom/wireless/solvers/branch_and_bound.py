"""One shape for what any solver returns, and best-first branch and bound over nodes of any kind.

Land, Doig, "An automatic method of solving discrete programming problems", Econometrica 28 (1960). FedLoDrop
(arXiv 2510.12078) uses branch and bound for its optimum; its bounding and branching rules are not known to us.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

import numpy as np

Node = TypeVar("Node")
Point = TypeVar("Point")


class Status(Enum):
    """How a search ended. The value says what it means and what to do."""

    OPTIMAL = "proven optimal: the lower bound meets the value within the tolerance"
    FEASIBLE = "feasible, optimality not proven: this solver proves nothing; ask for 'bnb' if a proof is needed"
    TIME_LIMIT = "time limit: the best point found, optimal within the optimality gap; give more time to close it"
    NODE_LIMIT = "node limit: the best point found, optimal within the optimality gap; allow more nodes to close it"
    INFEASIBLE = "proven infeasible: no share of the band meets every limit; loosen the limits named"
    NOT_FOUND = "no feasible point found and infeasibility not proven: loosen the limits named or give more time"


@dataclass(frozen=True)
class Progress:
    """The state of a search at one moment."""

    seconds: float
    nodes: int
    lower: float
    value: float


@dataclass(frozen=True)
class Solution(Generic[Point]):
    """A point, what it is worth, and what is known of the optimum: lower <= optimum <= value."""

    point: Point | None
    value: float
    """+inf without a point."""
    lower: float
    status: Status
    nodes: int
    """Of the search tree, or convex problems solved."""
    seconds: float
    trace: tuple[Progress, ...] = ()

    @property
    def optimality_gap(self) -> float:
        """(value - lower) / |value|, inf without a point."""
        return (self.value - self.lower) / max(abs(self.value), 1e-300) if np.isfinite(self.value) else np.inf


@dataclass(frozen=True)
class NodeBound(Generic[Node, Point]):
    """A node with its lower bound, and perhaps a point."""

    lower: float
    """No point of the node is worth less; +inf where it has none."""
    value: float = np.inf
    point: Point | None = None
    """Some feasible point (not necessarily of the node) and its value."""
    split: Callable[[], Sequence[Node]] = field(default=lambda: ())
    """Nodes that together hold every point of this one; none where `value` is the node's own optimum."""


def branch_and_bound(
    root: Node,
    lower_bound: Callable[[Node, float], NodeBound[Node, Point]],
    *,
    start: tuple[float, Point] | None = None,
    tolerance: float = 1e-9,
    time_limit_s: float = np.inf,
    node_limit: int = 10**9,
) -> Solution[Point]:
    """Minimise by best-first search; `lower_bound(node, cutoff)` may stop as soon as its lower bound passes the cutoff.

    `tolerance` is absolute. The time limit is checked between nodes; then the incumbent comes back with the smallest open
    lower bound. A node whose lower bound is above value - tolerance is dropped.
    """
    began = time.perf_counter()
    value, point = start if start is not None else (np.inf, None)
    first = lower_bound(root, value)
    nodes, order = 1, itertools.count()
    if first.value < value:
        value, point = first.value, first.point
    heap = [(first.lower, next(order), first)]
    # What is dropped as "not better by more than the tolerance" still limits what may be claimed as a lower bound.
    floor, lower, status = np.inf, first.lower, Status.OPTIMAL
    trace = [Progress(time.perf_counter() - began, nodes, min(lower, value), value)]
    while heap:
        lower = heap[0][0]
        if lower >= value - tolerance:
            break
        if time.perf_counter() - began > time_limit_s or nodes >= node_limit:
            status = Status.NODE_LIMIT if nodes >= node_limit else Status.TIME_LIMIT
            break
        _, _, parent = heapq.heappop(heap)
        for child in parent.split():
            found = lower_bound(child, value)
            nodes += 1
            if found.value < value:
                value, point = found.value, found.point
            child_lower = max(parent.lower, found.lower)
            if child_lower < value - tolerance and found.split is not None:
                heapq.heappush(heap, (child_lower, next(order), _raised(found, child_lower)))
            else:
                floor = min(floor, child_lower)
        if not nodes % 64 or not heap:
            now = min(heap[0][0] if heap else value, floor, value)
            trace.append(Progress(time.perf_counter() - began, nodes, now, value))
    lower = min(heap[0][0] if heap else np.inf, floor, value)
    if point is None:
        status = Status.INFEASIBLE if status is Status.OPTIMAL else Status.NOT_FOUND
    seconds = time.perf_counter() - began
    trace.append(Progress(seconds, nodes, lower, value))
    return Solution(point, value, lower, status, nodes, seconds, tuple(trace))


def _raised(found: NodeBound[Node, Point], lower: float) -> NodeBound[Node, Point]:
    return NodeBound(lower, found.value, found.point, found.split)
