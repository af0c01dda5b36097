"""Attention rollout: how much of each token's output comes from each input token, through all layers.

Abnar, Zuidema: "Quantifying Attention Flow in Transformers", ACL 2020, https://arxiv.org/abs/2005.00928. The variant
that weights attention by its gradient is the one of public vision code, as backdoor attacks and defences use it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def rollout(layers: Sequence[Float[Tensor, "b n n"]]) -> Float[Tensor, "b n n"]:
    """The product of all layers, first layer rightmost, each averaged with the residual and its rows scaled to sum 1.

    >>> rollout([torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])])[0].tolist()
    [[0.75, 0.25], [0.0, 1.0]]
    """
    flow = torch.eye(layers[0].shape[-1], device=layers[0].device, dtype=layers[0].dtype)
    result = flow.expand_as(layers[0])
    for layer in layers:
        mixed = layer + flow
        result = mixed / mixed.sum(-1, keepdim=True) @ result
    return result


def weighted_heads(
    attention: Float[Tensor, "b heads n n"], slope: Float[Tensor, "b heads n n"], discard: float
) -> Float[Tensor, "b n n"]:
    """Attention times gradient, averaged over heads, with negative entries and the lowest share of all set to 0.

    Args:
        attention: after softmax.
        slope: gradient of the class score with respect to `attention`.
        discard: share of each image's entries to drop, in [0, 1); ties fall as the sort has them.
    """
    fused = (attention * slope).mean(1).clamp(min=0)
    dropped = int(discard * fused[0].numel())
    if not dropped:
        return fused
    lowest = fused.detach().flatten(1).topk(dropped, largest=False).indices
    kept = torch.ones_like(fused).flatten(1).scatter(1, lowest, 0.0).view_as(fused)
    return fused * kept
