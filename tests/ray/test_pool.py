"""A pool of real actors: who is lost, what comes back, and what crosses."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.core import Client, Trained, Work, plain
from fedloom.errors import ConfigError, RoundError
from fedloom.ray import cluster, pickles, worker
from fedloom.ray import pool as pools
from fedloom.ray.cluster import Crew, Resources
from fedloom.ray.pool import Pool
from fedloom.ray.worker import Hello
from fedloom.simulation import Fit, Fitted

pytestmark = pytest.mark.xdist_group("ray")


@dataclass
class Doubles:
    """A trainer that doubles; where there is a file, it ends its process at the client named in it, once or every time."""

    deadly: Path

    def fit(self, works: Sequence[tuple[Client, Work]], data: Sequence[Any], t: int, part: int = 0) -> list[Trained]:
        if len(works) > 2:
            raise MemoryError
        names = [client.id for client, _ in works]
        if self.deadly.exists() and (told := self.deadly.read_text()).removeprefix("always ") in names:
            if not told.startswith("always"):
                self.deadly.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if "wrong" in names:
            raise ValueError("a client that is wrong")
        return [
            Trained({r: {s: 2 * x for s, x in group.items()} for r, group in work.train.items()}, 1, 1.0, 0.5)
            for _, work in works
        ]


def made(deadly: Path) -> tuple[Doubles, Hello]:
    return Doubles(deadly), Hello("here", os.getpid(), "cpu", torch.float32, "model", None)


@pytest.fixture
def deadly(tmp_path: Path) -> Path:
    return tmp_path / "deadly"


def pool_of(deadly: Path) -> tuple[Pool, list[Any]]:
    kind = worker.actor(1, 0)
    actors = [kind.remote(pickles.dumps(partial(made, deadly)), [str(Path(__file__).parents[2])]) for _ in "ab"]
    worker.hellos(actors, 60)
    return Pool(actors, 60), actors


def cohort(*names: str) -> Generator[Fit, Fitted, tuple[list[str], list[float], Fitted]]:
    """Two works, one after the other: as a cohort in lock step asks for them."""
    value, fitted = 1.0, None
    for part in range(2):
        works = [(Client(name, 1, 1), Work({"A": {"s": torch.tensor([value])}})) for name in names]
        fitted = yield Fit(works, [None for _ in names], 1, part)
        value = float(fitted.trained[0].state["A"]["s"])
    assert fitted is not None
    return list(names), [float(x.state["A"]["s"]) for x in fitted.trained], fitted


def test_a_lost_workers_clients_go_on_elsewhere_and_it_comes_back(
    ray_here: None, deadly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, actors = pool_of(deadly)
    try:
        before = {one.process for one in worker.hellos(actors, 60)}
        deadly.write_text("c")
        pulled = []

        def cohorts() -> Iterator[Any]:
            for name in "abcdefgh":
                pulled.append(name)
                yield cohort(name)

        results = []
        for found in pool.drive(cohorts()):
            results.append(found[:2])
            assert len(pulled) <= len(results) + 2 * pool.size
        assert results == [([name], [4.0]) for name in "abcdefgh"]
        assert [note.partition(":")[2] for note in pool.notes] == [" c went to another"]

        until = time.monotonic() + 60  # both take part again, one of them as a new process
        while pool._free.qsize() < 2 and time.monotonic() < until:
            time.sleep(0.05)
        after = {one.process for one in worker.hellos(actors, 60)}
        assert len(before & after) == 1 and len(after) == 2
        busy = {fitted.worker for *_, fitted in pool.drive(cohort(name) for name in "ijklmnop")}
        assert busy == {0, 1}

        halved = next(iter(pool.drive([cohort("q", "r", "s")])))
        assert halved[1] == [4.0, 4.0, 4.0] and halved[2].halves == (2,)
        with pytest.raises(ValueError, match="a client that is wrong"):
            list(pool.drive([cohort("t"), cohort("wrong")]))
        assert list(pool.each(lambda x: 2 * x, range(9))) == [2 * x for x in range(9)]

        monkeypatch.setattr(pools, "TRIES", 2)
        deadly.write_text("always u")
        with pytest.raises(RoundError, match=r"^u lost 2 workers, one after the other: .* resume$"):
            list(pool.drive(cohort(name) for name in "u"))
    finally:
        worker.end(actors)


def closure(x: float) -> Any:
    return lambda train, fixed: x


def test_pickles_hold_a_tensors_own_bytes_and_who_is_who() -> None:
    whole = torch.randn(100, 100)
    row, bits = whole[3], torch.randn(3, 4).bfloat16().T
    state = {"A": {"s": row, "again": row}, "B": {"bits": bits, "none": torch.zeros(0, 4), "one": torch.tensor(3)}}
    data = pickles.dumps((state, plain, closure(2.0)))
    assert len(data) < 2_000
    back, by_name, by_value = pickles.loads(data)
    assert back["A"]["s"] is back["A"]["again"] and by_name is plain and by_value(None, None) == 2.0
    for role, group in state.items():
        for site, x in group.items():
            assert torch.equal(back[role][site], x) and back[role][site].dtype == x.dtype
    back["A"]["s"] += 1  # what came is the worker's own


@pytest.mark.parametrize(
    "there, asked, want",
    [
        ([Resources(2)], (None, None, "auto"), Crew(2, 1, 0)),
        ([Resources(16)], (None, None, "cpu"), Crew(2, 8, 0)),
        ([Resources(16)], (4, 3, "cpu"), Crew(4, 3, 0)),
        ([Resources(16, 4)], (None, None, "auto"), Crew(4, 4, 1)),
        ([Resources(16, 4)], (3, None, "cuda"), Crew(3, 5, 1)),
        ([Resources(16, 4)], (2, None, "cpu"), Crew(2, 8, 0)),
        ([Resources(4), Resources(8, 2), Resources(8, 2)], (None, None, "auto"), Crew(4, 4, 1)),
        ([Resources(16)], (None, None, "cuda"), "but Ray has no GPU"),
        ([Resources(16, 2)], (3, None, "auto"), "3 workers want a GPU each, and Ray has 2: lower engine.workers"),
        ([Resources(2)], (3, None, "cpu"), r"3 workers \(engine.workers\) of 1 cores .* do not fit into the 2 cores"),
        ([Resources(3), Resources(3)], (3, 2, "cpu"), r"do not fit into the 3 \+ 3 cores"),
    ],
)
def test_who_fits_into_a_cluster(there: list[Resources], asked: tuple[Any, Any, str], want: Crew | str) -> None:
    if isinstance(want, Crew):
        assert cluster.crew(there, *asked) == want
    else:
        with pytest.raises(ConfigError, match=want):
            cluster.crew(there, *asked)


@pytest.mark.parametrize("address", ["", "here", "host:", "host:port", "127.0.0.1:70000"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ConfigError, match=r"expected host:port of a Ray cluster's head"):
        cluster.check(address)


def test_what_is_not_there_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"no Ray cluster answers at '127.0.0.1:9' \(Connection refused\): start one with"
    ):
        cluster.check("127.0.0.1:9")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'fedloom\[ray\]'"):
        cluster.check(None)


def test_a_ray_without_token_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imported before it could be asked for one, it would let in everybody."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE=token"):
        cluster.resources(None)
