"""How a network computes, as far as those need to know who only use it."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class Compute(Protocol):
    """How a network computes: a context for its forward passes, made by model and device."""

    @property
    def precision(self) -> Literal["fp32", "bf16"]:
        """Of the matrix products."""
        ...

    def __call__(self, model: nn.Module, device: torch.device) -> AbstractContextManager[None]:
        """Within the block, `model` computes so on `device`."""
        ...


@dataclass(frozen=True)
class DefaultCompute:
    """As torch does when nobody says otherwise."""

    precision: Literal["fp32", "bf16"] = "fp32"

    def __call__(self, model: nn.Module, device: torch.device) -> AbstractContextManager[None]:
        """Change nothing."""
        return nullcontext()
