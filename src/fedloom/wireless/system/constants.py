"""The bound's constants from a finished run: the recipe of the project's FedLoDrop specification, 4.6.

    C (loss_range)           largest clipped loss seen
    eta, G_g (lipschitz)     running maximum of the gradient norm
    D (adapter_norm)         largest norm of a client's adapter
    n                        all training samples
    A1 (dropout_penalty)     lr (L^2 D^2 + G_g^2), one round of (25), or without the learning rate over mu at steady state;
                             L is the smoothness, G_g / D unless given (the gradient's change over the adapter's length)
    Lambda_min               at least 1e-3 (0 makes the gap infinite without dropout)
    delta                    0.05

The recipe is derived; the paper's constants are unknown. They are worst cases along one run, so the bound is loose: its
shape, and thus the rates, mean more than its height.

Read from the run directory: every line of `rounds.jsonl` from round 1 on has `"report": {client id: {"loss_max": ...,
"grad_norm_max": ..., "adapter_norm": ...}}` (or the three keys directly under "report"); `run.toml` gives `train.lr`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom import toml
from fedloom.errors import ConfigError, RunError
from fedloom.wireless.system.empirical_error import Empirical
from fedloom.wireless.system.generalisation_bound import Bound, Gap

_KEYS = ("loss_max", "grad_norm_max", "adapter_norm")


@dataclass(frozen=True)
class Constants:
    """What a run shows of the bound's constants; plain numbers."""

    loss_max: float
    grad_norm_max: float
    adapter_norm: float
    rounds: int
    lr: float = 1.0
    smoothness: float | None = None
    """L; None: grad_norm_max / adapter_norm."""
    curvature_min: float = 1e-3
    regularisation: float = 0.1
    failure: float = 0.05

    @property
    def dropout_penalty(self) -> float:
        """A1 = lr (L^2 D^2 + G_g^2)."""
        smoothness = self.grad_norm_max / self.adapter_norm if self.smoothness is None else self.smoothness
        return self.lr * ((smoothness * self.adapter_norm) ** 2 + self.grad_norm_max**2)

    def bound(self, empirical: Empirical = "linear", gap: Gap = "pooled") -> Bound:
        """The bound with these constants."""
        return Bound(
            empirical=empirical,
            gap=gap,
            dropout_penalty=self.dropout_penalty,
            loss_range=self.loss_max,
            lipschitz=self.grad_norm_max,
            curvature_min=max(self.curvature_min, 1e-3),
            regularisation=self.regularisation,
            failure=self.failure,
        )


def from_run(run_dir: Path | str) -> Constants:
    """Constants from a run directory. Raises RunError if it cannot be read, ConfigError for a report without its keys."""
    run_dir = Path(run_dir)
    path = run_dir / "rounds.jsonl"
    try:
        lines = path.read_text().splitlines()
    except OSError:
        raise RunError(f"{path} cannot be read, expected a finished run: give its directory") from None
    largest = dict.fromkeys(_KEYS, 0.0)
    rounds = 0
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise RunError(f"line {number} of {path} is not JSON ({error}): the run was cut off, resume it") from None
        if not isinstance(record, dict) or record.get("round", number - 1) == 0:
            continue  # round 0 is the untuned model
        rounds += 1
        for report in _reports(record, number, path):
            for key in _KEYS:
                largest[key] = max(largest[key], _number(report, key, number, path))
    if not rounds:
        raise ConfigError(f"{path} has no round of training, expected at least one: train first")
    for key, value in largest.items():
        if value <= 0.0:
            raise ConfigError(f"{key} is 0 in every round of {path}, expected more: the run trained nothing")
    return Constants(**largest, rounds=rounds, lr=_learning_rate(run_dir))


def _reports(record: dict[str, Any], number: int, path: Path) -> Iterator[dict[str, Any]]:
    report = record.get("report")
    if not isinstance(report, dict) or not report:
        raise ConfigError(
            f"line {number} of {path} has no report, expected report = {{{', '.join(_KEYS)}}} of each client: "
            "train again with a version that writes it"
        )
    if all(isinstance(value, dict) for value in report.values()):
        yield from report.values()
    else:
        yield report


def _number(report: dict[str, Any], key: str, number: int, path: Path) -> float:
    value = report.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        got = "nothing" if value is None else repr(value)
        raise ConfigError(
            f"line {number} of {path} has {got} for report.{key}, expected a finite number: train again with a version that "
            "writes it"
        )
    return float(value)


def _learning_rate(run_dir: Path) -> float:
    """train.lr of the resolved configuration; 1 without one."""
    try:
        config = toml.read_toml(run_dir / "run.toml", missing="")
        return float(config["train"]["lr"])
    except (ConfigError, KeyError, TypeError, ValueError):
        return 1.0
