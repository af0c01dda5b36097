"""Small networks of an attack's own, whose first weights come from its random stream."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def drawn(build: Callable[[], Network], generator: torch.Generator) -> Network:
    """The network that `build` returns, on the CPU; torch's own random state stays as it was.

    Args:
        build: makes the network, whose layers draw their weights from torch's own random state.
        generator: a random stream on the CPU, from which that state is seeded.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()
