from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedloom.core import Client, State
from fedloom.loop import federate
from fedloom.methods import build
from fedloom.methods.fedrot_lora import rotation
from fedloom.rng import generator

from .cases import CASES, RANK, engine, random_uploads, start, visited

TABLE = {"rank": RANK, "alpha": 6.0}


def turned(client: State, reference: State, t: int, **fields: object) -> State:
    """What a client that trained to `client` sends."""
    method = build({"name": "fedrot_lora", **fields}, TABLE)
    return visited(method, reference, Client("a", 1, RANK), lambda work: client, t)[0]


def random_rotation(r: int, key: int) -> Tensor:
    return rotation(torch.randn(r, r, generator=generator("rotation", key), dtype=torch.float64))


def test_rotation_is_the_best_of_all_angles() -> None:
    """At r = 2, also where the unrestricted optimum is a reflection."""
    angles = torch.linspace(0, 2 * math.pi, 20001, dtype=torch.float64)
    for M in (torch.tensor([[2.0, 1.0], [-0.5, 3.0]]), torch.tensor([[1.0, 2.0], [3.0, -1.0]])):
        M = M.double()
        cos, sin = angles.cos(), angles.sin()
        fits = (M[0, 0] + M[1, 1]) * cos + (M[1, 0] - M[0, 1]) * sin
        R = rotation(M)
        torch.testing.assert_close((R * M).sum(), fits.max(), rtol=1e-7, atol=0)
        torch.testing.assert_close(R.T @ R, torch.eye(2, dtype=torch.float64))
        torch.testing.assert_close(torch.linalg.det(R), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("fields", [{}, {"rotation": 1.0}, {"align": "A"}, {"align": "B"}], ids=str)
@pytest.mark.parametrize("t", [1, 2, 3])
def test_fedrot_lora_sends_the_same_model(fields: dict[str, object], t: int) -> None:
    (_, mine), (_, reference) = random_uploads([RANK, RANK])
    sent = turned(mine, reference, t, **fields)
    for site, A in sent["A"].items():
        torch.testing.assert_close(sent["B"][site] @ A, mine["B"][site] @ mine["A"][site])
        assert torch.equal(A, mine["A"][site]) == (t == 1), "nothing is turned in the first round"


@pytest.mark.parametrize("t", [2, 3])
def test_fedrot_lora_undoes_a_rotation(t: int) -> None:
    """Hard: factors that are a rotation of the common ones come back as those; soft: on the way there."""
    ((_, reference),) = random_uploads([RANK])
    R = {site: random_rotation(RANK, i) for i, site in enumerate(reference["A"])}
    mine = {
        "A": {site: R[site].T @ A for site, A in reference["A"].items()},
        "B": {site: B @ R[site] for site, B in reference["B"].items()},
    }
    hard, soft = turned(mine, reference, t, rotation=1.0), turned(mine, reference, t, rotation=0.6)
    for role in ("A", "B"):
        for site, x in reference[role].items():
            torch.testing.assert_close(hard[role][site], x)
            assert 0 < (soft[role][site] - x).norm() < (mine[role][site] - x).norm()


@pytest.mark.parametrize(("t", "role"), [(2, "A"), (3, "B"), (4, "A")])
def test_fedrot_lora_brings_the_factor_in_turn_nearest(t: int, role: str) -> None:
    """No rotation of a grid brings it nearer, and the other factor's own optimum is another one."""
    (_, mine), (_, reference) = random_uploads([RANK, RANK])
    sent = turned(mine, reference, t, rotation=1.0)
    for site, x in reference[role].items():
        least = (sent[role][site] - x).norm()
        for key in range(200):
            R = random_rotation(RANK, key)
            tried = R.T @ mine["A"][site] if role == "A" else mine["B"][site] @ R
            assert (tried - x).norm() >= least


def test_fedrot_lora_at_lambda_zero_is_fedit() -> None:
    clients = CASES[0].clients()
    plain, method = build({"name": "fedit"}, TABLE), build({"name": "fedrot_lora", "rotation": 0.0}, TABLE)
    want = federate(plain, engine(), start(plain), clients, 3)
    got = federate(method, engine(), start(plain), clients, 3)
    hard = federate(build({"name": "fedrot_lora", "rotation": 1.0}, TABLE), engine(), start(plain), clients, 3)
    for role, group in want.items():
        for site, x in group.items():
            torch.testing.assert_close(got[role][site], x, rtol=1e-4, atol=1e-5)
    assert any((hard["B"][site] - x).abs().max() > 1e-4 for site, x in want["B"].items())
