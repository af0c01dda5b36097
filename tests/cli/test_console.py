"""Whatever way text takes to the terminal, it does not steer it."""

import io
from collections.abc import Callable

import pytest
from rich.markup import escape
from rich.progress import Progress, TextColumn
from rich.table import Table

from vitrap.cli.console import PrintableConsole

HOSTILE = "\x1b[2Jred\x9b31m \u202egnp \udcff :cat: [bold]b[/]"


def in_a_table(console: PrintableConsole) -> None:
    table = Table("a")
    table.add_row(escape(HOSTILE))
    console.print(table)


def in_a_bar(console: PrintableConsole) -> None:
    with Progress(TextColumn("{task.description}"), console=console) as progress:
        progress.add_task(escape(HOSTILE))


WAYS: dict[str, Callable[[PrintableConsole], None]] = {
    "as text": lambda console: console.print(HOSTILE, markup=False),
    "as markup": lambda console: console.print(f"[bold]{escape(HOSTILE)}[/]"),
    "in a table": in_a_table,
    "in a bar": in_a_bar,
}


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_text_does_not_steer_the_terminal(way: str, terminal: bool) -> None:
    out = io.StringIO()
    console = PrintableConsole(file=out, force_terminal=terminal, width=120, emoji=False, color_system=None)
    WAYS[way](console)
    shown = out.getvalue()
    assert r"\x1b[2Jred\x9b31m \u202egnp" in shown  # what is too wide for a cell is cut
    assert not {"\x1b[2J", "\x9b", "\u202e", "\udcff"} & {shown[i : i + n] for i in range(len(shown)) for n in (1, 4)}
    shown.encode()
