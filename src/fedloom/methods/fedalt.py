"""FedALT: a client's own adapter beside the frozen mean of all the others', the rest of the world.

Bian et al., "FedALT: Federated Fine-Tuning through Adaptive Local Training with Rest-of-World LoRA", AAAI 2026, arXiv
2503.11880.
y = W0 x + s (a(x) B_k A_k x + (1 - a(x)) B_k^R A_k^R x) with A_k^R = 1/(K - 1) sum_{j != k} A_j, B_k^R alike, and
[1 - a, a] = softmax(G_k x) per layer and token. A client goes on from its own adapter and mixer, which stay with it.

The server needs no more than sums: a client sends by how much its adapter changed, and takes its own off the sum. So memory
does not grow with the clients, and a secure sum will do. Of clients that are away, the last adapter counts (the official code
has all take part). A client whose upload is lost or refused keeps its training: the sum lacks that change from there on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Le

from fedloom import lora
from fedloom.core import Client, Factors, Mean, Round, Visit, Work
from fedloom.methods.base import LoRA
from fedloom.methods.feddpa import side_by_side
from fedloom.rng import generator
from fedloom.spec import like
from fedloom.state import Group, Sites, State, only, zeros_like

ROLES = ("A", "B")
# What a client sends, and the sum that it is added to: names of their own, as a change is no newer version of a sum.
CHANGES = {"change_A": "sum_A", "change_B": "sum_B", "joined": "clients"}


@dataclass(frozen=True, kw_only=True)
class FedALT(LoRA):
    """Server state: the sums of the clients' A and B, and how many clients are in them. The head stays with the client."""

    mixer: Literal["learnt", "fixed"] = "learnt"
    """`learnt`: a(x) is trained with the adapter. `fixed`: a = `mix` (the paper's ablation); it can be exported to PEFT."""
    mix: Annotated[float, Ge(0), Le(1)] = 0.5
    """Weight of the own adapter where it is fixed."""

    name: ClassVar[str] = "fedalt"
    paper: ClassVar[str] = "Bian et al., FedALT: Adaptive Local Training with Rest-of-World LoRA, arXiv 2503.11880"
    group: ClassVar[str] = "personal"
    personal_models = True

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        sums = {f"sum_{role}": group for role, group in zeros_like(lora.init(sites, self.rank, rng)).items()}
        seed = torch.randint(2**62, (1,), generator=rng)
        return sums | {"clients": {"count": torch.zeros(1)}, "frozen": {"seed": seed}}

    async def server(self, state: State, round: Round) -> State:
        mean = await Mean(
            send=lambda client: self.serve(state, client),
            expects=lambda client, sent: {change: like(sent, total)[total] for change, total in CHANGES.items()},
            weight=lambda client: 1.0,
        )
        moved = {
            total: {site: x + mean.weight * mean.state[change][site] for site, x in state[total].items()}
            for change, total in CHANGES.items()
        }
        return state | moved

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        done = await self.model(received, own, visit)
        before = only(own, *ROLES) or zeros_like(only(done.state, *ROLES))
        change = {
            f"change_{role}": {site: x - before[role][site] for site, x in done.state[role].items()} for role in ROLES
        }
        joined = torch.full_like(received["clients"]["count"], float("A" not in own))
        return change | {"joined": {"count": joined}}, done.state

    def serve(self, state: State, client: Client) -> State:
        return only(state, *CHANGES.values(), "frozen")

    def model(self, received: State, own: State, visit: Visit) -> Work:
        fixed = {f"rest_{role}": self._rest(received, own, role) for role in ROLES}
        train = self._start(received, visit.sites) | own
        if self.mixer == "fixed":
            train.pop("gate", None)
        return Work(train=train, fixed=fixed, scale=self.scale, adapter=self._mixed)

    def _start(self, received: State, sites: Sites) -> State:
        """The adapter and the mixer of a client's first visit."""
        seed, dtype = int(received["frozen"]["seed"]), received["clients"]["count"].dtype
        A = {site: lora.init_A({site: shape}, self.rank, generator(seed, site))[site] for site, shape in sites.items()}
        # A mixer of zeros weighs both alike (the official code draws it as it draws A).
        gate = {site: torch.zeros(2, n) for site, (_, n) in sites.items()}
        start = {"A": A, "B": lora.init_B(sites, self.rank), "gate": gate}
        return {role: {site: x.to(dtype) for site, x in group.items()} for role, group in start.items()}

    def _rest(self, received: State, own: State, role: str) -> Group:
        others = float(received["clients"]["count"]) - float("A" in own)
        total = received[f"sum_{role}"]
        mine = own.get(role) or zeros_like({role: total})[role]
        return {site: (x - mine[site]) / max(others, 1.0) for site, x in total.items()}

    def _mixed(self, train: State, fixed: State) -> Factors:
        learnt = "gate" in train
        rest, mine = (1.0, 1.0) if learnt else (1 - self.mix, self.mix)
        both = side_by_side((fixed["rest_A"], fixed["rest_B"], rest), (train["A"], train["B"], mine))
        return both._replace(gate=train["gate"]) if learnt else both
