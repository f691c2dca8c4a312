"""Adapters as PEFT reads them, so that a result loads in PEFT and vLLM; and models with an adapter merged in.

Hu et al., LoRA, arXiv 2106.09685; the directory format is that of Hugging Face's PEFT.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedloom import lora
from fedloom.errors import ModelError
from fedloom.models import quantised
from fedloom.models.huggingface import Kind, is_conv1d
from fedloom.models.source import quiet
from fedloom.state import Group, State

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."  # what PEFT puts before the base model's own names
_TASKS = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}

_FIXED = {
    "auto_mapping": None,
    "bias": "none",
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_dropout": 0.0,
    "peft_type": "LORA",
    "use_dora": False,
}
"""What adapter_config.json says of every adapter."""


def write_adapter(
    path: Path,
    *,
    A: Group,
    B: Group,
    alpha: float,
    rank: int,
    rslora: bool,
    targets: Iterable[str],
    base_name: str,
    kind: Kind,
    head: Group | None = None,
    fan_in_fan_out: bool = False,
    revision: str | None = None,
) -> None:
    """Write a PEFT directory: `PeftModel.from_pretrained(base, path)` computes what A (r, in), B (out, r) and the head do here.

    Every site is scaled by alpha / rank (alpha / sqrt(rank) with `rslora`), whatever the rank of its own factors. `head` maps
    full parameter names, such as `classifier.weight`, to tensors; `fan_in_fan_out` is for GPT-2's Conv1D,
    `revision` is that of a hub id. The same tensors give the same bytes. Raises ModelError if A and B do not fit together.
    """
    from safetensors.torch import save

    _check(A, B)
    head = head or {}
    scale = lora.scale(alpha, rank, rslora)
    other = {site: a.shape[0] for site, a in sorted(A.items()) if a.shape[0] != rank}
    modules = {name.rpartition(".")[0] for name in head}
    wanted = sorted(set(targets))
    # PEFT matches targets by name endings alone, and would adapt a layer of the head that has such a name.
    excluded = sorted(name for name in modules if any(_matches(name, target) for target in wanted))
    config = _FIXED | {
        "alpha_pattern": {site: _number(scale * (math.sqrt(r) if rslora else r)) for site, r in other.items()},
        "base_model_name_or_path": base_name,
        "exclude_modules": excluded or None,
        "fan_in_fan_out": fan_in_fan_out,
        "lora_alpha": _number(alpha),
        "modules_to_save": sorted({name.partition(".")[0] for name in head}) or None,
        "r": rank,
        "rank_pattern": other,
        "revision": revision,
        "target_modules": wanted,
        "task_type": _TASKS[kind],
        "use_rslora": rslora,
    }
    tensors = {f"{_PREFIX}{site}.lora_A.weight": a for site, a in A.items()}
    tensors |= {f"{_PREFIX}{site}.lora_B.weight": b for site, b in B.items()}
    tensors |= {f"{_PREFIX}{name}": x for name, x in head.items()}
    path.mkdir(parents=True, exist_ok=True)
    plain = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    # Not save_file: of a full disk it raises an error of its own, and its files are for their owner alone.
    (path / WEIGHTS).write_bytes(save(plain, metadata={"format": "pt"}))
    (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_adapter(path: Path) -> tuple[Group, Group, Group, dict[str, Any]]:
    """(A, B, head, config) of a PEFT directory: factors by site, other tensors by parameter name, adapter_config.json.

    Raises ModelError if it is no LoRA adapter, or one of a form that A and B alone do not describe (DoRA, trained biases).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config: dict[str, Any] = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(path / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{path} is no readable adapter ({error}), expected {CONFIG} and {WEIGHTS} in it") from error
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("bias", "none") != "none":
        raise ModelError(
            f"{path} holds a {config.get('peft_type')} adapter with extras, expected plain LoRA: export it as such"
        )
    A: Group = {}
    B: Group = {}
    head: Group = {}
    for key, x in tensors.items():
        name = key.removeprefix(_PREFIX)
        # The names are PEFT's file format: only here are roles read from them.
        if name.endswith(".lora_A.weight"):
            A[name.removesuffix(".lora_A.weight")] = x
        elif name.endswith(".lora_B.weight"):
            B[name.removesuffix(".lora_B.weight")] = x
        else:
            head[name] = x
    _check(A, B)
    return A, B, head, config


def merge(
    base_model: nn.Module,
    A: Group,
    B: Group,
    scale: float,
    offset: State,
    head: Group | None,
    dest: Path,
    tokenizer: Any = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Write the model W + scale * B @ A + offset, with the head given, as a directory for transformers' Auto classes.

    `offset` has the roles of `Work.base`: `left` (out, q) and `right` (q, in), or `left` alone, dense. The model given stays
    as it is; `labels` are named in the configuration written. Sums are taken in float32 at least, and stored in the base's
    dtype; what is written is never quantised. Raises ModelError for a site or parameter that the model lacks, and for a base
    quantised by another library than bitsandbytes.
    """
    quantised.check_own_codes(base_model)
    modules = dict(base_model.named_modules())
    dtype = next(x.dtype for x in base_model.parameters() if x.is_floating_point())
    weights: dict[str, Tensor] = dict(base_model.state_dict())
    for name, layer in quantised.quantised(base_model).items():
        weights[f"{name}.weight"] = quantised.stored(layer, dtype)
    for site in sorted({*A, *offset.get("left", {})}):
        if site not in modules:
            raise ModelError(
                f"the adapter has a site {site!r} that this {type(base_model).__name__} lacks: was it made for it?"
            )
        W = weights[f"{site}.weight"]
        wide = torch.promote_types(W.dtype, torch.float32)
        change = torch.zeros((), dtype=wide)
        if site in A:
            change = change + scale * (B[site].to(wide) @ A[site].to(wide))
        if site in offset.get("left", {}):
            left = offset["left"][site].to(wide)
            right = offset.get("right", {}).get(site)
            change = change + (left if right is None else left @ right.to(wide))
        change = change.to(W.device)
        turned = is_conv1d(modules[site]) or getattr(modules[site], "turned", False)
        weights[f"{site}.weight"] = (W.to(wide) + (change.T if turned else change)).to(W.dtype)
    for name, x in (head or {}).items():
        if name not in weights:
            raise ModelError(f"the adapter has a parameter {name!r} that this {type(base_model).__name__} lacks")
        weights[name] = x.to(weights[name])
    model: Any = base_model
    before = model.config.id2label, model.config.label2id
    coded = model.config.__dict__.pop("quantization_config", None)
    try:
        if labels:
            model.config.id2label = dict(enumerate(labels))
            model.config.label2id = {name: i for i, name in enumerate(labels)}
        with quiet():
            model.save_pretrained(str(dest), state_dict=weights)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(dest))
    finally:
        model.config.id2label, model.config.label2id = before
        if coded is not None:
            model.config.quantization_config = coded


def whole_blocks(model: nn.Module, head: Group) -> Group:
    """The head with all else that its modules hold, such as a LayerNorm: PEFT saves and reads whole modules."""
    names = {name.partition(".")[0] for name in head}
    rest = {f"{name}.{leaf}": x for name in names for leaf, x in model.get_submodule(name).state_dict().items()}
    return {name: x.detach().float().cpu() for name, x in rest.items()} | head


def _check(A: Group, B: Group) -> None:
    if not A or A.keys() != B.keys():
        odd = sorted(A.keys() ^ B.keys())[:3]
        raise ModelError(
            f"an adapter needs A and B for the same sites, got {len(A)} of A and {len(B)} of B (such as {odd})"
        )
    for site, a in A.items():
        if a.ndim != 2 or B[site].ndim != 2 or a.shape[0] != B[site].shape[1]:
            raise ModelError(
                f"site {site!r} has A {tuple(a.shape)} and B {tuple(B[site].shape)}, expected (r, in) and (out, r)"
            )


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _number(x: float) -> int | float:
    """An int where the value is one: PEFT and vLLM declare alpha as an int."""
    return int(x) if float(x).is_integer() else float(x)
