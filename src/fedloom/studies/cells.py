"""The cells of a study: one run for each method, draw and seed, in a directory that is named by what it is."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedloom import sampling
from fedloom.errors import ConfigError, FedloomError
from fedloom.runs import config as configs
from fedloom.runs.config import RunConfig, TrainSection
from fedloom.runs.contradictions import refuse_contradictions
from fedloom.runs.plan import plan
from fedloom.studies.study import CONTROLS, Arm, Study, flat, merged, nested

TUNING_DRAW = 1_000_000
"""Draws from here on choose a grid's values; no score is taken from them."""

_LR = "train.lr"
Point = dict[str, Any]
"""Values of a grid, by dotted key."""
Role = Literal["method", "control", "tuning"]


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    label: str
    role: Role
    draw: int
    seed: int
    point: Point
    values: dict[str, Any]
    """The run file's."""

    @property
    def key(self) -> str:
        """Where its run directory is, below the study's. Other settings have another name: nothing is run twice or mixed up."""
        digest = hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()[:8]
        draw = f"tuning-{self.draw - TUNING_DRAW}" if self.role == "tuning" else f"draw-{self.draw}"
        return f"{self.label}/{draw}-seed-{self.seed}-{digest}"

    def config(self) -> RunConfig:
        """The run's configuration."""
        return configs.parse(self.values, f"{self.label}, draw {self.draw}")


def grid_of(grid: Mapping[str, Any], where: str) -> list[Point]:
    """The points of a grid; one without values if it has none. Raises ConfigError for an empty one."""
    axes = flat(grid)
    for key, options in axes.items():
        if not isinstance(options, list) or not options:
            raise ConfigError(
                f"{where}: grid.{key} is {options!r}, expected a list of values to choose from; "
                f"for one value write set.{key}"
            )
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def grids(study: Study, source: str = "") -> dict[str, list[Point]]:
    """The grid of every method and control. Raises ConfigError for an empty one."""
    where = f"{source}: " if source else ""
    found = {label: grid_of(arm.grid, f"{where}[methods.{label}]") for label, arm in study.file.methods.items()}
    asked = study.file.controls.grid
    rates = sorted({point[_LR] for points in found.values() for point in points if _LR in point})
    # One client that takes all the steps of a round goes farther at the same rate than a mean of clients does.
    lr = study.base.get("train", {}).get("lr", TrainSection().lr)
    for label, own in (("alone", [lr]), ("pooled", [lr / 4, lr])):
        grid = asked or {_LR: rates or own}
        found[label] = grid_of(grid, f"{where}[controls]")
    return found


def tuning_cells(study: Study) -> list[Cell]:
    """Runs that choose the values of grids with more than one point."""
    return [
        _cell(study, label, "tuning", TUNING_DRAW + t, 0, point)
        for label, points in grids(study).items()
        if len(points) > 1
        for t, point in itertools.product(range(study.file.tuning.draws), points)
    ]


def cells(study: Study, chosen: Mapping[str, Point]) -> list[Cell]:
    """Runs that are scored, draw by draw, so that what can be seen is seen early. `chosen`: label -> grid point."""
    found = []
    for draw, index in itertools.product(range(study.file.draws), range(len(study.file.seeds or [0]))):
        for label in study.file.methods:
            found.append(_cell(study, label, "method", draw, index, chosen[label]))
        if draw < (study.file.controls.draws or study.file.draws):
            found += [_cell(study, label, "control", draw, index, chosen[label]) for label in CONTROLS]
    return found


def check(study: Study, source: str) -> None:
    """Raise ConfigError for a method, field, budget or grid that is wrong, in words that name its table."""
    for label, points in grids(study, source).items():
        control = label in CONTROLS
        where = f"{source}: [controls]" if control else f"{source}: [methods.{label}]"
        for point in points:
            try:
                made = plan(_cell(study, label, "control" if control else "method", 0, 0, point).config())
                refuse_contradictions(made, made.config.engine.name)
            except FedloomError as error:
                raise ConfigError(f"{where}: {str(error).removeprefix('[method] ')}") from error


def _cell(study: Study, label: str, role: Role, draw: int, seed_index: int, point: Point) -> Cell:
    base = study.base
    first = base.get("seed", 0)
    split = base.get("clients", {}).get("split_seed", first) + draw
    seed = first + draw if study.file.seeds is None else study.file.seeds[seed_index]
    if label in CONTROLS:
        values = merged(_control(base, label), nested(point))
    else:
        values = _method(base, label, study.file.methods[label], point)
    return Cell(label, role, draw, seed, point, merged(values, {"seed": seed, "clients": {"split_seed": split}}))


def _method(base: Mapping[str, Any], label: str, arm: Arm, point: Mapping[str, Any]) -> dict[str, Any]:
    # The base's own [method] is no part of it: fields of another method do not carry over.
    values = {key: value for key, value in base.items() if key != "method"}
    values["method"] = {"name": arm.name or label} | arm.fields
    return merged(merged(values, nested(arm.set)), nested(point))


def _control(base: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The base without budgets and without network: alone with the same partition, pooled with one client."""
    values = {key: value for key, value in base.items() if key not in ("method", "network")}
    clients = {key: x for key, x in base.get("clients", {}).items() if key not in ("ranks", "keep", "fraction")}
    train = dict(base.get("train", {}))
    if label == "alone":
        # Every client's model is scored on all held-out rows: once is dear enough.
        train["evaluate_every"] = 0
        return values | {"method": {"name": "fedloom.studies.alone:Alone"}, "clients": clients, "train": train}
    pooled = {key: x for key, x in clients.items() if key == "split_seed"} | {"count": 1, "partition": "iid"}
    if "local_steps" in train:
        # As many samples a round as the clients of a round together.
        share = base.get("clients", {})
        train["local_steps"] *= sampling.count(share.get("fraction", 1.0), share.get("count", 4))
    return values | {"method": {"name": "fedit"}, "clients": pooled, "train": train}
