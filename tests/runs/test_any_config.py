"""Any TOML value at any key of a run file gives a configuration and a plan, or one clear error."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedloom import methods, toml
from fedloom.errors import ConfigError
from fedloom.runs import config
from fedloom.runs.config import RunConfig
from fedloom.runs.contradictions import refuse_contradictions
from fedloom.runs.plan import Plan, absolute, plan

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SECTIONS = {
    name: [*toml.known_keys(RunConfig, [name]), "strange"]
    for name in ("model", "task", "lora", "clients", "train", "engine", "network")
}
FIELDS = {
    name: [field.name for field in dataclasses.fields(cast(Any, methods.get(name)))] + ["strange"]
    for name in methods.names()
}
FITTING = [
    "auto",
    "fedit",
    "fslora",
    "causal-lm",
    "by-field",
    "sgd",
    "flower",
    "m:C",
    "a.b:C",
    "accuracy",
    "f1",
    0,
    1,
    0.5,
]

scalars = (
    st.sampled_from(FITTING)
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.dates()
    | st.times()
    | st.datetimes()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def run_files(draw: st.DrawFn) -> dict[str, Any]:
    """A run file that holds, but for a few keys."""
    name = draw(st.sampled_from(methods.names()))
    made: dict[str, Any] = {"model": {"name": "m"}, "task": {"data": "d.csv"}, "method": {"name": name}}
    for _ in range(draw(st.integers(1, 3))):
        section = draw(st.sampled_from([*SECTIONS, "method", "seed", "whole"]))
        if section == "whole":
            made[draw(st.sampled_from([*SECTIONS, "method", "strange"]))] = draw(values)
        elif section == "seed":
            made["seed"] = draw(values)
        else:
            key = draw(st.sampled_from(FIELDS[name] if section == "method" else SECTIONS[section]))
            table = made.setdefault(section, {"fleet": "f"} if section == "network" else {})
            if isinstance(table, dict):
                table[key] = draw(values)
    return made


def planned(values: dict[str, Any]) -> Plan | None:
    """The plan of a run file, or None where it is refused as it should be."""
    try:
        made = plan(absolute(config.parse(values, "it")))
        refuse_contradictions(made, engine="inprocess")
    except ConfigError as error:
        lines = str(error).splitlines()
        assert 0 < len(lines) <= 12 and all(line.isprintable() or "\t" in line or not line.isascii() for line in lines)
        return None
    return made


@given(run_files())
@example({"model": {"name": "m"}, "task": {"data": "d"}, "method": {"name": "fedit"}})
@example({"model": {"name": "m"}, "task": {"data": "d"}, "method": {"name": "fslora", "sketch": 1}})
@example({"model": {"name": "m"}, "task": {"data": "d"}, "method": {"name": "fslora", "over": 1}})
@example({"model": {"name": "m"}, "task": {"data": "d"}, "method": {"name": "feddpa", "local_phase": "no"}})
@example({"model": {"name": "m"}, "task": {"data": "d"}, "method": {"name": ":b"}})
@example({"model": {"name": "m"}, "task": {"data": "d"}, "method": {"name": "fedloom.core:Method"}})
def test_any_value_at_any_key(values: dict[str, Any]) -> None:
    made = planned(values)
    if made is not None:
        text = made.config.to_toml()
        assert config.parse(toml.loads(text, "it"), "it") == made.config


@given(st.text(), st.sampled_from(["", "train.rounds", "task.text", "method.name", "seed", "a.b"]))
def test_any_override(text: str, key: str) -> None:
    made = {"model": {"name": "m"}, "task": {"data": "d.csv"}, "method": {"name": "fedit"}}
    try:
        planned(config.override(cast(dict[str, Any], made), [f"{key}={text}" if key else text]))
    except ConfigError as error:
        assert len(str(error).splitlines()) <= 12


@given(st.binary(max_size=200) | st.text(alphabet='[]{}"=.,#\n\\ab1é-', max_size=80).map(str.encode))
def test_any_bytes_as_a_run_file(data: bytes) -> None:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    try:
        planned(toml.loads(text, "it"))
    except ConfigError as error:
        assert len(str(error).splitlines()) <= 12
