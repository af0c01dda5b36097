"""Gathering the pixels of the batches to come while the model learns from this one, for sets mapped from a file."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from jaxtyping import Int64
from torch import Tensor

from vitrap.images import Gathered, ImageSet

AHEAD = 2
"""Batches gathered before they are asked for."""

Rows = Int64[Tensor, " _"]


@contextmanager
def prefetched(data: ImageSet, order: Sequence[Rows]) -> Iterator[Iterable[tuple[Rows, Gathered]]]:
    """The batches of `order`, each with its pixels; from memory they are gathered when they are asked for.

    From a file, one thread gathers, by itself, what comes next. An error of its own is raised where its batch is asked
    for, and at the end of the block it is gone, however the block ends.

    Args:
        data: the set.
        order: row numbers, batch by batch, on the CPU.
    """
    if data.place is None:
        yield ((rows, data.gather(rows)) for rows in order)
        return
    with ThreadPoolExecutor(1, "gather") as thread:
        yield _gathered(data, order, thread)


def _gathered(data: ImageSet, order: Sequence[Rows], thread: ThreadPoolExecutor) -> Iterator[tuple[Rows, Gathered]]:
    coming: deque[tuple[Rows, Future[Gathered]]] = deque()
    for rows in order:
        coming.append((rows, thread.submit(data.gather, rows)))
        if len(coming) > AHEAD:
            first, pixels = coming.popleft()
            yield first, pixels.result()
    for rest, pixels in coming:
        yield rest, pixels.result()
