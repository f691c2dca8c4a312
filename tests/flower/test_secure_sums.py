"""Secure sums through messages: the simulator's bytes, drop-outs, restarts of either side, and what must be refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom.core import Client, Method, State
from fedloom.engine import Engine
from fedloom.errors import RoundError, VoidRound
from fedloom.flower import codec
from fedloom.flower.coordinator import Coordinator
from fedloom.flower.message import pack, unpack
from fedloom.flower.node_sums import NodeSums
from fedloom.flower.remote_sums import RemoteSums
from fedloom.flower.worker import Worker
from fedloom.loop import Record, federate, one_round
from fedloom.methods import build
from fedloom.privacy.keys import Identity
from fedloom.privacy.secure_visits import SecureSums
from fedloom.privacy.sum_plan import Rule

from ..methods.cases import CASES, EXAMPLES, RANK, Case, engine, flat, start
from .direct import Direct
from .toys import Absent, ToyNode, coordinator

pytestmark = pytest.mark.usefixtures("at_once")
CLIENTS = [Client(key, n, RANK) for key, n in EXAMPLES.items()]
RULE = Rule(least=2, cover=1)
FITTING = [c for c in CASES if not (c.each or c.integers)]


def sites(method: Method, clients: Sequence[Client], folder: Path, rule: Rule = RULE, **more: Any) -> list[Worker]:
    """A worker for each client, with a folder of its own."""
    made = []
    for client in clients:
        node = ToyNode(method, [client], folder / client.id)
        node.run = replace(node.run, sums=NodeSums(rule, "run", folder / client.id, **more))
        made.append(Worker(node))
    return made


def server(at: Direct, folder: Path, clients: Sequence[Client] = CLIENTS, rule: Rule = RULE) -> Coordinator:
    return coordinator(at, clients, sums=RemoteSums(rule, "run", folder / "server"))


def simulator(rule: Rule = RULE, gone: dict[int, set[str]] | None = None) -> Any:
    def make(*args: Any, **kwargs: Any) -> Absent:
        made = Absent(*args, **kwargs)
        made.gone = gone or {}
        made.sums = SecureSums(least=rule.least, cover=rule.cover, limit=rule.limit, bits=rule.bits)
        return made

    return engine(kind=make, cohort=1)


def told(records: list[Record]) -> list[tuple[Any, ...]]:
    return [(r.stage, r.clients, r.dropped, r.metrics, r.up.as_dict(), r.down.as_dict(), r.per_client) for r in records]


def rounds(
    method: Method, at: Engine, clients: Sequence[Client], count: int, first: int = 1
) -> tuple[list[State], list[Record]]:
    """The state after each round, and its record."""
    states: list[State] = []
    records: list[Record] = []

    def keep(state: State, record: Record) -> None:
        states.append(state)
        records.append(record)

    federate(method, at, start(method), clients, count, start=first, on_round=keep)
    return states, records


@pytest.mark.parametrize("case", FITTING, ids=lambda case: case.label)
def test_every_fitting_method_has_the_simulators_bytes(case: Case, tmp_path: Path) -> None:
    method, clients = case.method(), case.clients()
    ends = []
    at = Direct(sites(method, clients, tmp_path))
    for where in (simulator(), server(at, tmp_path, clients)):
        states, records = rounds(method, where, clients, 2)
        ends.append((flat(states[-1]), told(records)))
    assert ends[0] == ends[1]
    assert all("masks" in r.up.as_dict() for r in records if r.stage == "clients")


@pytest.mark.parametrize(
    "rule, table",
    [
        (Rule(least=2, cover=3), {"name": "ffa_lora"}),  # ranks 1 to 4: the last two columns have two clients or one
        (Rule(least=2, cover=2, limit=64.0, bits=32), {"name": "fslora"}),
    ],
    ids=["thin", "32 bits"],
)
def test_mixed_ranks_thin_cover_and_small_words(rule: Rule, table: dict[str, Any], tmp_path: Path) -> None:
    method = build(table, {"rank": RANK})
    clients = [Client(key, n, rank) for rank, (key, n) in enumerate(EXAMPLES.items(), 1)]
    at = Direct(sites(method, clients, tmp_path, rule))
    far = federate(method, server(at, tmp_path, clients, rule), start(method), clients, 2)
    assert flat(far) == flat(federate(method, simulator(rule), start(method), clients, 2))
    assert any(header.get("sum", {}).get("thin") for header in at.headers)


FEDIT = build({"name": "fedit"}, {"rank": RANK})
FEDASK = build({"name": "fedask"}, {"rank": RANK})


def spoilt(do: str, t: int = 1) -> Callable[[dict[str, Any], bytes], bytes]:
    """A node whose answers to one kind of message in one round are lost on the way."""
    return lambda header, answer: b"" if (header["do"], header["t"]) == (do, t) else answer


def one(at: Direct, folder: Path, method: Method = FEDIT, t: int = 1) -> tuple[State, Record, Coordinator]:
    far = server(at, folder)
    return *one_round(method, far, start(method), CLIENTS, t), far


def test_a_client_lost_between_training_and_its_upload_is_not_in_the_sum(tmp_path: Path) -> None:
    at = Direct(sites(FEDIT, CLIENTS, tmp_path))
    at.tampers[1] = spoilt("exchange")
    state, record, _ = one(at, tmp_path)
    want, _ = one_round(FEDIT, simulator(gone={1: {"b"}}), start(FEDIT), CLIENTS, 1)
    assert flat(state) == flat(want) and record.dropped.keys() == {"b"}
    whole, _ = one_round(FEDIT, simulator(), start(FEDIT), CLIENTS, 1)
    assert flat(whole) != flat(want)


def test_a_client_lost_after_its_upload_is_in_the_sum_that_the_others_open(tmp_path: Path) -> None:
    at = Direct(sites(FEDIT, CLIENTS, tmp_path))
    at.tampers[1] = spoilt("unmask")
    state, record, far = one(at, tmp_path)
    want, _ = one_round(FEDIT, simulator(), start(FEDIT), CLIENTS, 1)
    assert flat(state) == flat(want) and record.dropped == {}
    (note,) = far.stats()["notes"]
    assert note.startswith("the sum was opened without shares of b: answer refused: starts with")


def test_too_few_shares_make_the_round_void_and_the_run_goes_on(tmp_path: Path) -> None:
    at = Direct(sites(FEDIT, CLIENTS, tmp_path))
    at.tampers[1] = at.tampers[2] = spoilt("unmask")
    first = start(FEDIT)
    after, records = rounds(FEDIT, server(at, tmp_path), CLIENTS, 2)
    assert [r.stage for r in records] == ["void", "clients"] and records[0].dropped.keys() == EXAMPLES.keys()
    assert (
        "round 1 is void: 2 clients gave shares for the mask of 'a', expected at least 3 of 4"
        in records[0].dropped["a"]
    )
    assert flat(after[0]) == flat(first) and flat(after[1]) != flat(first)
    # Whoever asks for a round again, of which sums may be open, gets nothing.
    (tmp_path / "server" / "sum-000001-0.bin").unlink(missing_ok=True)
    with pytest.raises(RoundError, match="has opened a sum of a, b, c, d in this round: it masks for no second one"):
        one_round(FEDIT, server(at, tmp_path), first, CLIENTS, 1)
    at.tampers[1] = at.tampers[2] = lambda header, answer: b"" if header["do"] == "unmask" else answer
    with pytest.raises(VoidRound, match="round 4 is void"):
        rounds(FEDIT, server(at, tmp_path), CLIENTS, 9, first=3)


def fails_at(at: Direct, do: str, count: int) -> None:
    """The server dies when it sends its `count`-th message of this kind, from 0."""
    seen = 0

    def lost(header: dict[str, Any]) -> bool:
        nonlocal seen
        seen += header["do"] == do
        return header["do"] == do and seen == count + 1

    at.lost = lost


@pytest.mark.parametrize("method", [FEDIT, FEDASK], ids=lambda method: method.name)
@pytest.mark.parametrize("do, count", [("keys", 1), ("exchange", 2), ("unmask", 0), ("unmask", 3)])
def test_a_server_killed_within_a_round_goes_on_with_the_sum_that_it_began(
    do: str, count: int, method: Method, tmp_path: Path
) -> None:
    at = Direct(sites(method, CLIENTS, tmp_path))
    fails_at(at, do, count)
    with pytest.raises(RoundError, match="the connection is lost"):
        one(at, tmp_path, method)
    asked = len(at.headers)
    at.lost = lambda header: False
    (*_, state), records = rounds(method, server(at, tmp_path), CLIENTS, 2)
    again = [h["do"] for h in at.headers[asked:] if h["t"] == 1]
    if (
        do == "unmask" and method is FEDASK
    ):  # the visits, which wait in the nodes' memory, ended with the server's session
        assert [r.stage for r in records] == ["void", "clients"] and "its visit was lost" in records[0].dropped["a"]
        want, _ = one_round(method, simulator(), start(method), CLIENTS, 2)
    else:
        assert [r.stage for r in records] == ["clients"] * 2 and all(r.dropped == {} for r in records)
        assert ("exchange" in again) == (do != "unmask")
        want = federate(method, simulator(), start(method), CLIENTS, 2)
    assert flat(state) == flat(want)


def test_nodes_that_were_started_again_between_the_messages_open_the_sum(tmp_path: Path) -> None:
    at = Direct(sites(FEDIT, CLIENTS, tmp_path))

    def restart(header: dict[str, Any]) -> bool:
        if header["do"] == "unmask" and "setup" not in header:
            at.workers[header["number"] % 4] = sites(FEDIT, CLIENTS, tmp_path)[header["number"] % 4]
        return False

    at.lost = restart
    state, record, _ = one(at, tmp_path)
    want, _ = one_round(FEDIT, simulator(), start(FEDIT), CLIENTS, 1)
    assert flat(state) == flat(want) and record.dropped == {}
    assert sum(header["do"] == "unmask" for header in at.headers) > 4


def test_nothing_of_one_client_crosses(tmp_path: Path) -> None:
    """Words that look uniform, boxes and shares: no tensor of floating-point numbers, and no metric."""
    at = Direct(sites(FEDIT, CLIENTS, tmp_path))
    heard: list[tuple[dict[str, Any], dict[str, Any], list[bytes]]] = []

    def note(header: dict[str, Any], answer: bytes) -> bytes:
        said, parts = unpack(answer)
        heard.append((header, said, [bytes(part) for part in parts]))
        return answer

    at.tampers = dict.fromkeys(range(4), note)
    _, record, _ = one(at, tmp_path)
    assert record.train_loss is None
    for header, said, parts in heard:
        for result in said.get("results", []):
            assert result["metrics"] == {}, header["do"]
        for part in parts:
            state = codec.decode(part)
            assert all(not x.is_floating_point() for group in state.values() for x in group.values())
            if header["do"] == "exchange":
                assert state["words"]["y"].double().abs().median() > 2**61
    node = at.workers[0]
    plain = {"do": "exchange", "session": "s", "number": 1, "t": 2, "exchange": 1, "clients": ["a"]}
    setup = {"setup": {"form": "raw"}}
    said, _ = unpack(node.answer(pack(plain | setup, [codec.encode(start(FEDIT))])))
    assert "says nothing of the sum that it is for (privacy.secure_aggregation)" in said["refused"]
    said, _ = unpack(node.answer(pack(plain | {"number": 2, "do": "evaluate"}, [codec.encode(start(FEDIT))])))
    assert "one client's scores are not told" in said["refused"]


def again(at: Direct, do: str, change: Callable[[dict[str, Any]], None]) -> str:
    """Client a's answer when the last message of this kind to it is sent once more, changed."""
    said, parts = unpack(at.sent[do])
    said = json.loads(json.dumps(said)) | {"number": 10**6}
    change(said)
    blobs = [bytes(part) for part in parts]
    if do == "unmask":  # as many boxes as there are others to be in the sum
        boxes = codec.decode(blobs[0])["boxes"]["b"][: len(said["present"]) - 1]
        blobs = [codec.encode({"boxes": {"b": boxes}})]
    got, _ = unpack(at.workers[0].answer(pack(said, blobs)))
    return str(got.get("refused") or got["results"][0].get("failure"))


class Remembering(Direct):
    """Keeps the last message of each kind to the first node."""

    sent: dict[str, bytes]

    def push(self, node: int, data: bytes, ttl_s: float) -> str | None:
        if node == 0:
            header, _ = unpack(data)
            self.__dict__.setdefault("sent", {})[header["do"]] = data
        return super().push(node, data, ttl_s)


@pytest.mark.parametrize(
    "do, change, why",
    [
        ("unmask", lambda said: said["present"].remove("d"), "opens no second one"),
        ("unmask", lambda said: said["present"].append("x"), "holds 'x', which was not asked"),
        ("unmask", lambda said: said["sum"].update(attempt="00" * 16), "to open a sum that it did not mask for"),
        ("unmask", lambda said: said["sum"]["shares"].update(b=1e-9), "to open a sum that it did not mask for"),
        ("unmask", lambda said: said["sum"]["keys"].update(e=["09" + "00" * 31, ""]), "has no share, above 0"),
        ("unmask", lambda said: said.update(present="abc"), "does not say whose sum"),
        ("exchange", lambda said: None, "it masks for no second one|has masked for this attempt before"),
        ("exchange", lambda said: said["sum"].update(attempt="zz"), "expected 16 bytes in hexadecimal digits"),
        ("exchange", lambda said: said["sum"]["shares"].update(a=2.0), "has no share, above 0"),
        ("exchange", lambda said: said["sum"].update(size=10**12), "has no size or part"),
        (
            "exchange",
            lambda said: said.update(t=2) or said["sum"].update(size=3),
            "other tensors than the sum",
        ),
        (
            "exchange",
            lambda said: said.update(t=2) or said["sum"].update(layout="00" * 16),
            "other tensors than the sum",
        ),
    ],
)
def test_what_a_server_may_not_ask(do: str, change: Callable[[dict[str, Any]], None], why: str, tmp_path: Path) -> None:
    at = Remembering(sites(FEDIT, CLIENTS, tmp_path))
    one(at, tmp_path)
    assert re.search(why, again(at, do, change))


def test_a_roster_authenticates_the_keys_of_the_others(tmp_path: Path) -> None:
    who = {client.id: Identity() for client in CLIENTS}
    roster = {key: one.name for key, one in who.items()}

    def signing(**instead: Identity) -> Direct:
        made = []
        for client in CLIENTS:
            identity = instead.get(client.id, who[client.id])
            made += sites(FEDIT, [client], tmp_path, identity=identity, roster=roster)
        return Direct(made)

    state, record, _ = one(signing(), tmp_path)
    want, _ = one_round(FEDIT, simulator(), start(FEDIT), CLIENTS, 1)
    assert flat(state) == flat(want) and record.dropped == {}
    # A server that lets a swapped key through is told so by every client, and no upload leaves.
    with pytest.raises(RoundError, match="the key of client 'b' is not signed by its identity"):
        one(signing(b=Identity()), tmp_path / "swapped")
    # One that has the roster leaves the client out.
    far = coordinator(signing(b=Identity()), CLIENTS, sums=RemoteSums(RULE, "run", tmp_path / "s", roster))
    _, record = one_round(FEDIT, far, start(FEDIT), CLIENTS, 2)
    assert record.dropped.keys() == {"b"} and "is not signed by its identity" in record.dropped["b"]
    few = {key: name for key, name in roster.items() if key != "c"}
    far = coordinator(signing(), CLIENTS, sums=RemoteSums(RULE, "run", tmp_path / "f", few))
    _, record = one_round(FEDIT, far, start(FEDIT), CLIENTS, 3)
    assert record.dropped == {"c": "client 'c' is not in the roster: add its identity, at every site"}
