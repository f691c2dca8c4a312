"""A method with two exchanges a round, for tests: the least that a visit across exchanges needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedloom import lora
from fedloom.core import Mean, Round, Send, Visit, Work
from fedloom.methods.base import LoRA
from fedloom.rng import generator
from fedloom.spec import Leaf, like
from fedloom.state import State, only, without


@dataclass(frozen=True, kw_only=True)
class FedASK(LoRA):
    """After FedASK, arXiv 2507.09990: the leading singular triplets of D = sum_k p_k B_k A_k by a randomised range finder in
    two exchanges, in which the server sees no more than two weighted sums: Y = D Omega, then Z = D^T Q."""

    oversample: int = 4

    name: ClassVar[str] = "fedask"
    paper: ClassVar[str] = "FedASK, arXiv 2507.09990"

    async def server(self, state: State, round: Round) -> State:
        q = self.rank + self.oversample
        dtype = next(iter(state["A"].values())).dtype
        omega = {
            site: torch.randn(n, q, generator=generator("omega", round.t, site)).to(dtype)
            for site, (_, n) in round.sites.items()
        }
        sketch = await Mean(
            send=lambda client: only(state, "A", "B", "head") | {"omega": omega},
            expects=lambda client, sent: (
                like(sent, "head") | {"Y": {site: Leaf((m, q), dtype) for site, (m, _) in round.sites.items()}}
            ),
        )
        Q = {site: torch.linalg.qr(Y)[0] for site, Y in sketch.state["Y"].items()}
        back = await Mean(
            send=lambda client: {"Q": Q},
            expects=lambda client, sent: {
                "Z": {site: Leaf((n, Q[site].shape[1]), dtype) for site, (_, n) in round.sites.items()}
            },
        )
        A, B = {}, {}
        for site, Z in back.state["Z"].items():  # D is close to Q Z^T
            U, S, Vh = lora.svd(Q[site], Z.T.contiguous())
            A[site], B[site] = Vh[: self.rank], U[:, : self.rank] * S[: self.rank]
        return state | only(sketch.state, "head") | {"A": A, "B": B}

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        done = await Work(without(received, "omega"), scale=self.scale)
        A, B, omega = done.state["A"], done.state["B"], received["omega"]
        answer = await Send(only(done.state, "head") | {"Y": {s: B[s] @ (A[s] @ omega[s]) for s in A}})
        return {"Z": {s: A[s].T @ (B[s].T @ answer["Q"][s]) for s in A}}, {}
