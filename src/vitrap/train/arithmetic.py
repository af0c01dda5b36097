"""`Arithmetic`: precision, attention kernel and compilation of a network; they decide speed and the last digits."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn

from vitrap.computing import Precision
from vitrap.contracts import Compute
from vitrap.models.classifier import Classifier
from vitrap.models.observe import eager_attention
from vitrap.train.recipe import Recipe

WIDE = 64
"""Least width of a network that a CPU computes faster in bf16 than in fp32."""


@dataclass(frozen=True)
class Arithmetic:
    """How a network computes; training, measuring and defences of a run all use the same.

    Attributes:
        precision: of the matrix products.
        attention: by torch's fused kernel, or step by step ("eager"), which on a CPU may be faster.
        compiled: whether training goes through `torch.compile`. It does only where the objective is cross-entropy
            alone, since hooks on attention break a compiled graph up; measuring never does.
    """

    precision: Precision = "fp32"
    attention: Literal["fused", "eager"] = "fused"
    compiled: bool = False

    @contextmanager
    def __call__(self, model: nn.Module, device: torch.device) -> Iterator[None]:
        """Within the block, `model` computes in this way on `device`."""
        with self.attending(model), self.autocast(device):
            yield

    def attending(self, model: nn.Module) -> AbstractContextManager[None]:
        """The attention part alone; entered once an epoch, since finding a model's attention layers takes time."""
        return eager_attention(model, self.attention == "eager")

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The precision part alone; entered once a step.

        At its end autocast drops the weights that it has cast to bf16, which change between steps. Within another
        autocast it would not drop them, and later steps would use old weights.
        """
        return torch.autocast(device.type, torch.bfloat16, self.precision == "bf16")


def uncompiled(compute: Compute, device: torch.device) -> Arithmetic:
    """The arithmetic of a suspect for a short training, which is not worth compiling."""
    if isinstance(compute, Arithmetic):
        return replace(compute, compiled=False)
    return default_arithmetic(compute.precision, device)


@lru_cache(maxsize=1)
def compiled(model: nn.Module) -> Any:
    """`model` through `torch.compile`, which compiles once for each shape of a batch; the last one is cached.

    Torch compiles the same code at most eight times, and after that silently runs it uncompiled. So what was compiled
    of other models is dropped first.
    """
    torch.compiler.reset()
    return torch.compile(model, dynamic=False)


def arithmetic_of(recipe: Recipe, model: nn.Module, device: torch.device) -> Arithmetic:
    """The arithmetic of a recipe for a network on a device; what the recipe leaves open is the default there."""
    default = default_arithmetic(recipe.precision, device, width_of(model))
    attention = default.attention if recipe.attention is None else recipe.attention
    return Arithmetic(default.precision, attention, bool(recipe.compiled))


def default_arithmetic(
    precision: Literal["auto", Precision], device: torch.device, width: int | None = None
) -> Arithmetic:
    """The default arithmetic for a precision: a fixed rule, so that machines of one kind compute alike.

    "auto" is bf16 where the device has units for it; on a CPU only for networks at least `WIDE` wide, since narrower
    ones do not gain by it. Attention is torch's fused kernel, but step by step for bf16 on a CPU, where that kernel is
    slow. Nothing is compiled. The figures behind it: `python -m benchmarks arithmetic`, docs/speed.md.

    Args:
        precision: the recipe's precision.
        device: where to compute.
        width: width of the network; None where it is not known.
    """
    gains = device.type == "cuda" or (width or 0) >= WIDE
    bf16 = precision == "bf16" or (precision == "auto" and gains and has_bf16(device))
    return Arithmetic("bf16" if bf16 else "fp32", "eager" if bf16 and device.type == "cpu" else "fused")


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bf16 in units of its own: a GPU, or a CPU's AMX or AVX-512."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = torch.cpu.get_capabilities()
    return bool(flags.get("amx_bf16") or flags.get("avx512_bf16"))


def width_of(model: nn.Module) -> int | None:
    """The number of features that the head reads, as timm's networks state it; None where a network does not."""
    width = getattr(model.body if isinstance(model, Classifier) else model, "num_features", None)
    return width if isinstance(width, int) else None
