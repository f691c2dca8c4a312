"""A worker: one actor with one trainer, made once, and started again with it if its process is lost."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedloom.core import Work
from fedloom.data.batches import Encoded
from fedloom.errors import ConfigError
from fedloom.ray import pickles
from fedloom.simulation import Fit, Fitted, fit
from fedloom.train.trainer import Evaluation, Trainer


@dataclass(frozen=True)
class Hello:
    """What a worker says of itself once its base is loaded."""

    host: str
    process: int
    device: str
    """`cuda` or `cpu`."""
    dtype: torch.dtype
    model: str
    """sha256 of the base."""
    free: int | None
    """Bytes of its device that training may take."""


class Worker:
    """What a pool calls. `make` loads the base and says who this is; it is called where the actor runs."""

    def __init__(self, make: bytes, path: list[str]) -> None:
        # Methods of one's own are modules beside the run file, where the driver finds them.
        sys.path.extend(x for x in path if x not in sys.path)
        self._wrong: Exception | None = None
        try:
            loaded: Callable[[], tuple[Trainer, Hello]] = pickles.loads(make)
            self._trainer, self._hello = loaded()
        except Exception as error:  # Ray would tell it as a page of text, and start the actor again and again
            self._wrong = error

    def hello(self) -> Hello:
        """Who this is, once the base is loaded. Raises what kept it from being loaded."""
        if self._wrong is not None:
            raise self._wrong
        return self._hello

    def call(self, name: str, packed: bytes) -> bytes:
        """The result of one of the methods below, pickled as its arguments are."""
        return pickles.dumps(getattr(self, name)(*pickles.loads(packed)))

    def fit(self, asked: Fit) -> Fitted:
        """Train clients together."""
        return fit(self._trainer, asked)

    def evaluate_together(self, works: Sequence[Work], rows: Sequence[Encoded]) -> list[Evaluation]:
        """Loss and predictions of each work on its rows."""
        return self._trainer.evaluate_together(works, rows)

    def log_likelihoods(self, work: Work, rows: Encoded) -> NDArray[np.float64]:
        """Log-likelihoods of the answers."""
        return self._trainer.log_likelihoods(work, rows)

    def generate(self, work: Work, rows: Encoded, max_new_tokens: int) -> list[list[int]]:
        """Greedy answers."""
        return self._trainer.generate(work, rows, max_new_tokens)


def here() -> tuple[str, int]:
    """(machine, by Ray's name for it; process) of this worker."""
    import ray

    return str(ray.get_runtime_context().get_node_id())[:8], os.getpid()


def actor(cpus: int, gpus: int) -> Any:
    """The class of actors that Ray keeps so many cores and GPUs for, and starts again as often as they are lost."""
    import ray

    return ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=0)(Worker)


def hellos(actors: Sequence[Any], patience_s: float) -> list[Hello]:
    """Wait until all are ready. Raises what one of them raised, or ConfigError for one that is not there in time."""
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    import ray

    try:
        said: list[Hello] = ray.get([actor.hello.remote() for actor in actors], timeout=patience_s)
    except RayTaskError as error:
        raise error.cause from None
    except GetTimeoutError:
        raise ConfigError(
            f"{len(actors)} workers were not ready within {patience_s:g} s (engine.patience_s): Ray may have no cores or GPUs "
            "left for them, or their model loads slowly"
        ) from None
    except RayError as error:
        raise ConfigError(
            f"a worker could not be started ({type(error).__name__}): its machine may have no memory for the model"
        ) from error
    return said


def end(actors: Sequence[Any]) -> None:
    """End actors; calls that go on fail."""
    import ray

    for actor in actors:
        ray.kill(actor)
