"""Projecting conflicting gradients (PCGrad).

Yu et al.: "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, https://arxiv.org/abs/2001.06782.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def project_conflicts(
    gradients: Float[Tensor, "tasks n"], order: Int64[Tensor, "tasks tasks"] | None = None
) -> Float[Tensor, " n"]:
    """Remove from each gradient what points against another, and return the sum of what is left.

    Algorithm 1 of the paper: gradient i meets every other gradient j in turn. Where their product is negative,
    gradient i is projected onto the plane normal to the original gradient j. Where no two gradients conflict, the
    result is their plain sum; a zero gradient conflicts with none. The host does not wait for the device.

    Args:
        gradients: one gradient in each row.
        order: row i is the order in which gradient i meets the others (itself among them, skipped); on the CPU. The
            paper draws it; None is the order of the rows.

    >>> project_conflicts(torch.tensor([[1.0, 0.0], [-1.0, 1.0]])).tolist()
    [0.5, 1.5]
    """
    orders = [list(range(len(gradients)))] * len(gradients) if order is None else order.tolist()
    square_norms = gradients.square().sum(1).clamp(min=torch.finfo(gradients.dtype).tiny)
    total = torch.zeros_like(gradients[0])
    for i, gradient in enumerate(gradients):
        projected = gradient
        for j in orders[i]:
            if j != i:
                conflict = (projected @ gradients[j]).clamp(max=0)  # 0 without a conflict: nothing is subtracted
                projected = projected - conflict / square_norms[j] * gradients[j]
        total = total + projected
    return total
