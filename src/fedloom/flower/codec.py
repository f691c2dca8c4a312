"""States on the wire: safetensors, where float32 tensors may be rounded to bfloat16, or to int8 with error feedback.

A tensor's name is `role/site`; how its numbers cross is the `form` in the metadata:

    raw        as they are, any dtype that safetensors writes   exact
    bfloat16   float32 rounded to nearest even                  widening back to float32 is exact, rounding was not
    int8       float32 as round(x / s), s = max|row| / 127; the float32 s of all rows of the first axes are the tensor `/`

Numbers that are not float32 (seeds, indices, float64) always cross as they are; a tensor that was bfloat16 or int8 before is
named in the metadata as `raw`, and a role without tensors, `role/`, as `empty`. There is no digest here: a message has one for
all of its parts.

int8 is meant for differences: see `difference` and `Feedback`, after Seide et al., 1-Bit Stochastic Gradient Descent,
Interspeech 2014, and Karimireddy et al., Error Feedback Fixes SignSGD, arXiv 1901.09847: what rounding loses in one round is
added to the next.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedloom.flower.message import WireError, loads, printable
from fedloom.state import State

Form = Literal["raw", "bfloat16", "int8"]
FORMS: tuple[Form, ...] = get_args(Form)

_ROUNDED = {"raw": None, "bfloat16": torch.bfloat16, "int8": torch.int8}
_STEPS = "/"
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,63}")
_LONGEST_SITE = 256


def encode(state: State, form: Form = "raw") -> bytes:
    """A state as bytes. Raises WireError for a dtype that safetensors does not write, or a role that is no name."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {} if form == "raw" else {"form": form}
    steps: list[Tensor] = []
    for role, group in sorted(state.items()):
        if not _ROLE.fullmatch(role):
            raise WireError(f"role {role!r} does not cross, expected letters, digits, dots and underscores")
        if not group:
            metadata[f"{role}/"] = "empty"
        for site, x in sorted(group.items()):
            x, name = x.detach().cpu(), f"{role}/{site}"
            if form == "raw" or x.dtype != torch.float32 or not x.numel():
                # A copy: safetensors refuses tensors that share memory, and states share what was not trained.
                tensors[name] = x.clone(memory_format=torch.contiguous_format)
                if x.dtype == _ROUNDED[form]:
                    metadata[name] = "raw"
            elif form == "bfloat16":
                tensors[name] = x.to(torch.bfloat16).contiguous()
            else:
                tensors[name], step = _quantised(x)
                steps.append(step)
    if steps:
        tensors[_STEPS] = torch.cat(steps)
    try:
        return save(tensors, metadata or None)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise WireError(f"cannot be written as safetensors ({printable(error, 120)})") from None


def decode(data: bytes | memoryview) -> State:
    """Inverse of `encode`: tensors of their own memory. Raises WireError that says what is wrong."""
    data = bytes(data)
    try:
        tensors = load(data)
    except Exception as error:  # safetensors has an error class of its own, and torch raises many for odd shapes
        raise WireError(f"holds no safetensors ({type(error).__name__}: {printable(error, 120)})") from None
    metadata = _metadata(data)
    form = metadata.pop("form", "raw")
    if form not in FORMS:
        raise WireError(f"has form {printable(repr(form), 20)}, expected one of {', '.join(FORMS)}")
    steps = tensors.pop(_STEPS, torch.zeros(0))
    state: State = {}
    # In the order of `encode`, which is that of roles and then of sites.
    for role, site, name in sorted((*_parted(name), name) for name in tensors):
        x = tensors.pop(name)
        rounded = x.dtype == _ROUNDED[form] and metadata.pop(name, None) != "raw"
        if rounded and form == "int8":
            x, steps = _multiplied(name, x, steps)
        elif rounded:
            x = x.float()
        elif x.dtype == torch.bool and bool((x.view(torch.uint8) > 1).any()):
            raise WireError(f"{printable(name, 60)} has a bool that is neither 0 nor 1")
        state.setdefault(role, {})[site] = x
    for name, what in metadata.items():
        role = name[:-1]
        if what != "empty" or not name.endswith("/") or not _ROLE.fullmatch(role) or role in state:
            raise WireError(f"has metadata {printable(repr(name), 40)} of no tensor")
        state[role] = {}
    if steps.numel():
        raise WireError(f"has {steps.numel()} steps of no row")
    return state


def _metadata(data: bytes) -> dict[str, str]:
    """Of bytes that safetensors has read."""
    header = loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(header.get("__metadata__") or {})


def _parted(name: str) -> tuple[str, str]:
    role, _, site = name.partition("/")
    if not (_ROLE.fullmatch(role) and site and site.isprintable() and len(site) <= _LONGEST_SITE):
        raise WireError(f"has a tensor named {printable(repr(name), 40)}, expected role/site")
    return role, site


def _rows(x: Tensor) -> int:
    return x.shape[0] if x.dim() > 1 else 1


def _quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.reshape(_rows(x), -1)
    # A NaN or an infinite number must stay one, so that the server sees it: its row's step is not finite.
    step = rows.abs().amax(1, keepdim=True) / 127
    whole = torch.where((step > 0) & step.isfinite(), rows / step, 0).round().to(torch.int8)
    return whole.reshape(x.shape).contiguous(), step.reshape(-1)


def _multiplied(name: str, x: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor of int8 times the first of the steps, and the steps left."""
    count = _rows(x)
    if not x.numel() or steps.dtype != torch.float32 or steps.dim() != 1 or len(steps) < count:
        raise WireError(f"{printable(name, 60)} of shape {tuple(x.shape)} has no float32 step for each row")
    step = steps[:count, None]
    restored = torch.where(step.isfinite(), x.reshape(count, -1).float() * step, math.nan).reshape(x.shape)
    return restored, steps[count:]


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
                total.update(x.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return total.hexdigest()
