"""FedNova: clients' changes are divided by how far they trained before they are averaged.

Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", NeurIPS 2020,
arXiv 2007.07481, equations 8 and 9: x <- x + tau_eff sum_k p_k d_k with d_k = (x_k - x) / tau_k and tau_eff = sum_k p_k tau_k.
Here tau_k is the sum of the learning rates of client k's local steps, the norm of the paper's vector a_k for SGD without
momentum. With another local optimiser the steps are counted alike (reading).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from fedloom import lora
from fedloom.core import Client, Mean, Round, Visit, Work
from fedloom.flows import Over, need_mean, need_trained, relay, untrained
from fedloom.spec import Leaf, Spec
from fedloom.state import Group, State, only


@dataclass(frozen=True, kw_only=True)
class FedNova(Over):
    """The mean of x + tau_eff d_k in place of the mean of x_k: the same where all clients trained alike.

    Clients upload d_k as roles `nova_A`, ... and tau_k as `nova_tau`; both are averaged, so that a secure sum can serve it.
    """

    name: ClassVar[str] = "fednova"
    paper: ClassVar[str] = "Wang et al., Tackling the Objective Inconsistency Problem, arXiv 2007.07481"
    group: ClassVar[str] = "local training"
    adds: ClassVar[tuple[str, ...]] = ("nova_",)

    def __post_init__(self) -> None:
        super().__post_init__()
        need_mean(self)
        need_trained(self, "a normalised change")

    async def server(self, state: State, round: Round) -> State:
        async def normalised(x: Any) -> Any:
            if not isinstance(x, Mean):
                return await x

            def expects(client: Client, sent: State) -> Spec:
                d = {f"nova_{role}": group for role, group in x.expects(client, sent).items()}
                return d | {"nova_tau": {"sum": Leaf((1,))}}

            def lift(client: Client, upload: State) -> State:
                d, start = _changes(upload), untrained(x, client)
                moved = {role: {site: start[role][site] + v for site, v in group.items()} for role, group in d.items()}
                return x.lift(client, moved) | only(upload, "nova_tau")

            answer = await replace(x, expects=expects, lift=lift)
            still = lora.Mean()
            for client in answer.clients:
                still.add(x.lift(client, untrained(x, client)), x.weight(client))
            tau = float(answer.state["nova_tau"]["sum"])
            # Lifting is affine: the mean of lift(x + tau d) lies on the line through those of lift(x) and lift(x + d).
            mean = {
                role: {site: torch.lerp(still.value[role][site], v, tau) for site, v in group.items()}
                for role, group in self.inner(answer.state).items()
            }
            return replace(answer, state=mean)

        return await relay(self.over.server(state, round), normalised)

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        taus: list[float] = []

        async def counted(asked: Any) -> Any:
            done = await asked
            if isinstance(asked, Work):
                taus.append(done.lr_sum)
            return done

        sent, kept = await relay(self.over.client(received, own, visit), counted)
        tau = taus[0]  # of the first work, which trains what is sent

        def normalised(role: str, group: Group) -> Group:
            return {s: (x - received[role][s]) / tau if tau else torch.zeros_like(x) for s, x in group.items()}

        d = {f"nova_{role}": normalised(role, group) for role, group in sent.items()}
        return d | {"nova_tau": {"sum": torch.tensor([tau])}}, kept

    def spread(self, upload: State, received: State, visit: Visit) -> State:
        return self.over.spread(_changes(upload), received, visit) | only(upload, "nova_tau")


def _changes(upload: State) -> State:
    """d_k under the names that the method below knows."""
    return {role.removeprefix("nova_"): group for role, group in upload.items() if role != "nova_tau"}
