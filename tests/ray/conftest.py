"""One Ray of two cores for all tests of this folder."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    from fedloom.ray import cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with cluster.connected(None):
        yield
