from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest

from fedloom.client import BUDGETS, Client, check_followed, check_range, whole_budget
from fedloom.errors import ConfigError
from fedloom.methods import build, get, names


@dataclass
class Ranked:
    """Stands for a method: budgets look at its attributes alone."""

    rank: int = 4


def test_clients_go_to_a_dict_and_back() -> None:
    client = Client("a", 12, 4, keep=0.5)
    assert client.to_dict() == {"id": "a", "examples": 12, "rank": 4, "keep": 0.5}
    assert Client.from_dict(client.to_dict()) == client
    assert Client.from_dict({"id": "a", "examples": 12, "rank": 4}) == Client("a", 12, 4, keep=1.0)
    whole = Client.from_dict({"id": "a", "examples": 12, "rank": 4, "keep": 1})
    assert isinstance(whole.keep, float), "a whole number is a number"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"color": 1}, "has color, expected id, examples, rank, keep"),
        ({"examples": None}, "has examples of type NoneType, expected int"),
        ({"rank": 2.0}, "has rank of type float, expected int"),
        ({"rank": True}, "has rank of type bool, expected int"),
        ({"id": 3}, "has id of type int, expected str"),
        ({"keep": "0.5"}, "has keep of type str, expected float"),
    ],
    ids=str,
)
def test_what_is_no_client(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Client.from_dict(Client("a", 12, 4).to_dict() | change)


@pytest.mark.parametrize("name", ["id", "examples", "rank"])
def test_a_field_that_is_missing(name: str) -> None:
    values = Client("a", 12, 4).to_dict()
    del values[name]
    with pytest.raises(ValueError, match=f"has no {name}"):
        Client.from_dict(values)


def test_every_budget_is_a_field_and_every_other_field_is_none() -> None:
    assert {field.name for field in fields(Client)} == {"id", "examples", *BUDGETS}
    assert {budget.key for budget in BUDGETS.values()} == {"ranks", "keep"}


def test_the_whole_of_a_budget() -> None:
    assert whole_budget(Ranked(6), "rank") == 6 and whole_budget(Ranked(), "keep") == 1.0


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("rank", 0, r"client 'a' has rank 0, expected 1 to 4: change ranks in \[clients\], or rank in \[lora\]"),
        ("rank", 5, r"client 'a' has rank 5, expected 1 to 4: change ranks in \[clients\], or rank in \[lora\]"),
        ("keep", 0.0, r"has keep 0, expected a number above 0 and at most 1: change keep in \[clients\]$"),
        ("keep", -0.5, r"has keep -0.5, expected a number above 0"),
        ("keep", 1.5, r"has keep 1.5, expected a number above 0 and at most 1"),
    ],
)
def test_budgets_have_ranges(name: str, value: float, message: str) -> None:
    client = Client("a", 1, 4)
    check_range(Ranked(), client, name)
    wrong = replace(client, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        check_range(Ranked(), wrong, name)
    with pytest.raises(ConfigError, match=message):
        check_followed(Ranked(), wrong, frozenset({name}), "it")


@pytest.mark.parametrize("name, value", [("rank", 2), ("keep", 0.5)])
def test_less_than_the_whole_of_a_budget_is_for_methods_that_follow_it(name: str, value: float) -> None:
    less = replace(Client("a", 1, 4), **{name: value})  # type: ignore[arg-type]
    check_followed(Ranked(), less, frozenset({name}), "it")
    with pytest.raises(ConfigError, match=rf"^it follows no {name} budget, got {name} {value:g}, expected "):
        check_followed(Ranked(), less, frozenset(), "it")


@pytest.mark.parametrize("name", names())
def test_every_method_takes_a_whole_client_and_follows_what_it_says(name: str) -> None:
    method = build({"name": name}, {"rank": 4})
    whole = Client("a", 1, 4)
    method.check(whole)
    for budget, less in (("rank", replace(whole, rank=2)), ("keep", replace(whole, keep=0.5))):
        if budget in get(name).budgets:
            method.check(less)
        else:
            with pytest.raises(ConfigError, match=f"{budget} "):
                method.check(less)


def test_budgets_of_a_composition_add_up() -> None:
    small = Client("a", 1, 2, keep=0.5)
    build({"name": "fedadam", "over": {"name": "fedlodrop", "over": {"name": "fslora"}}}, {"rank": 4}).check(small)
    with pytest.raises(ConfigError, match="fedit follows no rank budget"):
        build({"name": "fedadam", "over": {"name": "fedlodrop"}}, {"rank": 4}).check(small)
    with pytest.raises(ConfigError, match="fedit follows no keep budget"):
        build({"name": "fedadam", "over": {"name": "fslora"}}, {"rank": 4}).check(small)
