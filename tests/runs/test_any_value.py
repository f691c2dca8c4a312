"""Any TOML value at any key of a run file gives a plan of a run, or one clear error."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.errors import ConfigError
from fedloom.methods import get, names
from fedloom.runs import config
from fedloom.runs.contradictions import refuse_contradictions
from fedloom.runs.plan import plan
from fedloom.text import printable

BASE: dict[str, Any] = {
    "model": {"name": "m"},
    "task": {"data": "d.csv", "label": "y"},
    "clients": {"count": 3},
    "method": {"name": "fslora"},
}
MESSAGE_LINES = 12


def dotted_keys() -> list[str]:
    """Every dotted key of a run file, and some that are none."""
    found = ["", "x", "train.x", "method.over", "network", "clients.weights", "task.proxy_data"]
    for section, model in config.RunConfig.model_fields.items():
        inner = getattr(model.annotation, "model_fields", None)
        found += [section, *(f"{section}.{name}" for name in inner or ())]
    return found


def method_keys() -> list[tuple[str, str]]:
    """(method, field) of all methods."""
    return [(name, field.name) for name in names() for field in fields(get(name))]


values = st.recursive(
    st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 10**6, 2**40, 2**64, 10**400])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["auto", "fedit", ":", "a:b", "../x:Y", "no", "[/red]\x1b[2J", "x" * 10**4]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def outcome(key: str, value: Any, method: str = "fslora") -> str:
    """`planned` or `refused`. Raises AssertionError for an error that is not clear, and whatever else came."""
    given = copy.deepcopy(BASE) | {"method": {"name": method}}
    try:
        if key:
            config.put(given, key, value)
        else:
            given = value
        made = config.parse(given, "run.toml")
        refuse_contradictions(plan(made), engine="inprocess")
    except ConfigError as error:
        text = str(error)
        assert text and text.count("\n") < MESSAGE_LINES and len(text) < 2000, text[:3000]
        assert printable(text) == text, repr(text)
        return "refused"
    return "planned"


@pytest.mark.filterwarnings("ignore:.*is the old form:FutureWarning")
@settings(deadline=None, max_examples=3 * settings().max_examples)
@given(st.sampled_from(dotted_keys()), values)
def test_any_value_at_any_key(key: str, value: Any) -> None:
    if not key and not isinstance(value, dict):
        value = {"x": value}
    outcome(key, value)


@pytest.mark.filterwarnings("ignore:.*is the old form:FutureWarning")
@settings(deadline=None, max_examples=3 * settings().max_examples)
@given(st.sampled_from(method_keys()), values)
def test_any_value_of_any_field_of_any_method(place: tuple[str, str], value: Any) -> None:
    method, field = place
    outcome(f"method.{field}", value, method)


def test_the_base_is_planned() -> None:
    assert outcome("train.rounds", 3) == "planned"
    assert outcome("train.rounds", "three") == "refused"
    assert outcome("method.bits", "no", "quantise") == "refused"  # its choices are numbers: nothing is near to a word
