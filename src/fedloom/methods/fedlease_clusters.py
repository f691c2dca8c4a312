"""The clustering of FedLEASE, without its router: clients whose B point the same way share an adapter.

Wang et al., "Adaptive LoRA Experts Allocation and Selection for Federated Fine-Tuning" (FedLEASE), NeurIPS 2025. After some
local training without averaging, the distance of two clients is the mean over layers of 1 - cos(B_j, B_k); average linkage
cuts them into the number of clusters, 2 to M, of the best silhouette; a cluster's expert starts as the plain mean of its
clients' adapters, and from then on is trained and averaged by them alone.

This is a part of FedLEASE: there each client also weighs all experts by a router that it learns; here it uses its cluster's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from fedloom import lora
from fedloom.core import Client, Each, Round, Upload, Visit, Work
from fedloom.methods.base import LoRA
from fedloom.spec import like
from fedloom.state import Group, State, only


@dataclass(frozen=True, kw_only=True)
class FedLEASEClusters(LoRA):
    """Server state: the start (A, B), every client's cluster, and the experts (`A0`, `B0`, `A1`, ...).

    Clusters are made of the clients of the first round and stay. A client that comes later trains from the start too and joins
    the cluster of the nearest expert (reading: in the paper all clients take part in every round). The head stays with the
    client (the official code trains it in the warm-up alone).
    """

    warmup: Annotated[int, Ge(1)] = 5
    """How many times a new client trains on its own, each as long as a round's local training, before it is placed."""
    most: Annotated[int, Ge(1)] = 4
    """M: the largest number of clusters."""

    name: ClassVar[str] = "fedlease_clusters"
    paper: ClassVar[str] = "Wang et al., Adaptive LoRA Experts Allocation and Selection (its clustering), NeurIPS 2025"
    group: ClassVar[str] = "personal"
    personal_models = True
    serves_personal_models = True

    async def server(self, state: State, round: Round) -> State:
        cluster: Group = dict(state.get("cluster", {}))
        experts: dict[int, lora.Mean] = {}
        new: list[Upload] = []
        for upload in await Each(
            send=lambda client: self._sent(state, client), expects=lambda client, sent: like(sent, "A", "B")
        ):
            if upload.client.id in cluster:
                experts.setdefault(int(cluster[upload.client.id]), lora.Mean()).add(upload.state, 1.0)
            else:
                new.append(upload)
        if "cluster" in state:
            placed = {upload.client.id: nearest(upload.state["B"], _experts(state)) for upload in new}
        else:
            labels = clusters(distances([upload.state["B"] for upload in new]), self.most)
            placed = {upload.client.id: label for upload, label in zip(new, labels, strict=True)}
            for upload in new:
                experts.setdefault(placed[upload.client.id], lora.Mean()).add(upload.state, 1.0)
        after = state | {f"{role}{k}": group for k, mean in experts.items() for role, group in mean.value.items()}
        return after | {"cluster": cluster | {key: torch.tensor(k) for key, k in placed.items()}}

    def _sent(self, state: State, client: Client) -> State:
        placed = client.id in state.get("cluster", {})
        return self.serve(state, client) | ({} if placed else {"new": {"times": torch.tensor(self.warmup)}})

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        sent, kept = only(received, "A", "B"), own
        for _ in range(int(received["new"]["times"]) if "new" in received else 1):
            done = await self.model(sent, kept, visit)
            sent, kept = only(done.state, "A", "B"), only(done.state, "head")
        return sent, kept

    def serve(self, state: State, client: Client) -> State:
        at = state.get("cluster", {}).get(client.id)
        k = "" if at is None else str(int(at))
        return {"A": state[f"A{k}"], "B": state[f"B{k}"]}

    def model(self, received: State, own: State, visit: Visit) -> Work:
        return Work(train=only(received, "A", "B") | only(own, "head"), scale=self.scale)


def _experts(state: State) -> list[Group]:
    count = 1 + max(int(k) for k in state["cluster"].values())
    return [state[f"B{k}"] for k in range(count)]


def distances(Bs: Sequence[Group]) -> Tensor:
    """(n, n): the mean over layers of 1 - cos of the flattened B of two clients."""
    total = torch.zeros(len(Bs), len(Bs), dtype=torch.float64)
    for site in Bs[0]:
        X = torch.stack([B[site].flatten() for B in Bs])
        # As the official code: a B of zeros is at distance 1 from all.
        X = X / (X.norm(dim=1, keepdim=True) + 1e-8)
        total += 1 - (X @ X.T).double()
    return total / len(Bs[0])


def nearest(B: Group, experts: Sequence[Group]) -> int:
    """The expert at the least distance; the first of equals."""
    return int(distances([B, *experts])[0, 1:].argmin())


def clusters(distance: Tensor, most: int) -> list[int]:
    """A label for each of n clients from their distances (n, n): average linkage, cut where the silhouette is best.

    One cluster where there is nothing to choose: fewer than three clients, or `most` is 1.
    """
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    n = len(distance)
    D = distance.clamp_min(0).fill_diagonal_(0).numpy()
    best: tuple[float, list[int]] = (-np.inf, [0] * n)
    for k in range(2, min(most, n - 1) + 1):
        made = AgglomerativeClustering(n_clusters=k, metric="precomputed", linkage="average").fit_predict(D)
        score = float(silhouette_score(D, made, metric="precomputed"))
        if score > best[0]:
            best = score, [int(label) for label in made]
    return best[1]
