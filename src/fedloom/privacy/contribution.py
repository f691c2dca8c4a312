"""A client's half of a secure sum, before it masks: the words that it adds, of numbers that nobody but itself can test."""

from __future__ import annotations

import torch
from torch import Tensor

from fedloom.core import Method, State, Visit
from fedloom.privacy.fixed_point import FixedPoint, Layout
from fedloom.spec import Leaf, reject_reason
from fedloom.state import only


def contribution(
    method: Method,
    upload: State,
    received: State,
    visit: Visit,
    *,
    fixed: FixedPoint,
    share: float,
    thin: Tensor,
    layout: bytes,
) -> Tensor:
    """(d,) words of share * spread(upload); where `thin` (d,) bool, of what was received, as if it had not been trained.

    Raises ValueError with the reason for numbers that must not be sent, or that are not in the sum's `layout` (a digest).
    """
    spec = {role: {s: Leaf(tuple(x.shape), x.dtype) for s, x in group.items()} for role, group in upload.items()}
    if why := reject_reason(spec, upload):
        raise ValueError(why)
    wide = method.spread(upload, received, visit)
    own = Layout.of(wide)
    if own.digest != layout or own.size != len(thin):
        raise ValueError("the upload has other tensors than the sum")
    vector = own.vector(wide)
    if thin.any():
        untrained = method.spread(only(received, *upload), received, visit)
        vector = torch.where(thin, own.vector(untrained), vector)
    return fixed.encode(vector * share)
