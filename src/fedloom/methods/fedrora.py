"""FedRoRA: unit directions shared, magnitudes of its own for every client, which the server finds by projection.

Wang, Bian, Zhang, Xu, "Breaking the Structural Identity: Personalized Federated LoRA under Rank Heterogeneity", 2026.
Client i trains dW_i = B_i diag(s_i) A_i, columns of B_i and rows of A_i kept at length one, and sends the three. The server
takes the SVD of sum_i p_i dW_i = U S V', projects every client's update on its directions, s_k^(i) = u_k' dW_i v_k, and gives
client i the r_i directions on which its own update is largest: U[:, T_i], V[:, T_i]', s^(i)[T_i]. The p-weighted mean of s^(i)
is S. No (out, in) matrix is formed: s^(i) is the row sums of (U' B_i diag(s_i)) * (A_i V)'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from fedloom import dora, lora
from fedloom.core import Client, Each, Factors, Round, Visit, Work
from fedloom.methods.base import LoRA
from fedloom.spec import Spec, like
from fedloom.state import Group, Sites, State, only

OF_A, OF_B = dora.AXES["rank"]
"""Dimensions that the norm of a rank is taken over."""


@dataclass(frozen=True, kw_only=True)
class FedRoRA(LoRA):
    """Every client ends with a model of its own. The paper has no scale: alpha = rank is its setting.

    Server state: A = V' and B = U at the largest rank, role `s` the singular values, role `s:<client>` its projections.
    """

    top: Literal["magnitude", "signed"] = "magnitude"
    """Which projections count as largest. `signed` as in the paper, where a large negative one is never chosen."""
    lr_ratio: Annotated[float, Gt(0)] = 100.0
    """Rate of the magnitudes over that of the directions, with AdamW; with SGD give its square root."""
    train_head: bool = False
    """The paper freezes one common task head; train it, averaged, to compare with methods that do."""

    name: ClassVar[str] = "fedrora"
    paper: ClassVar[str] = "Wang et al., Breaking the Structural Identity: Personalized Federated LoRA, 2026"
    group: ClassVar[str] = "personal"
    budgets: ClassVar[frozenset[str]] = frozenset({"rank"})
    personal_models = True
    serves_personal_models = True

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        # Random directions at magnitude zero: no change, and the magnitudes have a gradient (the source is silent).
        A = {site: torch.randn(self.rank, n, generator=rng) for site, (_, n) in sites.items()}
        B = {site: torch.randn(m, self.rank, generator=rng) for site, (m, _) in sites.items()}
        return _unit({"A": A, "B": B}) | {"s": {site: torch.zeros(self.rank) for site in sites}}

    async def server(self, state: State, round: Round) -> State:
        uploads = list(await Each(send=lambda client: self.serve(state, client), expects=self._expects))
        total = sum(upload.weight for upload in uploads)
        head = lora.Mean()
        for upload in uploads:
            head.add(only(upload.state, "head"), upload.weight)
        # Who was absent keeps what the server last had of it, in the new directions (the source is silent).
        updates = {role: only(state, "A", "B") | {"s": s} for role, s in state.items() if role.startswith("s:")}
        updates |= {f"s:{upload.client.id}": upload.state for upload in uploads}
        after: State = {role: {} for role in ("A", "B", "s", *updates)}
        for site, A in state["A"].items():
            stack = lora.Stack()
            for upload in uploads:
                x = upload.state
                stack.add(x["B"][site] * x["s"][site], x["A"][site], upload.weight / total)
            U, S, Vh = lora.svd(*stack.factors())
            q = min(self.rank, len(S))
            U, S, Vh = U[:, :q], S[:q], Vh[:q]
            # Directions that this round's clients could not fill keep the last ones, at magnitude zero.
            after["A"][site] = torch.cat([Vh, A[q:]])
            after["B"][site] = torch.cat([U, state["B"][site][:, q:]], dim=1)
            after["s"][site] = torch.cat([S, S.new_zeros(self.rank - q)])
            for role, x in updates.items():
                s = projections(U, Vh, x["B"][site] * x["s"][site], x["A"][site])
                after[role][site] = torch.cat([s, s.new_zeros(self.rank - q)])
        return state | after | head.value

    def _expects(self, client: Client, sent: State) -> Spec:
        return like(sent, "A", "B", "s", *self._head)

    @property
    def _head(self) -> tuple[str, ...]:
        return ("head",) if self.train_head else ()

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        done = (await self.model(received, own, visit)).state
        s = {site: x + self.lr_ratio * done["gain"][site] for site, x in received["s"].items()}
        return _unit(only(done, "A", "B")) | {"s": s} | only(done, "head"), {}

    def serve(self, state: State, client: Client) -> State:
        # Whoever the server knows nothing of gets the leading directions of all.
        own = state.get(f"s:{client.id}", state["s"])
        sent: State = {"A": {}, "B": {}, "s": {}}
        for site, s in own.items():
            order = (s.abs() if self.top == "magnitude" else s).sort(descending=True, stable=True).indices
            chosen = order[: client.rank].sort().values
            sent["A"][site] = state["A"][site][chosen]
            sent["B"][site] = state["B"][site][:, chosen]
            sent["s"][site] = s[chosen]
        return sent | only(state, "head")

    def model(self, received: State, own: State, visit: Visit) -> Work:
        # s + lr_ratio * gain: a step of AdamW does not depend on the size of the gradient, so s moves lr_ratio times as fast.
        gain = {site: torch.zeros_like(s) for site, s in received["s"].items()}
        return Work(
            train=only(received, "A", "B", *self._head) | {"gain": gain},
            fixed=only(received, "s") | ({} if self.train_head else only(received, "head")),
            scale=self.scale,
            adapter=self._adapter,
        )

    def _adapter(self, train: State, fixed: State) -> Factors:
        made = _unit(only(train, "A", "B"))
        B = {site: x * (fixed["s"][site] + self.lr_ratio * train["gain"][site]) for site, x in made["B"].items()}
        return Factors(made["A"], B)


def projections(U: Tensor, Vh: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """u_k' B A v_k for every k, O((out + in) r q)."""
    return ((U.T @ B) * (Vh @ A.T)).sum(1)


def _unit(factors: State) -> State:
    A: Group = {site: dora.unit(x, OF_A) for site, x in factors["A"].items()}
    return {"A": A, "B": {site: dora.unit(x, OF_B) for site, x in factors["B"].items()}}
