"""The dtype that a processor or GPU computes in fastest without losing a model's meaning."""

from __future__ import annotations

from pathlib import Path

import torch


def auto_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 where the processor or GPU computes in it, else float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        fast = _cpu_has_bfloat16()
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(word in flags for word in ("avx512_bf16", "amx_bf16"))
