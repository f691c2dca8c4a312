"""The one frozen model that every client shares: cast, moved and adapted in place, then called on batches of K clients."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from fedloom.data.text import Batch, Encoded, Kind
from fedloom.errors import ModelError
from fedloom.state import Group
from fedloom.train import packing
from fedloom.train.adapter import Dropout, inject
from fedloom.train.attention import PACKED, AttentionName, choose
from fedloom.train.loss import answer_positions
from fedloom.train.product import Delta, Offset


class Host:
    """A model that makes room for adapters. It owns the model until `close`."""

    def __init__(
        self,
        model: nn.Module,
        sites: Iterable[str],
        heads: Iterable[str],
        device: torch.device,
        dtype: torch.dtype,
        attention: AttentionName | Literal["auto"],
    ) -> None:
        self.model = model.to(device).requires_grad_(False).eval()
        self.device = device
        self._dtype = dtype
        self._attention = attention
        self._adapted = inject(model, sites, heads)
        self._own_attention = self._attention_now()
        # transformers' blocks carry their switches as attributes that no type declares: hence Any.
        self._blocks: list[Any] = [
            module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
        ]
        self._hooks: list[RemovableHandle] = []
        self._packed = False
        self._trains = False
        self._cast_to: torch.dtype | None = None
        self._readers: dict[Kind, list[str] | None] = {}
        self._clients = 1  # K of the last batch
        self._read: Tensor | None = None  # (N,) the tokens, of all in a batch, that the model's head sees
        self._accepted = inspect.signature(model.forward).parameters

    def close(self) -> None:
        """Put the model's own layers and attention back."""
        self.rest()
        self._adapted.eject()
        self._use_attention(self._own_attention)

    def rest(self) -> None:
        """Take everything off the model: no adapter, no training mode."""
        self._adapted.clear()
        if self._trains:
            self._trains = False
            self.model.eval()
            for block in self._blocks:
                block.gradient_checkpointing = False
        while self._hooks:
            self._hooks.pop().remove()
        self._read = None

    def ready(
        self, state_dtype: torch.dtype, offset: Mapping[str, Group], data: Sequence[Encoded], pack: bool = True
    ) -> torch.dtype:
        """Cast the model, choose its attention for rows as long as those of `data` and add an offset to its weights.

        `offset` has the roles of `Work.base`. Batches are packed where `pack` and the architecture allow it. Returns the
        dtype to compute in: float64 for states of float64.
        """
        self.rest()
        compute = torch.float64 if state_dtype == torch.float64 else self._dtype
        if compute != self._cast_to:
            self._cast_to = compute
            for parameter in self.model.parameters():
                # Parameters only: buffers such as rotary frequencies keep the precision that the model gave them.
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(compute)
            self._adapted.join()
        kind = data[0].kind
        if kind not in self._readers:
            self._readers[kind] = packing.readers(self.model, kind)
        readers = self._readers[kind] if pack and self._attention == "auto" else None
        self._packed = readers is not None
        self._attend(compute, data)
        self._read_only(kind, readers or ())
        for site, factors in self._offsets(offset, compute).items():
            self._adapted.sites[site].offset = factors
        return compute

    def put(
        self,
        A: Mapping[str, Tensor],
        B: Mapping[str, Tensor],
        scale: Tensor,
        head: Mapping[str, Tensor],
        dropout: Dropout | None = None,
    ) -> None:
        """Give the model the adapters A (K, r, in), B (K, out, r), scale (K, 1, 1) and heads (K, *shape) of K clients.

        A head is named by parameter, such as `classifier.weight`. A site or head that is absent stays the model's own.
        """
        self._adapted.step.dropout = dropout
        for site, layer in self._adapted.sites.items():
            layer.delta = Delta(A[site], B[site], scale) if site in A else None
        for site, full in self._adapted.heads.items():
            weight = head.get(f"{site}.weight")
            full.full = None if weight is None else (weight, head.get(f"{site}.bias"))

    def train(self, base_dropout: bool, checkpointing: bool) -> None:
        """Training mode: the base stays in evaluation mode unless its own dropout is asked for.

        Raises ModelError if the model has no blocks whose activations can be recomputed.
        """
        self._trains = base_dropout or checkpointing
        if base_dropout:
            self.model.train()
        if not checkpointing:
            return
        if not self._blocks:
            raise ModelError(f"{type(self.model).__name__} cannot recompute activations: set checkpointing = false")
        for block in self._blocks:
            # transformers recomputes only blocks in training mode. The flag is set on the block alone, not through
            # train(): what is inside, dropout above all, stays as it was.
            block.gradient_checkpointing = block.training = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def logits(self, batch: Batch, kind: Kind) -> Tensor:
        """Logits (K * b, classes), or (N, vocabulary) for the N positions of `answer_positions` of a causal LM.

        The batch is on the CPU: what the model reads of it is moved.
        """
        read = answer_positions(batch)[0] if kind == "causal-lm" else None
        arguments: dict[str, Any]
        if self._packed:
            few_shapes = packing.compiles(self.device, self._cast_to)
            packed = packing.pack_batch(batch, kind == "causal-lm", few_shapes).to(self.device)
            self._clients = batch.K
            self._adapted.step.segments = packed.segments
            self._read = packed.slots[:, 0] if read is None else packed.slots.flatten()[read.to(self.device)]
            arguments = {
                "input_ids": packed.input_ids,
                "attention_mask": torch.ones_like(packed.input_ids),
                "position_ids": packed.position_ids + packing.first_position(self.model),
                "token_type_ids": packed.token_type_ids,
                "packing": packed,
            }
        else:
            batch = batch.to(self.device)
            self._read = None if read is None else read.to(self.device)
            arguments = {
                "input_ids": batch.input_ids,
                "attention_mask": batch.attention_mask,
                "token_type_ids": batch.token_type_ids,
            }
        if "use_cache" in self._accepted:
            arguments["use_cache"] = False
        logits: Tensor = self.model(**{name: x for name, x in arguments.items() if x is not None}).logits
        return logits.flatten(0, -2)

    def _read_only(self, kind: Kind, readers: Sequence[str]) -> None:
        """Have the modules named, and a vocabulary head, see only the tokens in `_read`, until `rest`.

        The vocabulary is the widest product of a small language model, and most positions are prompt or padding. What a model
        does to its logits afterwards (scaling, soft caps) still happens.
        """

        def select(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            # (1, N, H) or (K * b, L, H) -> (1, read, H); a model that generates reads everything.
            read = self._read
            return None if read is None else tuple(x.flatten(0, 1).index_select(0, read).unsqueeze(0) for x in inputs)

        def select_by_client(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            # (1, N, H) -> (K, b, H), so that adapters after it find the rows of their clients.
            chosen = select(module, inputs)
            return None if chosen is None else tuple(x.view(self._clients, -1, x.shape[-1]) for x in chosen)

        def by_row(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(x.flatten(0, 1).unsqueeze(1) for x in inputs)  # (K, b, H) -> (K * b, 1, H)

        hooks: list[tuple[nn.Module, Any]] = []
        if kind == "causal-lm":
            find = getattr(self.model, "get_output_embeddings", None)
            head = find() if find is not None else None
            if head is None:
                raise ModelError(f"{type(self.model).__name__} has no vocabulary head: load a causal language model")
            hooks.append((head, select))
        for name, hook in zip(readers, (select_by_client, by_row), strict=False):
            hooks.append((self.model.get_submodule(name), hook))
        self._hooks = [module.register_forward_pre_hook(hook) for module, hook in hooks]

    def _attend(self, compute: torch.dtype, data: Sequence[Encoded]) -> None:
        name: str = self._attention
        if self._packed:
            name = PACKED
        elif name == "auto":
            tokens, rows = sum(len(d.tokens) for d in data), sum(len(d) for d in data)
            # transformers' plain attention makes NaN of a fully padded query in float64.
            name = "sdpa" if compute == torch.float64 else choose(self.device, compute, tokens // max(1, rows))
        self._use_attention(name)

    def _use_attention(self, name: str | None) -> None:
        # Plain modules have no attention of transformers' to choose.
        choice = getattr(self.model, "set_attn_implementation", None)
        if choice is not None and name is not None and self._attention_now() != name:
            choice(name)

    def _attention_now(self) -> str | None:
        return getattr(getattr(self.model, "config", None), "_attn_implementation", None)

    def _offsets(self, offset: Mapping[str, Group], dtype: torch.dtype) -> dict[str, Offset]:
        left, right = offset.get("left", {}), offset.get("right", {})
        found: dict[str, Offset] = {}
        for site, x in left.items():
            x = x.to(self.device, dtype if site not in right else None)
            y = right[site].to(self.device) if site in right else None
            if y is not None and x.shape[1] * (x.shape[0] + y.shape[1]) > x.shape[0] * y.shape[1]:
                x, y = x @ y, None  # so many ranks that the dense offset is less work
            found[site] = (x.to(dtype), None if y is None else y.to(dtype))
        return found
