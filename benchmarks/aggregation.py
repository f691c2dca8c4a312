"""(e) Aggregation through factors against the dense product, for a 7B model's q and v projections.

    python benchmarks/aggregation.py [--size 4096] [--clients 10] [--rank 16] [--repeats 3] [--methods flora,...] [--no-svd]

One site is 4096 x 4096; a 7B model has 64 of them. The dense way forms D = sum_k p_k s_k B_k A_k and, for methods that cut it,
its SVD. Both ways run on the same uploads, and their results are compared: the dense ones once, as they take seconds or
minutes; `--no-svd` leaves the dense SVD out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from machine import describe

from fedloom import lora
from fedloom.core import Client, Each, Method, Round, State, Upload, Visit
from fedloom.methods import build
from fedloom.rng import generator

T = TypeVar("T")

EXACT = ("flora", "fedex_lora", "fedmomentum")
"""Their model is D, whole."""
CUT = ("florist", "flexlora", "eclora", "raflora", "fedrora")
"""Theirs is its leading part, of the rank that they keep."""


def uploads(size: int, clients: int, rank: int) -> Iterator[tuple[Client, State]]:
    """Clients' factors near common ones, as after some local training, with the magnitudes that FedRoRA sends too."""
    rng = generator(0, "benchmark")
    A, B = lora.init_A({"q": (size, size)}, rank, rng)["q"], torch.randn(size, rank, generator=rng) / size

    def near(x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * x.std() * torch.randn(x.shape, generator=rng)

    for k in range(clients):
        yield (
            Client(f"{k:03d}", 100 + k, rank),
            {"A": {"q": near(A)}, "B": {"q": near(B)}, "s": {"q": torch.ones(rank)}},
        )


def aggregated(method: Method, state: State, sent: list[tuple[Client, State]]) -> State:
    """The server's next state: its coroutine driven by hand."""
    sites = {"q": (len(sent[0][1]["B"]["q"]), sent[0][1]["A"]["q"].shape[1])}
    flow = method.server(state, Round(1, tuple(client for client, _ in sent), len(sent), sites))
    asked = flow.send(None)
    assert isinstance(asked, Each)
    try:
        flow.send(iter([Upload(client, x, asked.weight(client)) for client, x in sent]))
    except StopIteration as stop:
        after: State = stop.value
        return after
    raise AssertionError("one exchange a round")


def model(method: Method, state: State, size: int, rank: int) -> torch.Tensor:
    """What the server's model adds to the frozen weight, dense."""
    asking = Client("server", 0, rank)
    work = method.model(method.serve(state, asking), {}, Visit(1, asking, {"q": (size, size)}))
    made = work.adapter(work.train, work.fixed)
    D = work.scale * (made.B["q"] @ made.A["q"])
    if "q" in work.base.get("left", {}):
        left, right = work.base["left"]["q"], work.base.get("right", {}).get("q")
        D = D + (left if right is None else left @ right)
    return D


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Wall time of one call, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", default=",".join(EXACT + CUT))
    parser.add_argument("--svd", action=argparse.BooleanOptionalAction, default=True)
    asked = parser.parse_args()
    chosen = asked.methods.split(",")
    size, rank = asked.size, asked.rank
    print(describe())
    print(f"{asked.clients} clients, rank {rank}, one {size} x {size} site; median of {asked.repeats} runs")
    sent = list(uploads(size, asked.clients, rank))
    total = sum(client.examples for client, _ in sent)

    def product() -> torch.Tensor:
        D = torch.zeros(size, size)
        for client, x in sent:
            D.addmm_(x["B"]["q"], x["A"]["q"], alpha=client.examples / total)
        return D

    product()  # once for the allocator
    dense_s, D = timed(product)
    print(f"dense sum of the products: {dense_s * 1e3:.0f} ms")
    if asked.svd and set(chosen) & {*CUT, "fedmomentum"}:
        svd_s, (U, S, Vh) = timed(lambda: torch.linalg.svd(D, full_matrices=False))
        print(f"dense SVD of it: {svd_s:.1f} s")
    for name in chosen:
        # Scale 1: alpha is the rank.
        table = {"name": name} | ({"energy": 1.0} if name == "fedmomentum" else {})
        method = build(table, {"rank": rank, "alpha": float(rank)})
        first = method.init({"q": (size, size)}, generator(0))
        aggregated(method, first, sent)
        runs = [timed(lambda m=method, state=first: aggregated(m, state, sent)) for _ in range(asked.repeats)]
        ours = sorted(s for s, _ in runs)[len(runs) // 2]
        if not asked.svd and name not in ("flora", "fedex_lora"):
            print(f"{name}: factors {ours * 1e3:.1f} ms")
            continue
        got = model(method, runs[-1][1], size, rank)
        want, dense = D, dense_s
        if name not in EXACT:
            kept = int(torch.linalg.matrix_rank(got[:, :256], tol=1e-6 * float(S[0]))) if name == "florist" else rank
            want = (U[:, :kept] * S[:kept]) @ Vh[:kept]
        if name not in ("flora", "fedex_lora"):
            dense += svd_s
        error = float((got - want).norm() / want.norm())
        print(
            f"{name}: factors {ours * 1e3:.1f} ms, dense {dense * 1e3:.0f} ms, {dense / ours:.0f} times; differs by {error:.0e}"
        )


if __name__ == "__main__":
    main()
