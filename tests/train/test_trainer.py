"""The contract of the trainer: a client's result does not depend on who trains beside it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from fedloom.core import Client, Factors, State, Trained, Work
from fedloom.data.batches import Encoded, collate, schedule
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer

Works = list[tuple[Client, Work]]
FAMILIES = ("bert", "roberta", "llama", "gpt2", "gpt2-classifier")


def distance(one: State, two: State) -> float:
    assert {r: set(g) for r, g in one.items()} == {r: set(g) for r, g in two.items()}
    return max(float((one[r][s] - two[r][s]).abs().max()) for r in one for s in one[r])


def one_by_one(trainer: Trainer, works: Works, data: list[Encoded]) -> list[Trained]:
    return [trainer.fit([work], [encoded], 1)[0] for work, encoded in zip(works, data, strict=True)]


def apart(one: list[Trained], two: list[Trained]) -> float:
    return max(distance(a.state, b.state) for a, b in zip(one, two, strict=True))


def awkward(received: State) -> Work:
    """B by direction and magnitude, A through a slice of its columns, a penalty on the last rank: all need unpadded tensors."""
    A = {site: x[:, ::2].clone() for site, x in received["A"].items()}
    norm = {site: x.norm(dim=0) for site, x in received["B"].items()}
    direction = {site: x / x.norm(dim=0) for site, x in received["B"].items()}
    train: State = {"A": A, "norm": norm, "direction": direction} | head_of(received)
    return Work(
        train=train, fixed={"full": received["A"]}, scale=0.7, adapter=awkward_factors, penalties=(last_rank, last_rank)
    )


def awkward_factors(train: State, fixed: State) -> Factors:
    A = {}
    for site, full in fixed["full"].items():
        columns = torch.arange(0, full.shape[1], 2)
        A[site] = full.index_copy(1, columns, train["A"][site])
    return Factors(A, {s: x / x.norm(dim=0) * train["norm"][s] for s, x in train["direction"].items()})


def last_rank(train: State, fixed: State) -> Tensor:
    return torch.stack([x[-1].square().sum() for x in train["A"].values()]).sum()


def head_of(state: State) -> State:
    return {"head": state["head"]} if "head" in state else {}


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", FAMILIES)
def test_batched_equals_sequential(
    name: str, dropout: float, optimizer: Any, kernels: Any, build: Any, rows: Any, works: Any
) -> None:
    settings = Settings(
        optimizer=optimizer,
        lr=0.02,
        weight_decay=0.1,
        momentum=0.9,
        clip=0.3,
        batch_size=3,
        schedule="cosine",
        warmup=0.3,
        dropout=dropout,
    )
    for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        family = build(name)
        clients = works(family, dtype=dtype)
        data = [rows(n, family.kind, n) for n in (4, 11, 7)]  # 2, 4 and 3 batches
        with Trainer(family.model, family.sites, family.heads, kernels=kernels, settings=settings) as trainer:
            together = trainer.fit(clients, data, 1)
            alone = one_by_one(trainer, clients, data)
        assert apart(together, alone) < limit
        for ours, theirs, n in zip(together, alone, (4, 11, 7), strict=True):
            assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-4)
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
            assert ours.lr_sum == theirs.lr_sum
            assert ours.metrics["samples"] == n
            assert ours.steps == ours.metrics["steps"] == -(-n // 3)
        for ours, (_, work) in zip(together, clients, strict=True):
            assert distance(ours.state, work.train) > 1e-3
            tensors = [x for group in ours.state.values() for x in group.values()]
            assert all(x.dtype == dtype and x.device.type == "cpu" for x in tensors)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_batched_equals_sequential_where_the_method_computes_its_adapter(
    name: str, build: Any, rows: Any, works: Any
) -> None:
    family = build(name)
    prepared = [(c, awkward(w.train)) for c, w in works(family)]
    data = [rows(n, family.kind, n) for n in (11, 4, 7)]
    with Trainer(family.model, family.sites, family.heads, settings=Settings(lr=0.01, batch_size=3)) as trainer:
        together = trainer.fit(prepared, data, 1)
        assert apart(together, one_by_one(trainer, prepared, data)) < 1e-9
    assert distance(together[0].state, prepared[0][1].train) > 1e-3


def test_nothing_handed_in_changes(build: Any, rows: Any, works: Any) -> None:
    family = build("bert")
    clients = works(family, dtype=torch.float32)
    base = {
        "left": {s: torch.randn(16, 2) for s in family.sites[:1]},
        "right": {s: torch.randn(2, 16) for s in family.sites[:1]},
    }
    clients = [(c, replace(w, base=base)) for c, w in clients]
    data = [rows(n, family.kind, n) for n in (4, 11, 7)]
    before = copy.deepcopy((clients, data))
    weights = {n: p.clone() for n, p in family.model.named_parameters()}
    with Trainer(family.model, family.sites, family.heads) as trainer:
        trainer.fit(clients, data, 1)
        trainer.evaluate(clients[0][1], data[0])
    assert all(torch.equal(p, weights[n]) for n, p in family.model.named_parameters())
    for (_, was), (_, now) in zip(before[0], clients, strict=True):
        assert distance(was.train, now.train) == 0
        assert distance(was.base, now.base) == 0
    for was, now in zip(before[1], data, strict=True):
        assert (was.tokens == now.tokens).all()


def labels_of(encoded: Encoded, rows: Any) -> Tensor:
    """As transformers wants them: of a row, or of each token, -100 where the loss does not count."""
    if encoded.starts is None:
        return torch.from_numpy(encoded.targets[rows])
    labels = torch.full((len(rows), int(encoded.lengths[rows].max())), -100)
    for i, row in enumerate(rows):
        tokens, start = encoded.tokens[encoded.offsets[row] : encoded.offsets[row + 1]], encoded.starts[row]
        labels[i, start : len(tokens)] = torch.from_numpy(tokens[start:])
    return labels


def plain_loop(
    family: Any, work: Work, encoded: Encoded, client: str, settings: Settings, t: int
) -> tuple[dict[str, Tensor], list[float]]:
    """What a person writes: merged weights, logits everywhere, torch's own loss and optimiser."""
    model = copy.deepcopy(family.model).double().eval()
    leaves = {f"{r} {s}": x.clone().requires_grad_() for r, g in work.train.items() for s, x in g.items()}
    optimiser = torch.optim.AdamW(leaves.values(), lr=settings.lr, weight_decay=settings.weight_decay)
    losses = []
    plan = schedule(encoded.lengths, settings.batch_size, (settings.seed, t, client), epochs=1)
    for chosen in plan:
        weights = {}
        for site in family.sites:
            layer = model.get_submodule(site)
            product = work.scale * leaves[f"B {site}"] @ leaves[f"A {site}"]
            weights[f"{site}.weight"] = layer.weight + (product.T if isinstance(layer, Conv1D) else product)
        for name, x in leaves.items():
            if name.startswith("head "):
                weights[name.removeprefix("head ")] = x
        batch, labels = collate([(encoded, chosen)]), labels_of(encoded, chosen)
        arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        logits = functional_call(model, weights, (), arguments).logits
        if family.kind == "causal-lm":
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)
        optimiser.zero_grad()
        loss.backward()
        if settings.clip:
            torch.nn.utils.clip_grad_norm_(leaves.values(), settings.clip)
        optimiser.step()
        losses.append(loss.item())
    return {name: x.detach() for name, x in leaves.items()}, losses


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "gpt2-classifier"])
def test_one_client_equals_a_hand_written_loop(name: str, kernels: Any, build: Any, rows: Any, works: Any) -> None:
    family = build(name)
    (client, work), encoded = works(family, ranks=[3])[0], rows(10, family.kind)
    settings = Settings(lr=0.01, weight_decay=0.1, clip=0.4, batch_size=4)
    wanted, losses = plain_loop(family, work, encoded, client.id, settings, 5)
    with Trainer(family.model, family.sites, family.heads, kernels=kernels, settings=settings) as trainer:
        (done,) = trainer.fit([(client, work)], [encoded], 5)
    for role, group in done.state.items():
        for site, x in group.items():
            torch.testing.assert_close(x, wanted[f"{role} {site}"], rtol=0, atol=1e-10)
    assert done.loss == pytest.approx(sum(losses) / len(losses), abs=1e-10)
    assert done.metrics["loss_max"] == pytest.approx(max(losses), abs=1e-10)


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_a_finished_client_stands_still(kernels: Any, build: Any, rows: Any, works: Any) -> None:
    family = build("bert")
    clients = works(family)
    data = [rows(3, family.kind, 1), rows(30, family.kind, 2), rows(30, family.kind, 3)]
    settings = Settings(lr=0.05, momentum=0.9, weight_decay=0.1, batch_size=3)
    for optimizer in ("adamw", "sgd"):
        with Trainer(
            family.model, family.sites, family.heads, kernels=kernels, settings=replace(settings, optimizer=optimizer)
        ) as trainer:
            together = trainer.fit(clients, data, 1)
            alone = trainer.fit(clients[:1], data[:1], 1)
        # One step against ten: momentum or moments would have moved it on.
        assert apart(together[:1], alone) < 1e-12
        assert together[0].steps == 1


def test_padding_stays_zero_and_is_not_returned(build: Any, rows: Any, works: Any) -> None:
    family = build("llama")
    clients = works(family)
    data = [rows(7, family.kind, n) for n in range(3)]
    with Trainer(family.model, family.sites, settings=Settings(lr=0.05, weight_decay=0.1)) as trainer:
        for (client, work), done in zip(clients, trainer.fit(clients, data, 1), strict=True):
            state = done.state
            assert all(x.shape == work.train[r][s].shape for r, g in state.items() for s, x in g.items())
            assert state["A"][family.sites[0]].shape[0] == client.rank
            assert state["A"][family.sites[0]].is_contiguous()
            assert state["A"][family.sites[0]].untyped_storage().nbytes() == state["A"][family.sites[0]].nbytes


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2-classifier"])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_nan_stays_with_its_client(
    name: str,
    k: int,
    few_shapes: bool,
    kernels: Any,
    build: Any,
    rows: Any,
    works: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedloom.train.kernels.packing.rounds", lambda *_: few_shapes)
    family = build(name)
    clients = works(family, dtype=torch.float32)
    broken = copy.deepcopy(clients)
    site = family.sites[0]
    broken[k][1].train["A"][site][0, 0] = float("nan")
    data = [rows(7, family.kind, n) for n in range(3)]
    with Trainer(family.model, family.sites, family.heads, kernels=kernels, settings=Settings(clip=0.1)) as trainer:
        good = trainer.fit(clients, data, 1)
        bad = trainer.fit(broken, data, 1)
    for i in range(3):
        if i == k:
            assert bad[i].state["A"][site].isnan().any()
            assert bad[i].metrics["loss_max"] != bad[i].metrics["loss_max"]
        else:
            assert apart([good[i]], [bad[i]]) == 0
            assert (bad[i].metrics, bad[i].loss) == (good[i].metrics, good[i].loss)


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputing_activations_changes_nothing(
    name: str, dropout: float, kernels: Any, build: Any, rows: Any, works: Any
) -> None:
    family = build(name)
    clients = works(family)
    data = [rows(n, family.kind, n) for n in (4, 11, 7)]
    results = []
    for checkpointing in (False, True):
        settings = Settings(checkpointing=checkpointing, dropout=dropout, lr=0.01)
        with Trainer(family.model, family.sites, family.heads, kernels=kernels, settings=settings) as trainer:
            results.append(trainer.fit(clients, data, 1))
    assert apart(*results) < 1e-12


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_every_form_of_offset_is_the_merged_weight(kernels: Any, build: Any, rows: Any, works: Any) -> None:
    for name in ("bert", "gpt2"):
        family = build(name)
        clients = works(family)
        data = [rows(n, family.kind, n) for n in (4, 11, 7)]
        sites = {s: (w.shape[0], clients[0][1].train["A"][s].shape[1]) for s, w in clients[0][1].train["B"].items()}
        left = {s: torch.randn(m, 3).double() * 0.1 for s, (m, _) in sites.items()}
        right = {s: torch.randn(3, n).double() for s, (_, n) in sites.items()}
        wide = {s: torch.cat([x] * 9, dim=1) / 9 for s, x in left.items()}  # more ranks than the layer has
        merged = copy.deepcopy(family)
        merged.model.double()
        for s in sites:
            layer, product = merged.model.get_submodule(s), left[s] @ right[s]
            layer.get_parameter("weight").data += product.T if isinstance(layer, Conv1D) else product
        settings = Settings(lr=0.01)
        with Trainer(merged.model, merged.sites, merged.heads, kernels=kernels, settings=settings) as trainer:
            wanted = trainer.fit(clients, data, 1)
            scores = trainer.evaluate(clients[0][1], data[0])
        forms: list[State] = [
            {"left": left, "right": right},
            {"left": {s: left[s] @ right[s] for s in sites}},
            {"left": wide, "right": {s: torch.cat([x] * 9) for s, x in right.items()}},
        ]
        for form in forms:
            with Trainer(family.model, family.sites, family.heads, kernels=kernels, settings=settings) as trainer:
                given = [(c, replace(w, base=form)) for c, w in clients]
                assert apart(trainer.fit(given, data, 1), wanted) < 1e-9
                assert trainer.evaluate(given[0][1], data[0]).loss == pytest.approx(scores.loss, abs=1e-9)
                # Works with offsets of their own, and one without, train side by side without meeting.
                mixed = [given[0], (clients[1][0], replace(clients[1][1], base={})), given[2]]
                result = trainer.fit(mixed, data, 1)
                assert apart(result[::2], wanted[::2]) < 1e-9
                assert distance(result[1].state, wanted[1].state) > 1e-6


def test_works_of_different_roles_and_types_run_in_one_call(build: Any, rows: Any, works: Any) -> None:
    family = build("bert")
    clients = works(family)
    only_b = Work(train={"B": clients[1][1].train["B"]}, fixed={"A": clients[1][1].train["A"]}, scale=1.0)
    single = {r: {s: x.float() for s, x in g.items()} for r, g in clients[2][1].train.items()}
    mixed = [clients[0], (clients[1][0], only_b), (clients[2][0], Work(train=single))]
    data = [rows(n, family.kind, n) for n in (4, 11, 7)]
    with Trainer(family.model, family.sites, family.heads, settings=Settings(lr=0.01)) as trainer:
        together = trainer.fit(mixed, data, 1)
        assert apart(together, one_by_one(trainer, mixed, data)) == 0
    assert list(together[1].state) == ["B"]
    assert together[2].state["A"][family.sites[0]].dtype == torch.float32


def test_learning_rate_of_a_work_and_schedule_are_its_own(build: Any, rows: Any, works: Any) -> None:
    family = build("bert")
    clients = works(family)
    data = [rows(n, family.kind, n) for n in (4, 11, 7)]
    slower = [(c, replace(w, lr=0.5)) for c, w in clients]
    frozen = [clients[0], (clients[1][0], replace(clients[1][1], lr=0.0)), clients[2]]
    with Trainer(family.model, family.sites, family.heads, settings=Settings(lr=0.02, schedule="linear")) as trainer:
        first = trainer.fit(slower, data, 1)
        stopped = trainer.fit(frozen, data, 1)
        usual = trainer.fit(clients, data, 1)
    with Trainer(family.model, family.sites, family.heads, settings=Settings(lr=0.01, schedule="linear")) as trainer:
        assert apart(first, trainer.fit(clients, data, 1)) < 1e-12
    assert distance(stopped[1].state, frozen[1][1].train) == 0
    assert apart(stopped[::2], usual[::2]) < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_base_trains_float32_adapters(name: str, build: Any, rows: Any, works: Any) -> None:
    family = build(name)
    clients = works(family, dtype=torch.float32)
    data = [rows(n, family.kind, n) for n in (4, 11, 7)]
    settings = Settings(lr=0.01, batch_size=3)
    with Trainer(family.model, family.sites, family.heads, settings=settings) as trainer:
        exact = trainer.fit(clients, data, 1)
    with Trainer(family.model, family.sites, family.heads, settings=settings, dtype=torch.bfloat16) as trainer:
        together = trainer.fit(clients, data, 1)
        loss = trainer.evaluate(clients[0][1], data[0]).loss
    for done, wanted in zip(together, exact, strict=True):
        assert all(x.dtype == torch.float32 and x.isfinite().all() for g in done.state.values() for x in g.values())
        assert done.loss == pytest.approx(wanted.loss, rel=0.05)
    assert loss == pytest.approx(loss)


def test_the_same_call_gives_the_same_bytes(build: Any, rows: Any, works: Any) -> None:
    family = build("bert")
    clients = works(family, dtype=torch.float32)
    data = [rows(n, family.kind, n) for n in (4, 11, 7)]
    for settings in (Settings(dropout=0.2), Settings(base_dropout=True)):
        with Trainer(family.model, family.sites, family.heads, settings=settings) as trainer:
            state = torch.get_rng_state()
            one = trainer.fit(clients, data, 1)
            torch.rand(3)
            assert apart(one, trainer.fit(clients, data, 1)) == 0
            assert apart(one, trainer.fit(clients, data, 2)) > 0
            torch.set_rng_state(state)


def test_losses_fall_on_every_architecture(build: Any, rows: Any, works: Any) -> None:
    for name in FAMILIES:
        family = build(name)
        (client, work), encoded = works(family, ranks=[4], dtype=torch.float32)[0], rows(16, family.kind)
        settings = Settings(lr=0.03, local_steps=40)
        with Trainer(family.model, family.sites, family.heads, settings=settings) as trainer:
            before = trainer.evaluate(work, encoded).loss
            (done,) = trainer.fit([(client, work)], [encoded], 1)
            assert trainer.evaluate(replace(work, train=done.state), encoded).loss < 0.97 * before
        assert done.steps == 40
