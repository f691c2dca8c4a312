"""States on the wire: raw, rounded to bfloat16, or int8 steps with error feedback; decoding refuses what it cannot trust.

A tensor has a dtype, which decoding gives back exactly, and a form, which is how its numbers travel:

    raw        the tensor's own bytes, any dtype                    exact
    bfloat16   float32 rounded to nearest even, 2 bytes a number    widening back to float32 is exact, rounding was not
    int8       float32 as round(x / s), s = max|row| / 127, and the float32 s of each row of the first axis

Numbers that are not float32 (seeds, indices, float64, native bfloat16) are always raw. int8 is meant for differences: see
`difference` and `Feedback`, after Seide et al., 1-Bit Stochastic Gradient Descent, Interspeech 2014, and Karimireddy et
al., Error Feedback Fixes SignSGD, arXiv 1901.09847: what rounding loses in one round is added to the next.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fedloom.core import State
from fedloom.engines.envelope import WireError, pack, unpack

Form = Literal["raw", "bfloat16", "int8"]
FORMS: tuple[Form, ...] = get_args(Form)

_DTYPES = {
    str(x).removeprefix("torch."): x
    for x in (
        torch.float32,
        torch.bfloat16,
        torch.float64,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST_AXES = 8


def encode(state: State, form: Form = "raw") -> bytes:
    """A state as bytes. Raises WireError for a dtype that does not travel (complex, quantised)."""
    table: list[list[Any]] = []
    parts: list[bytes] = []
    for role in sorted(state):
        for site in sorted(state[role]):
            x = state[role][site].detach()
            if x.dtype not in _NAMES:
                raise WireError(f"{role}/{site} has dtype {x.dtype}, expected one of {', '.join(_DTYPES)}")
            used = form if x.dtype == torch.float32 and x.numel() else "raw"
            table.append([role, site, _NAMES[x.dtype], used, list(x.shape)])
            parts.append(_WRITE[used](x))
    # One part for all tensors: their lengths follow from the table, so that they are not sent twice.
    return pack({"tensors": table}, [b"".join(parts)])


def decode(data: bytes | memoryview) -> State:
    """Inverse of `encode`: tensors of their own memory. Raises WireError that says what is wrong."""
    header, parts = unpack(data)
    if header.keys() != {"tensors"} or not isinstance(header["tensors"], list) or len(parts) != 1:
        raise WireError(f"has header keys {sorted(header)} and {len(parts)} parts, expected 'tensors' and one part")
    body, at = parts[0], 0
    state: State = {}
    for entry in header["tensors"]:
        role, site, dtype, form, shape = _checked(entry)
        if site in state.get(role, {}):
            raise WireError(f"{role}/{site} is there twice")
        size = _size(dtype, form, shape)
        if at + size > len(body):
            raise WireError(f"{role}/{site} {shape} needs {size} bytes, {len(body) - at} are left")
        state.setdefault(role, {})[site] = _READ[form](bytearray(body[at : at + size]), dtype, shape)
        at += size
    if at != len(body):
        raise WireError(f"has {len(body)} bytes of tensors, expected {at}: trailing bytes")
    return state


def _checked(entry: Any) -> tuple[str, str, torch.dtype, Form, list[int]]:
    if not isinstance(entry, list) or len(entry) != 5:
        raise WireError(f"has a tensor entry {str(entry)[:60]!r}, expected [role, site, dtype, form, shape]")
    role, site, dtype, form, shape = entry
    if not (isinstance(role, str) and isinstance(site, str) and role and "/" not in role):
        raise WireError(f"has a tensor named {str(role)[:40]!r}/{str(site)[:40]!r}, expected two names")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise WireError(f"{role}/{site} has dtype {str(dtype)[:40]!r}, expected one of {', '.join(_DTYPES)}")
    if form not in FORMS or (form != "raw" and dtype != "float32"):
        raise WireError(f"{role}/{site} has form {str(form)[:40]!r} for {dtype}, expected one of {', '.join(FORMS)}")
    # bool is an int to Python, and JSON has big integers: neither is a length.
    if not isinstance(shape, list) or len(shape) > _MOST_AXES or any(type(n) is not int for n in shape):
        raise WireError(f"{role}/{site} has shape {str(shape)[:60]}, expected a short list of integers")
    if any(not 0 <= n < 1 << 40 for n in shape) or math.prod(shape) >= 1 << 40:
        raise WireError(f"{role}/{site} has shape {str(shape)[:60]}, which no tensor has")
    return role, site, _DTYPES[dtype], form, shape


def _rows(shape: list[int]) -> int:
    return shape[0] if len(shape) > 1 else 1


def _size(dtype: torch.dtype, form: Form, shape: list[int]) -> int:
    count = math.prod(shape)
    if form == "raw":
        return count * dtype.itemsize
    return 2 * count if form == "bfloat16" else count + 4 * _rows(shape)


def _raw(x: Tensor) -> bytes:
    flat = x.reshape(-1).contiguous().cpu()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _write_int8(x: Tensor) -> bytes:
    rows = x.reshape(_rows(list(x.shape)), -1)
    # A NaN or an infinite number must stay one, so that the guard sees it: its row's step is not finite.
    step = rows.abs().amax(1, keepdim=True) / 127
    steps = torch.where((step > 0) & step.isfinite(), rows / step, 0).round().to(torch.int8)
    return _raw(steps) + _raw(step)


def _tensor(data: bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _read_raw(data: bytearray, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if dtype == torch.bool and any(byte > 1 for byte in data):
        raise WireError("has a bool that is neither 0 nor 1")
    return _tensor(data, dtype).reshape(shape)


def _read_bfloat16(data: bytearray, dtype: torch.dtype, shape: list[int]) -> Tensor:
    return _tensor(data, torch.bfloat16).to(dtype).reshape(shape)


def _read_int8(data: bytearray, dtype: torch.dtype, shape: list[int]) -> Tensor:
    rows = _rows(shape)
    cut = len(data) - 4 * rows
    step = _tensor(data[cut:], torch.float32).reshape(rows, 1)
    steps = _tensor(data[:cut], torch.int8).reshape(rows, -1).to(dtype)
    return torch.where(step.isfinite(), steps * step, math.nan).reshape(shape)


_WRITE: Mapping[str, Callable[[Tensor], bytes]] = {
    "raw": _raw,
    "bfloat16": lambda x: _raw(x.to(torch.bfloat16)),
    "int8": _write_int8,
}
_READ: Mapping[str, Callable[[bytearray, torch.dtype, list[int]], Tensor]] = {
    "raw": _read_raw,
    "bfloat16": _read_bfloat16,
    "int8": _read_int8,
}


def difference(state: State, reference: State, sign: float = -1.0) -> State:
    """`state` minus `reference` (plus, with sign 1) where both have a float32 tensor of the same shape; else as it is."""
    return {
        role: {site: _shifted(x, reference.get(role, {}).get(site), sign) for site, x in group.items()}
        for role, group in state.items()
    }


def _shifted(x: Tensor, other: Tensor | None, sign: float) -> Tensor:
    if other is None or other.dtype != torch.float32 or x.dtype != torch.float32 or other.shape != x.shape:
        return x
    return x + sign * other


class Feedback:
    """A client's side of int8: differences from what it received, plus what rounding lost the last time."""

    @staticmethod
    def upload(sent: State, received: State, lost: State) -> tuple[bytes, State]:
        """The bytes to send, and what they lose: both sides decode the same numbers. `lost` is what they lost before."""
        step = difference(difference(sent, received), lost, 1.0)
        data = encode(step, "int8")
        arrived = decode(data)
        rest = {
            role: {site: step[role][site] - x for site, x in group.items() if x.dtype == torch.float32}
            for role, group in arrived.items()
        }
        return data, {role: group for role, group in rest.items() if group}

    @staticmethod
    def download(data: bytes | memoryview, received: State) -> State:
        """The server's side: the upload that the bytes stand for."""
        return difference(decode(data), received, 1.0)


def marks(state: State) -> str:
    """A digest of what says which slice a state is (its seeds and indices) and of its shapes: losses fit only the same."""
    total = hashlib.sha256()
    for role in sorted(state):
        for site, x in sorted(state[role].items()):
            total.update(f"{role}/{site} {tuple(x.shape)}".encode())
            if not x.is_floating_point():
                total.update(_raw(x))
    return total.hexdigest()
