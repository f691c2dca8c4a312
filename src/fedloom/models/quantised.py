"""Frozen linear layers in 4 or 8 bits a weight, made dense when a product needs them, and made again in the backward pass.

NF4 and its doubly quantised scales: Dettmers et al., "QLoRA", arXiv 2305.14314. int8 by rows: Dettmers et al., "LLM.int8()",
arXiv 2208.07339, of the weights alone: inputs are not rounded. The codes are bitsandbytes', byte for byte.

A dense weight takes the same memory for every layer of a model in turn. On a CPU the memory that an allocator hands out anew
costs ten times as much as the arithmetic that fills it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom.errors import ModelError
from fedloom.train.frozen_product import DenseProduct, through

Quantization = Literal["nf4", "nf4-double", "int8"]

_BLOCK = 64
"""Weights that share a scale in NF4."""

_BLOCK_OF_SCALES = 256
"""Scales that share one, where they are coded too."""

_CHUNK = 1 << 20
"""Weights that are coded or decoded at a time: what is made of them stays in a processor's cache."""


def bitsandbytes() -> Any:
    """The functions of bitsandbytes. Raises ModelError if it is not installed."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of an optional package that only generating would use
    try:
        import bitsandbytes.functional as found
    except ImportError as error:
        raise ModelError(
            "a quantised model needs bitsandbytes, which is not installed: pip install 'fedloom[quantized]'"
        ) from error
    finally:
        logger.setLevel(level)
    return found


class Codes(Protocol):
    """How the weights of one layer are coded."""

    def rows(self, weight: Tensor, first: int, last: int, width: int, dtype: torch.dtype) -> Tensor:
        """Some rows of the weight, dense (last - first, width); `first` is a multiple of the block."""

    def scales(self) -> list[Tensor]:
        """The floating-point numbers that the codes are multiplied by."""

    def kept(self) -> list[Tensor]:
        """All tensors besides the codes themselves."""

    def tensors(self) -> dict[str, Tensor]:
        """All that `codes` makes this from."""


Coded = tuple[Tensor, Codes]
"""The packed codes of a layer, and how they are read."""


def codes(tensors: Mapping[str, Tensor]) -> Codes:
    """Inverse of `Codes.tensors`. Raises KeyError if one is missing."""
    if "scale" in tensors:
        return EightBit(tensors["scale"])
    bnb, second = bitsandbytes(), None
    if "absmax2" in tensors:
        second = bnb.QuantState(
            tensors["absmax2"], code=tensors["code2"], blocksize=_BLOCK_OF_SCALES, dtype=torch.float32
        )
    return FourBit(
        bnb.QuantState(
            tensors["absmax"],
            code=tensors["code"],
            blocksize=_BLOCK,
            quant_type="nf4",
            offset=tensors["offset"] if second is not None else None,
            state2=second,
        )
    )


class FourBit:
    """Two codes a byte, a scale for every block of the flattened weight, which may be coded itself."""

    def __init__(self, state: Any) -> None:
        self.state = state  # bitsandbytes' QuantState

    def scales(self) -> list[Tensor]:
        s = self.state
        return [s.state2.absmax, s.offset] if s.nested else [s.absmax]

    def kept(self) -> list[Tensor]:
        return [*self.scales(), *([self.state.absmax] if self.state.nested else [])]

    def tensors(self) -> dict[str, Tensor]:
        s = self.state
        made = {"absmax": s.absmax, "code": s.code}
        return made | {"absmax2": s.state2.absmax, "code2": s.state2.code, "offset": s.offset} if s.nested else made

    def rows(self, weight: Tensor, first: int, last: int, width: int, dtype: torch.dtype) -> Tensor:
        bnb, s = bitsandbytes(), self.state
        begin, end = first * width, last * width
        blocks = slice(begin // s.blocksize, -(-end // s.blocksize))
        absmax = s.absmax
        if s.nested:
            absmax = bnb.dequantize_blockwise(absmax, s.state2) + s.offset
        codes = weight.view(-1, 1)[begin // 2 : (end + 1) // 2]
        # Of float64 there is no kernel.
        made = torch.float32 if dtype == torch.float64 else dtype
        part = bnb.QuantState(
            absmax[blocks], torch.Size((last - first, width)), s.code, s.blocksize, s.quant_type, made
        )
        dense: Tensor = bnb.dequantize_4bit(codes, part)
        return dense.view(last - first, width)


class EightBit:
    """A number of -127 to 127 for each weight, and a scale for each row."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale  # (out,): the largest weight of each row

    def scales(self) -> list[Tensor]:
        return [self.scale]

    kept = scales

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    def rows(self, weight: Tensor, first: int, last: int, width: int, dtype: torch.dtype) -> Tensor:
        return weight[first:last].to(torch.float32).mul_((self.scale[first:last] / 127.0).unsqueeze(1))


class Scratch:
    """The memory that the dense weights of a model take in turn."""

    def __init__(self) -> None:
        self._kept: dict[torch.dtype, Tensor] = {}

    def take(self, out: int, width: int, dtype: torch.dtype) -> Tensor:
        """(out, width) of anything, valid until it is taken again."""
        kept = self._kept.get(dtype)
        if kept is None or kept.numel() < out * width:
            kept = self._kept[dtype] = torch.empty(out * width, dtype=dtype)
        return kept[: out * width].view(out, width)


class QuantisedLinear(nn.Linear):
    """W x + b with W in few bits a weight. `weight` holds the codes."""

    def __init__(
        self, shape: tuple[int, int], weight: Tensor, codes: Codes, bias: Tensor | None, scratch: Scratch, turned: bool
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which makes a dense weight
        self.out_features, self.in_features = shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
        self.codes = codes
        self.turned = turned
        """Whether the layer was a Conv1D, which keeps its weight as (in, out)."""
        self._scratch = scratch

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), made anew. It is valid until the next one of any layer of the model is asked for."""
        out, width = self.out_features, self.in_features
        if self.weight.device.type != "cpu":
            return self.codes.rows(self.weight, 0, out, width, dtype).to(dtype)
        made = self._scratch.take(out, width, dtype)
        for first, last in _chunks(out, width):
            made[first:last] = self.codes.rows(self.weight, first, last, width, dtype)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        # Autograd would keep every layer's dense weight until the backward pass.
        return through(DenseProduct(self.dense, self.bias), x)


def _chunks(out: int, width: int) -> Iterator[tuple[int, int]]:
    """Rows that are coded together: a multiple of the largest block, so that none is cut."""
    rows = max(1, _CHUNK // (width * _BLOCK)) * _BLOCK
    return ((first, min(out, first + rows)) for first in range(0, out, rows))


def quantise(
    model: nn.Module,
    how: Quantization,
    keep: Collection[str],
    device: torch.device | str = "cpu",
    made_before: Mapping[str, Coded] | None = None,
) -> None:
    """Put codes in the place of every linear layer's weight, layer by layer, on the device; the rest is moved there, too.

    `keep` names layers to leave: the task head and the vocabulary head. Codes that were `made_before` are taken, and the dense
    weights not looked at. Raises ModelError without bitsandbytes.
    """
    bitsandbytes()
    scratch = Scratch()
    for name, layer in list(model.named_modules()):
        if name in keep or type(layer) not in (nn.Linear, Conv1D):
            continue
        weight = layer.get_parameter("weight").detach()
        turned = isinstance(layer, Conv1D)
        if turned:
            weight = weight.T
        bias = layer.bias
        assert bias is None or isinstance(bias, Tensor)
        if made_before is None:
            code = _int8 if how == "int8" else _nf4
            packed, kept = code(weight.to(device).contiguous(), how == "nf4-double")
        else:
            packed, kept = made_before[name]
            packed, kept = packed.to(device), codes({part: x.to(device) for part, x in kept.tensors().items()})
        shape = (weight.shape[0], weight.shape[1])
        made = QuantisedLinear(shape, packed, kept, None if bias is None else bias.detach(), scratch, turned)
        model.set_submodule(name, made)
    for x in (*model.parameters(), *model.buffers()):
        if x.is_floating_point():
            # A copy where it is the file's own page: that would hold all pages of the file.
            x.data = x.data.to(device, copy=True)
    model.to(device)


def settings(how: Quantization) -> str:
    """What the codes depend on besides the weights, in words."""
    return "int8 by rows" if how == "int8" else f"{how}, blocks of {_BLOCK}"


def method(config: Any) -> str | None:
    """How a checkpoint is quantised, by its configuration; None if it is not."""
    found = getattr(config, "quantization_config", None)
    values = found if isinstance(found, dict) or found is None else found.to_dict()
    if values is None:
        return None
    name = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    if name != "bitsandbytes":
        return name
    if values.get("load_in_8bit"):
        return "bitsandbytes int8"
    double = "-double" if values.get("bnb_4bit_use_double_quant") else ""
    return f"bitsandbytes {values.get('bnb_4bit_quant_type') or 'fp4'}{double}"  # its own default


def _nf4(weight: Tensor, double: bool) -> tuple[Tensor, Codes]:
    bnb = bitsandbytes()
    out, width = weight.shape
    parts = [
        bnb.quantize_4bit(weight[first:last], blocksize=_BLOCK, quant_type="nf4") for first, last in _chunks(out, width)
    ]
    absmax, state = torch.cat([s.absmax for _, s in parts]), parts[0][1]
    state.shape, state.absmax = weight.shape, absmax
    if double:
        state.offset = absmax.mean()
        state.absmax, state.state2 = bnb.quantize_blockwise(absmax - state.offset, blocksize=_BLOCK_OF_SCALES)
        state.nested = True
    return torch.cat([packed for packed, _ in parts]), FourBit(state)


def _int8(weight: Tensor, double: bool) -> tuple[Tensor, Codes]:
    bnb = bitsandbytes()
    parts = [bnb.int8_vectorwise_quant(weight[first:last].half()) for first, last in _chunks(*weight.shape)]
    return torch.cat([codes for codes, *_ in parts]), EightBit(torch.cat([scale for _, scale, _ in parts]))


def take_over(model: nn.Module) -> bool:
    """Put our layers in the place of bitsandbytes'; whether there were any.

    Its own change the order of their codes in a first pass without gradients, and then have none.
    """
    scratch, found = Scratch(), False
    for name, layer in list(model.named_modules()):
        kind = type(layer).__name__
        if type(layer).__module__ != "bitsandbytes.nn.modules" or not isinstance(layer, nn.Linear):
            continue
        layer.state_dict()  # puts codes that were re-ordered back in order
        weight, state = layer.weight, None
        codes: Codes
        if (state := getattr(weight, "quant_state", None)) is not None:
            data, codes = weight.data.view(torch.uint8), FourBit(state)
        elif weight.dtype == torch.int8:
            scale = getattr(weight, "SCB", None)
            state = getattr(layer, "state", None)
            data, codes = weight.data, EightBit(scale if scale is not None else state.SCB)  # type: ignore[union-attr]
        else:
            raise ModelError(f"layer {name!r} is a {kind} without codes: load the model with its quantization_config")
        turned = getattr(layer, "source_cls", None) is Conv1D
        shape = (layer.out_features, layer.in_features)
        bias = None if layer.bias is None else layer.bias.detach()
        model.set_submodule(name, QuantisedLinear(shape, data, codes, bias, scratch, turned))
        found = True
    return found


def dense(layer: nn.Module) -> Tensor:
    """A copy of a linear layer's weight (out, in), float32 on the CPU. Raises ModelError for another library's codes."""
    if isinstance(layer, QuantisedLinear):
        return layer.dense(torch.float32).to("cpu", copy=True)
    if not is_plain(layer):
        raise _cannot_be_dense(layer)
    weight = layer.get_parameter("weight").detach()
    return (weight.T if isinstance(layer, Conv1D) else weight).to("cpu", torch.float32, copy=True)


def check_own_codes(model: nn.Module) -> None:
    """Raise ModelError if another library has coded a layer's weights."""
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        theirs = isinstance(weight, Tensor) and is_coded(weight)
        if theirs or (coded_shape(layer) is not None and not isinstance(layer, QuantisedLinear)):
            raise _cannot_be_dense(layer)


def _cannot_be_dense(layer: nn.Module) -> ModelError:
    return ModelError(
        f"a layer is a {type(layer).__name__}, whose codes fedloom cannot make dense: methods that start from the frozen "
        "weights, and export --merge, need a base that is not quantised, or one of bitsandbytes"
    )


def stored(layer: QuantisedLinear, dtype: torch.dtype) -> Tensor:
    """A layer's dense weight as the model's own file has it: (out, in), of a Conv1D (in, out)."""
    weight = layer.dense(dtype)
    return weight.T.contiguous() if layer.turned else weight.clone()


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is W x + b with W a plain tensor of floating-point numbers."""
    weight = getattr(layer, "weight", None)
    return (
        type(layer) in (nn.Linear, Conv1D)
        and isinstance(weight, nn.Parameter)
        and type(weight.data) is Tensor
        and weight.is_floating_point()
    )


def is_coded(weight: Tensor) -> bool:
    """Whether a weight is a tensor of codes that presents itself as dense numbers, as torchao's are."""
    return type(weight.data) is not Tensor


def coded_shape(layer: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer that another library coded (GPTQ, AWQ, HQQ), which is no nn.Linear; None for any other."""
    out, width = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    own = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    if isinstance(out, int) and isinstance(width, int) and any(not x.is_floating_point() for x in own):
        return out, width
    return None


def quantised(model: nn.Module) -> dict[str, QuantisedLinear]:
    """The layers in few bits, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantisedLinear)}


def parameters(model: nn.Module) -> int:
    """How many weights a model has, whatever bits they take."""
    packed = quantised(model).values()
    own = {id(layer.weight) for layer in packed}
    return sum(layer.in_features * layer.out_features for layer in packed) + sum(
        x.numel() for x in model.parameters() if id(x) not in own
    )


def bytes_of(model: nn.Module, dtype: torch.dtype) -> int:
    """Memory of a model's weights in a dtype; of layers in few bits, that of their codes and scales."""
    size = torch.empty(0, dtype=dtype).element_size()
    scales = (x for layer in quantised(model).values() for x in layer.codes.kept())
    return sum(_bytes(x, size) for x in model.parameters()) + sum(x.numel() * x.element_size() for x in scales)


def _bytes(x: Tensor, size: int) -> int:
    """Of a parameter, `size` for each number of it that is floating-point; of one in codes, of what it is made of."""
    if is_coded(x) and hasattr(x, "__tensor_flatten__"):
        inside = (getattr(x, name) for name in x.__tensor_flatten__()[0])
        return sum(part.numel() * part.element_size() for part in inside)
    return x.numel() * (size if x.is_floating_point() else x.element_size())


def not_finite(model: nn.Module) -> str | None:
    """The name of a layer in few bits whose scales have a NaN or an infinite number."""
    for name, layer in quantised(model).items():
        if not all(bool(torch.isfinite(x).all()) for x in layer.codes.scales()):
            return f"{name}.weight"
    return None
