"""Packed batches compute what padded ones do, whatever the lengths of the rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from fedloom.data.text import Encoded, collate
from fedloom.methods.fedit import FedIT
from fedloom.train.host import Host
from fedloom.train.optim import Settings
from fedloom.train.packing import pack_batch, readers
from fedloom.train.trainer import Trainer


def of_lengths(lengths: list[int], kind: Any, seed: int = 0) -> Encoded:
    """Token rows of given lengths."""
    rng = np.random.default_rng(seed)
    n = len(lengths)
    return Encoded(
        tokens=rng.integers(3, 40, sum(lengths)).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        pad_id=0,
        kind=kind,
        targets=None
        if kind == "causal-lm"
        else rng.integers(0, 2, n).astype(np.float32 if kind == "regression" else np.int64),
        starts=np.asarray([max(1, x // 2) for x in lengths]) if kind == "causal-lm" else None,
    )


LENGTHS = {
    "different lengths and numbers of rows": [[3, 9, 17, 2], [5], [20, 20, 1]],
    "full rows and a client with fewer": [[16, 16, 16], [16, 16], [16]],
    "full rows": [[16, 16], [16, 16]],
    "long rows": [[34, 30], [3, 2], [11, 33]],
    "one token": [[1], [1, 1], [2]],
    "unlike lengths": [[5, 100, 9], [40, 3], [70, 2, 2]],
    "one client": [[3, 9, 17, 2, 40]],
}


@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "gpt2"])
@pytest.mark.parametrize("case", LENGTHS)
def test_training_packed_equals_training_padded(
    name: str, case: str, few_shapes: bool, build: Any, works: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom.train.packing.compiles", lambda *_: few_shapes)
    family = build(name)
    clients = works(family, ranks=[2, 4, 3][: len(LENGTHS[case])])
    data = [of_lengths(lengths, family.kind, k) for k, lengths in enumerate(LENGTHS[case])]
    results, scores = [], []
    for attention in ("auto", "sdpa"):
        settings = Settings(lr=0.01, batch_size=4, steps=2)
        with Trainer(family.model, family.sites, family.heads, settings=settings, attention=attention) as trainer:  # type: ignore[arg-type]
            results.append(trainer.fit(FedIT(), clients, data, 1))
            scores.append([trainer.evaluate(FedIT(), w, d).loss for (_, w), d in zip(clients, data, strict=True)])
    assert scores[0] == pytest.approx(scores[1], abs=1e-9, nan_ok=True)
    for (packed, _), (padded, _) in zip(*results, strict=True):
        for role, group in padded.items():
            for site, x in group.items():
                torch.testing.assert_close(packed[role][site], x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
def test_fused_and_plain_attention_agree_on_packed_rows(
    kind: str, build: Any, works: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = build("bert" if kind == "classification" else "llama")
    clients = works(family, ranks=[2, 4])
    data = [of_lengths([3, 9, 17, 2], family.kind), of_lengths([20, 1], family.kind)]
    results = []
    for choice in ("eager", "sdpa"):
        monkeypatch.setattr("fedloom.train.attention.choose", lambda *_, choice=choice: choice)
        with Trainer(family.model, family.sites, family.heads, settings=Settings(lr=0.01)) as trainer:
            results.append(trainer.fit(FedIT(), clients, data, 1))
    for (plain, _), (fused, _) in zip(*results, strict=True):
        for role, group in plain.items():
            for site, x in group.items():
                torch.testing.assert_close(fused[role][site], x, rtol=0, atol=1e-9)


def test_sentence_pairs_keep_their_token_types(build: Any, works: Any) -> None:
    family = build("bert")
    ((_, work),) = works(family, ranks=[2])
    data = of_lengths([5, 9, 12], family.kind)
    pairs = replace(data, token_types=(np.arange(26) % 3 == 0).astype(np.int8))
    found = []
    for attention in ("auto", "sdpa"):
        with Trainer(family.model, family.sites, family.heads, attention=attention) as trainer:  # type: ignore[arg-type]
            found.append(trainer.evaluate(FedIT(), work, pairs).logits)
            plain = trainer.evaluate(FedIT(), work, data).logits
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)
    assert not torch.allclose(found[0], plain, atol=1e-4)


def test_every_token_has_one_slot() -> None:
    data = [of_lengths(lengths, "classification", k) for k, lengths in enumerate([[3, 9, 16, 2], [16], [16, 16, 1]])]
    batch = collate([(d, np.arange(len(d))) for d in data])
    packing = pack_batch(batch, causal=False)
    assert packing.input_ids[0].tolist() == [int(x) for d in data for x in d.tokens]
    assert packing.position_ids[0].tolist() == [i for d in data for x in d.lengths for i in range(x)]
    (bucket,) = packing.buckets
    assert bucket.spread.shape == (8, 16)  # rows of data alone: fillers have no attention
    there = packing.input_ids.flatten()[bucket.spread]
    rows = torch.cat([batch.input_ids[4 * k : 4 * k + len(d)] for k, d in enumerate(data)])
    assert torch.equal(there[bucket.valid], rows[bucket.valid])
    for heads in (1, 3):
        spread, collect = packing.row_index(heads, 1), packing.collect_index(heads)
        assert torch.equal(spread[collect], torch.arange(79 * heads))
        assert sorted([*collect.tolist(), *packing.padding_index(heads).tolist()]) == list(range(8 * 16 * heads))
    assert packing.segments is not None
    tokens = torch.arange(1.0, 80.0).view(1, 79, 1)
    by_client = packing.segments.rows(tokens, 3)[..., 0]
    assert by_client.shape == (3, 33)
    assert [int((x != 0).sum()) for x in by_client] == [30, 16, 33]
    assert by_client[1, :16].tolist() == list(range(31, 47))
    assert torch.equal(packing.segments.tokens(by_client.reshape(1, -1, 1)), tokens)


def test_sizes_are_few_where_every_one_is_compiled() -> None:
    rng = np.random.default_rng(0)
    sizes, rounded = set(), set()
    for _ in range(60):
        data = [of_lengths(rng.integers(5, 20, 8).tolist(), "classification") for _ in range(8)]
        batch = collate([(d, np.arange(len(d))) for d in data])
        exact, few = pack_batch(batch, causal=False), pack_batch(batch, causal=False, few_shapes=True)
        assert exact.segments is not None and few.segments is not None
        N = exact.input_ids.shape[1]
        assert few.input_ids.shape[1] == N + few.idle <= 1.07 * N
        assert torch.equal(few.input_ids[:, :N], exact.input_ids)
        assert few.segments.collect.shape == (N + few.idle,)
        for heads in (1, 3):
            spread, collect = few.row_index(heads, 1), few.collect_index(heads)
            assert torch.equal(spread[collect][: N * heads], torch.arange(N * heads))
            padding = len(spread) - N * heads  # every place but those of the tokens
            assert len(few.padding_index(heads)) == padding
        sizes.add((N, len(exact.segments.spread)))
        rounded.add((N + few.idle, len(few.segments.spread)))
    assert len(sizes) > 50 and len(rounded) < 20


def test_rows_of_unlike_length_get_buckets_of_their_own() -> None:
    data = [of_lengths([5, 120, 9, 40, 3, 30], "causal-lm"), of_lengths([14], "causal-lm")]
    packing = pack_batch(collate([(d, np.arange(len(d))) for d in data]), causal=True)
    assert [tuple(x.spread.shape) for x in packing.buckets] == [(5, 32), (1, 48), (1, 128)]
    assert [x.valid.sum(1).tolist() for x in packing.buckets] == [[5, 9, 3, 30, 14], [40], [120]]


def test_padding_reads_from_its_own_client() -> None:
    data = [of_lengths(lengths, "causal-lm", k) for k, lengths in enumerate([[3, 5], [2], [9, 1]])]
    packing = pack_batch(collate([(d, np.arange(len(d))) for d in data]), causal=True)
    owner = torch.tensor([0] * 8 + [1] * 2 + [2] * 10)
    assert packing.segments is not None
    assert torch.equal(owner[packing.slots].unique(dim=1).flatten(), torch.tensor([0, 0, 1, 1, 2, 2]))
    (bucket,) = packing.buckets
    assert torch.equal(owner[bucket.spread].unique(dim=1).flatten(), torch.tensor([0, 0, 1, 2, 2]))
    assert torch.equal(owner[packing.segments.spread].view(3, -1).unique(dim=1).flatten(), torch.tensor([0, 1, 2]))
    even = pack_batch(collate([(d, np.arange(1)) for d in (data[1], data[1])]), causal=True)
    assert even.segments is None


def test_architectures_that_cannot_be_packed_are_left_padded(build: Any, works: Any, rows: Any) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    windowed = MistralForCausalLM(MistralConfig(vocab_size=40, num_key_value_heads=1, sliding_window=4, **small))
    assert readers(windowed, "causal-lm") is None
    open_ended = MistralForCausalLM(MistralConfig(vocab_size=40, num_key_value_heads=1, sliding_window=None, **small))
    assert readers(open_ended, "causal-lm") == []
    assert readers(build("gpt2-classifier").model, "classification") is None
    assert readers(torch.nn.Linear(2, 2), "classification") is None
    family = build("bert")
    assert readers(family.model, "classification") == ["bert.encoder.layer.1.attention.output", "bert.pooler"]


def test_the_model_is_as_it_was_once_the_trainer_lets_go(build: Any, works: Any, rows: Any) -> None:
    family = build("bert")
    ids = torch.arange(3, 15).view(2, 6)
    before = family.model.eval()(input_ids=ids).logits
    host = Host(family.model, family.sites, family.heads, torch.device("cpu"), torch.float32, "auto")
    host.close()
    ((client, work),) = works(family, ranks=[2], dtype=torch.float32)
    with Trainer(family.model, family.sites, family.heads) as trainer:
        trainer.fit(FedIT(), [(client, work)], [rows(4, "classification")], 1)
    torch.testing.assert_close(family.model(input_ids=ids).logits, before)
