"""Secure sums in the simulator: the methods' own rounds, with masked uploads and nothing else crossing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom.core import Client, State, Trained, Work
from fedloom.errors import MethodError, RoundError
from fedloom.loop import Limits, one_round
from fedloom.methods import build
from fedloom.privacy.exchange import Aggregator, Masked
from fedloom.privacy.fixed_point import FixedPoint
from fedloom.privacy.secure_visits import SecureSimulation, SecureSums

from ..methods.cases import CASES, EXAMPLES, RANK, Case, Rows, ToyTrainer, engine, start

sums = pytest.mark.parametrize("case", [c for c in CASES if not (c.each or c.integers)], ids=lambda case: case.label)


def secure(trainer: ToyTrainer | None = None, **rule: Any) -> Callable[..., SecureSimulation[Rows]]:
    """What makes the engine."""

    def make(*args: Any, **kwargs: Any) -> SecureSimulation[Rows]:
        made: SecureSimulation[Rows] = SecureSimulation(*args, **kwargs)
        made.sums = SecureSums(**rule)
        return made

    return make


def toy(**rule: Any) -> Any:
    return engine(ToyTrainer(optimizer="sgd"), kind=secure(**rule))


@sums
def test_the_opened_sum_is_the_plain_integer_sum_of_what_clients_encode(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and what the server takes is none of it."""
    bare: list[Tensor] = []
    encode = FixedPoint.encode

    def noted(self: FixedPoint, x: Tensor) -> Tensor:
        bare.append(encode(self, x))
        return bare[-1]

    taken: list[Tensor] = []
    take = Aggregator.take

    def watched(self: Aggregator, client: str, masked: Masked) -> None:
        taken.append(masked.words)
        take(self, client, masked)

    opened: list[tuple[Tensor, Tensor]] = []
    open_ = Aggregator.open

    def checked(self: Aggregator, answers: Any) -> Tensor:
        total = open_(self, answers)
        opened.append((total, torch.stack(bare).sum(0)))
        bare.clear()
        return total

    monkeypatch.setattr(FixedPoint, "encode", noted)
    monkeypatch.setattr(Aggregator, "take", watched)
    monkeypatch.setattr(Aggregator, "open", checked)
    method = case.method()
    first = start(method, dtype=torch.float64)
    at = toy(least=2, cover=1)
    at.fresh = {"head": first["head"]}
    _, record = one_round(method, at, first, case.clients(), 1)
    assert len(opened) >= 1 and all(torch.equal(a, b) for a, b in opened)
    assert not record.dropped and record.up.by_role["masks"] > 0
    for words in taken:  # masked: half of all words are beyond 2^62 in size
        assert words.double().abs().median() > 2**58


def nearly(a: State, b: State, atol: float) -> None:
    assert a.keys() == b.keys()
    for role, group in a.items():
        for site, x in group.items():
            torch.testing.assert_close(b[role][site], x, rtol=0, atol=atol)
            assert b[role][site].dtype == x.dtype


@pytest.mark.parametrize("table", [{"name": "fedit"}, {"name": "ffa_lora"}, {"name": "fed_sb"}, {"name": "fedask"}])
def test_a_round_is_the_plain_round_up_to_the_grid(table: dict[str, Any]) -> None:
    method = build(table, {"rank": RANK})
    clients = [Client(k, n, RANK) for k, n in EXAMPLES.items()]
    first = start(method, dtype=torch.float64)
    states = []
    for at in (engine(ToyTrainer(optimizer="sgd")), toy()):
        at.fresh = {"head": first["head"]}
        states.append(one_round(method, at, first, clients, 1)[0])
    nearly(states[0], states[1], 1e-8 if table["name"] in ("fed_sb", "fedask") else 1e-11)


def test_bytes_of_words_and_masks_are_counted() -> None:
    method = build({"name": "fedit"}, {"rank": RANK})
    clients = [Client(k, n, RANK) for k, n in EXAMPLES.items()]
    for bits in (32, 64):
        _, record = one_round(method, toy(bits=bits, limit=64.0), start(method), clients, 1)
        _, plain = one_round(method, engine(), start(method), clients, 1)
        assert {r: n for r, n in record.up.by_role.items() if r != "masks"} == {
            r: n * bits // 32 for r, n in plain.up.by_role.items()
        }
        # 4 seeds of 16 bytes: three boxes with a tag, four hashes, and a share of four own seeds.
        assert record.up.by_role["masks"] == 4 * (3 * (4 * 16 + 16) + 4 * 16 + 4 * 16)
        assert sum(up for _, up in record.per_client.values()) == sum(record.up.by_role.values())


class Diverging(ToyTrainer):
    """One client's numbers are not finite, or larger than the others'."""

    value = float("nan")

    def fit(self, works: Sequence[tuple[Client, Work]], data: Sequence[Rows], t: int, part: int = 0) -> list[Trained]:
        made = super().fit(works, data, t, part)
        for (client, _), done in zip(works, made, strict=True):
            if client.id == "b":
                next(iter(done.state["A"].values()))[0, 0] = self.value
        return made


@pytest.mark.parametrize(
    "value, why",
    [(float("nan"), "has a NaN or an infinite number"), (1e6, "is beyond the limit 65536 of the secure sum")],
)
def test_a_client_whose_numbers_do_not_fit_says_so_itself_and_the_rest_is_summed(value: float, why: str) -> None:
    trainer = Diverging()
    trainer.value = value
    method = build({"name": "fedit"}, {"rank": RANK})
    clients = [Client(k, n, RANK) for k, n in EXAMPLES.items()]
    at = engine(trainer, kind=secure())
    state, record = one_round(method, at, start(method), clients, 1)
    assert record.dropped.keys() == {"b"} and why in record.dropped["b"]
    rest, _ = one_round(method, engine(), start(method), [c for c in clients if c.id != "b"], 1)
    nearly(rest, state, 1e-6)
    with pytest.raises(
        RoundError, match=r"3 of 4 clients sent a masked upload, expected at least 4 \(privacy.min_clients"
    ):
        one_round(method, engine(trainer, kind=secure(least=4)), start(method), clients, 1)


def test_methods_that_read_each_upload_are_refused() -> None:
    method = build({"name": "flexlora"}, {"rank": RANK})
    with pytest.raises(MethodError, match="flexlora awaits Each: it reads every upload, and a secure sum hides them"):
        one_round(method, toy(), start(method), [Client(k, n, RANK) for k, n in EXAMPLES.items()], 1)


def test_what_fewer_than_min_clients_train_is_not_summed() -> None:
    """Ranks 1, 2, 3, 4: the last two columns have two clients or one, and stay as they were."""
    method = build({"name": "ffa_lora"}, {"rank": RANK})
    clients = [Client(k, 10, rank) for rank, k in enumerate("abcd", 1)]
    first = start(method)
    moved, _ = one_round(method, toy(cover=2), first, clients, 1)
    state, _ = one_round(method, toy(cover=3), first, clients, 1)
    for site, B in state["B"].items():
        before, free = first["B"][site], moved["B"][site]
        assert not torch.equal(B[:, 0], before[:, 0]) and not torch.equal(B[:, 1], before[:, 1])
        torch.testing.assert_close(B[:, 2:], before[:, 2:], rtol=0, atol=1e-6)
        assert not torch.allclose(free[:, 2], before[:, 2], rtol=0, atol=1e-6)
        torch.testing.assert_close(free[:, 3], before[:, 3], rtol=0, atol=1e-6)


def test_what_cannot_be_left_out_is_refused() -> None:
    method = build({"name": "fednova", "over": {"name": "fslora"}}, {"rank": RANK})
    clients = [Client(k, 10, rank) for rank, k in enumerate("abcd", 1)]
    with pytest.raises(RoundError, match=r"fewer than 3 clients \(privacy.min_cover\).*missing role .*nova_tau"):
        one_round(method, toy(), start(method), clients, 1)


def test_a_small_cohort_and_a_quorum() -> None:
    method = build({"name": "fedit"}, {"rank": RANK})
    clients = [Client(k, n, RANK) for k, n in EXAMPLES.items()]
    at = toy()
    at.cohort = 3
    first = start(method)
    got, _ = one_round(method, at, first, clients, 1, limits=Limits(quorum=4))
    want, _ = one_round(method, toy(), first, clients, 1)
    nearly(want, got, 0.0)  # integers: the same bytes, whatever the cohort and the keys


def test_layouts_are_of_the_shared_space() -> None:
    """The words of clients of rank 1 and 4 are as many: where a client holds nothing, it adds zero."""
    method = build({"name": "fslora"}, {"rank": RANK})
    made: Any = engine(ToyTrainer(), kind=secure(least=2))  # type: ignore[arg-type]
    clients = [Client(k, n, rank) for rank, (k, n) in enumerate(EXAMPLES.items(), 1)]
    _, record = one_round(method, made, start(method), clients, 1)
    sizes = {up for _, up in record.per_client.values()}
    assert len(sizes) == 1
