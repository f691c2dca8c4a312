"""Skellam noise from a secret key: integers, and a sum of such numbers is one again, with the variances added.

A Skellam number is the difference of two Poisson numbers of rate variance / 2. Poisson numbers by transformed rejection
(Hoermann, "The transformed rejection method for generating Poisson random variables", Insurance: Mathematics and Economics
12, 1993, algorithm PTRS), with the law's logarithm as deviance and Stirling's remainder (Loader, "Fast and accurate computation
of binomial probabilities", 2000): the textbook form k log(rate) - rate - log k! loses every digit at the rates used here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedloom.privacy.noise import uniforms

LEAST, MOST = 1e2, 2.0**50
"""Rates of a Poisson number: the sampler's own bound is 10, Stirling's remainder wants more; above, floats skip integers."""


def skellam(variance: float, key: bytes, count: int, *context: str | int | bytes) -> Tensor:
    """(count,) int64 Skellam numbers of mean 0. Raises ValueError for a variance that the sampler cannot keep to."""
    rate = variance / 2
    if not LEAST <= rate <= MOST:
        raise ValueError(f"Skellam noise of variance {variance:.4g}, expected {2 * LEAST:g} to {2 * MOST:.3g}")
    return poisson(rate, key, count, "plus", *context) - poisson(rate, key, count, "minus", *context)


def poisson(rate: float, key: bytes, count: int, *context: str | int | bytes) -> Tensor:
    """(count,) int64 Poisson numbers."""
    b = 0.931 + 2.53 * math.sqrt(rate)
    a = -0.059 + 0.02483 * b
    log_inverse_alpha = math.log(1.1239 + 1.1328 / (b - 3.4))
    squeeze = 0.9277 - 3.6224 / (b - 2)
    made = torch.zeros(count, dtype=torch.int64)
    left, turn = torch.arange(count), 0
    while len(left):
        u, v = uniforms(key, 2 * len(left), *context, turn).view(2, -1)
        u = u - 0.5
        s = 0.5 - u.abs()
        k = ((2 * a / s + b) * u + rate + 0.43).floor()
        bound = log_probability(k.clamp_min(1.0), rate)
        inside = v.log() + log_inverse_alpha - (a / (s * s) + b).log() <= bound
        taken = (k >= 0) & (((s >= 0.07) & (v <= squeeze)) | (~((s < 0.013) & (v > s)) & inside))
        made[left[taken]] = k[taken].long()
        left, turn = left[~taken], turn + 1
    return made


def log_probability(k: Tensor, rate: float) -> Tensor:
    """log of rate^k e^-rate / k! for float64 integers k >= 1, to the last digits whatever the rate."""
    d = (k - rate) / rate
    # (1 + d) log(1 + d) - d, by its series where the two nearly cancel.
    series = d * d * (1 / 2 - d * (1 / 6 - d * (1 / 12 - d * (1 / 20 - d * (1 / 30 - d * (1 / 42 - d / 56))))))
    deviance = torch.where(d.abs() < 0.01, series, torch.special.xlog1py(1 + d, d) - d)
    stirling = 1 / (12 * k) - 1 / (360 * k**3)
    return -rate * deviance - stirling - 0.5 * (2 * math.pi * k).log()
