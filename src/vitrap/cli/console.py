"""How the command speaks: results on stdout, progress and messages on stderr."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vitrap.errors import UserError

out = Console()
err = Console(stderr=True)
PATIENCE = 1.0
"""Seconds without bars."""
EVERY = 30.0
"""Seconds from one line to the next where there is no terminal to draw bars in."""


class Bars:
    """Progress bars on stderr, one a step; a step of unknown length shows that it lives.

    Off a terminal, in a log, say, each step under way is told in a line of plain text every half minute.
    """

    def __init__(self) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=err,
        )
        self._begin = Timer(PATIENCE, self.progress.start)
        self._over = Event()

    def __enter__(self) -> "Bars":
        if not err.is_terminal:
            Thread(target=self._tell, daemon=True).start()
        return self

    def _tell(self) -> None:
        """Say how far each unfinished step is, until the bars are over."""
        while not self._over.wait(EVERY):
            for task in self.progress.tasks:
                if not task.finished:
                    done = f"{task.completed:g} of {task.total:g}, " if task.total else ""
                    ahead = f", about {task.time_remaining:.0f} s to go" if task.time_remaining else ""
                    line = f"{task.description.strip()}: {done}{task.elapsed or 0:.0f} s so far{ahead}"
                    err.print(line, highlight=False, soft_wrap=True)

    def __exit__(self, kind: object, *exception: object) -> None:
        self._over.set()
        self._begin.cancel()
        if self._begin.is_alive():
            self._begin.join()
        live = self.progress.live
        if isinstance(kind, type) and issubclass(kind, UserError):
            live.transient = True  # a refusal is the only line that stays
            live.stop()
        elif live.is_started:
            self.progress.stop()
        if kind is KeyboardInterrupt:
            err.print("vitrap: interrupted; the next call goes on from finished stages and kept states", soft_wrap=True)
            raise typer.Exit(130) from None

    @contextmanager
    def step(self, name: str, total: int | None) -> Iterator[Callable[[], None]]:
        """Show one step; yields what to call each tick."""
        task = self._add(name, total)
        yield lambda: self.progress.advance(task)
        self.progress.update(task, total=total or 1, completed=total or 1)

    def fraction(self, name: str) -> Callable[[int, int], None]:
        """Show one step by what is done of what is to do."""
        bar: list[TaskID] = []

        def show(done: int, whole: int) -> None:
            if not bar:
                bar.append(self._add(name, None))
            self.progress.update(bar[0], completed=done, total=whole)

        return show

    def _add(self, name: str, total: int | None) -> TaskID:
        """A bar; the first one starts the display, a little later, so that a quick refusal is the only line."""
        if not self.progress.tasks:
            self._begin.start()
        return self.progress.add_task(name, total=total)


def tell_skipped(lines: Sequence[str]) -> None:
    """Name each record that was passed over, and say how many they are."""
    for line in [*lines, *([f"{len(lines)} skipped"] if lines else [])]:
        err.print(f"vitrap: {' '.join(line.split())}", highlight=False, markup=False, soft_wrap=True)


def split(words: list[str]) -> tuple[Path | None, list[str]]:
    """A spec's path, if the first word is no override, and the overrides."""
    if words and "=" not in words[0]:
        return Path(words[0]), words[1:]
    return None, words


def print_json(content: Any) -> None:
    """A record, or a part of it, alone on stdout."""
    sys.stdout.write(json.dumps(content, indent=1) + "\n")
