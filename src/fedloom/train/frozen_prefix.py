"""The frozen prefix of a model: the blocks below the first adapted one, computed once for each row and then read.

    tokens of a row ──► embeddings ──► block 0 ──► ... ──► block f - 1 ──► states (L, H), kept while there is room
                                                                             │
                        rows of a batch ─────────────────────────────────────┴──► block f, the first with an adapter ──► ...

Nothing of it changes in training, and no gradient goes into it. What leaves it depends on a row's tokens alone, so a row is
found by them, in training and in evaluation, of whichever client it is.

A row is always computed in a batch of one shape, which its own length decides: as many rows as make some hundreds of tokens,
padded to a multiple of 16. What is kept and what is made anew for want of room are then the same bits wherever the rows of a
product do not depend on each other (all but mixtures of experts). They are those of a batch that goes through the whole model
up to rounding: its shapes are others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedloom.data.batches import ClientRows, Encoded, collate, spans
from fedloom.data.placing import sent
from fedloom.models.blocks import below, find_blocks
from fedloom.models.usable import positions

DEFAULT_BYTES = 1 << 30

_ALIGN = 16

_TOKENS = {"cpu": 256}
"""Of one batch of rows: as fast as more on two cores, and little is wasted where rows are few."""

_MORE_TOKENS = 4096
"""The same on other devices."""

_ROW_BYTES = 1024
"""That a row takes beside its numbers: its key and two objects."""

Key = tuple[bytes, bytes]
"""A row's tokens and token types."""

Wanted = dict[Key, tuple[Encoded, int]]
"""Rows to compute."""


Attending = Callable[[int], AbstractContextManager[None]]
"""Has the model attend, for a while, as suits padded rows of so many tokens."""


@dataclass
class Told:
    """What became of the rows that were asked for."""

    blocks: int
    """How many are in the prefix."""
    kept_rows: int = 0
    """Different rows whose states are kept."""
    kept_bytes: int = 0
    """That these take."""
    computed_anew: int = 0
    """How often a batch had a row for which there was no room."""
    why_not: str | None = None
    """Why batches go through the whole model instead, if they do."""

    @property
    def shortfall(self) -> str:
        """What a person may want to know of that; empty if all was kept."""
        if self.why_not is not None:
            return f"the {self.blocks} frozen blocks were computed in every step, as {self.why_not}"
        if self.computed_anew:
            return (
                f"rows of a batch were computed anew {self.computed_anew} times in the {self.blocks} frozen blocks: there was "
                f"room for {self.kept_rows} rows (engine.prefix_gib)"
            )
        return ""


class FrozenPrefix:
    """The first blocks of a model, and the states that left them for every row seen."""

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], entry: str, most_bytes: int, attending: Attending
    ) -> None:
        """`entry` is the first block after the prefix; what is kept takes `most_bytes` at most."""
        self.blocks = [model.get_submodule(name) for name in blocks]
        self.told = Told(len(blocks))
        self._model = model
        self._entry = model.get_submodule(entry)
        self._most_bytes = most_bytes
        self._attending = attending
        self._device = next(model.parameters()).device
        self._caches = "use_cache" in inspect.signature(model.forward).parameters
        self._positions = positions(model)
        self._kept: dict[Key, Tensor] = {}
        self._tried = False
        self._token_bytes = 0
        self._tail: dict[nn.Module, tuple[object, ...] | None] = {}

    @classmethod
    def of(cls, model: nn.Module, sites: Sequence[str], most_bytes: int, attending: Attending) -> FrozenPrefix | None:
        """None where the first block is adapted, or a layer outside of the blocks, or they cannot be told."""
        blocks = below(model, sites)
        return cls(model, blocks, find_blocks(model)[len(blocks)], most_bytes, attending) if blocks else None

    def forget(self) -> None:
        """Drop all states: the model has been cast."""
        self._kept.clear()
        self._tried = False
        self.told = Told(len(self.blocks))

    def usable(self, each: Sequence[Encoded]) -> bool:
        """Whether the model computes from the prefix's states what it computes from tokens: tried once, with some of the rows.

        The model is called as it is in evaluation, and no adapter must be on it.
        """
        some = next((data for data in each if len(data)), None)
        if not self._tried and some is not None:
            self._tried = True
            self.told.why_not = self._obstacle(some)
        return self._tried and self.told.why_not is None

    def foresee(self, parts: Sequence[ClientRows]) -> None:
        """Compute the rows that batches to come will ask for, many at a time, while there is room."""
        wanted: Wanted = {}
        room = self._most_bytes - self.told.kept_bytes
        for key, data, row in _rows(parts):
            if key not in self._kept and key not in wanted:
                room -= self._bytes(_length(data, row))
                if room < 0:
                    break
                wanted[key] = (data, row)
        self._compute(wanted)

    def states(self, parts: Sequence[ClientRows], shape: Sequence[int], packed: bool) -> Tensor:
        """What the entry reads of a batch, (*shape, H): all rows' tokens end to end, or rows padded. Zero in padding."""
        asked = list(_rows(parts))
        made = self._compute({key: (data, row) for key, data, row in asked if key not in self._kept})
        self.told.computed_anew += sum(key not in self._kept for key, _, _ in asked)
        found = torch.cat([self._kept[key] if key in self._kept else made[key] for key, _, _ in asked])
        N, room = len(found), shape[0] * shape[1]
        if room == N:
            return found.view(*shape, -1)
        laid = found.new_zeros(room, found.shape[1])
        if packed:
            laid[:N] = found
        else:
            lengths = np.concatenate([data.lengths_of(rows) for data, rows in parts])
            b = shape[0] // len(parts)
            first = np.concatenate([k * b + np.arange(len(rows)) for k, (_, rows) in enumerate(parts)]) * shape[1]
            laid[sent(torch.from_numpy(spans(first, lengths)), laid.device)] = found
        return laid.view(*shape, -1)

    @contextmanager
    def entered(self, states: Tensor) -> Iterator[None]:
        """Let the model read the states at the entry, and pass over the blocks below it."""
        for block in self.blocks:
            block.forward = partial(_pass, self._tail.get(block))
        handle = self._entry.register_forward_pre_hook(partial(_put, states), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            for block in self.blocks:
                del block.forward

    def _compute(self, wanted: Wanted) -> Mapping[Key, Tensor]:
        """(L, H) of each row; kept while there is room. One shape for all rows of about one length."""
        groups: dict[int, list[Key]] = {}
        for key, (data, row) in wanted.items():
            groups.setdefault(self._padded(_length(data, row)), []).append(key)
        made: dict[Key, Tensor] = {}
        for L, keys in groups.items():
            R = max(1, _TOKENS.get(self._device.type, _MORE_TOKENS) // L)
            with torch.no_grad(), self._attending(L):
                for i in range(0, len(keys), R):
                    now = keys[i : i + R]
                    rows = [wanted[key] for key in now]
                    states = self._entering(self._inputs(rows + rows[-1:] * (R - len(rows)), L))
                    own = {key: x[: _length(*row)] for key, row, x in zip(now, rows, states, strict=False)}
                    made |= own
                    self._keep(own)
        return made

    def _keep(self, made: Mapping[Key, Tensor]) -> None:
        fits: dict[Key, Tensor] = {}
        for key, x in made.items():
            size = self._bytes(len(x))
            if self.told.kept_bytes + size > self._most_bytes:
                break
            self.told.kept_bytes += size
            fits[key] = x
        if fits:
            # Without padding, which a view would keep alive.
            whole = torch.cat([*fits.values()])
            self._kept.update(zip(fits, torch.split(whole, [len(x) for x in fits.values()]), strict=True))
            self.told.kept_rows = len(self._kept)

    def _bytes(self, tokens: int) -> int:
        return tokens * self._token_bytes + _ROW_BYTES

    def _padded(self, length: int) -> int:
        """What rows of a length are padded to: no further than the model has positions."""
        L = -(-length // _ALIGN) * _ALIGN
        return L if self._positions is None else max(length, min(L, self._positions))

    def _inputs(self, rows: Sequence[tuple[Encoded, int]], L: int) -> dict[str, object]:
        """The model's arguments: rows padded to L tokens."""
        batch = collate([(data, np.array([row])) for data, row in rows])
        gap = (0, L - batch.input_ids.shape[1])
        arguments: dict[str, object] = {
            "input_ids": functional.pad(batch.input_ids, gap, value=rows[0][0].pad_id).to(self._device),
            "attention_mask": functional.pad(batch.attention_mask, gap).to(self._device),
        }
        if batch.token_type_ids is not None:
            arguments["token_type_ids"] = functional.pad(batch.token_type_ids, gap).to(self._device)
        if self._caches:
            arguments["use_cache"] = False
        return arguments

    def _entering(self, arguments: Mapping[str, object]) -> Tensor:
        """What goes into the entry: the model's forward pass ends there."""
        handle = self._entry.register_forward_pre_hook(_stop, with_kwargs=True)
        try:
            self._model(**arguments)
        except _Entered as entered:
            return entered.states
        finally:
            handle.remove()
        raise AssertionError("the model does not call the first adapted block")

    def _obstacle(self, data: Encoded) -> str | None:
        """Why the entry's input alone is not what the model goes on from; None if it is."""
        some = [(data, i) for i in range(min(4, len(data)))]
        L = self._padded(max(_length(*row) for row in some))
        outputs: dict[nn.Module, object] = {}

        def note(block: nn.Module, inputs: object, output: object) -> None:
            outputs[block] = output

        with torch.no_grad(), self._attending(L):
            arguments = self._inputs(some, L)
            hooks = [block.register_forward_hook(note) for block in self.blocks]
            try:
                states = self._entering(arguments)
                want = self._model(**arguments).logits
            finally:
                for hook in hooks:
                    hook.remove()
            if len(outputs) < len(self.blocks) or tuple(states.shape[:2]) != (len(some), L):
                return "the model does not hand on its rows from block to block"
            for block, output in outputs.items():
                first, *tail = output if isinstance(output, tuple) else (output,)
                if not isinstance(first, Tensor):
                    return "its blocks hand on something else than states"
                # Attention's weights may come along, for nobody.
                others = tuple(None if isinstance(x, Tensor) else x for x in tail)
                self._tail[block] = others if isinstance(output, tuple) else None
            try:
                with self.entered(states):
                    same = torch.equal(self._model(**arguments).logits, want)
            except (AttributeError, TypeError):  # of a None in a tensor's place
                same = False
            if not same:
                return "its blocks read more of those below them than the states that the last one hands on"
            self._token_bytes = states.shape[2] * states.element_size()
            # A row by itself, cut to where it has no padding, and the same with it.
            n = _length(*some[0]) - (_length(*some[0]) % _ALIGN == 0)
            row = data.select([0])
            types = None if row.token_types is None else row.token_types[:n]
            cut = [(replace(row, tokens=row.tokens[:n], offsets=np.array([0, n]), token_types=types), 0)]
            one, two = (self._entering(self._inputs(cut, length))[0, :n].float() for length in (n, self._padded(n)))
            if not torch.allclose(one, two, rtol=1e-2, atol=1e-2 * float(one.abs().max())):
                return "padding changes what becomes of a row"
        return None


class _Entered(Exception):
    """The end of a forward pass that need not go further."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


def _states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a block of transformers is called on."""
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def _stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Entered(_states(args, kwargs))


def _put(states: Tensor, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})


def _pass(tail: tuple[object, ...] | None, *args: Any, **kwargs: Any) -> Any:
    """In a block's place: its input, in the form of its output."""
    states = _states(args, kwargs)
    return states if tail is None else (states, *tail)


def _rows(parts: Sequence[ClientRows]) -> Iterator[tuple[Key, Encoded, int]]:
    for data, rows in parts:
        for row in rows.tolist():
            first, last = data.offsets[row], data.offsets[row + 1]
            types = b"" if data.token_types is None else data.token_types[first:last].tobytes()
            yield (data.tokens[first:last].tobytes(), types), data, row


def _length(data: Encoded, row: int) -> int:
    return int(data.offsets[row + 1] - data.offsets[row])
