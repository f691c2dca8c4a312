"""All that K clients train as one (K, P) tensor: one row per client, the leaves end to end.

One tensor means that optimiser, clipping and casts are a few kernels for all clients and layers. Leaves of different
shapes (ranks, slices) are padded with zeros to the largest; padding a rank in both factors is exact, because the gradient
there is zero and every optimiser here leaves a zero with zero gradient at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


def pack(states: Sequence[State], dtype: torch.dtype, device: torch.device) -> tuple[Layout, Tensor]:
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
    """The stacked A (K, r, in) and B (K, out, r) of every site, as a method's `adapter` makes them from what is trained.

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
        self._leaves: list[dict[str, Leaf]] | None = None  # for A and for B: site -> the leaf that it is
        self._constants: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        # Site -> the largest shape over all clients, those that will have finished too: A's rank must stay that of B.
        self._computed: tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]] = ({}, {})

    def __call__(self, leaf: Tensor, dtype: torch.dtype) -> tuple[Group, Group, Views]:
        """A, B and the stacked leaves in `dtype`, from the `leaf` (K, P) of the first K clients: one cast for all of them."""
        K = leaf.shape[0]
        low = self._layout.views(leaf.to(dtype))
        states: list[State] | None = None
        if self._leaves is None or any(self._computed):
            states = self._layout.states(self._layout.views(leaf), K)
            factors = [
                adapter(state, fixed)
                for adapter, state, fixed in zip(self._adapters, states, self._fixed, strict=False)
            ]
            made = [(f.A, f.B) for f in factors]
        if self._leaves is None:
            assert states is not None
            self._resolve(made, states, dtype)
        assert self._leaves is not None
        result: tuple[Group, Group] = ({}, {})
        for i in (0, 1):
            result[i].update({site: low[source] for site, source in self._leaves[i].items()})
            result[i].update({site: constant[:K] for site, constant in self._constants[i].items()})
            for site, shape in self._computed[i].items():
                result[i][site] = pad_stack([pair[i][site] for pair in made], shape).to(dtype)
        return (*result, low)

    def _resolve(self, made: Sequence[tuple[Group, Group]], states: Sequence[State], dtype: torch.dtype) -> None:
        """Sort the factors into leaves handed back, constants, and those to compute at each step."""
        names = [
            {id(x): (role, site) for role, group in state.items() for site, x in group.items()} for state in states
        ]
        self._leaves = [{}, {}]
        for i in (0, 1):
            for site in made[0][i]:
                tensors = [pair[i][site] for pair in made]
                sources = {names[k].get(id(x)) for k, x in enumerate(tensors)}
                source = next(iter(sources))
                if self._shortcut and len(sources) == 1 and source is not None:
                    self._leaves[i][site] = source
                elif not any(x.requires_grad for x in tensors):
                    self._constants[i][site] = pad_stack(tensors).to(dtype)
                else:
                    self._computed[i][site] = _largest([tuple(x.shape) for x in tensors])


def _largest(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(max(sizes) for sizes in zip(*shapes, strict=True))


def _corner(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in shape)
