"""One real deployment on the loopback for the whole session of tests: a SuperLink, two SuperNodes, two workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedloom.engines.link import GridLink
from fedloom.engines.local import Deployment


@pytest.fixture(scope="package")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="package")
def link(logs: Path) -> Iterator[GridLink]:
    pytest.importorskip("flwr")
    with Deployment(2, logs, threads=1) as deployment:
        link = deployment.connect()
        yield link
        link.close()
