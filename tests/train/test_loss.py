"""Losses of clients: chunked as whole, and nothing of a step waits for the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fedloom.data.batches import Targets, collate
from fedloom.train import loss
from fedloom.train.dropout import InputDropout
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer

WAITS = ("nonzero", "_local_scalar_dense", "masked_select", "equal", "is_nonzero", "unique")
"""Operations whose result the host must wait for on a GPU; an index by booleans is `nonzero` inside."""


class Watch(TorchDispatchMode):
    """Counts operations, and the largest float32 tensor that any of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0

    @property
    def waits(self) -> int:
        return sum(self.calls[name] for name in WAITS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name.removeprefix("aten::")] += 1
        masks = [x for x in (args[1] if func._schema.name == "aten::index" else ()) if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in masks):
            self.calls["nonzero"] += 1
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.largest = max(self.largest, made.numel())
        return made


def both(dtype: torch.dtype) -> tuple[Any, Any, Watch]:
    """(losses, gradient) of the plain computation and of ours, in chunks of two rows."""
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(7, 50, generator=g).to(dtype) * 4, torch.randint(50, (7,), generator=g)
    owner, zero = torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.zeros(7, dtype=torch.int64)
    up = torch.tensor([1.0, 2.0, -1.0, 0.0], dtype=torch.float64)
    x = logits.clone().requires_grad_()
    wide = x.double() if dtype == torch.float64 else x.float()
    each = F.cross_entropy(wide, labels, reduction="none").double()
    wanted = torch.stack([each[owner == k].sum() / max(1, int((owner == k).sum())) for k in range(4)])
    (grad,) = torch.autograd.grad((wanted * up).sum(), x)
    y = logits.clone().requires_grad_()
    with Watch() as watch:
        found = loss.client_losses("causal-lm", y, Targets(labels, owner, zero, zero, 4))
        (ours,) = torch.autograd.grad((found * up).sum(), y)
    return (wanted, grad), (found, ours), watch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_losses_in_chunks_are_those_of_the_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 100)
    (wanted, grad), (found, ours), watch = both(dtype)
    assert torch.equal(found, wanted) and found[3] == 0  # a client without answers
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-7)
    if dtype == torch.bfloat16:  # never more than a chunk's logits in float32
        assert watch.largest == 100
    assert not watch.waits


@pytest.mark.parametrize(
    ("name", "dropout"), [("bert", 0.0), ("roberta", 0.0), ("llama", 0.0), ("gpt2", 0.0), ("bert", 0.1), ("llama", 0.1)]
)
def test_no_step_waits_for_the_device(name: str, dropout: float, build: Any, rows: Any, works: Any) -> None:
    """Packed, two steps more are not one wait more: what is waited for is the end. Padded, with dropout, a step waits where
    transformers looks at its padding, and nowhere else."""
    family = build(name)
    given = works(family)
    data = [rows(12, family.kind) for _ in given]
    waits = []
    for steps in (1, 3):
        settings = Settings(local_steps=steps, batch_size=4, lr=0.01, dropout=dropout)
        with Trainer(family.model, family.sites, family.heads, settings=settings) as trainer:
            trainer.fit(given, data, 1)
            with Watch() as watch:
                trainer.fit(given, data, 1)
            waits.append(watch.waits)
            if dropout:
                batch = collate([(x, np.arange(4)) for x in data])
                with Watch() as alone, trainer.loaded(given[0][1], data[0]) as model, torch.no_grad():
                    before = alone.waits
                    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
                    own = alone.waits - before
    assert waits[1] - waits[0] == (2 * own if dropout else 0)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_nor_does_one_by_the_kernels_of_a_gpu(
    name: str, build: Any, rows: Any, works: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grouped products and few shapes; in the place of attention's kernel is one that only has its shape."""
    monkeypatch.setattr("fedloom.train.kernels.grouped_matmul.suits", lambda *_: True)
    monkeypatch.setattr("fedloom.train.kernels.varlen_attention.suits", lambda *_: True)
    monkeypatch.setattr("fedloom.train.kernels.varlen_attention.kernel", lambda q, *_, **__: q * 1.0)
    monkeypatch.setattr("fedloom.train.kernels.packing.rounds", lambda *_: True)
    family = build(name)
    given = works(family, dtype=torch.float32)
    data = [rows(12, family.kind, k) for k in range(3)]
    waits = []
    for steps in (1, 3):
        settings = Settings(local_steps=steps, batch_size=4, lr=0.01)
        with Trainer(family.model, family.sites, family.heads, settings=settings) as trainer, Watch() as watch:
            trainer.fit(given, data, 1)
        assert watch.calls["_grouped_mm"]
        waits.append(watch.waits)
    assert waits[0] == waits[1]


def test_the_watch_sees_what_waits() -> None:
    x = torch.arange(4.0)
    with Watch() as watch:
        _ = x[x > 1], torch.nonzero(x), float(x.sum()), torch.equal(x, x), bool((x > 9).any())
    assert watch.calls["nonzero"] == 2 and watch.calls["equal"] == 1 and watch.calls["_local_scalar_dense"] == 2


def test_dropout_is_drawn_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device of x, by a generator of that device: no number of a mask crosses."""
    devices = []
    real = torch.Generator

    def noted(device: Any = "cpu") -> torch.Generator:
        devices.append(torch.device(device).type)
        return real("cpu")

    monkeypatch.setattr(torch, "Generator", noted)
    drop = InputDropout(0.5, [(0, 1, "a", 0), (0, 1, "b", 0)], [2, 2], [3, 3])
    assert drop("site", torch.empty(4, 3, 8, device="meta")).device.type == "meta"
    assert devices == ["meta", "meta"]
    mask = drop("site", torch.empty(4, 3, 8))
    assert devices[2:] == ["cpu", "cpu"] and set(mask.unique().tolist()) == {0.0, 2.0}
