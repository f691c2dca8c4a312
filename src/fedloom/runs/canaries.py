"""Canaries: training rows with a random label, each in the data or not by a secret coin, to be told apart after training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedloom.data.tokenize import Encoded
from fedloom.errors import ConfigError
from fedloom.privacy.noise import uniforms
from fedloom.privacy.secret import secret_file

if TYPE_CHECKING:
    from fedloom.runs.experiment import Experiment


@dataclass(frozen=True)
class Canaries:
    """Which rows of the training table they are."""

    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    coins: NDArray[np.bool_]
    """Whether each is in the data. Secret until the audit."""

    @property
    def left_out(self) -> frozenset[int]:
        """Rows that no client trains on."""
        return frozenset(self.rows[~self.coins].tolist())

    def labelled(self, rows: Encoded) -> Encoded:
        """The training rows with the canaries' labels."""
        assert rows.targets is not None
        targets = rows.targets.copy()
        targets[self.rows] = self.labels
        return replace(rows, targets=targets)


def plant(path: Path, e: Experiment) -> Canaries:
    """The canaries of a run, from the key in its directory. Raises ConfigError if there are more than half of the rows."""
    assert e.config.privacy is not None
    count, rows = e.config.privacy.canaries, len(e.tables.train)
    if count > rows // 2:
        raise ConfigError(f"privacy.canaries is {count}, expected at most half of the {rows} training rows")
    key = secret_file(path / "canaries.key")
    chosen = np.argsort(uniforms(key, rows, "rows").numpy(), kind="stable")[:count]
    labels = (uniforms(key, count, "labels").numpy() * len(e.tables.labels)).astype(np.int64)
    return Canaries(chosen.astype(np.int64), labels, uniforms(key, count, "coins").numpy() < 0.5)
