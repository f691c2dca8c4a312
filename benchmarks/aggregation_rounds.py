"""(e) What a method does with factors on the server, against the dense product, for a 7B model's q and v projections.

    python benchmarks/aggregation_rounds.py [--size 4096] [--clients 10] [--rank 16] [--repeats 3] [--only flexlora]

One site is 4096 x 4096; a 7B model has 64 of them. A round is played with clients whose training costs nothing: the server's
work, and what clients do besides training. The dense way, timed once, forms sum_k p_k s_k B_k A_k and what the method's
definition makes of it. Both start from the same uploads, and the models that result are compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from machine import describe
from torch import Tensor

from fedloom import lora, methods
from fedloom.core import Averaged, Client, Each, Mean, Method, Round, Send, State, Trained, Upload, Visit, Work
from fedloom.methods.fed_sb import leading
from fedloom.rng import generator

Ends = dict[str, State]
"""Client id -> the factors it trains to."""


def trained(size: int, clients: list[Client], rank: int) -> Ends:
    """Clients' factors near a common pair, as after some local training."""
    rng = generator("benchmark")
    A, B = lora.init_A({"q": (size, size)}, rank, rng)["q"], torch.randn(size, rank, generator=rng) / size

    def near(x: Tensor) -> Tensor:
        return x + 0.1 * x.std() * torch.randn(x.shape, generator=rng)

    return {client.id: {"A": {"q": near(A)}, "B": {"q": near(B)}} for client in clients}


def play(method: Method, state: State, clients: list[Client], ends: Ends, t: int = 2) -> State:
    """A round in which clients train to what is given, without an engine."""
    sites = {"q": (len(next(iter(ends.values()))["B"]["q"]), next(iter(ends.values()))["A"]["q"].shape[1])}
    server, flows, answer = method.server(state, Round(t, tuple(clients), len(clients), sites)), {}, None
    while True:
        try:
            x = server.send(answer)
        except StopIteration as stop:
            new: State = stop.value
            return new
        lifted = []
        for client in clients:
            told: Any = x.send(client)
            if client.id not in flows:
                flows[client.id], told = method.client(told, {}, Visit(t, client, sites)), None
            sent = upload(flows[client.id], told, ends[client.id])
            lifted.append(Upload(client, x.lift(client, sent), x.weight(client)))
        if isinstance(x, Each):
            answer = iter(lifted)
            continue
        assert isinstance(x, Mean)
        mean = lora.Mean()
        for one in lifted:
            mean.add(one.state, one.weight)
        answer = Averaged(mean.value, tuple(clients), mean.weight)


def upload(flow: Any, told: Any, end: State) -> State:
    """What a client's coroutine sends next, its works answered with `end`."""
    try:
        asked = flow.send(told)
        while isinstance(asked, Work):
            asked = flow.send(Trained({role: end[role] for role in asked.train}, 1, 1.0, 0.0))
        assert isinstance(asked, Send)
        return asked.state
    except StopIteration as stop:
        return stop.value[0]  # type: ignore[no-any-return]


def model(method: Method, state: State, client: Client, sites: dict[str, tuple[int, int]]) -> Tensor:
    """What the next model adds to the frozen weight, dense."""
    work = method.model(method.serve(state, client), {}, Visit(2, client, sites))
    A, B, _ = work.adapter(work.train, work.fixed)
    delta = work.scale * B["q"] @ A["q"]
    if "q" in work.base.get("left", {}):
        right = work.base.get("right", {}).get("q")
        delta = delta + (work.base["left"]["q"] if right is None else work.base["left"]["q"] @ right)
    return delta


class Dense:
    """The methods' definitions on dense products."""

    def __init__(self, clients: list[Client], ends: Ends, rank: int, scale: float) -> None:
        total = sum(client.examples for client in clients)
        self.p = {client.id: client.examples / total for client in clients}
        self.ends, self.rank, self.scale = ends, rank, scale

    def mean(self, role: str) -> Tensor:
        return torch.stack([q * self.ends[key][role]["q"] for key, q in self.p.items()]).sum(0)

    def product(self) -> Tensor:
        D = torch.zeros(len(self.mean("B")), self.mean("A").shape[1])
        for key, q in self.p.items():
            D.addmm_(self.ends[key]["B"]["q"], self.ends[key]["A"]["q"], alpha=q * self.scale)
        return D

    def truncated(self, D: Tensor) -> Tensor:
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
        return (U[:, : self.rank] * S[: self.rank]) @ Vh[: self.rank]

    def best(self) -> Tensor:
        """FlexLoRA and FedASK."""
        return self.truncated(self.product())

    def exact(self) -> Tensor:
        """FedEx-LoRA: the residual, added to the product of the means."""
        both = self.scale * self.mean("B") @ self.mean("A")
        return both + (self.product() - both)

    def aligned(self, weight: float, steps: int) -> Tensor:
        """LoRA-FAIR, with the same steps. Sums over so many numbers need float64: a small error of the norm makes B drift."""
        D, A, B = self.product(), self.mean("A"), self.mean("B")
        X, size = torch.zeros_like(B), float(torch.linalg.vector_norm(D, dtype=torch.float64))
        step = (B @ A).square().sum() / torch.linalg.matrix_norm(A, 2) ** 2
        for _ in range(steps):
            P = (B + X) @ A
            norm = float(torch.linalg.vector_norm(P, dtype=torch.float64))
            fit = float((D * P).sum(dtype=torch.float64))
            X = X + step * (D / norm - fit * P / norm**3) @ A.T / size
            X = X * (1 - step * weight / X.norm().clamp_min(1e-30)).clamp_min(0)
        return self.scale * (B + X) @ A

    def turned(self, A: Tensor) -> Tensor:
        """FedSVD at this A: the SVD of the product, which loses nothing."""
        return self.truncated(self.scale * self.mean("B") @ A)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", action="append", default=[])
    asked = parser.parse_args()
    print(describe())
    sites = {"q": (asked.size, asked.size)}
    clients = [Client(f"{k:03d}", 100 + k, asked.rank) for k in range(asked.clients)]
    ends = trained(asked.size, clients, asked.rank)
    dense = Dense(clients, ends, asked.rank, lora.scale(16.0, asked.rank))
    print(
        f"{asked.clients} clients, rank {asked.rank}, one {asked.size} x {asked.size} site; median of {asked.repeats} runs"
    )

    def A_of(method: Method, state: State) -> Tensor:
        return method.model(method.serve(state, clients[0]), {}, Visit(2, clients[0], sites)).fixed["A"]["q"]

    lines: dict[str, tuple[dict[str, Any], Callable[[Method, State], Tensor]]] = {
        "flexlora": ({}, lambda method, state: dense.best()),
        "fedex_lora": ({}, lambda method, state: dense.exact()),
        # Ten steps: a hundred dense ones take minutes.
        "lora_fair": ({"weight": 1e-3, "steps": 10}, lambda method, state: dense.aligned(1e-3, 10)),
        "fedsvd": ({}, lambda method, state: dense.turned(A_of(method, state))),
        "fedask": ({"oversample": asked.rank}, lambda method, state: dense.best()),
    }
    for name, (fields, definition) in lines.items():
        if asked.only and name not in asked.only:
            continue
        method = methods.build({"name": name, **fields}, {"rank": asked.rank, "alpha": 16.0})
        state = method.init(sites, generator("init"))
        once = partial(play, method, state, clients, ends)
        found = once()
        times = sorted(seconds(once) for _ in range(asked.repeats))
        start = time.perf_counter()
        want = definition(method, state)
        slow, fast = time.perf_counter() - start, times[len(times) // 2]
        apart = float((model(method, found, clients[0], sites) - want).norm() / want.norm())
        print(
            f"{name}: factors {fast * 1e3:.1f} ms, dense {slow * 1e3:.0f} ms a site: {slow / fast:.0f} times faster; "
            f"relative difference {apart:.1e}"
        )
    if not asked.only or "fed_sb" in asked.only:
        G = dense.product().sign()
        fast = seconds(lambda: leading(G, asked.rank, generator("svd")))
        slow = seconds(lambda: dense.truncated(G))
        print(f"fed_sb, once: leading triplets {fast * 1e3:.0f} ms, dense SVD {slow * 1e3:.0f} ms a site")


if __name__ == "__main__":
    main()
