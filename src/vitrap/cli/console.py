"""What commands print: results on stdout, progress bars and messages on stderr.

All of it goes through `out` and `err`, which let no text from a file steer the terminal.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
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
from rich.segment import Segment

from vitrap.errors import UserError
from vitrap.printable import printable


class PrintableConsole(Console):
    """A console that prints text as text: what would steer the terminal is written as its code."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Turn into segments whatever is printed, also by progress bars; segments of `control` are rich's own."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


out = PrintableConsole(emoji=False, highlight=False)
err = PrintableConsole(stderr=True, emoji=False, highlight=False)
PATIENCE = 1.0
"""Seconds before bars appear, so that a quick error is the only line."""
KEY = re.compile(r"[^=/\\]*=")
"""The beginning of an override, `key=value`."""
EVERY = 30.0
"""Seconds between two lines of progress where stderr is no terminal and bars cannot be drawn."""


def say(text: str, where: Console = out) -> None:
    """Print text as it is: brackets in it, of a file's name say, are no markup, and its lines are not wrapped."""
    where.print(text, markup=False, soft_wrap=True)


def complain(text: str) -> None:
    """Print a message on stderr, as one line."""
    say(f"vitrap: {' '.join(text.split())}", err)


class ProgressBars:
    """Progress bars on stderr, one for each step; the bar of a step of unknown length has a spinner.

    Where stderr is no terminal but a log, say, a line of text for each step is printed every half minute.
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
        self._start_later = Timer(PATIENCE, self.progress.start)
        self._ended = Event()

    def __enter__(self) -> "ProgressBars":
        if not err.is_terminal:
            Thread(target=self._print_lines, daemon=True).start()
        return self

    def _print_lines(self) -> None:
        """Print a line for each unfinished step now and then, until the bars are closed."""
        while not self._ended.wait(EVERY):
            for task in self.progress.tasks:
                if not task.finished:
                    done = f"{task.completed:g} of {task.total:g}, " if task.total else ""
                    ahead = f", about {task.time_remaining:.0f} s to go" if task.time_remaining else ""
                    line = f"{task.description.strip()}: {done}{task.elapsed or 0:.0f} s so far{ahead}"
                    err.print(line, soft_wrap=True)  # a description is markup, as in the bars

    def __exit__(self, kind: object, *exception: object) -> None:
        self._ended.set()
        self._start_later.cancel()
        if self._start_later.is_alive():
            self._start_later.join()
        live = self.progress.live
        if isinstance(kind, type) and issubclass(kind, UserError | OSError):
            live.transient = True  # the bars vanish, and the error is the only line that stays
            live.stop()
        elif live.is_started:
            self.progress.stop()
        if kind is KeyboardInterrupt:
            complain("interrupted; the next call goes on from finished stages and kept states")
            raise typer.Exit(130) from None

    @contextmanager
    def step(self, name: str, total: int | None) -> Iterator[Callable[[], None]]:
        """Show one step; yields a function to call at each tick. This is a `Progress`."""
        task = self._add(name, total)
        yield lambda: self.progress.advance(task)
        self.progress.update(task, total=total or 1, completed=total or 1)

    def fraction(self, name: str) -> Callable[[int, int], None]:
        """Show one step; returns a function to call with what is done and the total."""
        bar: list[TaskID] = []

        def show(done: int, whole: int) -> None:
            if not bar:
                bar.append(self._add(name, None))
            self.progress.update(bar[0], completed=done, total=whole)

        return show

    def _add(self, name: str, total: int | None) -> TaskID:
        """Add a bar. The first one starts the display, after `PATIENCE` seconds."""
        if not self.progress.tasks:
            self._start_later.start()
        return self.progress.add_task(name, total=total)


def tell_skipped(lines: Sequence[str]) -> None:
    """Print a line for each record that could not be read, and how many they are."""
    for line in [*lines, *([f"{len(lines)} skipped"] if lines else [])]:
        complain(line)


def split(words: list[str]) -> tuple[Path | None, list[str]]:
    """Split a command's words into the spec's path, if the first word is one, and the overrides.

    A word with a `=` is a path if there is such a file, or if what stands before the `=` can be no key.
    """
    if words and (os.path.exists(words[0]) or not KEY.match(words[0])):
        return Path(words[0]), words[1:]
    return None, words


def print_json(content: Any) -> None:
    """Print a record, or a part of it, as JSON on stdout."""
    sys.stdout.write(json.dumps(content, indent=1) + "\n")
