"""Live trackers, through accelerate's: every line of rounds.jsonl is sent to TensorBoard, Weights & Biases, MLflow, ...

Offline unless the run file says otherwise: what is logged stays below RUN/track. A resumed run logs its earlier rounds again,
in the place of what was there, so that no round is missing or there twice.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedloom.disk import disk_errors
from fedloom.errors import ConfigError, nearest
from fedloom.runs.config import RunConfig, TrackSection

LOCAL = ("tensorboard", "wandb", "mlflow", "trackio", "aim", "dvclive")
"""Can log without a network."""
ONLINE = ("comet_ml", "clearml", "swanlab")


def check(section: TrackSection) -> None:
    """Raise ConfigError for a tracker that is unknown, not installed, or would need a network."""
    known = [*LOCAL, *ONLINE]
    for name in section.to:
        if name not in known:
            raise ConfigError(f"track.to has {name!r}, expected some of {', '.join(known)}{nearest(name, known)}")
        if section.offline and name in ONLINE:
            raise ConfigError(f"track.to has {name!r}, which needs a network: set track.offline = false to allow it")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"track.to has {name!r}, which is not installed: pip install {name.replace('_', '-')}")


@contextmanager
def tracked(path: Path, config: RunConfig) -> Iterator[list[Any]]:
    """The trackers of a run."""
    trackers = [_start(name, path, config) for name in config.track.to]
    try:
        yield trackers
    finally:
        for tracker in trackers:
            tracker.finish()


def send(trackers: list[Any], record: Mapping[str, Any]) -> None:
    """Log one line of rounds.jsonl, at its round."""
    for tracker in trackers:
        tracker.log(scalars(record), step=record["round"])


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """A line of rounds.jsonl as named numbers.

    >>> scalars({"eval": {"loss": 0.5}, "train_loss": None, "bytes_up": {"A": 3, "B": 4}, "dropped": {"x": "late"}})
    {'eval/loss': 0.5, 'bytes_up/total': 7, 'bytes_up/A': 3, 'bytes_up/B': 4, 'clients/dropped': 1}
    """
    found: dict[str, float | None] = {f"eval/{name}": x for name, x in record.get("eval", {}).items()}
    found["train/loss"] = record.get("train_loss")
    for way in ("bytes_up", "bytes_down"):
        if by_role := record.get(way):
            found[f"{way}/total"] = sum(by_role.values())
            found |= {f"{way}/{role}": n for role, n in by_role.items()}
    found |= {f"seconds/{name}": x for name, x in record.get("seconds", {}).items()}
    found |= {
        f"network/{name}": record["network"][name]
        for name in ("seconds", "joules")
        if name in record.get("network", {})
    }
    found |= {f"report/{name}": x for name, x in record.get("report", {}).items()}
    found["clients/dropped"] = len(record["dropped"])
    return {name: x for name, x in found.items() if x is not None}


def _start(name: str, path: Path, config: RunConfig) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's log needs it
    folder = path / "track" / name
    with disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    options: dict[str, Any] = {}
    if config.track.offline and name == "wandb":
        options = {"mode": "offline", "dir": str(folder), "name": path.name}
    elif config.track.offline and name == "mlflow":
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder.resolve()}/mlflow.db"
    kind = LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:
        # The directory is the tracker's whole name, so that its files lie in RUN/track/NAME.
        tracker = kind(name, logging_dir=str(folder.parent), **options)
    else:
        tracker = kind(config.track.project, **options)
    tracker.start()
    tracker.store_init_configuration(_flat(config.model_dump(exclude_none=True)))
    return tracker


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | str | float | int]:
    found: dict[str, bool | str | float | int] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, bool | str | float | int) else str(value)
    return found
