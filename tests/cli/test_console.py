"""Whatever way text takes to the terminal, it does not steer it."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from rich.markup import escape
from rich.progress import Progress, TextColumn
from rich.table import Table

from tests.cli.conftest import TINY
from vitrap.cli.console import PrintableConsole, say

HOSTILE = "\x1b[2Jred\x9b31m \u202egnp \udcff :cat: [bold]b[/]"


def in_a_table(console: PrintableConsole) -> None:
    table = Table("a")
    table.add_row(escape(HOSTILE))
    console.print(table)


def in_a_bar(console: PrintableConsole) -> None:
    with Progress(TextColumn("{task.description}"), console=console) as progress:
        progress.add_task(escape(HOSTILE))


WAYS: dict[str, Callable[[PrintableConsole], None]] = {
    "as text": lambda console: say(HOSTILE, console),
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


def test_what_is_said_is_neither_markup_nor_wrapped() -> None:
    out = io.StringIO()
    say(f"{HOSTILE} {'a ' * 100}", PrintableConsole(file=out, width=20, emoji=False))
    assert out.getvalue().endswith(f":cat: [bold]b[/] {'a ' * 100}\n")


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    """Images in classes of odd names, beside files that are none."""
    for part, count in (("train", 30), ("test", 4)):
        for name in ("\x1b[2J\u202e$x^{$", "\udcff\n\t"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), (i, i, i)).save(tmp_path / part / name / f"{i}.png")
    (tmp_path / "train" / "\x1b[31mnotes.txt").touch()
    return tmp_path


def test_a_run_on_classes_of_odd_names_says_what_was_passed_over(call, odd_folder: Path) -> None:
    words = (*TINY, "data.limit=40", "attack.name=badnets", "data.holdout=0.1", "--device", "cpu")
    said = call("run", *words, f"data.name=imagefolder:{odd_folder}", "--out", odd_folder / "runs")
    assert (said.code, said.err) == (0, "")
    assert "\x1b" not in said.out
    assert "no images, and were passed over: 1: train/\\x1b[31mnotes.txt\n" in said.out


def test_poisoning_classes_of_odd_names_says_what_was_passed_over(call, odd_folder: Path) -> None:
    words = (*TINY, "data.limit=40", "attack.name=badnets", "data.holdout=0.1", "--device", "cpu")
    where = ("--out", odd_folder / "runs", "-o", odd_folder / "poisoned")
    said = call("poison", *words, f"data.name=imagefolder:{odd_folder}", *where)
    assert (said.code, said.err) == (0, "")
    assert "no images, and were passed over: 1: train/\\x1b[31mnotes.txt\n" in said.out


def test_an_error_that_quotes_a_file_does_not_steer_the_terminal(call, odd_folder: Path) -> None:
    (odd_folder / "train" / "\udcff\n\t" / "\x1b[2J.png").write_bytes(b"no image")
    said = call("run", *TINY, f"data.name=imagefolder:{odd_folder}", "--out", odd_folder / "runs")
    assert said.code == 2
    assert said.err.count("\n") == 1
    assert r"/\x1b[2J.png is not a readable image (none of BMP" in said.err
    assert not {"\x1b", "\udcff"} & set(said.err)
