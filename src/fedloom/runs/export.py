"""From a state to PEFT: the factors, with scale and offset folded in so that PEFT computes what fedloom evaluated.

A model that weighs its ranks by the input (a gate) is none that PEFT knows: it is written in a form of fedloom's own, which
`fedloom evaluate` reads.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fedloom import lora
from fedloom.checkpoint import decode, encode
from fedloom.core import Factors, Work
from fedloom.disk import write_folder
from fedloom.models import peft
from fedloom.runs.experiment import Experiment
from fedloom.state import Group, State, only, without

GATED = "gated_adapter.safetensors"
"""Roles A, B, gate, head, left, right and the scale, by site."""


def factors(work: Work) -> tuple[Group, Group, float]:
    """A, B and the scale that multiplies B @ A: the work's adapter with its offset as further ranks.

    Without an offset these are the adapter's own factors. With one, the scale is folded in and is 1.
    """
    A, B, _ = work.adapter(work.train, work.fixed)
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
    """Write the model that `work` describes as a PEFT directory, or in fedloom's own form if it has a gate."""
    head = work.train.get("head") or work.fixed.get("head")
    made = work.adapter(work.train, work.fixed)
    if made.gate is not None:
        state: State = {"A": made.A, "B": made.B, "gate": made.gate, **({"head": head} if head else {}), **work.base}
        write_folder(path, partial(_write_gated, state=state, scale=work.scale))
        return
    A, B, scale = factors(work)
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
            revision=e.base.revision,
        ),
    )


def read(path: Path) -> Work:
    """A saved adapter as work that trains nothing."""
    if (path / GATED).is_file():
        state = decode((path / GATED).read_bytes())
        scale = float(state.pop("scale")["scale"])
        base = only(state, "left", "right")
        return Work(train=without(state, "left", "right"), base=base, scale=scale, adapter=_gated)
    A, B, head, config = peft.read_adapter(path)
    factors = {"A": A, "B": B} | ({"head": head} if head else {})
    return Work(train=factors, scale=lora.scale(config["lora_alpha"], config["r"], config.get("use_rslora", False)))


def _write_gated(path: Path, *, state: State, scale: float) -> None:
    (path / GATED).write_bytes(encode(state | {"scale": {"scale": torch.tensor(scale, dtype=torch.float64)}}))
    (path / "README.txt").write_text(
        "This model weighs its ranks by the input, which no PEFT adapter can: it is in a form of fedloom's own.\n"
        "Score it with `fedloom evaluate RUN`; roles A (r, in), B (out, r), gate (parts, in): softmax(gate x) weighs equal\n"
        "parts of the ranks, and what is added to each layer is scale * B diag(weights) A x.\n"
    )


def _gated(train: State, fixed: State) -> Factors:
    return Factors(train["A"], train["B"], train["gate"])
