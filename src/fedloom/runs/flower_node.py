"""A node of a run on many machines: its model, its rows and what its clients keep, behind a worker.

A *local node* is one of the nodes of a run on one machine: it takes the configuration from the server, which started it, and
serves whichever clients the server gives it. A *remote node* has its own copy of the run file and its own rows, and takes part
only in a run that asks of it what that file says.
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

from fedloom.data import hub
from fedloom.errors import ConfigError
from fedloom.flower.node_visits import NodeRun
from fedloom.flower.worker import Worker
from fedloom.models.huggingface import Base
from fedloom.runs import evaluate, export
from fedloom.runs.config import RunConfig, parse
from fedloom.runs.experiment import Experiment, experiment
from fedloom.runs.plan import Plan, plan
from fedloom.runs.tables import Tables, tables
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


class _Loaded:
    """The base model of this process: loaded once, and handed from run to run while they ask for the same one."""

    def __init__(self) -> None:
        self.loads = 0
        self._last: Experiment | None = None

    def experiment(self, planned: Plan, labels: list[str] | None, only_client: str | None) -> Experiment:
        """The experiment of a plan, on the model that is loaded if that is the one it asks for."""
        old, self._last = self._last, None
        table: Tables | None = None
        if old is not None:
            old.trainer.close()
            table = old.tables if old.config.task == planned.config.task else None
        table = table or tables(planned.config)
        if labels is not None:
            table = replace(table, labels=labels)
        base: Base | None = None
        if old is not None and _model_of(old.config, old.tables) == _model_of(planned.config, table):
            base = old.base
        else:
            self.loads += 1
        del old  # two models are not held at once
        self._last = experiment(planned, table=table, base=base, only_client=only_client)
        return self._last


def _model_of(c: RunConfig, table: Tables) -> object:
    return c.model, c.task.kind, c.seed, table.labels


class RunNode:
    """What a worker works with. `agreed` gives a run's plan, labels, only client and folder from the server's words."""

    def __init__(self, agreed: Callable[[dict[str, Any]], tuple[Plan, list[str] | None, str | None, Path]]) -> None:
        self._agreed = agreed
        self._loaded = _Loaded()

    @property
    def loads(self) -> int:
        return self._loaded.loads

    def setup(self, setup: dict[str, Any]) -> NodeRun:
        planned, labels, only_client, folder = self._agreed(setup)
        e = self._loaded.experiment(planned, labels, only_client)
        if setup.get("model") != e.base.sha256:
            raise ConfigError("the base model here is not the server's: its sha256 differs")
        engine: Simulation[Any] = Simulation(
            e.trainer,
            e.sites,
            e.rows_of,
            fresh=e.head,
            cohort=1,
            score=lambda work: evaluate.score(e, work),
            write=lambda client, work: export.write(e, work, folder / "clients" / client / "adapter"),
        )
        return NodeRun(e.clients, e.method, engine, folder)


def local_node() -> RunNode:
    """A node of the server's own machine, for any client of any run that the server names."""

    def agreed(setup: dict[str, Any]) -> tuple[Plan, list[str] | None, str | None, Path]:
        config = parse(tomllib.loads(setup["config"]), "the server's configuration")
        return plan(config), None, None, Path(setup["folder"])

    return RunNode(agreed)


def remote_node(config: RunConfig, client: str, folder: Path) -> RunNode:
    """A node with its own rows, those of `config.task.data`, and its one client's budget in `config.clients`."""

    def agreed(setup: dict[str, Any]) -> tuple[Plan, list[str] | None, str | None, Path]:
        if wrong := differences(agreement(config), setup.get("agreement")):
            raise ConfigError(f"the server's run is not the one of this node's run file: {', '.join(wrong)} differ")
        labels = setup.get("labels")
        if not isinstance(labels, list) or not all(isinstance(x, str) for x in labels):
            raise ConfigError("the server named no labels")
        run = str(setup.get("run"))
        if not run.isalnum():
            raise ConfigError("the server's run has no name")
        return plan(config), labels, client, folder / run

    return RunNode(agreed)


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
