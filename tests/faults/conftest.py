"""Counts what was tried and what was answered wrongly; `VITRAP_FAULTS=all` (`make faults`) tries all, else a sample."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest

ALL = os.environ.get("VITRAP_FAULTS") == "all"
Tally = Callable[[str, int, int], None]
T = TypeVar("T")


def sample(things: Sequence[T], n: int, turn: int = 0) -> Sequence[T]:
    """All of them or else `n`, evenly spread; each `turn` takes others."""
    if ALL or n >= len(things):
        return things
    shift = (0.5 + turn * 0.618) % 1
    return [things[int((i + shift) * len(things) / n)] for i in range(n)]


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Note how many faults of a kind a test tried, and how many were answered wrongly."""

    def note(kind: str, tried: int, wrong: int) -> None:
        request.node.user_properties.append(("faults", (kind, tried, wrong)))

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tried: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                for name, found in report.user_properties:
                    if name == "faults":
                        kind, n, bad = found
                        tried[kind] += n
                        wrong[kind] += bad
    for kind, n in tried.items():
        terminalreporter.write_line(f"{kind}: {n} tried, {wrong[kind]} answered wrongly")
