"""The linear layers of a model: those that LoRA adapts, by name endings as in PEFT, and those of its task head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from fedloom.errors import ConfigError, ModelError, nearest
from fedloom.models.families import family_of, model_type
from fedloom.models.probe import probe, without_gradient
from fedloom.models.quantised import coded_shape
from fedloom.state import Sites

_STATE_SPACE = frozenset({"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"})
"""Architectures of which PEFT refuses `out_proj`: fused kernels read its weight past the layer."""


def head_modules(model: nn.Module) -> list[str]:
    """Names of the linear layers that make up the task head of a sequence-classification model; none for a causal LM.

    BERT has `classifier`, RoBERTa `classifier.dense` and `classifier.out_proj`, Llama and GPT-2 `score`.
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    return [
        name
        for child, module in model.named_children()
        if child != getattr(model, "base_model_prefix", "")
        for name, layer in module.named_modules(prefix=child)
        if isinstance(layer, nn.Linear)
    ]


def default_targets(model: nn.Module) -> list[str]:
    """The layers that LoRA adapts in this architecture, as name endings: those of its record, else every layer that can be."""
    family = family_of(model)
    known = () if family is None else family.targets
    layers = [name for name, _ in _layers(model)]
    return [x for x in known if any(_matches(name, x) for name in layers)] or all_linear(model)


def all_linear(model: nn.Module) -> list[str]:
    """Every linear layer that can carry an adapter, the task head and the output embedding apart: name endings where all layers
    of one name can, else whole names.

    Raises ModelError if there is none.
    """
    layers = [name for name, _ in _layers(model)]
    refused = probe(model, layers).obstacles.keys() | {name for name in layers if _peft_refuses(model, name)}
    if not layers or refused == set(layers):
        raise ModelError(
            f"a {model_type(model)!r} model has no linear layer that can carry an adapter: choose another model"
        )
    spoilt = {_ending(name) for name in refused}
    return sorted({name if _ending(name) in spoilt else _ending(name) for name in layers if name not in refused})


def check_sites(model: nn.Module, sites: Iterable[str]) -> bool:
    """Whether clients can train together, each with adapters at these layers.

    Raises ModelError for a layer that can carry none, or that hands no gradient back. Only architectures whose layers are not
    known to are asked.
    """
    names = list(sites)
    for name in names:
        if _peft_refuses(model, name):
            raise ModelError(
                f"layer {name!r} of this {type(model).__name__} can carry no adapter, in PEFT neither: its weight is read past "
                "the layer; take it out of targets in [lora]"
            )
    if (layer := without_gradient(model)) is not None:
        raise ModelError(
            f"layer {layer!r} of this {type(model).__name__} hands no gradient back: not its weights alone are coded but its "
            "inputs too; expected a checkpoint that codes weights alone"
        )
    family = family_of(model)
    if family is not None and family.packs:
        return True
    found = probe(model, names)
    for name, why in found.obstacles.items():
        raise ModelError(f"layer {name!r} of this {type(model).__name__} {why}: take it out of targets in [lora]")
    return not found.alone


def find_sites(model: nn.Module, targets: Iterable[str]) -> Sites:
    """The layers to adapt -> (out, in). A target matches a layer of its name, or one whose name ends in `.target`, as in PEFT.

    Linear layers and GPT-2's Conv1D count; the task head and the output embedding do not. Raises ModelError for a target
    that matches no layer.
    """
    layers = dict(_layers(model))
    sites: Sites = {}
    wanted = [targets] if isinstance(targets, str) else list(targets)
    for target in wanted:
        found = {name: size for name, size in layers.items() if _matches(name, target)}
        if not found:
            endings = _endings(model)
            raise ModelError(
                f"target {target!r} matches no linear layer of this {type(model).__name__}, expected some of: "
                f"{', '.join(endings)}{nearest(target, endings)}"
            )
        sites |= found
    if not sites:
        raise ModelError(f"no layers to adapt were named, expected some of: {', '.join(_endings(model))}")
    return {name: sites[name] for name in layers if name in sites}  # in the model's order, whatever that of the targets


def is_conv1d(layer: nn.Module) -> bool:
    """Whether the layer keeps its weight as (in, out), as GPT-2 does."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def check_rank(sites: Sites, rank: int) -> None:
    """Raise ConfigError if the rank is below 1, or above a side of a layer, where it could add nothing."""
    name, size = min(sites.items(), key=lambda item: min(item[1]))
    if not 1 <= rank <= min(size):
        raise ConfigError(
            f"got rank {rank}, expected 1 to {min(size)}: layer {name!r} is {size[0]} x {size[1]}; change rank in [lora]"
        )


def _layers(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Adaptable layers and their (out, in), in the model's order."""
    head = set(head_modules(model))
    embeddings: Any = getattr(model, "get_output_embeddings", None)
    output = None if embeddings is None else embeddings()
    for name, layer in model.named_modules():
        if name in head or layer is output:
            continue
        if isinstance(layer, nn.Linear):
            yield name, (layer.out_features, layer.in_features)
        elif is_conv1d(layer):
            n, m = layer.get_parameter("weight").shape
            yield name, (int(m), int(n))
        elif (shape := coded_shape(layer)) is not None:
            yield name, shape


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _ending(name: str) -> str:
    """The last word of a layer's name; with the one before it where it is a number, which other modules end in too."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def _endings(model: nn.Module) -> list[str]:
    return sorted({_ending(name) for name, _ in _layers(model)})


def _peft_refuses(model: nn.Module, name: str) -> bool:
    return model_type(model) in _STATE_SPACE and _ending(name) == "out_proj"
