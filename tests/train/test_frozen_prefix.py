"""Blocks below the first adapted one: computed once for each row, and the same bits as computed at every step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.token_rows import VOCAB, token_rows
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fedloom import lora
from fedloom.core import Client, Trained, Work
from fedloom.data.batches import Encoded, Kind
from fedloom.models import quantised
from fedloom.models.blocks import find_blocks, sites_in
from fedloom.models.huggingface import find_sites, head_group, head_modules, load_base
from fedloom.privacy.example_level import Private
from fedloom.rng import generator
from fedloom.train.optim import Settings
from fedloom.train.trainer import Evaluation, Trainer

TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"], "fnet": ["dense"]}
CLIPPED = Settings(lr=0.05, clip=0.01, batch_size=3, local_epochs=2)


def deep(name: str, blocks: int = 12) -> nn.Module:
    """A random model of twelve blocks, with room for rows of 40 tokens."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": blocks}
    ids: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(
        name, **sizes, **ids, num_attention_heads=4, num_labels=3, max_position_embeddings=40, initializer_range=0.1
    )
    auto: Any = AutoModelForCausalLM if name == "llama" else AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = auto.from_config(config)
    return model.eval()


def rows(kind: Kind, n: int, seed: int, longest: int = 39) -> Encoded:
    return token_rows(kind, n, seed, longest)


def started(model: nn.Module, targets: list[str]) -> Work:
    sites = sites_in(model, find_sites(model, targets), "upper half")
    g = generator(0, "work")
    state = lora.init(sites, 2, g)
    state["B"] = {site: torch.randn(m, 2, generator=g) * 0.1 for site, (m, _) in sites.items()}
    head = head_group(model)
    return Work(train=state | ({"head": head} if head else {}), scale=2.0)


class Federation:
    """Three clients of a model, two with rows in common."""

    def __init__(self, name: str, model: nn.Module | None = None, kind: Kind | None = None) -> None:
        self.model = deep(name) if model is None else model
        self.kind: Kind = kind or ("causal-lm" if name == "llama" else "classification")
        self.work = started(self.model, TARGETS[name])
        one, two = rows(self.kind, 7, 1), rows(self.kind, 4, 2)
        self.data = [one, two, one.select([5, 2])]
        self.held_out = rows(self.kind, 5, 3)

    def trainer(self, settings: Settings, prefix_bytes: int = 1 << 30, **how: Any) -> Trainer:
        model = copy.deepcopy(self.model)
        dtype = how.pop("dtype", torch.bfloat16)
        sites, heads = list(self.work.train["A"]), head_modules(model)
        return Trainer(model, sites, heads, settings=settings, dtype=dtype, prefix_bytes=prefix_bytes, **how)

    def trained(self, trainer: Trainer, rounds: int = 1) -> tuple[list[Trained], Evaluation]:
        works = [(Client(str(k), len(d), 2), self.work) for k, d in enumerate(self.data)]
        for t in range(1, rounds + 1):
            done = trainer.fit(works, self.data, t)
        return done, trainer.evaluate(replace(self.work, train=done[0].state), self.held_out)


def tensors(found: tuple[list[Trained], Evaluation]) -> Iterator[Tensor]:
    done, score = found
    yield torch.tensor(score.loss)
    yield from (x for one in done for group in one.state.values() for x in group.values())


def same(one: tuple[list[Trained], Evaluation], two: tuple[list[Trained], Evaluation]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(one), tensors(two), strict=True))


def apart(one: tuple[list[Trained], Evaluation], two: tuple[list[Trained], Evaluation]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(tensors(one), tensors(two), strict=True))


HOW = {
    "packed": CLIPPED,
    "padded": replace(CLIPPED, dropout=0.3),
    "recomputed": replace(CLIPPED, checkpointing=True),
    "gradients of rows": replace(CLIPPED, private=Private(0.1, 0.5, b"key")),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_kept_and_anew_are_the_same_bits(name: str, how: str) -> None:
    """In bfloat16, every gradient clipped; the room of some rows too."""
    here = Federation(name)
    found = []
    for room in (1 << 30, 10_000, 0):
        with here.trainer(HOW[how], room) as trainer:
            found.append(here.trained(trainer))
            told = trainer.prefix
        assert told is not None and told.why_not is None and told.blocks == 6
        assert (told.computed_anew == 0) == (room == 1 << 30) == (told.shortfall == "")
        assert told.kept_bytes <= room and (told.kept_rows > 0) == (room > 0)
    assert same(found[0], found[1]) and same(found[0], found[2])
    if how != "gradients of rows":
        assert all(done.metrics["grad_norm_max"] > 0.01 for done in found[0][0])


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_plain_path_gives_the_same_up_to_rounding(name: str) -> None:
    here = Federation(name)
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        found = []
        for kernels in ("auto", "off"):
            with here.trainer(replace(CLIPPED, optimizer="sgd"), kernels=kernels, dtype=dtype) as trainer:
                found.append(here.trained(trainer))
                assert (trainer.prefix is None) == (kernels == "off")
        assert 0 < apart(*found) < most


@pytest.mark.slow
@pytest.mark.xdist_group("smollm2")  # one process converts its file for all of them
def test_a_real_decoder_of_thirty_blocks(need: Any) -> None:
    need("smollm2")
    base = load_base("smollm2", kind="causal-lm", num_labels=1)
    base.model.config.eos_token_id = 2
    here = Federation("llama", base.model)
    settings = replace(CLIPPED, local_epochs=None, local_steps=1)
    found = []
    for room in (1 << 30, 0):
        with here.trainer(settings, room) as trainer:
            found.append(here.trained(trainer))
            assert trainer.prefix is not None and trainer.prefix.blocks == 15
    assert same(*found)


def test_each_row_goes_through_the_frozen_blocks_once_and_no_gradient_does() -> None:
    here = Federation("bert")
    with here.trainer(CLIPPED) as trainer:
        model = trainer._model.model
        blocks = find_blocks(model)
        below, read = [], []
        model.get_submodule(f"{blocks[0]}.attention").register_forward_hook(lambda *x: below.append(x))
        model.get_submodule(blocks[6]).register_forward_pre_hook(lambda block, x: read.append(x[0]))
        here.trained(trainer)
        once = len(below)
        here.trained(trainer, rounds=2)
        assert len(below) == once > 0
        assert len(read) > 10 and not any(x.requires_grad for x in read)
        told = trainer.prefix
        assert told is not None and told.kept_rows == 7 + 4 + 5  # the third client's are the first one's


def test_rows_of_equal_tokens_and_other_types_are_others() -> None:
    here = Federation("bert")
    plain = here.held_out
    typed = replace(plain, token_types=np.ones_like(plain.tokens, np.int8))
    with here.trainer(CLIPPED) as trainer:
        one, two, again = (trainer.evaluate(here.work, data).loss for data in (plain, typed, plain))
    with here.trainer(CLIPPED, kernels="off") as trainer:
        assert trainer.evaluate(here.work, typed).loss == pytest.approx(two, abs=2e-2)
    assert one == again != two


def test_dropout_in_the_frozen_blocks_is_drawn_at_every_step() -> None:
    here = Federation("bert")
    found = []
    for kernels in ("auto", "off"):
        with here.trainer(replace(CLIPPED, base_dropout=True), kernels=kernels) as trainer:
            works = [(Client("a", 7, 2), here.work)]
            found.append(trainer.fit(works, here.data[:1], 1)[0].state)
            assert kernels == "off" or (trainer.prefix is not None and trainer.prefix.kept_rows == 0)
    assert all(torch.equal(x, found[1][role][site]) for role, group in found[0].items() for site, x in group.items())


def test_where_padding_changes_a_row_nothing_is_kept() -> None:
    here = Federation("fnet", deep("fnet", 4))
    found = []
    for kernels in ("auto", "off"):
        with here.trainer(CLIPPED, kernels=kernels, dtype=torch.float32) as trainer:
            found.append(here.trained(trainer))
            if kernels == "auto":
                told = trainer.prefix
    assert told is not None and "padding changes" in told.shortfall and told.kept_rows == 0
    assert same(*found)


def test_a_cast_model_has_no_old_states() -> None:
    here = Federation("bert")
    double = replace(here.work, train={r: {s: x.double() for s, x in g.items()} for r, g in here.work.train.items()})
    with here.trainer(CLIPPED, dtype=torch.float32) as trainer:
        first = trainer.evaluate(here.work, here.held_out).loss
        wide = trainer.evaluate(double, here.held_out).loss
        assert trainer.prefix is not None and trainer.prefix.kept_bytes > 8 * 32 * len(here.held_out.tokens)
    assert wide == pytest.approx(first, abs=1e-6) and wide != first


def test_a_quantised_base() -> None:
    pytest.importorskip("bitsandbytes")
    found = []
    for room in (1 << 30, 0):
        here = Federation("llama")
        quantised.quantise(here.model, "nf4", keep=["lm_head"])
        with here.trainer(CLIPPED, room) as trainer:
            found.append(here.trained(trainer))
            assert trainer.prefix is not None and trainer.prefix.why_not is None
    assert same(*found)
