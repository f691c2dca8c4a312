"""SCAFFOLD: control variates correct the drift of local training.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, arXiv 1910.06378,
algorithm 1: every local gradient gets c - c_k, then c_k becomes the client's gradient, and the server adds (1/N) sum of the
changes of c_k to c. Option I takes that gradient at the server's model, in one more pass; option II is
c_k - c + (x - y_k) / (sum of learning rates), the mean of the steps' gradients. Clients count alike, as in the paper.

The paper has SGD. With AdamW the same correction enters its gradient (reading), and option II is no gradient at all: its
entries are of the size of Adam's steps, so option I is the default.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from fedloom import lora
from fedloom.core import Averaged, Client, Exchange, Round, Trained, Upload, Visit, Work
from fedloom.flows import Over, need_fixed_sizes, need_whole, relay
from fedloom.spec import like
from fedloom.state import State, only, zeros_like

ROLES = ("A", "B", "head")
"""What is controlled, where a work trains it."""


@dataclass(frozen=True, kw_only=True)
class Scaffold(Over):
    """Control variates for A, B and the head: roles `c_A`, ... of the server, sent to clients; each keeps its own."""

    variate: Literal["gradient", "steps"] = "gradient"
    """`gradient`: option I, a gradient at the server's model. `steps`: option II, from the local steps; for SGD alone."""
    batches: Annotated[int, Ge(1)] = 4
    """How many of its batches a client takes that gradient over."""

    name: ClassVar[str] = "scaffold"
    paper: ClassVar[str] = "Karimireddy et al., SCAFFOLD, arXiv 1910.06378"
    group: ClassVar[str] = "local training"
    adds: ClassVar[tuple[str, ...]] = ("c_",)

    def __post_init__(self) -> None:
        super().__post_init__()
        need_fixed_sizes(self)

    def check(self, client: Client) -> None:
        super().check(client)
        need_whole(self, client)

    async def server(self, state: State, round: Round) -> State:
        c = self.mine(state) or {f"c_{role}": x for role, x in zeros_like(only(state, *ROLES)).items()}
        changes = lora.Mean()

        async def controlled(x: Exchange[Any]) -> Any:
            answer = await replace(
                x,
                send=lambda client: x.send(client) | c,
                expects=lambda client, sent: x.expects(client, self.inner(sent)) | like(c),
                lift=lambda client, upload: x.lift(client, self.inner(upload)) | self.mine(upload),
                weight=lambda client: 1.0,
            )
            if isinstance(answer, Averaged):
                changes.add(self.mine(answer.state), float(len(answer.clients)))
                return replace(answer, state=self.inner(answer.state))
            return self._each(answer, changes)

        after = await relay(self.over.server(self.inner(state), round), controlled)
        share = changes.weight / round.federation
        moved = {
            role: {site: x + share * changes.value[role][site] for site, x in group.items()}
            for role, group in c.items()
            if role in changes.value
        }
        return after | c | moved

    def _each(self, uploads: Iterator[Upload], changes: lora.Mean) -> Iterator[Upload]:
        for upload in uploads:
            changes.add(self.mine(upload.state), 1.0)
            yield replace(upload, state=self.inner(upload.state))

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        c = self.mine(received)
        mine = self.mine(own) or zeros_like(c)
        change = zeros_like(c)

        async def corrected(work: Work) -> Any:
            controlled = [role for role in work.train if f"c_{role}" in c]
            shift = {f"c_{r}": {s: c[f"c_{r}"][s] - mine[f"c_{r}"][s] for s in work.train[r]} for r in controlled}
            if not shift:
                return await work
            at_server = None if self.variate == "steps" else await self._gradient(work, controlled)
            done: Trained = await replace(work, fixed=work.fixed | shift, penalties=(*work.penalties, _linear))
            if at_server is None:  # the mean of the corrected gradients is that of the client's, plus c - c_k
                at_server = _added(_slope(work, done, controlled), shift, -1.0)
            for r in controlled:
                for s, x in at_server[r].items():
                    change[f"c_{r}"][s] = x - mine[f"c_{r}"][s]
            return done

        inner = self.over.client(self.inner(received), self.inner(own), visit)
        sent, kept = await relay(inner, corrected)
        after = {role: {s: mine[role][s] + x for s, x in group.items()} for role, group in change.items()}
        return sent | change, kept | after

    async def _gradient(self, work: Work, roles: Iterable[str]) -> State:
        """Mean gradient of the client's loss at the server's model, by single steps of SGD that lead nowhere."""
        mean = lora.Mean()
        for _ in range(self.batches):
            done: Trained = await replace(work, steps=1, optimizer="sgd")
            mean.add(_slope(work, done, roles), 1.0)
        return mean.value


def _slope(work: Work, done: Trained, roles: Iterable[str]) -> State:
    """(x - y) / (sum of learning rates); zero where nothing could move."""
    return {r: {s: (x - done.state[r][s]) / (done.lr_sum or 1.0) for s, x in work.train[r].items()} for r in roles}


def _added(state: State, shift: State, factor: float) -> State:
    return {r: {s: x + factor * shift[f"c_{r}"][s] for s, x in group.items()} for r, group in state.items()}


def _linear(train: State, fixed: State) -> Tensor:
    """<x, c - c_k>: its gradient is the correction."""
    terms = [
        (x * fixed[f"c_{role}"][site]).sum()
        for role, group in train.items()
        if f"c_{role}" in fixed
        for site, x in group.items()
    ]
    return torch.stack(terms).sum()
