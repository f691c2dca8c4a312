"""Who has which rows follows `clients.split_seed`; start, sampling and batches follow `seed`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedloom.errors import ConfigError
from fedloom.runs.config import RunConfig, parse
from fedloom.runs.experiment import Experiment, experiment

Settings = Callable[..., dict[str, Any]]
TASK = {"limit": 30, "eval_limit": 8}


def made(settings: Settings, seed: int, split_seed: int | None = None) -> Experiment:
    clients = {"partition": "dirichlet"} | ({} if split_seed is None else {"split_seed": split_seed})
    return experiment(RunConfig.model_validate(settings(task=TASK, clients=clients) | {"seed": seed}))


def rows(e: Experiment) -> dict[str, Any]:
    return {name: e.hashes[name] for name in ("data", "eval_data", "partition")}


def start(e: Experiment) -> torch.Tensor:
    return torch.cat([x.flatten() for x in e.initial_state()["A"].values()])


def test_rows_follow_the_split_seed_and_the_start_follows_the_seed(settings: Settings) -> None:
    first, other_seed = made(settings, seed=0, split_seed=5), made(settings, seed=1, split_seed=5)
    other_split = made(settings, seed=0, split_seed=6)
    assert rows(first) == rows(other_seed) and not torch.equal(start(first), start(other_seed))
    assert all(rows(first)[name] != rows(other_split)[name] for name in rows(first))
    assert torch.equal(start(first), start(other_split))


def test_the_split_seed_is_the_seed_by_default(settings: Settings) -> None:
    assert rows(made(settings, seed=5)) == rows(made(settings, seed=0, split_seed=5))


def test_a_negative_split_seed_is_refused(settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"clients\.split_seed: got -1"):
        parse(settings(clients={"split_seed": -1}), "my.toml")
