"""Before a run goes on: what it was made from, whether its adapters are whole, and earlier rounds to go back to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedloom import checkpoint
from fedloom.errors import RunError
from fedloom.runs import secure_sums
from fedloom.runs.experiment import Experiment
from fedloom.runs.run_directory import RunDirectory, digest_file, digest_files


def changes(run: RunDirectory, started: dict[str, Any], e: Experiment) -> dict[str, list[Any]]:
    """What the manifest says that a run was made from and is now something else: name -> [then, now]."""
    now = {"config": digest_file(run.config_file), **e.hashes, "labels": e.tables.labels}
    then = started.get("hashes", {}) | ({"labels": started["labels"]} if "labels" in started else {})
    if e.config.engine.superlink is not None:  # the rows are on the nodes, which have an agreement of their own
        now.pop("partition")
    return {name: [then[name], value] for name, value in now.items() if name in then and then[name] != value}


def same_layers(path: Path, started: dict[str, Any], e: Experiment) -> None:
    """Raise RunError if the run's adapters are in other layers than its configuration now says: no consent helps there."""
    if started.get("targets", e.targets) != e.targets:
        raise RunError(
            f"the adapters of {path} are in other layers than lora.targets and lora.layers of its run.toml now name: set them "
            "back, or begin a new run"
        )


def whole(run: RunDirectory, manifest: dict[str, Any]) -> bool:
    """Whether the adapters of a finished run are what its manifest says."""
    hashes = manifest.get("hashes", {})
    adapters = {"adapter": run.adapter} | {
        f"adapter of {client}": run.path / "clients" / client / "adapter" for client in hashes.get("clients", {})
    }
    want = {"adapter": hashes.get("adapter")} | {
        f"adapter of {client}": digest for client, digest in hashes.get("clients", {}).items()
    }
    return all(path.is_dir() and digest_files(path) == want[name] for name, path in adapters.items())


def go_back(run: RunDirectory, t: int) -> None:
    """Make the checkpoint of an earlier round the newest one; records after it go."""
    config = run.config()
    if config.engine.name == "flower" and secure_sums.wanted(config):
        raise RunError(
            "rounds of secure sums are not done again: clients open one sum in a round, for two would tell of one client. "
            "Resume without --round, or begin a new run"
        )
    _, state, client_states, _ = checkpoint.load(run.checkpoint, t)
    checkpoint.save(run.checkpoint, t, state, client_states, keep=t + 2)
    run.keep_rounds(t)
