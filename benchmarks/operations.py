"""Counting: the multiplications and additions of a training step, the rate of a device at them, and waiting.

A step's operations are the model's own: matrix products and convolutions of one forward and one backward pass with
attention written out, so that what a fused kernel computes twice counts once. They are counted by torch on the `meta`
device, where nothing is computed.
"""

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.compare import repeat, seconds
from vitrap.experiment.plan import Network
from vitrap.models.classifier import Architecture
from vitrap.models.observe import eager_attention

LEAST = 0.05
"""Seconds that a turn of matrix products lasts at least."""
WAITING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "unique_dim", "_unique2", "masked_select")
"""Operations whose result, or its size, the host must wait for where the tensors are on a GPU."""


def training_operations(architecture: Architecture) -> float:
    """Floating-point operations of one image in a training step."""
    images = torch.zeros(1, 3, architecture.size, architecture.size, device="meta")
    return counted(Network(architecture).build(0).to("meta").train(), images, fused=False)


def counted(model: nn.Module, images: torch.Tensor, *, fused: bool) -> float:
    """Floating-point operations of a forward and a backward pass, as torch counts them.

    Where attention is `fused`, its backward pass counts the scores that the kernel computes again.
    """
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    with eager_attention(model, not fused), FlopCounterMode(display=False) as counter:
        functional.cross_entropy(model(images), labels).backward()
    return float(counter.get_total_flops())


def matrix_rate(device: str, sizes: Sequence[int], turns: int = 5) -> dict[int, tuple[float, ...]]:
    """Floating-point operations a second of a bf16 product of square random matrices: of each size, in each turn."""
    found = {}
    for size in sizes:
        left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(left)

        def product(left: torch.Tensor = left, right: torch.Tensor = right, out: torch.Tensor = out) -> None:
            torch.mm(left, right, out=out)

        seconds(product, device)
        calls = 1 + int(LEAST / min(seconds(product, device) for _ in range(2)))
        took = [seconds(lambda: repeat(product, calls), device) / calls for _ in range(turns)]  # noqa: B023 - called at once
        found[size] = tuple(2 * size**3 / each for each in took)
    return found


def best_rate(found: dict[int, tuple[float, ...]]) -> tuple[int, float]:
    """The size with the highest median rate, and that rate."""
    return max(((size, median(rates)) for size, rates in found.items()), key=lambda pair: pair[1])


class Waits(TorchDispatchMode):
    """Within the block, `seen` lists what would make the host wait for a GPU, were every tensor but `known` there.

    Attributes:
        seen: names of such operations, in order.
        known: kinds of numbers that the loop keeps on the CPU by design: which images are poisoned.
    """

    def __init__(self, known: Sequence[torch.dtype] = (torch.bool,)) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.known = known

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and note it where it waits."""
        name = func.overloadpacket.__name__
        if name in WAITING and not (name == "nonzero" and args[0].dtype in self.known):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))
