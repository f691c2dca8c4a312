"""From radio to numbers: rates, latency and energy of one federated round.

A `Link` is one of two ways to share the band, `Subcarriers` (whole subcarriers, the binary mode) and `Band` (any share of one
bandwidth).
Equation numbers are those of the project's FedLoDrop specification (Xie, Wen, You, Chen, Bennis, Huang, "FedLoDrop:
Federated LoRA with Dropout for Generalized LLM Fine-tuning", arXiv 2510.12078). The split of a round into download,
computation and upload follows that group's Federated Dropout (arXiv 2501.00379); (29)-(34) in detail are derived, since
the paper's own formulas were not available.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedloom.errors import ConfigError

Array = NDArray[np.float64]
Pick = int | slice | NDArray[np.intp]
"""Which device a number belongs to: all along the last axis, one, or an array of indices that broadcasts."""
ALL = slice(None)


def from_db(value_db: ArrayLike) -> Array:
    """A ratio from decibels.

    >>> float(from_db(30.0))
    1000.0
    """
    return np.asarray(10.0 ** (np.asarray(value_db, dtype=float) / 10.0))


def from_dbm(value_dbm: ArrayLike) -> Array:
    """Watts (or W/Hz) from decibels over one milliwatt."""
    return np.asarray(1e-3 * from_db(value_dbm))


def path_gain(distance_m: ArrayLike) -> Array:
    """Power gain of the urban macro path loss 128.1 + 37.6 log10(d / km) dB, any shape."""
    return from_db(-(128.1 + 37.6 * np.log10(np.asarray(distance_m, dtype=float) / 1e3)))


def shannon(bandwidth_hz: ArrayLike, snr_hz: ArrayLike) -> Array:
    """Rate b log2(1 + s / b) in bit/s, with s = p g / N0 in Hz: (29) for one subcarrier, `bandwidth` mode for a share.

    Shapes broadcast. Concave and increasing in b; 0 at b = 0.
    """
    b = np.asarray(bandwidth_hz, dtype=float)
    s = np.asarray(snr_hz, dtype=float)
    safe = np.where(b > 0.0, b, 1.0)
    return np.asarray(np.where(b > 0.0, safe * np.log1p(s / safe) / np.log(2.0), 0.0))


class Rates(NamedTuple):
    """What a share of the band gives each device, (K,) or (..., K)."""

    up: Array
    """bit/s."""
    down: Array
    """bit/s."""
    transmit_w: Array
    """Power while uploading, of all that the device holds."""


class Holding(NamedTuple):
    """One device's part of the band."""

    subcarriers: tuple[int, ...] | None
    """Indices; None where the band is divided at will."""
    bandwidth_hz: float


Mode = Literal["subcarrier", "bandwidth"]


class Link(Protocol):
    """The radio between K devices and the server: how the band can be shared and what a share gives."""

    @property
    def mode(self) -> Mode: ...

    @property
    def power_w(self) -> Array:
        """(K,) a device's whole transmit power."""

    def rates(self, share: Array) -> Rates:
        """Rates and power under a share, for any leading shape."""

    def whole_band(self) -> Rates:
        """(K,) of each device if the whole band were its own."""

    def least_j_per_bit(self) -> Array:
        """(K,) the cheapest that a device can send a bit."""

    def divided_evenly(self) -> Array:
        """The share that gives each device the K-th part of everything, whether it may be divided or not."""

    def dealt_evenly(self) -> Array:
        """As even a share as is possible."""

    def holdings(self, share: Array) -> list[Holding]:
        """A share, device by device."""

    def share_of_holdings(self, holdings: Sequence[Holding]) -> Array:
        """The share, put together again. Raises ConfigError for what the band does not have."""


@dataclass(frozen=True)
class Subcarriers:
    """M subcarriers, each lent to one device at most. A share is (K, M), 1 where the subcarrier is the device's."""

    up: Array
    """(K, M) bit/s of one subcarrier, (29)."""
    down: Array
    """(K, M) bit/s."""
    power_per_subcarrier_w: Array
    """(K,) transmit power on each subcarrier that a device holds."""
    spacing_hz: float
    """Width of one subcarrier."""
    mode: ClassVar[Mode] = "subcarrier"

    @property
    def count(self) -> int:
        """M."""
        return int(self.up.shape[1])

    @property
    def power_w(self) -> Array:
        return self.power_per_subcarrier_w * self.count

    def rates(self, share: Array) -> Rates:
        """(30): rates add over subcarriers, and so does the power. `share` is (..., K, M), binary or relaxed."""
        return Rates(
            (share * self.up).sum(axis=-1),
            (share * self.down).sum(axis=-1),
            self.power_per_subcarrier_w * share.sum(axis=-1),
        )

    def whole_band(self) -> Rates:
        return Rates(self.up.sum(axis=1), self.down.sum(axis=1), self.power_w)

    def least_j_per_bit(self) -> Array:
        # The best subcarrier alone: energy per bit is p N / r, and r / N falls with every worse one.
        return np.asarray(self.power_per_subcarrier_w / self.up.max(axis=1))

    def divided_evenly(self) -> Array:
        return np.full(self.up.shape, 1.0 / len(self.up))

    def dealt_evenly(self) -> Array:
        """Dealt round, the devices with the worst average channel first."""
        devices = len(self.up)
        order = np.argsort(self.up.mean(axis=1), kind="stable")
        owners = order[np.arange(self.count) % devices]
        return np.asarray(np.arange(devices)[:, None] == owners, dtype=float)

    def holdings(self, share: Array) -> list[Holding]:
        hz = share.sum(axis=1) * self.spacing_hz
        return [
            Holding(tuple(int(m) for m in np.flatnonzero(row > 0.5)), float(width))
            for row, width in zip(share, hz, strict=True)
        ]

    def share_of_holdings(self, holdings: Sequence[Holding]) -> Array:
        share = np.zeros(self.up.shape)
        for k, holding in enumerate(holdings):
            for m in holding.subcarriers or ():
                if m >= self.count:
                    raise ConfigError(f"the allocation uses subcarrier {m}, the fleet has {self.count}: allocate again")
                share[k, m] = 1.0
        return share


@dataclass(frozen=True)
class Band:
    """One bandwidth, divided at will. A share is (K,) in Hz and sums to at most `total_hz`."""

    total_hz: float
    snr_up_hz: Array
    """(K,) received power over noise density, P h / N0."""
    snr_down_hz: Array
    """(K,)."""
    power_w: Array
    """(K,) a device's whole transmit power, whatever its share."""
    mode: ClassVar[Mode] = "bandwidth"

    def rates(self, share: Array) -> Rates:
        """Rates of the share, (..., K) in Hz."""
        return Rates(shannon(share, self.snr_up_hz), shannon(share, self.snr_down_hz), self.power_w)

    def whole_band(self) -> Rates:
        return self.rates(np.full(len(self.power_w), self.total_hz))

    def least_j_per_bit(self) -> Array:
        return np.asarray(self.power_w / self.whole_band().up)

    def divided_evenly(self) -> Array:
        return np.full(len(self.power_w), self.total_hz / len(self.power_w))

    def dealt_evenly(self) -> Array:
        return self.divided_evenly()

    def holdings(self, share: Array) -> list[Holding]:
        return [Holding(None, float(hz)) for hz in share]

    def share_of_holdings(self, holdings: Sequence[Holding]) -> Array:
        return np.array([holding.bandwidth_hz for holding in holdings])


class Latency(NamedTuple):
    """Parts of a round in seconds, (K,) each: (33)."""

    down_s: Array
    compute_s: Array
    up_s: Array

    @property
    def total_s(self) -> Array:
        return self.down_s + self.compute_s + self.up_s


class Energy(NamedTuple):
    """Parts of a round's energy at the device in joules, (K,) each: (34)."""

    transmit_j: Array
    compute_j: Array
    overhead_j: Array

    @property
    def total_j(self) -> Array:
        return self.transmit_j + self.compute_j + self.overhead_j


def transfer_s(bits: ArrayLike, rate: ArrayLike) -> Array:
    """Seconds to send `bits` at `rate` bit/s; infinite at rate 0, but 0 for no bits. Shapes broadcast."""
    z, r = np.broadcast_arrays(np.asarray(bits, dtype=float), np.asarray(rate, dtype=float))
    out = np.where(z > 0.0, np.inf, 0.0)
    np.divide(z, r, out=out, where=r > 0.0)
    return out


@dataclass(frozen=True)
class Compute:
    """Cost of one round's local training, linear in the keep rate: (31), (32). All (K,)."""

    base_s: Array
    """Seconds of the frozen backbone."""
    lora_s: Array
    """Seconds of the whole adapter (keep = 1)."""
    base_j: Array
    lora_j: Array
    overhead_j: Array
    """Joules that a round costs whatever is trained (circuit, receiving): xi."""

    def seconds(self, keep: Array) -> Array:
        return self.base_s + keep * self.lora_s

    def joules(self, keep: Array) -> Array:
        return self.base_j + keep * self.lora_j


def latency(rates: Rates, bits_down: ArrayLike, bits_up: ArrayLike, compute_s: Array) -> Latency:
    """(33): download, computation, upload."""
    return Latency(transfer_s(bits_down, rates.down), compute_s, transfer_s(bits_up, rates.up))


def energy(rates: Rates, bits_up: ArrayLike, compute_j: Array, overhead_j: Array) -> Energy:
    """(34): transmission, computation, constant."""
    seconds = transfer_s(bits_up, rates.up)
    transmit = np.where(np.isfinite(seconds), rates.transmit_w * np.where(np.isfinite(seconds), seconds, 0.0), np.inf)
    return Energy(np.asarray(transmit), compute_j, overhead_j)
