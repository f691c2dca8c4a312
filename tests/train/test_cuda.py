"""What only a GPU can show: `pytest -m cuda tests/train` where there is one. Skipped elsewhere."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fedloom
from fedloom.core import Trained
from fedloom.data.batches import Encoded
from fedloom.train.kernels import grouped_matmul, varlen_attention
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = torch.device("cuda")
TOLERANCE = 0.05
"""Of the largest change, or of a loss: bfloat16 has 8 bits, one rounding is 0.004."""


def unlike(kind: Any, lengths: Sequence[int], seed: int) -> Encoded:
    """Token rows of given lengths."""
    rng = np.random.default_rng(seed)
    return Encoded(
        tokens=rng.integers(3, 40, sum(lengths)).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        pad_id=0,
        kind=kind,
        targets=None if kind == "causal-lm" else rng.integers(0, 3, len(lengths)),
        starts=np.asarray([max(1, n // 2) for n in lengths]) if kind == "causal-lm" else None,
    )


def trained(name: str, build: Any, works: Any, **options: Any) -> tuple[list[Trained], list[Any]]:
    """Three clients with unlike ranks and rows, and what they began with."""
    family = build(name)
    given = works(family, dtype=torch.float32)
    lengths = [[3, 40, 9, 17], [60], [20, 2, 33]]
    data = [unlike(family.kind, each, k) for k, each in enumerate(lengths)]
    options = {"device": DEVICE, "dtype": torch.bfloat16} | options
    step = options.pop("settings", Settings(lr=10.0, optimizer="sgd", clip=None, batch_size=4, local_steps=1))
    with Trainer(family.model, family.sites, family.heads, settings=step, **options) as trainer:
        return trainer.fit(given, data, 1), given


def assert_close(ours: tuple[list[Trained], list[Any]], theirs: tuple[list[Trained], list[Any]]) -> None:
    for one, two, (_, work) in zip(ours[0], theirs[0], ours[1], strict=True):
        assert one.loss == pytest.approx(two.loss, rel=TOLERANCE)
        for role, group in two.state.items():
            largest = max(float((x - work.train[role][site]).abs().max()) for site, x in group.items())
            for site, x in group.items():
                assert (one.state[role][site] - x).abs().max() <= TOLERANCE * largest, f"{role} {site}"


def assert_same_bytes(ours: Sequence[Trained], theirs: Sequence[Trained]) -> None:
    for one, two in zip(ours, theirs, strict=True):
        assert one.loss == two.loss
        for role, group in two.state.items():
            assert all(torch.equal(one.state[role][site], x) for site, x in group.items())


@pytest.mark.parametrize("name", ["bert", "llama", "qwen2"])
def test_kernels_are_the_plain_path(name: str, build: Any, works: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped products, and attention told where rows end, one after the other taken away."""
    plain = trained(name, build, works, kernels="off")
    assert_close(trained(name, build, works), plain)
    monkeypatch.setattr(varlen_attention, "suits", lambda *_: False)
    assert_close(trained(name, build, works), plain)
    monkeypatch.setattr(grouped_matmul, "suits", lambda *_: False)
    assert_close(trained(name, build, works), plain)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_gpu_trains_as_a_processor(name: str, build: Any, works: Any) -> None:
    processor = trained(name, build, works, device="cpu", dtype=torch.float32)
    assert_close(trained(name, build, works), processor)
    exact = trained(name, build, works, dtype=torch.float32)
    for one, two in zip(exact[0], processor[0], strict=True):
        assert one.loss == pytest.approx(two.loss, rel=1e-4)


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 5)])
def test_the_kernel_is_its_definition(causal: bool, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parent / "kernels/test_varlen_attention.py"
    spec = importlib.util.spec_from_file_location("definition_of_varlen", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = varlen_attention.rows_of(np.array([3, 40, 1, 17]), 3, few_shapes=True)
    rows = varlen_attention.Rows(rows.starts.to(DEVICE), rows.most)
    g = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(1, heads, 64, 16) for heads in (4, 2, 2)]
    given = [torch.randn(x, generator=g, device=DEVICE).bfloat16().requires_grad_() for x in shapes]
    found: list[list[Tensor]] = []
    for definition in (False, True):
        if definition:
            monkeypatch.setattr(varlen_attention, "kernel", module.definition)
        y = varlen_attention.attend_rows(*given, rows, causal, 0.25, window)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), given)])
    for one, two in zip(*found, strict=True):
        assert (one - two).abs().max() <= TOLERANCE * two.abs().max()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_no_step_waits(name: str, build: Any, works: Any) -> None:
    """Three steps wait as often as one: at their beginning and end."""
    waits = []
    for steps in (1, 1, 3):  # once to warm up
        settings = Settings(lr=0.01, batch_size=4, local_steps=steps)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                trained(name, build, works, settings=settings)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(x.message) for x in said))
    assert waits[1] == waits[2] > 0


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_deterministic_runs_leave_the_same_bytes(name: str, build: Any, works: Any) -> None:
    """Also with batches made when they are needed, and not ahead."""
    settings = Settings(lr=0.01, batch_size=4, local_steps=3, deterministic=True)
    first, _ = trained(name, build, works, settings=settings)
    for ahead in (True, False):
        assert_same_bytes(trained(name, build, works, settings=settings, ahead=ahead)[0], first)


@pytest.mark.parametrize("method", ["fedit", "fslora", "flexlora", "hetlora", "fedsa_lora"])
def test_methods_in_bfloat16(method: str, settings: Any, tmp_path: Path) -> None:
    losses = []
    for device, dtype in (("cuda", "bfloat16"), ("cpu", "float32")):
        config = settings(method={"name": method}, model={"device": device, "dtype": dtype})
        result = fedloom.run(config, tmp_path / dtype)
        losses.append(result.eval["loss"])
    assert math.isfinite(losses[0]) and losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
