"""Differential privacy of clients: the clipped sum's sensitivity, and noise of the right size in the right places."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedloom.core import Averaged, Client, Mean, Method, Round, State, Trained, Visit, Work
from fedloom.errors import ConfigError
from fedloom.loop import federate, one_round
from fedloom.methods import build
from fedloom.privacy.client_level import ClientLevel
from fedloom.privacy.noise import SLACK
from fedloom.state import only

from ..methods.cases import CASES, EXAMPLES, RANK, Case, ToyTrainer, engine, flat, start

CLIENTS = [Client(k, n, RANK) for k, n in EXAMPLES.items()]
KEY = bytes(32)


def private(over: Method, clip: float = 1.0, z: float = 0.0, key: bytes | None = KEY) -> ClientLevel:
    return ClientLevel(over=over, clip=clip, noise_multiplier=z, key=key)


def fits(case: Case) -> bool:
    try:
        method = private(case.method())
        for client in case.clients():
            method.check(client)
    except ConfigError:
        return False
    return True


FITTING = pytest.mark.parametrize("case", [c for c in CASES if fits(c)], ids=lambda case: case.label)


def test_many_methods_fit() -> None:
    assert sum(fits(case) for case in CASES) >= 15


@FITTING
def test_without_noise_and_clipping_it_is_the_mean_of_equal_clients(case: Case) -> None:
    method = case.method()
    first = start(method)
    clients = case.clients()
    want = federate(method, engine(), first, [replace(c, examples=10) for c in clients], 2)
    got = federate(private(method, clip=1e9), engine(), first, clients, 2)
    assert flat(got) == flat(want)


@FITTING
def test_one_client_moves_the_sum_by_the_clip_at_most(case: Case) -> None:
    """Zeroed out or away from where it went: the released mean of n moves by at most clip / n."""
    clip = 0.05
    method = private(case.method(), clip)
    first = start(method, dtype=torch.float64)
    clients = case.clients()

    def released(still: str | None) -> tuple[State, int]:
        """What the server is told when one client trains nothing."""

        class Still(ToyTrainer):
            def fit(self, works: Any, data: Any, t: int, part: int = 0) -> list[Trained]:
                made = super().fit(works, data, t, part)
                return [
                    replace(done, state=work.train) if client.id == still else done
                    for (client, work), done in zip(works, made, strict=True)
                ]

        told: list[Averaged] = []
        noised = ClientLevel._noised

        def seen(self: ClientLevel, answer: Averaged, x: Mean, round: Round) -> Averaged:
            told.append(answer)
            return noised(self, answer, x, round)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ClientLevel, "_noised", seen)
            one_round(method, engine(Still(lr=1.0), fresh={"head": first["head"]}), first, clients, 1)
        return told[0].state, len(told[0].clients)

    everybody, n = released(None)
    moved = []
    for client in clients:
        other, _ = released(client.id)
        square = sum(
            float((x - other[role][site]).square().sum())
            for role, group in everybody.items()
            for site, x in group.items()
        )
        moved.append(square**0.5 * n)
    assert max(moved) <= clip * SLACK
    assert max(moved) > 0.9 * clip  # somebody was clipped: the bound is met


def test_noise_has_the_size_that_was_asked_for_and_lies_where_clients_train() -> None:
    method = build({"name": "ffa_lora"}, {"rank": RANK})
    first = start(method)
    clients = [replace(c, rank=2) for c in CLIENTS]
    quiet, _ = one_round(private(method, 0.5), engine(), first, clients, 1)
    diffs = []
    for i in range(60):
        state, record = one_round(private(method, 0.5, 3.0, bytes([i]) * 32), engine(), first, clients, 1)
        assert record.report["noise_std"] == pytest.approx(3.0 * 0.5 * SLACK / 4)
        for site, B in state["B"].items():
            gap = B - quiet["B"][site]
            assert bool((gap[:, 2:] == 0).all())  # nobody has these columns
            diffs.append(gap[:, :2].flatten())
        diffs += [(x - quiet["head"][site]).flatten() for site, x in state["head"].items()]
        assert {s: x.tolist() for s, x in state["A"].items()} == {s: x.tolist() for s, x in first["A"].items()}
    together = torch.cat(diffs)
    assert float(together.std()) == pytest.approx(3.0 * 0.5 * SLACK / 4, rel=0.05) and len(together) > 2000


def test_a_repeated_round_repeats_its_noise_and_a_changed_one_does_not() -> None:
    method = build({"name": "fedit"}, {"rank": RANK})
    first = start(method)
    at = private(method, 1.0, 1.0)
    a, _ = one_round(at, engine(), first, CLIENTS, 1)
    b, _ = one_round(at, engine(), first, CLIENTS, 1)
    assert flat(a) == flat(b)
    quiet, _ = one_round(private(method), engine(), first, CLIENTS, 1)
    some, _ = one_round(private(method), engine(), first, CLIENTS[:3], 1)
    c, _ = one_round(at, engine(), first, CLIENTS[:3], 1)
    site = next(iter(a["A"]))
    one, other = a["A"][site] - quiet["A"][site], (c["A"][site] - some["A"][site]) * 3 / 4
    assert not torch.allclose(one, other, rtol=0, atol=1e-3)
    d, _ = one_round(private(method, 1.0, 1.0, None), engine(), first, CLIENTS, 1)
    assert flat(d) != flat(a)


def test_the_key_is_not_told() -> None:
    secret = private(build({"name": "fedit"}, {"rank": RANK}), key=b"k" * 32)
    assert "kkk" not in repr(secret)


@pytest.mark.parametrize(
    "name, why",
    [
        ("flexlora", "reads each upload itself"),
        ("fed_plora", "sends another A than it receives for a client like 'a'"),
        ("scaffold", "needs clients that send what they trained"),
        ("fedask", "needs clients that send what they trained"),
    ],
)
def test_methods_that_do_not_fit(name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        private(build({"name": name}, {"rank": RANK})).check(Client("a", 1, 1))


def test_what_stays_with_the_client_is_whole() -> None:
    method = private(build({"name": "fedsa_lora"}, {"rank": 1}), clip=0.1)
    A, B = ({site: torch.ones(shape) for site, shape in sizes.items()} for sizes in ({"s": (1, 2)}, {"s": (3, 1)}))
    flow = method.client({"A": A}, {"B": B}, Visit(1, Client("a", 1, 1), {"s": (3, 2)}))
    work = flow.send(None)
    assert isinstance(work, Work)
    with pytest.raises(StopIteration) as stop:
        flow.send(Trained({"A": {"s": A["s"] + 3}, "B": {"s": B["s"] + 3}}, 1, 1.0, 0.0))
    sent, kept = stop.value.value
    assert float((sent["A"]["s"] - A["s"]).norm()) == pytest.approx(0.1) and kept["B"]["s"].tolist() == [[4.0]] * 3
    assert only(sent, "A") == sent
