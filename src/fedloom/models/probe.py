"""Which layers of an architecture can carry adapters, where no record says so: asked of the model itself, by forward passes.

An adapter adds to what a layer returns, each client's own to its own rows. That needs a layer that the model calls (mamba's
`dt_proj` has its weight read instead), that returns one tensor (a router returns choices as well), and whose input keeps rows
apart and in order (experts get tokens as they are routed, XLNet puts time first).

Clients must train one at a time where a layer also reads what all rows share, as positions in DeBERTa-v3, and where padding
changes what a row's tokens become, as in FNet: the rows of one client would be padded to those of another.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedloom.errors import ModelError
from fedloom.models.quantised import is_coded

_ROWS, _TOKENS = 3, 5


@dataclass(frozen=True)
class Probed:
    """What was found of some layers."""

    obstacles: dict[str, str]
    """Site -> why it can carry no adapter, as "the layer ..."; those that can are left out."""
    alone: bool
    """Whether clients must train one at a time."""


def probe(model: nn.Module, sites: Iterable[str]) -> Probed:
    """Ask a model of transformers, which is left as it was. Raises ModelError if it cannot compute from `input_ids`."""
    sites = list(sites)
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 2))
    ids = torch.randint(0, vocabulary, (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[-1] = (other[-1] + 1) % vocabulary
    one, two = (_inputs(model, sites, x) for x in (ids, other))
    obstacles: dict[str, str] = {}
    alone = False
    for site in sites:
        if not one[site] or not two[site]:
            obstacles[site] = "is not called in a forward pass over text"
        for x, y in zip(one[site], two[site], strict=False):
            if x is None or y is None:
                obstacles[site] = "returns more than a product"
            elif x.shape[0] == 1 and x.ndim > 2 and torch.equal(x, y):
                alone = True
            elif not _rows_apart(x, y):
                obstacles[site] = "does not get the rows of a batch one after the other"
    padded = _inputs(model, sites, ids, padding=_TOKENS)
    alone = alone or any(not _unchanged(one[site], padded[site]) for site in sites if site not in obstacles)
    return Probed(obstacles, alone)


def without_gradient(model: nn.Module) -> str | None:
    """The name of a linear layer in another library's codes through which no gradient goes; one of a kind is tried."""
    kinds = set()
    for name, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        kind = type(layer), type(getattr(weight, "data", None))
        if not isinstance(layer, nn.Linear) or not isinstance(weight, Tensor) or not is_coded(weight) or kind in kinds:
            continue
        kinds.add(kind)
        with torch.enable_grad():
            x = torch.ones(1, 2, layer.in_features, dtype=weight.dtype, device=weight.device)
            y: Tensor = layer(x.requires_grad_())
        if not y.requires_grad:
            return str(name)
    return None


def _unchanged(calls: list[Tensor | None], padded: list[Tensor | None]) -> bool:
    """Whether a layer's inputs are the same for the tokens of a row when padding follows them."""
    for x, y in zip(calls, padded, strict=True):
        if x is None or y is None or x.shape[0] % _ROWS:
            continue
        x, y = (z.reshape(_ROWS, -1, z.shape[-1]).float() for z in (x, y))
        n = min(x.shape[1], y.shape[1], _TOKENS)
        if not torch.allclose(x[:, :n], y[:, :n], rtol=1e-2, atol=1e-2 * float(x.abs().max())):
            return False
    return True


def _rows_apart(x: Tensor, y: Tensor) -> bool:
    """Whether the inputs, of batches that differ in the last row alone, do so too."""
    if x.shape != y.shape or x.shape[0] % _ROWS:
        return False
    x, y = (z.reshape(_ROWS, -1, z.shape[-1]).float() for z in (x, y))
    same = torch.allclose(x[:-1], y[:-1], rtol=1e-2, atol=1e-2 * float(x.abs().max()))
    return same and not torch.equal(x[-1], y[-1])


def _fails(model: nn.Module, error: Exception) -> str:
    """That the model cannot read text, and what may be done."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    said = " ".join(str(error).split())[:200] or type(error).__name__
    instead = "choose another model" if dtype == "float32" else 'set model.dtype = "float32", or choose another model'
    return f"{type(model).__name__} fails on a batch of short rows in {dtype}: {said}; {instead}"


def _inputs(model: nn.Module, sites: Iterable[str], ids: Tensor, padding: int = 0) -> dict[str, list[Tensor | None]]:
    """Site -> the input of each of its calls; None for a call that returned something else than a tensor."""
    calls: dict[str, list[Tensor | None]] = {site: [] for site in sites}

    def note(site: str, layer: nn.Module, inputs: tuple[Tensor, ...], y: object) -> None:
        calls[site].append(inputs[0].detach() if isinstance(y, Tensor) and inputs else None)

    handles = [model.get_submodule(site).register_forward_hook(partial(note, site)) for site in calls]
    device = next(model.parameters()).device
    mask = functional.pad(torch.ones_like(ids), (0, padding))
    arguments: dict[str, object] = {
        "input_ids": functional.pad(ids, (0, padding), value=1).to(device),
        "attention_mask": mask.to(device),
    }
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    try:
        with torch.no_grad():
            model(**arguments)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        raise ModelError(_fails(model, error)) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls
