"""One named random stream per purpose, each derived from the run's seed: adding one moves no other."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vitrap.train.loop import Streams

SURROGATE_SEED = 1000
"""The surrogate's own seed, so that no grid of seeds makes it another run's twin."""


def stream(seed: int, purpose: str, device: str | torch.device = "cpu") -> torch.Generator:
    """The generator of one purpose."""
    number = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "big")
    return torch.Generator(device).manual_seed(number)


def training_streams(seed: int, device: torch.device) -> Streams:
    """Order and augmentation of a training: the same for a victim and its clean twin."""
    return Streams(stream(seed, "order"), stream(seed, "augmentation", device))


@contextmanager
def ambient(seed: int, purpose: str) -> Iterator[None]:
    """Within the block, what asks torch's own random state (initial weights, dropout) gets this stream.

    Torch's state outside is as it was before.
    """
    with torch.random.fork_rng():
        torch.set_rng_state(stream(seed, purpose).get_state())
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(stream(seed, purpose, "cuda").get_state())
        yield
