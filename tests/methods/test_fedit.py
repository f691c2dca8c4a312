from __future__ import annotations

import pytest
import torch

from fedloom.core import Client, State
from fedloom.errors import ConfigError
from fedloom.methods import build

from .cases import ONE, TWO, ZERO, uploads


def test_fedit_by_hand() -> None:
    """Weights 3/4 and 1/4."""
    after = build("fedit", rank=1).aggregate(ZERO, uploads((3, ONE), (1, TWO)))
    assert after["A"]["s"].tolist() == [[2.0, 3.0]] and after["B"]["s"].tolist() == [[4.0], [4.0], [1.0]]


def test_fedit_keeps_what_is_not_averaged_and_averages_the_head() -> None:
    head: list[State] = [{"head": {"w": torch.tensor([float(x)])}} for x in (0, 8)]
    after = build("fedit", rank=1).aggregate(
        ZERO | head[0] | {"note": {}}, uploads((1, ONE | head[0]), (3, TWO | head[1]))
    )
    assert after["head"]["w"].item() == 6 and "note" in after


def test_fedit_refuses_a_smaller_rank() -> None:
    with pytest.raises(ConfigError, match="fedit needs every client at rank 4, got 2"):
        build("fedit", rank=4).check(Client("a", 1, 2))
    with pytest.raises(ConfigError, match="keep"):
        build("fedit", rank=4).check(Client("a", 1, 4, keep=0.5))
