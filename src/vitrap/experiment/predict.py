"""Classifies whole image sets, fires triggers on them, and takes times: shared by curves, measures and defences."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from vitrap.contracts import ImageSet, Trigger
from vitrap.errors import UserError
from vitrap.tensors.pixels import to_bytes
from vitrap.train.arithmetic import Arithmetic

BATCH = 256
"""Images in a batch."""
FEWEST, PIXELS = 32, 2**20
"""On a CPU, batches of large images are smaller: about so many pixels, which stay in the processor's cache, but
at least `FEWEST` images."""


def batch_of(data: ImageSet) -> int:
    """The number of images of `data` in a batch."""
    if data.device.type != "cpu":
        return BATCH
    return max(FEWEST, min(BATCH, PIXELS // data.size**2))


def no_tick() -> None:
    """Reports no progress."""


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Write the block's wall-clock time into `seconds[name]`; it waits for the GPU at the end."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - start


@torch.no_grad()
def predict(
    model: nn.Module, data: ImageSet, arithmetic: Arithmetic, tick: Callable[[], None] = no_tick
) -> Int64[Tensor, " n"]:
    """The class that `model` predicts for each image of `data`.

    Raises:
        UserError: a logit is not finite, so that there is no greatest one.
    """
    found = []
    finite = torch.ones((), dtype=torch.bool, device=data.device)
    with arithmetic(model, data.device):
        for rows in data.row_batches(batch_of(data)):
            logits = model(data.images(rows))
            finite &= logits.isfinite().all()
            found.append(logits.argmax(1))
            tick()
    if not finite:
        raise UserError("a trained network's logits are NaN or infinite; lower the lr that it was trained with")
    return torch.cat(found)


def triggered(data: ImageSet, trigger: Trigger, tick: Callable[[], None] = no_tick) -> ImageSet:
    """`data` with the trigger on every image, rounded to 8 bits; the labels stay as they are."""
    shape = (len(data), data.channels, data.size, data.size)
    stamped = torch.empty(shape, dtype=torch.uint8, device=data.device)
    for rows in data.row_batches(batch_of(data)):
        stamped[rows] = to_bytes(trigger(data.images(rows)))
        tick()
    return data.stamp(every_row(data), stamped, data.labels)


def every_row(data: ImageSet) -> Int64[Tensor, " n"]:
    """The numbers of all rows of a set."""
    return torch.arange(len(data), device=data.device)


def spread(rows: Int64[Tensor, " n"], most: int) -> Int64[Tensor, " k"]:
    """At most `most` of the rows, spread evenly over them."""
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows)), device=rows.device).long()]
