from __future__ import annotations

import pytest
import torch

from fedloom.core import Client, State
from fedloom.errors import ConfigError
from fedloom.methods import build

from .cases import ONE, TWO, ZERO, after, uploads


def test_fedit_by_hand() -> None:
    """Weights 3/4 and 1/4."""
    new = after(build({"name": "fedit"}, {"rank": 1}), ZERO, uploads((3, ONE), (1, TWO)))
    assert new["A"]["s"].tolist() == [[2.0, 3.0]] and new["B"]["s"].tolist() == [[4.0], [4.0], [1.0]]


def test_fedit_keeps_what_is_not_averaged_and_averages_the_head() -> None:
    head: list[State] = [{"head": {"w": torch.tensor([float(x)])}} for x in (0, 8)]
    new = after(
        build({"name": "fedit"}, {"rank": 1}),
        ZERO | head[0] | {"note": {}},
        uploads((1, ONE | head[0]), (3, TWO | head[1])),
    )
    assert new["head"]["w"].item() == 6 and "note" in new


def test_fedit_follows_no_budget() -> None:
    method = build({"name": "fedit"}, {"rank": 4})
    method.check(Client("a", 1, 4))
    with pytest.raises(ConfigError, match="fedit follows no rank budget, got rank 2, expected 4"):
        method.check(Client("a", 1, 2))
    with pytest.raises(ConfigError, match=r"fedit follows no keep budget, got keep 0\.5"):
        method.check(Client("a", 1, 4, keep=0.5))
    with pytest.raises(ConfigError, match="rank 5, expected 1 to 4"):
        method.check(Client("a", 1, 5))
