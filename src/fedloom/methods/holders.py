"""Means over those clients that hold a rank: what methods of unequal ranks share."""

from __future__ import annotations

import torch
from torch import Tensor

from fedloom.state import Group, State, without


def mean_of_holders(mean: State, before: State) -> State:
    """A weighted mean of zero-padded factors as the mean over those that hold each rank.

    Role `held` of the mean is the weight of the holders, (r,) for each site. Ranks that nobody holds stay as they are: padding
    both factors with zeros would end them for good, since each one's gradient is a product with the other.
    """

    def divided(x: Tensor, weight: Tensor, old: Tensor) -> Tensor:
        return torch.where(weight > 0, x / weight, old)

    held: Group = mean["held"]
    A = {site: divided(x, held[site][:, None], before["A"][site]) for site, x in mean["A"].items()}
    B = {site: divided(x, held[site], before["B"][site]) for site, x in mean["B"].items()}
    return without(mean, "held") | {"A": A, "B": B}
