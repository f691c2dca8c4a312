"""One loss per client, so that a sum over clients mixes no gradients: each client's rows depend on its own parameters alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedloom.data.batches import Kind, Targets

CHUNK = 1 << 24
"""Logits that are float32 at once: 64 MiB, of a few hundred tokens with a large vocabulary."""


class _CrossEntropy(torch.autograd.Function):
    """(M,) cross entropies of logits (M, n) of any dtype, in float32 (float64 of float64), a chunk of rows at a time.

    A large vocabulary's logits in float32, their log-softmax and its gradient would take 12 bytes a number more. Each chunk's
    log-softmax is made again in the backward pass, where the gradient is softmax - one at the label. As
    `F.cross_entropy(logits.float(), labels)`: the same bits forward, the same up to the rounding of exp backward.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        made = [_log_softmax(x).gather(1, y.unsqueeze(1)) for x, y in _chunks(logits, labels)]
        return torch.cat(made).squeeze(1).neg_()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        found = torch.empty_like(logits)
        for x, y, g, into in _chunks(logits, labels, grads[0], found):
            p = _log_softmax(x).exp_().mul_(g.unsqueeze(1))
            into.copy_(p.scatter_add_(1, y.unsqueeze(1), -g.unsqueeze(1)))
        return found, None


cross_entropy: Any = _CrossEntropy.apply  # torch leaves `apply` untyped


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)


def _chunks(logits: Tensor, *others: Tensor) -> zip[tuple[Tensor, ...]]:
    """Rows of all, together, of at most `CHUNK` logits or one row."""
    rows = max(1, CHUNK // logits.shape[1])
    return zip(*(torch.split(x, rows) for x in (logits, *others)), strict=True)


def client_losses(kind: Kind, logits: Tensor, targets: Targets) -> Tensor:
    """(K,) float64: the mean over each client's rows, or over its answer tokens.

    logits are (M, classes), (M, 1) for a regression, (M, vocabulary) for a causal LM.
    """
    sums, counts = summed_losses(kind, logits, targets)
    return sums / counts.clamp_min(1.0)


def summed_losses(kind: Kind, logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """(K,) sums over each client's rows or answer tokens, and (K,) how many of them there were, in float64."""
    if kind == "regression":
        values = logits.squeeze(-1).to(torch.promote_types(logits.dtype, torch.float32))
        each = F.mse_loss(values, targets.labels.to(values.dtype), reduction="none")
    else:
        each = cross_entropy(logits, targets.labels)
    zeros = torch.zeros(targets.K, dtype=torch.float64, device=logits.device)
    ones = torch.ones_like(each, dtype=torch.float64)
    return zeros.index_add(0, targets.owner, each.double()), zeros.index_add(0, targets.owner, ones)
