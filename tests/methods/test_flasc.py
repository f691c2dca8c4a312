from __future__ import annotations

import pytest
import torch

from fedloom.core import Client, Work
from fedloom.errors import ConfigError
from fedloom.loop import federate
from fedloom.methods import build
from fedloom.methods.flasc import pack, unpack
from fedloom.rng import generator
from fedloom.state import State, only

from .cases import RANK, SITES, after, engine, flat, received, served, start, state, visited

FIRST = state([[1.0, -5.0]], [[3.0], [0.5], [-2.0]])
CLIENT = Client("a", 1, 1)


def test_a_round_by_hand() -> None:
    """Two of five entries go down: -5 and 3. Two changes come up of each client, and count half, whatever its examples."""
    method = build({"name": "flasc", "down": 0.4, "up": 0.4}, {"rank": 1, "alpha": 1.0})
    down = received(method, FIRST, CLIENT)
    assert down["top"]["values"].tolist() == [-5.0, 3.0]
    assert down["top"]["where"].tolist() == [0b00110], "entries 1 and 2 of A0 A1 B0 B1 B2"

    def trained(A: list[list[float]], B: list[list[float]]) -> State:
        def go(work: Work) -> State:
            assert work.train["A"]["s"].tolist() == [[0.0, -5.0]], "what was not sent is zero, and trained"
            moved = state(A, B)
            return {r: {s: x + moved[r][s] for s, x in group.items()} for r, group in work.train.items()}

        sent, kept = visited(method, down | {"A": FIRST["A"], "B": FIRST["B"]}, CLIENT, go)
        assert kept == {}
        return sent

    one = trained([[4.0, 0.0]], [[1.0], [0.0], [-8.0]])
    two = trained([[2.0, 0.0]], [[0.0], [0.1], [6.0]])
    assert one["change"]["values"].tolist() == [4.0, -8.0] and two["change"]["values"].tolist() == [2.0, 6.0]
    new = after(method, FIRST, [(CLIENT, one), (Client("b", 9, 1), two)])
    assert new["A"]["s"].tolist() == [[1.0 + 3.0, -5.0]]
    assert new["B"]["s"].tolist() == [[3.0], [0.5], [-2.0 - 1.0]]


def test_packed_entries_come_back() -> None:
    sites = {"b": (9, 5), "a": (4, 7)}
    rng = generator("x")
    whole = {
        "A": {s: torch.randn(3, n, generator=rng) for s, (_, n) in sites.items()},
        "B": {s: torch.randn(m, 3, generator=rng) for s, (m, _) in sites.items()},
    }
    n = 3 * (9 + 5 + 4 + 7)
    for share in (0.01, 0.3, 1.0):
        sent = pack(whole, share)
        k = max(1, int(n * share))
        assert sent["values"].shape == (k,) and sent["where"].shape == ((n + 7) // 8,)
        back = unpack(sent, dict(reversed(sites.items())), 3)  # another order of the layers
        gone = torch.cat([(whole[r][s] - back[r][s]).flatten() for r in "AB" for s in sites])
        here = torch.cat([back[r][s].flatten() for r in "AB" for s in sites])
        assert int((here != 0).sum()) == k
        assert share == 1.0 or float(gone.abs().max()) <= float(here[here != 0].abs().min())
        assert all(torch.equal(back[r][s][back[r][s] != 0], whole[r][s][back[r][s] != 0]) for r in "AB" for s in sites)


def test_bits_that_do_not_match_the_values_end_no_round() -> None:
    sent = {"values": torch.ones(2), "where": torch.full((2,), 255, dtype=torch.uint8)}
    back = unpack(sent, {"s": (3, 2)}, 2)
    assert sum(float(x.sum()) for group in back.values() for x in group.values()) == 2.0
    sent["where"].zero_()
    assert not any(x.any() for group in unpack(sent, {"s": (3, 2)}, 2).values() for x in group.values())


def test_dense_both_ways_it_is_fedit_of_clients_that_count_alike() -> None:
    clients = [Client(k, 10, RANK) for k in "abcd"]
    plain = build({"name": "fedit"}, {"rank": RANK})
    first = start(plain)
    dense = build({"name": "flasc", "down": 1.0, "up": 1.0}, {"rank": RANK})
    want, got = (federate(method, engine(), first, clients, 3) for method in (plain, dense))
    for role, group in want.items():
        for site, x in group.items():
            torch.testing.assert_close(got[role][site], x, rtol=1e-4, atol=1e-5)


def test_what_is_masked_is_not_in_the_model_but_stays_with_the_server() -> None:
    method = build({"name": "flasc", "down": 0.5, "up": 0.5}, {"rank": RANK, "alpha": 6.0})
    state = federate(method, engine(), start(method), [Client(k, 10, RANK) for k in "ab"], 3)
    whole = build({"name": "fedit"}, {"rank": RANK, "alpha": 6.0})
    client = Client("a", 10, RANK)
    masked, full = served(method, state, client, SITES), served(whole, state, client, SITES)
    assert all(not torch.equal(masked[s], full[s]) for s in SITES)
    assert all(int((state["A"][s] == 0).sum()) == 0 for s in SITES)
    assert flat(only(unpack(method.serve(state, client)["top"], SITES, RANK), "A")) != flat(only(state, "A"))


@pytest.mark.parametrize("fields", [{"down": 0.0}, {"up": 1.5}])
def test_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"flasc: {next(iter(fields))} is"):
        build({"name": "flasc", **fields}, {"rank": 4})
