"""Rates with their 95 % intervals, and the mean and median of a sample."""

from math import sqrt

from jaxtyping import Bool, Float
from torch import Tensor

from vitrap.metrics.values import Centre, Rate

Z95 = 1.959963984540054
"""The 97.5 % point of the normal distribution."""


def wilson(hits: int, n: int) -> Rate:
    """The rate `hits` / `n` with its 95 % score interval (Wilson 1927, without continuity correction).

    >>> wilson(0, 10).high.__round__(4), wilson(10, 10).value
    (0.2775, 1.0)
    """
    if n == 0:
        return Rate(0.0, 0.0, 1.0, 0)
    share = hits / n
    square = Z95**2
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = Z95 / (1 + square / n) * sqrt(share * (1 - share) / n + square / (4 * n * n))
    # At 0 and n hits an end is 0 or 1 exactly, which rounding would miss.
    low = 0.0 if hits == 0 else middle - half
    high = 1.0 if hits == n else middle + half
    return Rate(share, low, high, n)


def rate(hit: Bool[Tensor, " n"]) -> Rate:
    """The share of true entries, with its interval."""
    return wilson(int(hit.sum()), hit.numel())


def centre(values: Float[Tensor, " n"]) -> Centre:
    """Mean and median (the lower of the two middle values) of a sample of at least one."""
    return Centre(values.mean().item(), values.median().item())
