"""The study file: a base run, the methods that change it, draws, a budget; checked before anything is run.

base = "run.toml"                 the run that all share; by default the packaged quickstart
draws = 5                         partitions and hold-outs, shared by all methods

[methods.fedit]                   a [method] table; its name is the label by default
[methods.fslora]
sketch = "balanced"
set.clients.ranks = [2, 4, 8, 8]  other keys of the run file
grid.train.lr = [3e-3, 6e-3]      values to choose from on draws of their own

[budget]
bytes = 20e6
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedloom import toml
from fedloom.data.metrics import default_metrics
from fedloom.errors import ConfigError
from fedloom.runs import config as configs
from fedloom.runs.config import RunConfig

CONTROLS = {"alone": "each client alone (mean)", "pooled": "pooled data"}
"""Controls that are trained; the untuned base is the pooled run's round 0."""
UNTUNED = "untuned"
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.+-]*")
Amount = Annotated[float, Field(gt=0)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Budget(_Table):
    """[budget]: what a method may spend before it is scored. One of these."""

    bytes: Amount | None = None
    """Up and down, all clients."""
    seconds: Amount | None = None
    """Simulated ones with a [network], else measured ones of training."""
    joules: Amount | None = None
    rounds: Amount | None = None
    samples: Amount | None = None

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError(
                f"expected one of {', '.join(Budget.model_fields)}, the budget at which methods are scored"
            )
        return self

    @property
    def kind(self) -> str:
        """Which of them."""
        return next(iter(self.model_dump(exclude_none=True)))

    @property
    def amount(self) -> float:
        """How much of it."""
        return float(getattr(self, self.kind))

    @property
    def of_control(self) -> Budget | None:
        """The budget of a control, which crosses no network: scored at the end, unless rounds or samples say when."""
        return self if self.kind in ("rounds", "samples") else None


class Tuning(_Table):
    """[tuning]: how a grid's values are chosen: on draws that no score is taken from."""

    draws: int = Field(1, ge=1)
    score: str = "loss"


class Controls(_Table):
    """[controls]: the runs beside the methods. They get a learning rate of their own, as the methods do."""

    draws: int | None = Field(None, ge=1)
    """On how many of the draws they are trained; by default on all."""
    grid: dict[str, Any] = {}
    """As a method's; by default all learning rates of the methods' grids, else for pooled data lr / 4 and lr."""


class Arm(BaseModel):
    """[methods.LABEL]: a [method] table with `set` and `grid` beside its fields."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    name: str | None = None
    """The method; by default the label."""
    set: dict[str, Any] = {}
    """Keys of the run file that this method changes."""
    grid: dict[str, Any] = {}
    """Keys of the run file, each with a list of values to try."""

    @property
    def fields(self) -> dict[str, Any]:
        """The method's own fields."""
        return dict(self.model_extra or {})


class StudyFile(_Table):
    """The keys of a study file, with their defaults."""

    base: str = "quickstart"
    """A run file, from the study file's folder; "quickstart" is the packaged one."""
    draws: int = Field(5, ge=1)
    seeds: list[Annotated[int, Field(ge=0)]] | None = None
    """Training seeds on every draw; by default one, which moves with the draw."""
    score: str | None = None
    """The metric compared; by default the first of the task's."""
    statistics: bool | None = None
    """Intervals and tests; by default wherever there are two draws."""
    target: float | None = None
    """A score, for the bytes up and down to reach it; by default what the worst method ends with."""
    budget: Budget | None = None
    tuning: Tuning = Tuning()
    controls: Controls = Controls()
    set: dict[str, Any] = {}
    """Keys of the run file that are changed for all methods."""
    methods: dict[str, Arm] = Field(min_length=1)


@dataclass(frozen=True)
class Study:
    """A checked study."""

    name: str
    file: StudyFile
    base: dict[str, Any]
    """Values of the base run, with the study's own `set`."""
    score: str

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the score is better."""
        return self.score not in LOWER_IS_BETTER


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """A study from its file. Raises ConfigError naming what is wrong with it."""
    values = toml.read_toml(path, missing=f"there is no study file {path}, expected a TOML file (docs/compare.md)")
    return parse(values | dict(overrides or {}), str(path), path.parent)


def parse(
    values: Mapping[str, Any], source: str, folder: Path = Path(), base: Mapping[str, Any] | None = None
) -> Study:
    """A study from nested values; `folder` is where its base run file is looked for first, `base` is used instead of it."""
    if not values.get("methods"):
        raise ConfigError(f"{source}: it compares no methods, expected a table for each: [methods.fslora]")
    file = toml.validate(StudyFile, values, source)
    for label in file.methods:
        if not _LABEL.fullmatch(label) or label in (*CONTROLS, UNTUNED):
            raise ConfigError(
                f"{source}: [methods.{label}]: a label is letters, digits, spaces and _ . + -, and none of the controls' "
                f"({', '.join((UNTUNED, *CONTROLS))})"
            )
    if file.statistics and file.draws < 2:
        raise ConfigError(
            f"{source}: statistics = true with draws = {file.draws}: intervals need at least 2 draws, "
            "and 5 or more to be of use; raise draws, or remove statistics"
        )
    if file.seeds is not None and (not file.seeds or len(set(file.seeds)) < len(file.seeds)):
        raise ConfigError(f"{source}: seeds is {file.seeds}, expected different whole numbers")
    read = configs.read_toml(_base(file.base, source, folder)) if base is None else base
    changed = merged(read, nested(file.set))
    study = Study(Path(source).stem, file, changed, _score(file, changed, source))
    _check_budget(study, source)
    return study


def _base(name: str, source: str, folder: Path) -> Path:
    if name == "quickstart":
        return Path(configs.__file__).parent.parent / "quickstart.toml"
    for path in (folder / name, Path(name)):
        if path.is_file():
            return path
    raise ConfigError(f"{source}: base is {name!r}, expected a run file: there is none in {folder} nor here")


def _score(file: StudyFile, base: dict[str, Any], source: str) -> str:
    task = configs.parse(base | {"method": {"name": "fedit"}}, f"{source}, base {file.base}").task
    known = list(dict.fromkeys([*(task.metrics or default_metrics(task.kind, task.data)), "loss"]))
    for key, asked in (("score", file.score), ("tuning.score", file.tuning.score)):
        if asked is not None and asked not in known:
            raise ConfigError(
                f"{source}: {key} is {asked!r}, the run has: {', '.join(known)} (task.metrics adds others)"
            )
    return file.score or known[0]


def _check_budget(study: Study, source: str) -> None:
    budget = study.file.budget
    if budget is None:
        return
    if budget.kind == "joules" and "network" not in study.base:
        raise ConfigError(f"{source}: a budget of joules needs a simulated network: [network] in the base run file")
    if budget.kind == "rounds":
        most = max(_rounds(study, arm) for arm in study.file.methods.values())
        if most < budget.amount:
            raise ConfigError(
                f"{source}: no method reaches the budget of {budget.amount:g} rounds, they train {most} at most: "
                "raise train.rounds, or lower the budget"
            )


def _rounds(study: Study, arm: Arm) -> int:
    values = merged(study.base, nested(arm.set))
    return RunConfig.model_validate(values | {"method": {"name": "fedit"}}).train.rounds


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with nested changes laid over them.

    >>> merged({"train": {"rounds": 5, "lr": 1}}, {"train": {"rounds": 2}})
    {'train': {'rounds': 2, 'lr': 1}}
    """
    made = dict(values)
    for key, value in changes.items():
        below = made.get(key)
        made[key] = merged(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return made


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with dots as tables: `{"train.lr": 1}` is `{"train": {"lr": 1}}`."""
    made: dict[str, Any] = {}
    for key, value in flat(values).items():
        into = made
        *tables, last = key.split(".")
        for table in tables:
            into = into.setdefault(table, {})
        into[last] = value
    return made


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as keys with dots.

    >>> flat({"train": {"lr": [1, 2]}, "lora.rank": 4})
    {'train.lr': [1, 2], 'lora.rank': 4}
    """
    made: dict[str, Any] = {}
    for key, value in values.items():
        made |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return made
