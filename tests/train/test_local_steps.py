"""What a Work asks for and what Trained says of it, on the readable path and with the kernels."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedloom.core import Client, Factors, State, Trained, Work
from fedloom.errors import MethodError
from fedloom.train.optim import Settings, schedule_factor
from fedloom.train.trainer import Trainer

KERNELS: Any = pytest.mark.parametrize("kernels", ["auto", "off"])


def flat(state: State) -> Tensor:
    return torch.cat([x.flatten() for role in sorted(state) for _, x in sorted(state[role].items())])


def equal(one: State, two: State) -> bool:
    return torch.equal(flat(one), flat(two))


@KERNELS
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_clients_that_keep_nothing_of_a_matrix_train_what_they_have(
    name: str, kernels: Any, build: Any, rows: Any, works: Any
) -> None:
    family = build(name)
    data = [rows(n, family.kind, n) for n in (4, 11, 7)]
    whole = works(family)
    empty = [
        (c, replace(w, train=w.train | {"A": no_ranks(w.train["A"], 0), "B": no_ranks(w.train["B"], 1)}))
        for c, w in whole
    ]
    some = [empty[0], whole[1], empty[2]]
    with Trainer(family.model, family.sites, family.heads, settings=Settings(lr=0.01), kernels=kernels) as trainer:
        for given in (empty, some):
            for (_, work), done in zip(given, trainer.fit(given, data, 1), strict=True):
                shapes = {(r, s): x.shape for r, group in work.train.items() for s, x in group.items()}
                assert {(r, s): x.shape for r, group in done.state.items() for s, x in group.items()} == shapes
                assert math.isfinite(done.loss)
                assert equal(done.state, work.train) == (len(flat(work.train)) == 0), (
                    "a head is trained, if there is one"
                )


def no_ranks(group: dict[str, Tensor], axis: int) -> dict[str, Tensor]:
    return {site: x.narrow(axis, 0, 0) for site, x in group.items()}


@KERNELS
def test_clients_that_keep_no_column_train_the_rest(kernels: Any, build: Any, rows: Any, works: Any) -> None:
    family = build("bert")
    clients = [
        (c, Work({"A": no_ranks(w.train["A"], 1), "B": w.train["B"]}, {"full": w.train["A"]}, adapter=columns))
        for c, w in works(family)
    ]
    data = [rows(n, family.kind, n) for n in (4, 11, 7)]
    with Trainer(family.model, family.sites, family.heads, settings=Settings(lr=0.01), kernels=kernels) as trainer:
        for (_, work), done in zip(clients, trainer.fit(clients, data, 1), strict=True):
            assert all(x.numel() == 0 and x.shape == work.train["A"][s].shape for s, x in done.state["A"].items())
            assert not equal({"B": done.state["B"]}, {"B": work.train["B"]})


def columns(train: State, fixed: State) -> Factors:
    """The columns that a client keeps, here none, among those that it does not."""
    A = {s: torch.cat([train["A"][s], full[:, train["A"][s].shape[1] :]], 1) for s, full in fixed["full"].items()}
    return Factors(A, train["B"])


@KERNELS
def test_losses_leave_penalties_out(kernels: Any, build: Any, rows: Any, works: Any) -> None:
    family = build("bert")
    clients = works(family)
    data = [rows(n, family.kind, n) for n in (4, 11, 7)]
    still = Settings(lr=0.0)
    pulled = [(c, replace(w, penalties=(pull, pull))) for c, w in clients]
    with Trainer(family.model, family.sites, family.heads, settings=still, kernels=kernels) as trainer:
        usual, penalised = trainer.fit(clients, data, 1), trainer.fit(pulled, data, 1)
    for one, two in zip(usual, penalised, strict=True):
        assert (one.loss, one.metrics["loss_max"]) == (two.loss, two.metrics["loss_max"])
        assert two.metrics["grad_norm_max"] > 10 * one.metrics["grad_norm_max"]
    with Trainer(family.model, family.sites, family.heads, settings=Settings(lr=0.1), kernels=kernels) as trainer:
        norms = [[float(flat(x.state).norm()) for x in trainer.fit(given, data, 1)] for given in (clients, pulled)]
    assert all(b < a for a, b in zip(*norms, strict=True))


def pull(train: State, fixed: State) -> Tensor:
    return 50.0 * torch.stack([x.square().sum() for group in train.values() for x in group.values()]).sum()


def test_the_largest_gradient_norm_is_that_before_clipping(build: Any, rows: Any, works: Any) -> None:
    family = build("bert")
    found = []
    for clip in (None, 1e-3):
        settings = Settings(lr=1.0, optimizer="sgd", clip=clip, local_steps=1)
        with Trainer(family.model, family.sites, family.heads, settings=settings) as trainer:
            ((_, work),) = given = works(family, ranks=[3])
            (done,) = trainer.fit(given, [rows(4, family.kind)], 1)
        found.append((done.metrics["grad_norm_max"], float((flat(done.state) - flat(work.train)).norm())))
    (norm, moved), (clipped_norm, clipped) = found
    assert norm == clipped_norm == pytest.approx(moved, rel=1e-9)
    assert clipped == pytest.approx(1e-3, rel=1e-4)


class Tower(nn.Module):
    """Twelve layers named layer.0 to layer.11 that tell classes from the mean of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.layer = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))
        self.score = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = (self.embed(input_ids) * attention_mask.unsqueeze(-1)).sum(1) / attention_mask.sum(1, keepdim=True)
        for layer in self.layer:
            x = x + layer(x).tanh()
        return type("Output", (), {"logits": self.score(x)})()


def test_the_order_of_keys_cannot_change_a_bit(rows: Any) -> None:
    torch.manual_seed(0)
    model = Tower()
    sites = [f"layer.{i}" for i in range(12)]
    train: State = {
        "A": {s: torch.randn(2, 8) for s in sites},
        "B": {s: torch.randn(8, 2) for s in sites},
        "head": {"score.weight": torch.randn(3, 8), "score.bias": torch.randn(3)},
    }
    data = rows(20, "classification")
    orders = [sites, sites[::-1], sorted(sites), [sites[i] for i in torch.randperm(12).tolist()]]
    results = []
    with Trainer(model, sites, ["score"], settings=Settings(lr=0.1, clip=0.01, batch_size=4)) as trainer:
        for order in orders:
            shuffled: State = {"head": dict(reversed(train["head"].items()))}
            shuffled |= {role: {s: train[role][s] for s in order} for role in ("B", "A")}
            (done,) = trainer.fit([(Client("c", 20, 2), Work(shuffled))], [data], 1)
            results.append(done)
    assert results[0].metrics["grad_norm_max"] > 0.01, "clipping is in force"
    assert all(equal(done.state, results[0].state) for done in results[1:])
    assert all(done.metrics == results[0].metrics for done in results[1:])


@KERNELS
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_steps_of_a_work_are_its_own(optimizer: Any, kernels: Any, build: Any, rows: Any, works: Any) -> None:
    family = build("bert")
    steps = (0, 5, None)
    clients = [(c, replace(w, steps=n)) for (c, w), n in zip(works(family), steps, strict=True)]
    data = [rows(n, family.kind, n) for n in (4, 11, 7)]
    settings = Settings(lr=0.02, batch_size=3, local_steps=3, momentum=0.9, weight_decay=0.1, optimizer=optimizer)
    with Trainer(family.model, family.sites, family.heads, settings=settings, kernels=kernels) as trainer:
        together = trainer.fit(clients, data, 1)
        alone = [trainer.fit([work], [encoded], 1)[0] for work, encoded in zip(clients, data, strict=True)]
    assert [done.steps for done in together] == [0, 5, 3]
    for one, two in zip(together, alone, strict=True):
        torch.testing.assert_close(flat(one.state), flat(two.state), rtol=0, atol=1e-9)
    assert equal(together[0].state, clients[0][1].train)
    nothing = together[0]
    assert math.isnan(nothing.loss) and nothing.lr_sum == 0
    assert nothing.metrics == dict.fromkeys(("loss_max", "grad_norm_max", "steps", "samples", "tokens"), 0.0)


def test_work_of_no_steps_alone(build: Any, rows: Any, works: Any) -> None:
    family = build("llama")
    ((client, work),) = works(family, ranks=[2])
    with Trainer(family.model, family.sites) as trainer:
        (done,) = trainer.fit([(client, replace(work, steps=0))], [rows(4, family.kind)], 1)
    assert done.steps == 0 and equal(done.state, work.train)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_lr_sum_is_the_sum_of_the_rates(schedule: Any, build: Any, rows: Any, works: Any) -> None:
    family = build("bert")
    clients = [
        (c, replace(w, lr=lr, steps=n)) for (c, w), lr, n in zip(works(family), (1.0, 0.5, 2.0), (4, 7, 1), strict=True)
    ]
    data = [rows(n, family.kind, n) for n in (4, 11, 7)]
    settings = Settings(lr=0.025, lr_last=0.015, rounds=2, schedule=schedule, warmup=0.3)  # 0.02 in round 1 of 2
    with Trainer(family.model, family.sites, family.heads, settings=settings) as trainer:
        for (_, work), done in zip(clients, trainer.fit(clients, data, 1), strict=True):
            assert work.steps == done.steps
            rates = [0.02 * work.lr * schedule_factor(schedule, s, done.steps, 0.3) for s in range(done.steps)]
            assert done.lr_sum == pytest.approx(sum(rates), rel=1e-12)


@pytest.mark.parametrize(
    "settings", [Settings(lr=0.02, batch_size=3), Settings(lr=0.02, dropout=0.3), Settings(lr=0.02, base_dropout=True)]
)
def test_a_second_work_of_a_visit_draws_anew(settings: Settings, build: Any, rows: Any, works: Any) -> None:
    family = build("bert")
    clients = works(family, ranks=[2])
    data = [rows(16, family.kind)]  # with dropout, one batch of all rows: what differs is what was dropped
    with Trainer(family.model, family.sites, family.heads, settings=settings) as trainer:
        first, again, second = (trainer.fit(clients, data, 1, part)[0] for part in (0, 0, 1))
    assert equal(first.state, again.state)
    assert not torch.allclose(flat(first.state), flat(second.state), rtol=0, atol=1e-5)


def gated(train: State, fixed: State) -> Factors:
    return Factors(train["A"], train["B"], train["gate"])


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_gates_train_batched_as_alone(name: str, build: Any, rows: Any, works: Any) -> None:
    """Ranks and parts differ among clients: equal parts of a padded rank would be other parts."""
    family = build(name)
    torch.manual_seed(0)
    clients = []
    for (client, work), parts in zip(works(family, ranks=(2, 4, 4, 4)), (2, 2, 4, 2), strict=True):
        gate = {site: torch.randn(parts, x.shape[1]).double() for site, x in work.train["A"].items()}
        clients.append((client, replace(work, train=work.train | {"gate": gate}, adapter=gated)))
    data = [rows(n, family.kind, n) for n in (4, 11, 7, 6)]
    with Trainer(family.model, family.sites, family.heads, settings=Settings(lr=0.01, batch_size=3)) as trainer:
        together = trainer.fit(clients, data, 1)
        alone: list[Trained] = [trainer.fit([work], [d], 1)[0] for work, d in zip(clients, data, strict=True)]
        for (_, work), one, two, d in zip(clients, together, alone, data, strict=True):
            torch.testing.assert_close(flat(one.state), flat(two.state), rtol=0, atol=1e-9)
            assert not torch.allclose(flat({"g": one.state["gate"]}), flat({"g": work.train["gate"]}), atol=1e-4)
            before, after = (trainer.evaluate(replace(work, train=s), d).loss for s in (work.train, one.state))
            assert after < before


def test_a_gate_that_does_not_divide_the_rank_is_refused(build: Any, rows: Any, works: Any) -> None:
    family = build("bert")
    ((client, work),) = works(family, ranks=[3])
    gate = {site: torch.zeros(2, x.shape[1]) for site, x in work.train["A"].items()}
    with (
        Trainer(family.model, family.sites, family.heads) as trainer,
        pytest.raises(MethodError, match="2 parts, expected a divisor of its 3 ranks"),
    ):
        trainer.fit(
            [(client, replace(work, train=work.train | {"gate": gate}, adapter=gated))], [rows(4, family.kind)], 1
        )
