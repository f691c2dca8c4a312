"""Feeding a model the tokens of K clients without padding, and having it read from them what it would read from rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedloom.data.batches import ClientRows, Kind, Targets
from fedloom.data.placing import sent
from fedloom.models.families import family_of, first_position
from fedloom.train.kernels import grouped_matmul, packing, varlen_attention
from fedloom.train.kernels.lora_linear import FusedLayers
from fedloom.train.kernels.packed_attention import PACKED, register


class Packer:
    """Makes the arguments of a model's forward pass from stored rows."""

    attention = PACKED
    """The name of the attention that the model must use."""

    def __init__(self, model: nn.Module, readers: Sequence[str], causal: bool, layers: FusedLayers) -> None:
        self._readers = [model.get_submodule(name) for name in readers]
        self._causal = causal
        self._layers = layers
        self._position = first_position(model)
        family = family_of(model)
        # Of no size: its scores are not the kernel's.
        self._head = 0 if family is not None and family.changes_scores else varlen_attention.head_size(model)
        register()
        self._hooks: list[RemovableHandle] = []
        self._clients = 1  # K of the last batch
        self._first: Tensor | None = None  # (K * b,) tokens that an encoder's rows are read from

    @classmethod
    def of(cls, model: nn.Module, kind: Kind, layers: FusedLayers) -> Packer | None:
        """None if the model's batches cannot be packed for the task."""
        names = readers(model, kind)
        return None if names is None else cls(model, names, kind == "causal-lm", layers)

    def attach(self) -> None:
        """Begin to hide from a packed encoder's last modules all tokens but the first of each row."""
        hooks = (self._first_by_client, _by_row)
        self._hooks = [m.register_forward_pre_hook(hook) for m, hook in zip(self._readers, hooks, strict=False)]

    def detach(self) -> None:
        """Leave the model as it was."""
        while self._hooks:
            self._hooks.pop().remove()
        self._first = None

    def feed(
        self, parts: Sequence[ClientRows], targets: Targets, device: torch.device, dtype: torch.dtype | None
    ) -> tuple[dict[str, object], Tensor]:
        """The model's arguments, and the index (M,) among all tokens of each that predicts a target; all on the device.

        Nothing of the model is touched: another thread may ask for it.
        """
        packed = packing.pack_rows(
            parts,
            self._causal,
            packing.rounds(device, dtype),
            self._layers.aligned and grouped_matmul.suits(device, dtype),
            varlen_attention.suits(device, dtype, self._head),
        )
        read = packed.first[targets.row] + targets.position
        packed = replace(packed, position_ids=packed.position_ids + self._position).to(device)
        arguments: dict[str, object] = {
            "input_ids": packed.input_ids,
            "attention_mask": torch.ones_like(packed.input_ids),
            "position_ids": packed.position_ids,
            "packing": packed,
        }
        if packed.token_type_ids is not None:
            arguments["token_type_ids"] = packed.token_type_ids
        return arguments, sent(read, device)

    def begin(self, packed: object, K: int) -> None:
        """Have the model's layers know the packing of K clients that it is called on next."""
        assert isinstance(packed, packing.Packing)
        self._layers.step.segments = packed.segments
        self._clients, self._first = K, packed.first

    def _first_by_client(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(1, N, H) -> (K, b, H), so that adapters after it find the rows of their clients."""
        assert self._first is not None, "a packed model is called through its packer"
        K, first = self._clients, self._first
        return tuple(x.flatten(0, 1).index_select(0, first).view(K, -1, x.shape[-1]) for x in inputs)


def _by_row(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """(K, b, H) -> (K * b, 1, H)."""
    return tuple(x.flatten(0, 1).unsqueeze(1) for x in inputs)


def readers(model: nn.Module, kind: Kind) -> list[str] | None:
    """The modules from which on only some tokens matter, in the order of the forward pass; None if batches cannot be packed.

    A classifier reads each row's first token: after the attention of its last layer all others are of no use. A causal LM reads
    every token up to its vocabulary head.
    """
    family, config = family_of(model), getattr(model, "config", None)
    if family is None or kind not in family.packs:
        return None
    if kind == "causal-lm":
        return []
    last = getattr(config, "num_hidden_layers", 0) - 1
    names = [name for name, _ in model.named_modules()]
    found = []
    for ending in (f"encoder.layer.{last}.attention.output", family.reader):
        found += [name for name in names if f".{name}".endswith(f".{ending}")]
    return found if len(found) == 2 else None
