"""The curves of a fleet: the expected shapes, and that pictures and tables come out."""

import csv
from pathlib import Path

import numpy as np

from fedloom.cli.main import call
from fedloom.wireless.show import curves, figures
from fedloom.wireless.system.fleet import random_fleet
from fedloom.wireless.system.generalisation_bound import Bound

BASE = random_fleet(3, 6, 0, latency_load=0.3, energy_load=0.6).problem()


def values(drawn: curves.Sweep, curve: str) -> np.ndarray:
    return np.array([row.value for row in drawn.rows if row.curve == curve])


def test_tighter_latency_costs_and_the_optimum_is_lowest(tmp_path: Path) -> None:
    drawn = curves.latency_sweep([BASE], (0.95, 1.1, 2.0))
    best = values(drawn, curves.LABELS["bnb"])
    assert len(best) == 3 and (np.diff(best) <= 1e-9).all() and best[0] > best[-1]
    for row in drawn.rows:
        at = next(r.value for r in drawn.rows if r.curve == curves.LABELS["bnb"] and r.x == row.x)
        assert row.value >= at - 1e-9
    picture = figures.write(drawn, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "latency.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(drawn.rows) and set(rows[0]) == {"x", "curve", "value", "low", "high"}


def test_minimum_of_the_bound_moves_right_with_less_data(tmp_path: Path) -> None:
    drawn = curves.bound_shape(Bound(), samples=(500, 2000))
    less, more = (row.x for row in drawn.rows if row.curve == "minimum")
    assert less > more
    assert figures.write(drawn, tmp_path).exists()


def test_a_tighter_energy_limit_costs() -> None:
    energy = values(curves.energy_sweep([BASE], (0.7, 1.0, 2.0)), curves.LABELS["bnb"])
    assert len(energy) == 3 and (np.diff(energy) <= 1e-9).all()


def test_the_command_line_draws_a_fleet(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text("[band]\nsubcarriers = 4\n[random]\ndevices = 2\n")
    assert call(["allocate", str(fleet), "--sweep", str(tmp_path / "curves")]) == 0
    drawn = sorted(path.name for path in (tmp_path / "curves").iterdir())
    assert drawn == [f"{name}.{kind}" for name in ("bound_shape", "energy", "latency") for kind in ("csv", "png")]
