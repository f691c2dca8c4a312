"""Pickles of works and results: functions by value where they must be, a tensor as its own bytes.

torch pickles a tensor with its whole storage, of which a client's may be a small part. A tensor that occurs twice is one again
when it is read, and so is a function: what can be trained in one pass is told by that.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor


def dumps(value: object) -> bytes:
    """Pickle; the opposite is `loads`."""
    from ray import cloudpickle

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
        def reducer_override(self, x: Any) -> Any:
            if type(x) is Tensor and x.device.type == "cpu" and x.layout == torch.strided:
                return _tensor, (x.detach().contiguous().reshape(-1).view(torch.uint8).numpy(), x.dtype, tuple(x.shape))
            return super().reducer_override(x)

    file = io.BytesIO()
    Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def loads(data: bytes) -> Any:
    """Read what `dumps` wrote. It runs what the bytes say: for those of one's own workers alone."""
    return pickle.loads(data)


def _tensor(data: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(data).view(dtype).view(shape)
