"""Reads the pixels of the next batches in a thread while the model trains, for data sets mapped from a file."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from jaxtyping import Int64
from torch import Tensor

from vitrap.images import Gathered, ImageSet

AHEAD = 2
"""Number of batches that are gathered in advance."""

Rows = Int64[Tensor, " _"]


@contextmanager
def prefetched(data: ImageSet, order: Sequence[Rows]) -> Iterator[Iterable[tuple[Rows, Gathered]]]:
    """Iterate over the batches of `order`, each as its row numbers and pixels.

    Pixels in memory are gathered when a batch is requested. Those of a mapped set are gathered in advance by a thread,
    which ends with the block; an error in it is raised when its batch is requested.

    Args:
        data: the set.
        order: row numbers of each batch, on the CPU.
    """
    if data.pixel_row is None:
        yield ((rows, data.gather(rows)) for rows in order)
        return
    with ThreadPoolExecutor(1, "gather") as thread:
        yield _gathered(data, order, thread)


def _gathered(data: ImageSet, order: Sequence[Rows], thread: ThreadPoolExecutor) -> Iterator[tuple[Rows, Gathered]]:
    """The batches of `order`, with at most `AHEAD` gathered in advance."""
    coming: deque[tuple[Rows, Future[Gathered]]] = deque()
    for rows in order:
        coming.append((rows, thread.submit(data.gather, rows)))
        if len(coming) > AHEAD:
            first, pixels = coming.popleft()
            yield first, pixels.result()
    for rest, pixels in coming:
        yield rest, pixels.result()
