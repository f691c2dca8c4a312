from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom import slices
from fedloom.core import Client, State, Trained, Visit
from fedloom.errors import ConfigError
from fedloom.loop import federate, one_round
from fedloom.methods import build
from fedloom.methods.fedlodrop import FedLoDrop
from fedloom.methods.fslora import FSLoRA
from fedloom.rng import generator
from fedloom.state import only

from .cases import (
    KEEPS,
    MIXED,
    SITES,
    Case,
    Sent,
    ToyTrainer,
    after,
    engine,
    first_work,
    flat,
    received,
    rows,
    start,
    update,
    visited,
)

DOUBLE = torch.float64
PLAIN = Case("", {"name": "fedit"})


def method(rank: int = 4, over: str = "fedit", **fields: Any) -> FedLoDrop:
    made = build({"name": "fedlodrop", "over": {"name": over}, **fields}, {"rank": rank, "alpha": 6.0})
    assert isinstance(made, FedLoDrop)
    return made


def server(m: FedLoDrop, sites: dict[str, tuple[int, int]] = SITES) -> State:
    """A state whose B is not zero, in float64."""
    state = m.init(sites, generator(0))
    for role in "AB":
        state[role] = {
            s: torch.randn(x.shape, generator=generator(role, s), dtype=DOUBLE) for s, x in state[role].items()
        }
    return state


def masks(m: FedLoDrop, sent: State, keep: float, sites: dict[str, tuple[int, int]] = SITES) -> slices.Cuts:
    return m._cuts(sent, sites, keep)


def both(cut: slices.Cut) -> tuple[Tensor, Tensor]:
    assert cut.rows is not None and cut.cols is not None and cut.rank is None
    return cut.rows, cut.cols


def test_moments_of_the_masks() -> None:
    """(6)-(9) with gamma = 0.3: (1-g)^2 = 0.49 of the product, squared error and zeros 2g - g^2 = 0.51, 313.6 parameters."""
    m, sites, draws = method(), {"s": (64, 48)}, 4000
    B, A = (torch.randn(*shape, generator=generator(*shape)) for shape in ((64, 4), (4, 48)))
    BA = B @ A
    projection = error = zeros = parameters = 0.0
    for seed in range(draws):
        rows_, cols = both(m._cuts({"mask": {"seed": torch.tensor([seed])}}, sites, 0.7)["s"])
        row, col = torch.zeros(64), torch.zeros(48)
        row[rows_], col[cols] = 1, 1
        masked = BA * torch.outer(row, col)
        projection += float((masked * BA).sum() / BA.square().sum()) / draws
        error += float((masked - BA).square().sum() / BA.square().sum()) / draws
        zeros += float((masked == 0).float().mean()) / draws
        parameters += 4 * (len(rows_) + len(cols)) / draws
    assert projection == pytest.approx(0.49, rel=0.01)
    assert error == pytest.approx(0.51, rel=0.01)
    assert zeros == pytest.approx(0.51, rel=0.01)
    assert parameters == pytest.approx(313.6, rel=0.01)


def test_rank_is_never_dropped() -> None:
    m = method()
    state, client = server(m), Client("a", 12, 4, keep=0.7)
    work = first_work(m, received(m, state, client, 1), client, 1)
    for site, delta in update(work).items():
        rows_, cols = both(masks(m, received(m, state, client, 1), 0.7)[site])
        assert torch.linalg.matrix_rank(delta) == min(4, len(rows_), len(cols))
        want = torch.zeros_like(delta)
        want[rows_[:, None], cols] = 1.5 * (state["B"][site] @ state["A"][site])[rows_[:, None], cols]
        torch.testing.assert_close(delta, want, rtol=1e-12, atol=1e-12)  # and nothing is rescaled


def test_keeping_all_is_fedit_bit_for_bit() -> None:
    plain = PLAIN.method()
    clients = PLAIN.clients()
    first = start(plain)
    want = federate(plain, engine(), first, clients, 4)
    for fields in ({}, {"aggregation": "zeros"}, {"law": "exact"}, {"mode": "official_code"}):
        m = method(**fields)
        got = federate(m, engine(), start(m) | first, clients, 4)
        assert all(torch.equal(got[role][site], x) for role in ("A", "B", "head") for site, x in want[role].items())
    m = method(aggregation="count")
    got = federate(m, engine(), start(m) | first, clients, 4)
    for role in ("A", "B"):
        for site, x in want[role].items():
            torch.testing.assert_close(got[role][site], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_what_was_dropped_is_untouched_by_training_and_what_was_kept_is_trained(optimizer: str) -> None:
    client = Client("a", 12, 4, keep=0.6)
    m = method()
    state = server(m) | {"head": start(m, dtype=DOUBLE)["head"]}
    new, _ = one_round(m, engine(ToyTrainer(optimizer=optimizer)), state, [client], 3)
    cuts = masks(m, received(m, state, client, 3), 0.6)
    for site, (out, in_) in SITES.items():
        rows_, cols = both(cuts[site])
        moved_cols = (new["A"][site] != state["A"][site]).any(0).nonzero().squeeze(1)
        moved_rows = (new["B"][site] != state["B"][site]).any(1).nonzero().squeeze(1)
        assert torch.equal(moved_cols, cols) and torch.equal(moved_rows, rows_)
        assert 0 < len(rows_) < out or 0 < len(cols) < in_
    # In the official code, they start at zero and grow back.
    official = method(mode="official_code")
    work = first_work(official, received(official, state, client, 3), client, 3)
    (done,) = ToyTrainer(optimizer=optimizer).fit([(client, work)], [rows("a")], 3)
    for site in SITES:
        rows_, cols = both(cuts[site])
        away = torch.ones(SITES[site][1], dtype=torch.bool)
        away[cols] = False
        assert (work.train["A"][site][:, away] == 0).all()
        assert torch.equal(work.train["A"][site][:, cols], state["A"][site][:, cols])
        assert (done.state["A"][site][:, away] != 0).any() or not away.any()


def test_slice_is_mask() -> None:
    """Training the sub-adapter is training the whole with the forward pass through the masks, without decay of the rest."""
    m, client = method(), Client("a", 12, 4, keep=0.6)
    state = server(m) | {"head": start(m, dtype=DOUBLE)["head"]}
    toy = ToyTrainer(optimizer="sgd", steps=5, batch=12)
    down = received(m, state, client, 1)
    work = first_work(m, down, client, 1)
    part = toy.fit([(client, work)], [rows("a")], 1)[0].state
    plain = PLAIN.method()
    A = {s: x.clone().requires_grad_() for s, x in state["A"].items()}
    B = {s: x.clone().requires_grad_() for s, x in state["B"].items()}
    head = {s: x.clone().requires_grad_() for s, x in state["head"].items()}
    mA, mB = {}, {}
    for site, cut in masks(m, down, 0.6).items():
        rows_, cols = both(cut)
        mA[site], mB[site] = torch.zeros(SITES[site][1], dtype=DOUBLE), torch.zeros(SITES[site][0], dtype=DOUBLE)
        mA[site][cols], mB[site][rows_] = 1, 1
    whole = first_work(plain, {"A": A, "B": B, "head": head}, client, 1)
    step = torch.optim.SGD([*A.values(), *B.values(), *head.values()], lr=toy.lr)
    for _ in range(5):
        train: State = {
            "A": {s: x * mA[s] for s, x in A.items()},
            "B": {s: x * mB[s][:, None] for s, x in B.items()},
            "head": head,
        }
        step.zero_grad()
        toy.loss(whole, train, rows("a")).backward()
        step.step()
    full = slices.put(state, part, masks(m, down, 0.6))
    for role, group in (("A", A), ("B", B)):
        for site in SITES:
            torch.testing.assert_close(full[role][site], group[site].detach(), rtol=1e-10, atol=1e-12)


def tiny(m: FedLoDrop) -> tuple[State, list[Sent], list[set[int]]]:
    """A = [10 20 30], B zero of one row; three clients add 6, 12, 18 to the columns that they kept."""
    state: State = {
        "A": {"s": torch.tensor([[10.0, 20.0, 30.0]])},
        "B": {"s": torch.zeros(1, 1)},
        "mask": {"seed": torch.tensor([5])},
    }
    sent: list[Sent] = []
    columns = []
    for i, k in enumerate("abc"):
        client = Client(k, (1, 2, 3)[i], 1, keep=0.5)
        down = received(m, state, client, 1)
        up = {"A": {"s": down["A"]["s"] + 6 * (i + 1)}, "B": down["B"]}
        sent.append((client, up))
        columns.append(set(both(masks(m, down, 0.5, {"s": (1, 3)})["s"])[1].tolist()))
    return state, sent, columns


@pytest.mark.parametrize("weights, w", [("examples", [1, 2, 3]), ("uniform", [1, 1, 1])])
@pytest.mark.parametrize("aggregation", ["keep", "zeros", "count"])
def test_aggregates_by_hand(aggregation: str, weights: str, w: Sequence[int]) -> None:
    """(10a)-(10c) on single numbers."""
    m = method(rank=1, aggregation=aggregation, weights=weights)
    state, sent, columns = tiny(m)
    assert 0 < sum(map(len, columns)) < 9
    new = after(m, state, sent)
    for j, old in enumerate([10.0, 20.0, 30.0]):
        mine = [(w[i], old + 6 * (i + 1)) for i in range(3) if j in columns[i]]
        weight, total = sum(x for x, _ in mine), sum(x * y for x, y in mine)
        if aggregation == "keep":
            want = (total + (sum(w) - weight) * old) / sum(w)
        elif aggregation == "zeros":
            want = total / sum(w)
        else:
            want = total / weight if weight else old
        assert new["A"]["s"][0, j].item() == pytest.approx(want, rel=1e-6)


def test_one_client_and_each_rule() -> None:
    client = Client("a", 12, 4, keep=0.6)
    state = server(method())
    got = {}
    for aggregation in ("keep", "zeros", "count"):
        m = method(aggregation=aggregation)
        down = received(m, state, client, 1)
        up = {role: {s: x + 1 for s, x in down[role].items()} for role in "AB"}
        got[aggregation] = after(m, state, [(client, up)])
        cuts = masks(m, down, 0.6)
    for site, cut in cuts.items():
        _, cols = both(cut)
        away = torch.ones(SITES[site][1], dtype=torch.bool)
        away[cols] = False
        assert torch.equal(got["keep"]["A"][site][:, away], state["A"][site][:, away])
        assert (got["zeros"]["A"][site][:, away] == 0).all()
        torch.testing.assert_close(got["count"]["A"][site], got["keep"]["A"][site], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got["zeros"]["A"][site][:, cols], state["A"][site][:, cols] + 1)


def test_masks_are_keyed_and_the_same_on_both_sides() -> None:
    m = method()
    state = server(m, {"s": (40, 50), "t": (40, 50)})
    drawn = {}
    for t in (1, 2):
        for k in "ab":
            down = received(m, state, Client(k, 1, 4, keep=0.5), t)
            for site, cut in masks(m, down, 0.5, {"s": (40, 50), "t": (40, 50)}).items():
                rows_, cols = both(cut)
                drawn[t, k, site] = (tuple(rows_.tolist()), tuple(cols.tolist()))
                assert torch.equal(down["A"][site], state["A"][site][:, cols])
                assert torch.equal(down["B"][site], state["B"][site][rows_])
            again = received(m, state, Client(k, 1, 4, keep=0.5), t)
            assert torch.equal(again["mask"]["seed"], down["mask"]["seed"])
    assert len(set(drawn.values())) == 8 and len({rows_ for rows_, _ in drawn.values()}) == 8


@pytest.mark.parametrize("keep, numbers, size", [(1.0, 393_216, 1_572_864), (0.7, 275_328, 1_101_312)])
def test_bytes_of_roberta_large(keep: float, numbers: int, size: int) -> None:
    """q and v of 24 layers at rank 4, exact counts: 717 of 1,024 rows and columns stay at keep = 0.7."""
    m = method(law="exact", aggregation="keep")
    sites = {f"layers.{i}.{name}": (1024, 1024) for i in range(24) for name in "qv"}
    state = m.init(sites, generator(0))
    client = Client("a", 1, 4, keep=keep)
    down = received(m, state, client, 1)
    assert sum(x.numel() for role in "AB" for x in down[role].values()) == numbers
    assert sum(x.nbytes for role in "AB" for x in down[role].values()) == size
    assert down["mask"]["seed"].nbytes == 8
    flow = m.client(down, {}, Visit(1, client, sites))
    work = flow.send(None)
    with pytest.raises(StopIteration) as stop:
        flow.send(Trained(work.train, 1, 1.0, 0.0))
    sent, kept = stop.value.value
    assert sum(x.nbytes for role in "AB" for x in sent[role].values()) == size and set(sent) == {"A", "B"} and not kept


def test_the_official_code_decays_the_adapter() -> None:
    """With no training, E[A] shrinks by 1 - g and E||A||^2 by (1-g)^2 + g(1-g)/K: 0.56 for g = 0.3 and K = 3."""
    m = method(mode="official_code", weights="uniform")
    state = server(m, {"s": (400, 3000)})
    clients = [Client(k, n, 4, keep=0.7) for k, n in (("a", 1), ("b", 9), ("c", 90))]
    new = after(m, state, [(c, only(received(m, state, c, 1), "A", "B")) for c in clients])
    A, old = new["A"]["s"], state["A"]["s"]
    assert float((A * old).sum() / old.square().sum()) == pytest.approx(0.7, abs=0.02)
    assert float(A.square().sum() / old.square().sum()) == pytest.approx(0.56, abs=0.02)


def test_nothing_kept_is_no_accident() -> None:
    """At a small keep rate a layer may lose all of its columns: the round goes on."""
    m = method()
    state = start(m)
    clients = [Client(k, 8, 4, keep=0.01) for k in "abc"]
    new, record = one_round(m, engine(), state, clients, 1)
    assert not record.dropped and all(x.isfinite().all() for role in "AB" for x in new[role].values())


@pytest.mark.parametrize("over", ["fslora", "flexlora", "fedit"])
def test_keeping_all_is_the_method_under_it_bit_for_bit(over: str) -> None:
    """Clients of different sizes: FSLoRA counts them alike, and so does dropout over it unless it is told otherwise."""
    m, inner = method(over=over), build({"name": over}, {"rank": 4, "alpha": 6.0})
    ranks = (4, 4, 4) if over == "fedit" else (2, 4, 1)
    clients = [Client(k, n, r) for k, n, r in zip("abc", (12, 20, 8), ranks, strict=True)]
    first = start(inner)
    want = federate(inner, engine(), first, clients, 3)
    got = federate(m, engine(), start(m) | first, clients, 3)
    assert flat(only(got, *want)) == flat(want)
    other = method(over=over, weights="examples" if over == "fslora" else "uniform")
    got = federate(other, engine(), start(other) | first, clients, 3)
    assert flat(only(got, *want)) != flat(want)


def test_over_fslora_sends_rows_columns_and_ranks_that_both_drew() -> None:
    m = method(over="fslora")
    state, client = server(m), Client("a", 1, 2, keep=0.6)
    down = received(m, state, client, 1)
    cuts, sketch = masks(m, down, 0.6), m.over._cuts(down["sketch"], SITES, 2)  # type: ignore[attr-defined]
    work = first_work(m, down, client, 1)
    for site in SITES:
        rows_, cols = both(cuts[site])
        rank = sketch[site].rank
        assert torch.equal(down["A"][site], state["A"][site][rank][:, cols])
        assert torch.equal(down["B"][site], state["B"][site][rows_][:, rank])
        want = torch.zeros(SITES[site], dtype=DOUBLE)
        want[rows_[:, None], cols] = 3.0 * down["B"][site] @ down["A"][site]  # alpha / k
        torch.testing.assert_close(update(work)[site], want, rtol=1e-12, atol=1e-12)
    up = {role: {s: x + 1 for s, x in down[role].items()} for role in "AB"}
    new = after(m, state, [(client, up)])
    for site in SITES:
        rows_, cols = both(cuts[site])
        rank = sketch[site].rank
        assert rank is not None
        moved = (new["A"][site] != state["A"][site]).nonzero()
        assert set(map(tuple, moved.tolist())) == {(i, j) for i in rank.tolist() for j in cols.tolist()}


@pytest.mark.parametrize("aggregation", ["keep", "zeros", "count"])
def test_over_fedex_the_server_holds_the_mean_of_the_filled_models(aggregation: str) -> None:
    m = method(over="fedex_lora", aggregation=aggregation)
    state = server(m)
    sent: list[Sent] = []
    filled: list[tuple[float, State, State]] = []
    for k, n in (("a", 3), ("b", 5), ("c", 2)):
        client = Client(k, n, 4, keep=0.6)
        down = received(m, state, client)
        up: State = {
            r: {s: x + torch.randn(x.shape, generator=generator(k, r), dtype=DOUBLE) for s, x in down[r].items()}
            for r in "AB"
        }
        sent.append((client, up))
        blank: State = {r: {s: torch.zeros_like(x) for s, x in state[r].items()} for r in "AB"}
        ones: State = {r: {s: torch.ones_like(x) for s, x in up[r].items()} for r in "AB"}
        cuts = masks(m, down, 0.6)
        filled.append((n / 10, slices.put(blank, up, cuts), slices.put(blank, ones, cuts)))
    # What stands in for a dropped entry: the server's, zero, or the mean of those who kept it (the server's if nobody did).
    around: State = {r: dict(state[r]) for r in "AB"}
    for r in "AB":
        for s, x in state[r].items():
            held = torch.stack([p * mask[r][s] for p, _, mask in filled]).sum(0)
            total = torch.stack([p * full[r][s] for p, full, _ in filled]).sum(0)
            if aggregation == "zeros":
                around[r][s] = torch.zeros_like(x)
            elif aggregation == "count":
                around[r][s] = torch.where(held > 0, total / held.clamp_min(1e-30), x)
    new = after(m, state, sent)
    whole = Client("x", 1, 4)
    got = update(m.model(m.serve(new, whole), {}, Visit(1, whole, SITES)))
    for site in SITES:
        want = torch.zeros(SITES[site], dtype=DOUBLE)
        for p, full, mask in filled:
            B, A = (torch.where(mask[r][site] > 0, full[r][site], around[r][site]) for r in "BA")
            want += 1.5 * p * B @ A
        torch.testing.assert_close(got[site], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "fields",
    [
        {"law": "x"},
        {"aggregation": "mean"},
        {"mode": "x"},
        {"weights": "x"},
        {"over": "fedlodrop"},
        {"over": "fslora", "aggregation": "count"},
        {"over": "flexlora", "aggregation": "count"},
    ],
    ids=str,
)
def test_refused(fields: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="fedlodrop"):
        method(**fields)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1])
def test_keep_out_of_range(keep: float) -> None:
    with pytest.raises(ConfigError, match="keep"):
        method().check(Client("a", 1, 4, keep=keep))


def test_rank_budgets_only_over_methods_that_have_them() -> None:
    small = Client("a", 1, 2, keep=0.5)
    method(over="fslora").check(small)
    with pytest.raises(ConfigError, match="fedit follows no rank budget, got rank 2"):
        method().check(small)
    method().check(replace(small, rank=4))


@pytest.mark.parametrize("weights, below", [("examples", "examples"), ("uniform", "uniform"), ("auto", "uniform")])
def test_weights_over_a_sketch(weights: str, below: str) -> None:
    """Dropout over FSLoRA is dropout over an FSLoRA with those weights; `auto` is FSLoRA's own rule."""
    m = method(over="fslora", weights=weights)
    assert isinstance(m.over, FSLoRA) and m.over.weights == "uniform", "the inner method is not changed"
    clients = Case("", {}, MIXED, KEEPS).clients()
    table = {"name": "fedlodrop", "weights": "auto", "over": {"name": "fslora", "weights": below}}
    other = build(table, {"rank": 4, "alpha": 6.0})
    first = start(m)
    got, want = (federate(x, engine(), first, clients, 2) for x in (m, other))
    assert flat(got) == flat(want)


def test_a_model_to_use_drops_nothing() -> None:
    m, client = method(), Client("a", 1, 4, keep=0.3)
    state = server(m)
    made = update(m.model(m.serve(state, client), {}, Visit(3, client, SITES)))
    for site in SITES:
        torch.testing.assert_close(made[site], 1.5 * state["B"][site] @ state["A"][site], rtol=1e-12, atol=1e-12)


def test_a_visit_sends_what_it_trained_and_nothing_of_the_mask() -> None:
    m, client = method(), Client("a", 12, 4, keep=0.5)
    down = received(m, start(m), client)
    sent, kept = visited(m, down, client, lambda work: work.train)
    assert set(sent) == {"A", "B", "head"} and kept == {}
    assert all(torch.equal(sent["A"][site], down["A"][site]) for site in SITES)
