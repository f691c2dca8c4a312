from __future__ import annotations

import pytest
import torch

from fedloom.core import Client
from fedloom.loop import federate
from fedloom.methods import build
from fedloom.state import only

from .cases import EXAMPLES, RANK, SITES, after, engine, flat, random_uploads, start, state, uploads

LORA = {"rank": 2, "alpha": 2.0}
BEFORE = state([[9.0, 9.0]] * 2, [[9.0, 9.0]] * 2)
ONE, TWO = state([[1.0, 2.0]], [[4.0], [8.0]]), state([[5.0, 6.0], [7.0, 8.0]], [[0.0, 4.0], [4.0, 8.0]])


def test_zero_padding_by_hand() -> None:
    """Weights 3/4 and 1/4, ranks 1 and 2: what the first does not hold counts as zero."""
    at = after(build({"name": "zero_padding"}, LORA), BEFORE, uploads((3, ONE), (1, TWO)))
    assert at["A"]["s"].tolist() == [[2.0, 3.0], [1.75, 2.0]]
    assert at["B"]["s"].tolist() == [[3.0, 1.0], [7.0, 2.0]]


def test_replication_padding_by_hand() -> None:
    """The second rank is the second client's: what the first does not hold is filled with it."""
    at = after(build({"name": "replication_padding"}, LORA), BEFORE, uploads((3, ONE), (1, TWO)))
    assert at["A"]["s"].tolist() == [[2.0, 3.0], [7.0, 8.0]]
    assert at["B"]["s"].tolist() == [[3.0, 4.0], [7.0, 8.0]]


def test_replication_is_the_average_of_uploads_filled_with_that_of_the_clients_of_high_rank() -> None:
    """The paper's two steps, done as it says them."""
    sent = random_uploads([2, 4, 2, 4])
    n = [client.examples for client, _ in sent]
    method = build({"name": "replication_padding"}, {"rank": 4})
    at = after(method, start(method, dtype=torch.float64), sent)
    for site in SITES:
        A = [x["A"][site] for _, x in sent]
        high = (n[1] * A[1] + n[3] * A[3]) / (n[1] + n[3])
        filled = [torch.cat([x, high[len(x) :]]) for x in A]
        want = sum(k * x for k, x in zip(n, filled, strict=True)) / sum(n)
        torch.testing.assert_close(at["A"][site], want)


@pytest.mark.parametrize("name", ["zero_padding", "replication_padding"])
def test_ranks_that_nobody_holds_stay(name: str) -> None:
    at = after(build({"name": name}, LORA), BEFORE, uploads((3, ONE), (2, ONE)))
    assert at["A"]["s"].tolist() == [[1.0, 2.0], [9.0, 9.0]]
    assert at["B"]["s"].tolist() == [[4.0, 9.0], [8.0, 9.0]]


@pytest.mark.parametrize("name", ["zero_padding", "replication_padding"])
def test_at_equal_ranks_it_is_fedit(name: str) -> None:
    method, plain = build({"name": name}, {"rank": RANK}), build({"name": "fedit"}, {"rank": RANK})
    clients = [Client(k, n, RANK) for k, n in EXAMPLES.items()]
    got, want = (federate(m, engine(), start(m), clients, 3) for m in (method, plain))
    assert flat(only(got, "A", "B", "head")) == flat(want)


@pytest.mark.parametrize(("name", "shrinks"), [("zero_padding", True), ("replication_padding", False)])
def test_clients_that_learn_nothing(name: str, shrinks: bool) -> None:
    """Zero padding shrinks rank i by pi_i in both factors, the product by its square; replication changes nothing."""
    method = build({"name": name}, {"rank": 4})
    first = after(method, start(method, dtype=torch.float64), random_uploads([4, 4]))
    clients = [Client("a", 2, 1), Client("b", 3, 2), Client("c", 5, 4)]
    at = after(method, first, [(c, only(method.serve(first, c), "A", "B")) for c in clients])
    pi = torch.tensor([1.0, 0.8, 0.5, 0.5] if shrinks else [1.0] * 4, dtype=torch.float64)
    for site in SITES:
        torch.testing.assert_close(at["A"][site], first["A"][site] * pi[:, None])
        torch.testing.assert_close(at["B"][site], first["B"][site] * pi)
