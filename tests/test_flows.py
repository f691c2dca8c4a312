"""Relays, wrappers, and which compositions are refused."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from fedloom.client import Client
from fedloom.core import Mean, Method, Round, Send, State, Trained, Visit, Work
from fedloom.errors import ConfigError
from fedloom.flows import Over, at, followed_budgets, need_factors, rehearse, relay, relay_works, weighting
from fedloom.methods import build, names
from fedloom.methods.base import LoRA
from fedloom.rng import generator

RANK = {"rank": 4, "alpha": 6.0, "rslora": False}


class Ask:
    """What a coroutine awaits here: a number, answered with another."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __await__(self) -> Iterator[Any]:
        answer = yield self
        return answer


def drive(flow: Coroutine[Any, Any, Any], *answers: Any) -> tuple[list[Any], Any]:
    """(what it awaited, what it returned), each answer sent or, if it is an exception, thrown."""
    awaited = [flow.send(None)]
    for answer in answers:
        try:
            awaited.append(flow.throw(answer) if isinstance(answer, Exception) else flow.send(answer))
        except StopIteration as stop:
            return awaited, stop.value
    flow.close()
    return awaited, None


async def inner(log: list[Any]) -> str:
    try:
        log.append(await Ask(1))
        try:
            log.append(await Ask(2))
        except ValueError as error:
            log.append(str(error))
        return "done"
    finally:
        log.append("left")


async def same(asked: Any) -> Any:
    return await asked


def test_relay_passes_what_is_asked_and_answered_and_the_result() -> None:
    log: list[Any] = []
    awaited, result = drive(relay(inner(log), same), "a", "b")
    assert [x.number for x in awaited] == [1, 2] and log == ["a", "b", "left"] and result == "done"


def test_relay_changes_the_question_or_the_answer() -> None:
    log: list[Any] = []
    awaited, _ = drive(relay(inner(log), lambda asked: Ask(asked.number * 10)), "a", "b")
    assert [x.number for x in awaited] == [10, 20] and log == ["a", "b", "left"]

    async def louder(asked: Ask) -> str:
        return str(await asked).upper()

    log = []
    drive(relay(inner(log), louder), "a", "b")
    assert log == ["A", "B", "left"]

    async def twice(asked: Ask) -> Any:
        return (await asked, await Ask(-asked.number))

    log = []
    awaited, _ = drive(relay(inner(log), twice), "a", "b", "c", "d")
    assert [x.number for x in awaited] == [1, -1, 2, -2] and log == [("a", "b"), ("c", "d"), "left"]

    async def known(asked: Ask) -> str:
        return "known"

    log = []
    flow = relay(inner(log), known)
    with pytest.raises(StopIteration) as stop:
        flow.send(None)
    assert stop.value.value == "done" and log == ["known", "known", "left"], "answered without asking"


def test_relay_throws_into_the_inner_coroutine_which_may_catch() -> None:
    log: list[Any] = []
    _, result = drive(relay(inner(log), same), "a", ValueError("caught"))
    assert log == ["a", "caught", "left"] and result == "done"
    log = []
    with pytest.raises(KeyError):
        drive(relay(inner(log), same), "a", KeyError("not caught"))
    assert log == ["a", "left"]


def test_relay_throws_errors_of_its_own_change_into_the_inner_coroutine() -> None:
    def fail(asked: Ask) -> Any:
        if asked.number == 2:
            raise ValueError("of the wrapper")
        return asked

    log: list[Any] = []
    _, result = drive(relay(inner(log), fail), "a")
    assert log == ["a", "of the wrapper", "left"] and result == "done"


@pytest.mark.parametrize("depth", [1, 3])
def test_closing_a_relay_closes_the_inner_coroutine(depth: int) -> None:
    log: list[Any] = []
    flow: Any = inner(log)
    for _ in range(depth):
        flow = relay(flow, same)
    flow.send(None)
    flow.close()
    assert log == ["left"]


def test_relay_works_changes_works_alone() -> None:
    sent: State = {"A": {"s": torch.ones(1)}}

    async def visit() -> State:
        done = await Work(train=sent, scale=2.0)
        answer = await Send(done.state)
        return answer

    flow = relay_works(visit(), lambda work: replace(work, scale=work.scale * 3, lr=0.5))
    work = flow.send(None)
    assert isinstance(work, Work) and (work.scale, work.lr) == (6.0, 0.5) and work.train is sent
    asked = flow.send(Trained(sent, 1, 1.0, 0.0))
    assert isinstance(asked, Send) and asked.state is sent
    with pytest.raises(StopIteration) as stop:
        flow.send(sent)
    assert stop.value.value is sent


# wrappers


@dataclass(frozen=True, kw_only=True)
class Noted(Over):
    """Adds roles of its own and changes nothing."""

    name: ClassVar[str] = "noted"
    paper: ClassVar[str] = ""
    adds: ClassVar[tuple[str, ...]] = ("note_", "mark")


@dataclass(frozen=True, kw_only=True)
class Halved(Over):
    """Follows the keep budget and gives half of it to no one."""

    name: ClassVar[str] = "halved"
    paper: ClassVar[str] = ""
    budgets: ClassVar[frozenset[str]] = frozenset({"keep"})


STATE: State = {"A": {}, "note_a": {}, "mark": {}, "marker": {}, "head": {}}


def test_roles_are_the_wrappers_or_the_inner_methods() -> None:
    method = Noted(over=build({"name": "fedit"}, RANK))
    assert set(method.mine(STATE)) == {"note_a", "mark", "marker"} and set(method.inner(STATE)) == {"A", "head"}
    plain = Halved(over=method.over)
    assert plain.inner(STATE) is STATE and plain.mine(STATE) == {}


def test_a_wrapper_forwards_everything() -> None:
    for name in names():
        over = build({"name": name}, RANK)
        method = Noted(over=over)
        assert (method.rank, method.personal_models, method.personal_phase, method.needs_proxy_data) == (
            over.rank,
            over.personal_models,
            over.personal_phase,
            over.needs_proxy_data,
        )
        sites = {"s": (5, 4)}
        first = method.init(sites, generator(0))
        assert {r: set(g) for r, g in first.items()} == {r: set(g) for r, g in over.init(sites, generator(0)).items()}
        client = Client("a", 3, 4)
        noted = first | {"note_a": {"x": torch.ones(1)}}
        assert set(method.serve(noted, client)) == set(over.serve(first, client))
        flow = method.server(noted, Round(1, (client,), 1, sites))
        x = flow.send(None)
        flow.close()
        assert "note_a" not in x.send(client)


def test_a_wrapper_keeps_its_own_roles_through_a_round() -> None:
    method = Noted(over=build({"name": "fedit"}, RANK))
    note = {"x": torch.ones(1)}

    class Nothing:
        state: ClassVar[State] = {"A": {"s": torch.zeros(1)}}

    flow = method.server({"A": {}, "note_a": note}, Round(1, (), 0, {}))
    assert isinstance(flow.send(None), Mean)
    with pytest.raises(StopIteration) as stop:
        flow.send(Nothing())
    assert stop.value.value["note_a"] is note and set(stop.value.value) == {"A", "note_a"}


def test_the_client_as_the_inner_method_sees_it() -> None:
    method = Halved(over=build({"name": "fedit"}, RANK))
    client = Client("a", 3, 4, keep=0.5)
    assert method.whole(client) == Client("a", 3, 4, keep=1.0)
    method.check(client)
    with pytest.raises(ConfigError, match=r"keep 0, expected a number above 0 and at most 1"):
        method.check(replace(client, keep=0.0))
    with pytest.raises(ConfigError, match="fedit follows no rank budget, got rank 2"):
        method.check(replace(client, rank=2))
    visit = at(Visit(3, client, {}), keep=0.25, rank=1)
    assert visit.client == Client("a", 3, 1, keep=0.25) and visit.t == 3


def test_budgets_are_followed_at_any_depth() -> None:
    method = build({"name": "fedprox", "over": {"name": "fedlodrop", "over": {"name": "fslora"}}}, RANK)
    assert followed_budgets(method) == {"keep", "rank"} and method.budgets == frozenset()
    assert followed_budgets(build({"name": "fedit"}, RANK)) == frozenset()


def test_weighting() -> None:
    x = Mean(send=lambda client: {}, weight=lambda client: 7.0)
    client = Client("a", 3, 4)
    assert [weighting(name, x)(client) for name in ("uniform", "examples", "auto")] == [1.0, 3.0, 7.0]


# rehearsals and refusals


def test_a_rehearsal_plays_a_round_up_to_its_first_exchange() -> None:
    client = Client("a", 3, 4)
    seen = rehearse(build({"name": "feddpa"}, RANK), client, 1)
    assert seen is not None and seen.work is not None
    assert set(seen.received) == {"A", "B"} == set(seen.sent) and set(seen.kept) == {"local_A", "local_B"}
    assert set(seen.work.train) == {"A", "B"}, "the first of two works"
    proxy = build({"name": "fedlora_optimizer", "global_phase": "server_proxy"}, RANK)
    assert rehearse(proxy, client, 2) is None and rehearse(proxy, client, 1) is not None


@dataclass(frozen=True, kw_only=True)
class Talks(LoRA):
    """A visit of two exchanges that trains nothing before the first."""

    name: ClassVar[str] = "talks"
    paper: ClassVar[str] = ""

    async def server(self, state: State, round: Round) -> State:
        await Mean(send=lambda client: {"A": state["A"], "B": state["B"]})
        return state

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        received = await Send(received)
        return received, {}


def test_a_rehearsal_ends_at_a_send() -> None:
    seen = rehearse(Talks(rank=4), Client("a", 3, 4), 1)
    assert seen is not None and seen.work is None and set(seen.sent) == {"A", "B"} and seen.kept == {}


IMPOSSIBLE = [
    (
        "fslora",
        "fedsa_lora",
        "a sketch needs both factors whole, and what fedsa_lora sends to clients in round 1 has A",
    ),
    ("fslora", "ffa_lora", "fslora draws the ranks of a client, as ffa_lora chooses them"),
    ("fslora", "hetlora", "fslora draws the ranks of a client, as hetlora chooses them"),
    ("fslora", "flexlora", "fslora draws the ranks of a client, as flexlora chooses them"),
    ("fslora", "feddpa", "it keeps local_A, local_B with the client"),
    ("fslora", "scaffold", "it keeps c_A, c_B with the client"),
    ("fslora", "fslora", "fslora over fslora: both add roles that begin with idle, sketch"),
    ("fslora", "fedlora_optimizer", "what fedlora_optimizer gets back from clients in round 2 has turn"),
    ("fedlodrop", "fedsa_lora", "what fedsa_lora sends to clients in round 1 has A"),
    ("fedlodrop", "ffa_lora", "what ffa_lora sends to clients in round 1 has frozen, B"),
    ("fedlodrop", "hetlora", "a size that the client chooses"),
    ("fedlodrop", "feddpa", "it keeps local_A, local_B with the client"),
    ("fedlodrop", "scaffold", "it keeps c_A, c_B with the client"),
    ("fedlodrop", "fedlodrop", "both add roles that begin with mask"),
    ("fedlodrop", "fedlora_optimizer", "what fedlora_optimizer gets back from clients in round 2 has turn"),
    ("scaffold", "hetlora", "a size that the client chooses"),
    ("scaffold", "scaffold", "both add roles that begin with c_"),
    ("fedprox", "fedprox", "both add roles that begin with prox_"),
    ("fedadam", "fedavgm", "both add roles that begin with server_m_, server_v_"),
]


@pytest.mark.parametrize("name, over, why", IMPOSSIBLE, ids=[f"{name} over {over}" for name, over, _ in IMPOSSIBLE])
def test_what_cannot_work_is_refused_when_it_is_named(name: str, over: str, why: str) -> None:
    """One error that names the table and the way out, at any depth."""
    table = {"name": name, "over": {"name": over}}
    with pytest.raises(ConfigError) as caught:
        build(table, RANK)
    message = str(caught.value)
    assert message.startswith(f"[method] {name}") and why in message and "\n" not in message
    assert "choose another [method.over]" in message or message.endswith("use one of them")
    with pytest.raises(ConfigError) as caught:
        build({"name": "noted", "over": table} | {"name": f"{Noted.__module__}:Noted"}, RANK)
    message = str(caught.value)
    assert message.startswith(f"[method.over] {name}") and why in message
    assert "choose another [method.over.over]" in message or message.endswith("use one of them")


@pytest.mark.parametrize(
    "name, fields, over",
    [
        ("fslora", {}, "flexlora"),
        ("fslora", {}, "ffa_lora"),
        ("fslora", {}, "hetlora"),
        ("fslora", {}, "feddpa"),
        ("fedlodrop", {}, "hetlora"),
        ("fedlodrop", {"aggregation": "count"}, "fslora"),
        ("scaffold", {}, "hetlora"),
    ],
    ids=str,
)
def test_a_wrapper_between_hides_nothing(name: str, fields: dict[str, str], over: str) -> None:
    table = {"name": name, **fields, "over": {"name": "fedprox", "over": {"name": over}}}
    with pytest.raises(ConfigError, match=rf"^\[method\] {name}"):
        build(table, RANK)


def test_the_same_wrapper_twice_is_refused_through_another() -> None:
    table = {"name": "fedprox", "over": {"name": "fedadam", "over": {"name": "fedprox"}}}
    with pytest.raises(
        ConfigError, match="fedprox over fedprox: both add roles that begin with prox_: use one of them"
    ):
        build(table, RANK)


def test_factors_must_come_and_go_whole() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Narrow(Talks):
        name: ClassVar[str] = "narrow"

        async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
            return {role: {site: x[:, :2] for site, x in group.items()} for role, group in received.items()}, {}

    need_factors(Noted(over=Talks(rank=4)), "this")
    with pytest.raises(ConfigError, match=r"noted cannot go over narrow: this needs both factors whole, .* gets back"):
        need_factors(Noted(over=Narrow(rank=4)), "this")


# tables


def test_tables_nest_to_any_depth() -> None:
    table = {
        "name": "fedadam",
        "lr": 0.5,
        "over": {
            "name": "fedprox",
            "mu": 2,
            "over": {"name": "fedlodrop", "over": {"name": "fslora", "over": {"name": "fedex_lora"}}},
        },
    }
    method: Any = build(table, RANK)
    chain = []
    while True:
        chain.append(method.name)
        if not isinstance(method, Over):
            break
        method = method.over
    assert chain == ["fedadam", "fedprox", "fedlodrop", "fslora", "fedex_lora"] and (method.rank, method.alpha) == (
        4,
        6.0,
    )
    assert build({"name": "fslora"}, RANK) == build({"name": "fslora", "over": {"name": "fedit"}}, RANK)
    proxed: Any = build(table, RANK)
    assert proxed.lr == 0.5 and proxed.over.mu == 2.0 and isinstance(proxed.over.mu, float)
    assert table["over"]["name"] == "fedprox", "the table is not changed"  # type: ignore[index]


@pytest.mark.parametrize(
    "table, message",
    [
        (
            {"name": "fslora", "sketsh": 1},
            r"^\[method\] fslora has no field 'sketsh'; did you mean 'sketch'\?; it has: over",
        ),
        (
            {"name": "fslora", "over": {"name": "fedit", "x": 1}},
            r"^\[method\.over\] fedit has no field 'x'; it has: none",
        ),
        (
            {"name": "fedadam", "over": {"name": "fedprox", "over": {"name": "fslora", "mu": 1}}},
            r"^\[method\.over\.over\] fslora has no field 'mu'",
        ),
        (
            {"name": "fedadam", "over": {"name": "fedprox", "over": {"name": "fslora", "sketch": "x"}}},
            r"^\[method\.over\.over\] fslora: sketch is 'x'; expected one of uniform, balanced, importance",
        ),
        (
            {"name": "fedadam", "over": {"name": "fedprox", "over": {"name": "fedexlora"}}},
            r"^\[method\.over\.over\] unknown method 'fedexlora'; did you mean 'fedex_lora'\?",
        ),
        ({"name": "fslora", "over": {}}, r"^\[method\.over\] has no name, expected one of fedit"),
        ({}, r"^\[method\] has no name"),
        ({"name": "fslora", "over": 3}, r"^\[method\] over is 3, expected a table with a name: \[method\.over\]"),
        ({"name": "fedit", "over": {"name": "fedit"}}, r"^\[method\] fedit has no field 'over'"),
        ({"name": "fslora", "rank": 3}, r"^\[method\] sets rank: set it in \[lora\]"),
        (
            {"name": "fslora", "over": {"name": "fedit", "alpha": 3}},
            r"^\[method\.over\] sets alpha: set it in \[lora\]",
        ),
    ],
    ids=str,
)
def test_errors_name_their_table(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(table, RANK)


def test_the_old_form_of_over_is_read_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match=r'over = "fedex_lora" is the old form: write \[method.over\] with name'):
        old = build({"name": "fslora", "over": "fedex_lora"}, RANK)
    assert old == build({"name": "fslora", "over": {"name": "fedex_lora"}}, RANK)
    with pytest.warns(FutureWarning), pytest.raises(ConfigError, match=r"^\[method\.over\] unknown method 'x'"):
        build({"name": "fslora", "over": "x"}, RANK)


@pytest.mark.parametrize(
    "table, field",
    [
        ({"name": "fslora", "sketch": 1}, "sketch"),
        ({"name": "fslora", "sketch": None}, "sketch"),
        ({"name": "fslora", "importance_mix": 0}, "importance_mix"),
        ({"name": "fslora", "importance_mix": True}, "importance_mix"),
        ({"name": "hetlora", "prune": "maybe"}, "prune"),
        ({"name": "hetlora", "prune": 1}, "prune"),
        ({"name": "hetlora", "gamma": "x"}, "gamma"),
        ({"name": "hetlora", "gamma": [0.5]}, "gamma"),
        ({"name": "hetlora", "tail_weight": float("nan")}, "tail_weight"),
        ({"name": "fedlodrop", "aggregation": 1}, "aggregation"),
        ({"name": "fedlodrop", "weights": ["uniform"]}, "weights"),
        ({"name": "ffa_lora", "a_init": 0}, "a_init"),
        ({"name": "fedlora_optimizer", "local_phase": "no"}, "local_phase"),
        ({"name": "fedlora_optimizer", "lr_local": 1e999}, "lr_local"),
        ({"name": "feddpa", "mix": "0.5"}, "mix"),
        ({"name": "fedprox", "mu": float("inf")}, "mu"),
        ({"name": "fedadam", "lr": {}}, "lr"),
    ],
    ids=str,
)
def test_fields_are_typed(table: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^\[method\] {table['name']}: {field} is .*; expected ") as caught:
        build(table, RANK)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"alpha": -1},
        {"alpha": 0.0},
        {"alpha": 1e999},
        {"alpha": "x"},
        {"rank": 0},
        {"rank": 2.5},
        {"rank": True},
        {"rslora": "yes"},
    ],
    ids=str,
)
@pytest.mark.parametrize("table", [{"name": "fedit"}, {"name": "fslora", "over": {"name": "fedex_lora"}}], ids=str)
def test_values_of_lora_are_typed(table: dict[str, Any], values: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=rf"^\[method(\.over)?\] \w+: {next(iter(values))} is .*; expected "
    ) as caught:
        build(table, values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *(":", ":b", "a:", "a:b:c", "../x:Y", "a..b:C", "", "fedloom.core:Method", "fedloom.core:Client"),
        *("fedloom.core:nothing", "nowhere:X", "fedloom.flows:Over", "fedloom.methods.base:LoRA", "os:path"),
        *("fedloom.methods.fedopt:Adaptive", 3, None, ["fedit"], True),
    ],
    ids=repr,
)
def test_names_that_are_no_method(name: Any) -> None:
    for table, where in (({"name": name}, "method"), ({"name": "fslora", "over": {"name": name}}, r"method\.over")):
        with pytest.raises(ConfigError, match=rf"^\[{where}\] ") as caught:
            build(table, RANK)
        assert "\n" not in str(caught.value) and "method" in str(caught.value)


def test_own_methods_are_named_by_module_and_class() -> None:
    method: Method = build({"name": f"{Talks.__module__}:Talks"}, RANK)
    assert isinstance(method, Talks) and method.rank == 4
    wrapped = build({"name": f"{Noted.__module__}:Noted", "over": {"name": "fslora"}}, RANK)
    assert isinstance(wrapped, Noted) and wrapped.over.name == "fslora"
