"""What holds for every method and composition, on the toy problem."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from fedloom import checkpoint, spec
from fedloom.checkpoint import ClientStates
from fedloom.core import Averaged, Client, Each, Exchange, Method, Round, State, Trained, Visit, Work
from fedloom.errors import MethodError
from fedloom.flows import Over, relay
from fedloom.loop import Record, federate, one_round
from fedloom.methods import build, names
from fedloom.methods.fedit import FedIT
from fedloom.simulation import Simulation
from fedloom.state import only, zeros_like

from .cases import (
    CASES,
    EXAMPLES,
    HEAD_BYTES,
    RANK,
    SITES,
    Case,
    Rows,
    Shuffled,
    ToyTrainer,
    after,
    cast,
    engine,
    first_work,
    flat,
    received,
    rows,
    start,
    update,
    visited,
)
from .elsewhere import Elsewhere
from .secure import BITS, SecureSum

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
one_exchange = pytest.mark.parametrize("case", [c for c in CASES if c.exchanges == 1], ids=lambda case: case.label)
sums = pytest.mark.parametrize("case", [c for c in CASES if not (c.each or c.integers)], ids=lambda case: case.label)


def test_every_method_has_a_case() -> None:
    def used(table: Any) -> Iterator[str]:
        yield table["name"]
        if "over" in table:
            yield from used(table["over"])

    assert {next(used(case.table)) for case in CASES} == set(names())
    assert len({case.label for case in CASES}) == len(CASES)


def run(case: Case, rounds: int, at: Simulation[Rows] | None = None, first: State | None = None) -> State:
    method = case.method()
    return federate(method, at or engine(), first or start(method), case.clients(), rounds)


# a method watched from outside


@dataclass(frozen=True, kw_only=True)
class Probe(Over):
    """Shows every lifted upload to a function and changes nothing."""

    look: Callable[[Exchange[Any], Client, State, Round], None]
    name: ClassVar[str] = "probe"
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None: ...

    async def server(self, state: State, round: Round) -> State:
        async def seen(x: Any) -> Any:
            if isinstance(x, Work):
                return await x

            def lift(client: Client, upload: State) -> State:
                self.look(x, client, upload, round)
                return x.lift(client, upload)  # type: ignore[no-any-return]

            return await replace(x, lift=lift)

        return await relay(self.over.server(state, round), seen)


class Seal:
    """States that nobody may change from now on."""

    def __init__(self) -> None:
        self._sealed: list[tuple[State, dict[str, bytes]]] = []

    def add(self, *states: State) -> None:
        self._sealed += [(state, flat(state)) for state in states]
        self.check()

    def check(self) -> None:
        for state, before in self._sealed:
            assert flat(state) == before

    def work(self, work: Work) -> None:
        self.add(work.train, work.fixed, work.base)


@dataclass(frozen=True, kw_only=True)
class Sealed(Over):
    """Checks that the method under it changes nothing that it is given or that it gave away."""

    name: ClassVar[str] = "sealed"
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None: ...

    async def server(self, state: State, round: Round) -> State:
        seal = Seal()
        seal.add(state)

        async def sealed(x: Any) -> Any:
            if isinstance(x, Work):
                seal.work(x)
                return trained(seal, await x)

            def send(client: Client) -> State:
                sent: State = x.send(client)
                seal.add(sent)
                assert flat(x.send(client)) == flat(sent), "pure: it may be asked again"
                return sent

            def lift(client: Client, upload: State) -> State:
                seal.add(upload)
                lifted: State = x.lift(client, upload)
                seal.check()
                return lifted

            answer = await replace(x, send=send, lift=lift)
            if isinstance(answer, Averaged):
                seal.add(answer.state)
                return answer
            uploads = list(answer)
            seal.add(*(upload.state for upload in uploads))
            return iter(uploads)

        new = await relay(self.over.server(state, round), sealed)
        seal.check()
        return new

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        return await self._sealed(self.over.client(received, own, visit), received, own)

    async def personal(self, received: State, own: State, visit: Visit) -> State:
        return await self._sealed(self.over.personal(received, own, visit), received, own)

    async def _sealed(self, flow: Any, *given: State) -> Any:
        seal = Seal()
        seal.add(*given)

        async def sealed(x: Any) -> Any:
            if not isinstance(x, Work):
                seal.add(x.state)
                answer = await x
                seal.add(answer)
                return answer
            seal.work(x)
            x.adapter(x.train, x.fixed)
            for penalty in x.penalties:
                penalty(x.train, x.fixed)
            return trained(seal, await x)

        result = await relay(flow, sealed)
        seal.check()
        return result


def trained(seal: Seal, done: Trained) -> Trained:
    seal.add(done.state)
    return done


@every
def test_inputs_are_never_changed(case: Case) -> None:
    method = Sealed(over=case.method())
    at = engine()
    state = start(method)
    state = federate(method, at, state, case.clients(), 3)
    before = flat(state)
    jobs = [(client, method.serve(state, client)) for client in case.clients()]
    if method.personal_phase:
        list(at.personal(method, jobs, 4))
    for client, served in jobs:
        own = at.own(client.id)
        kept = [flat(served), flat(own)]
        method.model(served, own, at.visit(client, 4))
        assert [flat(served), flat(own)] == kept
    assert flat(state) == before
    assert flat(state) == flat(run(case, 3)), "and watching it changes nothing either"


@every
def test_order_of_clients_and_arrivals_changes_no_byte(case: Case) -> None:
    method = case.method()
    clients = [case.clients()[i] for i in (2, 0, 3, 1)]
    got = federate(method, engine(kind=Shuffled, cohort=2), start(method), clients, 3)
    assert flat(got) == flat(run(case, 3))


@every
def test_a_cohort_of_one_is_a_cohort_of_all_bit_for_bit(case: Case) -> None:
    assert flat(run(case, 3, engine(cohort=1))) == flat(run(case, 3, engine(cohort=9)))


@every
def test_resumed_from_a_checkpoint_is_uninterrupted(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # slow, and no part of what is asked here
    method = case.method()

    def play(folder: Path, kept: ClientStates, state: State, first: int, last: int) -> None:
        def save(state: State, record: Record) -> None:
            checkpoint.save(folder, record.t, state, kept)

        at = engine(client_states=kept)
        federate(
            method,
            at,
            state,
            case.clients(),
            last,
            start=first,
            sample=lambda clients, t: clients[t % 2 :],
            on_round=save,
        )

    whole, parted = tmp_path / "whole", tmp_path / "parted"
    play(whole, ClientStates(whole / "kept"), start(method), 1, 5)
    play(parted, ClientStates(parted / "kept"), start(method), 1, 2)
    t, state, kept, done = checkpoint.load(parted)
    assert (t, done) == (2, False)
    play(parted, kept, state, 3, 5)
    files = {path.name: path.read_bytes() for path in whole.rglob("*.safetensors")}
    assert files == {path.name: path.read_bytes() for path in parted.rglob("*.safetensors")}
    assert checkpoint.load(parted)[0] == 5 and "state-000005.safetensors" in files


def full(case: Case) -> tuple[Method, Client]:
    """The method and one client that can hold all of it."""
    return case.method(), Client("b", EXAMPLES["b"], case.rank)


def own_model(at: Simulation[Rows], method: Method, state: State, client: Client, t: int) -> Work:
    return at.model(method, (client, method.serve(state, client)), t)


@one_exchange
def test_one_client_is_its_own_training(case: Case) -> None:
    method, client = full(case)
    trainer, sent = ToyTrainer(record=True), dict[int, State]()
    at = engine(trainer)
    state = start(method)
    probe = Probe(over=method, look=lambda x, client, upload, round: sent.update({round.t: upload}))
    for t in (1, 2, 3) if case.replaces else (1,):
        before, (state, _) = state, one_round(probe, at, state, [client], t)
        _, work, done = trainer.seen[-1]
        # Of sizes that the client chose, what it pruned away is gone.
        want = update(work, sent[t] if case.client_chooses else done)
        model = own_model(at, method, state, client, t)
        got, was = update(model), update(method.model(method.serve(before, client), {}, at.visit(client, t)))
        for site in SITES:
            if case.replaces:
                torch.testing.assert_close(got[site], want[site], rtol=1e-5, atol=1e-6)
            else:
                assert ((got[site] - was[site]) * (want[site] - was[site])).sum() > 0, "it moves towards it"
        if "head" in done and case.replaces:
            head = model.train.get("head") or model.fixed["head"]
            assert flat({"head": head}) == flat({"head": done["head"]})


@pytest.mark.parametrize("case", [c for c in CASES if c.exchanges == 1 and not c.adds], ids=lambda case: case.label)
def test_identical_clients_are_one_of_them(case: Case) -> None:
    method, client = full(case)
    trainer = ToyTrainer(record=True)
    state, _ = one_round(method, engine(), start(method), [client], 1)
    down = received(method, state, client, 3)
    sent, kept = visited(method, down, client, lambda work: trainer.fit([(client, work)], [rows("b")], 3)[0].state, 3)
    together = after(method, state, [(replace(client, id=k), sent) for k in "abc"], 3)
    alone = after(method, state, [(client, sent)], 3)
    visit = Visit(3, client, SITES)
    got, one = (update(method.model(method.serve(x, client), kept, visit)) for x in (together, alone))
    _, work, done = trainer.seen[-1]
    want = update(work, sent if case.client_chooses else done)
    for site in SITES:
        torch.testing.assert_close(got[site], one[site], rtol=1e-5, atol=2e-6)
        if case.replaces:
            torch.testing.assert_close(got[site], want[site], rtol=1e-5, atol=2e-6)


@every
def test_bytes_are_those_of_the_formula(case: Case) -> None:
    method, trainer = case.method(), ToyTrainer(record=True)
    at, state = engine(trainer), start(method)
    for t in (1, 2, 3):
        trainer.seen.clear()
        before, (state, record) = state, one_round(method, at, state, case.clients(), t)
        assert not record.dropped
        if record.stage == "server":
            assert record.per_client == {} and not record.up.by_role
            continue
        want = {}
        for client in case.clients():
            sent = received(method, before, client, t)
            down, up = case.payload(client, t, sent)
            if case.client_chooses:  # the server remembers what it chose
                _, up = case.payload(client, t, received(method, state, client, t + 1))
            heads_up = case.head and any("head" in work.train for who, work, _ in trainer.seen if who == client)
            want[client.id] = [down + case.head * HEAD_BYTES, up + heads_up * HEAD_BYTES]
            if case.at_most:
                assert 0 < record.per_client[client.id][1] <= want[client.id][1]
                want[client.id][1] = record.per_client[client.id][1]
        assert record.per_client == want
        assert sum(record.up.as_dict().values()) == sum(up for _, up in want.values())
        assert sum(record.down.as_dict().values()) == sum(down for down, _ in want.values())


@every
def test_the_specification_takes_every_upload_and_rejects_it_spoilt(case: Case) -> None:
    seen = 0

    def spoil(x: Exchange[Any], client: Client, sent: State, round: Round) -> None:
        nonlocal seen
        seen += 1
        want = x.expects(client, x.send(client))

        def bad(spoilt: State, max_norm: float | None = None) -> bool:
            return spec.reject_reason(want, spoilt, max_norm) is not None

        assert not bad(sent) and not bad(sent, 1e3)
        assert bad(sent, 1e-3), "norm"
        assert bad(sent | {"extra": {}}), "a role too much"
        for role, group in sent.items():
            assert bad({r: g for r, g in sent.items() if r != role}), f"without {role}"
            assert bad(sent | {role: group | {"extra": torch.ones(1)}})
            for site, v in group.items():
                assert bad(sent | {role: {s: y for s, y in group.items() if s != site}}), (role, site)
                if v.numel() and v.is_floating_point():
                    assert bad(sent | {role: group | {site: torch.full_like(v, float("nan"))}}), (role, site)
                assert bad(sent | {role: group | {site: v.double()}}), "dtype"
                assert bad(sent | {role: group | {site: v[None]}}), "dimensions"
                assert bad(sent | {role: group | {site: torch.cat([v, v[:1], v[:1]]) if len(v) else v[None]}}), "size"

    method = case.method()
    federate(Probe(over=method, look=spoil), engine(), start(method), case.clients(), 2)
    assert seen >= len(EXAMPLES)


@every
def test_first_round_moves_the_model(case: Case) -> None:
    method, trainer = case.method(), ToyTrainer(optimizer="sgd", steps=1, record=True)
    at, state = engine(trainer), start(method)
    new, _ = one_round(method, at, state, case.clients(), 1)
    assert len({client.id for client, _, _ in trainer.seen}) == len(EXAMPLES)
    for _, work, done in trainer.seen:
        # B, or what scales it: at a start that changes nothing the other factor has no gradient.
        moved = [
            all((done[r][s] != x).any() for s, x in group.items() if x.numel())
            for r, group in work.train.items()
            if r != "head"
        ]
        assert any(moved)
    for client in case.clients():
        assert all(x.abs().max() > 0 for x in update(own_model(at, method, new, client, 1)).values())


@every
def test_a_start_changes_nothing(case: Case) -> None:
    method = case.method()
    state, at = start(method), engine()
    for client in case.clients():
        for work in (
            first_work(method, received(method, state, client), client),
            own_model(at, method, state, client, 0),
        ):
            made = update(work)
            assert made.keys() == SITES.keys() and all(x.abs().max() <= case.start_error for x in made.values())


@every
def test_a_model_to_evaluate_exists_for_every_client(case: Case) -> None:
    method, trainer = case.method(), ToyTrainer()
    at = engine(trainer)
    state, _ = one_round(method, at, start(method), case.clients(), 1)
    jobs = [(client, method.serve(state, client)) for client in case.clients()]
    if method.personal_phase:
        assert all(answer.client in case.clients() for answer in at.personal(method, jobs, 2))
    for client, sent in jobs:
        for own in (at.own(client.id), at.fresh):  # as it is, and of a client that never took part
            model = method.model(sent, own, at.visit(client, 2))
            made = update(model)
            assert {site: tuple(x.shape) for site, x in made.items()} == SITES
            assert trainer.loss(model, model.train, rows(client.id)).isfinite()


@every
def test_training_lowers_the_loss(case: Case) -> None:
    method = case.method()
    trainer = ToyTrainer(lr=0.01, steps=10)
    at = engine(trainer)

    def loss(state: State) -> float:
        total = 0.0
        for k, n in EXAMPLES.items():
            work = own_model(at, method, state, Client(k, n, method.rank), 0)
            total += float(trainer.loss(work, work.train, rows(k)))
        return total

    state = start(method)
    before = loss(state)
    last = federate(method, at, state, case.clients(), 6)
    # Zeros standing in for what was dropped shrink the adapter every round; the head learns all the same.
    assert case.learns and loss(last) < 0.8 * before


# sums


@sums
def test_lift_is_affine_and_spread_is_its_linear_part(case: Case) -> None:
    """lift(x) - lift(0) = spread(x), in float64."""
    method, seen = case.method(), set[str]()

    def law(x: Exchange[Any], client: Client, upload: State, round: Round) -> None:
        seen.add(client.id)
        there, zero = x.lift(client, upload), x.lift(client, zeros_like(upload))
        wide = method.spread(upload, x.send(client), Visit(round.t, client, SITES))
        assert wide.keys() <= there.keys() == zero.keys()
        for role, group in there.items():
            for site, v in group.items():
                got = v - zero[role][site]
                want = wide[role][site] if role in wide else torch.zeros_like(v)
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

    probe = Probe(over=method, look=law)
    first = start(method, dtype=torch.float64)
    at = engine(fresh={"head": first["head"]})
    federate(probe, at, first, case.clients(), 2)
    assert seen == set(EXAMPLES)


@sums
def test_a_secure_sum_is_the_plain_mean(case: Case) -> None:
    method = case.method()
    first = start(method, dtype=torch.float64)
    means: list[State] = []
    for kind in (Simulation, SecureSum):
        at = engine(ToyTrainer(optimizer="sgd"), kind=kind, fresh={"head": first["head"]})
        means.append(federate(method, at, first, case.clients(), 2))
        if isinstance(at, SecureSum):
            assert {client.id for client, _ in at.arrived} == set(EXAMPLES)
            for client, hidden in at.arrived:
                whole = [x for group in hidden.values() for x in group.values() if x.numel() >= 12]
                # Half of the masked numbers are above 2^61 in size; bare ones are below 2^50.
                assert whole and all(x.abs().double().median() > 2**59 for x in whole), client.id
    # Half a unit in the last place a client; a server optimiser divides by the size of a change, a
    # factorisation by gaps between singular values.
    tolerance = len(EXAMPLES) * 2.0**-BITS * (1 if case.replaces else 1e3)
    plain, secret = means
    assert plain.keys() == secret.keys()
    for role, group in plain.items():
        for site, x in group.items():
            torch.testing.assert_close(secret[role][site], x, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", [c for c in CASES if c.each], ids=lambda case: case.label)
def test_methods_that_read_every_upload_refuse_a_secure_sum(case: Case) -> None:
    method = case.method()
    with pytest.raises(MethodError, match="awaits Each: it reads every upload, and this engine gives sums alone"):
        one_round(method, engine(kind=SecureSum), start(method), case.clients(), 1)


@pytest.mark.parametrize("case", [c for c in CASES if c.integers], ids=lambda case: case.label)
def test_methods_whose_uploads_hold_integers_refuse_a_secure_sum(case: Case) -> None:
    method = case.method()
    with pytest.raises(MethodError, match="holds integers: a secure sum needs shapes that the server knows"):
        one_round(method, engine(kind=SecureSum), start(method), case.clients(), 1)


@every
def test_cases_say_what_their_methods_await(case: Case) -> None:
    method, kinds = case.method(), set[type]()
    probe = Probe(over=method, look=lambda x, client, upload, round: kinds.add(type(x)))
    federate(probe, engine(), start(method), case.clients(), 2)
    assert (Each in kinds) == case.each


# works


@every
@pytest.mark.parametrize("where", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_functions_of_a_work_close_over_no_tensor(case: Case, where: torch.dtype | str) -> None:
    """What they use is moved with `fixed`: to another dtype, another device."""
    method, trainer = case.method(), ToyTrainer(record=True, steps=1)
    at = engine(trainer)
    state, _ = one_round(method, at, start(method), case.clients(), 1)
    one_round(method, at, state, case.clients(), 2)
    works = [work for _, work, _ in trainer.seen]
    works += [own_model(at, method, state, client, 2) for client in case.clients()]
    if method.personal_phase:
        list(at.personal(method, [(client, method.serve(state, client)) for client in case.clients()], 3))
        works += [work for _, work, _ in trainer.seen[-len(EXAMPLES) :]]

    def moved(state: State) -> State:
        if isinstance(where, torch.dtype):
            return cast(state, where)
        return {role: {site: x.to(where) for site, x in group.items()} for role, group in state.items()}

    for work in works:
        train, fixed = moved(work.train), moved(work.fixed)
        made = work.adapter(train, fixed)
        results = [*made.A.values(), *made.B.values(), *(made.gate or {}).values()]
        results += [penalty(train, fixed) for penalty in work.penalties]
        for x in results:
            assert x.dtype == where if isinstance(where, torch.dtype) else x.device.type == where
        assert all(penalty(train, fixed).dim() == 0 for penalty in work.penalties)


# another process


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    at = Elsewhere()
    yield at
    at.stop()


ABROAD = ["feddpa", "scaffold", "flora", "lora_a2", "fedrora", "fedlodrop over fslora", "fedlora_optimizer", "fedask"]


@pytest.mark.parametrize("case", [c for c in CASES if c.label in ABROAD], ids=lambda case: case.label)
def test_another_process_is_this_one(case: Case, elsewhere: Elsewhere) -> None:
    """The method is built there from its table; coroutines never cross."""
    elsewhere.begin(case)
    method = case.method()
    got = federate(method, elsewhere, start(method), case.clients(), 3)  # type: ignore[arg-type]
    assert flat(got) == flat(run(case, 3))


# identities


@pytest.mark.parametrize(
    "table, same",
    [
        ({"name": "ffa_lora"}, False),
        ({"name": "fslora"}, True),
        ({"name": "fedlodrop", "law": "bernoulli"}, True),
        ({"name": "fedlodrop", "over": {"name": "fslora"}}, True),
        ({"name": "flexlora"}, False),
        ({"name": "hetlora"}, False),
        ({"name": "fedex_lora"}, False),
        ({"name": "fedlora_optimizer", "average": "factors", "global_phase": "none"}, True),
        ({"name": "feddpa"}, True),
        ({"name": "fedprox", "mu": 0.0}, True),
        ({"name": "fedprox", "mu": 0.5}, False),
        ({"name": "fedavgm", "momentum": 0.5}, False),
    ],
    ids=str,
)
def test_equal_budgets_are_fedit(table: dict[str, Any], same: bool) -> None:
    """Where methods that follow budgets get equal ones, they are plain averaging bit for bit, or differ as they should."""
    clients = [Client(k, 10, RANK) for k in "abcd"]
    plain, method = Case("", {"name": "fedit"}).method(), Case("", table).method()
    first = start(plain)
    want = federate(plain, engine(), first, clients, 3)
    got = federate(method, engine(), start(method) | only(first, "A", "B", "head"), clients, 3)
    assert (flat(only(got, "A", "B", "head")) == flat(want)) == same


@pytest.mark.parametrize("fields", [{"weights": "examples"}, {"weights": "auto", "sketch": "importance"}], ids=str)
def test_fslora_at_full_rank_is_fedit_for_clients_of_any_size(fields: dict[str, str]) -> None:
    plain, wrapped = Case("", {"name": "fedit"}), Case("", {"name": "fslora", **fields})
    first = start(plain.method())
    got = run(wrapped, 3, first=start(wrapped.method()) | first)
    assert flat(only(got, "A", "B", "head")) == flat(run(plain, 3, first=first))


@dataclass(frozen=True, kw_only=True)
class Mine(FedIT):
    """A third party's method."""


def test_a_method_of_ones_own_is_named_by_its_module() -> None:
    assert isinstance(build({"name": f"{Probe.__module__}:Mine"}, {"rank": 2}), Mine)
