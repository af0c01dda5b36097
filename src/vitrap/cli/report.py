"""`vitrap report`: writes a report page of all runs in a folder."""

import os
from pathlib import Path
from typing import Annotated

import typer

from vitrap.cli.console import ProgressBars, complain, say, tell_skipped
from vitrap.errors import UserError


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUNS", help="a folder of runs, or a file of records")] = Path(
        "runs"
    ),
    page: Annotated[Path, typer.Option("-o", "--output", help="the page to write")] = Path("report.html"),
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="with each run's pictures")] = True,
) -> None:
    """Make one page of all runs: tables, charts, and what was measured of each; it needs no network."""
    from vitrap.experiment.records import read_records
    from vitrap.files import check_file, write_bytes
    from vitrap.report.page.make_page import make_page

    # The page's folder must be there; so a mistyped one is noticed.
    if not os.path.isdir(page.parent):
        raise UserError(
            f"report {str(page)!r} cannot be written ({str(page.parent)!r} is no folder); name another with -o"
        )
    check_file(page, f"report {str(page)!r}", "name another with -o")
    loaded = read_records(folder)
    tell_skipped(loaded.skipped)
    if not loaded.records and not loaded.failures:
        raise UserError(
            f"{str(folder)!r} holds no record to report on; make some with vitrap run, or name their folder"
        )
    with ProgressBars() as bars:
        made = make_page(loaded, folder.resolve().name or str(folder), pictures, bars.fraction("report"))
    for note in made.notes:
        complain(note)
    write_bytes(page, made.content)
    many = "run" if len(loaded.records) == 1 else "runs"
    say(f"report of {len(loaded.records)} {many}: {page}")
