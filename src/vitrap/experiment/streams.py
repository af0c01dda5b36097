"""The random streams of a run: one for each purpose, each derived from the run's seed and the purpose's name.

So what is drawn for one purpose never changes what is drawn for another.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vitrap.train.loop import Streams

SURROGATE_SEED = 1000
"""The seed of every surrogate; it is far from the seeds of runs, so that no surrogate is another run's twin."""
TEST_SURROGATE_SEED = 1001
"""The seed of the surrogate at test time, where a spec has one."""


def stream(seed: int, purpose: str, device: str | torch.device = "cpu") -> torch.Generator:
    """The generator of one purpose."""
    number = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "big")
    return torch.Generator(device).manual_seed(number)


def training_streams(seed: int, device: torch.device) -> Streams:
    """The random streams of a training, which are the same for a victim and its clean twin."""
    return Streams(
        stream(seed, "order"),
        stream(seed, "augmentation", device),
        stream(seed, "projection"),
        stream(seed, "preparation"),
    )


@contextmanager
def ambient(seed: int, purpose: str, device: str | torch.device = "cpu") -> Iterator[None]:
    """Within the block, torch's own random state, from which initial weights and dropout are drawn, is this stream.

    After the block, torch's state on the CPU and on `device` is as it was before.
    """
    gpus = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.set_rng_state(stream(seed, purpose).get_state())
        for gpu in gpus:
            torch.cuda.set_rng_state(stream(seed, purpose, gpu).get_state(), gpu)
        yield
