from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom import lora, slices
from fedloom.core import Client, Exchange, Group, Round, State, Visit, Work
from fedloom.errors import ConfigError
from fedloom.loop import federate, one_round
from fedloom.methods import build
from fedloom.methods.fslora import FSLoRA, inclusion, systematic
from fedloom.rng import generator
from fedloom.spec import like
from fedloom.state import only

from .cases import (
    SITES,
    Case,
    Sent,
    ToyTrainer,
    after,
    engine,
    first_work,
    frozen,
    received,
    rows,
    start,
    update,
)

DOUBLE = torch.float64


def method(rank: int = 4, rslora: bool = False, **fields: Any) -> FSLoRA:
    made = build({"name": "fslora", **fields}, {"rank": rank, "alpha": 6.0, "rslora": rslora})
    assert isinstance(made, FSLoRA)
    return made


def randn(*shape: int, key: int | str = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(key, *shape), dtype=DOUBLE)


def sketch(r: int, chosen: tuple[int, ...]) -> Tensor:
    """(3): S = (r/k) sum_{j in I} e_j e_j^T."""
    S = torch.zeros(r, r, dtype=DOUBLE)
    S[list(chosen), list(chosen)] = r / len(chosen)
    return S


def all_sketches(r: int, k: int) -> list[Tensor]:
    return [sketch(r, chosen) for chosen in itertools.combinations(range(r), k)]


def trained_state(seed: int = 0) -> State:
    """A state whose B is not zero, in float64."""
    state = start(method(), seed, DOUBLE)
    return state | {"B": {site: randn(m, 4, key=site) for site, (m, _) in SITES.items()}}


@pytest.mark.parametrize("r", [2, 3, 5, 8])
def test_moments_of_the_sketch(r: int) -> None:
    """(5)-(11) by enumeration."""
    for k in range(1, r + 1):
        draws = torch.stack(all_sketches(r, k))
        diagonal = draws.diagonal(dim1=1, dim2=2)
        eye = torch.eye(r, dtype=DOUBLE)
        torch.testing.assert_close(draws.mean(0), eye, rtol=0, atol=1e-12)
        torch.testing.assert_close((draws @ draws).mean(0), r / k * eye, rtol=0, atol=1e-12)
        torch.testing.assert_close(diagonal.sum(1), torch.full((len(draws),), float(r), dtype=DOUBLE))
        cov = diagonal.T @ diagonal / len(draws) - 1
        want = eye * (r / k - 1) + (1 - eye) * (-(r - k) / (k * (r - 1)))
        torch.testing.assert_close(cov, want, rtol=0, atol=1e-12)
        Z = randn(3, r)
        spread = torch.stack([torch.stack([(Z @ S).square().sum(), (Z @ S - Z).square().sum()]) for S in draws])
        both = torch.tensor([r / k, r / k - 1], dtype=DOUBLE) * Z.square().sum()
        torch.testing.assert_close(spread.mean(0), both, rtol=1e-12, atol=1e-12)
        if k < r:
            assert torch.linalg.matrix_norm(draws[0], 2) == pytest.approx(r / k)


def test_what_a_client_trains_is_B_S_A() -> None:
    """(4): the slice at scale s r/k is the model W0 + s B S A; and s r/k is alpha/k, or alpha sqrt(r)/k."""
    state = trained_state()
    for rslora in (False, True):
        m = method(rslora=rslora)
        for k in (1, 2, 3, 4):
            client = Client("a", 12, k)
            down = received(m, state, client, 5)
            work = first_work(m, down, client, 5)
            assert work.scale == pytest.approx(6 * math.sqrt(4) / k if rslora else 6 / k)
            cuts = m._cuts(down["sketch"], SITES, k)
            for site, delta in update(work).items():
                chosen = cuts[site].rank
                assert chosen is not None
                S = sketch(4, tuple(chosen.tolist()))
                s = lora.scale(6, 4, rslora)
                torch.testing.assert_close(delta, s * state["B"][site] @ S @ state["A"][site], rtol=1e-12, atol=1e-12)
                assert down["A"][site].shape[0] == down["B"][site].shape[1] == k


def test_one_index_set_for_A_and_B_another_for_each_client_round_and_site() -> None:
    m, r = method(rank=16), 16
    marked: State = {
        "A": {site: torch.arange(16.0)[:, None].repeat(1, 3) for site in "xy"},
        "B": {site: torch.arange(16.0)[None].repeat(2, 1) for site in "xy"},
        "sketch": {"seed": torch.tensor([3])},
    }
    sets = {}
    for t in range(1, 20):
        for k in "abc":
            sent = received(m, marked, Client(k, 1, 4), t)
            for site in "xy":
                chosen = sent["A"][site][:, 0].tolist()
                assert chosen == sent["B"][site][0].tolist() == sorted(set(chosen)) and len(chosen) == 4
                sets[t, k, site] = tuple(chosen)
            again = received(m, marked, Client(k, 1, 4), t)
            assert torch.equal(again["A"]["x"], sent["A"]["x"])
    # 114 draws among 1,820 sets: few coincide.
    assert len(set(sets.values())) > 100
    counts = Counter(j for chosen in sets.values() for j in chosen)
    expected = len(sets) * 4 / r
    assert sum((counts[j] - expected) ** 2 / expected for j in range(r)) < 38  # chi-square, 15 degrees, p = 1e-3


def test_uniform_index_sets_are_uniform() -> None:
    m = method(rank=6)
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(3000):
        chosen = m._cuts({"seed": torch.tensor([seed])}, ["s"], 3)["s"].rank
        assert chosen is not None
        counts[tuple(chosen.tolist())] += 1
    assert len(counts) == math.comb(6, 3)
    expected = 3000 / 20
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 44  # 19 degrees, p = 1e-3


def test_gradients_have_the_support_of_the_sketch() -> None:
    """(13)-(14): grad_B = s G A^T S, grad_A = s S B^T G, exactly zero outside I."""
    W, B, A, x, y = randn(5, 6), randn(5, 4), randn(4, 6), randn(6, 9), randn(5, 9)
    S, s = sketch(4, (1, 3)), 1.5
    for factor in (B, A):
        factor.requires_grad_()
    M = (W + s * B @ S @ A).requires_grad_()
    M.retain_grad()
    (0.5 * (M @ x - y).square().sum()).backward()
    G = M.grad
    assert G is not None and A.grad is not None and B.grad is not None
    torch.testing.assert_close(B.grad, s * G @ A.T @ S, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(A.grad, s * S @ B.T @ G, rtol=1e-12, atol=1e-12)
    assert (B.grad[:, [0, 2]] == 0).all() and (A.grad[[0, 2]] == 0).all()
    assert (B.grad[:, [1, 3]] != 0).all() and (A.grad[[1, 3]] != 0).all()


def masked(state: State, S: dict[str, Tensor], s: float, optimizer: str, trick: bool = False) -> State:
    """The oracle: full factors, the forward pass through B S A (or P = B S trained, as the official code)."""
    A = {site: x.clone().requires_grad_() for site, x in state["A"].items()}
    B = {site: (x @ S[site] if trick else x.clone()).detach().requires_grad_() for site, x in state["B"].items()}
    head = {site: x.clone().requires_grad_() for site, x in state["head"].items()}
    leaves = [*A.values(), *B.values(), *head.values()]
    step: torch.optim.Optimizer
    if optimizer == "adamw":
        step = torch.optim.AdamW(leaves, lr=0.02, weight_decay=0.0)
    else:
        step = torch.optim.SGD(leaves, lr=0.02, momentum=0.9 if optimizer == "momentum" else 0.0)
    x0, y = (torch.from_numpy(part) for part in rows("a"))
    for _ in range(6):
        x = x0
        for site, W in frozen().items():
            middle = B[site] if trick else B[site] @ S[site]
            x = torch.tanh(x @ (W + s * middle @ A[site]).T)
        loss = (x @ head["head.weight"].T + head["head.bias"] - y).square().mean()
        step.zero_grad()
        loss.backward()
        if trick:
            for site, P in B.items():
                assert P.grad is not None
                P.grad = P.grad @ S[site] @ S[site]
        step.step()
    if trick:
        for site in B:
            d = S[site].diagonal()
            B[site] = torch.where(d > 0, B[site] / d.clamp_min(1e-30), state["B"][site])
    return {"A": {k: v.detach() for k, v in A.items()}, "B": {k: v.detach() for k, v in B.items()}}


def sliced(state: State, k: int, optimizer: str) -> tuple[State, dict[str, Tensor]]:
    m, client = method(), Client("a", 12, k)
    down = received(m, state, client, 1)
    work = first_work(m, down, client, 1)
    A = {site: x.clone().requires_grad_() for site, x in work.train["A"].items()}
    B = {site: x.clone().requires_grad_() for site, x in work.train["B"].items()}
    head = {site: x.clone().requires_grad_() for site, x in work.train["head"].items()}
    leaves = [*A.values(), *B.values(), *head.values()]
    step: torch.optim.Optimizer
    if optimizer == "adamw":
        step = torch.optim.AdamW(leaves, lr=0.02, weight_decay=0.0)
    else:
        step = torch.optim.SGD(leaves, lr=0.02, momentum=0.9 if optimizer == "momentum" else 0.0)
    toy = ToyTrainer()
    for _ in range(6):
        step.zero_grad()
        toy.loss(work, {"A": A, "B": B, "head": head}, rows("a")).backward()
        step.step()
    part: State = {"A": {s: x.detach() for s, x in A.items()}, "B": {s: x.detach() for s, x in B.items()}}
    cuts = m._cuts(down["sketch"], SITES, k)
    S = {}
    for site, cut in cuts.items():
        assert cut.rank is not None
        S[site] = sketch(4, tuple(cut.rank.tolist()))
    return slices.put(state, part, cuts), S


def gap(a: State, b: State) -> float:
    return max(float((a[role][site] - b[role][site]).abs().max()) for role in "AB" for site in SITES)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_slice_is_mask(optimizer: str) -> None:
    state = trained_state()
    for k in (1, 2, 3):
        slice_, S = sliced(state, k, optimizer)
        assert gap(slice_, state) > 1e-3
        assert gap(slice_, masked(state, S, 1.5, optimizer)) < 1e-10
        # The algebraic trick of the official code is right for SGD, and wrong for Adam.
        trick = gap(slice_, masked(state, S, 1.5, optimizer, trick=True))
        assert (trick > 1e-3) if optimizer == "adamw" else (trick < 1e-7)


def test_aggregate_by_hand() -> None:
    """(16)-(17): unvisited rows count as unchanged, the sum is divided by the number of clients."""
    m = method(rank=2)
    state: State = {
        "A": {"s": torch.tensor([[1.0], [2.0]])},
        "B": {"s": torch.tensor([[10.0, 20.0]])},
        "sketch": {"seed": torch.tensor([1])},
        "idle": {"s": torch.tensor([[5, 0], [7, 2]])},
    }
    uploads: list[Sent] = []
    drawn = []
    for k in "abcd":
        client = Client(k, 100 if k == "a" else 1, 1)
        sent = received(m, state, client, 1)
        uploads.append((client, {role: {"s": sent[role]["s"] + 4} for role in "AB"}))
        drawn.append(int(sent["A"]["s"]))
    visits, report = Counter(drawn), dict[str, float]()
    new = after(m, state, uploads, report=report)
    want_A = [[1 + 4 * visits[1] / 4], [2 + 4 * visits[2] / 4]]
    torch.testing.assert_close(new["A"]["s"], torch.tensor(want_A))
    torch.testing.assert_close(new["B"]["s"], torch.tensor([[10.0 + visits[1], 20.0 + visits[2]]]))
    gone = [0 if visits[1] else 6, 0 if visits[2] else 1]
    assert new["idle"]["s"].tolist() == [gone, [max(7, gone[0]), max(2, gone[1])]]
    assert report == {"longest_idle_rounds": 7.0}
    # By examples, the first client weighs 100 of 103: so FedIT has it, whose rule `auto` is.
    for weights in ("examples", "auto"):
        heavy = after(method(rank=2, weights=weights), state, uploads)
        share = {1: 0.0, 2: 0.0}
        for j, (client, _) in zip(drawn, uploads, strict=True):
            share[j] += client.examples / 103
        torch.testing.assert_close(heavy["A"]["s"], torch.tensor([[1 + 4 * share[1]], [2 + 4 * share[2]]]))


def test_rows_that_nobody_drew_stay_bit_for_bit() -> None:
    m = method(rank=16)
    state = m.init(SITES, generator(0))
    state = state | {"B": {site: torch.randn(x.shape, generator=generator(1)) for site, x in state["B"].items()}}
    uploads: list[Sent] = []
    drawn = {site: set[int]() for site in SITES}
    for k in "abc":
        client = Client(k, 7, 2)
        sent = received(m, state, client, 1)
        for site, cut in m._cuts(sent["sketch"], SITES, 2).items():
            assert cut.rank is not None
            drawn[site] |= set(cut.rank.tolist())
        moved = {role: {site: x + 1 for site, x in sent[role].items()} for role in "AB"}
        uploads.append((client, moved))
    new = after(m, state, uploads)
    for site in SITES:
        for j in range(16):
            still = torch.equal(new["A"][site][j], state["A"][site][j])
            assert still == torch.equal(new["B"][site][:, j], state["B"][site][:, j]) == (j not in drawn[site])


def test_step_is_unbiased() -> None:
    """H = 1 with SGD: the mean over all sketches is the gradient of the enumerated objective f^S."""
    W, B0, A0, x, y = randn(5, 6), randn(5, 4), randn(4, 6), randn(6, 9), randn(5, 9)
    lr, s, k = 0.01, 1.5, 2
    B, A = B0.clone().requires_grad_(), A0.clone().requires_grad_()
    f = torch.stack([0.5 * ((W + s * B @ S @ A) @ x - y).square().sum() for S in all_sketches(4, k)]).mean()
    f.backward()
    assert A.grad is not None and B.grad is not None
    stepsA, stepsB = [], []
    for chosen in itertools.combinations(range(4), k):
        index = torch.tensor(chosen)
        Ak, Bk = A0[index].clone().requires_grad_(), B0[:, index].clone().requires_grad_()
        (0.5 * ((W + s * 4 / k * Bk @ Ak) @ x - y).square().sum()).backward()
        assert Ak.grad is not None and Bk.grad is not None
        part: State = {"A": {"s": (Ak - lr * Ak.grad).detach()}, "B": {"s": (Bk - lr * Bk.grad).detach()}}
        full = slices.put({"A": {"s": A0}, "B": {"s": B0}}, part, {"s": slices.Cut(rank=index)})
        stepsA.append(full["A"]["s"] - A0)
        stepsB.append(full["B"]["s"] - B0)
    torch.testing.assert_close(torch.stack(stepsA).mean(0), -lr * A.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.stack(stepsB).mean(0), -lr * B.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_objective_gap(k: int) -> None:
    """(12), which is zero at k = r."""
    r, W, B, A, x, y = 4, randn(5, 6), randn(5, 4), randn(4, 6), randn(6), randn(5)

    def loss(S: Tensor) -> Tensor:
        return 0.5 * ((W + B @ S @ A) @ x - y).square().sum()

    got = torch.stack([loss(S) for S in all_sketches(r, k)]).mean() - loss(torch.eye(r, dtype=DOUBLE))
    spread = (B.square().sum(0) * (A @ x).square()).sum() - (B @ A @ x).square().sum() / r
    torch.testing.assert_close(got, 0.5 * (r / k - 1) * r / (r - 1) * spread, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("r, k", [(8, 2), (8, 3), (7, 2), (5, 5), (4, 1)])
def test_balanced_visits_every_row_once_a_cycle(r: int, k: int) -> None:
    m = method(rank=r, sketch="balanced")
    state = m.init({"x": (9, 9), "y": (9, 9)}, generator(0))
    blocks = -(-r // k)
    orders = set()
    for cycle in range(4):
        visits: Counter[int] = Counter()
        drawn = []
        for t in range(1 + cycle * blocks, 1 + (cycle + 1) * blocks):
            sent = received(m, state, Client("a", 1, k), t)
            cuts = m._cuts(sent["sketch"], "xy", k)
            assert cuts["x"].rank is not None and len(set(cuts["x"].rank.tolist())) == k
            visits.update(cuts["x"].rank.tolist())
            drawn.append(tuple(cuts["x"].rank.tolist()))
        assert set(visits) == set(range(r)) and sum(visits.values()) == blocks * k
        assert max(visits.values()) <= (1 if r % k == 0 else 2)
        orders.add(tuple(drawn))
    if k < r:
        assert len(orders) > 1, "a new permutation each cycle"


def test_uniform_visits_are_those_expected() -> None:
    """10 clients at 1/8: a row is idle with probability (7/8)^10 = 0.263."""
    m, r, rounds = method(rank=16), 16, 150
    state = m.init({"x": (20, 20)}, generator(0))
    idle = 0
    for t in range(1, rounds + 1):
        seen: set[int] = set()
        for k in range(10):
            sent = received(m, state, Client(str(k), 1, 2), t)
            cut = m._cuts(sent["sketch"], ["x"], 2)["x"].rank
            assert cut is not None
            seen |= set(cut.tolist())
        idle += r - len(seen)
    assert idle / (r * rounds) == pytest.approx(0.263, abs=0.03)


@pytest.mark.parametrize("importance", [[1.0, 2, 3, 4], [0, 0, 0, 1], [1e-9, 1, 1, 1000], [5, 5, 5, 5], [0, 0, 0, 0]])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_inclusion_probabilities(importance: list[float], k: int) -> None:
    x = torch.tensor(importance)
    pi = inclusion(x, k, 0.5)
    assert pi.dtype == DOUBLE and float(pi.sum()) == pytest.approx(k, abs=1e-12)
    assert (pi <= 1).all() and (pi >= 0.5 * k / 4 - 1e-12).all(), "no row rarer than the uniform share of the mix"
    free = pi < 1
    share = 0.5 / 4 + 0.5 * (x.double() / x.sum() if x.sum() > 0 else torch.full((4,), 0.25, dtype=DOUBLE))
    ratio = (pi / share)[free]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-12, atol=0)
    n = 3000
    counts = torch.zeros(4, dtype=DOUBLE)
    for seed in range(n):
        chosen = systematic(pi, generator(seed))
        assert len(chosen) == k == len(set(chosen.tolist()))
        counts[chosen] += 1
    # Five standard deviations.
    assert ((counts / n - pi).abs() <= 5 * (pi * (1 - pi) / n).sqrt() + 1e-12).all()


def test_importance_sketch_is_unbiased() -> None:
    """E[B S A] = B A with the weights 1 / pi; without them it is not."""
    m = method(sketch="importance")
    state = trained_state()
    state = state | {"B": {site: x * torch.tensor([0.1, 1, 2, 5], dtype=DOUBLE) for site, x in state["B"].items()}}
    site, n = "layers.0.in", 4000
    total, without = torch.zeros(7, 6, dtype=DOUBLE), torch.zeros(7, 6, dtype=DOUBLE)
    for t in range(1, n + 1):
        client = Client("a", 1, 2)
        work = first_work(m, received(m, state, client, t), client, t)
        total += update(work)[site] / n
        without += work.scale * 2 * work.train["B"][site] @ work.train["A"][site] / n
    want = 1.5 * state["B"][site] @ state["A"][site]
    assert (total - want).norm() / want.norm() < 0.06
    assert (without - want).norm() / want.norm() > 0.15


def test_importance_sends_indices_and_weights_and_gets_neither_back() -> None:
    m, state, client = method(sketch="importance"), trained_state(), Client("a", 1, 2)
    sent = received(m, state, client, 1)
    assert sent["sketch"]["layers.0.in"].dtype == torch.int32 and sent["sketch_weight"]["layers.0.in"].shape == (2,)
    flow = m.server(state, Round(1, (client,), 1, SITES))
    x = flow.send(None)
    flow.close()
    assert isinstance(x, Exchange)
    assert x.expects(client, sent) == like(sent, "A", "B", "head")
    assert set(received(m, state, replace(client, rank=4), 1)["sketch"]) == {"seed"}, "all of it needs no index"


def test_full_rank_is_fedit_over_rounds_bit_for_bit() -> None:
    plain, m = Case("", {"name": "fedit"}).method(), method()
    clients = [Client(k, 10, 4) for k in "abc"]
    first = start(plain)
    want = federate(plain, engine(), first, clients, 4)
    got = federate(m, engine(), start(m) | first, clients, 4)
    assert all(torch.equal(got[role][site], x) for role in ("A", "B", "head") for site, x in want[role].items())


def test_over_fedex_the_server_holds_the_mean_of_the_clients_models() -> None:
    """W0 + D of the server = sum_k p_k of the clients' models expanded to full rank, at scale alpha / r."""
    m = method(over={"name": "fedex_lora"}, weights="examples")
    state: State = m.init(SITES, generator(0))
    clients = [Client("a", 3, 1), Client("b", 5, 3), Client("c", 2, 4)]
    for t in (1, 2, 3):
        uploads: list[Sent] = []
        want = {site: torch.zeros(shape) for site, shape in SITES.items()}
        offset = {site: torch.zeros(shape) for site, shape in SITES.items()}
        for site, left in state.get("left", {}).items():
            right = state["right"].get(site)
            offset[site] = left if right is None else left @ right
        for client in clients:
            sent = received(m, state, client, t)
            rng = generator(t, client.id)
            moved = {role: {s: x + torch.randn(x.shape, generator=rng) for s, x in sent[role].items()} for role in "AB"}
            uploads.append((client, moved))
            full = slices.put(state, moved, m._cuts(sent["sketch"], SITES, client.rank))
            for site in SITES:
                want[site] += client.examples / 10 * (offset[site] + 1.5 * full["B"][site] @ full["A"][site])
        state = after(m, state, uploads, t)
        whole = Client("a", 1, 4)
        got = update(m.model(m.serve(state, whole), {}, Visit(t, whole, SITES)))
        for site in SITES:
            torch.testing.assert_close(got[site], want[site], rtol=1e-4, atol=1e-4)


def test_bytes_of_llama_and_roberta() -> None:
    """RoBERTa-base, q and v, k = 8 of 64: 8 * 36,864 numbers and a seed, each way; 30.1 % of all with the head."""
    m = method(rank=64)
    sites = {f"layers.{i}.{name}": (768, 768) for i in range(12) for name in "qv"}
    # Tensors on the meta device would do, but index_select needs memory: expand one number.
    state: State = {
        "A": {site: torch.zeros(1).expand(64, n) for site, (_, n) in sites.items()},
        "B": {site: torch.zeros(1).expand(n, 64) for site, (n, _) in sites.items()},
        "sketch": {"seed": torch.tensor([0])},
    }
    sizes = {}
    for k in (8, 16, 32, 64):
        sent = received(m, state, Client("a", 1, k), 1)
        sizes[k] = sum(x.numel() for role in "AB" for x in sent[role].values())
        assert sizes[k] == k * 36_864
        assert sum(x.nbytes for x in sent["sketch"].values()) == 8
    head = 592_130
    shares = [round((sizes[k] + head) / (sizes[64] + head), 3) for k in (8, 16, 32)]
    assert shares == [0.301, 0.4, 0.6]


def test_idle_gaps_over_rounds() -> None:
    m = method(rank=8)
    state: State = m.init({"x": (9, 9)}, generator(0))
    gaps, longest = [0] * 8, 0
    for t in range(1, 12):
        sent = received(m, state, Client("a", 1, 2), t)
        cut = m._cuts(sent["sketch"], ["x"], 2)["x"].rank
        assert cut is not None
        gaps = [0 if j in cut.tolist() else gaps[j] + 1 for j in range(8)]
        longest = max(longest, *gaps)
        report: dict[str, float] = {}
        state = after(m, state, [(Client("a", 1, 2), only(sent, "A", "B"))], t, report)
        assert state["idle"]["x"][0].tolist() == gaps
        assert report["longest_idle_rounds"] == longest


@pytest.mark.parametrize(
    "fields", [{"sketch": "random"}, {"weights": "x"}, {"over": {"name": "flexlora"}}, {"over": {"name": "fslora"}}]
)
def test_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"\[method\] fslora"):
        method(**fields)


@pytest.mark.parametrize("mix", [0.0, -1.0, 1.5])
def test_mix_out_of_range(mix: float) -> None:
    with pytest.raises(ConfigError, match="importance_mix"):
        method(importance_mix=mix)


@pytest.mark.parametrize("rank", [0, 5])
def test_rank_out_of_range(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"rank {rank}, expected 1 to 4"):
        method().check(Client("a", 1, rank))


def test_type_of_work() -> None:
    m = method()
    client = Client("a", 1, 2)
    work: Work = first_work(m, received(m, trained_state(), client), client)
    group: Group = work.train["A"]
    assert set(work.train) == {"A", "B", "head"} and not work.fixed and group["layers.0.in"].shape == (2, 6)


def test_a_model_to_use_is_not_sketched() -> None:
    m, state, client = method(), trained_state(), Client("a", 1, 2)
    made = update(m.model(m.serve(state, client), {}, Visit(3, client, SITES)))
    for site in SITES:
        torch.testing.assert_close(made[site], 1.5 * state["B"][site] @ state["A"][site], rtol=1e-12, atol=1e-12)


def test_a_round_writes_its_gaps_into_the_record() -> None:
    m = method()
    state, record = one_round(m, engine(), start(m), Case("", {}, {"a": 1, "b": 1, "c": 1}).clients()[:3], 1)
    assert record.report["longest_idle_rounds"] == max(int(gaps[1].max()) for gaps in state["idle"].values())
