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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from fedloom import dora, lora
from fedloom.core import Each, Factors, Mean, Round, Upload, Visit, Work
from fedloom.methods.base import LoRA
from fedloom.spec import like
from fedloom.state import Group, State, only, without


@dataclass(frozen=True, kw_only=True)
class FedLoRAOptimizer(LoRA):
    """Odd rounds: LoRA training, averaged by components. Even rounds: the directions of A are turned. After the last: each
    client tunes the magnitudes of B for itself."""

    convention: Literal["col", "row", "rank", "feature"] = "col"
    """Axis of the norm in A and B: `col`, `row`, `rank`, `feature` (see fedloom.dora). Only `col` gave a magnitude
    ratio in the tens, as the paper reports, in our toy study."""
    average: Literal["components", "factors"] = "components"
    """`components` (12a): magnitudes and directions one by one; `factors` (12b): A and B."""
    renorm_after_average: bool = True
    """Bring averaged directions back to length one; otherwise clients that disagree shrink the adapter."""
    global_phase: Literal["federated", "server_proxy", "none"] = "federated"
    """Who turns A in even rounds: `federated`: the clients; `server_proxy`: the server, on task.proxy_data; `none`:
    nobody, every round is a LoRA round."""
    renorm_direction: bool = True
    """(15) with N(V) = V / ||V||: a pure turn that leaves magnitudes alone; otherwise A_D plus the increment."""
    local_phase: bool = True
    nonneg_magnitude: bool = False
    """Keep B_M + gain at or above zero, so that no component flips its sign."""
    lambda_global: Annotated[float, Ge(0)] = 0.0
    lambda_local: Annotated[float, Ge(0)] = 0.0
    """Weights of ||dA_D||^2 and ||dB_M||^2 in the loss. The paper's are unknown."""
    lr_global: Annotated[float, Ge(0)] = 0.33
    lr_local: Annotated[float, Ge(0)] = 3.3
    """Multiply the run's learning rate in the two phases (1e-4 and 1e-3 beside 3e-4: a reading)."""

    name: ClassVar[str] = "fedlora_optimizer"
    paper: ClassVar[str] = "Zhao et al., FedLoRA-Optimizer: Global and Local Optimization, arXiv 2510.11274"
    group: ClassVar[str] = "personal"

    @property
    def personal_phase(self) -> bool:
        return self.local_phase

    @property
    def needs_proxy_data(self) -> bool:
        return self.global_phase == "server_proxy"

    def _turns(self, t: int) -> bool:
        return self.global_phase != "none" and t % 2 == 0

    async def server(self, state: State, round: Round) -> State:
        adapter = only(state, "A", "B", "head")
        if not self._turns(round.t):
            uploads = list(await Each(send=lambda client: adapter))
            after = self._mean_of_factors(uploads) if self.average == "factors" else self._mean_of_components(uploads)
            round.report["product_error"] = float(product_error(uploads, after))
            return state | after
        if self.global_phase == "server_proxy":
            turn = (await self._turning(adapter)).state["turn"]
        else:
            mean = await Mean(send=lambda client: adapter, expects=lambda client, sent: like({"turn": sent["A"]}))
            turn = mean.state["turn"]
        return state | {"A": self._turned(state["A"], turn)}

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        done = await (self._turning(received) if self._turns(visit.t) else Work(received, scale=self.scale))
        return done.state, {}

    async def personal(self, received: State, own: State, visit: Visit) -> State:
        # The increment starts at zero: what was kept is not carried over (reading).
        dim = dora.AXES[self.convention][1]
        gain = {site: torch.zeros_like(dora.norm(x, dim)) for site, x in received["B"].items()}
        done = await self._scaling(received, gain)
        return done.state

    def model(self, received: State, own: State, visit: Visit) -> Work:
        return self._scaling(received, own["gain"]) if "gain" in own else Work(received, scale=self.scale)

    # the two phases as work

    def _turning(self, received: State) -> Work:
        """A = A_M N(A_D + turn) (14)-(16)."""
        splits = {site: dora.split(x, self._dim) for site, x in received["A"].items()}

        def adapter(train: State, fixed: State) -> Factors:
            turned = {site: fixed["A_M"][site] * self._turn(D, train["turn"][site]) for site, D in fixed["A_D"].items()}
            return Factors(turned, fixed["B"])

        return Work(
            train={"turn": {site: torch.zeros_like(x) for site, x in received["A"].items()}},
            fixed=without(received, "A")
            | {
                "A_M": {site: s.magnitude for site, s in splits.items()},
                "A_D": {site: s.direction for site, s in splits.items()},
            },
            scale=self.scale,
            lr=self.lr_global,
            adapter=adapter,
            penalties=_ridge("turn", self.lambda_global),
        )

    def _scaling(self, received: State, gain: Group) -> Work:
        """B = (B_M + gain) B_D (17)-(18)."""
        dim = dora.AXES[self.convention][1]
        splits = {site: dora.split(x, dim) for site, x in received["B"].items()}

        def adapter(train: State, fixed: State) -> Factors:
            M = {site: fixed["B_M"][site] + x for site, x in train["gain"].items()}
            if self.nonneg_magnitude:
                M = {site: x.clamp_min(0) for site, x in M.items()}
            return Factors(fixed["A"], {site: M[site] * D for site, D in fixed["B_D"].items()})

        return Work(
            train={"gain": gain},
            fixed=without(received, "B")
            | {
                "B_M": {site: s.magnitude for site, s in splits.items()},
                "B_D": {site: s.direction for site, s in splits.items()},
            },
            scale=self.scale,
            lr=self.lr_local,
            adapter=adapter,
            penalties=_ridge("gain", self.lambda_local),
        )

    # the server's arithmetic

    @property
    def _dim(self) -> int:
        return dora.AXES[self.convention][0]

    def _turn(self, D: Tensor, turn: Tensor) -> Tensor:
        """(15): N(A_D + dA_D)."""
        return dora.unit(D + turn, self._dim) if self.renorm_direction else D + turn

    def _turned(self, A: Group, turn: Group) -> Group:
        after = {}
        for site, x in A.items():
            s = dora.split(x, self._dim)
            # A vector that nobody turned stays as it is, bit for bit.
            still = (turn[site] == 0).all(self._dim, keepdim=True)
            after[site] = torch.where(still, x, s.magnitude * self._turn(s.direction, turn[site]))
        return after

    def _mean_of_factors(self, uploads: Sequence[Upload]) -> State:
        mean = lora.Mean()
        for upload in uploads:
            mean.add(upload.state, upload.weight)
        return mean.value

    def _mean_of_components(self, uploads: Sequence[Upload]) -> State:
        """(12a): the weighted means of A_M, A_D, B_M, B_D, put together again."""
        mean, dims = lora.Mean(), dora.AXES[self.convention]
        for upload in uploads:
            parts = only(upload.state, "head")
            for factor, dim in zip("AB", dims, strict=True):
                splits = {site: dora.split(x, dim) for site, x in upload.state[factor].items()}
                parts[factor + "_M"] = {site: s.magnitude for site, s in splits.items()}
                parts[factor + "_D"] = {site: s.direction for site, s in splits.items()}
            mean.add(parts, upload.weight)
        after = only(mean.value, "head")
        for factor, dim in zip("AB", dims, strict=True):
            D = mean.value[factor + "_D"]
            if self.renorm_after_average:
                D = {site: dora.unit(x, dim) for site, x in D.items()}
            after[factor] = {site: M * D[site] for site, M in mean.value[factor + "_M"].items()}
        return after


def _ridge(role: str, weight: float) -> tuple[Callable[[State, State], Tensor], ...]:
    """weight ||x||^2 of a role as a penalty; none at weight 0."""

    def penalty(train: State, fixed: State) -> Tensor:
        return weight * torch.stack([x.square().sum() for x in train[role].values()]).sum()

    return (penalty,) if weight else ()


def product_error(uploads: Sequence[Upload], after: State) -> Tensor:
    """||sum_k p_k B_k A_k - B A||_F / ||sum_k p_k B_k A_k||_F over all sites (13)."""
    wrong, whole = torch.zeros(()), torch.zeros(())
    total = sum(upload.weight for upload in uploads)
    for site, A in after["A"].items():
        stack = lora.Stack()
        for upload in uploads:
            stack.add(upload.state["B"][site], upload.state["A"][site], upload.weight / total)
        whole = whole + lora.product_norm(*stack.factors()).square()
        stack.add(after["B"][site], A, -1.0)
        wrong = wrong + lora.product_norm(*stack.factors()).square()
    return (wrong / whole.clamp_min(1e-30)).sqrt()
