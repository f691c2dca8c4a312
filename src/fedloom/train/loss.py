"""One loss per client, so that a sum over clients mixes no gradients: each client's rows depend on its own parameters alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedloom.data.batches import Kind, Targets


def client_losses(kind: Kind, logits: Tensor, targets: Targets) -> Tensor:
    """(K,) float64: the mean over each client's rows, or over its answer tokens.

    logits are (M, classes), (M, 1) for a regression, (M, vocabulary) for a causal LM.
    """
    sums, counts = summed_losses(kind, logits, targets)
    return sums / counts.clamp_min(1.0)


def summed_losses(kind: Kind, logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """(K,) sums over each client's rows or answer tokens, and (K,) how many of them there were, in float64."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if kind == "regression":
        each = F.mse_loss(logits.squeeze(-1), targets.labels.to(logits.dtype), reduction="none")
    else:
        each = F.cross_entropy(logits, targets.labels, reduction="none")
    zeros = torch.zeros(targets.K, dtype=torch.float64, device=logits.device)
    ones = torch.ones_like(each, dtype=torch.float64)
    return zeros.index_add(0, targets.owner, each.double()), zeros.index_add(0, targets.owner, ones)
