from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from fedloom.core import Client, Method, State, Visit
from fedloom.errors import ConfigError
from fedloom.loop import Limits, Record, federate, one_round
from fedloom.methods import build
from fedloom.methods.fedit import FedIT
from fedloom.methods.robust import Median, MultiKrum, NormFilter, RobustMean, TrimmedMean

from .cases import RANK, SITES, ToyTrainer, after, engine, flat, start, state

ZERO = state([[0.0, 0.0]], [[0.0], [0.0], [0.0]])


def answered(method: Method, values: list[float], examples: list[int] | None = None) -> list[float]:
    """What the server's A becomes of uploads that are `value` everywhere; A's two entries are opposite in sign."""
    sent = []
    for i, (x, n) in enumerate(zip(values, examples or [1] * len(values), strict=True)):
        sent.append((Client(f"c{i}", n, 1), state([[x, -x]], [[x], [0.0], [x]])))
    new = after(method, ZERO, sent)
    A, B = new["A"]["s"].flatten().tolist(), new["B"]["s"].flatten().tolist()
    assert pytest.approx([A[0], 0.0, A[0]]) == B
    return A


@pytest.mark.parametrize(
    "table, values, want",
    [
        ({"name": "median"}, [1.0, 9.0, 2.0], 2.0),
        ({"name": "median"}, [1.0, 9.0, 2.0, 4.0], 3.0),
        ({"name": "median"}, [5.0], 5.0),
        ({"name": "trimmed_mean", "trim": 0.2}, [-100.0, 1.0, 2.0, 6.0, 100.0], 3.0),
        ({"name": "trimmed_mean", "trim": 0.1}, [-100.0, 1.0, 2.0, 6.0, 100.0], 3.0),  # rounded up
        ({"name": "trimmed_mean", "trim": 0.49}, [1.0, 3.0], 2.0),  # the middle stays
        # f = 1, K = 5: two nearest others each; 100 is the farthest, the plain mean of the other four stays.
        ({"name": "multi_krum"}, [1.0, 2.0, 100.0, 3.0, 4.0], 2.5),
        ({"name": "multi_krum", "attackers": 2}, [1.0, 2.0, 50.0, 90.0, 3.0, 4.0, 5.0], 3.0),
        ({"name": "multi_krum", "attackers": 0}, [1.0, 2.0, 3.0], 2.0),
        ({"name": "norm_filter", "factor": 2.0}, [1.0, 2.0, 3.0, 5.0], 2.75),
        ({"name": "norm_filter", "factor": 2.0}, [1.0, 2.0, 3.0, 5.1], 2.0),
    ],
)
def test_rules_by_hand(table: dict[str, object], values: list[float], want: float) -> None:
    method = build(table, {"rank": 1})
    assert answered(method, values) == pytest.approx([want, -want])
    # The order in which uploads come does not matter: every client is worth one.
    assert answered(method, values[::-1]) == pytest.approx([want, -want])


def test_weights_count_in_the_filter_alone() -> None:
    values, examples = [1.0, 2.0, 3.0], [8, 1, 1]
    assert answered(build({"name": "norm_filter"}, {"rank": 1}), values, examples)[0] == pytest.approx(1.3)
    for name in ("median", "multi_krum"):
        assert answered(build({"name": name}, {"rank": 1}), values, examples)[0] == pytest.approx(2.0)


def test_scores_of_krum_are_those_of_the_definition() -> None:
    """Random uploads in two dimensions, against loops over the definition."""
    rng = torch.Generator().manual_seed(5)
    points = torch.randn(9, 2, generator=rng)
    f, K = 2, 9
    sent = [(Client(f"c{i}", 1, 1), state([p.tolist()], [[0.0], [0.0], [0.0]])) for i, p in enumerate(points)]
    scores = []
    for i in range(K):
        distances = sorted(float((points[i] - points[j]).square().sum()) for j in range(K) if j != i)
        scores.append(sum(distances[: K - f - 2]))
    best = sorted(range(K), key=lambda i: scores[i])[: K - f]
    new = after(build({"name": "multi_krum", "attackers": f}, {"rank": 1}), ZERO, sent)
    torch.testing.assert_close(new["A"]["s"][0], points[best].mean(0))


@dataclass(frozen=True, kw_only=True)
class Attacked(FedIT):
    """Client a sends what it trained, reversed and a hundred times as far."""

    name: ClassVar[str] = "attacked"

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        sent, kept = await super().client(received, own, visit)
        if visit.client.id != "a":
            return sent, kept
        return {
            r: {s: received[r][s] - 100 * (x - received[r][s]) for s, x in g.items()} for r, g in sent.items()
        }, kept


OPEN = Limits(max_ratio=None)
"""The loop lets everything through: the methods are left to themselves."""

RULES: list[type[RobustMean]] = [Median, TrimmedMean, MultiKrum, NormFilter]


@pytest.mark.parametrize("rule", RULES)
def test_training_goes_on_under_attack(rule: type[RobustMean]) -> None:
    clients = [Client(k, 10, RANK) for k in "abcdefg"]
    trainer = ToyTrainer(lr=0.01, steps=5)

    def loss(method: Method) -> list[float]:
        losses: list[float] = []

        def note(state: State, record: Record) -> None:
            losses.append(sum(record.metrics[k]["loss"] for k in "bcdefg"))

        federate(method, engine(trainer), start(method), clients, 6, limits=OPEN, on_round=note)
        return losses

    plain = Attacked(rank=RANK, alpha=6.0)
    robust = rule(over=plain) if rule is not TrimmedMean else TrimmedMean(over=plain, trim=0.2)
    defended, open_ = loss(robust), loss(plain)
    assert defended[-1] < 0.8 * defended[0] and open_[-1] > 2 * open_[0]


def test_what_was_left_out_is_reported() -> None:
    clients = [Client(k, 10, RANK) for k in "abcde"]
    method = NormFilter(over=Attacked(rank=RANK))
    _, record = one_round(method, engine(), start(method), clients, 1, limits=OPEN)
    assert record.report["left_out"] == 1.0
    krum = MultiKrum(over=Attacked(rank=RANK), attackers=3)
    _, record = one_round(krum, engine(), start(krum), clients, 1, limits=OPEN)
    assert record.report["withstands"] == 1.0


@pytest.mark.parametrize("rule", RULES)
def test_identical_uploads_are_their_mean(rule: type[RobustMean]) -> None:
    clients = [Client(f"{i}", 12, RANK) for i in range(5)]

    class Same(ToyTrainer):
        def fit(self, works, data, t, part=0):  # type: ignore[no-untyped-def]
            done = super().fit(works[:1], data[:1], t, part)
            return done * len(works)

    plain, first = FedIT(rank=RANK), start(FedIT(rank=RANK))
    want = federate(plain, engine(Same(), cohort=9), first, clients, 2)
    got = federate(rule(over=plain), engine(Same(), cohort=9), first, clients, 2)
    for role, group in want.items():
        for site, x in group.items():
            torch.testing.assert_close(got[role][site], x, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "multi_krum", "norm_filter"])
@pytest.mark.parametrize("over", ["fedex_lora", "flexlora", "hetlora", "fedlora_optimizer"])
def test_methods_that_read_their_uploads_are_refused(name: str, over: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} cannot go over {over}: .* reads each upload itself"):
        build({"name": name, "over": {"name": over}}, {"rank": 4})


def test_a_rank_that_few_clients_trained_stays_with_the_median() -> None:
    """Under FSLoRA a client's upload is the server's own outside its sketch."""
    method = build({"name": "median", "over": {"name": "fslora"}}, {"rank": RANK})
    clients = [Client(k, 10, 1) for k in "abc"]
    first = start(method)
    new = federate(method, engine(), first, clients, 1)
    plain = build({"name": "fslora"}, {"rank": RANK})
    moved = federate(plain, engine(), first, clients, 1)
    still = [(new["B"][s] == first["B"][s]).all(0).sum() for s in SITES]
    assert sum(map(int, still)) > sum(int((moved["B"][s] == first["B"][s]).all(0).sum()) for s in SITES)
    assert flat(new) != flat(first)
