"""One real deployment on the loopback for the whole session of tests: a SuperLink, two SuperNodes, two workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedloom.flower import coordinator
from fedloom.flower.sandbox import Deployment
from fedloom.flower.transport import GridTransport
from fedloom.runs.flower_node import local_worker


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of workers in this process are there at once: no pause between looks."""
    monkeypatch.setattr(coordinator, "POLL_S", 0.001)


@pytest.fixture(scope="package")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="package")
def transport(logs: Path) -> Iterator[GridTransport]:
    pytest.importorskip("flwr")
    with Deployment(2, logs, lambda path: local_worker(path, 1)) as deployment:
        transport = deployment.connect()
        yield transport
        transport.close()
