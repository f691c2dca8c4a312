"""Noise: normal, of the variance that was asked for, from the key and what is noised alone."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from fedloom.privacy.noise import digest, noised, normals, uniforms

KEY = bytes(range(32))


def test_normals_are_normal() -> None:
    x = normals(KEY, 1_000_000, "test")
    assert float(x.var()) == pytest.approx(1.0, rel=0.01) and abs(float(x.mean())) < 5e-3
    assert stats.kstest(x[:200_000].numpy(), "norm").pvalue > 1e-4
    assert abs(float((x[1:] * x[:-1]).mean())) < 5e-3
    u = uniforms(KEY, 1000, "test")
    assert float(u.min()) > 0 and float(u.max()) < 1 and x[:1000].isfinite().all()


def test_the_key_and_the_context_make_the_noise() -> None:
    a = normals(KEY, 100, "run", 1)
    assert torch.equal(a, normals(KEY, 100, "run", 1))
    for other in (normals(KEY, 100, "run", 2), normals(KEY[::-1], 100, "run", 1)):
        assert abs(float(torch.corrcoef(torch.stack([a, other]))[0, 1])) < 0.5


@pytest.mark.parametrize("std", [1e-4, 0.7, 50.0])
def test_noised_numbers_lie_on_a_grid_that_is_fine_beside_the_noise(std: float) -> None:
    x = torch.linspace(-3, 3, 200_000, dtype=torch.float64)
    y = noised(x, std, KEY, "test")
    assert float((y - x).std()) == pytest.approx(std, rel=0.01)
    step = 2.0 ** math.floor(math.log2(std * 2**-30))
    assert torch.equal((y / step).round() * step, y)
    assert torch.equal(noised(x, 0.0, KEY, "test"), x)


def test_digests_tell_states_apart() -> None:
    state = {"A": {"x": torch.ones(2, 3)}}
    others = [
        {"A": {"x": torch.ones(3, 2)}},
        {"B": {"x": torch.ones(2, 3)}},
        {"A": {"x": torch.ones(2, 3, dtype=torch.float64)}},
        {"A": {"x": torch.ones(2, 3) + 1e-7}},
    ]
    assert len({digest(s) for s in [state, *others]}) == 5 and digest(state) == digest({"A": {"x": torch.ones(2, 3)}})
