"""How a run says what it is at; whoever calls decides how to show it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Tick = Callable[[], None]
Steps = Callable[[str, int | None], AbstractContextManager[Tick]]
"""Shows that a step with a name and so many ticks (None: unknown) is under way; yields what to call each tick."""


def silent(name: str, ticks: int | None) -> AbstractContextManager[Tick]:
    """Steps that nobody sees."""
    return nullcontext(lambda: None)
