"""The allocation problem (P1): least bound over keep rates and shares of the band, under latency and energy limits.

    min Phi(x)   s.t.   z_k / r_dl + W_k / f_k + z_k / r_ul              <= T        (33) for every device
                        p_k N_k z_k / r_ul + kappa_k f_k^2 W_k + xi_k    <= E_k      (34)
                        z_k = a + b x_k [bit] (28),   keep_min <= x_k <= 1,   the band is shared

For a given share the largest feasible rate is a closed form, (35), and Phi is then minimised by (27). So the search is
over shares alone. Derived from the published problem statement (minimise the bound over dropout rates and resources
under a latency and per-device energy limits); the paper's own constraint list was not available.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedloom.errors import ConfigError
from fedloom.wireless.system import radio
from fedloom.wireless.system.generalisation_bound import Bound, weights
from fedloom.wireless.system.radio import ALL, Array, Band, Compute, Energy, Latency, Link, Pick, Rates, Subcarriers


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One round of K devices in SI units. Raises ConfigError where shapes, signs or finiteness are wrong."""

    ids: tuple[str, ...]
    samples: Array
    """(K,) local data sizes n_k."""
    link: Link
    compute: Compute
    latency_limit_s: float
    energy_limit_j: Array
    """(K,)."""
    fixed_bits: float
    """a: sent whatever the rate (the head)."""
    lora_bits: float
    """b: sent at keep = 1 besides."""
    bound: Bound
    keep_min: float = 0.05
    local_epochs: float = 1.0
    """Passes over the local data that `compute` stands for."""

    def __post_init__(self) -> None:
        devices = len(self.ids)
        arrays = {"samples": self.samples, "energy_limit_j": self.energy_limit_j, "power_w": self.link.power_w}
        arrays |= {name: getattr(self.compute, name) for name in self.compute.__dataclass_fields__}
        for name, values in arrays.items():
            if values.shape != (devices,):
                raise ConfigError(f"{name} has shape {values.shape}, expected ({devices},): one number a device")
            bad = np.flatnonzero(~np.isfinite(values) | (values < 0.0))
            if len(bad):
                raise ConfigError(
                    f"{name} of device {self.ids[bad[0]]!r} is {values[bad[0]]}, expected a finite number of at least 0"
                )
        if not (self.samples > 0.0).all():
            raise ConfigError("samples are 0 for a device, expected at least 1: remove the device")
        for name, number in (("latency_limit_s", self.latency_limit_s), ("lora_bits", self.lora_bits)):
            if not (np.isfinite(number) and number > 0.0):
                raise ConfigError(f"{name} is {number}, expected a finite number above 0")
        if not 0.0 < self.keep_min <= 1.0:
            raise ConfigError(f"keep_min is {self.keep_min}, expected a number above 0 and at most 1")
        if not self.local_epochs > 0.0:
            raise ConfigError(f"local_epochs is {self.local_epochs}, expected a number above 0")
        if not 0.0 <= self.fixed_bits < np.inf:
            raise ConfigError(f"fixed_bits is {self.fixed_bits}, expected a finite number of at least 0")

    @property
    def subcarriers(self) -> Subcarriers:
        """The link of a problem in `subcarrier` mode; TypeError in the other."""
        if not isinstance(self.link, Subcarriers):
            raise TypeError(f"this solver divides subcarriers, got a problem in {self.link.mode} mode")
        return self.link

    @property
    def band(self) -> Band:
        """The link of a problem in `bandwidth` mode; TypeError in the other."""
        if not isinstance(self.link, Band):
            raise TypeError(f"this solver divides a bandwidth, got a problem in {self.link.mode} mode")
        return self.link

    @property
    def weights(self) -> Array:
        """w_k = n_k / n, (K,)."""
        return weights(self.samples)

    @property
    def planned_samples(self) -> Array:
        """(K,) samples trained on in a round, counted once a pass: what `compute` stands for."""
        return self.samples * self.local_epochs

    def payload_bits(self, keep: Array) -> Array:
        """(28): bits in one direction."""
        return self.fixed_bits + self.lora_bits * keep

    def latency(self, share: Array, keep: Array) -> Latency:
        """(33), original form."""
        bits = self.payload_bits(keep)
        return radio.latency(self.link.rates(share), bits, bits, self.compute.seconds(keep))

    def energy(self, share: Array, keep: Array) -> Energy:
        """(34), original form."""
        return radio.energy(
            self.link.rates(share), self.payload_bits(keep), self.compute.joules(keep), self.compute.overhead_j
        )

    def caps(self, share: Array) -> Array:
        """(35): the largest feasible rate of each device for a share (..., K, M) or (..., K); below keep_min = infeasible."""
        return self.caps_of(self.link.rates(share))

    def caps_of(self, rates: Rates, device: Pick = ALL) -> Array:
        """(35) from rates: arrays (..., K), or of any shape for one device.

        Not cut below: a device that cannot even send nothing has a negative cap, -inf without any rate.
        """
        return np.minimum(1.0, np.minimum(self.latency_caps(rates, device), self.energy_caps(rates, device)))

    def latency_caps(self, rates: Rates, device: Pick = ALL) -> Array:
        """The rate at which (33) is tight."""
        spare = self.latency_limit_s - self.compute.base_s[device]
        return self._tight(
            spare, radio.transfer_s(1.0, rates.up) + radio.transfer_s(1.0, rates.down), self.compute.lora_s[device]
        )

    def energy_caps(self, rates: Rates, device: Pick = ALL) -> Array:
        """The rate at which (34) is tight."""
        spare = self.energy_limit_j[device] - self.compute.base_j[device] - self.compute.overhead_j[device]
        seconds = radio.transfer_s(1.0, rates.up)
        with np.errstate(invalid="ignore"):
            per_bit = np.where(np.isfinite(seconds), rates.transmit_w * seconds, np.inf)
        return self._tight(spare, per_bit, self.compute.lora_j[device])

    def _tight(self, spare: Array, per_bit: Array, lora: Array) -> Array:
        """x with (a + b x) per_bit + lora x = spare; +inf where x costs nothing, -inf where no bit gets through."""
        with np.errstate(invalid="ignore", divide="ignore"):
            x = (spare - self.fixed_bits * per_bit) / (self.lora_bits * per_bit + lora)
        return np.asarray(np.where(np.isinf(per_bit) | np.isnan(x), -np.inf, x))

    def best(self, caps: Array) -> Array:
        """(27): the rates of least bound under the caps, (..., K)."""
        return self.bound.best(caps, self.samples, self.keep_min)

    def value(self, keep: Array) -> Array:
        """Phi, (...,)."""
        return self.bound.value(keep, self.samples)

    def value_of_caps(self, caps: Array) -> Array:
        """Phi at the best rates under the caps (..., K); +inf where a cap is below keep_min."""
        feasible = (caps >= self.keep_min).all(axis=-1)
        return np.where(feasible, self.value(self.best(caps)), np.inf)

    def excess(self, share: Array, keep: Array) -> tuple[Array, Array]:
        """How far (33) and (34) are broken, relative to the limits, (K,) each; at most 0 where they hold."""
        late = self.latency(share, keep).total_s / self.latency_limit_s - 1.0
        over = (self.energy(share, keep).total_j - self.energy_limit_j) / np.maximum(self.energy_limit_j, 1e-300)
        return late, over

    def with_limits(self, latency_factor: float = 1.0, energy_factor: float = 1.0) -> Problem:
        """The same problem with its limits scaled."""
        return replace(
            self,
            latency_limit_s=self.latency_limit_s * latency_factor,
            energy_limit_j=self.energy_limit_j * energy_factor,
        )
