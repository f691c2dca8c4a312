"""The one frozen model that every client shares: cast, moved and adapted in place, then called on batches of K clients.

    rows of K clients ──► padded (K * b, L) ──► model ──► logits of what is predicted ──► one loss per client
                                                  ├ adapted layers: base(x) + offset x + scale * B (gate * (A x))
                                                  └ task head: each client's own

`fedloom.train.kernels` stands in for the padded batch and the adapted layers where it computes the same faster.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from fedloom.core import Factors
from fedloom.data.batches import ClientRows, Encoded, Kind, Targets, collate, targets
from fedloom.data.placing import sent
from fedloom.errors import ModelError
from fedloom.state import Group
from fedloom.train import frozen_prefix
from fedloom.train.attention import AttentionName, choose
from fedloom.train.frozen_prefix import FrozenPrefix, Told
from fedloom.train.int8_products import LEAST, Int8Product, Int8Products, wide
from fedloom.train.kernels import int8_matmul
from fedloom.train.kernels.lora_linear import FusedLayers
from fedloom.train.kernels.packed_inputs import Packer
from fedloom.train.lora_linear import Adapter, Dropout, HookedLayers, Layers, Offset, find_heads, find_layers, full

KernelChoice = Literal["auto", "off"]


@dataclass(frozen=True)
class Feed:
    """A batch of K clients as the model reads it, on its device."""

    parts: Sequence[ClientRows]
    arguments: Mapping[str, Any]
    read: Tensor
    """(M,) which of all tokens predict the targets."""
    targets: Targets


class AdaptedModel:
    """A frozen base model with room for the adapters and heads of K clients. It owns the model until `close`."""

    def __init__(
        self,
        model: nn.Module,
        sites: Iterable[str],
        heads: Iterable[str],
        device: torch.device,
        dtype: torch.dtype,
        attention: AttentionName | Literal["auto"] = "auto",
        kernels: KernelChoice = "auto",
        prefix_bytes: int = frozen_prefix.DEFAULT_BYTES,
    ) -> None:
        layers = find_layers(model, sites)
        self._head_layers = find_heads(model, heads)
        self.devices = len(set(getattr(model, "hf_device_map", {}).values())) or 1
        """More than one of a model that accelerate has spread: it evaluates alone."""
        self.model = (model if self.devices > 1 else model.to(device)).requires_grad_(False).eval()
        self.device = device
        self._dtype = dtype
        self._attention = attention
        self._own_attention = self._attention_now()
        self._hooked = HookedLayers(layers)
        self._fused = FusedLayers.of(model, layers) if kernels == "auto" and self.devices == 1 else None
        self._layers: Layers = self._hooked
        self._packer: Packer | None = None
        self._packers: dict[Kind, Packer | None] = {}
        self._head: Mapping[str, Tensor] = {}
        self._read: Tensor | None = None  # (M,) the tokens, of all in a batch, that the vocabulary head sees
        self._hooks: list[RemovableHandle] = []
        self._checkpointed: list[nn.Module] = []
        self._cast_to: torch.dtype | None = None
        self._prefix = (
            FrozenPrefix.of(model, list(layers), prefix_bytes, self._attending)
            if kernels == "auto" and self.devices == 1
            else None
        )
        self._skips = False  # whether batches begin where the prefix ends
        self._int8 = Int8Products()
        self._kernels = kernels
        self._accepted = inspect.signature(model.forward).parameters

    def close(self) -> None:
        """Put the model's own weights and attention back."""
        self.rest()
        if self._fused is not None:
            self._fused.part()
        self._int8.forget()
        self._use_attention(self._own_attention)

    def rest(self) -> None:
        """Reset: no adapter, offset or head of a client, no training mode."""
        self._int8.detach()
        self._layers.detach()
        if self._packer is not None:
            self._packer.detach()
        while self._hooks:
            self._hooks.pop().remove()
        while self._checkpointed:
            del self._checkpointed.pop().forward
        if self.model.training:
            self.model.eval()
        self._head, self._read, self._skips = {}, None, False

    def ready(
        self,
        state_dtype: torch.dtype,
        offset: Mapping[str, Group],
        data: Sequence[Encoded],
        *,
        kernels: bool = True,
        pack: bool = True,
        prefix: bool = True,
    ) -> torch.dtype:
        """Cast the model, choose its attention for rows as long as those of `data` and add an offset to its weights.

        `offset` has the roles of `Work.base`. `kernels` allows the fast layers and `pack`, with them, batches without padding,
        where the architecture has them; `prefix`, that the frozen blocks below all sites are computed once for each row.
        Returns the dtype to compute in: float64 for states of float64.
        """
        self.rest()
        compute = torch.float64 if state_dtype == torch.float64 else self._dtype
        if compute != self._cast_to:
            self._cast_to = compute
            exact = self._kernels == "off" or compute == torch.float64  # which oneDNN has not
            self._int8 = Int8Products(Int8Product if exact else int8_matmul.Int8Matmul)
            if self._prefix is not None:
                self._prefix.forget()
            for parameter in self.model.parameters():
                # Parameters only: buffers such as rotary frequencies keep the precision that the model gave them.
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(compute)
        kind = data[0].kind
        self._layers = self._fused if kernels and self._fused is not None else self._hooked
        self._packer = self._packer_for(kind) if pack else None
        tokens, rows = sum(len(d.tokens) for d in data), sum(len(d) for d in data)
        self._use_attention(
            self._padded_attention(tokens // max(1, rows)) if self._packer is None else self._packer.attention
        )
        self._hooks = [x.register_forward_hook(partial(self._own_head, n)) for n, x in self._head_layers.items()]
        if kind == "causal-lm":
            self._hooks.append(self._vocabulary().register_forward_pre_hook(self._predicting_only))
        self._layers.attach(self._offsets(offset, compute))
        self._skips = prefix and self._prefix is not None and self._prefix.usable(data)
        if self._packer is not None:
            self._packer.attach()
        return compute

    def put(self, factors: Factors, scale: Tensor, head: Mapping[str, Tensor], dropout: Dropout | None = None) -> None:
        """Give the model the factors (K, ...), the scale (K, 1, 1) and the heads (K, *shape) of K clients.

        A head is named by parameter, such as `classifier.weight`. A site or head that is absent stays the model's own.
        """
        gates = factors.gate or {}
        adapters = {site: Adapter(A, factors.B[site], scale, gates.get(site)) for site, A in factors.A.items()}
        self._layers.put(adapters, dropout)
        self._head = head

    def foresee(self, parts: Sequence[ClientRows]) -> None:
        """Compute what batches of these rows will need of the frozen blocks below all sites, many rows at a time."""
        if self._prefix is not None and self._skips:
            self._prefix.foresee(parts)

    @property
    def prefix(self) -> Told | None:
        """What became of the frozen blocks below all sites; None if there are none, or they are not told apart."""
        return None if self._prefix is None else self._prefix.told

    def blocks(self) -> list[GradientCheckpointingLayer]:
        """The blocks whose activations can be recomputed. Raises ModelError if there are none."""
        blocks = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not blocks:
            raise ModelError(f"{type(self.model).__name__} cannot recompute activations: set checkpointing = false")
        return blocks

    def require_int8(self) -> None:
        """Raises ModelError where frozen layers cannot be multiplied in int8."""
        obstacle = None
        if self.device.type != "cpu":
            obstacle = f"the model is on {self.device}, and they are for a CPU"
        elif not wide(self.model, self._head_layers.values()):
            obstacle = f"{type(self.model).__name__} has no dense linear layer of at least {LEAST} features in and out"
        elif self._kernels == "auto":
            obstacle = int8_matmul.missing()
        if obstacle is not None:
            raise ModelError(f"frozen layers cannot be multiplied in int8: {obstacle}; set train.int8_products = false")

    def train(self, base_dropout: bool, checkpointing: bool, int8_products: bool = False) -> None:
        """Choose the base's mode until `rest`: its own dropout, activations recomputed in the backward pass, and frozen layers
        multiplied in int8, but for blocks below all sites whose states are kept.

        Raises ModelError if the model has no blocks whose activations can be recomputed, or is spread over devices.
        """
        if self.devices > 1:
            raise ModelError(
                f"the base is spread over {self.devices} devices, and training uses one: load it on one device to train it"
            )
        if base_dropout:
            self.model.train()
        frozen = () if self._prefix is None else self._prefix.blocks
        if int8_products:
            self._multiply_in_int8(frozen if self._skips else ())
        for block in self.blocks() if checkpointing else ():
            if any(block is x for x in frozen):
                continue  # no gradient goes there
            # transformers recomputes a block in training mode alone, in which some switch on their own dropout (OPT).
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            self._checkpointed.append(block)

    def _multiply_in_int8(self, besides: Sequence[nn.Module]) -> None:
        others = {*self._head_layers.values(), *(layer for block in besides for layer in block.modules())}
        if self._fused is not None and self._layers is self._fused:
            self._fused.multiply_in(self._int8)
            others |= {*self._fused.bases}
        self._int8.attach(wide(self.model, others).values())

    def feed(self, parts: Sequence[ClientRows]) -> Feed:
        """What the model is to read of the rows and what it is to predict, on its device.

        Nothing of the model is touched: another thread may ask for it once the model is ready.
        """
        wanted = targets(parts)
        arguments: dict[str, object]
        if self._packer is None:
            batch = collate(parts)
            arguments = {
                "input_ids": sent(batch.input_ids, self.device),
                "attention_mask": sent(batch.attention_mask, self.device),
            }
            if batch.token_type_ids is not None:
                arguments["token_type_ids"] = sent(batch.token_type_ids, self.device)
            read = sent(wanted.row * batch.input_ids.shape[1] + wanted.position, self.device)
        else:
            arguments, read = self._packer.feed(parts, wanted, self.device, self._cast_to)
        if "use_cache" in self._accepted:
            arguments["use_cache"] = False
        return Feed(parts, arguments, read, wanted.to(self.device))

    def logits(self, feed: Feed) -> Tensor:
        """The logits (M, classes) or (M, vocabulary) that predict the feed's targets."""
        causal = feed.parts[0][0].kind == "causal-lm"
        self._read = feed.read if causal else None
        if self._packer is not None:
            self._packer.begin(feed.arguments["packing"], len(feed.parts))
        made = self._called(feed.parts, feed.arguments).flatten(0, -2)
        if causal or len(made) == len(feed.targets.row):
            return made
        return made.index_select(0, feed.targets.row.to(made.device))  # without rows that fill up a client's batch

    def _called(self, parts: Sequence[ClientRows], arguments: Mapping[str, Any]) -> Tensor:
        """The model's logits, from the frozen prefix's states on where there are any."""
        if self._prefix is None or not self._skips:
            logits: Tensor = self.model(**arguments).logits
            return logits
        states = self._prefix.states(parts, arguments["input_ids"].shape, self._packer is not None)
        with self._prefix.entered(states):
            logits = self.model(**arguments).logits
        return logits

    def _own_head(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """A layer of the task head, each client's own in place of the model's."""
        x, weight, bias = inputs[0], self._head.get(f"{name}.weight"), self._head.get(f"{name}.bias")
        return y if weight is None else full(x, weight.to(x.device), None if bias is None else bias.to(x.device))

    def _vocabulary(self) -> nn.Module:
        find: Callable[[], nn.Module | None] | None = getattr(self.model, "get_output_embeddings", None)
        head = find() if find is not None else None
        if head is None:
            raise ModelError(f"{type(self.model).__name__} has no vocabulary head: load a causal language model")
        return head

    def _predicting_only(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Hide from the vocabulary head, the widest product of a small language model, all but the tokens that predict.

        (K * b, L, H) or (1, N, H) -> (1, M, H); a model that generates reads everything.
        """
        if self._read is None:
            return None
        read = self._read
        return tuple(x.flatten(0, 1).index_select(0, read.to(x.device)).unsqueeze(0) for x in inputs)

    def _packer_for(self, kind: Kind) -> Packer | None:
        if self._layers is not self._fused or self._fused is None or self._attention != "auto":
            return None
        if kind not in self._packers:
            self._packers[kind] = Packer.of(self.model, kind, self._fused)
        return self._packers[kind]

    def _padded_attention(self, length: int) -> str:
        if self._attention != "auto":
            return self._attention
        if not getattr(self.model, "_supports_sdpa", True):
            return "eager"
        compute = self._cast_to or self._dtype
        # transformers' plain attention makes NaN of a fully padded query in float64.
        return "sdpa" if compute == torch.float64 else choose(self.device, compute, length)

    @contextmanager
    def _attending(self, length: int) -> Iterator[None]:
        """With the attention for padded rows of a length."""
        before = self._attention_now()
        self._use_attention(self._padded_attention(length))
        try:
            yield
        finally:
            self._use_attention(before)

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
