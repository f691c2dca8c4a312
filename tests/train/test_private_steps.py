"""Private steps: per-row gradients are those of rows one by one, clipped as Opacus clips them, noised as the key says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedloom.core import Client, State, Work
from fedloom.privacy.accountant import Release
from fedloom.privacy.example_level import Private, clipped_sum
from fedloom.privacy.noise import SLACK
from fedloom.train import private_steps
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer

KEY = bytes(32)
KERNELS: Any = pytest.mark.parametrize("kernels", ["auto", "off"])


def flat(state: State) -> Tensor:
    return torch.cat([x.flatten().double() for role in sorted(state) for _, x in sorted(state[role].items())])


def fitted(family: Any, given: Any, data: Any, kernels: Any = "auto", **options: Any) -> list[State]:
    """One step of SGD with step size 1: what changed is the gradient."""
    settings = Settings(optimizer="sgd", lr=1.0, clip=None, local_steps=1, **options)
    with Trainer(family.model, family.sites, family.heads, settings=settings, kernels=kernels) as trainer:
        return [done.state for done in trainer.fit(given, data, 1)]


def moves(given: Any, states: list[State]) -> list[Tensor]:
    return [flat(work.train) - flat(state) for (_, work), state in zip(given, states, strict=True)]


@KERNELS
@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "gpt2"])
def test_the_step_is_the_sum_of_clipped_gradients_of_single_rows(
    name: str, kernels: Any, build: Any, rows: Any, works: Any
) -> None:
    """Full batches, no noise: rows trained alone, one at a time, give the gradients that are clipped and added by hand."""
    family = build(name)
    given = works(family)
    data = [rows(n, family.kind, n) for n in (4, 6, 5)]
    C = 0.05
    private = Private(C, 0.0, KEY)
    got = moves(given, fitted(family, given, data, kernels, batch_size=100, private=private))
    for pair, encoded, mine in zip(given, data, got, strict=True):
        alone = [encoded.select([i]) for i in range(len(encoded))]
        single = [moves([pair], fitted(family, [pair], [one], kernels, batch_size=1))[0] for one in alone]
        want = sum(g * min(1.0, C / float(g.norm())) for g in single)
        assert isinstance(want, Tensor)
        torch.testing.assert_close(mine * len(encoded), want, rtol=1e-5, atol=1e-5 * float(want.norm()))
        assert any(float(g.norm()) > C for g in single)


def test_chunks_change_nothing(build: Any, rows: Any, works: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family = build("bert")
    given, data = works(family), [rows(n, family.kind, n) for n in (4, 6, 5)]
    private = Private(0.05, 0.0, KEY)
    whole = moves(given, fitted(family, given, data, batch_size=100, private=private))
    monkeypatch.setattr(private_steps, "AT_ONCE", 1)
    for a, b in zip(whole, moves(given, fitted(family, given, data, batch_size=100, private=private)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_noise_is_added_once_to_each_number_and_none_to_padding(build: Any, rows: Any, works: Any) -> None:
    family = build("bert")
    given, data = works(family), [rows(n, family.kind, n) for n in (4, 6, 5)]
    quiet = moves(given, fitted(family, given, data, batch_size=3, private=Private(0.5, 0.0, KEY)))
    gaps = []
    for i in range(8):
        key = bytes([i]) * 32
        loud, still = (
            moves(given, fitted(family, given, data, batch_size=100, private=Private(0.5, z, key))) for z in (2.0, 0.0)
        )
        gaps += [(a - b) * len(d) for a, b, d in zip(loud, still, data, strict=True)]
    together = torch.cat(gaps)
    assert float(together.std()) == pytest.approx(2.0 * 0.5 * SLACK, rel=0.05)
    assert all(len(a) == len(b) for a, b in zip(gaps, quiet, strict=False))
    assert bool((together != 0).all())


def test_the_same_start_repeats_batches_and_noise_and_another_start_does_not(build: Any, rows: Any, works: Any) -> None:
    family = build("bert")
    given, data = works(family), [rows(n, family.kind, n) for n in (14, 16, 15)]
    private = Private(0.5, 1.0, KEY)
    a = moves(given, fitted(family, given, data, batch_size=3, private=private))
    b = moves(given, fitted(family, given, data, batch_size=3, private=private))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    moved: list[tuple[Client, Work]] = [
        (c, replace(w, train={r: {s: x * 1.0001 for s, x in g.items()} for r, g in w.train.items()})) for c, w in given
    ]
    c = moves(moved, fitted(family, moved, data, batch_size=3, private=private))
    assert float((a[0] - c[0]).norm()) > 0.5 * float(a[0].norm())


def test_batches_are_poisson_samples() -> None:
    private = Private(1.0, 1.0, KEY)
    batches = private.batches(200, 10, 2000, "client", 1)
    sizes = np.array([len(b) for b in batches])
    assert sizes.mean() == pytest.approx(10, abs=0.4) and sizes.var() == pytest.approx(10 * 0.95, rel=0.15)
    counts = np.bincount(np.concatenate(batches), minlength=200)
    assert counts.mean() == pytest.approx(100, abs=4) and counts.std() == pytest.approx(math.sqrt(95), rel=0.2)
    assert [len(b) for b in private.batches(3, 10, 4, "x")] == [3] * 4


def test_empty_batches_are_noise_alone(build: Any, rows: Any, works: Any) -> None:
    family = build("bert")
    given, data = works(family), [rows(n, family.kind, n) for n in (400, 400, 400)]
    settings = Settings(optimizer="sgd", lr=1e-3, local_steps=12, batch_size=1, private=Private(0.5, 1.0, KEY))
    with Trainer(family.model, family.sites, family.heads, settings=settings) as trainer:
        made = trainer.fit(given, data, 1)
    assert all(flat(done.state).isfinite().all() and done.metrics == {"steps": 12.0} for done in made)
    assert all(math.isnan(done.loss) for done in made)


def test_steps_are_paid_for_before_they_are_done(build: Any, rows: Any, works: Any) -> None:
    family = build("bert")
    given, data = works(family), [rows(n, family.kind, n) for n in (20, 40, 30)]
    paid: list[tuple[str, int, int, Release]] = []

    def spend(client: str, t: int, part: int, release: Release, start: str) -> None:
        paid.append((client, t, part, release))

    fitted(family, given, data, batch_size=10, private=Private(0.5, 2.0, KEY, spend))
    rates = dict(zip([c.id for c, _ in given], (0.5, 0.25, 1 / 3), strict=True))
    assert paid == [(k, 1, 0, Release(2.0, 1, q)) for k, q in rates.items()]


def test_a_row_whose_gradient_is_not_finite_adds_nothing() -> None:
    grads = torch.tensor([[3.0, 4.0], [float("nan"), 1.0], [0.3, 0.4], [float("inf"), 0.0]])
    got = clipped_sum(grads, torch.tensor([0, 0, 1, 1]), 2, 1.0)
    torch.testing.assert_close(got, torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


@pytest.mark.filterwarnings("ignore")
def test_opacus_has_the_same_norms(build: Any, rows: Any) -> None:
    """A PEFT twin of the model under Opacus: norms of per-row gradients, and their clipped sum."""
    pytest.importorskip("opacus")
    from opacus import GradSampleModule
    from peft import LoraConfig, get_peft_model

    from fedloom.data.batches import collate, targets

    family, twin = build("bert"), build("bert")
    data = rows(6, "classification", 3)
    peft = get_peft_model(
        twin.model, LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    )
    rng = torch.Generator().manual_seed(1)
    for name, p in peft.named_parameters():
        if "lora_" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=rng)
        p.requires_grad = "lora_" in name
    peft.train()
    for module in peft.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    watched = GradSampleModule(peft, loss_reduction="sum")
    everything = [(data, np.arange(6))]
    batch = collate(everything)
    logits = watched(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.nn.functional.cross_entropy(logits, targets(everything).labels, reduction="sum").backward()
    theirs = [p.grad_sample.flatten(1) for p in peft.parameters() if p.requires_grad]
    norms = torch.cat(theirs, 1).norm(dim=1)
    train: State = {"A": {}, "B": {}}
    for name, p in peft.named_parameters():
        if "lora_" in name:
            site = name.removeprefix("base_model.model.").partition(".lora_")[0]
            train["A" if "lora_A" in name else "B"][site] = p.data.clone()
    given = [(Client("a", 6, 2), Work(train, scale=2.0))]
    sites = sorted(train["A"])
    for i in range(6):
        private = Private(1e9, 0.0, KEY)
        settings = Settings(optimizer="sgd", lr=1.0, local_steps=1, batch_size=9, private=private)
        with Trainer(build("bert").model, sites, [], settings=settings) as trainer:
            done = trainer.fit(given, [data.select([i])], 1)[0]
        assert float((flat(train) - flat(done.state)).norm()) == pytest.approx(float(norms[i]), rel=1e-5)
    assert family.sites and float(norms.min()) > 0
