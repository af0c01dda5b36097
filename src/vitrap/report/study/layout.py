"""Reads which tables and figures a sweep's spec asks for: its keys `page`, `[[table]]` and `[[figure]]`.

docs/tables.md explains the keys. All are checked before any record is read.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vitrap.errors import UserError, shown, unknown
from vitrap.experiment.spec import build
from vitrap.sweeps.grid import Sweep

MEASURE, DEFENCE = "measure", "defence"
"""Keys that rows and columns may have besides those of the grid and of the spec."""
Kind = Literal["", "screen", "repair", "filter", "judgement"]
"""A kind of defence, or none. Not taken from `contracts.OutcomeKind`, since a report imports no torch."""
Show = Literal["interval", "mean", "each", "count", "n", "against"]
"""How a cell shows a measure.

"interval" and "mean": the mean over seeds; for a single seed its value with or without its interval. "each": the value
of each seed. "count": for how many seeds it is true. "n": the number of images. "against": the difference from the
table's reference, paired by seed.
"""


@dataclass(frozen=True)
class ShownMeasure:
    """How a table shows a measure.

    Attributes:
        measure: its name in docs/record.md; "a - b" is a difference, "a / b" are two measures in one cell.
        heading: the heading of its column or row.
        digits: digits after the decimal point.
        show: see `Show`.
    """

    measure: str
    heading: str = ""
    digits: int = 2
    show: Show = "interval"


@dataclass(frozen=True)
class TableSpec:
    """What a table shows.

    Attributes:
        part: the name of the page's marks between which the table is written.
        rows: the keys that make a row: keys of the grid or of the spec, "defence", "measure".
        columns: the key that makes a column, likewise.
        measures: the measures shown.
        kind: the kind of the defences shown; "" where neither rows nor columns have "defence", and runs are shown.
        where: values that keys must have.
        against: the values that distinguish the reference of an entry, for measures shown "against"; the other keys of
            the row, and the seed, are the same.
        headings: headings of keys and measures; they replace those that `page.headings` has for all tables.
        percent: keys whose values are shares, shown in %; left out: those of `page.percent`.
        sort: a measure by which rows are sorted; with "-" before it, greatest first.
        digits: the default for measures.
        show: the default for measures.
    """

    part: str
    rows: tuple[str, ...]
    columns: str = MEASURE
    measures: tuple[ShownMeasure, ...] = ()
    kind: Kind = ""
    where: Mapping[str, Any] = field(default_factory=dict)
    against: Mapping[str, Any] = field(default_factory=dict)
    headings: Mapping[str, str] = field(default_factory=dict)
    percent: tuple[str, ...] = ()
    sort: str = ""
    digits: int = 2
    show: Show = "interval"


@dataclass(frozen=True)
class Block:
    """A block of lines in a heat map: the defences of one kind, with one measure."""

    measure: str
    heading: str
    kind: Kind = ""


@dataclass(frozen=True)
class HeatSpec:
    """What a heat map shows: means over seeds, from 0 to 1.

    Attributes:
        file: the picture's file.
        title: its title.
        rows: the key that makes a row.
        columns: the key that makes a column.
        scale: label of the colour scale.
        blocks: the blocks of lines, from top to bottom.
        where: values that keys must have.
    """

    file: str
    title: str
    rows: str
    columns: str
    scale: str
    blocks: tuple[Block, ...] = ()
    where: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScatterSpec:
    """What a scatter shows: a measure over another, with a mark and an interval for each run.

    Attributes:
        file: the picture's file.
        title: its title.
        x: a measure.
        y: a measure that has intervals.
        series: the key whose values have marks of their own.
        note: a key whose value is written beside each mark.
        xlabel: label of the x axis.
        ylabel: label of the y axis.
        percent: keys whose values are shares, shown in %.
        where: values that keys must have.
    """

    file: str
    title: str
    x: str
    y: str
    series: str
    note: str
    xlabel: str
    ylabel: str
    percent: tuple[str, ...] = ()
    where: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LinesSpec:
    """What a figure of lines shows: a measure over a setting on a logarithmic scale, by marks for seeds and means.

    Attributes:
        file: the picture's file.
        title: its title.
        x: a key.
        y: a rate, shown in %.
        series: the key whose values have lines of their own.
        xlabel: label of the x axis.
        ylabel: label of the y axis.
        percent: keys whose values are shares, shown in %.
        where: values that keys must have.
    """

    file: str
    title: str
    x: str
    y: str
    series: str
    xlabel: str
    ylabel: str
    percent: tuple[str, ...] = ()
    where: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CurvesSpec:
    """What a figure of curves shows: a measure over another, with a line through the runs of each series.

    Attributes:
        file: the picture's file.
        title: its title.
        x: a measure.
        y: a rate, shown in %.
        series: the key whose values have lines of their own.
        xlabel: label of the x axis.
        ylabel: label of the y axis.
        bold: the series that are drawn boldly.
        where: values that keys must have.
    """

    file: str
    title: str
    x: str
    y: str
    series: str
    xlabel: str
    ylabel: str
    bold: tuple[str, ...] = ()
    where: Mapping[str, Any] = field(default_factory=dict)


FigureSpec = HeatSpec | ScatterSpec | LinesSpec | CurvesSpec
FIGURES = {"heat": HeatSpec, "scatter": ScatterSpec, "lines": LinesSpec, "curves": CurvesSpec}


@dataclass(frozen=True)
class _PageKeys:
    file: str | None = None
    records: str | None = None
    headings: Mapping[str, str] = field(default_factory=dict)
    percent: tuple[str, ...] = ()


@dataclass(frozen=True)
class PageSpec:
    """The page of a sweep: its file, its records, its tables and its figures.

    Attributes:
        file: the page into which tables are written; None: there is no page.
        records: the folder of the page's records; None: there is none.
        tables: the tables.
        figures: the figures; their files are paths.
    """

    file: Path | None
    records: Path | None
    tables: tuple[TableSpec, ...]
    figures: tuple[FigureSpec, ...]


def read_page(sweep: Sweep, folder: Path) -> PageSpec:
    """Read the page of a sweep's spec; paths in the spec are relative to `folder`.

    Raises:
        UserError: a key, type or value is wrong, or there is nothing to make.
    """
    page = build(_PageKeys, _mapping(sweep.page.get("page", {}), "page"), "page")
    tables = tuple(_table_spec(entry, f"table[{i}]", page) for i, entry in enumerate(_entries(sweep, "table")))
    figures = tuple(_figure_spec(entry, f"figure[{i}]", folder) for i, entry in enumerate(_entries(sweep, "figure")))
    if not tables and not figures:
        raise UserError(f"the spec of sweep {sweep.name!r} says of no table: add a [[table]] or a [[figure]]")
    parts = [table.part for table in tables]
    if twice := next((part for part in parts if parts.count(part) > 1), None):
        raise UserError(f"two tables have the part {twice!r}; give each its own")
    file = _path(folder, page.file) if page.file else None
    records = _path(folder, page.records) if page.records else None
    return PageSpec(file, records, tables, figures)


def _path(folder: Path, name: str) -> Path:
    """A path of the spec, relative to the spec's folder, without `..` where possible."""
    return Path(os.path.normpath(folder / name))


def _entries(sweep: Sweep, key: str) -> Sequence[Mapping[str, Any]]:
    """The tables under `[[key]]` in the spec."""
    entries = sweep.page.get(key, [])
    if not isinstance(entries, list):
        raise UserError(f"{key} = {entries!r} must be tables: [[{key}]]")
    return [_mapping(entry, f"{key}[{i}]") for i, entry in enumerate(entries)]


def _mapping(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise UserError(f"{where} = {entry!r} must be a table of keys and values")
    return dict(entry)


def _table_spec(entry: Mapping[str, Any], where: str, page: _PageKeys) -> TableSpec:
    """A table; its measures get the table's defaults."""
    own = {key: _listed(value) if key == "rows" else value for key, value in entry.items() if key != "measures"}
    table = build(TableSpec, own, where)
    headings = {**page.headings, **table.headings}
    defaults = {"digits": table.digits, "show": table.show}
    measures = []
    for i, given in enumerate(_listed(entry.get("measures", []))):
        keys = {"measure": given} if isinstance(given, str) else _mapping(given, f"{where}.measures[{i}]")
        built = build(ShownMeasure, {**defaults, **keys}, f"{where}.measures[{i}]")
        measures.append(replace(built, heading=built.heading or headings.get(built.measure, built.measure)))
    if not measures:
        raise UserError(f"{where} has no measures; name one or more of docs/record.md")
    if not table.against and any(each.show == "against" for each in measures):
        raise UserError(f"{where} shows a measure against nothing; say {where}.against = {{title = ...}}")
    if len(measures) > 1 and MEASURE not in (*table.rows, table.columns):
        raise UserError(f"{where} has {len(measures)} measures, and neither rows nor columns are made of {MEASURE!r}")
    return replace(table, measures=tuple(measures), headings=headings, percent=table.percent or page.percent)


def _figure_spec(entry: Mapping[str, Any], where: str, folder: Path) -> FigureSpec:
    """A figure of the kind that the spec names."""
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in FIGURES:
        raise unknown(f"{where}.kind", kind, FIGURES)
    # The blocks of a heat map are read below; other figures have none.
    apart = ("kind", "blocks") if kind == "heat" else ("kind",)
    figure = build(FIGURES[kind], {key: value for key, value in entry.items() if key not in apart}, where)
    if not figure.file.lower().endswith(".png"):
        raise UserError(f"{where}.file = {shown(figure.file)} is no name of a PNG; end it in .png")
    figure = replace(figure, file=str(_path(folder, figure.file)))
    if not isinstance(figure, HeatSpec):
        return figure
    blocks = [
        build(Block, _mapping(given, f"{where}.blocks[{i}]"), f"{where}.blocks[{i}]")
        for i, given in enumerate(_listed(entry.get("blocks", [])))
    ]
    if not blocks:
        raise UserError(f"{where} has no blocks; name a measure, its heading, and the kind of its defences")
    return replace(figure, blocks=tuple(blocks))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
