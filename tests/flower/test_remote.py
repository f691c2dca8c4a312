"""The engine over a link and the worker behind it, both real, with nothing between them: what takes too long through Flower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.engines.envelope import pack, unpack
from fedloom.engines.inprocess import InProcess
from fedloom.engines.link import Reply
from fedloom.engines.remote import Remote, Terms
from fedloom.engines.worker import Worker
from fedloom.errors import RoundError
from fedloom.runs import session
from fedloom.runs.assemble import Parts
from fedloom.runs.config import parse
from fedloom.runs.node import agreement, share, site

Settings = Callable[..., dict[str, Any]]


class Direct:
    """A link to workers of this process. `lost` says whether the connection breaks at a message."""

    def __init__(self, workers: list[Worker], lost: Callable[[dict[str, Any]], bool] = lambda header: False) -> None:
        self.workers, self.lost = workers, lost
        self.silent: set[int] = set()
        self.gone: set[int] = set()
        self.headers: list[dict[str, Any]] = []
        self._ready: list[Reply] = []

    def nodes(self) -> list[int]:
        return [node for node in range(len(self.workers)) if node not in self.gone]

    def push(self, node: int, data: bytes, ttl_s: float) -> str | None:
        header, _ = unpack(data)
        self.headers.append(header)
        if self.lost(header):
            raise RoundError("the connection is lost")
        id = f"{node}-{len(self.headers)}"
        if node not in self.silent:
            self._ready.append(Reply(id, self.workers[node].answer(data)))
        return id

    def pull(self, ids: list[str]) -> list[Reply]:
        got = [reply for reply in self._ready if reply.id in ids]
        self._ready = [reply for reply in self._ready if reply.id not in ids]
        return got

    def close(self) -> None:
        pass


def run_of(settings: Settings, **engine: Any) -> Any:
    values = settings(
        method={"name": "fedsa_lora"},
        clients={"count": 3},
        train={"rounds": 3, "evaluate_every": 0, "local_steps": 2},
        engine={"name": "flower", "cohort": 1, "nodes": 1, **engine},
    )
    return parse(values, "test")


def tensors(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("**/adapter_model.safetensors"))}


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "int8"])
def test_a_run_that_broke_off_ends_like_one_that_did_not(wire: str, settings: Settings, tmp_path: Path) -> None:
    config = run_of(settings, wire=wire)
    session.start(config, tmp_path / "whole", link=Direct([Worker(share())]))

    def third(header: dict[str, Any]) -> bool:
        return bool(header["do"] == "train" and header["t"] == 3 and header["session"] not in done)

    # The clients train round 3, and then the server is gone: on resuming they must not start from what they kept there.
    done: set[str] = set()
    worker = Worker(share())
    link = Direct([worker])
    broken = Direct([worker])

    def push(node: int, data: bytes, ttl_s: float) -> str | None:
        id = link.push(node, data, ttl_s)
        if third(unpack(data)[0]):
            raise RoundError("the connection is lost")
        return id

    broken.push, broken.pull = push, link.pull  # type: ignore[method-assign]
    with pytest.raises(RoundError, match="lost"):
        session.start(config, tmp_path / "resumed", link=broken)
    assert (tmp_path / "resumed" / "checkpoint" / "state-000002.safetensors").exists()
    assert list((tmp_path / "resumed" / "kept").glob("*-000003.safetensors"))
    session.resume(tmp_path / "resumed", link=Direct([Worker(share())]))
    assert tensors(tmp_path / "resumed") == tensors(tmp_path / "whole")


def test_fewer_bytes_cross_in_fewer_bits(settings: Settings, tmp_path: Path) -> None:
    up = {}
    for wire in ("float32", "bfloat16", "int8"):
        config = parse(
            settings(
                method={"name": "fedit"}, clients={"count": 2}, engine={"name": "flower", "wire": wire, "nodes": 1}
            ),
            "t",
        )
        result = session.start(config, tmp_path / wire, link=Direct([Worker(share())]))
        up[wire] = sum(r["engine"]["wire"]["up"] for r in result.rounds if "engine" in r)
        assert result.rounds[-1]["eval"]["loss"] < result.rounds[0]["eval"]["loss"]
    assert up["int8"] < up["bfloat16"] < up["float32"]


def test_a_worker_that_was_started_again_loses_no_round(settings: Settings, tmp_path: Path) -> None:
    config = run_of(settings)
    session.start(config, tmp_path / "whole", link=Direct([Worker(share())]))
    link = Direct([Worker(share())])

    def restart(header: dict[str, Any]) -> bool:
        if header["t"] == 2 and header["do"] == "train":
            link.workers[0] = Worker(share())
        return False

    link.lost = restart
    result = session.start(config, tmp_path / "again", link=link)
    assert all(r["dropped"] == {} for r in result.rounds)
    assert tensors(tmp_path / "again") == tensors(tmp_path / "whole")


def test_a_round_takes_the_first_answers_where_it_asked_for_more(settings: Settings, tmp_path: Path) -> None:
    values = settings(
        method={"name": "fedit"},
        clients={"count": 4, "fraction": 0.5},
        train={"rounds": 2, "evaluate_every": 0, "local_steps": 1},
        engine={"name": "flower", "nodes": 4, "oversample": 0.5, "deadline_s": 20.0},
    )
    link = Direct([Worker(share()) for _ in range(4)])
    result = session.start(parse(values, "test"), tmp_path / "run", link=link)
    for record in result.rounds[1:]:
        assert len(record["clients"]) == 3 and record["seconds"]["total"] < 20
    # All answers of a look are taken: what may be dropped is only what had not come by then.
    assert all(why == "late: the round had enough" for r in result.rounds for why in r["dropped"].values())


def test_who_owes_an_answer_is_not_asked_again_until_it_has_come(settings: Settings, tmp_path: Path) -> None:
    values = settings(
        method={"name": "fedit"},
        clients={"count": 2},
        train={"rounds": 3, "evaluate_every": 0, "local_steps": 1},
        engine={"name": "flower", "nodes": 2, "deadline_s": 2.0},
    )
    link = Direct([Worker(share()), Worker(share())])

    def second_is_silent_in_round_1(header: dict[str, Any]) -> bool:
        link.silent = {1} if header["t"] == 1 else set()
        return False

    link.lost = second_is_silent_in_round_1
    result = session.start(parse(values, "test"), tmp_path / "run", link=link)
    assert [len(r["dropped"]) for r in result.rounds] == [0, 1, 0, 0]
    assert "late: no answer within 2 s" in result.rounds[1]["dropped"].values()
    asked = [(header["t"], len(header["clients"])) for header in link.headers if header["do"] == "train"]
    assert asked == [(1, 1), (1, 1), (2, 2), (3, 2)]  # the other node has both clients


def test_sites_announce_themselves_and_who_does_not_fit_is_told_why(
    settings: Settings, questions: Path, tmp_path: Path
) -> None:
    config = parse(settings(clients={"count": 2}), "test")
    other = parse(settings(clients={"count": 1}, train={"lr": 0.5}), "test")
    parts = Parts(config)
    setup = {"run": "1", "agreement": agreement(config), "labels": parts.tables.labels, "model": parts.base.sha256}
    north = parse(settings(clients={"count": 1, "ranks": 2}), "test")
    link = Direct([Worker(site(north, "north", tmp_path / "n")), Worker(site(other, "south", tmp_path / "s"))])
    own = InProcess(parts.trainer, parts.sites, parts.rows_of)
    remote = Remote(link, setup, Terms(deadline_s=5.0), own)
    with pytest.raises(RoundError, match=r"1 of 2 clients .*north.*train\.lr differ"):
        remote.gather(2, 1.0)
    (client,) = remote.gather(1, 5.0)
    assert (client.id, client.rank, client.examples) == ("north", 2, len(Parts(north).tables.train))
    # A second node of that name is no north, as long as the first is there.
    link.workers[1] = Worker(site(north, "north", tmp_path / "s"))
    remote.refused.clear()
    with pytest.raises(RoundError, match=r"1 of 2 clients .*it says that it is north, as node 0 does"):
        remote.gather(2, 1.0)
    assert remote.places == {"north": 0}
    link.gone = {0}
    remote.refused.clear()
    with pytest.raises(RoundError, match="1 of 2 clients"):
        remote.gather(2, 1.0)
    assert remote.places == {"north": 1}
    # Nothing else is said: the answer to a hello has these keys and no other.
    hello = {"do": "hello", "session": "new", "number": 1, "t": 0, "clients": [], "setup": setup | {"form": "raw"}}
    answer, blobs = unpack(link.workers[0].answer(pack(hello)))
    assert answer.keys() == {"do", "session", "number", "t", "clients"} and blobs == []


def test_a_worker_answers_no_message_twice_and_quotes_no_data(settings: Settings, tmp_path: Path) -> None:
    config = parse(settings(clients={"count": 1}), "test")
    parts = Parts(config)
    setup = {"run": "1", "agreement": agreement(config), "labels": parts.tables.labels, "form": "raw"}
    worker = Worker(site(config, "north", tmp_path))

    def ask(**header: Any) -> dict[str, Any]:
        base = {
            "do": "hello",
            "session": "a",
            "number": 1,
            "t": 0,
            "clients": [],
            "setup": setup | {"model": parts.base.sha256},
        }
        return unpack(worker.answer(pack(base | header)))[0]

    assert "clients" in ask()
    assert "replayed: message 1" in ask()["refused"]
    assert "replayed: message 1" in ask(session="a", number=1)["refused"]
    assert "clients" in ask(session="b")
    assert ask(session="a", number=2)["refused"] == "replayed: this session has ended"
    assert "do not live here" in ask(session="b", number=2, do="train", clients=["south"])["refused"]
    assert "nothing a node does" in ask(session="b", number=3, do="shell", clients=["north"])["refused"]
    assert "no session, number or t" in ask(t="0")["refused"]
    assert "no fedloom message" in unpack(worker.answer(b"junk"))[0]["refused"]
    # Rows with a label that the server did not name: an error that would quote it stays here.
    wrong = ask(session="c", setup=setup | {"model": parts.base.sha256, "labels": ["only"]})
    worker_says = ask(session="c", number=4, do="train", t=1, clients=["north"])
    assert all("person" not in str(said) for said in (wrong, worker_says))
