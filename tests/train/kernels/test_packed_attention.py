"""The written-out attention is softmax attention, and its backward pass the gradient, in every dtype."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention

from fedloom.train.kernels.packed_attention import plain
from fedloom.train.kernels.scored_attention import scored

HEADS, L, D = 3, 7, 4


def inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2 * HEADS * L, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for _ in range(3)
    ]


def masks() -> dict[str, Tensor]:
    """As a packing makes them: the second row has two tokens of padding, or each token sees none after it."""
    padding = torch.zeros(2, 1, L, dtype=torch.float64)
    padding[1, 0, -2:] = -torch.inf
    causal = torch.full((L, L), -torch.inf, dtype=torch.float64).triu(1)
    return {"padding": padding.repeat_interleave(HEADS, 0), "causal": causal}


@pytest.mark.parametrize("case", masks())
def test_it_is_softmax_attention_with_its_gradient(case: str) -> None:
    mask, scale = masks()[case], 0.3

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made: Tensor = plain(torch.stack((q, k, v)), mask, scale)
        return made

    q, k, v = inputs(torch.float64)
    assert torch.autograd.gradcheck(attention, (q, k, v))
    wanted = F.scaled_dot_product_attention(*(x.view(-1, L, D) for x in (q, k, v)), attn_mask=mask, scale=scale)
    torch.testing.assert_close(attention(q, k, v).view(-1, L, D), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", masks())
def test_the_mask_says_in_what_dtype_it_computes(case: str) -> None:
    mask = masks()[case]
    low = inputs(torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in low]
    g = torch.randn(low[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = plain(torch.stack(exact), mask, 0.3)
    wanted = [wanted, *torch.autograd.grad(wanted, exact, g.double())]
    for dtype, error in ((torch.float32, 2.0**-8), (torch.bfloat16, 2.0**-6)):
        made = plain(torch.stack(low), mask.to(dtype), 0.3)
        made = [made, *torch.autograd.grad(made, low, g)]
        for x, y in zip(made, wanted, strict=True):
            assert x.dtype == torch.bfloat16
            assert (x - y).abs().max() <= error * y.abs().max()


@pytest.mark.parametrize("which", ["capped", "with a sink", "both"])
def test_changed_scores_are_those_of_their_models(which: str) -> None:
    """With a cap that is felt, and gradients, in float64."""
    given = [x.detach().view(2, HEADS, L, D).requires_grad_() for x in inputs(torch.float64)]
    mask, sinks = masks()["causal"], torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    cap, sink = (1.5 if which != "with a sink" else None), (sinks if which != "capped" else None)
    module: Any = SimpleNamespace(num_key_value_groups=1, sinks=sinks, training=False)
    ours = scored(*given, mask, 0.7, cap, sink)
    if which == "capped":
        theirs = gemma2_attention(module, *given, mask, scaling=0.7, softcap=cap)[0]
    elif which == "with a sink":
        theirs = gpt_oss_attention(module, *given, mask, scaling=0.7)[0]
    else:  # no model has both: a sink is a token whose score is its own, and whose value is nothing
        q, k, v = given
        scores = (1.5 * (0.7 * q @ k.transpose(2, 3) / 1.5).tanh() + mask).exp()
        theirs = ((scores / (scores.sum(-1, keepdim=True) + sinks.view(1, -1, 1, 1).exp())) @ v).transpose(1, 2)
    theirs = theirs.transpose(1, 2)
    tolerance = 1e-6 if which == "capped" else 1e-12  # Gemma's is a softmax in float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for one, two in zip(torch.autograd.grad(ours, given, g), torch.autograd.grad(theirs, given, g), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=10 * tolerance)
