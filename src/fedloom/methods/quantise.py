"""Quantised uploads: a client sends its change in 8 or 4 bits a number, and keeps the rounding error for its next upload.

Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization", NeurIPS 2017, arXiv 1610.02132: unbiased
stochastic rounding, here to evenly spaced levels up to each tensor's largest entry (their norm is an option too).
Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML 2019, arXiv 1901.09847,
algorithm 2: Q(Delta + e) is sent, and e <- Delta + e - Q(Delta + e) is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedloom.core import Client, Each, Exchange, Round, Upload, Visit
from fedloom.flows import Over, averaged, need_fixed_sizes, need_whole, relay, relay_sends
from fedloom.spec import Leaf, Spec
from fedloom.state import State


@dataclass(frozen=True, kw_only=True)
class Quantise(Over):
    """Every tensor that is sent becomes integers and one step (role `step_...`): Delta is about step times integer.

    Delta is what is sent less what was received, where that has a tensor of the same role, site and shape. The server
    reads every upload, and no secure sum can serve it.
    """

    bits: Literal[4, 8] = 8
    """Bits a number: 127 or 7 levels on each side of zero. 4 is for large tensors and `feedback`."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """`nearest`: least error, biased; `stochastic`: up or down at random, right on average."""
    feedback: bool = True
    """Add the last rounding error to the next upload. Needs clients that train the same tensors in every round."""

    name: ClassVar[str] = "quantise"
    paper: ClassVar[str] = "Alistarh et al., QSGD, arXiv 1610.02132"
    group: ClassVar[str] = "uploads"
    adds: ClassVar[tuple[str, ...]] = ("error_", "step_")

    def __post_init__(self) -> None:
        super().__post_init__()
        need_fixed_sizes(self)

    def check(self, client: Client) -> None:
        super().check(client)
        if self.feedback:
            need_whole(self, client, ", or set feedback = false")

    async def server(self, state: State, round: Round) -> State:
        async def coded(x: Any) -> Any:
            if not isinstance(x, Exchange):
                return await x
            answer = await Each(
                send=x.send, expects=lambda client, sent: self._coded(x.expects(client, sent)), weight=x.weight
            )
            uploads = self._lifted(x, answer)
            return uploads if isinstance(x, Each) else averaged(uploads)

        return await relay(self.over.server(state, round), coded)

    def _lifted(self, x: Exchange[Any], uploads: Iterator[Upload]) -> Iterator[Upload]:
        for upload in uploads:
            received = x.send(upload.client)
            want = x.expects(upload.client, received)
            decoded = {
                role: {
                    site: _start(received, role, site, leaf.shape, leaf.dtype)
                    + self._integers(upload.state[role][site], leaf) * upload.state["step_" + role][site]
                    for site, leaf in group.items()
                }
                for role, group in want.items()
            }
            yield replace(upload, state=x.lift(upload.client, decoded))

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        errors = dict(self.mine(own))

        def coded(received: State, sent: State) -> State:
            made: State = {}
            # Sorted: what is drawn for a tensor must not depend on the order of a dictionary.
            for role, group in sorted(sent.items()):
                before, error = errors.get("error_" + role, {}), {}
                made[role], made["step_" + role] = {}, {}
                for site, x in sorted(group.items()):
                    change = x - _start(received, role, site, x.shape, x.dtype)
                    if site in before:
                        change = change + before[site]
                    integers, step = self._rounded(change, visit.rng)
                    made[role][site], made["step_" + role][site] = self._packed(integers), step
                    error[site] = change - integers * step
                if self.feedback:
                    errors["error_" + role] = error
            return made

        inner = self.over.client(received, self.inner(own), visit)
        sent, kept = await relay_sends(inner, received, coded)
        return sent, kept | errors

    # numbers as integers

    def _rounded(self, x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Whole numbers of x's type up to 2^(bits - 1) - 1 in size, and the step (1,) between them."""
        top = 2 ** (self.bits - 1) - 1
        step = x.abs().max().reshape(1) / top if x.numel() else x.new_zeros(1)
        levels = torch.where(step > 0, x / step, 0.0)
        # A number that is not finite makes the step so, and the server rejects the upload.
        chance = 0.5 if self.rounding == "nearest" else torch.rand(x.shape, generator=rng, dtype=x.dtype)
        return (levels + chance).floor().clamp(-top, top), step

    def _packed(self, integers: Tensor) -> Tensor:
        """int8 of the same shape, or uint8 (size / 2,) with two numbers in each."""
        if self.bits == 8:
            return integers.nan_to_num().to(torch.int8)
        flat = torch.nn.functional.pad(integers.nan_to_num().flatten() + 8, (0, integers.numel() % 2)).to(torch.uint8)
        return flat[0::2] | flat[1::2] << 4

    def _integers(self, packed: Tensor, leaf: Leaf) -> Tensor:
        """Inverse of `_packed`, in the leaf's type and shape."""
        if self.bits == 4:
            size = torch.Size(_sizes(leaf))
            packed = (
                torch.stack([packed & 15, packed >> 4], dim=1).flatten()[: size.numel()].reshape(size).to(torch.int8)
                - 8
            )
        return packed.to(leaf.dtype)

    def _coded(self, want: Spec) -> Spec:
        """What uploads look like."""
        made: Spec = {}
        for role, group in want.items():
            made[role] = {site: self._leaf(leaf) for site, leaf in group.items()}
            made["step_" + role] = {site: Leaf((1,), leaf.dtype) for site, leaf in group.items()}
        return made

    def _leaf(self, leaf: Leaf) -> Leaf:
        if self.bits == 8:
            return Leaf(leaf.shape, torch.int8)
        return Leaf(((torch.Size(_sizes(leaf)).numel() + 1) // 2,), torch.uint8)


def _sizes(leaf: Leaf) -> list[int]:
    return [size for size in leaf.shape if isinstance(size, int)]


def _start(received: State, role: str, site: str, shape: tuple[object, ...], dtype: torch.dtype) -> Tensor:
    """What was received under that name, or zero if it has another shape or was not sent."""
    x = received.get(role, {}).get(site)
    return x if x is not None and tuple(x.shape) == tuple(shape) and x.dtype == dtype else torch.zeros((), dtype=dtype)
