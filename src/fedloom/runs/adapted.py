"""Which layers of a base a run adapts."""

from __future__ import annotations

from torch import nn

from fedloom.models import huggingface
from fedloom.models.blocks import sites_in
from fedloom.runs.config import LoraSection
from fedloom.state import Sites


def adapted(lora: LoraSection, model: nn.Module) -> tuple[list[str], Sites]:
    """What names the adapted layers for PEFT, and (out, in) of each of them.

    Names are endings, but where blocks are left out, each layer's own: exact for every architecture, which PEFT's patterns of
    block numbers are not. Raises ConfigError or ModelError for what the model lacks.
    """
    if lora.targets == "auto":
        targets = huggingface.default_targets(model)
    else:
        targets = huggingface.all_linear(model) if lora.targets == "all-linear" else list(lora.targets)
    every = huggingface.find_sites(model, targets)
    sites = sites_in(model, every, lora.layers)
    return targets if lora.layers == "all" else list(sites), sites
