"""The clipping bound C when nobody names it: measured on the server's own rows, or following a quantile of the clients' norms.

Andrew, Thakkar, McMahan, Ramaswamy, "Differentially private learning with adaptive clipping", NeurIPS 2021, arXiv 1905.03871.
Each client tells in one bit whether its change was within C. The bit is worth +1/2 or -1/2 (the paper's shift, which halves
its sensitivity; a client that is replaced by zero tells neither), and the noisy mean of the bits moves the bound:

    C <- C exp(-rate (within - quantile))        more within than wanted: the bound shrinks

Change and bit are one vector (D, 2 w C bit), of norm C sqrt(1 + w^2) at most, under one noise. With the noise of z times that
norm, the change has z_change = z sqrt(1 + w^2) of its own bound and the bits' sum a deviation of s_bit = z_change / (2 w):
1 / z^2 = 1 / z_change^2 + 1 / (2 s_bit)^2, the paper's equation, and the release is one Gaussian of multiplier z.
"""

from __future__ import annotations

import math
from typing import Literal

from fedloom.errors import ConfigError

Clipping = Literal["fixed", "auto", "adaptive"]

RATE = 0.2
"""Of the geometric update: the paper's eta_C."""
QUANTILE = 0.5
"""Share of clients that should be within the bound: the paper's gamma."""
COUNT_NOISE = 1 / 20
"""Deviation of the noise on the count of bits, of the number of clients: the paper's sigma_b = n / 20."""


def next_bound(bound: float, within: float) -> float:
    """The bound of the next round, from the noisy share of clients that were within this one's."""
    return bound * math.exp(-RATE * (within - QUANTILE))


def bit_weight(noise_multiplier: float, clients: int) -> float:
    """w, the size of a client's bit over C, that gives the count of `clients` bits its noise; 1 at most, and without noise.

    Whatever w is, the release costs the same; with few clients the count is noisier than the paper's.
    """
    count = 2 * COUNT_NOISE * clients
    if noise_multiplier == 0 or count <= math.sqrt(2) * noise_multiplier:
        return 1.0
    # z_change^2 / z^2 = 1 + w^2, and z_change = 2 w s_bit.
    return 1 / math.sqrt((count / noise_multiplier) ** 2 - 1)


def check_count(noise_multiplier: float, clients: int) -> None:
    """Raise ConfigError if so few clients are in a round that their count would take half of the noise's power, or more."""
    least = math.ceil(math.sqrt(2) * noise_multiplier / (2 * COUNT_NOISE))
    if clients < least:
        raise ConfigError(
            f"privacy.clip = 'adaptive' counts clients within the bound under noise, and with noise_multiplier "
            f"{noise_multiplier:.4g} that needs at least {least} clients in a round, got {clients}: set clip to a number, or "
            "to 'auto' with task.proxy_data"
        )


def reach(bound: float, weight: float) -> float:
    """Norm of the longest vector of a change within `bound` and its bit."""
    return bound * math.hypot(1.0, weight)
