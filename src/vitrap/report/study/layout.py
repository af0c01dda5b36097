"""What a sweep's spec says of the tables and figures that its records become: `page`, `[[table]]`, `[[figure]]`.

docs/tables.md describes the keys. Every one is checked before a record is read.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vitrap.errors import UserError, unknown
from vitrap.experiment.spec import build
from vitrap.sweeps.grid import Sweep

MEASURE, DEFENCE = "measure", "defence"
"""Keys of rows and columns beside those of the grid and of the spec."""
Kind = Literal["", "screen", "repair", "filter", "judgement"]
Show = Literal["interval", "mean", "each", "count", "n", "against"]
"""How a measure stands in its cell.

"interval" and "mean": one seed's value with its interval, or without. "each": every seed's value. "count": how many
seeds it is true of. "n": images counted. "against": less what the table's reference has, seed by seed.
"""


@dataclass(frozen=True)
class Column:
    """A measure, as a table shows it.

    Attributes:
        measure: its name in docs/record.md; "a - b" is a difference, "a / b" are two measures in one cell.
        heading: what stands above it.
        digits: after the point.
        show: see `Show`.
    """

    measure: str
    heading: str = ""
    digits: int = 2
    show: Show = "interval"


@dataclass(frozen=True)
class Layout:
    """A table.

    Attributes:
        part: the marks in the page that it stands between.
        rows: what makes a row: keys of the grid or of the spec, "defence", "measure".
        columns: what makes a column, likewise.
        measures: what is shown.
        kind: of the defences shown; "" without "defence" among rows and columns: the runs themselves.
        where: values that keys must have.
        against: values by which columns shown "against" find their reference; all else of the row, and the seed, is
            the same.
        headings: of keys and measures, over those that `page.headings` has for all tables.
        percent: keys whose values are shares, shown in %; left out: those of `page.percent`.
        sort: a measure by which rows are sorted; with "-" before it, greatest first.
        digits: of measures that do not say.
        show: of measures that do not say.
    """

    part: str
    rows: tuple[str, ...]
    columns: str = MEASURE
    measures: tuple[Column, ...] = ()
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
    """Lines of a heat map: the defences of a kind, and their measure."""

    measure: str
    heading: str
    kind: Kind = ""


@dataclass(frozen=True)
class Heat:
    """A heat map of means over seeds, from 0 to 1.

    Attributes:
        file: the picture.
        title: above it.
        rows: what makes a row, a key.
        columns: what makes a column.
        scale: what the colours mean.
        blocks: what is shown, from top to bottom.
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
class Scatter:
    """A measure over another, a mark a run, with intervals.

    Attributes:
        file: the picture.
        title: above it.
        x: a measure.
        y: a measure that has intervals.
        series: the key that tells the kinds of marks apart.
        note: a key whose value stands beside each mark.
        xlabel: beside the axis.
        ylabel: beside the axis.
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
class Lines:
    """A measure over a setting on a logarithmic scale: marks are seeds, lines means.

    Attributes:
        file: the picture.
        title: above it.
        x: a key.
        y: a rate, shown in %.
        series: the key that tells lines apart.
        xlabel: beside the axis.
        ylabel: beside the axis.
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


Figure = Heat | Scatter | Lines
FIGURES = {"heat": Heat, "scatter": Scatter, "lines": Lines}


@dataclass(frozen=True)
class _Place:
    file: str | None = None
    records: str | None = None
    headings: Mapping[str, str] = field(default_factory=dict)
    percent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """Where a sweep's tables and figures go.

    Attributes:
        file: the page whose marked parts the tables are; None: there is no page.
        records: where the page's records lie; None: nowhere.
        tables: of the page.
        figures: of the page; their files are paths.
    """

    file: Path | None
    records: Path | None
    tables: tuple[Layout, ...]
    figures: tuple[Figure, ...]


def read_page(sweep: Sweep, folder: Path) -> Page:
    """What a sweep's spec says of its page; paths are relative to `folder`.

    Raises:
        UserError: a key, type or value is wrong, or there is nothing to make.
    """
    place = build(_Place, _mapping(sweep.page.get("page", {}), "page"), "page")
    tables = tuple(_layout(entry, f"table[{i}]", place) for i, entry in enumerate(_entries(sweep, "table")))
    figures = tuple(_figure(entry, f"figure[{i}]", folder) for i, entry in enumerate(_entries(sweep, "figure")))
    if not tables and not figures:
        raise UserError(f"the spec of sweep {sweep.name!r} says of no table: add a [[table]] or a [[figure]]")
    parts = [table.part for table in tables]
    if twice := next((part for part in parts if parts.count(part) > 1), None):
        raise UserError(f"two tables have the part {twice!r}; give each its own")
    file, records = (_place(folder, name) if name else None for name in (place.file, place.records))
    return Page(file, records, tables, figures)


def _place(folder: Path, name: str) -> Path:
    """A path of the spec, as short as it can be said."""
    return Path(os.path.normpath(folder / name))


def _entries(sweep: Sweep, key: str) -> Sequence[Mapping[str, Any]]:
    entries = sweep.page.get(key, [])
    if not isinstance(entries, list):
        raise UserError(f"{key} = {entries!r} must be tables: [[{key}]]")
    return [_mapping(entry, f"{key}[{i}]") for i, entry in enumerate(entries)]


def _mapping(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise UserError(f"{where} = {entry!r} must be a table of keys and values")
    return dict(entry)


def _layout(entry: Mapping[str, Any], where: str, place: _Place) -> Layout:
    """A table, its measures with what the table says for all of them."""
    own = {key: _listed(value) if key == "rows" else value for key, value in entry.items() if key != "measures"}
    table = build(Layout, own, where, ("measures",))
    headings = {**place.headings, **table.headings}
    said, columns = {"digits": table.digits, "show": table.show}, []
    for i, given in enumerate(_listed(entry.get("measures", []))):
        column = {"measure": given} if isinstance(given, str) else _mapping(given, f"{where}.measures[{i}]")
        built = build(Column, {**said, **column}, f"{where}.measures[{i}]")
        columns.append(replace(built, heading=built.heading or headings.get(built.measure, built.measure)))
    if not columns:
        raise UserError(f"{where} has no measures; name one or more of docs/record.md")
    if not table.against and any(column.show == "against" for column in columns):
        raise UserError(f"{where} shows a measure against nothing; say {where}.against = {{title = ...}}")
    if len(columns) > 1 and MEASURE not in (*table.rows, table.columns):
        raise UserError(f"{where} has {len(columns)} measures, and neither rows nor columns are made of {MEASURE!r}")
    return replace(table, measures=tuple(columns), headings=headings, percent=table.percent or place.percent)


def _figure(entry: Mapping[str, Any], where: str, folder: Path) -> Figure:
    kind, own = entry.get("kind"), {key: value for key, value in entry.items() if key != "kind"}
    if kind not in FIGURES:
        raise unknown(f"{where}.kind", kind, FIGURES)
    figure = build(FIGURES[kind], {key: value for key, value in own.items() if key != "blocks"}, where, ("blocks",))
    figure = replace(figure, file=str(_place(folder, figure.file)))
    if not isinstance(figure, Heat):
        return figure
    blocks = [
        build(Block, _mapping(given, f"{where}.blocks[{i}]"), f"{where}.blocks[{i}]")
        for i, given in enumerate(_listed(own.get("blocks", [])))
    ]
    if not blocks:
        raise UserError(f"{where} has no blocks; name a measure, its heading, and the kind of its defences")
    return replace(figure, blocks=tuple(blocks))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
