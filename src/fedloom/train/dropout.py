"""Dropout on the adapters' inputs, drawn per (seed, t, client, work, step, site): what a client drops does not depend on who
trains beside it, nor on how far its batch was padded. They are drawn where they are used: a GPU's generator counts (Philox), so
that nothing crosses, and its numbers are others than a CPU's. Hu et al., "LoRA", arXiv 2106.09685, as PEFT's `lora_dropout`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.rng import generator


@dataclass(frozen=True)
class InputDropout:
    """The masks of one step of K clients."""

    p: float
    keys: Sequence[tuple[int | str, ...]]
    """(K,) what each client's masks are drawn from."""
    rows: Sequence[int]
    """(K,) rows of data in each client's batch; those after them are fillers."""
    lengths: Sequence[int]
    """(K,) tokens of each client's longest row; those after them are padding."""

    def __call__(self, site: str, x: Tensor) -> Tensor:
        """What multiplies x (K * b, L, in) or (K * b, in): 0 for a share p of its real inputs, 1 / (1 - p) for the others."""
        K, b = len(self.keys), x.shape[0] // len(self.keys)
        mask = torch.ones(K, b, *x.shape[1:], dtype=x.dtype, device=x.device)
        for k, key in enumerate(self.keys):
            real = (min(self.rows[k], b), *((min(self.lengths[k], x.shape[1]),) if x.ndim == 3 else ()))
            shape = (*real, x.shape[-1])
            draw = torch.rand(shape, generator=generator(*key, site, "dropout", device=x.device), device=x.device)
            mask[k][tuple(slice(0, n) for n in shape)] = (draw >= self.p).to(x.dtype) / (1.0 - self.p)
        return mask.view(x.shape)
