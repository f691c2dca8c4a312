"""One pass of K clients: their leaves in one (K, P) tensor, their rows end to end in one batch, one optimiser for all.

    leaf (K, P) ──adapter──► A, B, head ──► model ──► one loss per client ──► gradient (K, P) ──clip──► optimiser

Clients come sorted by their number of batches, most first, so those still training at a step are the first rows of every
tensor: a finished client stands still and costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.core import Client, Group, State, Trained, Work
from fedloom.data.text import Encoded, collate
from fedloom.train.dropout import InputDropout
from fedloom.train.host import Host
from fedloom.train.loss import client_losses
from fedloom.train.optim import SGD, AdamW, Settings, clip_, schedule_factor
from fedloom.train.stack import AdapterStack, Views, pack, pad_stack

Plan = list[NDArray[np.int64]]
"""The batches of one client: row indices."""


@dataclass(frozen=True)
class Member:
    """One client of a pass."""

    client: Client
    work: Work
    data: Encoded
    plan: Plan


def run(host: Host, members: Sequence[Member], settings: Settings, t: int) -> list[Trained]:
    """Train the members together; what each trained, on the CPU. Members come with most batches first."""
    dtype = state_dtype([m.work for m in members])
    # Dropout is drawn for rows as they are padded.
    dense = not settings.dropout and not settings.base_dropout
    compute = host.ready(dtype, members[0].work.base, [m.data for m in members], dense)
    host.train(settings.base_dropout, settings.checkpointing)
    layout, flat = pack([m.work.train for m in members], dtype, host.device)
    fixed = [moved(m.work.fixed, dtype, host.device) for m in members]
    factors = AdapterStack([m.work.adapter for m in members], layout, fixed)
    fixed_head = stacked_heads(fixed, compute)
    scale = torch.tensor([m.work.scale for m in members], dtype=compute, device=host.device).view(-1, 1, 1)
    penalised = any(m.work.penalties for m in members)
    optimiser = (
        AdamW(flat, settings.weight_decay)
        if settings.optimizer == "adamw"
        else SGD(flat, settings.weight_decay, settings.momentum)
    )
    record = Record(members, flat)
    for step in range(len(members[0].plan)):
        active = [m for m in members if step < len(m.plan)]
        K = len(active)
        batch = collate([(m.data, m.plan[step]) for m in active])
        leaf = flat[:K].detach().requires_grad_()
        A, B, views = factors(leaf, compute)
        head = heads(views, fixed_head, K)
        host.put(A, B, scale[:K], head, _dropout(settings, t, step, active))
        kind = active[0].data.kind
        losses = client_losses(kind, host.logits(batch, kind), batch.to(host.device))
        objective = losses.sum()
        if penalised:
            own = layout.states(layout.views(leaf), K)
            for m, state, f in zip(active, own, fixed, strict=False):
                for penalty in m.work.penalties:
                    objective = objective + penalty(state, f).to(objective.dtype)
        (grad,) = torch.autograd.grad(objective, leaf)
        norms = clip_(grad, settings.clip)
        rates = [
            settings.lr * m.work.lr * schedule_factor(settings.schedule, step, len(m.plan), settings.warmup)
            for m in active
        ]
        optimiser.step(grad, torch.tensor(rates, dtype=dtype, device=host.device).unsqueeze(1))
        record.add(losses.detach(), norms, rates)
    trained = layout.states(layout.views(flat.cpu()), len(members))
    # Clones: a slice of the stack would keep the whole stack alive.
    own_copies: list[State] = [
        {role: {site: x.clone() for site, x in group.items()} for role, group in state.items()} for state in trained
    ]
    return record.trained(own_copies)


class Record:
    """What happened to each client, gathered without waiting for the device."""

    def __init__(self, members: Sequence[Member], flat: Tensor) -> None:
        self._members = members
        self._loss = torch.zeros(len(members), dtype=torch.float64, device=flat.device)
        self._largest = torch.full((2, len(members)), -torch.inf, dtype=torch.float64, device=flat.device)
        self._lr_sum = [0.0] * len(members)

    def add(self, losses: Tensor, norms: Tensor, rates: Sequence[float]) -> None:
        """losses (K,) of the task, norms (K,) of the gradients, learning rates of the step."""
        largest = self._largest[:, : len(losses)]
        torch.maximum(largest, torch.stack((losses, norms)).double(), out=largest)
        self._loss[: len(losses)] += losses
        for k, rate in enumerate(rates):
            self._lr_sum[k] += rate

    def trained(self, states: Sequence[State]) -> list[Trained]:
        """Each client's result. Metrics: loss_max, grad_norm_max, steps, samples, tokens."""
        sums, (largest, norms) = self._loss.tolist(), self._largest.tolist()
        return [
            Trained(
                state,
                steps=len(m.plan),
                lr_sum=self._lr_sum[k],
                loss=sums[k] / max(1, len(m.plan)),
                metrics={
                    "loss_max": largest[k],
                    "grad_norm_max": norms[k],
                    "steps": float(len(m.plan)),
                    "samples": float(sum(map(len, m.plan))),
                    "tokens": float(m.data.lengths_of(np.concatenate(m.plan)).sum() if m.plan else 0),
                },
            )
            for k, (m, state) in enumerate(zip(self._members, states, strict=True))
        ]


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


def _dropout(settings: Settings, t: int, step: int, active: Sequence[Member]) -> InputDropout | None:
    if not settings.dropout:
        return None
    plans = [(m.data.lengths[m.plan[step]], m.client.id) for m in active]
    return InputDropout(
        settings.dropout,
        settings.seed,
        t,
        step,
        [client for _, client in plans],
        [len(lengths) for lengths, _ in plans],
        [int(lengths.max()) for lengths, _ in plans],
    )
