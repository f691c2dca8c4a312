"""One loss per client, so that a sum over clients mixes no gradients: each client's rows depend on its own leaves alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedloom.data.text import IGNORE, Batch, Kind


def client_losses(kind: Kind, logits: Tensor, batch: Batch) -> Tensor:
    """(K,): the mean over each client's rows, or over its answer tokens, in float32 at least.

    logits are (K * b, classes), (K * b, 1) for a regression, (N, vocabulary) for the N positions of `answer_positions`.
    """
    sums, counts = summed_losses(kind, logits, batch)
    return sums / counts.clamp_min(1.0)


def summed_losses(kind: Kind, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(K,) sums over each client's rows or answer tokens, and (K,) how many of them there were."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if kind == "causal-lm":
        positions, targets = answer_positions(batch)
        owner = positions // (batch.b * batch.labels.shape[1])
        each = F.cross_entropy(logits, targets, reduction="none")
        zeros = torch.zeros(batch.K, dtype=logits.dtype, device=logits.device)
        return zeros.index_add(0, owner, each), zeros.index_add(0, owner, torch.ones_like(each))
    if kind == "classification":
        each = F.cross_entropy(logits, batch.labels, reduction="none")
    else:
        each = F.mse_loss(logits.squeeze(-1), batch.labels.to(logits.dtype), reduction="none")
    weight = batch.weight.to(logits.dtype)
    return (each * weight).view(batch.K, batch.b).sum(1), weight.view(batch.K, batch.b).sum(1)


def answer_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """Where an answer token is predicted: (N,) indices into the flattened (K * b, L), and the (N,) tokens.

    Position i predicts token i + 1; a row's last position predicts nothing.
    """
    labels = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE).flatten()
    positions = torch.nonzero(labels != IGNORE).squeeze(1)
    return positions, labels[positions]
