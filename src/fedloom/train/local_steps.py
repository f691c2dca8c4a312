"""The local steps of K clients at once: their parameters in one (K, P) tensor, their rows in one batch, one optimiser.

    leaf (K, P) ──adapter──► A, B, head ──► model ──► one loss per client ──► gradient (K, P) ──clip──► optimiser

Clients come sorted by their number of batches, most first, so those still training at a step are the first rows of every
tensor: a finished client stands still and costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.core import METRICS, Client, Group, State, Trained, Work, plain
from fedloom.data.batches import Encoded
from fedloom.data.placing import sent
from fedloom.errors import MethodError
from fedloom.train.adapted_model import AdaptedModel, Feed
from fedloom.train.ahead import in_turn
from fedloom.train.dropout import InputDropout
from fedloom.train.flat_parameters import AdapterStack, Layout, Views, flatten, pad_stack
from fedloom.train.loss import client_losses
from fedloom.train.optim import SGD, AdamW, Settings, clip_, schedule_factor
from fedloom.train.private_steps import RowGradients, untold

Plan = list[NDArray[np.int64]]
"""The batches of one client: row indices."""

GateShape = tuple[tuple[str, int, int], ...]
"""(site, parts, ranks) of each gate; empty without any. Equal parts cannot be padded: clients of one pass have one shape."""


@dataclass(frozen=True)
class Member:
    """One client in a batch of them."""

    client: Client
    work: Work
    data: Encoded
    plan: Plan
    gate: GateShape = ()


def run(
    model: AdaptedModel, members: Sequence[Member], settings: Settings, t: int, part: int = 0, ahead: bool = False
) -> list[Trained]:
    """Train the members together; what each trained, on the CPU. Members come with most batches first.

    `t` and `part`, the round and the number of the work in its visit, key what is drawn. Batches are made by a thread one step
    `ahead`, or each when it is needed: the same ones.
    """
    dtype = state_dtype([m.work for m in members])
    compute = _made_ready(model, members, settings, dtype)
    layout, flat = flatten([m.work.train for m in members], dtype, model.device)
    fixed = [moved(m.work.fixed, dtype, model.device) for m in members]
    factors = AdapterStack([m.work.adapter for m in members], layout, fixed)
    fixed_head = stacked_heads(fixed, compute)
    scale = torch.tensor([m.work.scale for m in members], dtype=compute, device=model.device).view(-1, 1, 1)
    optimiser = (
        AdamW(flat, settings.weight_decay)
        if (members[0].work.optimizer or settings.optimizer) == "adamw"
        else SGD(flat, settings.weight_decay, settings.momentum)
    )
    record = Record(members, flat)
    shared = (model, layout, flat, factors, fixed_head, scale, compute)
    private = None
    if settings.private is not None:
        private = RowGradients(*shared, settings.private, settings.batch_size, t, part)
    with _batches(model, members, settings, ahead) as batches:
        for step in range(len(members[0].plan)):
            active = [m for m in members if step < len(m.plan)]
            K = len(active)
            leaf = flat[:K].detach().requires_grad_()
            penalties = _penalties(active, layout, leaf, fixed)
            if private is not None:
                grad = private(active, step)
                losses = norms = grad.new_full((K,), math.nan)
                if penalties:  # of no row: without noise
                    grad += torch.autograd.grad(torch.stack(penalties).sum(), leaf)[0]
            else:
                feed = next(batches)
                adapters, views = factors(leaf, compute)
                model.put(adapters, scale[:K], heads(views, fixed_head, K), _dropout(settings, t, part, step, active))
                losses = client_losses(active[0].data.kind, model.logits(feed), feed.targets)
                (grad,) = torch.autograd.grad(torch.stack([losses.sum(), *penalties]).sum(), leaf)
                norms = clip_(grad, settings.clip)
            rates = [
                settings.lr_of(t) * m.work.lr * schedule_factor(settings.schedule, step, len(m.plan), settings.warmup)
                for m in active
            ]
            optimiser.step(grad, sent(torch.tensor(rates, dtype=dtype), model.device).unsqueeze(1))
            record.add(losses.detach(), norms, rates)
    trained = layout.states(layout.views(flat.cpu()), len(members))
    # Clones: a slice of the stack would keep the whole stack alive.
    own_copies: list[State] = [
        {role: {site: x.clone() for site, x in group.items()} for role, group in state.items()} for state in trained
    ]
    told = record.trained(own_copies)
    return told if private is None else [untold(done) for done in told]


def _made_ready(model: AdaptedModel, members: Sequence[Member], settings: Settings, dtype: torch.dtype) -> torch.dtype:
    """Make the model ready for the members' batches. Returns the dtype to compute in."""
    # The kernels have no gate, and dropout is drawn for rows as they are padded.
    kernels = not members[0].gate and not settings.dropout and not settings.base_dropout
    offset, data = members[0].work.base, [m.data for m in members]
    compute = model.ready(dtype, offset, data, kernels=kernels, pack=kernels, prefix=not settings.base_dropout)
    model.foresee([(m.data, np.concatenate(m.plan)) for m in members if m.plan])
    model.train(settings.base_dropout, settings.checkpointing, settings.int8_products)
    return compute


def _batches(
    model: AdaptedModel, members: Sequence[Member], settings: Settings, ahead: bool
) -> AbstractContextManager[Iterator[Feed]]:
    """The batch of each step. None where rows' gradients are taken apart: they make batches of their own."""
    steps = 0 if settings.private is not None else len(members[0].plan)

    def batch(step: int) -> Feed:
        return model.feed([(m.data, m.plan[step]) for m in members if step < len(m.plan)])

    return in_turn(batch, steps, model.device, ahead)


def _penalties(active: Sequence[Member], layout: Layout, leaf: Tensor, fixed: Sequence[State]) -> list[Tensor]:
    """The terms that the works add to their loss."""
    if not any(m.work.penalties for m in active):
        return []
    states = layout.states(layout.views(leaf), len(active))
    terms = zip(active, states, fixed, strict=False)
    return [penalty(state, f).double() for m, state, f in terms for penalty in m.work.penalties]


class Record:
    """What happened to each client, gathered without waiting for the device."""

    def __init__(self, members: Sequence[Member], flat: Tensor) -> None:
        self._members = members
        self._loss = torch.zeros(len(members), dtype=torch.float64, device=flat.device)
        self._largest = torch.zeros(2, len(members), dtype=torch.float64, device=flat.device)
        self._lr_sum = [0.0] * len(members)

    def add(self, losses: Tensor, norms: Tensor, rates: Sequence[float]) -> None:
        """losses (K,) of the task, norms (K,) of the gradients, learning rates of the step."""
        largest = self._largest[:, : len(losses)]
        torch.maximum(largest, torch.stack((losses, norms)).double(), out=largest)
        self._loss[: len(losses)] += losses
        for k, rate in enumerate(rates):
            self._lr_sum[k] += rate

    def trained(self, states: Sequence[State]) -> list[Trained]:
        """Each client's result, with metrics over its steps; after none the loss is NaN.

        `loss_max` is the largest of the task's loss, `grad_norm_max` the largest norm of the gradient by all that the client
        trains, penalties included, before clipping; `steps`, `samples` and `tokens` are counts.
        """
        sums, (largest, norms) = self._loss.tolist(), self._largest.tolist()
        return [
            Trained(
                state,
                steps=len(m.plan),
                lr_sum=self._lr_sum[k],
                loss=sums[k] / len(m.plan) if m.plan else math.nan,
                metrics=dict(zip(METRICS, (largest[k], norms[k], *_counts(m)), strict=True)),
            )
            for k, (m, state) in enumerate(zip(self._members, states, strict=True))
        ]


def _counts(m: Member) -> tuple[float, float, float]:
    """(steps, samples, tokens) that a client trained on."""
    tokens = m.data.lengths_of(np.concatenate(m.plan)).sum() if m.plan else 0
    return float(len(m.plan)), float(sum(map(len, m.plan))), float(tokens)


def heads(views: Views, fixed: Mapping[str, Tensor], K: int) -> Group:
    """The stacked head parameters (K, *shape) of the first K clients: trained, or else fixed."""
    return {name: x[:K] for name, x in fixed.items()} | {s: x for (role, s), x in views.items() if role == "head"}


def stacked_heads(fixed: Sequence[State], dtype: torch.dtype) -> Group:
    """The heads that are not trained, stacked (K, *shape)."""
    names = fixed[0].get("head", {})
    return {name: pad_stack([state["head"][name] for state in fixed]).to(dtype) for name in names}


def state_dtype(works: Sequence[Work]) -> torch.dtype:
    """float64 if anything to train is, else float32."""
    found = {x.dtype for work in works for group in work.train.values() for x in group.values()}
    return torch.float64 if torch.float64 in found else torch.float32


def moved(state: State, dtype: torch.dtype, device: torch.device) -> State:
    """The state on a device, its floating-point tensors in `dtype` (indices stay integers)."""
    return {
        role: {site: x.to(device, dtype if x.is_floating_point() else None) for site, x in group.items()}
        for role, group in state.items()
    }


def gate_shape(work: Work) -> GateShape:
    """The gates of a work's adapter, asked of it as it is before training.

    Raises MethodError for a gate whose parts do not divide the rank.
    """
    if work.adapter is plain:
        return ()
    dtype, cpu = state_dtype([work]), torch.device("cpu")
    with torch.no_grad():
        factors = work.adapter(moved(work.train, dtype, cpu), moved(work.fixed, dtype, cpu))
    shape = tuple((site, len(x), len(factors.A[site])) for site, x in sorted((factors.gate or {}).items()))
    for site, parts, ranks in shape:
        if ranks % parts:
            raise MethodError(f"the gate of layer {site!r} has {parts} parts, expected a divisor of its {ranks} ranks")
    return shape


def _dropout(settings: Settings, t: int, part: int, step: int, active: Sequence[Member]) -> InputDropout | None:
    if not settings.dropout:
        return None
    plans = [m.data.lengths_of(m.plan[step]) for m in active]
    return InputDropout(
        settings.dropout,
        [(settings.seed, t, m.client.id, *((part,) if part else ()), step) for m in active],
        [len(lengths) for lengths in plans],
        [int(lengths.max()) for lengths in plans],
    )
