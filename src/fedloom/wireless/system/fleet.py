"""A fleet file: devices, band, model, limits and bound constants in TOML, validated, to a `Problem` in SI units.

    latency and energy limits    [limits]   latency_s = 10.0, energy_j = 5.0, keep_min = 0.05
    the band                     [band]     mode = "subcarrier" | "bandwidth", subcarriers = 8, subcarrier_hz = 1e6,
                                            bandwidth_hz = 8e6, noise_dbm_per_hz = -174, noise_figure_db = 9,
                                            server_power_w = 1.0, fading = true
    what is trained and sent     [model]    bits_per_parameter = 32, lora_parameters, head_parameters, local_epochs = 1,
                                            base_flop_per_sample, lora_flop_per_sample, or run = "a run directory"
    the bound                    [bound]    the fields of `fedloom.wireless.system.generalisation_bound.Bound`
    for devices without their own [defaults] power_w = 0.2, compute_flop_per_s, compute_j_per_flop, overhead_j
    devices                      [[device]] id, samples, distance_m or gain_db (one, or one per subcarrier), ...
    or drawn ones                [random]   devices = 10, distance_min_m = 50, distance_max_m = 500, samples_min, samples_max

Radio defaults are those of the project's specification (urban macro path loss, Rayleigh fading, -174 dBm/Hz, 0.2 W and 1 W
spread evenly over the subcarriers). None is from the FedLoDrop paper (arXiv 2510.12078), whose simulation parameters were
not available. A channel is reciprocal: up and down see the same gain.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fedloom import toml
from fedloom.errors import ConfigError
from fedloom.wireless.system.empirical_error import Empirical
from fedloom.wireless.system.generalisation_bound import Bound, Gap
from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import (
    Array,
    Band,
    Compute,
    Link,
    Mode,
    Subcarriers,
    from_db,
    from_dbm,
    path_gain,
    shannon,
)

_FADING, _DEVICE = 1, 2  # purposes of a random draw


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BandTable(_Table):
    """[band]."""

    mode: Mode = "subcarrier"
    subcarriers: int = Field(8, ge=1)
    subcarrier_hz: float = Field(1e6, gt=0)
    bandwidth_hz: float | None = Field(None, gt=0)
    """`bandwidth` mode; default subcarriers * subcarrier_hz."""
    noise_dbm_per_hz: float = -174.0
    noise_figure_db: float = 9.0
    server_power_w: float = Field(1.0, gt=0)
    fading: bool = True
    """Rayleigh: an exponential power factor of mean 1 for each device and subcarrier (one for the band)."""


class ModelTable(_Table):
    """[model]. The defaults are a small text encoder with LoRA of 393,216 parameters and no head sent."""

    run: Path | None = None
    """A run directory whose manifest.json gives lora_parameters and head_parameters."""
    bits_per_parameter: float = Field(32.0, gt=0)
    lora_parameters: int = Field(393_216, ge=1)
    head_parameters: int = Field(0, ge=0)
    local_epochs: float = Field(1.0, gt=0)
    base_flop_per_sample: float = Field(5e9, ge=0)
    """C_0: forward and backward through the frozen model."""
    lora_flop_per_sample: float = Field(2e7, ge=0)
    """C_L: the same of the whole adapter."""


class LimitsTable(_Table):
    """[limits], of one round."""

    latency_s: float = Field(10.0, gt=0)
    energy_j: float = Field(5.0, gt=0)
    keep_min: float = Field(0.05, gt=0, le=1)


class DefaultsTable(_Table):
    """[defaults] of a device."""

    power_w: float = Field(0.2, gt=0)
    compute_flop_per_s: float = Field(1e12, gt=0)
    compute_j_per_flop: float = Field(1e-12, ge=0)
    """kappa f^2: energy of one operation at the device's speed."""
    overhead_j: float = Field(0.1, ge=0)


class DeviceTable(_Table):
    """[[device]]. What is absent comes from [defaults] and [limits]."""

    id: str
    samples: int = Field(ge=1)
    distance_m: float | None = Field(None, gt=0)
    gain_db: float | list[float] | None = None
    """Measured: one number (fading is drawn around it) or one a subcarrier (used as it is)."""
    power_w: float | None = Field(None, gt=0)
    compute_flop_per_s: float | None = Field(None, gt=0)
    compute_j_per_flop: float | None = Field(None, ge=0)
    kappa_j_s2_per_flop3: float | None = Field(None, ge=0)
    """Effective switched capacitance, instead of compute_j_per_flop: energy of an operation is kappa f^2."""
    overhead_j: float | None = Field(None, ge=0)
    energy_j: float | None = Field(None, gt=0)
    """This device's energy limit."""


class RandomTable(_Table):
    """[random]: devices d0, d1, ... drawn by seed, after those listed. The first k stay the same when more are asked for."""

    devices: int = Field(ge=1)
    distance_min_m: float = Field(50.0, gt=0)
    distance_max_m: float = Field(500.0, gt=0)
    samples_min: int = Field(200, ge=1)
    samples_max: int = Field(1000, ge=1)


class Fleet(_Table):
    """A fleet as its file says it. `problem()` makes the arrays."""

    seed: int = Field(0, ge=0)
    band: BandTable = BandTable()
    model: ModelTable = ModelTable()
    limits: LimitsTable = LimitsTable()
    bound: Bound = Bound()
    defaults: DefaultsTable = DefaultsTable()
    device: list[DeviceTable] = []
    random: RandomTable | None = None

    def devices(self, seed: int | None = None) -> list[DeviceTable]:
        """Listed devices, then drawn ones."""
        seed = self.seed if seed is None else seed
        devices = list(self.device)
        if self.random is not None:
            low, high = np.log(self.random.samples_min), np.log(max(self.random.samples_max, self.random.samples_min))
            for k in range(self.random.devices):
                rng = np.random.default_rng([seed, _DEVICE, k])
                distance = rng.uniform(
                    self.random.distance_min_m, max(self.random.distance_max_m, self.random.distance_min_m)
                )
                samples = round(float(np.exp(rng.uniform(low, high))))
                devices.append(DeviceTable(id=f"d{k}", samples=samples, distance_m=float(distance)))
        if not devices:
            raise ConfigError(
                "the fleet has no device, expected [[device]] entries or [random] devices = ...: add some"
            )
        ids = [device.id for device in devices]
        for name in ids:
            if ids.count(name) > 1:
                raise ConfigError(f"two devices have the id {name!r}, expected different ones: rename one")
        return devices

    def problem(self, seed: int | None = None, *, bound: Bound | None = None) -> Problem:
        """Arrays in SI units. `seed` draws fading and random devices (default: the file's); `bound` replaces [bound]."""
        seed = self.seed if seed is None else seed
        devices = self.devices(seed)
        model = self.model if self.model.run is None else _model_of_run(self.model)
        samples = np.array([float(d.samples) for d in devices])
        speed = self._column(devices, "compute_flop_per_s")
        work = model.local_epochs * samples
        per_flop = np.array([self._per_flop(d, f) for d, f in zip(devices, speed, strict=True)])
        return Problem(
            ids=tuple(d.id for d in devices),
            samples=samples,
            link=self._link(devices, seed),
            compute=Compute(
                base_s=work * model.base_flop_per_sample / speed,
                lora_s=work * model.lora_flop_per_sample / speed,
                base_j=work * model.base_flop_per_sample * per_flop,
                lora_j=work * model.lora_flop_per_sample * per_flop,
                overhead_j=self._column(devices, "overhead_j"),
            ),
            latency_limit_s=self.limits.latency_s,
            energy_limit_j=np.array([d.energy_j or self.limits.energy_j for d in devices]),
            fixed_bits=model.bits_per_parameter * model.head_parameters,
            lora_bits=model.bits_per_parameter * model.lora_parameters,
            bound=bound or self.bound,
            keep_min=self.limits.keep_min,
            local_epochs=model.local_epochs,
        )

    def _column(self, devices: list[DeviceTable], name: str) -> Array:
        own = [getattr(device, name) for device in devices]
        return np.array([getattr(self.defaults, name) if value is None else value for value in own], dtype=float)

    def _per_flop(self, device: DeviceTable, flop_per_s: float) -> float:
        if device.kappa_j_s2_per_flop3 is not None:
            if device.compute_j_per_flop is not None:
                raise ConfigError(
                    f"device {device.id!r} has compute_j_per_flop and kappa_j_s2_per_flop3, expected one: remove the other"
                )
            return device.kappa_j_s2_per_flop3 * flop_per_s**2
        return self.defaults.compute_j_per_flop if device.compute_j_per_flop is None else device.compute_j_per_flop

    def _link(self, devices: list[DeviceTable], seed: int) -> Link:
        band = self.band
        noise = float(from_dbm(band.noise_dbm_per_hz) * from_db(band.noise_figure_db))
        count = band.subcarriers if band.mode == "subcarrier" else 1
        gains = np.stack([self._gain(device, k, count, seed) for k, device in enumerate(devices)])
        power = self._column(devices, "power_w")
        if band.mode == "subcarrier":
            each = power / count
            up = shannon(band.subcarrier_hz, each[:, None] * gains / noise)
            down = shannon(band.subcarrier_hz, band.server_power_w / count * gains / noise)
            return Subcarriers(up, down, each, band.subcarrier_hz)
        total = band.bandwidth_hz or band.subcarriers * band.subcarrier_hz
        gain = gains[:, 0]
        return Band(total, power * gain / noise, band.server_power_w / len(devices) * gain / noise, power)

    def _gain(self, device: DeviceTable, k: int, count: int, seed: int) -> Array:
        if (device.distance_m is None) == (device.gain_db is None):
            got = "neither" if device.distance_m is None else "both"
            raise ConfigError(
                f"device {device.id!r} has {got} of distance_m and gain_db, expected exactly one: say how far it is, "
                "or its measured gain"
            )
        if isinstance(device.gain_db, list):
            if len(device.gain_db) != count:
                raise ConfigError(
                    f"device {device.id!r} has {len(device.gain_db)} gains, expected {count}: one for each subcarrier"
                )
            return from_db(device.gain_db)
        flat = float(path_gain(device.distance_m) if device.distance_m is not None else from_db(device.gain_db or 0.0))
        fading = (
            np.random.default_rng([seed, _FADING, k]).exponential(size=count) if self.band.fading else np.ones(count)
        )
        return flat * fading


def _model_of_run(model: ModelTable) -> ModelTable:
    """Sizes from the run's manifest.json; other fields stay."""
    path = Path(model.run or ".") / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        sizes = {name: int(manifest[name]) for name in ("lora_parameters", "head_parameters")}
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist, expected a finished run: correct model.run") from None
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} gives no sizes ({error!r}), expected lora_parameters and head_parameters: write them in [model] instead"
        ) from None
    return model.model_copy(update=sizes)


def read_fleet(path: Path | str) -> Fleet:
    """A fleet from its TOML file. Raises ConfigError with one message for all that is wrong."""
    path = Path(path)
    raw = toml.read_toml(path, missing=f"{path} does not exist, expected a fleet file: correct the path")
    fleet = toml.validate(Fleet, raw, str(path))
    if fleet.model.run is not None and not fleet.model.run.is_absolute():
        model = fleet.model.model_copy(update={"run": path.parent / fleet.model.run})
        return fleet.model_copy(update={"model": model})
    return fleet


def parse_fleet(raw: dict[str, Any]) -> Fleet:
    """A fleet from a plain dict (the file's content). Raises ConfigError."""
    return toml.validate(Fleet, raw)


def random_fleet(
    devices: int,
    subcarriers: int,
    seed: int,
    *,
    mode: Mode = "subcarrier",
    empirical: Empirical = "linear",
    gap: Gap = "pooled",
    latency_load: float = 0.2,
    energy_load: float = 0.5,
    head_parameters: int = 0,
) -> Fleet:
    """A fleet by seed whose limits bind.

    The latency limit lets the median device keep about `latency_load` of its adapter with an even share of the band; the
    energy limit of every device is `energy_load` times what the median spends on sending a whole adapter so, above its
    own computation. Below 1 and 2 respectively most devices are limited by the radio.
    """
    fleet = parse_fleet(
        {
            "seed": seed,
            "band": {"mode": mode, "subcarriers": subcarriers},
            "model": {"head_parameters": head_parameters},
            "bound": {"empirical": empirical, "gap": gap},
            "random": {"devices": devices},
        }
    )
    problem = fleet.problem()
    share = problem.link.divided_evenly()
    whole = np.ones(devices)
    transfer = problem.latency(share, whole)
    spent = problem.energy(share, whole)
    latency_s = float(problem.compute.base_s.max() + latency_load * np.median(transfer.up_s + transfer.down_s))
    extra = energy_load * float(np.median(spent.transmit_j))
    limits = [float(limit) for limit in problem.compute.joules(whole) + problem.compute.overhead_j + extra]
    listed = [d.model_copy(update={"energy_j": e}) for d, e in zip(fleet.devices(), limits, strict=True)]
    return fleet.model_copy(
        update={"device": listed, "random": None, "limits": fleet.limits.model_copy(update={"latency_s": latency_s})}
    )
