"""Server optimisers: the mean change of a round is a gradient for an optimiser on the server.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295, algorithm 2, with Delta_t the change that the
method under it makes to A, B and the head: m_t = beta1 m_{t-1} + (1 - beta1) Delta_t, x_{t+1} = x_t + lr m_t / (sqrt(v_t) +
tau), from m = 0 and v = tau^2, the least that the algorithm allows. As there, no bias is corrected (Flower's FedAdam corrects
it, and starts from v = 0), and Delta_t is squared, not m_t.
FedAvgM: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution", arXiv 1909.06335.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from fedloom.core import Round
from fedloom.flows import Over
from fedloom.state import State, only, zeros_like

ROLES = ("A", "B", "head")
"""What the server's optimiser moves."""


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer(Over):
    """What the four have in common: moments beside the state, and a step for every tensor that the round changed."""

    lr: Annotated[float, Gt(0)] = 1.0
    """The server's learning rate."""

    group: ClassVar[str] = "server optimisers"
    adds: ClassVar[tuple[str, ...]] = ("server_m_", "server_v_")

    @property
    def first_v(self) -> float:
        """v before the first round."""
        return 0.0

    @abstractmethod
    def step(self, change: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(Delta_t, m, v before) -> (what is added to x, m, v after)."""

    async def server(self, state: State, round: Round) -> State:
        before, moments = self.inner(state), self.mine(state)
        after = dict(await self.over.server(before, round))
        for role, group in only(before, *ROLES).items():
            m = dict(moments.get("server_m_" + role) or zeros_like({role: group})[role])
            v = dict(moments.get("server_v_" + role) or {s: torch.full_like(x, self.first_v) for s, x in group.items()})
            moved = dict(after[role])
            for site, x in group.items():
                if after[role][site].shape == x.shape:
                    added, m[site], v[site] = self.step(after[role][site] - x, m[site], v[site])
                    moved[site] = x + added
            after[role], moments["server_m_" + role], moments["server_v_" + role] = moved, m, v
        return after | moments


@dataclass(frozen=True, kw_only=True)
class FedAvgM(ServerOptimizer):
    """Momentum on the server: m <- momentum m + Delta, x <- x + lr m; with momentum 0 and lr 1 it is the method under it."""

    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Share of the last step that is added to the next."""

    name: ClassVar[str] = "fedavgm"
    paper: ClassVar[str] = "Hsu et al., Measuring the Effects of Non-Identical Data Distribution, arXiv 1909.06335"

    def step(self, change: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m = self.momentum * m + change
        return self.lr * m, m, v


@dataclass(frozen=True, kw_only=True)
class Adaptive(ServerOptimizer):
    """What the adaptive three have in common: they differ in how v grows."""

    lr: Annotated[float, Gt(0)] = 0.01
    """The server's learning rate: about the size of an entry's step in a round, whatever the clients' is."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Share of the last rounds' mean change that is kept."""
    tau: Annotated[float, Gt(0)] = 1e-3
    """Degree of adaptivity, added to sqrt(v): the larger, the nearer to plain averaging with momentum."""

    @property
    def first_v(self) -> float:
        return self.tau**2

    @abstractmethod
    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """v_t from v_{t-1} and Delta_t^2."""

    def step(self, change: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m = self.beta1 * m + (1 - self.beta1) * change
        v = self.second(v, change.square())
        return self.lr * m / (v.sqrt() + self.tau), m, v


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(Adaptive):
    """Adagrad on the server: v_t = v_{t-1} + Delta_t^2."""

    beta1: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the last rounds' mean change that is kept: none in the paper's experiments."""

    name: ClassVar[str] = "fedadagrad"
    paper: ClassVar[str] = "Reddi et al., Adaptive Federated Optimization, arXiv 2003.00295"

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return v + square


@dataclass(frozen=True, kw_only=True)
class FedAdam(Adaptive):
    """Adam on the server: v_t = beta2 v_{t-1} + (1 - beta2) Delta_t^2."""

    beta2: Annotated[float, Ge(0), Lt(1)] = 0.99
    """Share of the last rounds' squared changes that is kept."""

    name: ClassVar[str] = "fedadam"
    paper: ClassVar[str] = "Reddi et al., Adaptive Federated Optimization, arXiv 2003.00295"

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return self.beta2 * v + (1 - self.beta2) * square


@dataclass(frozen=True, kw_only=True)
class FedYogi(Adaptive):
    """Yogi on the server: v_t = v_{t-1} - (1 - beta2) Delta_t^2 sign(v_{t-1} - Delta_t^2)."""

    beta2: Annotated[float, Ge(0), Lt(1)] = 0.99
    """Share of the last rounds' squared changes that is kept."""

    name: ClassVar[str] = "fedyogi"
    paper: ClassVar[str] = "Reddi et al., Adaptive Federated Optimization, arXiv 2003.00295"

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self.beta2) * square * torch.sign(v - square)
