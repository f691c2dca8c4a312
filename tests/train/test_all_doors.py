"""Everything that a GPU would choose, at once and on a processor: runs of whole methods end as they do without."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import fedloom
from fedloom.train import local_steps, trainer
from fedloom.train.kernels import grouped_matmul, lora_linear, packing, varlen_attention

METHODS: dict[str, dict[str, Any]] = {
    "fslora": {"clients": {"ranks": [1, 2, 4]}, "method": {"name": "fslora", "sketch": "balanced"}},
    "hetlora": {"clients": {"ranks": [1, 2, 4]}, "method": {"name": "hetlora"}},
    "dropout": {"lora": {"dropout": 0.1}, "method": {"name": "fedit"}},
}


@pytest.fixture
def open_doors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which kernels were called, once it is run."""
    path = Path(__file__).parent / "kernels/test_varlen_attention.py"
    spec = importlib.util.spec_from_file_location("definition_of_varlen", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    called: list[str] = []

    def noted(name: str, real: Any) -> Any:
        return lambda *given, **named: called.append(name) or real(*given, **named)

    monkeypatch.setattr(grouped_matmul, "suits", lambda *_: True)
    monkeypatch.setattr(varlen_attention, "suits", lambda *_: True)
    monkeypatch.setattr(packing, "rounds", lambda *_: True)
    monkeypatch.setattr(lora_linear, "grouped_matmul", noted("grouped", grouped_matmul.grouped_matmul))
    monkeypatch.setattr(varlen_attention, "kernel", noted("varlen", module.definition))
    ahead = noted("ahead", trainer.in_turn)
    for user in (trainer, local_steps):
        monkeypatch.setattr(user, "in_turn", lambda make, n, device, _: ahead(make, n, device, True))
    return called


@pytest.mark.parametrize("what", METHODS)
def test_a_run_ends_as_without_them(what: str, settings: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    config = settings(**METHODS[what])
    plain = fedloom.run(config, tmp_path / "plain")
    called = request.getfixturevalue("open_doors")
    ours = fedloom.run(config, tmp_path / "ours")
    assert ours.eval["loss"] == pytest.approx(plain.eval["loss"], rel=1e-4)
    # With dropout training is padded, and evaluation packed.
    assert {"varlen", "ahead"} <= set(called) and ("grouped" in called) == (what != "dropout")
