"""One named random stream per purpose, each derived from the run's seed: adding one moves no other."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vitrap.train.loop import Streams

SURROGATE_SEED = 1000
"""The surrogate's own seed, so that no grid of seeds makes it another run's twin."""
TEST_SURROGATE_SEED = 1001
"""That of the surrogate at test time, where a spec has one."""


def stream(seed: int, purpose: str, device: str | torch.device = "cpu") -> torch.Generator:
    """The generator of one purpose."""
    number = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "big")
    return torch.Generator(device).manual_seed(number)


def training_streams(seed: int, device: torch.device) -> Streams:
    """All that is random about a training: the same for a victim and its clean twin."""
    return Streams(
        stream(seed, "order"),
        stream(seed, "augmentation", device),
        stream(seed, "projection"),
        stream(seed, "preparation"),
    )


@contextmanager
def ambient(seed: int, purpose: str, device: str | torch.device = "cpu") -> Iterator[None]:
    """Within the block, what asks torch's own random state (initial weights, dropout) gets this stream.

    Torch's state outside, on the CPU and on `device`, is as it was before.
    """
    gpus = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.set_rng_state(stream(seed, purpose).get_state())
        for gpu in gpus:
            torch.cuda.set_rng_state(stream(seed, purpose, gpu).get_state(), gpu)
        yield
