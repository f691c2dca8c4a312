"""`deterministic = true`: the flag is held while a trainer computes and given back, and no operation of a step lacks it."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from fedloom.train import local_steps
from fedloom.train.determinism import WORKSPACE, deterministic
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2-classifier"])
def test_a_step_has_nothing_else(
    name: str, dropout: float, build: Any, works: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor the bytes are those without it."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    held, real = [], local_steps.run

    def looked_at(*given: Any) -> Any:
        held.append(torch.are_deterministic_algorithms_enabled())
        return real(*given)

    monkeypatch.setattr(local_steps, "run", looked_at)
    family = build(name)
    given = works(family, dtype=torch.float32)
    data = [rows(n, family.kind, n) for n in (4, 11, 7)]
    found = []
    for on in (True, False):
        settings = Settings(batch_size=4, local_steps=2, lr=0.01, dropout=dropout, deterministic=on)
        with Trainer(family.model, family.sites, family.heads, settings=settings) as trainer:
            found.append((trainer.fit(given, data, 1), trainer.evaluate(given[0][1], data[1])))
        assert os.environ.get(WORKSPACE) == ":4096:8"
        assert not torch.are_deterministic_algorithms_enabled()
    assert held == [True, False]
    for one, two in zip(found[0][0], found[1][0], strict=True):
        assert one.loss == two.loss
        for role, group in two.state.items():
            assert all(torch.equal(one.state[role][site], x) for site, x in group.items())
    assert found[0][1].loss == found[1][1].loss


def test_it_is_given_back_as_it_was() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(RuntimeError, match="does not have a deterministic"), deterministic(True):
            # No deterministic one on any device.
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        with deterministic(False):
            assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.utils.deterministic.fill_uninitialized_memory
