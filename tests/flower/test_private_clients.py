"""Private clients on many machines: the simulator's bytes under the same key, one ledger, the server's, and where it stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.errors import ConfigError
from fedloom.flower.worker import Worker
from fedloom.privacy.accountant import Release, epsilon
from fedloom.runs import budget
from fedloom.runs import run as runs
from fedloom.runs.config import parse
from fedloom.runs.flower_node import local_node, remote_node

from .direct import Direct

Settings = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.usefixtures("at_once")
Z = 0.2
"""As little noise as three clients can be counted under, where the bound adapts."""
CLIENTS = {"unit": "client", "clip": 0.05, "noise_multiplier": Z, "delta": 1e-3}
FEW = {"local_steps": 2, "evaluate_every": 0}
NAME = "adapter/adapter_model.safetensors"


def lines(path: Path) -> list[tuple[int, str]]:
    """(round, whose) of a ledger's entries."""
    return [(line["round"], line["whose"]) for line in map(json.loads, path.read_text().splitlines())]


@pytest.mark.parametrize("clip", [0.05, "adaptive"])
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "secure sum"])
def test_private_clients_at_nodes(
    secure: bool, clip: float | str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "secret_file", lambda path: b"k" * 32)
    values = settings(
        method={"name": "fedit"},
        train=FEW | {"rounds": 2},
        engine={"cohort": 1},
        privacy=CLIENTS | {"clip": clip, "secure_aggregation": secure},
    )
    here = runs.start(parse(values, "test"), tmp_path / "here")
    at = Direct([Worker(local_node()) for _ in range(2)])
    far = runs.start(parse(values, "test"), tmp_path / "far", transport=at)
    assert (far.path / NAME).read_bytes() == (here.path / NAME).read_bytes()
    assert (far.path / "privacy.jsonl").read_bytes() == (here.path / "privacy.jsonl").read_bytes()
    assert lines(far.path / "privacy.jsonl") == [(1, ""), (2, "")]
    for t, (ours, theirs) in enumerate(zip(here.rounds, far.rounds, strict=True)):
        assert theirs["privacy"] == ours["privacy"] and theirs["report"] == ours["report"]
        assert theirs["privacy"]["epsilon"] == (pytest.approx(epsilon([Release(Z, t)], 1e-3)) if t else 0.0)
        assert theirs["train_loss"] is None and theirs["suspicious"] == {}
    assert ("clip_within" in far.rounds[2]["report"]) == (clip == "adaptive")
    assert ("masks" in far.rounds[2]["bytes_up"]) == secure


def test_sites_keep_no_ledger_and_the_run_ends_before_its_budget_is_passed(
    settings: Settings, questions: Path, tmp_path: Path
) -> None:
    """Three sites with rows and folders of their own, one of which is lost in round 2."""
    head, *rows = questions.read_text().splitlines()
    names = ["east", "north", "south"]
    allowed = epsilon([Release(Z, 2)], 1e-3) + 1e-6
    values = settings(
        method={"name": "fedit"},
        train=FEW | {"rounds": 4},
        # Nobody calls the SuperLink: the transport is there.
        engine={"superlink": "127.0.0.1:9093", "patience_s": 60.0, "deadline_s": 60.0},
        privacy=CLIENTS | {"target_epsilon": allowed},
    )
    workers = []
    for k, name in enumerate(names):
        (tmp_path / f"{name}.csv").write_text("\n".join([head, *rows[20 * k : 20 * k + 20]]) + "\n")
        mine = values | {"task": values["task"] | {"data": str(tmp_path / f"{name}.csv")}, "clients": {"count": 1}}
        workers.append(Worker(remote_node(parse(mine, "test"), name, tmp_path / "sites" / name)))
    at = Direct(workers)
    at.tampers[1] = lambda header, answer: b"" if (header["do"], header["t"]) == ("exchange", 2) else answer
    run = runs.start(parse(values, "test"), tmp_path / "run", transport=at)
    assert [r["round"] for r in run.rounds] == [0, 1, 2] and 0 < run.rounds[2]["privacy"]["epsilon"] <= allowed
    assert run.rounds[2]["dropped"].keys() == {"north"} and all(r["train_loss"] is None for r in run.rounds)
    noise = [r["report"]["noise_std"] for r in run.rounds[1:]]
    assert noise == pytest.approx([Z * 0.05 * 1.001 / n for n in (3, 2)])
    assert lines(run.path / "privacy.jsonl") == [(1, ""), (2, "")] and (run.path / "noise.key").is_file()
    kept = {path.name for path in (tmp_path / "sites").rglob("*") if path.is_file()}
    assert "north" in kept and not {name for name in kept if name.endswith((".jsonl", ".key"))}
    drowned = CLIENTS | {"clip": "adaptive", "noise_multiplier": 4.0}
    with pytest.raises(ConfigError, match="needs at least 57 clients in a round, got 3"):
        runs.start(parse(values | {"privacy": drowned}, "test"), tmp_path / "few", transport=at)
    assert not (tmp_path / "few").exists()
