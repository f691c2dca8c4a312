"""(e) FlexLoRA and FedEx-LoRA aggregation through factors, against the dense product, for a 7B model's q and v projections.

    python benchmarks/aggregation.py [--size 4096] [--clients 10] [--rank 16] [--repeats 3]

One site is 4096 x 4096; a 7B model has 64 of them. The dense way forms sum_k p_k s_k B_k A_k and, for FlexLoRA, its SVD. Both
ways run side by side on the same uploads, and their results are compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from machine import describe

from fedloom import lora, methods
from fedloom.core import Client, State, Upload


def uploads(size: int, clients: int, rank: int) -> tuple[State, list[Upload]]:
    """A server state and clients' factors near it, as after some local training."""
    rng = lora.generator(0, "benchmark")
    state = lora.init({"q": (size, size)}, rank, rng)
    state["B"]["q"] = torch.randn(size, rank, generator=rng) / size

    def near(x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * x.std() * torch.randn(x.shape, generator=rng)

    every = [
        Upload(
            Client(f"{k:03d}", 100 + k, rank),
            {role: {"q": near(state[role]["q"])} for role in ("A", "B")},
            1,
        )
        for k in range(clients)
    ]
    return state, every


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
    asked = parser.parse_args()
    print(describe())
    state, every = uploads(asked.size, asked.clients, asked.rank)
    flex, fedex = methods.build("flexlora", rank=asked.rank), methods.build("fedex_lora", rank=asked.rank)
    scale = lora.scale(flex.alpha, asked.rank)
    total = sum(u.client.examples for u in every)

    def product() -> torch.Tensor:
        D = torch.zeros(asked.size, asked.size)
        for u in every:
            D.addmm_(u.state["B"]["q"], u.state["A"]["q"], alpha=u.client.examples / total * scale)
        return D

    def dense_flex() -> torch.Tensor:
        U, S, Vh = torch.linalg.svd(product(), full_matrices=False)
        return (U[:, : asked.rank] * S[: asked.rank]) @ Vh[: asked.rank]

    def dense_fedex() -> torch.Tensor:
        mean = lora.mean(every)
        return product() - scale * mean["B"]["q"] @ mean["A"]["q"]

    def factored_fedex() -> torch.Tensor:
        after = fedex.aggregate(state, every)
        return after["left"]["q"] @ after["right"]["q"]

    after = flex.aggregate(state, every)
    for name, found, want in (
        ("flexlora", after["B"]["q"] @ after["A"]["q"], dense_flex()),
        ("fedex_lora", factored_fedex(), dense_fedex()),
    ):
        print(f"{name}: relative difference of the results {float((found - want).norm() / want.norm()):.1e}")

    print(
        f"{asked.clients} clients, rank {asked.rank}, one {asked.size} x {asked.size} site; median of {asked.repeats} runs"
    )
    for name, ours, dense, repeats in (
        ("flexlora", lambda: flex.aggregate(state, every), dense_flex, asked.repeats),
        # Milliseconds against a fraction of a second: many turns cost nothing.
        ("fedex_lora", lambda: fedex.aggregate(state, every), dense_fedex, 7 * asked.repeats),
    ):
        ours()
        pairs = [(seconds(ours), seconds(dense)) for _ in range(repeats)]
        ratio = sorted(b / a for a, b in pairs)[len(pairs) // 2]
        a, b = (sorted(x)[len(pairs) // 2] for x in zip(*pairs, strict=True))
        print(f"{name}: factors {a * 1e3:.1f} ms, dense {b * 1e3:.0f} ms a site: {ratio:.0f} times faster")


if __name__ == "__main__":
    main()
