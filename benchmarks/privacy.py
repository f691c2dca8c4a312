"""(p) What privacy costs: bytes and time of a secure sum, and time of a private step.

    python benchmarks/privacy.py [--no-steps]

Secure sums of random numbers, one process for all clients and the server, in words of 64 bits. Steps are of MiniLM on TREC,
rank 8 on q, k, v, batches of 16: plain, and with per-row gradients, clipping and noise; the best of five. A Poisson batch
has 16 rows on average: times are those of as many rows.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from machine import describe

from fedloom import RunConfig
from fedloom.core import Visit
from fedloom.privacy.client_noise import noisy_terms
from fedloom.privacy.example_level import Private
from fedloom.privacy.exchange import Aggregator, Party, Terms
from fedloom.privacy.fixed_point import FixedPoint
from fedloom.privacy.keys import RunKey
from fedloom.privacy.memory import Memory
from fedloom.runs.experiment import experiment
from fedloom.train import private_steps

SUMS = [(3, 450_000), (10, 450_000), (20, 2_500_000), (4, 25_000_000), (100, 112_500), (200, 112_500)]
"""(clients, numbers of an upload): 450 000 are 1.8 MB of float32."""


def secure_sum(n: int, numbers: int) -> None:
    """One sum, timed at one client and at the server."""
    keys = {f"c{i:03d}": RunKey() for i in range(n)}
    terms = Terms("run", 1, {i: key.public for i, key in keys.items()}, FixedPoint(n, 1.0))
    words = terms.fixed.encode(torch.rand(numbers))
    server, parties, masking = Aggregator(terms), {}, []
    for i, key in keys.items():
        start = time.perf_counter()
        parties[i] = Party(i, key, terms, Memory())
        masked = parties[i].mask(words)
        masking.append(time.perf_counter() - start)
        server.take(i, masked)
    answers, answering = {}, []
    for i, party in parties.items():
        start = time.perf_counter()
        answers[i] = party.unmask(server.present, server.boxes_for(i))
        answering.append(time.perf_counter() - start)
    start = time.perf_counter()
    total = server.open(answers)
    opening = time.perf_counter() - start
    assert torch.equal(total, words * n)
    shares = sum(len(share) for by in answers[i].values() for share in by.values())
    extra = sum(map(len, [*masked.boxes.values(), *masked.hashes.values()])) + shares
    client = 1e3 * (sorted(masking)[n // 2] + sorted(answering)[n // 2])
    print(
        f"{n:4d} clients {numbers * 8 / 1e6:7.1f} MB of words: client {client:8.1f} ms, server {1e3 * opening:8.1f} ms, "
        f"masks and boxes {extra:7d} bytes ({extra / numbers / 8:.3%})"
    )


def client_noise(numbers: int) -> None:
    """One client's share of the noise, for a sum of ten."""
    keys = {f"c{i}": RunKey().public for i in range(10)}
    terms, shares = noisy_terms(
        Terms("run", 1, keys, FixedPoint(10, 1.0)), 1.0, 1.0, torch.ones(numbers, dtype=torch.bool)
    )
    words = terms.fixed.encode(torch.rand(numbers))
    times = []
    for t in range(3):
        start = time.process_time()
        shares.draw(words, bytes(32), t)
        times.append(time.process_time() - start)
    print(f"noise from the clients: {1e3 * min(times):.0f} ms of processor time for {numbers:,} numbers at each client")


def steps(clients: int) -> None:
    """Milliseconds of processor time of a step of 16 rows of each client, one thread."""
    config = {
        "model": {"name": "minilm", "dtype": "float32"},
        "task": {"data": "trec", "limit": 384},
        "lora": {"rank": 8, "targets": ["query", "key", "value"]},
        "clients": {"count": clients},
        "method": {"name": "fedit"},
        "train": {"rounds": 1, "batch_size": 16, "local_steps": 6},
    }
    e = experiment(RunConfig.model_validate(config))
    state = e.initial_state()
    works = [(c, e.method.model(state, e.head, Visit(1, c, e.sites))) for c in e.clients]
    data = [e.rows_of(c.id) for c in e.clients]
    plain = e.trainer.settings
    times: dict[str, list[float]] = {"plain": [], "private": []}
    secret = Private(1.0, 1.0, bytes(32))
    drawn = sum(
        sum(map(len, private_steps.plan(secret, c, w, len(x), 16, 6, 1, 0)))
        for (c, w), x in zip(works, data, strict=True)
    )
    for t in range(6):  # interleaved, in processor time: the machine may be busy
        for name, private in (("plain", None), ("private", secret)):
            e.trainer.settings = replace(plain, private=private)
            start = time.process_time()
            done = e.trainer.fit(works, data, 1)
            rows = sum(x.metrics.get("samples", 0.0) for x in done) or drawn
            if t:
                times[name].append((time.process_time() - start) / rows * 16 * clients)
    a, b = min(times["plain"]), min(times["private"])
    print(f"{clients:2d} clients: {1e3 * a:6.0f} ms plain, {1e3 * b:6.0f} ms private ({b / a - 1:+.0%})")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--no-steps", action="store_true", help="secure sums alone: no model is needed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(describe())
    for n, numbers in SUMS:
        secure_sum(n, numbers)
    client_noise(450_000)
    if not args.no_steps:
        for clients in (1, 4):
            steps(clients)


if __name__ == "__main__":
    main()
