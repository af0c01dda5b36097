"""Projecting conflicting gradients (PCGrad).

Yu et al.: "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, https://arxiv.org/abs/2001.06782.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def project_conflicts(
    gradients: Float[Tensor, "tasks n"], order: Int64[Tensor, "tasks tasks"] | None = None
) -> Float[Tensor, " n"]:
    """The sum of all gradients after each has lost what points against another.

    Algorithm 1 of the paper: gradient i is projected, in turn for every j, onto the plane normal to the original
    gradient j wherever its product with that is negative. Where no two conflict, this is their plain sum. A gradient
    that is zero conflicts with none. The host does not wait for the device.

    Args:
        gradients: one a row.
        order: row i says in which order gradient i meets the others (itself among them, passed over); on the CPU.
            None for their own order; the paper draws it.

    >>> project_conflicts(torch.tensor([[1.0, 0.0], [-1.0, 1.0]])).tolist()
    [0.5, 1.5]
    """
    turns = order.tolist() if order is not None else [list(range(len(gradients)))] * len(gradients)
    lengths = gradients.square().sum(1).clamp(min=torch.finfo(gradients.dtype).tiny)
    total = torch.zeros_like(gradients[0])
    for i, gradient in enumerate(gradients):
        projected = gradient
        for j in turns[i]:
            if j != i:
                against = (projected @ gradients[j]).clamp(max=0)
                projected = projected - against / lengths[j] * gradients[j]
        total = total + projected
    return total
