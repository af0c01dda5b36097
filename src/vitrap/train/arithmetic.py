"""Arithmetic: how a network's matrix products are computed. It decides how fast a run is, and its last digits."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn

from vitrap.contracts import Compute
from vitrap.models.classifier import Classifier
from vitrap.models.observe import eager_attention
from vitrap.train.recipe import Recipe

WIDE = 64
"""Least width of a network that a CPU computes faster in bf16 than in fp32."""


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


def arithmetic_of(recipe: Recipe, model: nn.Module, device: torch.device) -> Arithmetic:
    """How a recipe has a network computed on a device: what it says, and for the rest what is usual there."""
    way = usual(recipe.precision, device, width_of(model))
    attention = way.attention if recipe.attention is None else recipe.attention
    return Arithmetic(way.precision, attention, bool(recipe.compiled))


def usual(precision: Literal["auto", "fp32", "bf16"], device: torch.device, width: int | None = None) -> Arithmetic:
    """What a precision stands for: a written rule, so that machines of one kind compute alike.

    "auto" is bf16 where the device has units for it; on a CPU only for networks at least `WIDE` wide, since narrower
    ones do not gain by it. Attention is torch's fused kernel, but step by step for bf16 on a CPU, where that kernel is
    slow. Nothing is compiled. The figures behind it: `python -m benchmarks arithmetic`, docs/speed.md.

    Args:
        precision: of a recipe.
        device: where.
        width: of the network; None where that is not known.
    """
    gains = device.type == "cuda" or (width or 0) >= WIDE
    bf16 = precision == "bf16" or (precision == "auto" and gains and has_bf16(device))
    return Arithmetic("bf16" if bf16 else "fp32", "eager" if bf16 and device.type == "cpu" else "fused")


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bf16 in units of its own: a GPU, or a CPU's AMX or AVX-512."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 does not say
    return bool(flags.get("amx_bf16") or flags.get("avx512_bf16"))


def width_of(model: nn.Module) -> int | None:
    """How many features the last layer reads; None of a network that does not say."""
    width = getattr(model.body if isinstance(model, Classifier) else model, "num_features", None)
    return width if isinstance(width, int) else None
