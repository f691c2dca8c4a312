"""The Python interface: run and resume."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.data import hub
from fedloom.runs import config as configs
from fedloom.runs import run as runs
from fedloom.runs.config import RunConfig
from fedloom.runs.given import Metric, gather
from fedloom.runs.run import Observer, Result
from fedloom.sampling import Sampler
from fedloom.studies import web

if TYPE_CHECKING:
    from torch import nn


def run(
    config: str | PathLike[str] | Mapping[str, Any] | RunConfig,
    out: str | PathLike[str] | None = None,
    observer: Observer | None = None,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    data: Any = None,
    eval_data: Any = None,
    metrics: Mapping[str, Metric] | None = None,
    sampler: Sampler | None = None,
) -> Result:
    """Train what a run file, a nested dict or a RunConfig describes, in a new directory (default: below `runs/`).

    Objects of your own stand for what the configuration names: a `model` of transformers with its `tokenizer` (taken over:
    frozen and cast in place), `data` as rows or client -> rows, and `eval_data`, each a `datasets.Dataset`, a pandas DataFrame
    or a list of dicts; `metrics`, name -> function(predictions, references); `sampler(clients, round)` -> those that take
    part, a function of its arguments alone if the run is to be resumed. `docs/trainer.md` has an example.

    Raises ConfigError, DataError, ModelError, HubError or RunError for what the caller can mend, RoundError if a round had
    no usable upload.
    """
    hub.quiet()
    if isinstance(config, RunConfig):
        values = config.model_dump(exclude_unset=True)
    elif isinstance(config, Mapping):
        values = dict(config)
    else:
        values = configs.read_toml(Path(config))
    source = str(config) if isinstance(config, (str, PathLike)) else "the run's configuration"
    entered, given = gather(
        values, model=model, tokenizer=tokenizer, data=data, eval_data=eval_data, metrics=metrics, sampler=sampler
    )
    settings = config if isinstance(config, RunConfig) and entered == values else configs.parse(entered, source)
    result = runs.start(settings, None if out is None else Path(out), observer, given=given)
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
    model: nn.Module | None = None,
    tokenizer: Any = None,
    data: Any = None,
    eval_data: Any = None,
    metrics: Mapping[str, Metric] | None = None,
    sampler: Sampler | None = None,
) -> Result:
    """Go on with a run after a crash or an interruption, or from an earlier round whose checkpoint is kept (`back_to`).

    What was given to `run` is given again. Raises RunError if data, model or run file are not what the run began with, unless
    `accept_changes`.
    """
    hub.quiet()
    given = gather(
        {}, model=model, tokenizer=tokenizer, data=data, eval_data=eval_data, metrics=metrics, sampler=sampler
    )[1]
    result = runs.resume(Path(path), observer, accept_changes=accept_changes, back_to=back_to, given=given)
    web.if_asked(result.path)
    return result
