"""Whole runs over the coordinator and the worker, both real, with nothing between them: what takes too long through Flower."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.errors import RoundError
from fedloom.flower.coordinator import Coordinator, RoundPolicy
from fedloom.flower.message import pack, unpack
from fedloom.flower.worker import Worker
from fedloom.runs import run as runs
from fedloom.runs.config import parse
from fedloom.runs.experiment import experiment
from fedloom.runs.flower_node import agreement, local_node, remote_node
from fedloom.runs.flower_server import connected
from fedloom.runs.run_directory import RunDirectory
from fedloom.simulation import Simulation

from .direct import Direct

Settings = Callable[..., dict[str, Any]]


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
    runs.start(config, tmp_path / "whole", transport=Direct([Worker(local_node())]))

    def third(header: dict[str, Any]) -> bool:
        return bool(header["do"] == "exchange" and header["t"] == 3 and header["session"] not in done)

    # The clients train round 3, and then the server is gone: on resuming they must not start from what they kept there.
    done: set[str] = set()
    worker = Worker(local_node())
    link = Direct([worker])
    broken = Direct([worker])

    def push(node: int, data: bytes, ttl_s: float) -> str | None:
        id = link.push(node, data, ttl_s)
        if third(unpack(data)[0]):
            raise RoundError("the connection is lost")
        return id

    broken.push, broken.pull = push, link.pull  # type: ignore[method-assign]
    with pytest.raises(RoundError, match="lost"):
        runs.start(config, tmp_path / "resumed", transport=broken)
    assert (tmp_path / "resumed" / "checkpoint" / "state-000002.safetensors").exists()
    assert list((tmp_path / "resumed" / "kept").glob("*-000003.safetensors"))
    runs.resume(tmp_path / "resumed", transport=Direct([Worker(local_node())]))
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
        result = runs.start(config, tmp_path / wire, transport=Direct([Worker(local_node())]))
        up[wire] = sum(r["engine"]["wire"]["up"] for r in result.rounds if "engine" in r)
        assert result.rounds[-1]["eval"]["loss"] < result.rounds[0]["eval"]["loss"]
    assert up["int8"] < up["bfloat16"] < up["float32"]


def test_a_worker_that_was_started_again_loses_no_round(settings: Settings, tmp_path: Path) -> None:
    config = run_of(settings)
    runs.start(config, tmp_path / "whole", transport=Direct([Worker(local_node())]))
    link = Direct([Worker(local_node())])

    def restart(header: dict[str, Any]) -> bool:
        if header["t"] == 2 and header["do"] == "exchange":
            link.workers[0] = Worker(local_node())
        return False

    link.lost = restart
    result = runs.start(config, tmp_path / "again", transport=link)
    assert all(r["dropped"] == {} for r in result.rounds)
    assert tensors(tmp_path / "again") == tensors(tmp_path / "whole")


def test_a_round_takes_the_first_answers_where_it_asked_for_more(settings: Settings, tmp_path: Path) -> None:
    values = settings(
        method={"name": "fedit"},
        clients={"count": 4, "fraction": 0.5},
        train={"rounds": 2, "evaluate_every": 0, "local_steps": 1},
        engine={"name": "flower", "nodes": 4, "oversample": 0.5, "deadline_s": 20.0},
    )
    link = Direct([Worker(local_node()) for _ in range(4)])
    result = runs.start(parse(values, "test"), tmp_path / "run", transport=link)
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
    link = Direct([Worker(local_node()), Worker(local_node())])

    def second_is_silent_in_round_1(header: dict[str, Any]) -> bool:
        link.silent = {1} if header["t"] == 1 else set()
        return False

    link.lost = second_is_silent_in_round_1
    result = runs.start(parse(values, "test"), tmp_path / "run", transport=link)
    assert [len(r["dropped"]) for r in result.rounds] == [0, 1, 0, 0]
    assert "late: no answer within 2 s" in result.rounds[1]["dropped"].values()
    asked = [(header["t"], len(header["clients"])) for header in link.headers if header["do"] == "exchange"]
    assert asked == [(1, 1), (1, 1), (2, 2), (3, 2)]  # the other node has both clients


def test_sites_announce_themselves_and_who_does_not_fit_is_told_why(
    settings: Settings, questions: Path, tmp_path: Path
) -> None:
    config = parse(settings(clients={"count": 2}), "test")
    other = parse(settings(clients={"count": 1}, train={"lr": 0.5}), "test")
    e = experiment(config)
    setup = {"run": "1", "agreement": agreement(config), "labels": e.tables.labels, "model": e.base.sha256}
    setup["metrics"] = e.tables.metrics
    north = parse(settings(clients={"count": 1, "ranks": 2}), "test")
    link = Direct(
        [Worker(remote_node(north, "north", tmp_path / "n")), Worker(remote_node(other, "south", tmp_path / "s"))]
    )
    here = Simulation(e.trainer, e.sites, e.rows_of)
    remote = Coordinator(link, setup, RoundPolicy(deadline_s=5.0), here)
    with pytest.raises(RoundError, match=r"1 of 2 clients .*north.*train\.lr differ"):
        remote.wait_for_clients(2, 1.0)
    (client,) = remote.wait_for_clients(1, 5.0)
    assert (client.id, client.rank, client.examples) == ("north", 2, len(experiment(north).tables.train))
    # A second node of that name is no north, as long as the first is there.
    link.workers[1] = Worker(remote_node(north, "north", tmp_path / "s"))
    remote.registry.refused.clear()
    with pytest.raises(RoundError, match=r"1 of 2 clients .*it says that it is north, as node 0 does"):
        remote.wait_for_clients(2, 1.0)
    assert remote.registry.places == {"north": 0}
    link.gone = {0}
    remote.registry.refused.clear()
    with pytest.raises(RoundError, match="1 of 2 clients"):
        remote.wait_for_clients(2, 1.0)
    assert remote.registry.places == {"north": 1}
    # Nothing else is said: the answer to a hello has these keys and no other.
    hello = {
        "do": "hello",
        "session": "new",
        "number": 1,
        "t": 0,
        "exchange": 1,
        "clients": [],
        "setup": setup | {"form": "raw"},
    }
    answer, blobs = unpack(link.workers[0].answer(pack(hello)))
    assert answer.keys() == {"do", "session", "number", "t", "clients"} and blobs == []


def test_a_worker_answers_no_message_twice_and_quotes_no_data(settings: Settings, tmp_path: Path) -> None:
    config = parse(settings(clients={"count": 1}), "test")
    e = experiment(config)
    setup = {"run": "1", "agreement": agreement(config), "labels": e.tables.labels, "form": "raw"}
    setup["metrics"] = e.tables.metrics
    worker = Worker(remote_node(config, "north", tmp_path))

    def ask(**header: Any) -> dict[str, Any]:
        base = {
            "do": "hello",
            "session": "a",
            "number": 1,
            "t": 0,
            "exchange": 1,
            "clients": [],
            "setup": setup | {"model": e.base.sha256},
        }
        return unpack(worker.answer(pack(base | header)))[0]

    assert "clients" in ask()
    assert "replayed: message 1" in ask()["refused"]
    assert "replayed: message 1" in ask(session="a", number=1)["refused"]
    assert "clients" in ask(session="b")
    assert ask(session="a", number=2)["refused"] == "replayed: this session has ended"
    assert "do not live here" in ask(session="b", number=2, do="exchange", clients=["south"])["refused"]
    assert "nothing a node does" in ask(session="b", number=3, do="shell", clients=[])["refused"]
    assert "no session, number, t" in ask(t="0")["refused"]
    assert "no fedloom message" in unpack(worker.answer(b"junk"))[0]["refused"]
    # Rows with a label that the server did not name: an error that would quote it stays here.
    wrong = ask(session="c", setup=setup | {"model": e.base.sha256, "labels": ["only"]})
    worker_says = ask(session="c", number=4, do="exchange", t=1, clients=["north"])
    assert all("person" not in str(said) for said in (wrong, worker_says))


def test_a_round_waits_for_nodes_that_are_all_busy_yet(settings: Settings, tmp_path: Path) -> None:
    values = settings(
        method={"name": "fedsa_lora"},
        clients={"count": 2},
        train={"rounds": 1, "evaluate_every": 0, "local_steps": 1},
        engine={"name": "flower", "nodes": 2, "deadline_s": 1.0},
    )
    link = Direct([Worker(local_node()), Worker(local_node())])

    def slow_to_evaluate(header: dict[str, Any]) -> bool:
        if header["do"] == "evaluate" and header["t"] == 0:
            link.silent = {0, 1}
            threading.Timer(1.5, link.catch_up).start()
        return False

    link.lost = slow_to_evaluate
    result = runs.start(parse(values, "test"), tmp_path / "run", transport=link)
    assert [r["dropped"] for r in result.rounds] == [{}, {}]
    notes = result.rounds[1]["engine"]["notes"]
    assert len(notes) >= 2 and any("to round 0 came late" in note for note in notes)


def test_what_a_deployment_does_not_prevent_is_told_before_it_starts(settings: Settings, tmp_path: Path) -> None:
    told: list[str] = []

    def stop(what: str) -> None:
        told.append(what)
        raise KeyboardInterrupt

    config = run_of(settings)
    run = RunDirectory.create(tmp_path / "run", config)
    with pytest.raises(KeyboardInterrupt), connected(run, experiment(config), told.append, stop):
        pass
    assert len(told) == 1 and "any user of this machine" in told[0] and "SECURITY.md" in told[0]
    assert sorted(path.name for path in run.path.iterdir()) == ["run.toml"], "nothing was started"
