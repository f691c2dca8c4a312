"""Whatever one node says, it is that node's own failure: with a short printable reason, and the others' round goes on."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedloom.core import Client
from fedloom.errors import ConfigError, RoundError
from fedloom.flower import answers, codec
from fedloom.flower.coordinator import Coordinator
from fedloom.flower.message import MAGIC, WireError, pack, unpack
from fedloom.flower.nodes import RETRY_S
from fedloom.flower.transport import Reply
from fedloom.loop import Record, one_round

from ..methods.cases import EXAMPLES, start
from .direct import Direct, Tamper
from .toys import TwoSteps, coordinator, sites

pytestmark = pytest.mark.usefixtures("at_once")
CLIENTS = [Client(key, n, 4) for key, n in EXAMPLES.items()]
METHOD = TwoSteps()
LIAR = 0


def raw(header: bytes, parts: list[bytes]) -> bytes:
    """A message whose header may be no JSON."""
    body = struct.pack("<II", len(header), len(parts)) + struct.pack(f"<{len(parts)}Q", *map(len, parts))
    body += header + b"".join(parts)
    return MAGIC + hashlib.sha256(body).digest() + body


def says(do: str = "exchange", **fields: Any) -> Tamper:
    """Answers with other fields in the header: functions change what is there, anything else replaces it."""

    def tamper(asked: dict[str, Any], answer: bytes) -> bytes:
        if asked["do"] != do:
            return answer
        header, parts = unpack(answer)
        for name, value in fields.items():
            header[name] = value(header.get(name)) if callable(value) else value
        return raw(json.dumps(header).encode(), [bytes(part) for part in parts])

    return tamper


def results(**fields: Any) -> Tamper:
    """Answers with other fields in each result."""
    return says(results=lambda given: [one | fields for one in given])


def tensors(blob: bytes) -> Tamper:
    def tamper(asked: dict[str, Any], answer: bytes) -> bytes:
        header, parts = unpack(answer)
        return pack(header, [blob for _ in parts]) if asked["do"] == "exchange" else answer

    return tamper


def replaced(data: bytes | Callable[[dict[str, Any]], bytes]) -> Tamper:
    def tamper(asked: dict[str, Any], answer: bytes) -> bytes:
        if asked["do"] != "exchange":
            return answer
        return data(asked) if callable(data) else data

    return tamper


def round_with(tamper: Tamper, folder: Path, form: str = "raw") -> tuple[Record, Coordinator]:
    at = Direct(sites(METHOD, CLIENTS, folder))
    at.tampers[LIAR] = tamper
    far = coordinator(at, form=form)
    _, record = one_round(METHOD, far, start(METHOD), CLIENTS, 1)
    return record, far


def fit_to_print(reason: str) -> bool:
    return reason.isprintable() and len(reason) < 300


HOSTILE: dict[str, Tamper] = {
    "no message": replaced(b"junk"),
    "a pickle": replaced(b"\x80\x04K\x01."),
    "nothing": replaced(b""),
    "a huge integer": results(metrics={"loss": 10**400}),
    "a long integer": results(metrics={"loss": 10**20}),
    "a number no float holds": replaced(lambda asked: raw(json.dumps(asked).encode()[:-1] + b',"x":1e999}', [])),
    "NaN": results(metrics={"loss": float("nan")}),
    "Infinity": results(metrics={"loss": float("inf")}),
    "a bool for a number": results(metrics={"loss": True}),
    "text for a number": results(metrics={"loss": "0.1"}),
    "metrics that are a list": results(metrics=[["loss", 1.0]]),
    "no metrics": results(metrics=None),
    "a metric named by markup": results(metrics={"[/red]\x1b[31m": "x"}),
    "results that are a number": says(results=3),
    "results that are null": says(results=None),
    "results of lists": says(results=[[1]]),
    "results of nobody": says(results=[]),
    "a client that is a list": results(client=["a"]),
    "a client that is null": results(client=None),
    "two results": says(results=lambda given: given * 2),
    "deep JSON": replaced(lambda asked: raw(b'{"session":' + b"[" * 100_000 + b"]" * 100_000 + b"}", [])),
    "deeper JSON than we write": says(
        results=lambda given: [one | {"x": [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]} for one in given]
    ),
    "a failure of 1 MB": results(failure="x" * 2**20),
    "a failure with escapes": results(failure="\x1b]0;owned\x07\n[/red] \ud800 \u202e"),
    "a failure that is a number": results(failure=3),
    "a refusal of objects": says(refused={"a": ["[/red]"] * 1000}),
    "a refusal with a surrogate": says(refused="\udc80\x00"),
    "unknown for ever": says(refused="unknown", unknown=True),
    "another session": says(session="x"),
    "a session of objects": says(session={"a": 1}),
    "another message": says(number=10**9),
    "another round": says(t="[/red]"),
    "a round that is null": says(t=None),
    "tensors: junk": tensors(b"junk"),
    "tensors: none": tensors(codec.encode({})),
    "tensors: deep JSON": tensors(struct.pack("<Q", 200_000) + b"[" * 100_000 + b"]" * 100_000),
    "tensors: int8 of shape [0, 2]": tensors(
        (lambda head: struct.pack("<Q", len(head)) + head)(
            b'{"__metadata__":{"form":"int8"},"A/s":{"dtype":"I8","shape":[0,2],"data_offsets":[0,0]}}'
        )
    ),
    "tensors: a role of markup": tensors(save({"[/red]/s": torch.ones(1)})),
    "tensors: a site with escapes": tensors(save({"A/\x1b[31m": torch.ones(1)})),
    "tensors: a site of 1 MB": tensors(save({"A/" + "x" * 2**20: torch.ones(1)})),
    "tensors: a thousand roles": tensors(save({f"r{k}/s": torch.ones(1) for k in range(1000)})),
    "tensors: complex": tensors(codec.encode({"A": {"layers.0.in": torch.ones(4, 6, dtype=torch.complex64)}})),
    "tensors: NaN": tensors(codec.encode({"A": {"layers.0.in": torch.full((4, 6), torch.nan)}})),
    "tensors: one too many": lambda asked, answer: (
        pack(unpack(answer)[0], [bytes(part) for part in [*unpack(answer)[1], b"x"]])
        if asked["do"] == "exchange"
        else answer
    ),
    "tensors: none at all": lambda asked, answer: pack(unpack(answer)[0]) if asked["do"] == "exchange" else answer,
}


@pytest.mark.parametrize("form", ["raw", "int8"])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_answer_drops_its_client_alone(what: str, form: str, tmp_path: Path) -> None:
    record, far = round_with(HOSTILE[what], tmp_path, form)
    assert list(record.dropped) == ["a"], record.dropped
    assert fit_to_print(record.dropped["a"]) and "[/red]" not in record.metrics
    assert sorted(record.metrics) == ["b", "c", "d"]
    assert all(fit_to_print(note) for note in far.stats()["notes"])


def test_metrics_of_names_that_we_do_not_know_are_passed_over(tmp_path: Path) -> None:
    record, _ = round_with(
        says(results=lambda given: [one | {"metrics": one["metrics"] | {"[/red]": 1.0}} for one in given]), tmp_path
    )
    assert record.dropped == {} and record.metrics["a"].keys() == {"loss"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
fuzz = settings(
    max_examples=settings().max_examples * 3 // 5,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@fuzz
@given(json_values, st.sampled_from(["results", "seconds", "refused", "unknown", "session", "number", "t", "do"]))
def test_any_json_for_any_field_is_survived(tmp_path: Path, value: Any, name: str) -> None:
    record, _ = round_with(says(**{name: value}) if name != "do" else says(do_=value), tmp_path)
    assert set(record.dropped) <= {"a"} and all(map(fit_to_print, record.dropped.values()))


@fuzz
@given(json_values, st.sampled_from(["client", "metrics", "failure", "waits"]))
def test_any_json_in_a_result_is_survived(tmp_path: Path, value: Any, name: str) -> None:
    record, _ = round_with(results(**{name: value}), tmp_path)
    assert set(record.dropped) <= {"a"} and all(map(fit_to_print, record.dropped.values()))


@fuzz
@given(json_values, st.sampled_from(["clients", "refused", "session"]))
def test_any_json_in_a_hello_is_a_refusal(tmp_path: Path, value: Any, name: str) -> None:
    at = Direct(sites(METHOD, CLIENTS, tmp_path))
    at.tampers[LIAR] = says("hello", **{name: value})
    far = Coordinator(at, {}, coordinator(Direct(sites(METHOD, CLIENTS, tmp_path))).policy, None)  # type: ignore[arg-type]
    assert [client.id for client in far.wait_for_clients(3, 5.0)][-3:] == ["b", "c", "d"]
    assert all(fit_to_print(why) for _, why in far.registry.refused.values())


def hello(client: dict[str, Any] | Any) -> Any:
    whole = {"id": "a", "examples": 12, "rank": 4, "keep": 1.0}
    return [whole | client] if isinstance(client, dict) else client


@pytest.mark.parametrize(
    "clients, reason",
    [
        (3, "no list"),
        (None, "no list"),
        ([], "no list"),
        ([3], "as int, expected an object"),
        ([["a", 1, 4, 1.0]], "as list"),
        ([{"id": "a"}], "has no examples"),
        ({"more": 1}, "has more"),
        ({"id": 3}, "id of type int"),
        ({"id": "../../../tmp/x"}, "expected letters"),
        ({"id": "a..b"}, "expected letters"),
        ({"id": "server"}, "'server', expected"),
        ({"id": ""}, "expected letters"),
        ({"id": ".hidden"}, "expected letters"),
        ({"id": "[/red]"}, "expected letters"),
        ({"id": "a\n"}, "expected letters"),
        ({"id": "\ud800"}, "expected letters"),
        ({"id": "x" * 65}, "expected letters"),
        ({"id": "x" * 2**20}, "expected letters"),
        ({"examples": 0}, "examples"),
        ({"examples": -5}, "examples"),
        ({"examples": 10**12}, "examples"),
        ({"examples": 10**400}, "401 digits"),
        ({"examples": float("inf")}, "Infinity"),
        ({"examples": 1.5}, "examples of type float"),
        ({"examples": True}, "examples of type bool"),
        ({"rank": 0}, "rank"),
        ({"keep": 0.0}, "keep"),
        ({"keep": float("nan")}, "NaN"),
        ({"rank": 99}, "follows no rank"),
        ([{"id": "a", "examples": 1, "rank": 4}] * 2, "twice"),
        ([{"id": f"c{k}", "examples": 1, "rank": 4} for k in range(10_001)], "no list of 1 to 10000"),
    ],
)
def test_a_node_that_announces_nonsense_is_refused(clients: Any, reason: str, tmp_path: Path) -> None:
    at = Direct(sites(METHOD, CLIENTS, tmp_path))
    at.tampers[LIAR] = says("hello", clients=hello(clients))

    def check(client: Client) -> None:
        if client.rank > METHOD.rank:
            raise ConfigError("two_steps follows no rank budget")

    far = coordinator(at, CLIENTS[1:], check=check)
    far.directory = far.registry
    assert [client.id for client in far.wait_for_clients(3, 5.0)] == ["b", "c", "d"]
    with pytest.raises(RoundError, match=f"3 of 4 clients .*{reason}"):
        far.wait_for_clients(4, 0.3)
    ((_, why),) = far.registry.refused.values()
    assert fit_to_print(why)


def test_a_refused_node_is_asked_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = Direct(sites(METHOD, CLIENTS, tmp_path))
    at.tampers[LIAR] = says("hello", clients=3)
    far = coordinator(at, CLIENTS)
    far.directory = far.registry
    far.wait_for_clients(3, 5.0)
    at.tampers.clear()
    with pytest.raises(RoundError, match="3 of 4"):
        far.wait_for_clients(4, 0.3)
    monkeypatch.setattr("fedloom.flower.nodes.RETRY_S", 0.0)
    assert RETRY_S > 0 and len(far.wait_for_clients(4, 5.0)) == 4 and far.registry.refused == {}


@pytest.mark.parametrize(
    "scores",
    [
        3,
        None,
        [],
        {"a": 3},
        {"a": {"loss": 10**400}},
        {"a": {"loss": float("nan")}},
        {"a": {"loss": "x"}},
        {"a": {}},
        {"a": {"loss": 1.0, "[/red]": 1.0}},
        {"b": {"loss": 1.0}},
    ],
    ids=str,
)
def test_hostile_scores_leave_their_client_out(scores: Any, tmp_path: Path) -> None:
    at = Direct(sites(METHOD, CLIENTS, tmp_path))
    at.tampers[LIAR] = says("evaluate", scores=scores)
    far = coordinator(at)
    state = start(METHOD)
    found = far.scores(METHOD, [(client, METHOD.serve(state, client)) for client in CLIENTS], 1)
    assert list(found) == ["b", "c", "d"]
    (note,) = far.stats()["notes"]
    assert note.startswith("a ") and fit_to_print(note)


def test_flowers_own_words_are_made_printable(tmp_path: Path) -> None:
    at = Direct(sites(METHOD, CLIENTS, tmp_path))
    far = coordinator(at)
    pull = at.pull

    def broken(ids: list[str]) -> list[Reply]:
        return [Reply(r.id, None, "\x1b[31m" + "x" * 10**6) if r.id.startswith("0-") else r for r in pull(ids)]

    at.pull = broken  # type: ignore[method-assign]
    _, record = one_round(METHOD, far, start(METHOD), CLIENTS, 1)
    assert list(record.dropped) == ["a"] and fit_to_print(record.dropped["a"])


@given(st.text(max_size=80))
def test_a_client_id_is_the_name_of_a_file_or_none(text: str) -> None:
    if answers.is_client_id(text):
        assert (Path("/folder") / text).parent == Path("/folder") and text.isascii() and text.isprintable()
        assert "/" not in text and text not in (".", "..", "server") and len(text) <= 64


@given(json_values)
def test_any_json_is_a_client_or_refused(value: Any) -> None:
    try:
        client = answers.client(value)
    except WireError as error:
        assert str(error).isprintable()
    else:
        assert answers.is_client_id(client.id)


@fuzz
@given(
    json_values,
    st.sampled_from(["do", "session", "number", "t", "exchange", "clients", "setup"]),
    st.binary(max_size=30),
)
def test_a_worker_answers_any_header_with_a_message(tmp_path: Path, value: Any, name: str, blob: bytes) -> None:
    worker = sites(METHOD, CLIENTS, tmp_path)[LIAR]
    head = {
        "do": "exchange",
        "session": "s",
        "number": 1,
        "t": 1,
        "exchange": 1,
        "clients": ["a"],
        "setup": {"form": "raw"},
    }
    for data in (raw(json.dumps(head | {name: value}).encode(), [blob]), raw(json.dumps(value).encode(), [blob]), blob):
        said, _ = unpack(worker.answer(data))
        assert fit_to_print(said.get("refused", ""))
    assert "results" in unpack(worker.answer(pack(head | {"session": "new"}, [codec.encode(start(METHOD))])))[0]
