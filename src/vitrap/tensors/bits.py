"""How far apart two sets of weights are as they are stored: how many numbers differ, and how many bits."""

from collections.abc import Mapping

import torch
from jaxtyping import Float32, Int32
from torch import Tensor


def bits_apart(one: Float32[Tensor, "*n"], other: Float32[Tensor, "*n"]) -> Int32[Tensor, "*n"]:
    """How many of the 32 bits of each number differ from those of the other.

    >>> bits_apart(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, -0.0])).tolist()
    [0, 8, 1]
    """
    differ = one.view(torch.int32) ^ other.view(torch.int32)
    apart = torch.zeros_like(differ)
    for place in range(32):
        apart += (differ >> place) & 1
    return apart


def count_changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, int]:
    """For a record: how many fp32 weights there are, how many differ, and in how many bits.

    Args:
        before: weights by name, as in `state_dict()`.
        after: the same weights, some of them changed.
    """
    pairs = [(weight, after[name]) for name, weight in before.items() if weight.dtype == torch.float32]
    apart = [bits_apart(one, other) for one, other in pairs]
    return {
        "weights": sum(bits.numel() for bits in apart),
        "changed weights": sum(int(bits.count_nonzero()) for bits in apart),
        "changed bits": sum(int(bits.sum()) for bits in apart),
    }
