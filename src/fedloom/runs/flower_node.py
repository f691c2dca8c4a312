"""A node of a run on many machines: its model, its rows and what its clients keep, behind a worker.

Two kinds. A *share* is one of the nodes of a run on one machine: it takes the configuration from the server, which started it,
and serves whichever clients the server gives it. A *site*
has its own copy of the run file and its own rows, and takes part only in a run that asks of it what that file says.
"""

from __future__ import annotations

import argparse
import logging
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedloom.core import Client, Failure, State, Upload
from fedloom.data import hub
from fedloom.engines import kept
from fedloom.engines.inprocess import InProcess
from fedloom.engines.worker import Worker
from fedloom.errors import ConfigError
from fedloom.runs import evaluate, export
from fedloom.runs.assemble import Parts
from fedloom.runs.config import RunConfig, parse

LOCAL = {
    "model": ("name", "device", "attention", "checkpointing"),
    "task": ("data", "eval_data", "proxy_data", "limit", "eval_limit", "holdout"),
}
"""Keys of a run file that each machine sets for itself; all others of these sections must be the same everywhere."""


def agreement(config: RunConfig) -> dict[str, Any]:
    """What server and nodes must have in common, as nested plain values."""
    values = config.model_dump(mode="json")
    shared = {name: values[name] for name in ("seed", "model", "task", "lora", "method", "train")}
    for section, keys in LOCAL.items():
        shared[section] = {key: x for key, x in shared[section].items() if key not in keys}
    return shared


def differences(ours: dict[str, Any], theirs: Any) -> list[str]:
    """Dotted keys whose values differ."""
    if not isinstance(theirs, dict):
        return ["all of it"]
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{key}.{inner}" for inner in differences(a, b)]
        elif a != b:
            found.append(key)
    return found


class _Base:
    """The base model of this process: loaded once, and handed from run to run while they ask for the same one."""

    def __init__(self) -> None:
        self.loads = 0
        self._parts: Parts | None = None

    def into(self, parts: Parts) -> None:
        """Give a run's parts the model that is loaded, or let them load theirs."""
        old = self._parts
        if old is not None:
            old.trainer.close()
        if old is not None and _model_of(old) == _model_of(parts):
            parts.base = old.base
            if old.config.task == parts.config.task:
                parts.tables = old.tables
        else:
            self._parts = None  # two models are not held at once
            _ = parts.base
            self.loads += 1
        _ = parts.trainer
        self._parts = parts


def _model_of(parts: Parts) -> object:
    c = parts.config
    return c.model, c.task.kind, c.seed, parts.tables.labels


class LocalNode:
    """What a worker works with. `assemble` makes a run's parts, its clients here and its folder from the server's words."""

    def __init__(self, assemble: Callable[[dict[str, Any]], tuple[Parts, list[Client], Path]]) -> None:
        self._assemble = assemble
        self._base = _Base()
        self._run: tuple[Parts, InProcess, Path] | None = None

    @property
    def loads(self) -> int:
        return self._base.loads

    @property
    def folder(self) -> Path:
        return self._now()[2] / "kept"

    def _now(self) -> tuple[Parts, InProcess, Path]:
        if self._run is None:
            raise ConfigError("no run is set up here")
        return self._run

    def setup(self, header: dict[str, Any]) -> list[Client]:
        parts, clients, folder = self._assemble(header)
        self._base.into(parts)
        if header.get("model") != parts.base.sha256:
            raise ConfigError("the base model here is not the server's: its sha256 differs")
        engine = InProcess(parts.trainer, parts.sites, parts.rows_of, fresh=parts.head, cohort=1)
        self._run = parts, engine, folder
        return clients

    def _engine(self, t: int, forget: Sequence[Client] = ()) -> tuple[Parts, InProcess]:
        """With what clients kept before round t."""
        parts, engine, _ = self._now()
        engine.kept = kept.before(self.folder, t)
        kept.forget(self.folder, engine.kept, [client.id for client in forget])
        return parts, engine

    def train(self, clients: Sequence[Client], received: Sequence[State], t: int) -> list[Upload | Failure]:
        parts, engine = self._engine(t, clients)
        return list(engine.run(parts.method, zip(clients, received, strict=True), t))

    def personal(self, clients: Sequence[Client], received: Sequence[State], t: int) -> list[Upload | Failure]:
        parts, engine = self._engine(t, clients)
        return list(engine.personalise(parts.method, zip(clients, received, strict=True), t))

    def evaluate(self, clients: Sequence[Client], received: Sequence[State], t: int) -> list[dict[str, float]]:
        parts, engine = self._engine(t + 1)
        return [
            evaluate.score(
                parts,
                parts.method,
                parts.method.prepare(state, engine.own(client.id), parts.sites, client, 0),
                parts.eval_rows,
            )
            for client, state in zip(clients, received, strict=True)
        ]

    def export(self, clients: Sequence[Client], received: Sequence[State], t: int) -> None:
        parts, engine = self._engine(t + 1)
        for client, state in zip(clients, received, strict=True):
            if engine.kept.get(client.id) is not None:
                work = parts.method.prepare(state, engine.own(client.id), parts.sites, client, 0)
                export.write(parts, parts.method, work, self._now()[2] / "clients" / client.id / "adapter")


def share() -> LocalNode:
    """A node of the server's own machine, for any client of any run that the server names."""

    def assemble(header: dict[str, Any]) -> tuple[Parts, list[Client], Path]:
        parts = Parts(parse(tomllib.loads(header["config"]), "the server's configuration"))
        return parts, parts.clients, Path(header["folder"])

    return LocalNode(assemble)


def site(config: RunConfig, client: str, folder: Path) -> LocalNode:
    """A node with its own rows, those of `config.task.data`, and its one client's budget in `config.clients`."""

    def assemble(header: dict[str, Any]) -> tuple[Parts, list[Client], Path]:
        if wrong := differences(agreement(config), header.get("agreement")):
            raise ConfigError(f"the server's run is not the one of this node's run file: {', '.join(wrong)} differ")
        parts = Parts(config)
        labels = header.get("labels")
        if not isinstance(labels, list) or not all(isinstance(x, str) for x in labels):
            raise ConfigError("the server named no labels")
        parts.tables = replace(parts.tables, labels=labels)
        parts.partition = {client: list(range(len(parts.tables.train)))}
        run = str(header.get("run"))
        if not run.isalnum():
            raise ConfigError("the server's run has no name")
        return parts, parts.clients, folder / run

    return LocalNode(assemble)


def serve(node: LocalNode, path: Path, threads: int | None) -> None:
    """Be a worker until the process is ended."""
    hub.quiet()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in ("httpx", "datasets", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if threads is not None:
        torch.set_num_threads(threads)
    Worker(node).serve(path)


def main() -> None:
    """The worker of a share."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    serve(share(), args.socket, args.threads)


if __name__ == "__main__":
    main()
