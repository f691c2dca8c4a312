"""The facts of each model family, against transformers' own classes."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fedloom.models.families import family_of, first_position


def test_positions_start_where_the_model_starts_them(tiny: Callable[[str], nn.Module]) -> None:
    assert first_position(tiny("bert")) == first_position(tiny("llama")) == first_position(nn.Linear(2, 2)) == 0
    assert first_position(tiny("roberta")) == 2  # its padding token is 1
    assert family_of(nn.Linear(2, 2)) is None
