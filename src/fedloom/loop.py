"""The one federated round, for every method and every engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from fedloom import lora
from fedloom.accounting import Bytes
from fedloom.core import Client, Engine, Failure, Job, Method, Sampler, State, Upload
from fedloom.errors import RoundError
from fedloom.guard import Expected


@dataclass
class Record:
    """What happened in one round."""

    t: int
    clients: list[str] = field(default_factory=list)
    """Who was asked."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Client id -> why its upload was not used."""
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """Client id -> what its training reported."""
    examples: dict[str, int] = field(default_factory=dict)
    up: Bytes = field(default_factory=Bytes)
    down: Bytes = field(default_factory=Bytes)
    per_client: dict[str, list[int]] = field(default_factory=dict)
    """Client id -> [bytes down, bytes up]."""
    seconds: float = 0.0

    @property
    def train_loss(self) -> float | None:
        """Mean of the clients' losses weighted by examples; None if no upload was used."""
        total = sum(self.examples[k] for k in self.metrics)
        return sum(self.examples[k] * m["loss"] for k, m in self.metrics.items()) / total if total else None


def everyone(clients: list[Client], t: int) -> list[Client]:
    """The sampler that takes all clients."""
    return clients


def some(fraction: float, seed: int) -> Sampler:
    """A sampler that takes a share of the clients, at least one, uniformly: keyed by (seed, t), with no state."""

    def sample(clients: list[Client], t: int) -> list[Client]:
        import torch

        count = max(1, round(fraction * len(clients)))
        order = torch.randperm(len(clients), generator=lora.generator(seed, t, "sample"))
        return [clients[i] for i in order[:count].tolist()]

    return sample if fraction < 1 else everyone


def in_order(results: Iterable[Upload | Failure], ids: Sequence[str]) -> Iterator[Upload | Failure]:
    """Results by the order of ids, whatever the order they came in; ids without a result are passed over."""
    waiting: dict[str, Upload | Failure] = {}
    expected = iter(ids)
    want = next(expected, None)
    for result in results:
        waiting[result.client.id] = result
        while want is not None and want in waiting:
            yield waiting.pop(want)
            want = next(expected, None)
    for key in ids:
        if key in waiting:
            yield waiting.pop(key)


def one_round(
    method: Method,
    engine: Engine,
    state: State,
    clients: Sequence[Client],
    t: int,
    max_norm: float | None = None,
    quorum: int = 1,
) -> tuple[State, Record]:
    """Round t with the clients given. `state` is not changed.

    Raises RoundError if fewer uploads can be used than `quorum`, or than there are clients if those are fewer.
    """
    start = time.perf_counter()
    clients = sorted(clients, key=lambda client: client.id)
    record = Record(t, [client.id for client in clients])
    expected: dict[str, Expected] = {}

    def jobs() -> Iterator[Job]:
        for client in clients:
            received = method.broadcast(state, client, t)
            record.per_client[client.id] = [record.down.count(received), 0]
            expected[client.id] = Expected.like(method.expected(received, t), method.shrinks)
            yield client, received

    def usable() -> Iterator[Upload]:
        for result in in_order(engine.run(method, jobs(), t), record.clients):
            key = result.client.id
            want = expected.pop(key, None)
            if want is None:  # a second answer, or one that nobody asked for: the first stands
                continue
            if isinstance(result, Failure):
                record.dropped[key] = result.reason
                continue
            record.per_client[key][1] = record.up.count(result.state)
            if fault := want.fault(result.state, max_norm):
                record.dropped[key] = fault
                continue
            record.metrics[key] = result.metrics
            record.examples[key] = result.client.examples
            yield result

    least = max(1, min(quorum, len(clients)))

    def short() -> RoundError:
        reasons = "; ".join(f"{k}: {why}" for k, why in list(record.dropped.items())[:5]) or "none answered"
        return RoundError(
            f"round {t}: {len(record.metrics)} of {len(clients)} clients sent a usable update, expected at least {least} "
            f"({reasons}). The checkpoint of round {t - 1} stands: change what caused this (a smaller train.lr, nodes that "
            "are missing, a smaller engine.quorum?) and resume"
        )

    uploads = usable()
    first = next(uploads, None)
    if first is None:
        raise short()
    held = [first]
    del first  # or this frame would keep it until the whole round is averaged

    def every() -> Iterator[Upload]:
        yield held.pop()
        yield from uploads

    after = method.aggregate(state, every())
    for key in expected:
        record.dropped[key] = "no answer"
    if len(record.metrics) < least:
        raise short()
    record.seconds = time.perf_counter() - start
    return after, record


def federate(
    method: Method,
    engine: Engine,
    state: State,
    clients: Sequence[Client],
    rounds: int,
    *,
    start: int = 1,
    sample: Sampler = everyone,
    server: Client | None = None,
    max_norm: float | None = None,
    quorum: int = 1,
    on_round: Callable[[State, Record], None] = lambda state, record: None,
) -> State:
    """Rounds `start` to `rounds`; `on_round` sees the state after each. Returns the last state.

    `server` is the client that trains on the server's own proxy data in the rounds that a method gives to the server.
    """
    everybody = sorted(clients, key=lambda client: client.id)
    for t in range(start, rounds + 1):
        if method.stage(t) == "server":
            if server is None:
                raise RoundError(f"round {t}: {method.name} trains on the server's own data, but there is none")
            chosen = [server]
        else:
            chosen = sample(everybody, t)
        state, record = one_round(method, engine, state, chosen, t, max_norm, quorum)
        on_round(state, record)
    return state
