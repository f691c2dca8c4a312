"""From a state to PEFT: the factors, with scale and offset folded in so that PEFT computes what fedloom evaluated."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fedloom import lora
from fedloom.core import Work
from fedloom.disk import write_folder
from fedloom.errors import ModelError
from fedloom.models import peft
from fedloom.runs.experiment import Experiment
from fedloom.state import Group


def factors(work: Work) -> tuple[Group, Group, float]:
    """A, B and the scale that multiplies B @ A: the work's adapter with its offset as further ranks.

    Without an offset these are the adapter's own factors. With one, the scale is folded in and is 1.
    """
    A, B, gate = work.adapter(work.train, work.fixed)
    if gate is not None:
        raise ModelError(
            "this model weighs its ranks by the input, which no PEFT adapter can: use it from the run's checkpoint"
        )
    if not work.base:
        return A, B, work.scale
    with_offset_A, with_offset_B = {}, {}
    for site, x in A.items():
        left, right = _offset(work.base["left"].get(site), work.base.get("right", {}).get(site), B[site], x)
        with_offset_A[site] = torch.cat([x, right])
        with_offset_B[site] = torch.cat([B[site] * work.scale, left], dim=1)
    return with_offset_A, with_offset_B, 1.0


def _offset(left: Tensor | None, right: Tensor | None, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    if left is None:
        return B[:, :0], A[:0]
    if right is not None:
        return left, right
    # A dense offset: its thin SVD in float64, exact to the rounding of float32.
    U, S, Vh = torch.linalg.svd(left.double(), full_matrices=False)
    root = S.sqrt()
    return (U * root).to(left.dtype), (root[:, None] * Vh).to(left.dtype)


def write(e: Experiment, work: Work, path: Path) -> None:
    """Write the model that `work` describes as a PEFT directory."""
    A, B, scale = factors(work)
    head = work.train.get("head") or work.fixed.get("head")
    rank = next(iter(A.values())).shape[0]
    # Whole or not at all, and on disk before anything says that the run is done.
    write_folder(
        path,
        partial(
            peft.write_adapter,
            A=A,
            B=B,
            rank=rank,
            alpha=scale * rank,
            rslora=False,  # the scale is folded into alpha
            targets=e.targets,
            base_name=e.base.path_or_id,
            kind=e.config.task.kind,
            head=peft.whole_blocks(e.base.model, head) if head else None,
            fan_in_fan_out=e.transposed,
        ),
    )


def read(path: Path) -> Work:
    """A saved adapter as work that trains nothing."""
    A, B, head, config = peft.read_adapter(path)
    state = {"A": A, "B": B} | ({"head": head} if head else {})
    return Work(train=state, scale=lora.scale(config["lora_alpha"], config["r"], config.get("use_rslora", False)))
