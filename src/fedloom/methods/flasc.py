"""FLASC: only the largest entries of the adapter go down, only the largest changes come up; local training is dense.

Kuo, Raje, Rajesh, Smith, "Federated LoRA with Sparse Communication", arXiv 2406.05233; their public code at rank 4^2. A client
starts at P m with m = top-k of |P| over all layers, trains all of it, and sends the top-k of what it changed, without error
feedback: P <- P + (1/K) sum_k top-k(Delta_k). The model in use is P m. The authors' server puts the mean change through Adam:
`fedadam` over this method does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt, Le
from torch.nn.functional import pad

from fedloom import lora
from fedloom.core import Client, Each, Round, Visit, Work
from fedloom.methods.base import LoRA
from fedloom.spec import Spec, like
from fedloom.state import Group, Sites, State, only


@dataclass(frozen=True, kw_only=True)
class FLASC(LoRA):
    """Sparse both ways: roles `top` and `change` hold the values that are sent and a bit for every entry of A and B.

    Masks are of A and B together; the head goes whole (reading: the authors' upload mask covers it too).
    """

    down: Annotated[float, Gt(0), Le(1)] = 0.25
    """Share of the entries of A and B that clients receive, the largest ones. While B is near zero most of them are of A."""
    up: Annotated[float, Gt(0), Le(1)] = 0.25
    """Share of the changes that they send, the largest ones."""

    name: ClassVar[str] = "flasc"
    paper: ClassVar[str] = "Kuo et al., Federated LoRA with Sparse Communication, arXiv 2406.05233"
    group: ClassVar[str] = "sparse"

    async def server(self, state: State, round: Round) -> State:
        sent = self.serve(state, round.clients[0])
        example = {"change": pack(only(state, "A", "B"), self.up)}  # of the size of an upload

        def expects(client: Client, sent: State) -> Spec:
            return like(example, "change") | like(sent, "head")

        mean = lora.Mean()
        # Clients count alike, as in the authors' code.
        for upload in await Each(send=lambda client: sent, expects=expects, weight=lambda client: 1.0):
            change = unpack(upload.state["change"], round.sites, self.rank)
            mean.add(change | only(upload.state, "head"), upload.weight)
        moved = {r: {s: x + mean.value[r][s] for s, x in state[r].items()} for r in ("A", "B")}
        return state | moved | only(mean.value, "head")

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        work = self.model(received, own, visit)
        done = await work
        change = {r: {s: x - work.train[r][s] for s, x in done.state[r].items()} for r in ("A", "B")}
        return {"change": pack(change, self.up)} | only(done.state, "head"), {}

    def serve(self, state: State, client: Client) -> State:
        return {"top": pack(only(state, "A", "B"), self.down)} | only(state, "head")

    def model(self, received: State, own: State, visit: Visit) -> Work:
        train = unpack(received["top"], visit.sites, self.rank) | only(received, "head")
        return Work(train=train, scale=self.scale)


def pack(state: State, share: float) -> Group:
    """The largest entries of A and B, sites in sorted order: values (k,), and a bit for every entry, (n / 8,) bytes."""
    flat = torch.cat([x.flatten() for role in ("A", "B") for _, x in sorted(state[role].items())])
    k = max(1, int(flat.numel() * share))
    where = torch.zeros(flat.numel(), dtype=torch.bool)
    where[flat.abs().topk(k).indices] = True
    bits = pad(where, (0, -flat.numel() % 8)).view(-1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)
    return {"values": flat[where], "where": bits.sum(dim=1, dtype=torch.uint8)}


def unpack(sent: Group, sites: Sites, rank: int) -> State:
    """Inverse of `pack`, zero elsewhere. Bits that do not match the values in number, which no client sends, name no more."""
    values, packed = sent["values"], sent["where"]
    shapes = [("A", s, (rank, n)) for s, (_, n) in sorted(sites.items())]
    shapes += [("B", s, (m, rank)) for s, (m, _) in sorted(sites.items())]
    where = (packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten().nonzero().squeeze(1)
    sizes = [torch.Size(shape).numel() for _, _, shape in shapes]
    where = where[where < sum(sizes)][: len(values)]
    flat = values.new_zeros(sum(sizes)).index_put((where,), values[: len(where)])
    made: State = {"A": {}, "B": {}}
    for (role, site, shape), part in zip(shapes, torch.split(flat, sizes), strict=True):
        made[role][site] = part.view(shape)
    return made
