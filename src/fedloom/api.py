"""The Python interface: run and resume."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from fedloom.data import hub
from fedloom.runs import config as configs
from fedloom.runs import run as runs
from fedloom.runs.config import RunConfig
from fedloom.runs.run import Observer, Result
from fedloom.studies import web


def run(
    config: str | PathLike[str] | Mapping[str, Any] | RunConfig,
    out: str | PathLike[str] | None = None,
    observer: Observer | None = None,
) -> Result:
    """Train what a run file, a nested dict or a RunConfig describes, in a new directory (default: below `runs/`).

    Raises ConfigError, DataError, ModelError, HubError or RunError for what the caller can mend, RoundError if a round had
    no usable upload.
    """
    hub.quiet()
    if isinstance(config, RunConfig):
        settings = config
    elif isinstance(config, Mapping):
        settings = configs.parse(config, "the run's configuration")
    else:
        settings = configs.load(Path(config))
    result = runs.start(settings, None if out is None else Path(out), observer)
    web.if_asked(result.path)
    return result


def load_config(path: str | PathLike[str], overrides: Iterable[str] = ()) -> RunConfig:
    """A run file with `KEY=VALUE` overrides applied, such as `train.rounds=5`. Raises ConfigError naming every wrong key."""
    return configs.load(Path(path), overrides)


def resume(
    path: str | PathLike[str],
    observer: Observer | None = None,
    *,
    accept_changes: bool = False,
    back_to: int | None = None,
) -> Result:
    """Go on with a run after a crash or an interruption, or from an earlier round whose checkpoint is kept (`back_to`).

    Raises RunError if data, model or run file are not what the run began with, unless `accept_changes`.
    """
    hub.quiet()
    result = runs.resume(Path(path), observer, accept_changes=accept_changes, back_to=back_to)
    web.if_asked(result.path)
    return result
