"""Private rows on many machines: the simulator's bytes under the same key, a ledger at each site, and where it stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.errors import ConfigError, RoundError, RunError
from fedloom.flower.worker import Worker
from fedloom.privacy.accountant import Release, epsilon
from fedloom.runs import budget, secure_sums, site_budget
from fedloom.runs import run as runs
from fedloom.runs.config import parse
from fedloom.runs.experiment import experiment
from fedloom.runs.flower_node import agreement, local_node, remote_node

from .direct import Direct

Settings = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.usefixtures("at_once")
ROWS = {"unit": "example", "clip": 0.5, "noise_multiplier": 2.0, "delta": 1e-3}
NAME = "adapter/adapter_model.safetensors"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "secure sum"])
def test_private_rows_at_sites(
    secure: bool, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dp_accounting")
    for module in (budget, site_budget):
        monkeypatch.setattr(module, "secret_file", lambda path: b"k" * 32)
    values = settings(
        method={"name": "fedit"},
        train={"rounds": 2, "local_steps": 2, "evaluate_every": 0},
        engine={"cohort": 1},
        privacy=ROWS | {"secure_aggregation": secure},
    )
    here = runs.start(parse(values, "test"), tmp_path / "here")
    far = runs.start(
        parse(values, "test"), tmp_path / "far", transport=Direct([Worker(local_node()) for _ in range(2)])
    )
    assert (far.path / NAME).read_bytes() == (here.path / NAME).read_bytes()
    spent = [line for path in sorted((far.path / "ledgers").iterdir()) for line in lines(path)]
    order = lambda line: (line["whose"], line["round"])  # noqa: E731
    assert spent == sorted(lines(here.path / "privacy.jsonl"), key=order) and len(spent) == 6
    for ours, theirs in zip(here.rounds, far.rounds, strict=True):
        assert theirs["privacy"]["epsilon"] == ours["privacy"]["epsilon"] and theirs["train_loss"] is None
    assert far.rounds[2]["privacy"]["sites"].keys() == {line["whose"] for line in spent}


def test_a_run_ends_before_a_site_would_pass_its_budget(settings: Settings, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    values = settings(method={"name": "fedit"}, train={"rounds": 4, "local_steps": 2, "evaluate_every": 0})
    fewest = min(client.examples for client in experiment(parse(values, "test")).clients)
    allowed = epsilon([Release(2.0, 4, 4 / fewest)], 1e-3) + 1e-6
    at = Direct([Worker(local_node()) for _ in range(2)])
    config = parse(values | {"privacy": ROWS | {"target_epsilon": allowed}}, "test")
    run = runs.start(config, tmp_path / "run", transport=at)
    assert [r["round"] for r in run.rounds] == [0, 1, 2] and run.rounds[2]["privacy"]["epsilon"] <= allowed
    with pytest.raises(RunError, match=r"the privacy budget is spent: one more round after round 0"):
        runs.start(parse(values | {"privacy": ROWS | {"target_epsilon": 0.01}}, "test"), tmp_path / "few", transport=at)
    # A site stops by itself, whatever its server asks.
    ledgers = site_budget.SiteLedgers(run.path / "ledgers", config.privacy)  # type: ignore[arg-type]
    (client, *_) = sorted(run.rounds[2]["privacy"]["sites"], key=run.rounds[2]["privacy"]["sites"].__getitem__)[::-1]
    with pytest.raises(RoundError, match=f"privacy budget spent: epsilon of client {client!r} would be"):
        ledgers.spend(client, 3, 0, Release(2.0, 2, 4 / fewest), "x")


def test_what_a_site_refuses_before_it_listens(settings: Settings, tmp_path: Path) -> None:
    """A method that no sum serves, a roster that lacks it or has somebody else, and a delta above one over its rows."""
    sums = {"secure_aggregation": True, "min_clients": 2}

    def site(folder: str = "north", **more: Any) -> Any:
        return remote_node(parse(settings(clients={"count": 1}, **more), "test"), "north", tmp_path / folder)

    with pytest.raises(ConfigError, match="flexlora needs them"):
        site(method={"name": "flexlora"}, privacy=sums)
    roster = tmp_path / "roster.toml"
    named = {"method": {"name": "fedit"}, "privacy": sums | {"roster": str(roster)}}
    with pytest.raises(ConfigError, match=r"there is no file .*fedloom identity"):
        site(**named)
    roster.write_text(f'south = "{secure_sums.identity(tmp_path / "south").name}"\n')
    with pytest.raises(ConfigError, match="lacks north: add the line that `fedloom identity` prints"):
        site(**named)
    roster.write_text(f'north = "{secure_sums.identity(tmp_path / "north").name}"\n')
    assert (tmp_path / "north" / "identity.key").stat().st_mode & 0o777 == 0o600
    site(**named)
    with pytest.raises(ConfigError, match="another identity for north than this site's"):
        site("other", **named)
    config = parse(settings(clients={"count": 1}, method={"name": "fedit"}, privacy=ROWS | {"delta": 0.5}), "test")
    e = experiment(parse(settings(clients={"count": 1}, method={"name": "fedit"}), "test"))
    setup = {"run": "1", "labels": e.tables.labels, "metrics": e.tables.metrics, "model": e.base.sha256}
    with pytest.raises(ConfigError, match=r"privacy.delta is 0.5, above 1 / \d+ \(\d+ rows of client 'north'"):
        remote_node(config, "north", tmp_path / "d").setup(setup | {"agreement": agreement(config)})
