"""A rehearsal against the run that it speaks of."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedloom
from fedloom.errors import ConfigError
from fedloom.runs.dry_run import dry_run


@pytest.mark.parametrize("method", ["rolora", "fedsa_lora"])
def test_what_is_foretold_is_what_the_run_does(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Bytes to the byte, rows, parameters and clients; rolora sends something else in every other round."""
    config = settings(
        clients={"count": 5, "fraction": 0.4}, method={"name": method}, train={"rounds": 4, "local_steps": 3}
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.chdir(tmp_path)
    told = dry_run(fedloom.RunConfig(**config))
    assert [p for p in tmp_path.rglob("*") if p.name != "temporary"] == []
    result = fedloom.run(config, tmp_path / "run")
    trained = [r for r in result.rounds if r["round"] > 0]
    for key, mean in (("bytes_up", told.up_bytes), ("bytes_down", told.down_bytes)):
        assert told.rounds * mean == sum(sum(r[key].values()) for r in trained)
    assert told.sampled == len(trained[0]["clients"]) == 2 and told.clients == 5
    assert told.round_s > 0 and told.evaluation_s > 0
    assert told.total_s >= told.load_s + 4 * told.round_s


def test_what_is_wrong_is_told_and_nothing_is_written(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = fedloom.RunConfig(**settings(clients={"ranks": [2, 4]}, method={"name": "fedit"}))
    with pytest.raises(ConfigError, match="fedit follows no rank budget"):
        dry_run(config)
    assert list(tmp_path.iterdir()) == []
