"""Grouped products of adapters are those of each client by itself: results and gradients, whatever the ranks and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedloom.train.frozen_product import DenseProduct
from fedloom.train.kernels import grouped_matmul
from fedloom.train.kernels.grouped_matmul import Groups
from fedloom.train.kernels.lora_matmul import Frozen
from fedloom.train.lora_linear import Adapter, lora
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer

IN, OUTS = 24, [16, 8, 16]
COUNTS = {"unlike": [3, 17, 8], "a client without tokens": [5, 0, 9], "the last without": [6, 2, 0], "one client": [11]}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6}
"""Of the largest entry. Both round scale, B and h to the dtype, in another order."""


def problem(counts: Sequence[int], dtype: torch.dtype, ranks: Sequence[int]) -> tuple[Tensor, Frozen, list[Any]]:
    """An input, three frozen layers of which the second has an offset and the last no adapter, and adapters of a rank each."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    weight, bias = draw(sum(OUTS), IN), draw(sum(OUTS))
    frozen = Frozen([DenseProduct(lambda _: weight, bias)], OUTS, [None, (draw(8, 2), draw(2, IN)), None])
    K, scale = len(counts), draw(len(counts), 1, 1)
    adapters: list[Any] = [
        Adapter(draw(K, r, IN).requires_grad_(), draw(K, out, r).requires_grad_(), scale)
        for r, out in zip(ranks, OUTS, strict=False)
    ]
    return draw(1, sum(counts), IN).requires_grad_(), frozen, [*adapters, None]


def defined(x: Tensor, frozen: Frozen, adapters: Sequence[Any], counts: list[int]) -> list[Tensor]:
    """Each client's tokens through its own adapter, one client after the other."""
    ys = frozen(x)
    for i, adapter in enumerate(adapters[:-1]):
        each = [
            lora(tokens, Adapter(adapter.A[k : k + 1], adapter.B[k : k + 1], adapter.scale[k : k + 1]))
            for k, tokens in enumerate(torch.split_with_sizes(x, counts, 1))
        ]
        ys[i] = ys[i] + torch.cat(each, 1)
    return ys


def gradients(made: Sequence[Tensor], x: Tensor, adapters: Sequence[Any], through: bool) -> list[Tensor]:
    wanted = [f for a in adapters if a is not None for f in (a.A, a.B)] + ([x] if through else [])
    g = torch.Generator().manual_seed(1)
    total = sum((y * torch.randn(y.shape, generator=g).to(y.dtype)).sum() for y in made if y.requires_grad)
    return [*made, *torch.autograd.grad(total, wanted)]


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("ranks", [(8, 8), (3, 12)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", COUNTS)
def test_they_are_each_client_by_itself(case: str, dtype: torch.dtype, ranks: tuple[int, int], through: bool) -> None:
    counts = np.array(COUNTS[case])
    x, frozen, adapters = problem(counts.tolist(), dtype, ranks)
    x.requires_grad_(through)
    groups = Groups(torch.from_numpy(counts.cumsum().astype(np.int32)))
    want = gradients(defined(x, frozen, adapters, counts.tolist()), x, adapters, through)
    have = gradients(grouped_matmul.grouped_matmul(x, frozen, adapters, groups), x, adapters, through)
    for one, two in zip(have, want, strict=True):
        assert one.shape == two.shape and one.dtype == dtype
        assert (one - two).abs().max() <= TOLERANCE[dtype] * two.abs().max()


@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_clients_train_as_on_the_readable_path(
    name: str, few_shapes: bool, build: Any, works: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ranks of their own, and rows of their own numbers and lengths."""
    called = []
    real = grouped_matmul.grouped_matmul
    monkeypatch.setattr(grouped_matmul, "suits", lambda *_: True)
    monkeypatch.setattr("fedloom.train.kernels.packing.rounds", lambda *_: few_shapes)
    monkeypatch.setattr(
        "fedloom.train.kernels.lora_linear.grouped_matmul", lambda *given: called.append(1) or real(*given)
    )
    family = build(name)
    given = works(family, dtype=torch.float32)
    data = [rows(n, family.kind, n) for n in (4, 11, 7)]
    step, found = Settings(lr=10.0, optimizer="sgd", clip=None, batch_size=4, local_steps=1), []
    for kernels in ("auto", "off"):
        with Trainer(family.model, family.sites, family.heads, settings=step, kernels=kernels) as trainer:  # type: ignore[arg-type]
            found.append(trainer.fit(given, data, 1))
    assert called
    for one, two, (_, work) in zip(*found, given, strict=True):
        assert one.loss == pytest.approx(two.loss, rel=1e-5)
        for role, group in two.state.items():
            largest = max(float((x - work.train[role][site]).abs().max()) for site, x in group.items())
            assert largest > 0
            for site, x in group.items():
                assert (one.state[role][site] - x).abs().max() <= 1e-5 * max(largest, 1.0), f"{role} {site}"


def test_a_processor_does_without() -> None:
    assert not grouped_matmul.suits(torch.device("cpu"), torch.bfloat16)
