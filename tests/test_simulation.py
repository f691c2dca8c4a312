"""The simulator: visits in lock step, what clients keep, and what goes wrong in them."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from fedloom.checkpoint import ClientStates
from fedloom.core import Client, Failure, Mean, Round, Send, State, Trained, Visit, Work
from fedloom.engine import Answer
from fedloom.errors import ConfigError, MethodError
from fedloom.loop import federate, one_round
from fedloom.methods.base import LoRA
from fedloom.rng import generator
from fedloom.simulation import Simulation

SITES = {"s": (3, 4)}
CLIENTS = [Client(k, 1, 2) for k in "abcde"]


@dataclass
class Adds:
    """A trainer that adds one."""

    passes: list[tuple[int, int, str]] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)

    def fit(self, works: Sequence[tuple[Client, Work]], data: Sequence[str], t: int, part: int = 0) -> list[Trained]:
        self.passes.append((t, part, "".join(client.id for client, _ in works)))
        self.rows += data
        return [
            Trained(
                {r: {s: x + 1 for s, x in g.items()} for r, g in work.train.items()}, 1, 1.0, float(part), {"p": 1.0}
            )
            for _, work in works
        ]


@dataclass(frozen=True, kw_only=True)
class Played(LoRA):
    """A method whose client is a function, and whose server awaits some exchanges."""

    visit: Any
    exchanges: int = 1

    name: ClassVar[str] = "played"
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None: ...

    async def server(self, state: State, round: Round) -> State:
        for _ in range(self.exchanges):
            mean = await Mean(send=lambda client, state=state: {"A": state["A"]})  # type: ignore[misc]
            state = state | mean.state
        return state

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        result: tuple[State, State] = await self.visit(received, own, visit)
        return result


def engine(trainer: Adds | None = None, **options: Any) -> Simulation[str]:
    return Simulation(trainer or Adds(), SITES, lambda client: f"rows of {client}", **{"cohort": 2, **options})


def play(method: Any, at: Simulation[str] | None = None, t: int = 1, clients: Sequence[Client] = CLIENTS) -> Any:
    return one_round(method, at or engine(), method.init(SITES, generator(0)), clients, t)


async def plain(received: State, own: State, visit: Visit) -> tuple[State, State]:
    done = await Work(train=received)
    return done.state, {}


def test_cohorts_are_trained_together_with_their_rows() -> None:
    trainer = Adds()
    play(Played(rank=2, visit=plain), engine(trainer))
    assert trainer.passes == [(1, 0, "ab"), (1, 0, "cd"), (1, 0, "e")]
    assert trainer.rows == [f"rows of {k}" for k in "abcde"]


def test_visits_go_in_lock_step_though_some_are_longer() -> None:
    """a and b train twice, the others once or not at all; a cohort of five is two passes."""

    async def visit(received: State, own: State, visit: Visit) -> tuple[State, State]:
        if visit.client.id == "e":
            return received, {}
        done = await Work(train=received)
        if visit.client.id in "ab":
            done = await Work(train=done.state)
        return done.state, {}

    trainer = Adds()
    method = Played(rank=2, visit=visit)
    first = method.init(SITES, generator(0))
    after, record = play(method, engine(trainer, cohort=5))
    assert trainer.passes == [(1, 0, "abcd"), (1, 1, "ab")]
    torch.testing.assert_close(after["A"]["s"], first["A"]["s"] + (2 + 2 + 1 + 1 + 0) / 5)
    assert record.metrics["a"] == {"loss": 0.0, "p": 1.0}, "the first work's"
    assert record.metrics["e"] == {}


def test_parts_count_works_across_exchanges() -> None:
    async def visit(received: State, own: State, visit: Visit) -> tuple[State, State]:
        done = await Work(train=received)
        received = await Send(done.state)
        done = await Work(train=received)
        return done.state, {}

    trainer = Adds()
    method = Played(rank=2, visit=visit, exchanges=2)
    first = method.init(SITES, generator(0))
    after, record = play(method, engine(trainer, cohort=5))
    assert trainer.passes == [(1, 0, "abcde"), (1, 1, "abcde")]
    torch.testing.assert_close(after["A"]["s"], first["A"]["s"] + 2)
    assert record.per_client["a"] == [2 * 4 * 2 * 4] * 2, "both exchanges are counted"


def test_a_client_dropped_between_two_exchanges_does_not_stop_the_round() -> None:
    """b sends a NaN in the first exchange: its visit is closed, nobody asks it again, and nothing of it is kept."""
    closed: list[str] = []

    async def visit(received: State, own: State, visit: Visit) -> tuple[State, State]:
        k = visit.client.id
        try:
            up = {"A": {"s": received["A"]["s"] + (float("nan") if k == "b" else 1.0)}}
            received = await Send(up)
            return received, {"note": {"x": torch.ones(1)}}
        finally:
            closed.append(k)

    at = engine()
    method = Played(rank=2, visit=visit, exchanges=2)
    first = method.init(SITES, generator(0))
    after, record = play(method, at)
    torch.testing.assert_close(after["A"]["s"], first["A"]["s"] + 1)
    assert record.dropped == {"b": "A/s has a NaN or an infinite number"}
    assert at.client_states.clients() == ["a", "c", "d", "e"] and sorted(closed) == ["a", "b", "c", "d", "e"]


def test_a_client_that_sends_more_often_than_the_server_asks() -> None:
    closed: list[str] = []

    async def visit(received: State, own: State, visit: Visit) -> tuple[State, State]:
        try:
            received = await Send(received)
            return received, {"note": {"x": torch.ones(1)}}
        finally:
            closed.append(visit.client.id)

    at = engine()
    with pytest.raises(
        MethodError, match=r"round 3 ended while clients a, b, c, d, e await an answer to Send: `server` must"
    ):
        play(Played(rank=2, visit=visit), at, t=3)
    assert closed == list("abcde") and at.client_states.clients() == []


def test_a_server_that_asks_more_often_than_the_client_sends() -> None:
    with pytest.raises(
        MethodError, match="round 1 goes on, but the visit of client 'a' has ended: `client` must await Send"
    ):
        play(Played(rank=2, visit=plain, exchanges=2))


@pytest.mark.parametrize(
    "result, found", [(None, "NoneType"), ({}, "dict"), (({},), "tuple"), (({}, None), "tuple")], ids=str
)
def test_what_a_visit_must_return(result: Any, found: str) -> None:
    async def visit(received: State, own: State, visit: Visit) -> Any:
        return result

    with pytest.raises(MethodError, match=rf"played\.client returned {found}, expected \(sent, kept\)"):
        play(Played(rank=2, visit=visit))


def test_what_a_visit_may_await() -> None:
    class Odd:
        def __await__(self) -> Any:
            yield 3

    async def visit(received: State, own: State, visit: Visit) -> Any:
        await Odd()

    with pytest.raises(MethodError, match=r"played\.client awaited int, expected Work or Send"):
        play(Played(rank=2, visit=visit))
    with pytest.raises(MethodError, match=r"played\.client awaited Mean, expected Work or Send"):

        async def asks(received: State, own: State, visit: Visit) -> Any:
            await Mean(send=lambda client: {})

        play(Played(rank=2, visit=asks))


def test_a_client_that_is_no_coroutine() -> None:
    class Plain(Played):
        def client(self, received: State, own: State, visit: Visit) -> Any:
            return received, {}

    with pytest.raises(MethodError, match=r"played\.client is no coroutine function: write `async def client`"):
        play(Plain(rank=2, visit=None))


def test_an_error_in_a_visit_says_where_and_closes_the_cohort() -> None:
    closed: list[str] = []

    async def visit(received: State, own: State, visit: Visit) -> tuple[State, State]:
        try:
            done = await Work(train=received)
            if visit.client.id == "d":
                raise ZeroDivisionError("in the method")
            done = await Work(train=done.state)
            return done.state, {"note": {"x": torch.ones(1)}}
        finally:
            closed.append(visit.client.id)

    at = engine(cohort=3)
    with warnings.catch_warnings(), pytest.raises(ZeroDivisionError) as caught:
        warnings.simplefilter("error")
        play(Played(rank=2, visit=visit), at, t=7)
    gc.collect()
    assert caught.value.__notes__ == ["in the visit of client 'd', round 7, after 1 works"]
    assert closed == ["a", "b", "c", "d", "e"]
    assert at.client_states.clients() == [], "nothing of the round counts"


def test_a_round_that_broke_is_done_again_as_if_it_had_not_been() -> None:
    broken = True

    async def visit(received: State, own: State, visit: Visit) -> tuple[State, State]:
        if broken and visit.client.id == "e":
            raise ZeroDivisionError
        count = own.get("count", {}).get("x", torch.zeros(1)) + 1
        return received, {"count": {"x": count}}

    at, method = engine(), Played(rank=2, visit=visit)
    with pytest.raises(ZeroDivisionError):
        play(method, at)
    broken = False
    play(method, at)
    assert [at.own(k)["count"]["x"].item() for k in "abcde"] == [1] * 5


def test_what_is_kept_must_be_finite() -> None:
    async def visit(received: State, own: State, visit: Visit) -> tuple[State, State]:
        return received, {"note": {"x": torch.tensor([float("nan") if visit.client.id == "b" else 1.0])}}

    at = engine()
    _, record = play(Played(rank=2, visit=visit), at)
    assert record.dropped == {"b": "training diverged: what the client would keep is not finite"}
    assert at.client_states.clients() == ["a", "c", "d", "e"]


def test_own_is_the_fresh_state_then_what_was_kept_whole() -> None:
    seen: dict[tuple[int, str], set[str]] = {}

    async def visit(received: State, own: State, visit: Visit) -> tuple[State, State]:
        seen[visit.t, visit.client.id] = set(own)
        return received, {f"kept{visit.t}": {"x": torch.ones(1)}}

    at = engine(fresh={"head": {"w": torch.zeros(1)}})
    method = Played(rank=2, visit=visit)
    federate(
        method,
        at,
        method.init(SITES, generator(0)),
        CLIENTS,
        3,
        sample=lambda clients, t: clients[:2] if t == 2 else clients,
    )
    assert seen[1, "a"] == seen[1, "c"] == {"head"} and seen[2, "a"] == {"kept1"}
    assert seen[3, "a"] == {"kept2"} and seen[3, "c"] == {"kept1"}, "replaced whole, not merged"


def test_states_of_clients_go_where_they_are_told(tmp_path: Any) -> None:
    async def visit(received: State, own: State, visit: Visit) -> tuple[State, State]:
        return received, {"note": {"x": torch.tensor([float(ord(visit.client.id))])}}

    at = engine(client_states=ClientStates(tmp_path))
    play(Played(rank=2, visit=visit), at, t=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{k}-000004.safetensors" for k in "abcde"]
    assert at.own("c")["note"]["x"].item() == ord("c")


def test_secret_generators_differ_by_client_and_round_and_are_repeatable_by_key() -> None:
    drawn: dict[tuple[int, str], float] = {}

    async def visit(received: State, own: State, visit: Visit) -> tuple[State, State]:
        drawn[visit.t, visit.client.id] = torch.rand(1, generator=visit.rng).item()
        return received, {}

    method = Played(rank=2, visit=visit)
    for t in (1, 2):
        play(method, engine(secret=5), t=t)
    assert len(set(drawn.values())) == 10
    first = dict(drawn)
    play(method, engine(secret=5), t=1)
    assert drawn == first
    play(method, engine(secret=6), t=1)
    assert drawn[1, "a"] != first[1, "a"]
    for _ in range(2):
        before = drawn[1, "a"]
        play(method, engine(secret=None), t=1)
        assert drawn[1, "a"] != before, "of the operating system"


def test_the_server_trains_on_rows_of_its_own_or_says_what_is_missing() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Serves(Played):
        async def server(self, state: State, round: Round) -> State:
            done = await Work(train={"A": state["A"]})
            return state | done.state

    trainer, method = Adds(), Serves(rank=2, visit=plain)
    state, record = play(method, engine(trainer, proxy=Client("server", 9, 2)), t=2)
    assert trainer.passes == [(2, 0, "server")] and trainer.rows == ["rows of server"]
    torch.testing.assert_close(state["A"]["s"], method.init(SITES, generator(0))["A"]["s"] + 1)
    assert record.stage == "server" and record.train_loss == 0.0
    with pytest.raises(
        ConfigError, match=r"played trains on the server's own data in round 2, but there is none.*task\.proxy_data"
    ):
        play(method, engine(), t=2)


@dataclass(frozen=True, kw_only=True)
class Personal(Played):
    """Keeps what it trained in a phase after the last round."""

    async def personal(self, received: State, own: State, visit: Visit) -> State:
        done = await Work(train=received)
        done = await Work(train=done.state)
        return {"mine": done.state["A"]} if visit.client.id != "d" else {"mine": {"s": torch.tensor([float("nan")])}}

    def model(self, received: State, own: State, visit: Visit) -> Work:
        return Work(train=received, scale=2.0 if "mine" in own else 1.0)


def test_the_personal_phase_trains_in_cohorts_and_keeps() -> None:
    trainer = Adds()
    at, method = engine(trainer), Personal(rank=2, visit=plain)
    state = method.init(SITES, generator(0))
    jobs = [(client, {"A": state["A"]}) for client in CLIENTS]
    answers = list(at.personal(method, iter(jobs), 9))
    assert [type(a) for a in answers] == [Answer, Answer, Answer, Failure, Answer]
    assert all(a.state == {} and a.metrics["loss"] == 0.0 for a in answers if isinstance(a, Answer))
    assert trainer.passes == [(9, 0, "ab"), (9, 1, "ab"), (9, 0, "cd"), (9, 1, "cd"), (9, 0, "e"), (9, 1, "e")]
    assert at.client_states.clients() == ["a", "b", "c", "e"]
    torch.testing.assert_close(at.own("a")["mine"]["s"], state["A"]["s"] + 2)


def test_scores_and_exports_are_of_the_model_that_a_client_uses() -> None:
    written: list[tuple[str, float]] = []
    at = engine(
        score=lambda works: [{"scale": work.scale} for _, work in works],
        write=lambda client, work: written.append((client, work.scale)),
    )
    method = Personal(rank=2, visit=plain)
    state = method.init(SITES, generator(0))
    at.client_states.put("b", {"mine": {"s": torch.ones(1)}}, 1)
    jobs = [(client, {"A": state["A"]}) for client in CLIENTS]
    assert at.scores(method, jobs, 1) == {k: {"scale": 2.0 if k == "b" else 1.0} for k in "abcde"}
    at.export(method, jobs, 1)
    assert written == [("b", 2.0)], "of those that keep something"


def test_progress_and_seconds_of_training() -> None:
    counts: list[int] = []
    at = engine(progress=counts.append)
    play(Played(rank=2, visit=plain), at)
    assert counts == [2, 2, 1]
    assert at.stats()["train_s"] >= 0 and at.stats() == {"train_s": 0.0}
