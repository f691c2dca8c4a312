"""All that K clients train as one (K, P) tensor: one row per client, the leaves end to end.

One tensor means that optimiser, clipping and casts are a few kernels for all clients and layers. Leaves of different
shapes (ranks, slices) are padded with zeros to the largest; padding a rank in both factors is exact, because the gradient
there is zero and every optimiser here leaves a zero with zero gradient at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedloom.core import Factors, Group, State

Leaf = tuple[str, str]
"""(role, site)."""

Views = dict[Leaf, Tensor]
"""Leaf -> (K, *shape), shape the largest over the clients."""


@dataclass(frozen=True)
class Layout:
    """Where each leaf lies in a row, and which part of it is a client's own."""

    shapes: dict[Leaf, tuple[int, ...]]
    own: list[dict[Leaf, tuple[int, ...]]]

    @property
    def sizes(self) -> list[int]:
        """Entries of a row that each leaf takes."""
        return [torch.Size(shape).numel() for shape in self.shapes.values()]

    def views(self, flat: Tensor) -> Views:
        """flat (K, P) -> views of it. One split: its backward is one concatenation."""
        pieces = torch.split(flat, self.sizes, dim=1)
        return {
            leaf: piece.view(len(flat), *shape)
            for (leaf, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }

    def states(self, views: Views, K: int) -> list[State]:
        """Each client's own unpadded tensors, differentiable."""
        result: list[State] = [{} for _ in range(K)]
        for (role, site), stack in views.items():
            # unbind, not indexing: its backward is one stack, where an index would fill a tensor of zeros per client.
            for k, x in enumerate(stack.unbind(0)):
                shape = self.own[k][role, site]
                result[k].setdefault(role, {})[site] = x if x.shape == shape else x[_corner(shape)]
        return result


def flatten(states: Sequence[State], dtype: torch.dtype, device: torch.device) -> tuple[Layout, Tensor]:
    """K states with the same roles and sites -> their layout and a new (K, P) tensor that holds copies, padded with zeros."""
    own = [{(role, site): tuple(x.shape) for role, group in s.items() for site, x in group.items()} for s in states]
    shapes = {leaf: _largest([o[leaf] for o in own]) for leaf in sorted(own[0])}
    layout = Layout(shapes, own)
    flat = torch.zeros(len(states), sum(layout.sizes), dtype=dtype)
    for (role, site), stack in layout.views(flat).items():
        for k, state in enumerate(states):
            stack[k][_corner(own[k][role, site])] = state[role][site]
    return layout, flat.to(device)


def pad_stack(tensors: Sequence[Tensor], shape: tuple[int, ...] | None = None) -> Tensor:
    """Tensors of different shapes -> (K, *shape), padded with zeros at the end of each axis; differentiable.

    The shape is the largest by default.
    """
    shape = _largest([tuple(x.shape) for x in tensors]) if shape is None else shape
    padded = []
    for x in tensors:
        gaps = [(0, large - small) for large, small in zip(shape, x.shape, strict=True)]
        flat_gaps = [n for gap in reversed(gaps) for n in gap]
        padded.append(torch.nn.functional.pad(x, flat_gaps) if any(flat_gaps) else x)
    return torch.stack(padded)


class AdapterStack:
    """The stacked A (K, r, in), B (K, out, r) and gate (K, parts, in) of every site, as a work's `adapter` makes them.

    Where `adapter` hands back the very tensor that it was given, for every client, the stack itself is the answer from then on
    and no Python runs per client; what it makes from `fixed` alone is stacked once. The rest is computed at each step.
    """

    def __init__(
        self,
        adapters: Sequence[Callable[[State, State], Factors]],
        layout: Layout,
        fixed: Sequence[State],
        shortcut: bool = True,
    ) -> None:
        self._adapters = adapters
        self._layout = layout
        self._fixed = fixed
        self._shortcut = shortcut
        self._sources: list[_Sources] | None = None  # of A, B and gate

    def __call__(self, leaf: Tensor, dtype: torch.dtype, owners: Sequence[int] | None = None) -> tuple[Factors, Views]:
        """The factors and the stacked leaves in `dtype`, from the `leaf` (K, P) of the first K clients: one cast for all.

        With `owners`, and not in the first call, row i of the leaf (R, P) is another copy of what client owners[i] trains.
        """
        at = slice(0, len(leaf)) if owners is None else torch.tensor(owners, device=leaf.device)
        owners = range(len(leaf)) if owners is None else owners
        low = self._layout.views(leaf.to(dtype))
        made: list[tuple[Group, Group, Group]] = []
        if self._sources is None or any(x.computed for x in self._sources):
            layout = Layout(self._layout.shapes, [self._layout.own[k] for k in owners])
            states = layout.states(layout.views(leaf), len(owners))
            for k, state in zip(owners, states, strict=True):
                factors = self._adapters[k](state, self._fixed[k])
                made.append((factors.A, factors.B, factors.gate or {}))
            if self._sources is None:
                self._sources = [self._sorted([x[i] for x in made], states, dtype) for i in range(3)]
        result: list[Group] = []
        for i, sources in enumerate(self._sources):
            group = {site: low[leaf_of] for site, leaf_of in sources.leaves.items()}
            group |= {site: constant[at] for site, constant in sources.constants.items()}
            for site, shape in sources.computed.items():
                group[site] = pad_stack([x[i][site] for x in made], shape).to(dtype)
            result.append(group)
        A, B, gate = result
        return Factors(A, B, gate or None), low

    def _sorted(self, made: Sequence[Group], states: Sequence[State], dtype: torch.dtype) -> _Sources:
        """Sort each client's factors by site into leaves handed back, constants, and those to compute at each step."""
        names = [
            {id(x): (role, site) for role, group in state.items() for site, x in group.items()} for state in states
        ]
        found = _Sources()
        for site in made[0]:
            tensors = [group[site] for group in made]
            sources = {names[k].get(id(x)) for k, x in enumerate(tensors)}
            source = next(iter(sources))
            if self._shortcut and len(sources) == 1 and source is not None:
                found.leaves[site] = source
            elif not any(x.requires_grad for x in tensors):
                found.constants[site] = pad_stack(tensors).to(dtype)
            else:
                found.computed[site] = _largest([tuple(x.shape) for x in tensors])
        return found


@dataclass
class _Sources:
    """Where the factors of each site come from: one of the three."""

    leaves: dict[str, Leaf] = field(default_factory=dict)
    """Site -> the leaf that it is."""
    constants: Group = field(default_factory=dict)
    """Site -> the stack of what does not depend on what is trained."""
    computed: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Site -> the largest shape over all clients, those that will have finished too: A's rank must stay that of B."""


def _largest(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(max(sizes) for sizes in zip(*shapes, strict=True))


def _corner(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in shape)
