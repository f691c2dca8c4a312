"""Quick shares of the band in either mode: greedy, and one that serves every device at a given keep rate."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from fedloom.wireless.solvers import bandwidth_dual, local_search
from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Array, Mode

_STEPS = 8  # of bandwidth for each device, in the greedy share of a band: a step is an eighth of an even part


class Heuristics(Protocol):
    """What every mode of sharing offers."""

    def greedy(self, problem: Problem) -> Array:
        """The share that hands out the band piece by piece, each to the device that it helps most."""

    def share_for_rate(self, problem: Problem, rate: float) -> tuple[Array, bool]:
        """A share that gives every device a cap of `rate` as well as one was found, and whether it does."""


class SubcarrierHeuristics:
    """Whole subcarriers; whether all are served is found out by local search, not proven."""

    def greedy(self, problem: Problem) -> Array:
        return local_search.share_of(local_search.greedy(problem), len(problem.ids))

    def share_for_rate(self, problem: Problem, rate: float) -> tuple[Array, bool]:
        asked = replace(problem, keep_min=rate)
        owners = local_search.improve(asked, local_search.greedy(asked))
        share = local_search.share_of(owners, len(problem.ids))
        return share, bool((problem.caps(share) >= rate).all())


class BandHeuristics:
    """One bandwidth; whether all are served is exact."""

    def greedy(self, problem: Problem) -> Array:
        devices = len(problem.ids)
        steps = _STEPS * devices
        step = problem.band.total_hz / steps
        share = np.zeros(devices)
        for _ in range(steps):
            offers = share + step * np.eye(devices)
            caps = problem.caps(offers)
            share = offers[int(np.argmin([local_search.merit(problem, row) for row in caps]))]
        return share

    def share_for_rate(self, problem: Problem, rate: float) -> tuple[Array, bool]:
        hz = bandwidth_dual.least_hz(problem, np.full(len(problem.ids), rate))
        total = problem.band.total_hz
        if not np.isfinite(hz.sum()):
            return problem.link.dealt_evenly(), False
        return hz * (total / hz.sum()), bool(hz.sum() <= total)


_BY_MODE: dict[Mode, Heuristics] = {"subcarrier": SubcarrierHeuristics(), "bandwidth": BandHeuristics()}


def heuristics(problem: Problem) -> Heuristics:
    """Those of the problem's mode."""
    return _BY_MODE[problem.link.mode]
