"""Attention rollout: how much of each output token comes from each input token, through all layers.

Abnar, Zuidema: "Quantifying Attention Flow in Transformers", ACL 2020, https://arxiv.org/abs/2005.00928. The variant
that weights attention by its gradient is that of public vision code, which backdoor attacks and defences use.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def rollout(layers: Sequence[Float[Tensor, "b n n"]]) -> Float[Tensor, "b n n"]:
    """Average each layer with the residual connection, scale its rows to sum 1, and multiply all layers.

    The first layer is the rightmost factor.

    >>> rollout([torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])])[0].tolist()
    [[0.75, 0.25], [0.0, 1.0]]
    """
    residual = torch.eye(layers[0].shape[-1], device=layers[0].device, dtype=layers[0].dtype)
    result = residual.expand_as(layers[0])
    for layer in layers:
        mixed = layer + residual
        result = mixed / mixed.sum(-1, keepdim=True) @ result
    return result


def weighted_heads(
    attention: Float[Tensor, "b heads n n"], gradient: Float[Tensor, "b heads n n"], discard: float
) -> Float[Tensor, "b n n"]:
    """Attention times its gradient, averaged over heads; negative entries and the lowest ones are set to 0.

    Args:
        attention: after softmax.
        gradient: gradient of the class score with respect to `attention`.
        discard: share of each image's entries to set to 0, in [0, 1); which of equal entries is left to the sort.
    """
    fused = (attention * gradient).mean(1).clamp(min=0)
    dropped = int(discard * fused[0].numel())
    if not dropped:
        return fused
    lowest = fused.detach().flatten(1).topk(dropped, largest=False).indices
    kept = torch.ones_like(fused).flatten(1).scatter(1, lowest, 0.0).view_as(fused)
    return fused * kept
