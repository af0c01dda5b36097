"""How a run reports its progress; the caller of `run` decides how to display it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Tick = Callable[[], None]
Progress = Callable[[str, int | None], AbstractContextManager[Tick]]
"""Opens the display of one step, given its name and its number of ticks (None: unknown).

The context manager yields a function, which the step calls at each tick.
"""
MEASURE = "measure"
"""The step in which the victim and its twin are measured."""
DEFEND = "defend with"
"""How the name of a step begins in which a defence is measured.

A sweep tells by these two steps whether a run was done or had its record already: see `sweeps.jobs.work`.
"""


def no_progress(name: str, ticks: int | None) -> AbstractContextManager[Tick]:
    """Displays nothing."""
    return nullcontext(lambda: None)
