"""Arithmetic: how a network's matrix products are computed. It decides how fast a run is, and its last digits."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn

from vitrap.contracts import Compute
from vitrap.models.observe import eager_attention


@dataclass(frozen=True)
class Arithmetic:
    """One way to compute: in training, measuring and defences of a run alike.

    Attributes:
        precision: of the matrix products.
        attention: by torch's fused kernel, or step by step ("eager"), which on a CPU may be faster.
        compiled: whether training goes through `torch.compile`; only where the objective is cross-entropy alone, since
            looking at attention breaks a compiled graph up. Measuring never does.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    attention: Literal["fused", "eager"] = "fused"
    compiled: bool = False

    @contextmanager
    def __call__(self, model: nn.Module, device: torch.device) -> Iterator[None]:
        """Within the block, `model` computes so on `device`."""
        with self.attending(model), self.autocast(device):
            yield

    def attending(self, model: nn.Module) -> AbstractContextManager[None]:
        """Its half for a whole epoch: to look for a model's attention in every step would take as long as a layer."""
        return eager_attention(model, self.attention == "eager")

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Its half for one step: what it has cast to bf16 is forgotten at the end, since weights change between steps.

        Within another autocast it would be remembered until that one ends.
        """
        return torch.autocast(device.type, torch.bfloat16, self.precision == "bf16")


def uncompiled(compute: Compute, device: torch.device) -> Arithmetic:
    """The arithmetic of a training that is to compute as a suspect does, and is too short to be compiled."""
    if isinstance(compute, Arithmetic):
        return replace(compute, compiled=False)
    return usual(compute.precision, device)


@lru_cache(maxsize=1)
def compiled(model: nn.Module) -> Any:
    """`model` through `torch.compile`, once for each shape of a batch; asked for again, the same.

    Torch compiles a line of code eight times and then no more, without an error: what was compiled of other models is
    forgotten here.
    """
    torch.compiler.reset()
    return torch.compile(model, dynamic=False)


def usual(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> Arithmetic:
    """What a precision stands for where nothing was measured.

    "auto" is bf16 on a GPU and fp32 elsewhere. Fused attention, but on a CPU in bf16, where torch's kernel is slow:
    `python -m benchmarks arithmetic`.
    """
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return Arithmetic("bf16" if bf16 else "fp32", "eager" if bf16 and device.type == "cpu" else "fused")
