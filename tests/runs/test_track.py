"""Trackers: TensorBoard's event files say what rounds.jsonl says; a run's own report."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedloom
from fedloom.errors import ConfigError
from fedloom.runs.run import Observer

Settings = Callable[..., dict[str, Any]]


class Stop(Observer):
    """Interrupts the run after a round."""

    def __init__(self, after: int) -> None:
        self.after = after

    def round(self, record: dict[str, Any]) -> None:
        if record["round"] == self.after:
            raise KeyboardInterrupt


def test_tensorboard_has_every_round_once(settings: Settings, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = settings(track={"to": ["tensorboard"]})
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fedloom.run(config, out, Stop(after=2))
    result = fedloom.resume(out)
    folder = out / "track" / "tensorboard"
    assert len(list(folder.glob("events.*"))) == 1
    events = EventAccumulator(str(folder)).Reload()
    for name, values in {
        "eval/accuracy": [r["eval"]["accuracy"] for r in result.rounds],
        "bytes_up/total": [sum(r["bytes_up"].values()) for r in result.rounds[1:]],
        "train/loss": [r["train_loss"] for r in result.rounds[1:]],
    }.items():
        logged = events.Scalars(name)
        assert [e.step for e in logged] == list(range(4 - len(values), 4))
        assert [e.value for e in logged] == pytest.approx(values)


def test_a_run_writes_its_own_report_at_the_end(settings: Settings, tmp_path: Path) -> None:
    result = fedloom.run(settings(track={"report": True}), tmp_path / "run")
    page = (result.path / "report.html").read_text()
    assert "Round by round" in page and f"{result.eval['accuracy']:.4f}" in page
    assert not (result.path / "track").exists()


def test_tracking_changes_nothing(settings: Settings, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    plain = fedloom.run(settings(), tmp_path / "plain")
    logged = fedloom.run(settings(track={"to": ["tensorboard"]}), tmp_path / "logged")
    weights = "adapter/adapter_model.safetensors"
    assert (plain.path / weights).read_bytes() == (logged.path / weights).read_bytes()


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("tensorbord", "track.to has 'tensorbord'.*did you mean 'tensorboard'"),
        ("comet_ml", "needs a network: set track.offline = false"),
        ("dvclive", "not installed: pip install dvclive"),
    ],
)
def test_a_tracker_that_cannot_be_used_is_told_before_anything_is_written(
    to: str, message: str, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        fedloom.run(settings(track={"to": [to]}), tmp_path / "run")
    assert os.listdir(tmp_path) == []
