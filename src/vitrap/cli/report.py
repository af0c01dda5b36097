"""`vitrap report`: writes a report page of all runs in a folder."""

from pathlib import Path
from typing import Annotated

import typer

from vitrap.cli.console import ProgressBars, err, out, tell_skipped
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
    from vitrap.files import write_bytes
    from vitrap.report.page.make_page import make_page

    _check(page)
    loaded = read_records(folder)
    tell_skipped(loaded.skipped)
    if not loaded.records and not loaded.failures:
        raise UserError(
            f"{str(folder)!r} holds no record to report on; make some with vitrap run, or name their folder"
        )
    with ProgressBars() as bars:
        made = make_page(loaded, folder.resolve().name or str(folder), pictures, bars.fraction("report"))
    for note in made.notes:
        _warn(note)
    try:
        write_bytes(page, made.content)
    except OSError as error:
        raise _unwritable(page, error.strerror or "no reason given") from error
    many = "run" if len(loaded.records) == 1 else "runs"
    out.print(f"report of {len(loaded.records)} {many}: {page}", highlight=False, markup=False, soft_wrap=True)


def _check(page: Path) -> None:
    """Refuse a path where no page can be written, before any work is done.

    Raises:
        UserError: naming the path and why.
    """
    try:
        if not page.parent.is_dir():
            raise _unwritable(page, f"{str(page.parent)!r} is no folder")
        if page.exists() and not page.is_file():
            raise _unwritable(page, "it is there, and no file")
    except OSError as error:  # the name is too long, say
        raise _unwritable(page, error.strerror or "no reason given") from error


def _unwritable(page: Path, why: str) -> UserError:
    return UserError(f"report {str(page)!r} cannot be written ({why}); name another with -o")


def _warn(line: str) -> None:
    err.print(f"vitrap: {' '.join(line.split())}", highlight=False, markup=False, soft_wrap=True)
