"""FedAWA: the weights of the mean are learnt on the server, from the clients' changes alone.

Shi, Zhao, Zhang, Zhou, Guo, Chang, "FedAWA: Adaptive Optimization of Aggregation Weights in Federated Learning Using Client
Vectors", CVPR 2025, arXiv 2503.15842; rule and defaults as two ports of the authors' code have them. With tau_k = x_k - x the
client vectors and p = softmax(T), a few steps of Adam on T lower
    sum_k p_k (1 - cos(x, x_k)) + sum_k p_k ||tau_k - sum_j p_j tau_j||,
and the mean is sum_k p_k x_k. T_k starts at the client's share of the examples, so that p is nearly uniform at first, and
lasts; Adam's moments do not. Here x is A, B and the head, as the server averages them (reading: the paper trains whole models).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from fedloom.core import Averaged, Each, Mean, Round, Upload
from fedloom.flows import Over, averaged, need_mean, need_trained, relay, untrained
from fedloom.state import Group, State


@dataclass(frozen=True, kw_only=True)
class FedAWA(Over):
    """Clients whose change agrees with the others' weigh more, more so in every round. T is kept by client, role `awa_T`."""

    steps: Annotated[int, Ge(1)] = 1
    """Steps of Adam a round: each moves T by about `lr`."""
    lr: Annotated[float, Gt(0)] = 1e-3
    """Adam's learning rate, with betas 0.5 and 0.999."""

    name: ClassVar[str] = "fedawa"
    paper: ClassVar[str] = "Shi et al., FedAWA: Adaptive Optimization of Aggregation Weights, arXiv 2503.15842"
    group: ClassVar[str] = "learnt weights"
    adds: ClassVar[tuple[str, ...]] = ("awa_",)

    def __post_init__(self) -> None:
        super().__post_init__()
        need_mean(self)
        need_trained(self, "a client vector")

    async def server(self, state: State, round: Round) -> State:
        T: Group = dict(state.get("awa_T", {}))

        async def weighed(x: Any) -> Any:
            if not isinstance(x, Mean):
                return await x
            uploads = list(await Each(x.send, x.expects, x.lift, x.weight))
            starts = [x.lift(upload.client, untrained(x, upload.client)) for upload in uploads]
            return self._mean(uploads, starts, T)

        after = await relay(self.over.server(self.inner(state), round), weighed)
        return after | {"awa_T": T}

    def _mean(self, uploads: Sequence[Upload], starts: Sequence[State], T: Group) -> Averaged:
        """The weighted mean; T is brought up to date."""
        examples = sum(upload.client.examples for upload in uploads)
        first = [T.get(u.client.id, torch.tensor(u.client.examples / examples)) for u in uploads]
        learnt = self._learnt(torch.stack(first), *_geometry(uploads, starts))
        p = learnt.softmax(0).tolist()
        T |= {upload.client.id: t.clone() for upload, t in zip(uploads, learnt, strict=True)}
        return averaged(replace(upload, weight=weight) for upload, weight in zip(uploads, p, strict=True))

    def _learnt(self, T: Tensor, gram: Tensor, apart: Tensor) -> Tensor:
        """T (K,) after the steps, from the Gram matrix (K, K) of the client vectors and 1 - cos(x, x_k) (K,)."""
        T = T.detach().clone().requires_grad_()
        adam = torch.optim.Adam([T], lr=self.lr, betas=(0.5, 0.999))
        for _ in range(self.steps):
            p = T.double().softmax(0)
            square = gram.diagonal() - 2 * gram @ p + p @ gram @ p
            loss = (p * apart).sum() + (p * square.clamp_min(1e-24).sqrt()).sum()
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
        return T.detach()


def _geometry(uploads: Sequence[Upload], starts: Sequence[State]) -> tuple[Tensor, Tensor]:
    """The Gram matrix of the client vectors and the cosine distances of the clients from where they started, in float64."""
    K = len(uploads)
    gram, dot, now, then = (torch.zeros(size, dtype=torch.float64) for size in ((K, K), K, K, K))
    for role, group in uploads[0].state.items():
        for site in group:
            x = torch.stack([upload.state[role][site].flatten() for upload in uploads]).double()
            start = torch.stack([state[role][site].flatten() for state in starts]).double()
            tau = x - start
            gram += tau @ tau.T
            dot, now, then = dot + (x * start).sum(1), now + x.square().sum(1), then + start.square().sum(1)
    return gram, 1 - dot / (now * then).sqrt().clamp_min(1e-8)
