"""`vitrap table`: makes the tables and figures of a documentation page from the records of a sweep."""

from pathlib import Path
from typing import Annotated

import typer

from vitrap.cli.console import err, out, say, tell_skipped
from vitrap.errors import UserError


def table(
    spec: Annotated[Path, typer.Argument(help="a sweep's spec that says of tables or figures, see docs/tables.md")],
    check: Annotated[bool, typer.Option("--check", help="write nothing; exit 1 where page or figures differ")] = False,
    records: Annotated[
        Path | None,
        typer.Option(help="print tables of these records (a folder of runs, or a file); the page stays as it is"),
    ] = None,
    collect: Annotated[
        Path | None,
        typer.Option(
            metavar="RUNS", help="first take the sweep's records from RUNS, abridged, to where the page's lie"
        ),
    ] = None,
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", help="write page, figures and records below this folder; left out: below the spec's"),
    ] = None,
) -> None:
    """Make the tables and figures of a page from the records that a sweep's spec names.

    Fills the page that the spec names between its marks, and draws its figures; without a page, prints the tables.
    """
    from vitrap.report.study.collected import collect as take
    from vitrap.report.study.fill_page import fill_page, open_study

    if sum((check, records is not None, collect is not None)) > 1:
        raise UserError("--check, --records and --collect exclude each other; give one")
    if collect is not None:
        taken = take(spec, collect, out_folder)
        tell_skipped(taken.skipped)
        say(f"{taken.file}: {taken.new} new, {taken.superseded} superseded, {taken.missing} of the sweep not run")
    study = open_study(spec, records)
    tell_skipped(study.skipped)
    printed = study.page.file is None or records is not None
    if printed and not check:
        say("\n\n".join(f"{part}:\n\n{text}" for part, text in study.tables().items()))
    if study.page.file is not None and records is not None:
        return
    changes = fill_page(study, write=not check, out=out_folder)
    for change in changes:
        which = f" ({', '.join(change.parts)})" if change.parts else ""
        news = f"outdated{which}; make it with vitrap table {spec}" if check else f"made anew{which}"
        say(f"{change.file}: {news if change.outdated else 'up to date'}", err if printed else out)
    if check and any(change.outdated for change in changes):
        raise typer.Exit(1)
