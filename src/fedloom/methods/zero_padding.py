"""Factors of unequal rank averaged: missing ranks count as zero, or are filled with the average of those who hold them.

Zero padding is the common baseline, which often goes by the name of HetLoRA (Cho et al., arXiv 2401.06432, who weigh and prune
besides): A <- sum_k p_k pad(A_k), B <- sum_k p_k pad(B_k), and a client gets the first r_k ranks. It shrinks rank i by pi_i,
the weight of the clients that hold it, in every round and in both factors.

Replication: Byun and Lee, "Towards Federated Low-Rank Adaptation of Language Models with Rank Heterogeneity", NAACL 2025, arXiv
2406.17477. The server averages the clients of high rank first, and fills the missing ranks of the others with that average;
which is to average each rank over those that hold it. (The paper gives its best tenth of clients by validation accuracy after
the first round rank 20 and the others rank 5: set clients.ranks.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import pad

from fedloom import slices
from fedloom.core import Client, Mean, Round, Visit
from fedloom.methods.base import LoRA
from fedloom.methods.holders import mean_of_holders
from fedloom.state import State, only


@dataclass(frozen=True, kw_only=True)
class ZeroPadding(LoRA):
    """Missing ranks count as zero. At equal ranks it is FedIT.

    All train at the scale of the largest rank: a client's model is the leading part of the global one.
    """

    name: ClassVar[str] = "zero_padding"
    paper: ClassVar[str] = "baseline of Cho et al., Heterogeneous LoRA for Federated Fine-tuning, arXiv 2401.06432"
    group: ClassVar[str] = "unequal ranks"
    budgets: ClassVar[frozenset[str]] = frozenset({"rank"})

    async def server(self, state: State, round: Round) -> State:
        mean = await Mean(
            send=lambda client: self.serve(state, client),
            lift=lambda client, upload: self._widened(upload) | self._held(upload, 1.0),
        )
        return state | self._averaged(mean.state, state)

    def _averaged(self, mean: State, before: State) -> State:
        counted = {site: (pi > 0).to(pi.dtype) for site, pi in mean["held"].items()}
        return mean_of_holders(mean | {"held": counted}, before)

    def _widened(self, upload: State) -> State:
        A = {site: pad(x, (0, 0, 0, self.rank - len(x))) for site, x in upload["A"].items()}
        B = {site: pad(x, (0, self.rank - x.shape[1])) for site, x in upload["B"].items()}
        return upload | {"A": A, "B": B}

    def _held(self, upload: State, value: float) -> State:
        """`value` for each rank that the upload holds, 0 for the others."""
        return {
            "held": {
                site: pad(x.new_full((len(x),), value), (0, self.rank - len(x))) for site, x in upload["A"].items()
            }
        }

    def spread(self, upload: State, received: State, visit: Visit) -> State:
        return self._widened(upload) | self._held(upload, 0.0)

    def serve(self, state: State, client: Client) -> State:
        return slices.take(only(state, "A", "B", "head"), slices.prefix(state, client.rank))


@dataclass(frozen=True, kw_only=True)
class ReplicationPadding(ZeroPadding):
    """Each rank is averaged over the clients that hold it. At equal ranks it is FedIT."""

    name: ClassVar[str] = "replication_padding"
    paper: ClassVar[str] = (
        "Byun and Lee, Towards Federated Low-Rank Adaptation with Rank Heterogeneity, arXiv 2406.17477"
    )
    group: ClassVar[str] = "unequal ranks"

    def _averaged(self, mean: State, before: State) -> State:
        return mean_of_holders(mean, before)
