"""`fill_page`: writes a sweep's tables into a documentation page, between its marks, and draws its figures."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vitrap.errors import UserError
from vitrap.experiment.records import read_records
from vitrap.files import check_file, read_bytes, write_bytes
from vitrap.report.study.drawings import draw, drawn_from, is_current
from vitrap.report.study.entries import Entry, entries
from vitrap.report.study.layout import PageSpec, read_page
from vitrap.report.study.pivot import markdown_table
from vitrap.sweeps.grid import load_sweep


@dataclass(frozen=True)
class Study:
    """A sweep with its records, ready to be made into a page.

    Attributes:
        folder: the spec's folder.
        page: which page, tables and figures the spec asks for.
        entries: every run of the sweep, and every defence on it.
        skipped: one line for each record that could not be read.
    """

    folder: Path
    page: PageSpec
    entries: tuple[Entry, ...]
    skipped: tuple[str, ...]

    def tables(self) -> dict[str, str]:
        """Each table in Markdown, by the part of the page that it fills."""
        return {table.part: markdown_table(table, self.entries) for table in self.page.tables}


@dataclass(frozen=True)
class Change:
    """A page or a figure, and whether it was out of date.

    Attributes:
        file: the page or the picture.
        parts: the tables of the page that were out of date.
        outdated: whether the file was out of date.
    """

    file: Path
    parts: tuple[str, ...]
    outdated: bool


def open_study(spec: str | Path, records: str | Path | None = None) -> Study:
    """Read a sweep's spec and its records.

    Args:
        spec: a TOML file with a `[grid]` and `[[table]]` or `[[figure]]`.
        records: folder or file of its records; None for that of the spec's `page.records`.

    Raises:
        UserError: the spec is wrong, or there is no such place.
    """
    sweep = load_sweep(spec)
    folder = Path(spec).parent
    page = read_page(sweep, folder)
    place = records if records is not None else page.records
    if place is None:
        raise UserError(f"the spec of sweep {sweep.name!r} has no page.records; say where they lie with --records")
    loaded = read_records(place)
    return Study(folder, page, entries(sweep, loaded), loaded.skipped)


def fill_page(study: Study, write: bool = True, out: str | Path | None = None) -> list[Change]:
    """Fill the page and draw the figures; each file is written whole or not at all.

    A page has its marks already, and a figure replaces nothing but a figure of vitrap's: a spec from elsewhere can name
    any file.

    Args:
        study: a sweep with a page.
        write: False to compare only.
        out: the folder below which files may be written; None: the spec's folder.

    Returns:
        The page, then the figures.

    Raises:
        UserError: the page is not there or has no such part, a table or figure cannot be made as the spec says, or a
            file may not or cannot be written. No file has been written.
    """
    files = [study.page.file, *(Path(figure.file) for figure in study.page.figures)]
    for file in filter(None, files if write else []):
        check_file(file, repr(str(file)), "name another file in the spec")
    # Make everything first, so that a mistake in the spec leaves all files as they are.
    drafts: list[tuple[Change, bytes]] = []
    if study.page.file is not None and study.page.tables:
        drafts.append(_filled(study.page.file, study.tables()))
    for figure in study.page.figures:
        outdated = not is_current(figure, study.entries)
        content = draw(figure, study.entries) if outdated and write else b""
        drafts.append((Change(Path(figure.file), (), outdated), content))
    made = [(change, content) for change, content in drafts if change.outdated and write]
    for change, _ in made:
        check_below(change.file, study.folder if out is None else out)
        if change.file != study.page.file and os.path.lexists(change.file) and drawn_from(change.file) is None:
            raise UserError(
                f"{str(change.file)!r} is there, and is no figure of vitrap's; remove it, or name another in the spec"
            )
    for change, content in made:
        change.file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(change.file, content)
    return [change for change, _ in drafts]


def check_below(file: Path, folder: str | Path) -> None:
    """Refuse to write a file that does not lie below a folder, links to folders followed.

    Raises:
        UserError: naming both, and the remedy.
    """
    place = Path(os.path.realpath(file.parent)) / file.name
    if not place.is_relative_to(os.path.realpath(folder)):
        raise UserError(
            f"{str(file)!r} does not lie below {str(folder)!r}, and nothing else is written; give --out a folder that"
            " it lies below, or name another in the spec"
        )


def _filled(page: Path, tables: Mapping[str, str]) -> tuple[Change, bytes]:
    """A page with its tables, and which of them were out of date."""
    try:
        text = read_bytes(page).decode()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise UserError(f"page {str(page)!r} cannot be read ({why}); mend page.file in the spec") from error
    parts = tuple(part for part, content in tables.items() if fill(text, part, content, str(page)) != text)
    for part in parts:
        text = fill(text, part, tables[part], str(page))
    return Change(page, parts, bool(parts)), text.encode()


def fill(text: str, part: str, content: str, page: str) -> str:
    """The text of a page with `content` between its marks `<!-- part -->` and `<!-- /part -->`.

    Raises:
        UserError: the page does not have these marks exactly once.
    """
    pattern = re.compile(rf"(<!-- {re.escape(part)} -->\n).*?(<!-- /{re.escape(part)} -->)", re.DOTALL)
    if (times := len(pattern.findall(text))) != 1:
        marks = f"<!-- {part} --> and <!-- /{part} -->"
        raise UserError(f"page {page!r} has {times} parts {part!r}, not one; put {marks} around its place once")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)
