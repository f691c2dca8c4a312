"""One reader for every TOML file: where it is wrong, what was got, and which keys there are."""

from __future__ import annotations

import pytest

from fedloom.errors import ConfigError
from fedloom.runs.config import RunConfig
from fedloom.toml import validate
from fedloom.wireless.system.fleet import Fleet
from fedloom.wireless.system.generalisation_bound import Bound


def test_keys_of_an_optional_section_are_its_own() -> None:
    values = {"model": {"name": "m"}, "task": {"data": "d"}, "method": {"name": "fedit"}}
    with pytest.raises(ConfigError, match=r"known here: fleet, allocation$") as caught:
        validate(RunConfig, values | {"network": {"fleet": "f", "alocation": "a"}}, "run.toml")
    assert str(caught.value).startswith("run.toml: unknown key 'network.alocation'; did you mean 'allocation'?")


def test_every_wrong_key_is_named_once() -> None:
    device = {"id": "near", "samples": 0, "gain_db": "loud"}
    with pytest.raises(ConfigError) as caught:
        validate(Fleet, {"device": [device], "limits": {"latency_s": 0}})
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    for key in ("limits.latency_s: got 0", "samples of device 'near': got 0", "gain_db of device 'near': got 'loud'"):
        assert sum(key in line for line in lines) == 1, key


def test_a_dataclass_is_a_table_too() -> None:
    assert validate(Fleet, {"bound": {"gap": "per_device"}}).bound == Bound(gap="per_device")
    assert Fleet().bound == Bound() and Bound().dropout_penalty == 1.0
