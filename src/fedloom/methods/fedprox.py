"""FedProx: a proximal term keeps local training near the state it started from.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv 1812.06127: client k minimises
F_k(x) + mu/2 ||x - x_t||^2. Here x is what the client trains, the factors themselves (reading: the paper has no factors).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from fedloom.core import Visit, Work
from fedloom.flows import Over, relay_works
from fedloom.state import State


@dataclass(frozen=True, kw_only=True)
class FedProx(Over):
    """mu/2 ||x - start||^2 is added to the loss of every work."""

    mu: Annotated[float, Ge(0)] = 0.01
    """Weight of the proximal term; 0 is the method under it."""

    name: ClassVar[str] = "fedprox"
    paper: ClassVar[str] = "Li et al., Federated Optimization in Heterogeneous Networks, arXiv 1812.06127"
    adds: ClassVar[tuple[str, ...]] = ("prox_",)

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        def near(work: Work) -> Work:
            start = {f"prox_{role}": group for role, group in work.train.items()}
            return replace(work, fixed=work.fixed | start, penalties=(*work.penalties, self._distance))

        return await relay_works(self.over.client(received, own, visit), near if self.mu else lambda work: work)

    def _distance(self, train: State, fixed: State) -> Tensor:
        squares = [
            (x - fixed[f"prox_{role}"][site]).square().sum()
            for role, group in train.items()
            for site, x in group.items()
        ]
        return self.mu / 2 * torch.stack(squares).sum()
