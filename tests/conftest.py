"""Test session: one torch thread (tiny models are slower with more), no hub."""

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch

from fedloom.data import packaged

torch.set_num_threads(1)


@pytest.fixture
def need() -> Callable[[str], None]:
    """Skip where a packaged model or data set is not installed; in CI, fail."""

    def check(name: str) -> None:
        if packaged.locate(name) is None:
            if os.environ.get("CI") == "true":
                pytest.fail(packaged.absent(name))
            pytest.skip(packaged.absent(name))

    return check


@pytest.fixture(scope="session", autouse=True)
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted models go to a directory of this session, unless FEDLOOM_CACHE names one to keep."""
    with pytest.MonkeyPatch.context() as patch:
        if "FEDLOOM_CACHE" not in os.environ:
            patch.setenv("FEDLOOM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
