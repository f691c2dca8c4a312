"""FedIT, FFA-LoRA, FedSA-LoRA, FedEx-LoRA, FlexLoRA and HetLoRA: aggregates by hand, and what is peculiar to each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom import lora, slices
from fedloom.core import Client, Group, Method, State, Upload
from fedloom.errors import ConfigError
from fedloom.loop import federate
from fedloom.methods import build

from .cases import SITES, Case, engine, start, update

Pair = tuple[list[list[float]], list[list[float]]]


def state(A: list[list[float]], B: list[list[float]]) -> State:
    return {"A": {"s": torch.tensor(A)}, "B": {"s": torch.tensor(B)}}


def uploads(*sent: tuple[int, State]) -> list[Upload]:
    return [
        Upload(Client(f"c{i}", n, next(iter(x.get("A", x.get("B", {})).values())).shape[0]), x, 1)
        for i, (n, x) in enumerate(sent)
    ]


ONE = state([[1.0, 2.0]], [[3.0], [5.0], [0.0]])
TWO = state([[5.0, 6.0]], [[7.0], [1.0], [4.0]])
ZERO = state([[0.0, 0.0]], [[0.0], [0.0], [0.0]])


def served(method: Method, at: State, client: Client, sites: dict[str, tuple[int, int]]) -> Group:
    """What a client's model adds to its frozen weights at evaluation."""
    return update(method, method.prepare(method.broadcast(at, client, 0), {}, sites, client, 0))


def random_uploads(ranks: Sequence[int], sites: dict[str, tuple[int, int]] = SITES, key: int = 0) -> list[Upload]:
    made = []
    for i, r in enumerate(ranks):
        rng = lora.generator(key, i)
        A = {s: torch.randn(r, n, generator=rng, dtype=torch.float64) for s, (_, n) in sites.items()}
        B = {s: torch.randn(m, r, generator=rng, dtype=torch.float64) for s, (m, _) in sites.items()}
        made.append(Upload(Client(f"c{i}", 2 * i + 3, r), {"A": A, "B": B}, 1))
    return made


def ideal(method: Method, sent: Sequence[Upload]) -> Group:
    """sum_k p_k s_k B_k A_k, densely."""
    total = sum(u.client.examples for u in sent)
    out: Group = {}
    for u in sent:
        own = u.client.rank if method.name == "flexlora" else method.rank
        s = lora.scale(method.alpha, own, method.rslora)
        for site, A in u.state["A"].items():
            out[site] = out.get(site, torch.zeros(())) + u.client.examples / total * s * u.state["B"][site] @ A
    return out


# FedIT


def test_fedit_by_hand() -> None:
    """Weights 3/4 and 1/4."""
    after = build("fedit", rank=1).aggregate(ZERO, uploads((3, ONE), (1, TWO)))
    assert after["A"]["s"].tolist() == [[2.0, 3.0]] and after["B"]["s"].tolist() == [[4.0], [4.0], [1.0]]


def test_fedit_keeps_what_is_not_averaged_and_averages_the_head() -> None:
    head: list[State] = [{"head": {"w": torch.tensor([float(x)])}} for x in (0, 8)]
    after = build("fedit", rank=1).aggregate(
        ZERO | head[0] | {"note": {}}, uploads((1, ONE | head[0]), (3, TWO | head[1]))
    )
    assert after["head"]["w"].item() == 6 and "note" in after


def test_fedit_refuses_a_smaller_rank() -> None:
    with pytest.raises(ConfigError, match="fedit needs every client at rank 4, got 2"):
        build("fedit", rank=4).check(Client("a", 1, 2))
    with pytest.raises(ConfigError, match="keep"):
        build("fedit", rank=4).check(Client("a", 1, 4, keep=0.5))


# FFA-LoRA


def test_ffa_lora_by_hand() -> None:
    """B is padded with zeros: (3 [1 2] + 1 [4 0]) / 4."""
    method = build("ffa_lora", rank=2, alpha=2.0)
    first = method.init({"s": (1, 3)}, lora.generator(0))
    sent = [
        Upload(Client("a", 3, 2), {"B": {"s": torch.tensor([[1.0, 2.0]])}}, 1),
        Upload(Client("b", 1, 1), {"B": {"s": torch.tensor([[4.0]])}}, 1),
    ]
    after = method.aggregate(first, sent)
    assert after["B"]["s"].tolist() == [[1.75, 1.5]] and torch.equal(after["A"]["s"], first["A"]["s"])


def test_ffa_lora_average_is_exact_for_any_ranks() -> None:
    method = build("ffa_lora", rank=4)
    first = method.init(SITES, lora.generator(0))
    clients = [Client("a", 3, 1), Client("b", 5, 4), Client("c", 4, 2)]
    want, sent = {site: torch.zeros(shape) for site, shape in SITES.items()}, []
    for client in clients:
        work = method.prepare(method.broadcast(first, client, 1), {}, SITES, client, 1)
        rng = lora.generator(client.id)
        B = {site: torch.randn(x.shape, generator=rng) for site, x in work.train["B"].items()}
        for site, delta in update(method, work, {"B": B}).items():
            want[site] += client.examples / 12 * delta
        sent.append(Upload(client, {"B": B}, 1))
    got = served(method, method.aggregate(first, sent), Client("e", 1, 4), SITES)
    for site in SITES:
        torch.testing.assert_close(got[site], want[site], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("a_init", ["kaiming", "orthonormal"])
def test_ffa_lora_clients_make_the_servers_A_from_the_seed(a_init: str) -> None:
    method = build("ffa_lora", rank=4, a_init=a_init)
    first = method.init(SITES, lora.generator(0))
    # A client may name its layers in another order than the server.
    for sites in (SITES, dict(reversed(SITES.items()))):
        client = Client("a", 1, 3)
        received = method.broadcast(first, client, 1)
        assert set(received) == {"frozen", "B"}
        work = method.prepare(received, {}, sites, client, 1)
        assert set(work.train) == {"B"} and not any("A" in group for group in (work.base, work.train))
        assert all(torch.equal(work.fixed["A"][site], first["A"][site][:3]) for site in SITES)
    if a_init == "orthonormal":
        for A in first["A"].values():
            torch.testing.assert_close(A @ A.T, torch.eye(4))
    a, b = first["A"].values()
    assert not torch.allclose(a[:, :3], b[:, :3]), "layers differ"


# FedSA-LoRA


def test_fedsa_lora_by_hand() -> None:
    """A is averaged; B and the head stay with the client, and no other client's reach it."""
    method = build("fedsa_lora", rank=1)
    head: State = {"head": {"w": torch.zeros(1)}}
    first = ZERO | head
    sites = {"s": (3, 2)}
    client = Client("a", 3, 1)
    received = method.broadcast(first, client, 1)
    assert list(received) == ["A"]
    work = method.prepare(received, head, sites, client, 1)
    assert set(work.train) == {"A", "B", "head"} and (work.train["B"]["s"] == 0).all()
    trained = ONE | {"head": {"w": torch.ones(1)}}
    sent, kept = method.finish(work, trained, received)
    assert list(sent) == ["A"] and set(kept) == {"B", "head"}
    after = method.aggregate(first, uploads((3, lora.only(ONE, "A")), (1, lora.only(TWO, "A"))))
    assert after["A"]["s"].tolist() == [[2.0, 3.0]]
    assert torch.equal(after["B"]["s"], ZERO["B"]["s"]) and after["head"]["w"].item() == 0
    again = method.prepare(method.broadcast(after, client, 2), kept, sites, client, 2)
    assert torch.equal(again.train["B"]["s"], ONE["B"]["s"]) and again.train["head"]["w"].item() == 1
    new = method.prepare(method.broadcast(after, client, 2), head, sites, client, 2)
    assert (new.train["B"]["s"] == 0).all()


def test_fedsa_lora_clients_end_with_models_of_their_own() -> None:
    method = Case("", "fedsa_lora").method()
    at = engine()
    last = federate(method, at, start(method), Case("", "fedsa_lora").clients(), 3)
    own = {k: at.own(k) for k in "abcd"}
    models = [
        update(method, method.prepare({"A": last["A"]}, own[k], SITES, Client(k, 1, 4), 0))["layers.0.in"]
        for k in "abcd"
    ]
    assert all(not torch.equal(x, y) for i, x in enumerate(models) for y in models[:i])


# FedEx-LoRA


def test_fedex_lora_by_hand() -> None:
    """Scale 2, weights 3/4 and 1/4: the residual is 2 (3/4 B1 A1 + 1/4 B2 A2 - [4 4 1]^T [2 3])."""
    method = build("fedex_lora", rank=1, alpha=2.0)
    after = method.aggregate(ZERO, uploads((3, ONE), (1, TWO)))
    assert after["A"]["s"].tolist() == [[2.0, 3.0]] and after["B"]["s"].tolist() == [[4.0], [4.0], [1.0]]
    left, right = after["left"]["s"], after.get("right", {}).get("s")
    residual = left if right is None else left @ right
    #  3/4 [3 6; 5 10; 0 0] + 1/4 [35 42; 5 6; 20 24] = [11 15; 5 9; 5 6];  minus [8 12; 8 12; 2 3]
    assert residual.tolist() == [[6.0, 6.0], [-6.0, -6.0], [6.0, 6.0]]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("sites", [{"s": (40, 50)}, {"s": (7, 5)}], ids=["factors", "dense"])
def test_fedex_lora_is_exact_over_rounds(rslora: bool, sites: dict[str, tuple[int, int]]) -> None:
    """W0 + D is the mean of the clients' models, as factors or dense, and crossing from one to the other."""
    method = build("fedex_lora", rank=2, alpha=3.0, rslora=rslora)
    at: State = method.init(sites, lora.generator(0))
    client = Client("x", 1, 2)
    forms = []
    for t in range(1, 9):
        before = served(method, at, client, sites)
        product = {s: lora.scale(3.0, 2, rslora) * at["B"][s] @ at["A"][s] for s in sites}
        sent = random_uploads([2, 2, 2], sites, t)
        at = method.aggregate(at, sent)
        forms.append("s" in at["right"])
        if len(sites["s"]) == 2 and t == 1:
            left, right = at["left"]["s"], at["right"].get("s")
            assert torch.linalg.matrix_rank(left if right is None else left @ right) <= 4, "(K - 1) r"
        got, want = served(method, at, client, sites), ideal(method, sent)
        for s in sites:
            torch.testing.assert_close(got[s], before[s] - product[s] + want[s], rtol=1e-9, atol=1e-9)
    assert forms == ([True] * 5 + [False] * 3 if sites["s"] == (40, 50) else [False] * 8)


def test_fedex_lora_offset_reaches_those_that_missed_rounds() -> None:
    method = build("fedex_lora", rank=2)
    at = method.init(SITES, lora.generator(0))
    for t in (1, 2):
        at = method.aggregate(at, random_uploads([2, 2], SITES, t))
    received = method.broadcast(at, Client("late", 1, 2), 3)
    assert received["left"] is at["left"] and "left" not in method.expected(received, 3)
    work = method.prepare(received, {}, SITES, Client("late", 1, 2), 3)
    assert set(work.train) == {"A", "B"} and work.base["left"] is at["left"]


# FlexLoRA


def test_flexlora_by_hand() -> None:
    """Ranks 1 and 1 at scale 4 and weights 1/2: D = 2 [2 0; 0 0] + 2 [0 0; 0 1] = diag(4, 2)."""
    method = build("flexlora", rank=2, alpha=4.0)
    first = state([[0.0, 0.0]] * 2, [[0.0, 0.0]] * 2)
    a, b = state([[1.0, 0.0]], [[2.0], [0.0]]), state([[0.0, 1.0]], [[0.0], [1.0]])
    after = method.aggregate(first, uploads((5, a), (5, b)))
    torch.testing.assert_close(after["A"]["s"], torch.eye(2))
    torch.testing.assert_close(after["B"]["s"], torch.diag(torch.tensor([4.0, 2.0])))
    one = method.broadcast(after, Client("x", 1, 1), 2)
    torch.testing.assert_close(one["B"]["s"], torch.tensor([[1.0], [0.0]]))  # 4 / (alpha / 1)
    two = method.broadcast(after, Client("x", 1, 2), 2)
    torch.testing.assert_close(two["B"]["s"], torch.diag(torch.tensor([2.0, 1.0])))  # / (alpha / 2)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ranks", [[1, 2, 3], [4, 4, 4], [1], [3, 1, 4, 1, 5]])
def test_flexlora_is_the_best_of_each_rank(rslora: bool, ranks: list[int]) -> None:
    method = build("flexlora", rank=5, alpha=7.0, rslora=rslora)
    first = method.init(SITES, lora.generator(0))
    sent = random_uploads(ranks)
    after = method.aggregate(first, sent)
    want = ideal(method, sent)
    for r in range(1, 6):
        got = served(method, after, Client("x", 1, r), SITES)
        for site, D in want.items():
            U, S, Vh = torch.linalg.svd(D, full_matrices=False)
            torch.testing.assert_close(got[site], U[:, :r] * S[:r] @ Vh[:r], rtol=1e-9, atol=1e-9)


def test_flexlora_ranks_that_were_not_filled_keep_a_direction() -> None:
    method = build("flexlora", rank=4)
    first = {k: {s: x.double() for s, x in g.items()} for k, g in method.init(SITES, lora.generator(0)).items()}
    after = method.aggregate(first, random_uploads([1]))
    for site in SITES:
        assert (after["B"][site][:, 1:] == 0).all() and torch.equal(after["A"][site][1:], first["A"][site][1:])


def test_flexlora_spectrum_shrinks_by_the_share_that_holds_it() -> None:
    """Clients that send back what they received: direction i decays by pi_i, the weight of those with rank >= i."""
    method = build("flexlora", rank=4, alpha=3.0)
    D = random_uploads([4])[0]
    at = method.aggregate(method.init(SITES, lora.generator(0)), [D])
    spectrum = {site: torch.linalg.svdvals(at["B"][site]) for site in SITES}
    clients = [Client("a", 2, 1), Client("b", 3, 2), Client("c", 5, 4)]
    share = torch.tensor([1.0, 0.8, 0.5, 0.5], dtype=torch.float64)
    for t in range(1, 4):
        at = method.aggregate(at, [Upload(c, method.broadcast(at, c, t), t) for c in clients])
        for site in SITES:
            want = spectrum[site] * share**t
            torch.testing.assert_close(torch.linalg.svdvals(at["B"][site]), want.sort(descending=True).values)


# HetLoRA


def test_hetlora_by_hand() -> None:
    """||B A||_F of rank-1 factors is |B| |A|: weights 5 * 2 = 10 and 2 * 15 = 30, whatever the numbers of examples."""
    method = build("hetlora", rank=2, alpha=2.0)
    first = state([[0.0, 0.0]] * 2, [[0.0, 0.0]] * 2)
    a, b = state([[2.0, 0.0]], [[3.0], [4.0]]), state([[0.0, 15.0], [0.0, 0.0]], [[0.0, 8.0], [2.0, 4.0]])
    after = method.aggregate(first, uploads((100, a), (1, b)))
    torch.testing.assert_close(after["A"]["s"], torch.tensor([[0.5, 11.25], [0.0, 0.0]]))
    torch.testing.assert_close(after["B"]["s"], torch.tensor([[0.75, 6.0], [2.5, 3.0]]))
    assert {k: int(r) for k, r in after["ranks"].items()} == {"c0": 1, "c1": 2}


def test_hetlora_with_equal_norms_and_ranks_is_fedit() -> None:
    sent = random_uploads([4, 4, 4])
    for u in sent:
        norm = torch.stack([lora.product_norm(u.state["B"][s], u.state["A"][s]) for s in SITES]).norm()
        for site in SITES:
            u.state["B"][site] /= norm
    sent = [Upload(Client(u.client.id, 1, 4), u.state, 1) for u in sent]
    first = {"A": sent[0].state["A"], "B": sent[0].state["B"]}
    het, plain = build("hetlora", rank=4).aggregate(first, sent), build("fedit", rank=4).aggregate(first, sent)
    for role in ("A", "B"):
        for site in SITES:
            torch.testing.assert_close(het[role][site], plain[role][site], rtol=1e-12, atol=1e-12)


def tail(at: State, g: int) -> Tensor:
    return torch.stack([at["B"][s][:, g:].norm() * at["A"][s][g:].norm() for s in SITES]).sum()


def test_hetlora_penalty_is_the_norm_of_the_tail_and_has_finite_gradients() -> None:
    method = build("hetlora", rank=4, gamma=0.5, tail_weight=0.25)
    at = random_uploads([4])[0].state
    got = method.penalty(at, {})
    assert got is not None
    torch.testing.assert_close(got, 0.25 * tail(at, 2))
    zero: State = {"A": {s: x.clone().requires_grad_() for s, x in at["A"].items()}, "B": {}}
    zero["B"] = {s: torch.zeros_like(x).requires_grad_() for s, x in at["B"].items()}
    for which in (zero, {r: {s: x.clone().requires_grad_() for s, x in g.items()} for r, g in at.items()}):
        penalty = method.penalty(which, {})
        assert penalty is not None
        penalty.backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for g in which.values() for x in g.values())
    assert build("hetlora", rank=4, tail_weight=0.0).penalty(at, {}) is None


@pytest.mark.parametrize("factor, rank", [(0.9, 2), (1.0, 4), (1.1, 4)])
def test_hetlora_prunes_itself_where_the_tail_shrank(factor: float, rank: int) -> None:
    method = build("hetlora", rank=4, gamma=0.5)
    at = random_uploads([4])[0].state
    client = Client("c0", 3, 4)
    received = method.broadcast(at, client, 1)
    work = method.prepare(received, {}, SITES, client, 1)
    trained: State = {"A": received["A"], "B": {s: x.clone() for s, x in received["B"].items()}}
    for x in trained["B"].values():
        x[:, 2:] *= factor
    sent, _ = method.finish(work, trained, received)
    assert {x.shape[0] for x in sent["A"].values()} == {x.shape[1] for x in sent["B"].values()} == {rank}
    after = method.aggregate(at, [Upload(client, sent, 1)])
    assert {x.shape[0] for x in method.broadcast(after, client, 2)["A"].values()} == {rank}, "and stays there"
    assert method.broadcast(after, Client("new", 1, 3), 2)["A"]["layers.0.in"].shape[0] == 3
    kept = build("hetlora", rank=4, gamma=0.5, prune=False).finish(work, trained, received)[0]
    assert {x.shape[0] for x in kept["A"].values()} == {4}


def test_hetlora_never_prunes_to_nothing() -> None:
    method = build("hetlora", rank=1)
    at = random_uploads([1])[0].state
    work = method.prepare(at, {}, SITES, Client("a", 1, 1), 1)
    sent, _ = method.finish(work, slices.take(at, {}), at)
    assert {x.shape[0] for x in sent["A"].values()} == {1}


def test_hetlora_before_anyone_has_learnt_is_a_plain_mean() -> None:
    method = build("hetlora", rank=1)
    a, b = state([[1.0, 0.0]], [[0.0], [0.0]]), state([[3.0, 4.0]], [[0.0], [0.0]])
    after = method.aggregate(ZERO | {"B": {"s": torch.zeros(2, 1)}}, uploads((1, a), (9, b)))
    torch.testing.assert_close(after["A"]["s"], torch.tensor([[2.0, 2.0]]))


@pytest.mark.parametrize("fields", [{"gamma": 0.0}, {"gamma": 1.1}, {"tail_weight": -1.0}])
def test_hetlora_refuses(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build("hetlora", **fields)


# between methods


def test_exact_methods_agree_and_the_factor_average_does_not() -> None:
    sent = random_uploads([2, 2, 2])
    found = {}
    for name, rank in (("fedex_lora", 2), ("flexlora", 6), ("fedit", 2)):
        method = build(name, rank=rank, alpha=6.0)
        first = method.init(SITES, lora.generator(0))
        found[name] = served(method, method.aggregate(first, sent), Client("x", 1, rank), SITES)
    for site in SITES:
        # The rank of D is 6: no layer is smaller than 5, and all of it is served.
        torch.testing.assert_close(found["fedex_lora"][site], found["flexlora"][site], rtol=1e-8, atol=1e-8)
        assert (found["fedit"][site] - found["fedex_lora"][site]).norm() > 0.1 * found["fedex_lora"][site].norm()


@pytest.mark.parametrize("name, changes", [("flexlora", False), ("fedit", True), ("fedex_lora", False)])
def test_gauge(name: str, changes: bool) -> None:
    """(B R, R^-1 A) is the same client model: a sum of products does not see it, a mean of factors does.

    FedEx averages factors too, but its residual makes up for it.
    """
    method = build(name, rank=3)
    first = method.init(SITES, lora.generator(0))
    plain = random_uploads([3, 3])
    turned = []
    for i, u in enumerate(plain):
        R = torch.linalg.qr(torch.randn(3, 3, generator=lora.generator("R", i), dtype=torch.float64))[0] * (i + 2)
        A = {s: torch.linalg.inv(R) @ x for s, x in u.state["A"].items()}
        turned.append(Upload(u.client, {"A": A, "B": {s: x @ R for s, x in u.state["B"].items()}}, 1))
    a, b = (served(method, method.aggregate(first, x), Client("x", 1, 3), SITES) for x in (plain, turned))
    for site in SITES:
        assert torch.allclose(a[site], b[site], rtol=1e-8, atol=1e-8) != changes


@pytest.mark.parametrize("name", ["fedit", "ffa_lora", "flexlora", "fedex_lora"])
def test_a_common_factor_of_all_weights_does_not_matter(name: str) -> None:
    method = build(name, rank=3)
    first = method.init(SITES, lora.generator(0))
    plain = random_uploads([3, 3])
    if name == "ffa_lora":
        plain = [Upload(u.client, lora.only(u.state, "B"), 1) for u in plain]
    more = [Upload(Client(u.client.id, 8 * u.client.examples, 3), u.state, 1) for u in plain]
    a, b = method.aggregate(first, plain), method.aggregate(first, more)
    for site in SITES:
        torch.testing.assert_close(a["B"][site], b["B"][site], rtol=1e-12, atol=1e-12)
