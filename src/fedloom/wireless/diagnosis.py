"""Why a fleet cannot be served: which device, which limit, and how far the limit would have to move."""

from __future__ import annotations

import numpy as np

from fedloom.wireless.solvers.heuristics import heuristics
from fedloom.wireless.system.problem import Problem

_SHOWN = 10


def infeasible_alone(problem: Problem) -> list[str]:
    """One sentence for each limit that a device breaks even with the whole band to itself; empty if none does."""
    everything = problem.link.whole_band()
    keep = np.full(len(problem.ids), problem.keep_min)
    lines = []
    bits = problem.payload_bits(keep)
    fastest = bits / everything.up + bits / everything.down + problem.compute.seconds(keep)
    seconds = problem.compute.seconds(keep)
    joules = problem.compute.joules(keep) + problem.compute.overhead_j
    cheapest = bits * problem.link.least_j_per_bit() + problem.compute.joules(keep) + problem.compute.overhead_j
    for k, name in enumerate(problem.ids):
        limit_s, limit_j = problem.latency_limit_s, problem.energy_limit_j[k]
        if fastest[k] > limit_s:
            lines.append(
                f"device {name!r} needs at least {fastest[k]:.4g} s a round, got a latency limit of {limit_s:.4g} s "
                f"({seconds[k]:.4g} s of it computing, the whole band to itself, keep {problem.keep_min:g}): "
                f"raise limits.latency_s by {_enough(fastest[k] - limit_s)} s, or drop the device"
            )
        if cheapest[k] > limit_j:
            lines.append(
                f"device {name!r} needs at least {cheapest[k]:.4g} J a round, got an energy limit of {limit_j:.4g} J "
                f"({joules[k]:.4g} J of it not sending, the best of the band to itself, keep {problem.keep_min:g}): "
                f"raise its energy_j by {_enough(cheapest[k] - limit_j)} J, or drop the device"
            )
    return lines


def _enough(amount: float) -> str:
    """Four digits, rounded up: what the message tells has to be enough."""
    return f"{amount * 1.0006:.4g}"


def explain(problem: Problem, *, proven: bool) -> str:
    """The message for a problem without a feasible point.

    If every device could be served alone, the limits are loosened together until a search serves them all; what it then
    needs is enough, but maybe not the least.
    """
    lines = infeasible_alone(problem)
    if lines:
        if len(lines) == 1:
            return lines[0]
        # All of them, so that a fleet is mended in one go rather than device by device.
        shown = "".join(f"\n  - {line}" for line in lines[:_SHOWN])
        more = f"\n  - and {len(lines) - _SHOWN} more like these" if len(lines) > _SHOWN else ""
        return f"{len(lines)} limits cannot be met:{shown}{more}"
    head = (
        "no share of the band serves all devices"
        if proven
        else "no share of the band that serves all devices was found"
    )
    now = problem.latency_limit_s
    longer, richer = _least_factor(problem, "latency_factor"), _least_factor(problem, "energy_factor")
    device, limit = _hardest(problem)
    moves = []
    if longer is not None:
        moves.append(f"limits.latency_s = {now * longer:.4g} (now {now:.4g})")
    if richer is not None:
        moves.append(f"every energy_j times {richer:.3g}")
    remedy = " or ".join(moves) if moves else "both limits at once, more band or fewer devices"
    return (
        f"{head} at keep {problem.keep_min:g}; the first to fail is device {device!r} ({limit}): it would take {remedy}"
    )


def _served(problem: Problem) -> bool:
    return heuristics(problem).share_for_rate(problem, problem.keep_min)[1]


def _least_factor(problem: Problem, argument: str) -> float | None:
    """By how much a limit has to be multiplied for the search to serve everybody; None if a thousandfold is not enough."""
    low, high = 1.0, 1.25
    while not _served(problem.with_limits(**{argument: high})):
        low, high = high, 1.0 + 2.0 * (high - 1.0)
        if high > 1000.0:
            return None
    for _ in range(12):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if _served(problem.with_limits(**{argument: middle})) else (middle, high)
    return high


def _hardest(problem: Problem) -> tuple[str, str]:
    """The device furthest from keep_min under the best share found, and the constraint that binds."""
    share, _ = heuristics(problem).share_for_rate(problem, problem.keep_min)
    rates = problem.link.rates(share)
    late, over = problem.latency_caps(rates), problem.energy_caps(rates)
    k = int(np.argmin(np.minimum(late, over)))
    return problem.ids[k], "latency" if late[k] <= over[k] else "energy"
