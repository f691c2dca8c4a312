"""FedLoRA-Optimizer: directions of A tuned globally, magnitudes of B tuned by each client for itself.

Zhao, Zhu, Zhang, Chen, Guo, "FedLoRA-Optimizer: Federated LoRA Fine-Tuning with Global and Local Optimization in
Heterogeneous Data Scenarios", arXiv 2510.11274. The paper's text was not available in full: this is after its idea, and
equation numbers are those of our reconstruction. Unknown there, a choice here: the axis of the norm, what is averaged,
where the global phase runs, and all weights.

A phase is a round. Odd rounds: plain LoRA training, averaged by components (12a) or factors (12b). Even rounds: the global
phase, which turns the directions of A alone (14)-(16). After the last round: the local phase, which trains the
magnitudes of B for each client and uploads nothing (17)-(18).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedloom import directions, lora
from fedloom.core import Client, Group, Method, Sites, State, Upload, Work
from fedloom.errors import ConfigError
from fedloom.methods import choice


@dataclass(frozen=True, kw_only=True)
class FedLoRAOptimizer(Method):
    """LoRA rounds, rounds that turn A, and a personal magnitude of B at the end."""

    convention: str = "col"
    """Axis of the norm in A and B: `col`, `row`, `rank`, `feature` (see fedloom.directions). Only `col` gave a magnitude
    ratio in the tens, as the paper reports, in our toy study."""
    average: str = "components"
    """`components` (12a): magnitudes and directions one by one; `factors` (12b): A and B."""
    renorm_after_average: bool = True
    """Bring averaged directions back to length one; otherwise clients that disagree shrink the adapter."""
    global_phase: str = "federated"
    """Who turns A in even rounds: `federated`: the clients; `server_proxy`: the server, on task.proxy_data; `none`:
    nobody, every round is a LoRA round."""
    renorm_direction: bool = True
    """(15) with N(V) = V / ||V||: a pure turn that leaves magnitudes alone; otherwise A_D plus the increment."""
    local_phase: bool = True
    nonneg_magnitude: bool = False
    """Keep B_M + gain at or above zero, so that no component flips its sign."""
    lambda_global: float = 0.0
    lambda_local: float = 0.0
    """Weights of ||dA_D||^2 and ||dB_M||^2 in the loss. The paper's are unknown."""
    lr_global: float = 0.33
    lr_local: float = 3.3
    """Multiply the run's learning rate in the two phases (1e-4 and 1e-3 beside 3e-4: a reading)."""

    name: ClassVar[str] = "fedlora_optimizer"
    paper: ClassVar[str] = "Zhao et al., FedLoRA-Optimizer: Global and Local Optimization, arXiv 2510.11274"
    needs_all: ClassVar[bool] = True  # for the product error that it reports

    def __post_init__(self) -> None:
        choice(self.name, "convention", self.convention, *directions.AXES)
        choice(self.name, "average", self.average, "components", "factors")
        choice(self.name, "global_phase", self.global_phase, "federated", "server_proxy", "none")
        if min(self.lambda_global, self.lambda_local, self.lr_global, self.lr_local) < 0:
            raise ConfigError("fedlora_optimizer: lambda_* and lr_* must be at least 0")

    @property
    def _dims(self) -> tuple[int, int]:
        return directions.AXES[self.convention]

    def _turns(self, t: int) -> bool:
        return self.global_phase != "none" and t > 0 and t % 2 == 0

    def stage(self, t: int) -> Literal["clients", "server"]:
        return "server" if self._turns(t) and self.global_phase == "server_proxy" else "clients"

    # server

    def expected(self, received: State, t: int) -> State:
        return {"turn": received["A"]} if self._turns(t) else received

    def aggregate(self, state: State, uploads: Iterable[Upload]) -> State:
        every = list(uploads)
        if "turn" in every[0].state:
            return state | {"A": self._turned(state["A"], lora.mean(every, "turn")["turn"])}
        factors = self.average == "factors"
        after = lora.mean(every, "A", "B", "head") if factors else self._mean_of_components(every)
        return state | after | {"report": {"product_error": product_error(every, after)}}

    def _mean_of_components(self, uploads: Iterable[Upload]) -> State:
        """(12a): the weighted means of A_M, A_D, B_M, B_D, put together again."""
        mean = lora.Mean()
        for upload in uploads:
            parts = lora.only(upload.state, "head")
            for factor, dim in zip("AB", self._dims, strict=True):
                splits = {site: directions.split(x, dim) for site, x in upload.state[factor].items()}
                parts[factor + "_M"] = {site: s.magnitude for site, s in splits.items()}
                parts[factor + "_D"] = {site: s.direction for site, s in splits.items()}
            mean.add(parts, upload.client.examples)
        after = lora.only(mean.value, "head")
        for factor, dim in zip("AB", self._dims, strict=True):
            D = mean.value[factor + "_D"]
            if self.renorm_after_average:
                D = {site: directions.unit(x, dim) for site, x in D.items()}
            after[factor] = {site: M * D[site] for site, M in mean.value[factor + "_M"].items()}
        return after

    def _turned(self, A: Group, turn: Group) -> Group:
        dim = self._dims[0]
        after = {}
        for site, x in A.items():
            s = directions.split(x, dim)
            # A vector that nobody turned stays as it is, bit for bit.
            still = (turn[site] == 0).all(dim, keepdim=True)
            after[site] = torch.where(still, x, s.magnitude * self._turn(s.direction, turn[site]))
        return after

    def _turn(self, D: Tensor, turn: Tensor) -> Tensor:
        """(15): N(A_D + dA_D)."""
        return directions.unit(D + turn, self._dims[0]) if self.renorm_direction else D + turn

    # client

    def _scale(self) -> float:
        return lora.scale(self.alpha, self.rank, self.rslora)

    def prepare(self, received: State, kept: State, sites: Sites, client: Client, t: int) -> Work:
        if t == 0 and "gain" in kept:
            return self._local(received, kept["gain"])
        if not self._turns(t):
            return Work(train=received, scale=self._scale())
        splits = {site: directions.split(x, self._dims[0]) for site, x in received["A"].items()}
        return Work(
            train={"turn": {site: torch.zeros_like(x) for site, x in received["A"].items()}},
            fixed=lora.without(received, "A")
            | {
                "A_M": {site: s.magnitude for site, s in splits.items()},
                "A_D": {site: s.direction for site, s in splits.items()},
            },
            scale=self._scale(),
            lr=self.lr_global,
        )

    def personalise(self, received: State, kept: State, sites: Sites, client: Client) -> Work | None:
        if not self.local_phase:
            return None
        # The increment starts at zero each time: what was kept is not carried over (reading).
        gain = {site: torch.zeros_like(directions.norm(x, self._dims[1])) for site, x in received["B"].items()}
        return self._local(received, gain)

    def _local(self, received: State, gain: Group) -> Work:
        splits = {site: directions.split(x, self._dims[1]) for site, x in received["B"].items()}
        return Work(
            train={"gain": gain},
            fixed=lora.without(received, "B")
            | {
                "B_M": {site: s.magnitude for site, s in splits.items()},
                "B_D": {site: s.direction for site, s in splits.items()},
            },
            scale=self._scale(),
            lr=self.lr_local,
        )

    def adapter(self, train: State, fixed: State) -> tuple[Group, Group]:
        if "turn" in train:
            A = {site: fixed["A_M"][site] * self._turn(D, train["turn"][site]) for site, D in fixed["A_D"].items()}
            return A, fixed["B"]
        if "gain" in train:
            M = {site: fixed["B_M"][site] + gain for site, gain in train["gain"].items()}
            if self.nonneg_magnitude:
                M = {site: x.clamp_min(0) for site, x in M.items()}
            return fixed["A"], {site: M[site] * D for site, D in fixed["B_D"].items()}
        return train["A"], train["B"]

    def penalty(self, train: State, fixed: State) -> Tensor | None:
        for role, weight in (("turn", self.lambda_global), ("gain", self.lambda_local)):
            if role in train and weight:
                return weight * torch.stack([x.square().sum() for x in train[role].values()]).sum()
        return None

    def finish(self, work: Work, trained: State, received: State) -> tuple[State, State]:
        return ({}, trained) if "gain" in trained else (trained, {})


def product_error(uploads: Iterable[Upload], after: State) -> Tensor:
    """||sum_k p_k B_k A_k - B A||_F / ||sum_k p_k B_k A_k||_F over all sites (13): what averaging the parts loses."""
    wrong, whole = torch.zeros(()), torch.zeros(())
    every = list(uploads)
    total = sum(upload.client.examples for upload in every)
    for site, A in after["A"].items():
        stack = lora.Stack()
        for upload in every:
            stack.add(upload.state["B"][site], upload.state["A"][site], upload.client.examples / total)
        whole = whole + lora.product_norm(*stack.factors()).square()
        stack.add(after["B"][site], A, -1.0)
        wrong = wrong + lora.product_norm(*stack.factors()).square()
    return (wrong / whole.clamp_min(1e-30)).sqrt()
