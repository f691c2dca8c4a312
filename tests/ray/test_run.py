"""A whole run over two actors, one of which is lost: the same bytes as in one process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedloom
from fedloom.errors import ConfigError
from fedloom.ray import worker
from fedloom.runs.run import Observer

pytestmark = pytest.mark.xdist_group("ray")

Settings = Callable[..., dict[str, Any]]


def files(run: Path) -> dict[str, bytes]:
    """The adapters, what clients keep, and the checkpoint that names it."""
    found = [*run.glob("**/adapter_model.safetensors"), *(run / "checkpoint").rglob("*")]
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(found) if path.is_file()}


class Interrupts(Observer):
    """Ctrl-C in the middle of round 2."""

    begun = 0

    def doing(self, what: str) -> None:
        self.begun = 2 if what == "round 2" else self.begun
        if self.begun == 2 and what.startswith("trained"):
            raise KeyboardInterrupt


class Kills(Observer):
    """Ends a worker's process in the middle of a round."""

    def __init__(self) -> None:
        self.said: list[worker.Hello] = []

    def doing(self, what: str) -> None:
        if what.startswith("trained 2 ") and self.said:
            os.kill(self.said.pop().process, signal.SIGKILL)
            self.said.clear()


def test_interrupted_resumed_and_a_worker_lost_the_bytes_are_those_of_one_process(
    settings: Settings, tmp_path: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a method whose clients keep something, and have models and held-out rows of their own."""

    def config(name: str) -> dict[str, Any]:
        engine: dict[str, Any] = {"name": name, "cohort": 2, "threads": 1}
        return settings(method={"name": "fedsa_lora"}, clients={"count": 7, "holdout": 0.3}, engine=engine)

    alone = fedloom.run(config("inprocess"), tmp_path / "alone")
    with pytest.raises(KeyboardInterrupt):
        fedloom.run(config("ray"), tmp_path / "many", Interrupts())
    assert len((tmp_path / "many" / "rounds.jsonl").read_text().splitlines()) == 2

    observer, hellos = Kills(), worker.hellos

    def heard(actors: Any, patience_s: float) -> list[worker.Hello]:
        observer.said = hellos(actors, patience_s)
        return list(observer.said)

    monkeypatch.setattr(worker, "hellos", heard)
    many = fedloom.resume(tmp_path / "many", observer)

    assert files(many.path) == files(alone.path) and len(files(many.path)) > 7
    for a, b in zip(alone.rounds, many.rounds, strict=True):
        for key in ("train_loss", "clients", "eval", "eval_over", "eval_clients"):
            assert a.get(key) == b.get(key), key
    notes = [note for record in many.rounds for note in (record.get("engine") or {}).get("notes", [])]
    assert len(notes) >= 1 and "was lost" in notes[0], json.dumps(notes)


def test_secure_sums_over_workers(settings: Settings, tmp_path: Path, ray_here: None) -> None:
    """Keys and sums are here, training there; `auto` shares a round's clients between the workers."""
    made = settings(method={"name": "fedit"}, clients={"count": 4}, train={"rounds": 1})
    made["privacy"] = {"secure_aggregation": True}
    alone = fedloom.run(made | {"engine": {"cohort": 2, "threads": 1}}, tmp_path / "alone")
    many = fedloom.run(made | {"engine": {"name": "ray", "threads": 1}}, tmp_path / "many")
    assert json.loads((many.path / "manifest.json").read_text())["cohort"] == 2
    weights = Path("adapter") / "adapter_model.safetensors"
    assert (alone.path / weights).read_bytes() == (many.path / weights).read_bytes()


@pytest.mark.parametrize(
    "sections, why",
    [
        ({"engine": {"name": "ray", "workers": 3, "threads": 1}}, r"do not fit into the 2 cores"),
        ({"engine": {"name": "ray"}, "model": {"device": "cuda"}}, "but Ray has no GPU"),
        ({"engine": {"name": "ray"}, "model": {"device": "cuda:1"}}, "Ray gives each worker a GPU of its own"),
        ({"engine": {"name": "ray", "nodes": 2}}, "engine.nodes is 2, but clients are trained by engine.name = 'ray'"),
        ({"engine": {"workers": 2}}, "engine.workers is 2, but clients are trained in this process"),
        ({"engine": {"name": "ray"}, "privacy": {"unit": "example", "noise_multiplier": 1.0}}, "not built for"),
        ({"engine": {"name": "ray", "address": "127.0.0.1:9"}}, "no Ray cluster answers"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(
    sections: dict[str, Any], why: str, settings: Settings, tmp_path: Path, ray_here: None
) -> None:
    with pytest.raises(ConfigError, match=why):
        fedloom.run(settings(method={"name": "fedit"}, **sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()
