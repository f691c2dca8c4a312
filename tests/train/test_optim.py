"""The stacked optimisers against torch's own, one client at a time."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from fedloom.train.optim import SGD, AdamW, Settings, clip_, schedule_factor


@pytest.mark.parametrize("name", ["adamw", "sgd", "sgd-momentum"])
def test_rows_follow_torch_optimisers_and_stop_when_left_out(name: str) -> None:
    torch.manual_seed(0)
    start = torch.randn(3, 5).double()
    steps, rates = [6, 4, 1], [0.1, 0.02, 0.3]
    grads = torch.randn(6, 3, 5).double()
    flat = start.clone()
    ours: AdamW | SGD
    ours = AdamW(flat, 0.1) if name == "adamw" else SGD(flat, 0.1, 0.9 if name == "sgd-momentum" else 0.0)
    for s in range(6):
        K = sum(s < n for n in steps)
        ours.step(grads[s, :K].clone(), torch.tensor(rates[:K], dtype=torch.float64).unsqueeze(1))
    for k in range(3):
        x = start[k].clone().requires_grad_()
        theirs: torch.optim.Optimizer
        if name == "adamw":
            theirs = torch.optim.AdamW([x], lr=rates[k], weight_decay=0.1)
        else:
            theirs = torch.optim.SGD(
                [x], lr=rates[k], weight_decay=0.1, momentum=0.9 if name == "sgd-momentum" else 0.0
            )
        for s in range(steps[k]):
            x.grad = grads[s, k].clone()
            theirs.step()
        torch.testing.assert_close(flat[k], x.detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("make", [lambda x: AdamW(x, 0.1), lambda x: SGD(x, 0.1, 0.9)])
def test_zeros_with_zero_gradient_stay_zero(make: type[AdamW]) -> None:
    flat = torch.tensor([[1.0, 0.0]])
    optimiser = make(flat)
    for _ in range(5):
        optimiser.step(torch.tensor([[1.0, 0.0]]), torch.full((1, 1), 0.1))
    assert flat[0, 1] == 0
    assert flat[0, 0] != 1


def test_clip_is_per_row_and_a_nan_stays_in_its_row() -> None:
    grad = torch.tensor([[3.0, 4.0], [0.3, 0.4], [float("nan"), 1.0]])
    before = grad.clone()
    norms = clip_(grad, 1.0)
    assert norms[:2].tolist() == pytest.approx([5.0, 0.5])
    assert grad[0].norm().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(grad[1], before[1])
    assert grad[2].isnan().all()
    untouched = before.clone()
    clip_(untouched, None)
    assert torch.equal(untouched[:2], before[:2])


def test_schedule_covers_a_clients_own_steps() -> None:
    def factors(name: str, n: int, warmup: float = 0.0) -> Tensor:
        return torch.tensor([schedule_factor(name, s, n, warmup) for s in range(n)])  # type: ignore[arg-type]

    assert (factors("constant", 5) == 1).all()
    assert factors("constant", 5, 0.4).tolist() == pytest.approx([0.5, 1, 1, 1, 1])
    assert factors("linear", 5).tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert factors("cosine", 2).tolist() == pytest.approx([1, 0.5])
    assert factors("linear", 1, 1.0).tolist() == pytest.approx([1.0])


def test_the_rate_falls_by_a_cosine_over_the_rounds() -> None:
    rate = Settings(lr=5e-5, lr_last=1e-6, rounds=200).lr_of
    for t in (1, 77, 200):
        assert rate(t) == pytest.approx(1e-6 + (5e-5 - 1e-6) / 2 * (1 + math.cos(math.pi * t / 200)))
    assert rate(201) == rate(200) == 1e-6
    assert Settings(lr=0.3, rounds=2).lr_of(2) == 0.3


def test_defaults_are_those_of_the_run_file() -> None:
    from fedloom.runs import config

    section, settings = config.TrainSection(), Settings()
    common = {field.name for field in fields(Settings)} & set(config.TrainSection.model_fields)
    assert {"batch_size", "local_steps", "local_epochs", "lr", "clip", "base_dropout"} <= common
    assert {name: getattr(section, name) for name in common} == {name: getattr(settings, name) for name in common}
