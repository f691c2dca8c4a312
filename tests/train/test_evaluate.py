"""Evaluation and generation against transformers' own, row by row."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fedloom.core import Work
from fedloom.data.batches import Encoded, collate
from fedloom.errors import ModelError, RoundError
from fedloom.train.trainer import Trainer


def merge(family: Any, work: Work) -> None:
    """Put an adapter and head into the model's own weights."""
    family.model.double().eval()
    for site in family.sites:
        layer = family.model.get_submodule(site)
        product = work.scale * work.train["B"][site] @ work.train["A"][site]
        layer.weight.data += product.T if isinstance(layer, Conv1D) else product
    for name, x in work.train.get("head", {}).items():
        family.model.get_parameter(name).data.copy_(x)


def row(data: Encoded, i: int) -> Tensor:
    return torch.from_numpy(data.tokens[data.offsets[i] : data.offsets[i + 1]]).long().unsqueeze(0)


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2-classifier"])
def test_logits_are_those_of_the_merged_model_in_row_order(name: str, build: Any, rows: Any, works: Any) -> None:
    family = build(name)
    work, data = works(family)[1][1], rows(21, family.kind)
    with Trainer(family.model, family.sites, family.heads) as trainer:
        result = trainer.evaluate(work, data, batch_size=4)
    merge(family, work)
    assert data.targets is not None
    with torch.no_grad():
        wanted = torch.cat([family.model(input_ids=row(data, i)).logits for i in range(21)])
    assert result.logits is not None
    assert result.predictions is not None
    torch.testing.assert_close(result.logits, wanted, rtol=0, atol=1e-10)
    targets = torch.from_numpy(data.targets)
    if family.kind == "classification":
        assert torch.equal(result.predictions, wanted.argmax(1))
        loss = torch.nn.functional.cross_entropy(wanted, targets)
    else:
        torch.testing.assert_close(result.predictions, wanted[:, 0])
        loss = (wanted[:, 0] - targets).square().mean()
    assert result.loss == pytest.approx(float(loss), abs=1e-10)
    assert result.count == 21


@pytest.mark.parametrize("name", ["bert", "gpt2-classifier", "xlm-roberta", "llama", "gpt2"])
def test_together_is_as_one_by_one(name: str, build: Any, rows: Any, works: Any) -> None:
    """Unequal ranks and numbers of rows; works that do not fit into a batch, or train something else, go alone."""
    family = build(name)
    given = [work for _, work in works(family, ranks=(2, 8, 4, 8, 2))]
    given[3] = replace(
        given[3], train={"B": given[3].train["B"]}, fixed={k: x for k, x in given[3].train.items() if k != "B"}
    )
    data = [rows(n, family.kind, seed) for seed, n in enumerate((3, 1, 5, 2, 21))]
    with Trainer(family.model, family.sites, family.heads) as trainer:
        seen: list[int] = []
        whole, trainer._evaluate = trainer._evaluate, lambda w, d, size: (seen.append(len(w)), whole(w, d, size))[1]  # type: ignore[method-assign]
        together = trainer.evaluate_together(given, data, batch_size=9)
        assert seen == [3, 1, 1]
        for work, mine, found in zip(given, data, together, strict=True):
            alone = trainer.evaluate(work, mine)
            assert (found.loss, found.count) == (pytest.approx(alone.loss, abs=1e-10), alone.count)
            if alone.logits is not None:
                torch.testing.assert_close(found.logits, alone.logits, rtol=0, atol=1e-10)
                torch.testing.assert_close(found.predictions, alone.predictions)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_ten_layers_in_the_types_of_runs(
    name: str, dtype: torch.dtype, close: float, build: Any, rows: Any, works: Any
) -> None:
    """The same rows for all clients, so that an adapter in the place of another would be seen; then in batches that fit."""
    family = build(name, 10)
    for x in family.model.parameters():
        x.data *= 8 if x.dim() > 1 else 1
    given = [work for _, work in works(family, ranks=(2, 8, 4), dtype=torch.float32)]
    for work in given:
        work.train["B"] = {site: 4 * x for site, x in work.train["B"].items()}
    data = [rows(8, family.kind)] * 3
    with Trainer(family.model, family.sites, family.heads, dtype=dtype) as trainer:
        alone = [trainer.evaluate(work, data[0]).loss for work in given]
        together = [found.loss for found in trainer.evaluate_together(given, data)]
        halves = [found.loss for found in _without_memory_for(9, trainer).evaluate_together(given, data)]
        assert trainer.rows_at_once.most == 8
        with pytest.raises(RoundError, match="even one row at a time"):
            _without_memory_for(1, trainer).evaluate(given[0], data[0])
    assert together == pytest.approx(alone, abs=close) and halves == pytest.approx(alone, abs=close)
    assert min(abs(a - b) for a, b in combinations(alone, 2)) > 3 * close


def _without_memory_for(rows: int, trainer: Trainer) -> Trainer:
    """A trainer whose device has none for so many rows at once."""
    model, feed = trainer._model, type(trainer._model).feed

    def small(parts: Any) -> Any:
        if sum(len(chosen) for _, chosen in parts) >= rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return feed(model, parts)

    model.feed = small  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_causal_loss_is_the_mean_over_answer_tokens(name: str, build: Any, rows: Any, works: Any) -> None:
    family = build(name)
    work, data = works(family)[1][1], rows(9, family.kind)
    with Trainer(family.model, family.sites, family.heads) as trainer:
        result = trainer.evaluate(work, data, batch_size=4)
    merge(family, work)
    batch = collate([(data, np.arange(9))])
    assert data.starts is not None
    answer = torch.arange(batch.input_ids.shape[1]) >= torch.from_numpy(data.starts).unsqueeze(1)
    labels = batch.input_ids.masked_fill(~answer | (batch.attention_mask == 0), -100)
    with torch.no_grad():
        wanted = family.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
    assert result.loss == pytest.approx(float(wanted), abs=1e-6)  # transformers' loss is float32
    assert result.count == int((data.lengths - data.starts).sum())
    assert result.logits is None


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_answers_are_those_of_each_prompt_alone(name: str, build: Any, rows: Any, works: Any) -> None:
    family = build(name)
    work, data = works(family)[1][1], rows(9, family.kind)
    with Trainer(family.model, family.sites, family.heads) as trainer:
        answers = trainer.generate(work, data, max_new_tokens=6, batch_size=4)
    merge(family, work)
    assert data.starts is not None
    for i, answer in enumerate(answers):
        prompt = row(data, i)[:, : int(data.starts[i])]
        made = family.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        wanted = made[0, prompt.shape[1] :].tolist()
        assert answer == (wanted[: wanted.index(1)] if 1 in wanted else wanted)
    with pytest.raises(ValueError, match="classification"):
        trainer.generate(work, rows(3, "classification"))


def test_a_model_that_is_spread_evaluates_and_does_not_train(build: Any, rows: Any, works: Any, tmp_path: Any) -> None:
    """Over a processor and a disk here, as over several GPUs there."""
    from accelerate import dispatch_model

    family = build("llama")
    given, data = works(family)[1], rows(9, family.kind)
    family.model.float()
    with Trainer(family.model, family.sites, family.heads, kernels="off") as trainer:
        whole = trainer.evaluate(given[1], data)
    spread = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    spread |= {f"model.layers.{i}": "disk" for i in range(1, len(family.model.model.layers))}
    model = dispatch_model(family.model, spread, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    with Trainer(model, family.sites, family.heads) as trainer:
        assert trainer.evaluate(given[1], data).loss == pytest.approx(whole.loss, abs=1e-6)
        with pytest.raises(ModelError, match="spread over 2 devices, and training uses one"):
            trainer.fit([given], [data], 1)
