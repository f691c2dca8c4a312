"""A node of a run on Flower: its model, its rows and what its clients keep, behind a worker.

Two kinds. A *local node* is one of those of a run on one machine: it takes the configuration from the server, which started
it, and serves whichever clients the server gives it. A *remote node* has its own copy of the run file and its own rows, and
takes part only in a run that asks of it what that file says.
"""

from __future__ import annotations

import argparse
import logging
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedloom.core import Client, Work
from fedloom.data import hub
from fedloom.errors import ConfigError
from fedloom.flower.node_visits import NodeRun
from fedloom.flower.worker import Worker
from fedloom.runs import evaluate, export
from fedloom.runs.assemble import Parts
from fedloom.runs.config import RunConfig, parse
from fedloom.simulation import Simulation

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


class RunNode:
    """What a worker works with. `assemble` makes a run's parts, its clients here and its folder from the server's words."""

    def __init__(self, assemble: Callable[[dict[str, Any]], tuple[Parts, list[Client], Path]]) -> None:
        self._assemble = assemble
        self._base = _Base()

    @property
    def loads(self) -> int:
        return self._base.loads

    def setup(self, setup: dict[str, Any]) -> NodeRun:
        parts, clients, folder = self._assemble(setup)
        self._base.into(parts)
        if setup.get("model") != parts.base.sha256:
            raise ConfigError("the base model here is not the server's: its sha256 differs")
        method = parts.method

        def score(work: Work) -> dict[str, float]:
            return evaluate.score(parts, method, work, parts.eval_rows)

        def write(client: str, work: Work) -> None:
            export.write(parts, method, work, folder / "clients" / client / "adapter")

        simulation = Simulation(
            parts.trainer, parts.sites, parts.rows_of, fresh=parts.head, cohort=1, score=score, write=write
        )
        return NodeRun(clients, method, simulation, folder)


def local_node() -> RunNode:
    """A node of the server's own machine, for any client of any run that the server names."""

    def assemble(setup: dict[str, Any]) -> tuple[Parts, list[Client], Path]:
        parts = Parts(parse(tomllib.loads(setup["config"]), "the server's configuration"))
        return parts, parts.clients, Path(setup["folder"])

    return RunNode(assemble)


def remote_node(config: RunConfig, client: str, folder: Path) -> RunNode:
    """A node with its own rows, those of `config.task.data`, and its one client's budget in `config.clients`."""

    def assemble(setup: dict[str, Any]) -> tuple[Parts, list[Client], Path]:
        if wrong := differences(agreement(config), setup.get("agreement")):
            raise ConfigError(f"the server's run is not the one of this node's run file: {', '.join(wrong)} differ")
        parts = Parts(config)
        labels = setup.get("labels")
        if not isinstance(labels, list) or not all(isinstance(x, str) for x in labels):
            raise ConfigError("the server named no labels")
        parts.tables = replace(parts.tables, labels=labels)
        parts.partition = {client: list(range(len(parts.tables.train)))}
        run = str(setup.get("run"))
        if not run.isalnum():
            raise ConfigError("the server's run has no name")
        return parts, parts.clients, folder / run

    return RunNode(assemble)


def serve(node: RunNode, path: Path, threads: int | None) -> None:
    """Be a worker until the process is ended."""
    hub.quiet()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in ("httpx", "datasets", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if threads is not None:
        torch.set_num_threads(threads)
    Worker(node).serve(path)


def main() -> None:
    """The worker of a local node."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    serve(local_node(), args.socket, args.threads)


if __name__ == "__main__":
    main()
