"""Attention that is told where rows end is attention in buckets: the kernel's place is taken by its definition."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MistralConfig, MistralForCausalLM

from fedloom.train.kernels import varlen_attention
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer

kernel = varlen_attention.kernel


def definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` says that it computes, row by row. Tokens of no row are NaN."""
    assert query.shape[0] == key.shape[0] == value.shape[0] and query.stride(-1) == 1
    assert cu_seq_q.dtype == torch.int32 and enable_gqa == (query.shape[1] > key.shape[1])
    before, after = window_size
    made = [query.new_full((int(cu_seq_q[0]), *query.shape[1:]), torch.nan)]
    for first, last in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
        assert last - first <= max_q == max_k
        q, k, v = (x[first:last].transpose(0, 1) for x in (query, key, value))
        at = torch.arange(last - first)
        apart = at[:, None] - at
        sees = (apart <= (before if before >= 0 else last)) & (apart >= (-after if after >= 0 else -last))
        made.append(F.scaled_dot_product_attention(q, k, v, sees, scale=scale, enable_gqa=enable_gqa).transpose(0, 1))
    rest = len(query) - int(cu_seq_q[-1])
    return torch.cat([*made, query.new_full((rest, *query.shape[1:]), torch.nan)])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The definition in the kernel's place, and how often it was called."""
    calls: list[int] = []

    def counted(*given: Any, **named: Any) -> Tensor:
        calls.append(1)
        return definition(*given, **named)

    monkeypatch.setattr(varlen_attention, "kernel", counted)
    monkeypatch.setattr(varlen_attention, "suits", lambda *_: True)
    return calls


def mistral(window: int) -> Any:
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=24,
            sliding_window=window,
            pad_token_id=0,
        )
    )


def assert_trains_as_on_the_readable_path(family: Any, works: Any, rows: Any) -> None:
    given = works(family, ranks=[2, 4])
    data = [rows(n, family.kind, n) for n in (5, 9)]
    found = []
    for kernels in ("auto", "off"):
        settings = Settings(lr=0.01, batch_size=4, local_steps=2)
        with Trainer(family.model, family.sites, family.heads, settings=settings, kernels=kernels) as trainer:  # type: ignore[arg-type]
            found.append(trainer.fit(given, data, 1))
    for one, two in zip(*found, strict=True):
        assert one.loss == pytest.approx(two.loss, abs=1e-9)
        for role, group in two.state.items():
            for site, x in group.items():
                torch.testing.assert_close(one.state[role][site], x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "gpt2"])
def test_a_model_trains_as_on_the_readable_path(
    name: str, few_shapes: bool, stand_in: list[int], build: Any, works: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom.train.kernels.packing.rounds", lambda *_: few_shapes)
    assert_trains_as_on_the_readable_path(build(name), works, rows)
    assert len(stand_in) == 4  # two layers, two steps


@pytest.mark.parametrize("how", ["varlen", "eager", "sdpa"])
def test_a_window_is_kept(
    how: str, build: Any, works: Any, rows: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows longer than it, with heads of keys shared by queries; in buckets too."""
    calls = request.getfixturevalue("stand_in") if how == "varlen" else []
    if how != "varlen":
        monkeypatch.setattr("fedloom.train.kernels.packed_attention.choose", lambda *_: how)
    llama = build("llama")
    family = type(llama)(mistral(3), llama.sites, [], "causal-lm")
    assert_trains_as_on_the_readable_path(family, works, rows)
    assert bool(calls) == (how == "varlen")


def test_heads_of_keys_are_not_repeated_where_they_need_not_be(
    build: Any, works: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    real = F.scaled_dot_product_attention

    def looked_at(q: Tensor, k: Tensor, *given: Any, **named: Any) -> Tensor:
        seen.append((q.shape[1], k.shape[1]))
        return real(q, k, *given, **named)

    monkeypatch.setattr("fedloom.train.kernels.packed_attention.choose", lambda *_: "sdpa")
    monkeypatch.setattr("fedloom.train.kernels.packed_attention.F.scaled_dot_product_attention", looked_at)
    family = build("llama")
    with Trainer(family.model, family.sites) as trainer:
        trainer.fit(works(family, ranks=[2]), [rows(5, family.kind)], 1)
    assert set(seen) == {(2, 1)}


def test_padding_tokens_are_rows_too() -> None:
    rows = varlen_attention.rows_of(np.array([3, 0, 5]), 12, few_shapes=False)
    assert rows.starts.tolist() == [0, 3, 8, 13, 18, 20] and rows.most == 5
    few = varlen_attention.rows_of(np.array([3, 0, 5]), 12, few_shapes=True)
    assert few.starts.tolist() == [0, 3, 8, 13, 18, *[20] * 12] and few.most == 64


def test_the_kernel_takes_what_it_is_given() -> None:
    """By its names; that it computes what its definition says is for a GPU to show."""
    assert kernel is not None
    theirs, ours = inspect.signature(kernel).parameters, inspect.signature(definition).parameters
    assert list(theirs)[:7] == list(ours)[:7] and set(ours) <= set(theirs)
    assert not varlen_attention.suits(torch.device("cpu"), torch.bfloat16, 64)
