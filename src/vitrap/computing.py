"""How a network computes, for code that runs networks but does not choose how; `train.arithmetic` does."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import nn

Precision = Literal["fp32", "bf16"]
"""Precision of a network's matrix products."""


@runtime_checkable
class Compute(Protocol):
    """How a network computes: a context manager around its forward passes."""

    @property
    def precision(self) -> Precision:
        """Precision of the matrix products."""
        ...

    def __call__(self, model: nn.Module, device: torch.device) -> AbstractContextManager[None]:
        """Within the block, `model` computes in this way on `device`."""
        ...


@dataclass(frozen=True)
class DefaultCompute:
    """Leaves all to torch's defaults."""

    precision: Precision = "fp32"

    def __call__(self, model: nn.Module, device: torch.device) -> AbstractContextManager[None]:
        """Change nothing."""
        return nullcontext()
