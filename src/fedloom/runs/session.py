"""Run a configuration, or go on with a run: rounds, records, checkpoints, and a PEFT adapter at the end."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedloom import checkpoint
from fedloom.checkpoint import Kept
from fedloom.core import Client, Failure, Job, Method, State, Work
from fedloom.data import partition
from fedloom.data.text import Encoded
from fedloom.engines.inprocess import InProcess
from fedloom.engines.link import Link
from fedloom.loop import Record, federate, in_order
from fedloom.runs import evaluate, export, radio_cost, remote
from fedloom.runs.assemble import Parts, absolute
from fedloom.runs.config import RunConfig
from fedloom.runs.directory import RunDirectory, digest_file, digest_files
from fedloom.train.trainer import Trainer


@dataclass(frozen=True)
class Result:
    """What a run leaves."""

    path: Path
    rounds: list[dict[str, Any]]
    """The records of rounds.jsonl."""

    @property
    def adapter_dir(self) -> Path:
        """The PEFT directory."""
        return self.path / "adapter"

    @property
    def eval(self) -> dict[str, float]:
        """The last scores."""
        return next((r["eval"] for r in reversed(self.rounds) if "eval" in r), {})


class Observer:
    """What is told while a run goes on; this one ignores it."""

    def assembled(self, parts: Parts) -> None:
        """All is loaded; training is about to begin."""

    def round(self, record: dict[str, Any]) -> None:
        """A round was recorded (also those found when a run is resumed)."""

    def doing(self, what: str) -> None:
        """What happens next, in a few words."""


class _Timed:
    """The trainer, with the seconds it trained for."""

    def __init__(self, trainer: Trainer, progress: Callable[[int], None]) -> None:
        self.trainer = trainer
        self.seconds = 0.0
        self.progress = progress

    def fit(
        self, method: Method, works: Sequence[tuple[Client, Work]], data: Sequence[Encoded], t: int
    ) -> list[tuple[State, dict[str, float]]]:
        start = time.perf_counter()
        try:
            return self.trainer.fit(method, works, data, t)
        finally:
            self.seconds += time.perf_counter() - start
            self.progress(len(works))


def start(
    config: RunConfig, out: Path | None = None, observer: Observer | None = None, link: Link | None = None
) -> Result:
    """Run a configuration in a new directory (by default the next free one below `runs/`).

    `link` leads to nodes that are there already; without one, `config.engine` says where clients are.
    """
    config = absolute(config)
    parts = Parts(config)  # a wrong method or budget is told before anything is written
    run = RunDirectory.create(out if out is not None else free_name(config), config)
    return _go(run, parts, observer or Observer(), link)


def resume(path: Path, observer: Observer | None = None, link: Link | None = None) -> Result:
    """Go on with a run from its newest checkpoint: it ends with the same adapter bytes as if it had never stopped."""
    run = RunDirectory.open(path)
    return _go(run, Parts(run.config()), observer or Observer(), link)


def free_name(config: RunConfig) -> Path:
    """`runs/METHOD-DATA`, or the first of `-2`, `-3`, ... that does not exist."""
    data = Path(config.task.data).stem.replace(":", "-")
    base = Path("runs") / f"{config.method.name.rpartition(':')[2]}-{data}"
    n = 2
    path = base
    while path.exists():
        path = base.with_name(f"{base.name}-{n}")
        n += 1
    return path


def _go(run: RunDirectory, parts: Parts, observer: Observer, link: Link | None) -> Result:
    with run.held():
        if (run.checkpoint / "latest.json").exists():
            t, state, kept, done = checkpoint.load(run.checkpoint)
            if done:
                records = run.rounds()
                for record in records:
                    observer.round(record)
                return Result(run.path, records)
        else:
            t, state, kept, done = -1, {}, Kept(run.checkpoint / "kept"), False
        threads = parts.config.engine.threads
        if threads is not None:
            torch.set_num_threads(threads)
        with nullcontext(link) if link is not None else remote.connected(run, parts, observer.doing) as reached:
            return _Session(run, parts, observer, kept, reached).go(t, state)


class _Session:
    """One process's share of a run."""

    def __init__(
        self, run: RunDirectory, parts: Parts, observer: Observer, kept: Kept, link: Link | None = None
    ) -> None:
        self.run = run
        self.parts = parts
        self.observer = observer
        observer.doing("reading the data")
        _ = parts.tables, parts.partition
        observer.doing("loading the model")
        self.trainer = _Timed(parts.trainer, self._progress)
        self.own = InProcess(
            self.trainer,
            parts.sites,
            parts.rows_of,
            kept=kept,
            fresh=parts.head,
            cohort=parts.cohort,
        )
        self.far = None if link is None else remote.engine(link, run, parts, self.own, observer.doing)
        """The clients' engine if they are on other machines: they then evaluate and keep their own models there."""
        self.engine = self.own if self.far is None else self.far
        self.kept = self.engine.kept
        self.clients = parts.clients
        self.rounds = parts.config.train.rounds
        self._trained = 0
        self._personal = parts.method.personal
        ids = [client.id for client in parts.clients]
        self.network = radio_cost.plan(parts.config, ids) if parts.config.network is not None else None

    def _progress(self, count: int) -> None:
        self._trained += count
        self.observer.doing(f"trained {self._trained} clients of this round")

    def go(self, t: int, state: State) -> Result:
        records = self.run.keep_rounds(t) if t >= 0 or self.run.rounds_file.exists() else []
        self._manifest(adapter=None)
        partition.save(self.parts.partition, self.run.partition_file)
        self.observer.assembled(self.parts)
        for record in records:
            self.observer.round(record)
        if t < 0:
            state = self.parts.initial_state()
            self._record(Record(0), state)
            checkpoint.save(self.run.checkpoint, 0, state, self.kept)
            t = 0
        c = self.parts.config
        self.observer.doing(f"round {t + 1}")
        state = federate(
            self.parts.method,
            self.engine,
            state,
            self.clients,
            self.rounds,
            start=t + 1,
            sample=remote.sampler(self.parts),
            server=self.parts.server,
            max_norm=c.clients.max_norm,
            quorum=c.engine.quorum,
            on_round=self._after,
        )
        self._personalise(state)
        self._adapters(state)
        self._manifest(adapter=digest_files(self.run.adapter))
        checkpoint.save(self.run.checkpoint, self.rounds, state, self.kept, done=True)
        return Result(self.run.path, self.run.rounds())

    def _after(self, state: State, record: Record) -> None:
        self._record(record, state)
        checkpoint.save(self.run.checkpoint, record.t, state, self.kept)
        self._trained = 0
        if record.t < self.rounds:
            self.observer.doing(f"round {record.t + 1}")

    def _record(self, record: Record, state: State) -> None:
        """Evaluate if it is time to, and add the round's line to rounds.jsonl."""
        every = self.parts.config.train.evaluate_every
        due = record.t in (0, self.rounds) or (every > 0 and record.t % every == 0)
        line: dict[str, Any] = {
            "round": record.t,
            "stage": "none" if record.t == 0 else self.parts.method.stage(record.t),
            "clients": record.clients,
            "dropped": record.dropped,
            "train_loss": record.train_loss,
        }
        clock = time.perf_counter()
        if due:
            self.observer.doing("evaluating")
            line["eval"] = self._scores(state, record.t)
            line["eval_of"] = "clients" if self.parts.method.personal else "server"
        evaluated = time.perf_counter() - clock
        line |= {
            "bytes_up": record.up.as_dict(),
            "bytes_down": record.down.as_dict(),
            "seconds": {
                "total": round(record.seconds + evaluated, 4),
                "train": round(self.trainer.seconds, 4),
                "evaluate": round(evaluated, 4),
            },
            "report": _report(record, state),
        }
        if self.network is not None and record.t > 0 and self.parts.method.stage(record.t) == "clients":
            line["network"] = radio_cost.cost(self.network, record)
        if self.far is not None and record.t > 0:
            line["engine"] = self.far.told()
            line["seconds"]["train"] = line["engine"].pop("train_s")
        self.trainer.seconds = 0.0
        self.run.append(line)
        self.observer.round(line)

    def _scores(self, state: State, t: int) -> dict[str, float]:
        """Of the server's model, or the mean over the clients' own models where there is no common one."""
        parts = self.parts
        if not parts.method.personal:
            return evaluate.score(parts, parts.method, evaluate.global_work(parts, state), parts.eval_rows)
        return self._personal_scores(state, t)[0]

    def _personal_scores(self, state: State, t: int) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        parts = self.parts
        each = {}
        if self.far is not None:
            each = self.far.scores(self._models(state), t)
        else:
            for client in self.clients:
                work = evaluate.client_work(parts, state, self.own.own(client.id), client.id)
                each[client.id] = evaluate.score(parts, parts.method, work, parts.eval_rows)
        answered = [client for client in self.clients if client.id in each]
        return evaluate.mean([each[c.id] for c in answered], [c.examples for c in answered]) if each else {}, each

    def _models(self, state: State) -> Iterator[Job]:
        """What every client is sent so that it has its own model."""
        return ((client, self.parts.method.broadcast(state, client, 0)) for client in self.clients)

    def _personalise(self, state: State) -> None:
        """The personal phase: every client trains for itself and uploads nothing. One more line in rounds.jsonl."""
        method, t = self.parts.method, self.rounds + 1
        record = Record(t)
        start = time.perf_counter()
        results = self.engine.personalise(method, self._models(state), t)
        for result in in_order(results, [client.id for client in self.clients]):
            record.clients.append(result.client.id)
            if isinstance(result, Failure):
                record.dropped[result.client.id] = result.reason
            else:
                record.metrics[result.client.id] = result.metrics
                record.examples[result.client.id] = result.client.examples
        if not record.clients:
            return
        self._personal = True
        seconds = time.perf_counter() - start
        clock = time.perf_counter()
        self.observer.doing("evaluating the personal models")
        mean, each = self._personal_scores(state, t)
        evaluated = time.perf_counter() - clock
        line = {
            "round": t,
            "stage": "personal",
            "clients": record.clients,
            "dropped": record.dropped,
            "train_loss": record.train_loss,
            "eval": mean,
            "eval_of": "clients",
            "eval_clients": each,
            "bytes_up": {},
            "bytes_down": {},
            "seconds": {"total": seconds + evaluated, "train": self.trainer.seconds, "evaluate": evaluated},
            "report": _report(record, state),
        }
        self.run.append(line)
        self.observer.round(line)

    def _adapters(self, state: State) -> None:
        parts = self.parts
        self.observer.doing("writing the adapter")
        export.write(parts, parts.method, evaluate.global_work(parts, state), self.run.adapter)
        if self.far is not None and self._personal:
            self.far.export(self._models(state), self.rounds + 1)
        for client in self.kept.clients():
            if client in parts.partition:
                work = evaluate.client_work(parts, state, self.own.own(client), client)
                export.write(parts, parts.method, work, self.run.path / "clients" / client / "adapter")

    def _manifest(self, adapter: str | None) -> None:
        parts = self.parts
        c = parts.config
        self.run.write_manifest(
            {
                "seed": c.seed,
                "method": {"name": parts.method.name, "paper": parts.method.paper},
                "labels": parts.tables.labels,
                "targets": parts.targets,
                "clients": {
                    client.id: {"examples": client.examples, "rank": client.rank, "keep": client.keep}
                    for client in self.clients
                },
                "cohort": parts.cohort,
                "environment": {
                    "device": str(parts.device),
                    "dtype": str(parts.dtype).removeprefix("torch."),
                    "threads": torch.get_num_threads(),
                },
                "lora_parameters": sum((m + n) * parts.method.rank for m, n in parts.sites.values()),
                "head_parameters": sum(x.numel() for group in parts.head.values() for x in group.values()),
                "versions": versions(),
                "hashes": {"config": digest_file(self.run.config_file), **parts.hashes, "adapter": adapter},
            }
        )


def _report(record: Record, state: State) -> dict[str, float]:
    """What the method says of its state, and the extremes over clients that the bound's constants are estimated from."""
    found = {name: float(x) for name, x in state.get("report", {}).items()}
    for name in ("loss_max", "grad_norm_max"):
        if record.metrics:
            found[name] = max(m[name] for m in record.metrics.values())
    square = sum(float(x.square().sum()) for role in ("A", "B") for x in state.get(role, {}).values())
    return found | {"adapter_norm": square**0.5}


def versions() -> dict[str, str]:
    """Of Python and the libraries that a result depends on."""
    from importlib.metadata import version

    packages = ("torch", "transformers", "peft", "datasets", "safetensors", "numpy", "flwr-datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
