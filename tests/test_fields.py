from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Le

from fedloom.errors import ConfigError
from fedloom.fields import check_fields


class Other:
    """Something that another part made and checked."""


@dataclass(frozen=True, kw_only=True)
class Typed:
    """One field of each kind."""

    count: Annotated[int, Ge(1)] = 3
    share: Annotated[float, Gt(0), Le(1)] = 0.5
    flag: bool = True
    kind: Literal["uniform", "balanced"] = "uniform"
    text: str = ""
    other: Other = field(default_factory=Other)

    def __post_init__(self) -> None:
        check_fields(self, "typed")


@dataclass(frozen=True, kw_only=True)
class Narrower(Typed):
    """Another bound for a field that it inherits."""

    count: Annotated[int, Ge(10)] = 12


def test_what_fits_passes() -> None:
    other = Other()
    made = Typed(count=1, share=1.0, flag=False, kind="balanced", text="x", other=other)
    assert (made.count, made.share, made.flag, made.kind, made.text, made.other) == (
        1,
        1.0,
        False,
        "balanced",
        "x",
        other,
    )


def test_whole_numbers_become_floats_and_nothing_else_changes_its_type() -> None:
    made = Typed(share=1, other=(other := Other()))
    assert isinstance(made.share, float) and isinstance(made.count, int) and made == Typed(share=1.0, other=other)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"count": 0}, "typed: count is 0; expected greater than or equal to 1"),
        ({"count": 2.0}, "typed: count is 2.0; expected a valid integer"),
        ({"count": "3"}, "typed: count is '3'; expected a valid integer"),
        ({"count": True}, "typed: count is True; expected a valid integer"),
        ({"share": 0.0}, "typed: share is 0.0; expected greater than 0"),
        ({"share": 1.5}, "typed: share is 1.5; expected less than or equal to 1"),
        ({"share": "x"}, "typed: share is 'x'; expected a valid number"),
        ({"share": True}, "typed: share is True; expected a valid number"),
        ({"share": float("nan")}, "typed: share is nan; expected a finite number"),
        ({"share": float("inf")}, "typed: share is inf; expected a finite number"),
        ({"share": None}, "typed: share is None; expected a valid number"),
        ({"flag": "yes"}, "typed: flag is 'yes'; expected a valid boolean"),
        ({"flag": 1}, "typed: flag is 1; expected a valid boolean"),
        ({"kind": "balancd"}, "typed: kind is 'balancd'; did you mean 'balanced'?; expected one of uniform, balanced"),
        ({"kind": 1}, "typed: kind is 1; expected one of uniform, balanced"),
        ({"kind": ["uniform"]}, "typed: kind is ['uniform']; expected one of uniform, balanced"),
        ({"text": 3}, "typed: text is 3; expected a valid string"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_clear_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Typed(**values)
    assert str(caught.value) == message


def test_a_long_value_is_cut() -> None:
    with pytest.raises(ConfigError) as caught:
        Typed(count=["x" * 10_000])  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200 and "..." in str(caught.value)


def test_a_subclass_has_its_own_bounds() -> None:
    Typed(count=5)
    with pytest.raises(ConfigError, match="greater than or equal to 10"):
        Narrower(count=5)
    Typed(count=5)
