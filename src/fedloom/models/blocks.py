"""The blocks of a model, one above the other, and the adapted layers that lie in some of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from torch import nn

from fedloom.errors import ConfigError, ModelError
from fedloom.state import Sites

Blocks = Literal["all", "upper half", "lower half"] | Sequence[int]
"""Of n blocks the upper half are n // 2 to n - 1, the lower half those before them; or their numbers, from 0."""


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the model's encoder or decoder blocks, the first that it calls first.

    They are the one list of `num_hidden_layers` modules in it. Raises ModelError where there is none, as in ALBERT, whose
    layers are all the same one, or there are several.
    """
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and all([*x.children()] for x in module)
    ]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if count is None or len(outermost) != 1:
        raise ModelError(
            f"the blocks of this {type(model).__name__} cannot be told: {len(outermost) or 'no'} lists in it have as many "
            'modules as its configuration has hidden layers; set layers = "all" in [lora], and name layers in targets'
        )
    return [f"{outermost[0]}.{i}" for i in range(len(model.get_submodule(outermost[0])._modules))]


def sites_in(model: nn.Module, sites: Sites, blocks: Blocks) -> Sites:
    """Those of the sites that are in the blocks named. Raises ConfigError for a number out of range, or if no site is left,
    and ModelError if the model's blocks cannot be told."""
    if blocks == "all":
        return sites
    names = find_blocks(model)
    n = len(names)
    if isinstance(blocks, str):
        chosen: Sequence[int] = range(n // 2, n) if blocks == "upper half" else range(n // 2)
    else:
        for i in blocks:
            if not 0 <= i < n:
                raise ConfigError(
                    f"layers in [lora] names block {i}, but this {type(model).__name__} has {n}: expected 0 to {n - 1}"
                )
        chosen = blocks
    inside = tuple(f"{names[i]}." for i in chosen)
    found = {site: size for site, size in sites.items() if site.startswith(inside)}
    if not found:
        raise ConfigError(
            f"layers in [lora] is {blocks!r}, and none of the layers named in targets is there: the {n} blocks of this "
            f"{type(model).__name__} have some of {', '.join(sorted({x.rpartition('.')[2] for x in sites}))}; change either"
        )
    return found


def below(model: nn.Module, sites: Iterable[str]) -> list[str]:
    """Names of the blocks before the first that holds a site: none of them ever changes, nor what goes into them.

    Empty where a site is in no block, or the blocks cannot be told.
    """
    try:
        names = find_blocks(model)
    except ModelError:
        return []
    owners = [next((i for i, name in enumerate(names) if site.startswith(f"{name}.")), -1) for site in sites]
    return names[: max(0, min(owners, default=0))]
