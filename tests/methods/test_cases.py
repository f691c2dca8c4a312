"""What holds for every method and composition, on the toy problem."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedloom import checkpoint, lora
from fedloom.checkpoint import Kept
from fedloom.core import Client, Method, State, Upload
from fedloom.guard import Expected
from fedloom.loop import Record, federate, one_round
from fedloom.methods import names

from .cases import CASES, EXAMPLES, RANK, SERVER, SITES, Case, Shuffled, ToyTrainer, engine, flat, rows, start, update

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)

HEAD_BYTES = 4 * (3 * 5 + 3)


def test_every_method_has_a_case() -> None:
    assert {case.name for case in CASES} == set(names())
    assert len({case.label for case in CASES}) == len(CASES)


def after(case: Case, rounds: int, trainer: ToyTrainer | None = None) -> State:
    method = case.method()
    return federate(method, engine(trainer), start(method), case.clients(), rounds, server=SERVER)


@every
def test_inputs_are_never_changed(case: Case) -> None:
    method, trainer = case.method(), ToyTrainer()
    state: State = start(method)
    kept: dict[str, State] = {}

    def unchanged(before: list[dict[str, bytes]], *now: State) -> None:
        assert [flat(x) for x in now] == before

    for t in (1, 2, 3):
        clients = case.clients() if method.stage(t) == "clients" else [SERVER]
        uploads, whole = [], [flat(state)]
        for client in clients:
            received = method.broadcast(state, client, t)
            unchanged(whole, state)
            own = kept.get(client.id, {"head": state["head"]})
            before = [flat(received), flat(own)]
            work = method.prepare(received, own, SITES, client, t)
            unchanged(before, received, own)
            method.expected(received, t)
            unchanged(before, received, own)
            parts = [flat(work.train), flat(work.fixed), flat(work.base)]
            method.adapter(work.train, work.fixed)
            method.penalty(work.train, work.fixed)
            ((trained, metrics),) = trainer.fit(method, [(client, work)], [rows(client.id)], t)
            unchanged(parts, work.train, work.fixed, work.base)
            unchanged(before, received, own)
            done = flat(trained)
            sent, keeps = method.finish(work, trained, received)
            unchanged([*parts, done, *before], work.train, work.fixed, work.base, trained, received, own)
            kept[client.id] = own | keeps
            uploads.append(Upload(client, sent, t, metrics))
            assert flat(state) == whole[0]
            local = method.personalise(received, own, SITES, client)
            if local is not None:
                unchanged(before, received, own)
        copies = [flat(upload.state) for upload in uploads]
        new = method.aggregate(state, iter(uploads))
        unchanged(whole, state)
        unchanged(copies, *(upload.state for upload in uploads))
        state = new


@every
def test_order_of_clients_and_arrivals_changes_no_byte(case: Case) -> None:
    method = case.method()
    want = after(case, 3)
    clients = [case.clients()[i] for i in (2, 0, 3, 1)]
    got = federate(method, Shuffled(engine(cohort=2)), start(method), clients, 3, server=SERVER)
    assert flat(got) == flat(want)


@every
def test_resumed_from_a_checkpoint_is_uninterrupted(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # slow, and no part of what is asked here
    method = case.method()

    def play(folder: Path, kept: Kept, state: State, first: int, last: int) -> None:
        def save(state: State, record: Record) -> None:
            checkpoint.save(folder, record.t, state, kept)

        federate(
            method,
            engine(kept=kept),
            state,
            case.clients(),
            last,
            start=first,
            server=SERVER,
            sample=lambda clients, t: clients[t % 2 :],
            on_round=save,
        )

    whole, parted = tmp_path / "whole", tmp_path / "parted"
    play(whole, Kept(whole / "kept"), start(method), 1, 5)
    play(parted, Kept(parted / "kept"), start(method), 1, 2)
    t, state, kept, done = checkpoint.load(parted)
    assert (t, done) == (2, False)
    play(parted, kept, state, 3, 5)
    files = {path.name: path.read_bytes() for path in whole.rglob("*.safetensors")}
    assert files == {path.name: path.read_bytes() for path in parted.rglob("*.safetensors")}
    assert checkpoint.load(parted)[0] == 5 and "state-000005.safetensors" in files


def full(case: Case) -> tuple[Method, Client]:
    """The method and one client that can hold all of it."""
    # A mean of components is a mean of factors at the precision of a square root.
    return case.method(), Client("b", EXAMPLES["b"], int(case.fields.get("rank", RANK)))


@every
def test_one_client_is_its_own_training(case: Case) -> None:
    method, client = full(case)
    trainer = ToyTrainer(record=True)
    kept = Kept()
    at = engine(trainer, kept=kept)
    state = start(method)
    for t in (1, 2, 3):
        who = client if method.stage(t) == "clients" else replace(SERVER, rank=client.rank)
        state, _ = one_round(method, at, state, [who], t)
        _, work, trained = trainer.seen[-1]
        want = update(method, work, trained)
        if case.name == "hetlora":  # what it pruned away is gone
            sent, _ = method.finish(work, trained, method.broadcast(state, client, t))
            want = update(method, work, sent)
        model = method.prepare(method.broadcast(state, client, 0), at.own(client.id), SITES, client, 0)
        got = update(method, model)
        for site in SITES:
            torch.testing.assert_close(got[site], want[site], rtol=1e-5, atol=1e-6)
        if "head" in trained:
            head = model.train.get("head") or model.fixed["head"]
            assert flat({"head": head}) == flat({"head": trained["head"]})


@every
def test_identical_clients_return_what_each_of_them_trained(case: Case) -> None:
    method, client = full(case)
    state, trainer = start(method), ToyTrainer()
    state, _ = one_round(method, engine(), state, [client], 1)
    received = method.broadcast(state, client, 3)
    work = method.prepare(received, {}, SITES, client, 3)
    ((trained, _),) = trainer.fit(method, [(client, work)], [rows("b")], 3)
    sent, kept = method.finish(work, trained, received)
    new = method.aggregate(state, iter(Upload(replace(client, id=k), sent, 3) for k in "abc"))
    model = method.prepare(method.broadcast(new, client, 0), kept, SITES, client, 0)
    want = update(method, work, trained)
    if case.name == "hetlora":
        want = update(method, work, sent)
    for site, x in update(method, model).items():
        torch.testing.assert_close(x, want[site], rtol=1e-5, atol=2e-6)


def lora_bytes(method: Method, client: Client, t: int, state: State, received: State) -> tuple[int, int]:
    """(down, up) of the adapters by the formulas, 4 bytes a number, 8 a seed; heads apart."""
    both = sum(m + n for m, n in SITES.values())
    outs, ins = sum(m for m, _ in SITES.values()), sum(n for _, n in SITES.values())
    r, full_rank = client.rank, method.rank
    if method.name == "ffa_lora":
        return 4 * r * outs + 8, 4 * r * outs
    if method.name == "fedsa_lora":
        return 4 * r * ins, 4 * r * ins
    if method.name == "fedlora_optimizer":
        turns = t % 2 == 0 and getattr(method, "global_phase") != "none"  # noqa: B009
        return 4 * r * both, 4 * r * (ins if turns else both)
    if method.name == "hetlora" and client.id in state.get("ranks", {}):
        r = int(state["ranks"][client.id])
    over = getattr(method, "over", "fedit")
    down = up = 4 * r * both
    if method.name == "fedlodrop" and getattr(method, "mode") == "sub_adapter":  # noqa: B009
        cols = sum(x.shape[1] for x in received["A"].values())
        rows_kept = sum(x.shape[0] for x in received["B"].values())
        down = up = 4 * r * (cols + rows_kept) + 8
    if method.name == "fslora":
        sketch = getattr(method, "sketch")  # noqa: B009
        if sketch == "importance" and r < full_rank:
            down, up = down + len(SITES) * r * 8, up + len(SITES) * r * 4
        else:
            seed = 16 if sketch == "balanced" else 8
            down, up = down + seed, up + seed
    elif over == "fslora":
        down, up = down + 8, up + 8
    if over == "fedex_lora" or method.name == "fedex_lora":
        q = (t - 1) * (len(EXAMPLES) - 1) * full_rank
        down += sum(4 * min(q * (m + n), m * n) for m, n in SITES.values())
    return down, up


@every
def test_bytes_are_those_of_the_formula(case: Case) -> None:
    method = case.method()
    at, state = engine(), start(method)
    head = 0 if method.name == "fedsa_lora" else HEAD_BYTES
    for t in (1, 2, 3):
        clients = case.clients() if method.stage(t) == "clients" else [SERVER]
        want = {}
        for client in clients:
            received = method.broadcast(state, client, t)
            down, up = lora_bytes(method, client, t, state, received)
            work = method.prepare(received, {}, SITES, client, t)
            want[client.id] = [down + head, up + (head if "head" in work.train else 0)]
        before = state
        state, record = one_round(method, at, state, clients, t)
        if method.name == "hetlora" and method.prune:  # type: ignore[attr-defined]
            for client in clients:
                down, up = lora_bytes(method, client, t, state, method.broadcast(before, client, t))
                want[client.id][1] = up + head
        assert record.per_client == want
        assert sum(record.up.as_dict().values()) == sum(up for _, up in want.values())
        assert sum(record.down.as_dict().values()) == sum(down for down, _ in want.values())
        assert not record.dropped


@every
def test_guard_takes_every_upload_and_refuses_it_spoilt(case: Case) -> None:
    method, trainer = case.method(), ToyTrainer()
    state = start(method)
    for t in (1, 2):
        uploads = []
        for client in case.clients():
            received = method.broadcast(state, client, t)
            work = method.prepare(received, {}, SITES, client, t)
            ((trained, _),) = trainer.fit(method, [(client, work)], [rows(client.id)], t)
            sent, _ = method.finish(work, trained, received)
            expected = Expected.like(method.expected(received, t), method.shrinks)
            assert expected.fault(sent, max_norm=1e3) is None
            assert expected.fault(sent, max_norm=1e-3) is not None
            for role, group in sent.items():
                for site, x in group.items():
                    bad = torch.full_like(x, float("nan")) if x.is_floating_point() else x + 1
                    if x.numel():
                        assert expected.fault(sent | {role: group | {site: bad}}), (role, site)
                    assert expected.fault(sent | {role: {k: v for k, v in group.items() if k != site}}), (role, site)
            uploads.append(Upload(client, sent, t))
        state = method.aggregate(state, uploads)


@every
def test_first_round_moves_B(case: Case) -> None:
    method, trainer = case.method(), ToyTrainer(optimizer="sgd", steps=1, record=True)
    state = start(method)
    assert all((B == 0).all() for B in state["B"].values())
    one_round(method, engine(trainer), state, case.clients(), 1)
    assert len(trainer.seen) == len(EXAMPLES)
    for _, work, trained in trainer.seen:
        assert all((trained["B"][site] != work.train["B"][site]).any() for site in SITES)


@every
def test_a_start_changes_nothing(case: Case) -> None:
    method = case.method()
    state = start(method)
    for client in case.clients():
        work = method.prepare(method.broadcast(state, client, 1), {}, SITES, client, 1)
        assert all((x == 0).all() for x in update(method, work).values())


@every
def test_training_lowers_the_loss(case: Case) -> None:
    method = case.method()
    trainer = ToyTrainer(lr=0.01, steps=10)
    at = engine(trainer)

    def loss(state: State) -> float:
        total = 0.0
        for k, n in EXAMPLES.items():
            client = Client(k, n, method.rank)
            work = method.prepare(method.broadcast(state, client, 0), at.own(k), SITES, client, 0)
            total += float(trainer.loss(method, work, work.train, rows(k)))
        return total

    state = start(method)
    before = loss(state)
    # Zeros standing in for what was dropped shrink the adapter every round; the head learns all the same.
    after = federate(method, at, state, case.clients(), 6, server=SERVER)
    assert loss(after) < 0.8 * before


@pytest.mark.parametrize(
    "name", ["ffa_lora", "fslora", "fedlodrop", "flexlora", "hetlora", "fedex_lora", "fedlora_optimizer"]
)
def test_equal_budgets_are_fedit(name: str) -> None:
    """Where methods that follow budgets get equal ones, they are plain averaging (or differ just by what they fix)."""
    fields = {"fedlora_optimizer": {"average": "factors", "global_phase": "none"}, "fedlodrop": {"law": "bernoulli"}}
    clients = [Client(k, 10, RANK) for k in "abcd"]
    plain, method = Case("fedit", "fedit").method(), Case(name, name, fields.get(name, {})).method()
    same = start(plain)

    def run(method: Method, rounds: int) -> State:
        return federate(method, engine(), start(method) | lora.only(same, "A", "B", "head"), clients, rounds)

    want, got = run(plain, 3), run(method, 3)
    roles = ("A", "B", "head")
    if name in ("fslora", "fedlodrop", "fedlora_optimizer"):
        assert flat(lora.only(got, *roles)) == flat(want)
    else:
        assert flat(lora.only(got, *roles)) != flat(want)


@pytest.mark.parametrize("fields", [{"weights": "examples"}, {"weights": "examples", "sketch": "importance"}], ids=str)
def test_fslora_at_full_rank_is_fedit_for_clients_of_any_size(fields: dict[str, str]) -> None:
    plain, method = Case("fedit", "fedit").method(), Case("fslora", "fslora", dict(fields)).method()
    first = start(plain)
    want = federate(plain, engine(), first, Case("", "fedit").clients(), 3)
    got = federate(method, engine(), start(method) | first, Case("", "fslora").clients(), 3)
    assert flat(lora.only(got, "A", "B", "head")) == flat(want)
