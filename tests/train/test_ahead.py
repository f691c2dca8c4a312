"""Batches made ahead by a thread: the same ones, its errors are the caller's, and it ends with the steps."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import traceback
from typing import Any

import pytest
import torch

from fedloom.train.adapted_model import AdaptedModel
from fedloom.train.ahead import in_turn
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer

CPU = torch.device("cpu")


def threads() -> list[str]:
    return [x.name for x in threading.enumerate() if x.name.startswith("fedloom-batches")]


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bytes_are_the_same(name: str, dropout: float, build: Any, works: Any, rows: Any) -> None:
    """Of clients with unlike numbers of steps, packed and padded, trained and scored."""
    family = build(name)
    given = works(family)
    data = [rows(n, family.kind, n) for n in (4, 11, 7)]
    found = []
    for ahead in (True, False):
        settings = Settings(batch_size=4, local_epochs=2, lr=0.01, dropout=dropout)
        with Trainer(family.model, family.sites, family.heads, settings=settings, ahead=ahead) as trainer:
            found.append((trainer.fit(given, data, 1), trainer.evaluate(given[0][1], data[1], batch_size=4)))
    for one, two in zip(found[0][0], found[1][0], strict=True):
        assert one.loss == two.loss and one.metrics == two.metrics
        for role, group in two.state.items():
            assert all(torch.equal(one.state[role][site], x) for site, x in group.items())
    assert found[0][1].loss == found[1][1].loss
    assert not threads()


def test_one_is_made_while_the_one_before_it_is_used() -> None:
    began = [threading.Event() for _ in range(3)]

    def make(i: int) -> tuple[int, str]:
        began[i].set()
        return i, threading.current_thread().name

    with in_turn(make, 3, CPU, ahead=True) as made:
        for i in range(3):
            number, thread = next(made)
            assert number == i and thread.startswith("fedloom-batches")
            if i < 2:
                assert began[i + 1].wait(10)
            if i < 1:
                assert not began[i + 2].is_set()  # one, and not all
        assert list(made) == []
    with in_turn(make, 0, CPU, ahead=True) as made:
        assert list(made) == []


def test_what_the_thread_raises_is_raised_in_the_step(
    build: Any, works: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = AdaptedModel.feed, [0]

    def fails(self: AdaptedModel, parts: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise MemoryError("no room for a batch")
        return real(self, parts)

    monkeypatch.setattr(AdaptedModel, "feed", fails)
    family = build("bert")
    given, data = works(family, ranks=[2]), [rows(12, family.kind)]
    settings = Settings(batch_size=2, local_steps=6)
    with Trainer(family.model, family.sites, family.heads, settings=settings, ahead=True) as trainer:
        with pytest.raises(MemoryError, match="no room") as caught:
            trainer.fit(given, data, 1)
        assert "fails" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert not threads()
        assert trainer.fit(given, data, 1)[0].steps == 6  # and it goes on


def test_ctrl_c_ends_it() -> None:
    """While a batch is waited for: the thread is left what it is at, no more, and the process ends."""
    code = """
import os, signal, threading, time, torch
from fedloom.train.ahead import in_turn
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
made = []
def make(i):
    made.append(i)
    if i == 1:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        time.sleep(1.0)
    return i
try:
    with in_turn(make, 5, torch.device("cpu"), True) as batches:
        for batch in batches:
            pass
except KeyboardInterrupt:
    print("interrupted", made, [x.name for x in threading.enumerate() if "batches" in x.name])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "interrupted [0, 1] []", done.stderr


def test_a_failing_step_ends_it_too() -> None:
    def make(i: int) -> int:
        time.sleep(0.01)
        return i

    with pytest.raises(ValueError, match="step"), in_turn(make, 100, CPU, ahead=True) as made:
        next(made)
        raise ValueError("a step")
    assert not threads()


def test_a_processor_makes_them_itself(build: Any) -> None:
    family = build("bert")
    with Trainer(family.model, family.sites, family.heads) as trainer:
        assert trainer._ahead is False
