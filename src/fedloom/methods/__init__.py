"""The methods, by name. One file each; a third party's method is named as `"their.module:Class"`."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

from fedloom.core import Method
from fedloom.errors import ConfigError, nearest

_KNOWN = {
    "fedit": "fedit:FedIT",
    "ffa_lora": "ffa_lora:FFALoRA",
    "fedsa_lora": "fedsa_lora:FedSALoRA",
    "hetlora": "hetlora:HetLoRA",
    "flexlora": "flexlora:FlexLoRA",
    "fedex_lora": "fedex_lora:FedExLoRA",
    "fslora": "fslora:FSLoRA",
    "fedlodrop": "fedlodrop:FedLoDrop",
    "fedlora_optimizer": "fedlora_optimizer:FedLoRAOptimizer",
    "feddpa": "feddpa:FedDPA",
    "fedprox": "fedprox:FedProx",
    "scaffold": "scaffold:Scaffold",
    "fednova": "fednova:FedNova",
    "clip_updates": "clip:Clip",
    "quantise": "quantise:Quantise",
    "median": "robust:Median",
    "trimmed_mean": "robust:TrimmedMean",
    "multi_krum": "robust:MultiKrum",
    "norm_filter": "robust:NormFilter",
    "fedawa": "fedawa:FedAWA",
    "flasc": "flasc:FLASC",
    "fedavgm": "fedopt:FedAvgM",
    "fedadagrad": "fedopt:FedAdagrad",
    "fedadam": "fedopt:FedAdam",
    "fedyogi": "fedopt:FedYogi",
    "rolora": "rolora:RoLoRA",
    "fedrot_lora": "fedrot_lora:FedRotLoRA",
    "lora_fair": "lora_fair:LoRAFAIR",
    "fedsvd": "fedsvd:FedSVD",
    "fed_sb": "fed_sb:FedSB",
    "ravan": "ravan:Ravan",
    "fedask": "fedask:FedASK",
    "flora": "flora:FLoRA",
    "florist": "florist:FLoRIST",
    "fedmomentum": "fedmomentum:FedMomentum",
    "frlora": "frlora:FRLoRA",
    "eclora": "flexlora:ECLoRA",
    "zero_padding": "zero_padding:ZeroPadding",
    "replication_padding": "zero_padding:ReplicationPadding",
    "raflora": "raflora:RaFLoRA",
    "fed_plora": "fed_plora:FedPLoRA",
    "lora_a2": "lora_a2:LoRAA2",
    "fedrora": "fedrora:FedRoRA",
    "feddpa_f": "feddpa:FedDPAF",
    "fedalt": "fedalt:FedALT",
    "pf2lora_first_order": "pf2lora:PF2LoRAFirstOrder",
    "fedlease_clusters": "fedlease_clusters:FedLEASEClusters",
}


def names() -> list[str]:
    """The names of all methods.

    >>> "fslora" in names()
    True
    """
    return list(_KNOWN)


def get(name: str) -> type[Method]:
    """The class of a method. Raises ConfigError naming the known ones.

    >>> get("fedit")(rank=8).name
    'fedit'
    """
    if not isinstance(name, str):
        raise ConfigError(f"method name is {name!r}, expected a text: one of {', '.join(_KNOWN)}")
    if name in _KNOWN:
        module, _, attribute = f"fedloom.methods.{_KNOWN[name]}".partition(":")
    elif all(part.isidentifier() for part in name.replace(":", ".", 1).split(".")) and ":" in name:
        module, attribute = name.split(":", 1)
    else:
        raise ConfigError(
            f"unknown method {name!r}{nearest(name, _KNOWN)}; known: {', '.join(_KNOWN)}, or your own as 'module:Class'"
        )
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"method {name!r} cannot be imported ({error}); expected an importable 'module:Class'"
        ) from error
    whole = isinstance(cls, type) and issubclass(cls, Method) and not getattr(cls, "__abstractmethods__", None)
    if not whole or not isinstance(getattr(cls, "name", None), str):
        raise ConfigError(
            f"{name!r} is not a method: expected a subclass of fedloom.core.Method with a `name` and all it needs"
        )
    return cast(type[Method], cls)


def build(table: Mapping[str, Any], lora: Mapping[str, Any] | None = None, where: str = "method") -> Method:
    """A method from its [method] table. `over` is a table too, to any depth; the innermost gets the values of [lora].

    Raises ConfigError that names the table and the fields that it may have.

    >>> build({"name": "fslora", "sketch": "balanced", "over": {"name": "fedex_lora"}}, {"rank": 4}).over.rank
    4
    """
    values = dict(table)
    if "name" not in values:
        raise ConfigError(f"[{where}] has no name, expected one of {', '.join(_KNOWN)}")
    name = values.pop("name")
    try:
        cls = get(name)
    except ConfigError as error:
        raise ConfigError(f"[{where}] {error}") from error
    known = [f.name for f in fields(cast(Any, cls))]
    shared = dict(lora or {})
    for key in values:
        if key in shared:
            raise ConfigError(f"[{where}] sets {key}: set it in [lora], where every method finds it")
        if key not in known:
            raise ConfigError(
                f"[{where}] {name} has no field {key!r}{nearest(key, known)}; it has: "
                f"{', '.join(x for x in known if x not in shared) or 'none'}"
            )
    if "over" in known:
        values["over"] = build(_table(values.get("over", {"name": "fedit"}), where), lora, f"{where}.over")
    else:
        values |= {key: value for key, value in shared.items() if key in known}
    try:
        return cls(**values)
    except ConfigError as error:
        # A wrapper knows of the method under it, and not how deep it stands itself.
        said = str(error).replace("[method.over]", f"[{where}.over]")
        raise ConfigError(f"[{where}] {said}") from error


def _table(over: object, where: str) -> Mapping[str, Any]:
    if isinstance(over, str):
        warnings.warn(
            f'[{where}] over = "{over}" is the old form: write [{where}.over] with name = "{over}"',
            FutureWarning,
            stacklevel=3,
        )
        return {"name": over}
    if not isinstance(over, Mapping):
        raise ConfigError(f"[{where}] over is {over!r}, expected a table with a name: [{where}.over]")
    return over
