"""The same states through messages as in the simulator, bit for bit; visits over several exchanges; what a restart costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedloom.checkpoint import ClientStates
from fedloom.core import Client, Method
from fedloom.engine import Engine
from fedloom.errors import MethodError, RoundError
from fedloom.flower.message import WireError, pack, unpack
from fedloom.flower.worker import Worker
from fedloom.loop import Record, federate, one_round
from fedloom.state import State

from ..methods.cases import CASES, EXAMPLES, Case, engine, flat, start
from .direct import Direct
from .toys import TooLong, TooShort, ToyNode, TwoSteps, Uneven, coordinator, nodes, sites

ROUNDS = 3
pytestmark = pytest.mark.usefixtures("at_once")
CLIENTS = [Client(key, n, 4) for key, n in EXAMPLES.items()]


def trained(method: Method, at: Engine, clients: list[Client], rounds: int = ROUNDS) -> tuple[State, list[Record]]:
    records: list[Record] = []
    state = federate(method, at, start(method), clients, rounds, on_round=lambda _, record: records.append(record))
    return state, records


def told(records: list[Record]) -> list[tuple[Any, ...]]:
    return [(r.stage, r.clients, r.dropped, r.metrics, r.up.as_dict(), r.down.as_dict(), r.per_client) for r in records]


def kept(states: ClientStates) -> dict[str, dict[str, bytes]]:
    return {key: flat(states.get(key) or {}) for key in states.clients()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_every_method_ends_with_the_same_bytes_through_messages(case: Case, tmp_path: Path) -> None:
    method, clients = case.method(), case.clients()
    here = engine(cohort=1)
    want, said = trained(method, here, clients)
    far = coordinator(Direct(nodes(method, clients, tmp_path)), clients)
    got, heard = trained(method, far, clients)
    assert flat(got) == flat(want) and told(heard) == told(said)
    assert far.client_states.clients() == []
    # What clients keep is on the nodes' disks, and is what the simulator's clients keep.
    node = ToyNode(method, clients, tmp_path).run.before(ROUNDS + 1).client_states
    assert kept(node) == kept(here.client_states)


@pytest.mark.parametrize("form", ["raw", "bfloat16", "int8"])
def test_a_visit_of_two_exchanges_trains_as_in_the_simulator(form: str, tmp_path: Path) -> None:
    method = TwoSteps()
    want, said = trained(method, engine(cohort=1), CLIENTS)
    at = Direct(sites(method, CLIENTS, tmp_path))
    got, heard = trained(method, coordinator(at, form=form), CLIENTS)
    if form == "raw":
        assert flat(got) == flat(want) and told(heard) == told(said)
    else:
        assert all((got["B"][s] - x).norm() < 0.2 * x.norm() for s, x in want["B"].items())
    asked = [(h["t"], h["exchange"]) for h in at.headers if h["do"] == "exchange"]
    assert asked == [(t, x) for t in (1, 2, 3) for x in (1, 2) for _ in CLIENTS]


def test_the_run_is_described_once_to_each_node(tmp_path: Path) -> None:
    method = TwoSteps()
    for at, roster in (
        (Direct(sites(method, CLIENTS, tmp_path)), None),
        (Direct(nodes(method, CLIENTS, tmp_path)), CLIENTS),
    ):
        _, records = trained(method, coordinator(at, roster), CLIENTS)
        assert sum("setup" in header for header in at.headers) == len(at.workers)
        assert all(record.dropped == {} for record in records)


def restarted(at: Direct, method: Method, clients: list[Client], folder: Path, t: int, exchange: int) -> None:
    """Before this exchange, all workers are new processes."""

    def restart(header: dict[str, Any]) -> bool:
        if (header["t"], header["exchange"], header["do"]) == (t, exchange, "exchange") and not done:
            done.append(True)
            at.workers = nodes(method, clients, folder, len(at.workers))
        return False

    done: list[bool] = []
    at.lost = restart


@pytest.mark.parametrize("label", ["fedsa_lora", "scaffold", "fedit"])
def test_workers_that_were_started_again_cost_no_round(label: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.label == label)
    method, clients = case.method(), case.clients()
    want, _ = trained(method, engine(cohort=1), clients)
    at = Direct(nodes(method, clients, tmp_path))
    restarted(at, method, clients, tmp_path, 2, 1)
    got, records = trained(method, coordinator(at, clients), clients)
    assert all(record.dropped == {} for record in records) and flat(got) == flat(want)
    assert sum("setup" in header for header in at.headers) == 4


def test_a_visit_that_a_restart_lost_is_a_failure_of_its_round_alone(tmp_path: Path) -> None:
    method = TwoSteps()
    at = Direct(nodes(method, CLIENTS, tmp_path))
    restarted(at, method, CLIENTS, tmp_path, 2, 2)
    far = coordinator(at, CLIENTS)
    state, _ = one_round(method, far, start(method), CLIENTS, 1)
    with pytest.raises(RoundError, match="its visit was lost: the node was started again"):
        one_round(method, far, state, CLIENTS, 2)
    again, record = one_round(method, far, state, CLIENTS, 2)
    here = engine(cohort=1)
    first, _ = one_round(method, here, start(method), CLIENTS, 1)
    want, _ = one_round(method, here, first, CLIENTS, 2)
    assert record.dropped == {} and flat(again) == flat(want)


def test_a_lost_visit_drops_its_client_and_the_others_go_on(tmp_path: Path) -> None:
    method = TwoSteps()
    at = Direct(sites(method, CLIENTS, tmp_path))
    far = coordinator(at)

    def restart(header: dict[str, Any]) -> bool:
        if header["exchange"] == 2 and header["clients"] == ["b"] and "setup" not in header:
            at.workers[1] = sites(method, CLIENTS, tmp_path)[1]
        return False

    at.lost = restart
    _, record = one_round(method, far, start(method), CLIENTS, 1)
    assert record.dropped == {"b": "its visit was lost: the node was started again, or failed, within the round"}
    assert not (tmp_path / "b" / "kept").exists() and (tmp_path / "a" / "kept").exists()


@pytest.mark.parametrize("method", [TooShort(), TooLong()], ids=lambda method: type(method).__name__)
def test_a_mismatch_of_exchanges_is_the_same_error_as_in_the_simulator(method: Method, tmp_path: Path) -> None:
    errors = []
    for at in (engine(cohort=1), coordinator(Direct(sites(method, CLIENTS, tmp_path)))):
        with pytest.raises(MethodError) as caught:
            one_round(method, at, start(method), CLIENTS, 1)
        errors.append(str(caught.value))
    assert errors[0] == errors[1] and "await" in errors[0]


def test_one_nodes_word_against_the_others_is_no_error_of_the_method(tmp_path: Path) -> None:
    far = coordinator(Direct(sites(Uneven(), CLIENTS, tmp_path)))
    _, record = one_round(Uneven(), far, start(Uneven()), CLIENTS, 1)
    assert record.dropped == {}
    assert far.stats()["notes"] == ["the visits of a had not ended when those of the others had"]

    method = TwoSteps()
    at = Direct(sites(method, CLIENTS, tmp_path))

    def lies(header: dict[str, Any], answer: bytes) -> bytes:
        said, parts = unpack(answer)
        for result in said.get("results", []):
            result["waits"] = not result["waits"]
        return pack(said, [bytes(part) for part in parts])

    at.tampers[0] = lies
    _, record = one_round(method, coordinator(at), start(method), CLIENTS, 1)
    assert record.dropped == {"a": "its visit has ended, the others' go on"}

    at.tampers[0] = lambda header, answer: lies(header, answer) if header["exchange"] == 2 else answer
    far = coordinator(at)
    _, record = one_round(method, far, start(method), CLIENTS, 1)
    assert record.dropped == {}
    assert far.stats()["notes"] == ["the visits of a had not ended when those of the others had"]


def test_a_round_that_is_done_again_begins_with_what_was_kept_before_it(tmp_path: Path) -> None:
    method = TwoSteps()
    far = coordinator(Direct(nodes(method, CLIENTS, tmp_path)), CLIENTS)
    state, _ = one_round(method, far, start(method), CLIENTS, 1)
    once, _ = one_round(method, far, state, CLIENTS, 2)
    # Another server, which has only the checkpoint of round 1, and workers that are new.
    far = coordinator(Direct(nodes(method, CLIENTS, tmp_path)), CLIENTS)
    twice, _ = one_round(method, far, state, CLIENTS, 2)
    assert flat(once) == flat(twice)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == sorted(
        f"{key}-{t:06d}.safetensors" for key in EXAMPLES for t in (1, 2)
    )


def test_the_personal_phase_scores_and_exports_happen_on_the_nodes(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.label == "fedlora_optimizer")
    method, clients = case.method(), case.clients()
    at = Direct(nodes(method, clients, tmp_path))
    far, here = coordinator(at, clients), engine(cohort=1)
    states = [federate(method, where, start(method), clients, 1) for where in (far, here)]
    assert flat(states[0]) == flat(states[1])
    jobs = [(client, method.serve(states[0], client)) for client in clients]
    went = list(far.personal(method, jobs, 2))
    assert [one.client for one in went] == [c for k in (0, 1) for c in clients[k::2]]
    assert {one.client.id: one.metrics for one in went} == {
        one.client.id: one.metrics for one in here.personal(method, jobs, 2)
    }
    scores = far.scores(method, jobs, 2)
    assert list(scores) == list(EXAMPLES) and all(values.keys() == {"loss"} for values in scores.values())
    far.export(method, jobs, 2)
    assert far.stats()["notes"] == []


def test_the_nodes_train_time_and_bytes_are_told_once(tmp_path: Path) -> None:
    method = TwoSteps()
    at = Direct(nodes(method, CLIENTS, tmp_path))
    far = coordinator(at, CLIENTS)
    one_round(method, far, start(method), CLIENTS, 1)
    said = far.stats()
    assert said["wire"]["down"] == sum(at.sizes) and said["wire"]["up"] > 1000 and said["train_s"] > 0
    assert far.stats() == {"train_s": 0.0, "wire": {"down": 0, "up": 0}, "notes": []}


def test_an_old_worker_answers_nothing_twice_and_takes_up_a_session_again(tmp_path: Path) -> None:
    method = TwoSteps()
    worker = Worker(ToyNode(method, CLIENTS, tmp_path))

    def ask(**header: Any) -> dict[str, Any]:
        base = {"do": "hello", "session": "s", "number": 1, "t": 0, "exchange": 1, "clients": []}
        return unpack(worker.answer(pack(base | header)))[0]

    setup = {"form": "raw"}
    assert ask()["unknown"] is True and "not known" in ask()["refused"]
    assert "does not say what run" in ask(setup={"form": "zip"})["refused"]
    assert "clients" in ask(setup=setup)
    assert "replayed" in ask(setup=setup)["refused"] and "clients" in ask(number=2)
    assert "clients" in ask(session="other", setup=setup)
    assert ask(number=3)["refused"] == "replayed: this session has ended"
    for wrong in ({"number": True}, {"number": -1}, {"t": None}, {"exchange": "1"}, {"session": 3}):
        assert "has no session, number, t or exchange" in ask(**wrong)["refused"]
    said = ask(session="other", number=2, t=1, exchange=2, do="exchange", clients=["a", {}])
    assert "do not live here" in said["refused"]


def test_a_session_goes_on_after_a_setup_of_another_one_that_failed(tmp_path: Path) -> None:
    method = TwoSteps()
    node = ToyNode(method, CLIENTS, tmp_path)
    worker = Worker(node)
    head = {"do": "hello", "t": 0, "exchange": 1, "clients": []}
    assert "clients" in unpack(worker.answer(pack(head | {"session": "s", "number": 1, "setup": {"form": "raw"}})))[0]

    def refuses(setup: dict[str, Any]) -> Any:
        raise WireError("another run")

    node.setup = refuses  # type: ignore[method-assign]
    other = unpack(worker.answer(pack(head | {"session": "o", "number": 1, "setup": {"form": "raw"}})))[0]
    assert other["refused"] == "another run"
    del node.setup  # type: ignore[method-assign]
    assert unpack(worker.answer(pack(head | {"session": "s", "number": 2})))[0]["unknown"] is True
    again = unpack(worker.answer(pack(head | {"session": "s", "number": 3, "setup": {"form": "raw"}})))[0]
    assert "clients" in again
