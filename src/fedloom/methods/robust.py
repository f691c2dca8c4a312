"""Robust means: a few uploads, however wrong, cannot move the average far. They take the place of a method's mean.

Median, trimmed mean: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
arXiv 1803.01498, definitions 1 and 2. Multi-Krum: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant
Gradient Descent", NeurIPS 2017, arXiv 1703.02757, sections 4 and 5.
The server must see every upload, and holds them all: no secure sum can serve these rules. They work on uploads as the server
would average them, entry by entry, so that what most clients did not train (a rank outside their sketch) hardly moves.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from fedloom.core import Averaged, Each, Mean, Round, Upload
from fedloom.flows import Over, averaged, need_mean, need_trained, relay, untrained
from fedloom.state import State


@dataclass(frozen=True, kw_only=True)
class RobustMean(Over):
    """What the rules have in common: the uploads one by one, and an answer that stands in for their mean."""

    group: ClassVar[str] = "robust means"

    def __post_init__(self) -> None:
        super().__post_init__()
        need_mean(self)

    @abstractmethod
    def combine(self, uploads: Sequence[Upload], x: Mean, report: dict[str, float]) -> Averaged:
        """Lifted uploads -> what the method under this one is told that their mean is."""

    async def server(self, state: State, round: Round) -> State:
        async def robust(x: Any) -> Any:
            if not isinstance(x, Mean):
                return await x
            return self.combine(list(await Each(x.send, x.expects, x.lift, x.weight)), x, round.report)

        return await relay(self.over.server(state, round), robust)


@dataclass(frozen=True, kw_only=True)
class Median(RobustMean):
    """The median of every entry over clients, the middle two's mean for an even number. Clients count alike."""

    name: ClassVar[str] = "median"
    paper: ClassVar[str] = "Yin et al., Byzantine-Robust Distributed Learning, arXiv 1803.01498"

    def combine(self, uploads: Sequence[Upload], x: Mean, report: dict[str, float]) -> Averaged:
        return _entrywise(uploads, lambda stack: _trimmed(stack, (len(stack) - 1) // 2))


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(RobustMean):
    """The mean of every entry over clients without the largest and the smallest ones. Clients count alike."""

    trim: Annotated[float, Gt(0), Lt(0.5)] = 0.1
    """beta, the share of clients cut at each end, rounded up; at least the share that may be wrong."""

    name: ClassVar[str] = "trimmed_mean"
    paper: ClassVar[str] = "Yin et al., Byzantine-Robust Distributed Learning, arXiv 1803.01498"

    def combine(self, uploads: Sequence[Upload], x: Mean, report: dict[str, float]) -> Averaged:
        K = len(uploads)
        cut = min(math.ceil(self.trim * K - 1e-9), (K - 1) // 2)
        return _entrywise(uploads, lambda stack: _trimmed(stack, cut))


@dataclass(frozen=True, kw_only=True)
class MultiKrum(RobustMean):
    """The plain mean of the K - f uploads nearest to their K - f - 2 nearest others, in squared distance."""

    attackers: Annotated[int, Ge(0)] = 1
    """f, how many uploads may be wrong. K clients withstand (K - 3) / 2 at most: with fewer than 2 f + 3 in a round it is
    that many, reported as `withstands`."""

    name: ClassVar[str] = "multi_krum"
    paper: ClassVar[str] = "Blanchard et al., Byzantine Tolerant Gradient Descent, arXiv 1703.02757"

    def combine(self, uploads: Sequence[Upload], x: Mean, report: dict[str, float]) -> Averaged:
        K = len(uploads)
        f = max(0, min(self.attackers, (K - 3) // 2))
        report["withstands"] = float(f)
        # The nearest of all is the upload itself, at distance 0.
        scores = _squared_distances(uploads).sort(dim=1).values[:, 1 : K - f - 1].sum(dim=1)
        chosen = scores.argsort(stable=True)[: K - f].sort().values.tolist()
        return _part(uploads, chosen, lambda upload: 1.0)


@dataclass(frozen=True, kw_only=True)
class NormFilter(RobustMean):
    """The method's own mean without the uploads that changed much more than the median client: a plain filter, of no paper."""

    factor: Annotated[float, Gt(1)] = 3.0
    """An upload is left out if the norm of its change is above this many times the median norm."""

    name: ClassVar[str] = "norm_filter"
    paper: ClassVar[str] = "none: a plain filter by the norm of the change"

    def __post_init__(self) -> None:
        super().__post_init__()
        need_trained(self, "the norm of a change")

    def combine(self, uploads: Sequence[Upload], x: Mean, report: dict[str, float]) -> Averaged:
        def norm(upload: Upload) -> Tensor:
            start: State = x.lift(upload.client, untrained(x, upload.client))
            gaps = [
                (v - start[role][site]).double() for role, group in upload.state.items() for site, v in group.items()
            ]
            return torch.stack([gap.square().sum() for gap in gaps]).sum().sqrt()

        norms = torch.stack([norm(upload) for upload in uploads])
        bound = self.factor * norms.quantile(0.5)
        kept = [i for i, length in enumerate(norms) if length <= bound]
        report["left_out"] = float(len(uploads) - len(kept))
        return _part(uploads, kept, lambda upload: upload.weight)


def _trimmed(stack: Tensor, cut: int) -> Tensor:
    """(K, ...) -> the mean over K of each entry without its `cut` smallest and largest values."""
    return stack.sort(dim=0).values[cut : len(stack) - cut].mean(dim=0)


def _entrywise(uploads: Sequence[Upload], rule: Callable[[Tensor], Tensor]) -> Averaged:
    first = uploads[0].state
    state = {
        role: {site: rule(torch.stack([upload.state[role][site] for upload in uploads])) for site in group}
        for role, group in first.items()
    }
    return Averaged(state, tuple(upload.client for upload in uploads), sum(upload.weight for upload in uploads))


def _part(uploads: Sequence[Upload], chosen: Sequence[int], weight: Callable[[Upload], float]) -> Averaged:
    """The mean of some of the uploads."""
    return averaged(Upload(u.client, u.state, weight(u)) for u in (uploads[i] for i in chosen))


def _squared_distances(uploads: Sequence[Upload]) -> Tensor:
    """(K, K) squared Euclidean distances over all tensors."""
    total = torch.zeros(len(uploads), len(uploads), dtype=torch.float64)
    for role, group in uploads[0].state.items():
        for site in group:
            flat = torch.stack([upload.state[role][site].flatten().double() for upload in uploads])
            total += torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()
    return total
