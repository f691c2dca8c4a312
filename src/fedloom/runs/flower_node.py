"""A node of a run on many machines: its model, its rows and what its clients keep, behind a worker.

A *local node* is one of the nodes of a run on one machine: it takes the configuration from the server, which started it, and
serves whichever clients the server gives it. A *remote node* has its own copy of the run file and its own rows, and takes part
only in a run that asks of it what that file says.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedloom.data import hub
from fedloom.errors import ConfigError
from fedloom.flower.node_visits import NodeRun
from fedloom.flower.worker import Worker
from fedloom.models.huggingface import Base
from fedloom.runs import evaluate, export, secure_sums, site_budget
from fedloom.runs.config import RunConfig, parse
from fedloom.runs.experiment import Experiment, experiment
from fedloom.runs.plan import Plan, plan
from fedloom.runs.tables import Tables, tables
from fedloom.simulation import Simulation

if TYPE_CHECKING:
    from fedloom.privacy.keys import Identity

LOCAL = {
    "model": ("name", "device", "attention", "checkpointing"),
    "task": ("data", "eval_data", "proxy_data", "limit", "eval_limit", "holdout"),
}
"""Keys of a run file that each machine sets for itself; all others of these sections must be the same everywhere."""


def agreement(config: RunConfig) -> dict[str, Any]:
    """What server and nodes must have in common, as nested plain values."""
    values = config.model_dump(mode="json")
    shared = {name: values[name] for name in ("seed", "model", "task", "lora", "method", "train", "privacy")}
    shared["clients"] = {"holdout": config.clients.holdout}
    for section, keys in LOCAL.items():
        shared[section] = {key: x for key, x in shared[section].items() if key not in keys}
    if shared["privacy"] is not None:  # whatever the file is called here, it says the same everywhere
        shared["privacy"] = shared["privacy"] | {"roster": secure_sums.roster(config)}
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


@dataclass(frozen=True)
class Agreed:
    """What a node and the server agreed upon."""

    plan: Plan
    folder: Path
    """For what clients keep, and their own models."""
    labels: list[str] | None = None
    """The run's, where the rows here are not the server's."""
    metrics: list[str] | None = None
    run: str = ""
    """Its name."""
    identity: Identity | None = None
    client: str | None = None
    """The only client, who has all rows; None for those of the partition."""


class _Loaded:
    """The base model of this process: loaded once, and handed from run to run while they ask for the same one."""

    def __init__(self) -> None:
        self.loads = 0
        self._last: Experiment | None = None

    def experiment(self, agreed: Agreed) -> Experiment:
        """The experiment agreed upon, on the model that is loaded if that is the one it asks for."""
        planned = agreed.plan
        old, self._last = self._last, None
        table: Tables | None = None
        if old is not None:
            old.trainer.close()
            table = old.tables if old.config.task == planned.config.task else None
        table = table or tables(planned.config)
        if agreed.labels is not None:
            table = replace(table, labels=agreed.labels)
        if agreed.metrics is not None:
            table = replace(table, metrics=agreed.metrics)
        base: Base | None = None
        if old is not None and _model_of(old.config, old.tables) == _model_of(planned.config, table):
            base = old.base
        else:
            self.loads += 1
        del old  # two models are not held at once
        self._last = experiment(planned, table=table, base=base, only_client=agreed.client)
        return self._last


def _model_of(c: RunConfig, table: Tables) -> object:
    return c.model, c.task.kind, c.seed, table.labels


class FlowerNode:
    """What a worker works with. `agree` reads the server's words: it raises ConfigError for a run that is none of ours."""

    def __init__(self, agree: Callable[[dict[str, Any]], Agreed]) -> None:
        self._agree = agree
        self._loaded = _Loaded()

    @property
    def loads(self) -> int:
        return self._loaded.loads

    def setup(self, setup: dict[str, Any]) -> NodeRun:
        agreed = self._agree(setup)
        e = self._loaded.experiment(agreed)
        if setup.get("model") != e.base.sha256:
            raise ConfigError("the base model here is not the server's: its sha256 differs")
        ledgers = site_budget.at_site(agreed.folder, e)
        simulation = Simulation(
            e.trainer,
            e.sites,
            e.rows_of,
            fresh=e.head,
            cohort=1,
            score=lambda works: evaluate.scores(e, works),
            write=lambda client, work: export.write(e, work, agreed.folder / "clients" / client / "adapter"),
        )
        sums = secure_sums.at_node(e.config, agreed.run, agreed.folder, agreed.identity)
        return NodeRun(e.clients, e.method, simulation, agreed.folder, sums, ledgers.epsilon if ledgers else None)


def local_node() -> FlowerNode:
    """A node of the server's own machine, for any client of any run that the server names."""

    def agree(setup: dict[str, Any]) -> Agreed:
        config = parse(tomllib.loads(setup["config"]), "the server's configuration")
        return Agreed(plan(config), Path(setup["folder"]), run=str(setup["run"]))

    return FlowerNode(agree)


def remote_node(config: RunConfig, client: str, folder: Path) -> FlowerNode:
    """A node with its own rows, those of `config.task.data`, and its one client's budget in `config.clients`.

    Raises ConfigError for a run file that no server could use, or a roster that has another identity for this client.
    """
    planned = plan(config)
    who: Identity | None = None
    if secure_sums.wanted(config):
        who = secure_sums.identity(folder)
        secure_sums.check_identity(config, client, who)

    def agree(setup: dict[str, Any]) -> Agreed:
        if wrong := differences(agreement(config), setup.get("agreement")):
            raise ConfigError(f"the server's run is not the one of this node's run file: {', '.join(wrong)} differ")
        labels, metrics = _names(setup, "labels"), _names(setup, "metrics")
        run = str(setup.get("run"))
        if not (run.isascii() and run.isalnum()):
            raise ConfigError("the server's run has no name")
        return Agreed(planned, folder / run, labels, metrics, run, who, client)

    return FlowerNode(agree)


def _names(setup: dict[str, Any], key: str) -> list[str]:
    names = setup.get(key)
    if not isinstance(names, list) or not all(isinstance(x, str) for x in names):
        raise ConfigError(f"the server named no {key}")
    return names


def serve(node: FlowerNode, path: Path, threads: int | None) -> None:
    """Be a worker until the process is ended."""
    hub.quiet()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in ("httpx", "datasets", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if threads is not None:
        torch.set_num_threads(threads)
    Worker(node).serve(path)


def local_worker(path: Path, threads: int | None) -> list[str]:
    """The command of a worker that serves whatever client of whatever run the server names."""
    more = [] if threads is None else ["--threads", str(threads)]
    return [sys.executable, "-m", "fedloom.runs.flower_node", "--socket", str(path), *more]


def main() -> None:
    """The worker of a local node."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    serve(local_node(), args.socket, args.threads)


if __name__ == "__main__":
    main()
