"""How much directions and magnitudes of A and B move in one round of local training.

The measure is DoRA's (Liu et al., arXiv 2402.09353): dM = mean |m - m0| (6), dD = mean (1 - cos) (7) over the vectors of a
factor. FedLoRA-Optimizer (arXiv 2510.11274) reports dD_A / dD_B of about 1.7 and dM_B / dM_A of about 41, without saying over
which axis or against which reference: so every convention and reference is measured, and none is expected to match.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from torch import Tensor

from fedloom import checkpoint, dora, lora
from fedloom.core import Work
from fedloom.errors import RunError
from fedloom.rng import generator
from fedloom.runs.experiment import Experiment, experiment
from fedloom.runs.run_directory import RunDirectory
from fedloom.state import State, only

Pair = tuple[Tensor, Tensor]
"""A factor and its reference."""


@dataclass(frozen=True)
class Change:
    """Means over vectors, modules and clients; None where no vector has what it takes."""

    direction: float | None
    magnitude: float | None
    per_root_length: float | None
    """dM / sqrt(length of the vectors) (11)."""
    relative: float | None
    """Mean |m - m0| / m0 over the vectors that had a length."""


@dataclass(frozen=True)
class Row:
    """One convention against one reference."""

    convention: str
    reference: str
    A: Change
    B: Change

    def values(self) -> list[float | None]:
        """dD_A, dD_B, dD_A / dD_B, dM_A, dM_B, dM_B / dM_A, and that ratio per sqrt(length) and of relative changes."""
        A, B = self.A, self.B
        return [
            A.direction,
            B.direction,
            _ratio(A.direction, B.direction),
            A.magnitude,
            B.magnitude,
            _ratio(B.magnitude, A.magnitude),
            _ratio(B.per_root_length, A.per_root_length),
            _ratio(B.relative, A.relative),
        ]


def measure(path: Path, most: int = 8) -> list[Row]:
    """The report of a run: up to `most` of its clients train one LoRA round from its adapter, and one from scratch.

    References: `init` the adapter's own start, `global` the averaged adapter that training started from, `pair_same` two
    clients that started alike, `pair_diff` two clients whose A was drawn from different seeds.
    """
    run = RunDirectory.open(path)
    t, state, _, _ = checkpoint.load(run.checkpoint)
    if t == 0:
        raise RunError(f"{path} has not finished a round yet: there is nothing to compare with; resume it first")
    e = experiment(run.config())
    model = e.global_model(state)
    start = _factors(model) | (only(model.train, "head") or only(model.fixed, "head"))
    clients = e.clients[:most]
    after = _train(e, model, [start] * len(clients), t + 1)
    seed, rank = e.config.seed, e.method.rank
    scratch = [lora.init(e.sites, rank, generator(seed, "sensitivity", c.id)) | e.head for c in clients]
    other = _train(e, model, scratch, t + 1)
    initial = _factors(e.global_model(e.initial_state()))
    references = {
        "init": [(x, initial) for x in after],
        "global": [(x, start) for x in after],
        "pair_same": list(combinations(after, 2)),
        "pair_diff": list(combinations(other, 2)),
    }
    return [
        Row(convention, reference, _change(pairs, "A", dims[0]), _change(pairs, "B", dims[1]))
        for convention, dims in dora.AXES.items()
        for reference, pairs in references.items()
    ]


def _factors(model: Work) -> State:
    made = model.adapter(model.train, model.fixed)
    return {"A": made.A, "B": made.B}


def _train(e: Experiment, model: Work, starts: list[State], t: int) -> list[State]:
    """A plain LoRA round of the first clients, each from its start, in cohorts."""
    trained: list[State] = []
    clients = e.clients[: len(starts)]
    for i in range(0, len(clients), e.cohort):
        group = clients[i : i + e.cohort]
        works = [
            (client, Work(train=start, base=model.base, scale=model.scale))
            for client, start in zip(group, starts[i : i + e.cohort], strict=True)
        ]
        trained += [x.state for x in e.trainer.fit(works, [e.rows_of(client.id) for client in group], t)]
    return trained


def _change(pairs: Iterable[tuple[State, State]], factor: str, dim: int) -> Change:
    def tensors() -> Iterator[Pair]:
        for state, reference in pairs:
            for site, x in state[factor].items():
                yield x, reference[factor][site]

    return change(tensors(), dim)


def change(pairs: Iterable[Pair], dim: int) -> Change:
    """The change of factors against their references, along `dim`: the mean over pairs of each pair's mean over vectors.

    A vector without a length, in either, has no direction and is left out of it; a pair without any vector left, too.

    >>> import torch
    >>> change([(torch.tensor([[2.0], [0.0]]), torch.tensor([[0.0], [1.0]]))], dim=0)
    Change(direction=1.0, magnitude=1.0, per_root_length=0.7071067811865475, relative=1.0)
    """
    turns: list[float] = []
    moves: list[float] = []
    relatives: list[float] = []
    length = 1
    for x, reference in pairs:
        now, before = dora.split(x.double(), dim), dora.split(reference.double(), dim)
        length = x.shape[dim]
        moved = (now.magnitude - before.magnitude).abs()
        moves.append(float(moved.mean()))
        alive = ~(now.dead | before.dead)
        if alive.any():
            turn = 1 - (now.direction * before.direction).sum(dim, keepdim=True)
            turns.append(float(turn[alive].mean()))
        if not before.dead.all():
            relatives.append(float((moved / before.magnitude)[~before.dead].mean()))
    magnitude = _mean(moves)
    return Change(_mean(turns), magnitude, None if magnitude is None else magnitude / length**0.5, _mean(relatives))


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b
