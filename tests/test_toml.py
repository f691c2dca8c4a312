"""One reader for every TOML file: where it is wrong, what was got, and which keys there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedloom import toml
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


DEEP = 5000


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * DEEP + "]" * DEEP,
        "a = " + "{b=" * DEEP + "1" + "}" * DEEP,
        "[" + ".".join(["a"] * DEEP) + "]",
        "a = " + "9" * 5000,
        f"a = {2**63}",
        "a = [[[{b = " + f"{-(2**63) - 1}" + "}]]]",
    ],
    ids=["arrays", "inline tables", "table name", "5000 digits", "65 bits", "65 bits, nested"],
)
def test_endless_input_is_one_error(text: str, tmp_path: Path) -> None:
    file = tmp_path / "it.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"nested too deeply|thousands|digits|64 bits") as caught:
        toml.read_toml(file, missing="")
    assert len(str(caught.value)) < 500


def test_nested_values_of_a_caller_are_checked_too() -> None:
    values: dict[str, Any] = {}
    for _ in range(DEEP):
        values = {"over": values}
    with pytest.raises(ConfigError, match="nested too deeply"):
        toml.check_size(values, "it")
    toml.check_size({"a": [{"b": [1, "x", None, 2**63 - 1]}]}, "it")
