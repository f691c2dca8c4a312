"""(f) A run through Flower on this machine's loopback: start-up, seconds a round outside training, memory, bytes.

    python benchmarks/flower.py [--rounds 6] [--nodes 2] [--rank 8]
    python benchmarks/flower.py --accuracy [--rounds 10]      what bfloat16 and int8 on the wire cost in held-out loss

MiniLM on TREC questions, FedIT on query, key and value plus the head, one client a node. The floor is the time of a message
that asks a node for nothing but its name, through the same SuperLink, SuperNodes and proxies. Bytes are those of all TCP
payloads between SuperNodes and SuperLink, counted by a relay: HTTP heads, polling and heartbeats included.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from machine import describe

from fedloom.flower.coordinator import Coordinator
from fedloom.flower.pending import Asked
from fedloom.flower.sandbox import environment, free_ports, lend, superlink, supernode, wait_for_port
from fedloom.flower.supervisor import Program, Supervisor
from fedloom.flower.transport import Reply
from fedloom.flower.worker import Worker
from fedloom.runs import flower_server
from fedloom.runs import run as runs
from fedloom.runs.config import RunConfig, parse
from fedloom.runs.experiment import experiment
from fedloom.runs.flower_node import local_node, local_worker
from fedloom.runs.run_directory import RunDirectory


class Relay:
    """Passes TCP from a port of its own to another and counts what passes, both ways."""

    def __init__(self, to: int) -> None:
        self.to, self.up, self.down = to, 0, 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                far = socket.create_connection(("127.0.0.1", self.to))
            except ConnectionRefusedError:  # the SuperLink is not up yet: the SuperNode tries again
                near.close()
                continue
            threading.Thread(target=self._pass, args=(near, far, "up"), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, "down"), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
                setattr(self, way, getattr(self, way) + len(data))
            sink.shutdown(socket.SHUT_WR)


class Direct:
    """A transport to workers in this very process: the codec of both sides without Flower, to measure accuracy quickly."""

    def __init__(self, nodes: int) -> None:
        self._workers = [Worker(local_node()) for _ in range(nodes)]
        self._answers: list[Reply] = []

    def nodes(self) -> list[int]:
        return list(range(len(self._workers)))

    def push(self, node: int, data: bytes, ttl_s: float) -> str | None:
        id = str(time.monotonic_ns())
        self._answers.append(Reply(id, self._workers[node].answer(data)))
        return id

    def pull(self, ids: list[str]) -> list[Reply]:
        got, self._answers = self._answers, []
        return got

    def close(self) -> None:
        pass


def config(rounds: int, rank: int, clients: int, wire: str, **train: Any) -> RunConfig:
    return parse(
        {
            "model": {"name": "minilm"},
            "task": {"data": "trec", "limit": 256 * clients, "eval_limit": 400, "holdout": 0.2},
            "lora": {"rank": rank, "targets": ["query", "key", "value"]},
            "clients": {"count": clients},
            "method": {"name": "fedit"},
            "train": {"rounds": rounds, "evaluate_every": 0, "lr": 3e-3, **train},
            "engine": {"name": "flower", "wire": wire, "threads": 1, "cohort": 1},
        },
        "benchmark",
    )


def rss_mb(pid: int | None, key: str = "VmRSS") -> float:
    """Resident memory of a process and of what it started, in MB."""
    total = 0.0
    for path in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
            if int(fields["Pid"]) == pid or int(fields["PPid"]) == pid:
                total += int(fields.get(key, "0 kB").split()[0]) / 1000
    return total


def deployment(nodes: int, rounds: int, rank: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="fedloom-"))
    port, *runtime = free_ports(nodes + 1)
    relay, env = Relay(port), environment(folder / "home")
    programs = [Program("superlink", superlink(port), env)]
    for k in range(nodes):
        programs.append(Program(f"supernode-{k}", supernode(relay.port, runtime[k], folder / f"w{k}"), env))
        programs.append(Program(f"worker-{k}", local_worker(folder / f"w{k}", 1), env))
    begin = time.perf_counter()
    supervisor = Supervisor(programs, folder / "logs")
    try:
        wait_for_port(port, lambda: supervisor.running("superlink"), "the SuperLink")
        listening = time.perf_counter() - begin
        transport = lend(f"127.0.0.1:{port}", folder / "home", folder / "link")
        while len(transport.nodes()) < nodes:
            time.sleep(0.05)
        print(
            f"start-up: SuperLink listens after {listening:.1f} s, nodes ready after {time.perf_counter() - begin:.1f} s"
        )

        settings = config(rounds, rank, nodes, "float32")
        before = relay.up, relay.down
        idle_from = time.perf_counter()
        time.sleep(12)
        idle = [
            (now - was) / (time.perf_counter() - idle_from)
            for now, was in zip((relay.up, relay.down), before, strict=True)
        ]
        print(f"idle: {idle[0]:.0f} bytes/s up, {idle[1]:.0f} bytes/s down, {nodes} nodes")

        before = relay.up, relay.down
        start = time.perf_counter()
        result = runs.start(settings, folder / "run", transport=transport)
        took = time.perf_counter() - start
        crossed = relay.up - before[0], relay.down - before[1]
        rounds_ = [r for r in result.rounds if r["round"] > 0]
        outside = [r["seconds"]["total"] - r["seconds"]["evaluate"] - r["seconds"]["train"] for r in rounds_]
        train = [r["seconds"]["train"] for r in rounds_]
        print(f"rounds: {[r['seconds']['total'] for r in rounds_]}, dropped {[r['dropped'] for r in rounds_]}")
        print(
            f"outside training: first {outside[0]:.2f} s (model loading), then median {statistics.median(outside[1:]):.2f} s; "
            f"training {statistics.median(train[1:]):.2f} s; whole run {took:.1f} s"
        )
        for way, got, key in (("up", crossed[0], "bytes_up"), ("down", crossed[1], "bytes_down")):
            counted = sum(sum(r[key].values()) for r in rounds_)
            messages = sum(r["engine"]["wire"][way] for r in rounds_)
            print(
                f"bytes {way}: accounting {counted}, our messages {messages} ({messages / counted - 1:+.2%}), "
                f"TCP {got} ({got / counted - 1:+.2%})"
            )
        here: Any = None
        engine, _ = flower_server.coordinator(
            transport, RunDirectory(folder / "run"), experiment(settings), here, lambda what: None
        )
        print(f"floor: a message that asks for nothing takes median {floor(engine):.2f} s")
        for k in range(nodes):
            node, work = supervisor.ids[f"supernode-{k}"], supervisor.ids[f"worker-{k}"]
            print(
                f"memory of node {k}: SuperNode with its executor {rss_mb(node):.0f} MB, "
                f"worker {rss_mb(work):.0f} MB (peak {rss_mb(work, 'VmHWM'):.0f} MB)"
            )
        print(
            f"memory of the SuperLink with its app: {rss_mb(supervisor.ids['superlink']):.0f} MB and the app's process"
        )
        transport.close()
    finally:
        supervisor.close()


def floor(engine: Coordinator, times: int = 8) -> float:
    """Median seconds of a message to all nodes that asks only who they are."""
    took = []
    for _ in range(times):
        start = time.perf_counter()
        left = [Asked(node, "hello") for node in engine.transport.nodes()]
        assert all([engine.pending.send(asked, 60.0) for asked in left])
        while engine.pending.owed():
            engine.pending.receive()
            time.sleep(0.05)
        took.append(time.perf_counter() - start)
    return statistics.median(took[1:])


def accuracy(rounds: int, rank: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for seed in (0, 1, 2):
            for wire in ("float32", "bfloat16", "int8"):
                settings = config(rounds, rank, 4, wire)
                settings = settings.model_copy(update={"seed": seed})
                result = runs.start(settings, Path(folder) / f"{wire}-{seed}", transport=Direct(2))
                up = sum(r["engine"]["wire"]["up"] for r in result.rounds if "engine" in r)
                score = ", ".join(f"{name} {value:.4f}" for name, value in result.eval.items())
                print(f"seed {seed}, {wire}: {up} bytes up, held-out {score}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--accuracy", action="store_true")
    asked = parser.parse_args()
    print(describe())
    if asked.accuracy:
        accuracy(asked.rounds, asked.rank)
    else:
        deployment(asked.nodes, asked.rounds, asked.rank)


if __name__ == "__main__":
    main()
