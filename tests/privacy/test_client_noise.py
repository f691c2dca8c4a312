"""Noise in integers from the clients: its law, its size whoever drops out, and that it is all that differs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedloom.core import Client, Trained, Work
from fedloom.errors import RoundError
from fedloom.loop import one_round
from fedloom.methods import build
from fedloom.privacy.accountant import Release, epsilon
from fedloom.privacy.client_level import ClientLevel
from fedloom.privacy.client_noise import GRID, noisy_terms
from fedloom.privacy.exchange import Terms
from fedloom.privacy.fixed_point import FixedPoint
from fedloom.privacy.keys import RunKey
from fedloom.privacy.secure_visits import SecureSimulation, SecureSums
from fedloom.privacy.skellam import log_probability, poisson, skellam

from ..methods.cases import RANK, Rows, ToyTrainer, engine, flat, start

KEY = bytes(range(32))
KEYS: dict[str, RunKey] = {}


def test_poisson_numbers_have_their_law() -> None:
    x, rate = poisson(120.0, KEY, 100_000, "test").numpy(), 120.0
    edges = np.unique(stats.poisson.ppf(np.linspace(0.02, 0.98, 30), rate))
    seen = np.bincount(np.searchsorted(edges, x), minlength=len(edges) + 1)
    expected = np.diff([0, *stats.poisson.cdf(edges, rate), 1]) * len(x)
    assert stats.chisquare(seen, expected).pvalue > 1e-4
    k = torch.arange(80, 170, dtype=torch.float64)
    torch.testing.assert_close(log_probability(k, rate), torch.from_numpy(stats.poisson.logpmf(k.numpy(), rate)))


@pytest.mark.parametrize("std", [2.0**10, 2.0**22])
def test_skellam_numbers_are_integers_of_the_variance_asked_for(std: float) -> None:
    x = skellam(std**2, KEY, 300_000, "test").double() / std
    assert float(x.var()) == pytest.approx(1.0, rel=0.01) and abs(float(x.mean())) < 0.01
    assert stats.kstest(x[:100_000].numpy(), "norm").pvalue > 1e-4
    assert torch.equal(skellam(std**2, KEY, 9, "test"), skellam(std**2, KEY, 9, "test"))
    with pytest.raises(ValueError, match="variance 1e"):
        skellam(1e30, KEY, 9)


def test_epsilon_of_integer_noise_is_the_renyi_bound_of_gaussian_noise_and_a_little() -> None:
    """Against another accountant's Renyi values: the closed form of the Gaussian is a tenth smaller."""
    for z, T, delta, renyi in ((1.0, 1, 1e-5, 4.728507), (4.0, 20, 1e-3, 4.052805), (4.0, 20, 1e-5, 5.377728)):
        found = epsilon([Release(z, T, grid=GRID)], delta)
        assert epsilon([Release(z, T)], delta) < renyi * 0.9999 < found < renyi * 1.03
        assert found < epsilon([Release(z, T, grid=2.0)], delta)
    assert epsilon([Release(4.0, 10, grid=GRID), Release(4.0, 10)], 1e-5) == pytest.approx(
        epsilon([Release(4.0, 20, grid=GRID)], 1e-5), rel=1e-4
    )


def terms(n: int, **fixed: Any) -> Terms:
    keys = {f"{i:03d}": KEYS.setdefault(f"{i:03d}", RunKey()).public for i in range(n)}
    return Terms("run", 1, keys, FixedPoint(n, **{"limit": 1.0, "bits": 64} | fixed), least=3)


@pytest.mark.parametrize(
    "n, bits, least, honest", [(3, 64, 3, 3), (4, 64, 3, 2), (10, 32, 7, 4), (100, 64, 67, 34), (200, 64, 160, 140)]
)
def test_as_few_as_a_sum_is_opened_for_less_the_colluding_make_the_noise(
    n: int, bits: int, least: int, honest: int
) -> None:
    z, C, numbers = 2.0, 0.5, 40_000
    made, shares = noisy_terms(terms(n, bits=bits), z, C, torch.ones(numbers, dtype=torch.bool))
    grid = 2.0**-made.fixed.fraction
    assert made.least == least and C / grid >= GRID
    promised = shares.std(honest) * grid
    assert z * C <= promised <= z * C * 1.01
    # Two neighbours' words: one client's change is zero instead, and every number is rounded on its own.
    x = torch.rand(numbers, dtype=torch.float64) - 0.5
    change = torch.randn(numbers, dtype=torch.float64)
    moved = made.fixed.encode(x + change / change.norm() * C) - made.fixed.encode(x)
    assert float(moved.double().norm()) * z <= shares.std(honest)


def test_a_grid_too_coarse_is_refused() -> None:
    with pytest.raises(RoundError, match=r"steps of the secure sum's grid, too few.*set privacy.bits to 64"):
        noisy_terms(terms(10, bits=32, limit=65536.0), 1.0, 0.5, torch.ones(40_000, dtype=torch.bool))


class Lost(ToyTrainer):
    """Clients whose numbers are not finite send nothing."""

    lost: tuple[str, ...] = ()

    def fit(self, works: Sequence[tuple[Client, Work]], data: Sequence[Rows], t: int, part: int = 0) -> list[Trained]:
        made = super().fit(works, data, t, part)
        for (client, _), done in zip(works, made, strict=True):
            if client.id in self.lost:
                next(iter(done.state["B"].values())).fill_(1e9)
        return made


def rounded(z: float, lost: tuple[str, ...] = (), key: bytes = KEY, clip: float = 1e3) -> tuple[Any, Any]:
    def kind(*args: Any, **options: Any) -> SecureSimulation[Rows]:
        made: SecureSimulation[Rows] = SecureSimulation(*args, **options)
        made.sums = SecureSums(keys=KEYS)
        return made

    trainer = Lost(optimizer="sgd")
    trainer.lost = lost
    method = ClientLevel(
        over=build({"name": "fedit"}, {"rank": RANK}), clip=clip, noise_multiplier=z, noise="clients", key=key
    )
    at: Any = engine(trainer, kind=kind)
    rows = engine().data("a")
    at.data = lambda client: rows
    clients = [Client(f"{i:03d}", 10, RANK) for i in range(7)]
    return one_round(method, at, start(method), clients, 1)


@pytest.mark.parametrize("lost", [(), ("001",), ("001", "005")])
def test_the_noise_is_enough_whoever_drops_out(lost: tuple[str, ...]) -> None:
    """Of 7 clients 5 open a sum, and 2 of those may collude: 3 shares are the promise. A lost client is beyond its clip."""
    z, clip, n = 1.0, 1e10 if lost else 1e3, 7 - len(lost)
    quiet, _ = rounded(0.0, lost, clip=clip)
    diffs = []
    for i in range(8):
        state, record = rounded(z, lost, bytes([i]) * 32, clip=clip)
        assert len(record.dropped) == len(lost)
        diffs += [
            (x - quiet[role][site]).flatten() / clip for role in ("A", "B", "head") for site, x in state[role].items()
        ]
    found = float(torch.cat(diffs).double().std()) * n
    assert found == pytest.approx(z * math.sqrt(n / 3), rel=0.07) and found > z
    assert record.report["noise_std"] == pytest.approx(z * clip * math.sqrt(n / 3) / n, rel=2e-3)


def test_a_repeated_round_repeats_its_noise() -> None:
    assert flat(rounded(1.0)[0]) == flat(rounded(1.0)[0])
    assert flat(rounded(1.0)[0]) != flat(rounded(1.0, key=bytes(32))[0])
