"""Clipping of updates: what a client changed is no longer than a norm when it is sent.

McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018, arXiv 1710.06963, section 2 (flat
clipping, without their noise): the change Delta of all tensors together becomes Delta min(1, C / ||Delta||).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt

from fedloom.core import Visit
from fedloom.flows import Over, need_trained, relay_sends
from fedloom.state import State


@dataclass(frozen=True, kw_only=True)
class Clip(Over):
    """Clients send x + Delta min(1, C / ||Delta||) with Delta the change of all tensors together; what they keep is whole."""

    norm: Annotated[float, Gt(0)] = 1.0
    """C, the longest Euclidean norm of a change: about the median norm of an honest client's."""

    name: ClassVar[str] = "clip_updates"
    paper: ClassVar[str] = "McMahan et al., Differentially Private Recurrent Language Models, arXiv 1710.06963"
    group: ClassVar[str] = "uploads"

    def __post_init__(self) -> None:
        super().__post_init__()
        need_trained(self, "a change")

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        return await relay_sends(self.over.client(received, own, visit), received, self._clipped)

    def _clipped(self, received: State, sent: State) -> State:
        change = {r: {s: x - received[r][s] for s, x in group.items()} for r, group in sent.items()}
        squares = [x.double().square().sum() for group in change.values() for x in group.values()]
        share = min(1.0, self.norm / max(float(torch.stack(squares).sum().sqrt()), 1e-30))
        if share == 1.0:
            return sent
        return {r: {s: x - (1 - share) * change[r][s] for s, x in group.items()} for r, group in sent.items()}
