"""`markdown_table`: makes a table of a sweep's records in Markdown.

A cell of one seed has its value with the interval over test images, a cell of several seeds mean and standard
deviation. A line below the table says over how many seeds. Runs that are missing are shown as missing.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from vitrap.errors import UserError
from vitrap.experiment.defence_rows import RATES_BY_FPR
from vitrap.report.study.entries import (
    NO_BACKDOOR_MARK,
    Entry,
    Value,
    change,
    check_alike,
    choose,
    grouped,
    label,
    mean_change,
    measure,
    with_references,
)
from vitrap.report.study.layout import MEASURE, ShownMeasure, TableSpec
from vitrap.report.tables import counts

NOTHING = "–"
"""Shown for a measure that a run does not have."""


@dataclass(frozen=True)
class TableCell:
    """A cell, and the facts that the line below the table is made of.

    Attributes:
        text: the cell's text, without the number of seeds.
        seeds: number of seeds that the sweep names.
        found: number of seeds that have the measure; where none has it, of those that have been run.
        is_mean: whether the text is a mean over seeds.
        number: whether the text is the value of a single seed.
        interval: whether that value has an interval.
        images: the number of images of each rate.
        paired: number of seeds of a mean difference from a reference; 0 where it is none.
        half_width: the greatest half-width of the intervals of a mean's seeds, as text; "" where it is no mean.
        thresholds: the numbers of held-out images that thresholds come from; of other measures none.
        unresolved: whether some seed's are too few for the threshold.
        backdoor: whether the victims of all seeds have one for the defence to find.
    """

    text: str
    seeds: int = 0
    found: int = 0
    is_mean: bool = False
    number: bool = False
    interval: bool = False
    images: tuple[int, ...] = ()
    paired: int = 0
    half_width: str = ""
    thresholds: tuple[int, ...] = ()
    unresolved: bool = False
    backdoor: bool = True


MISSING = TableCell("not run")


def markdown_table(table: TableSpec, found: Sequence[Entry]) -> str:
    """A table in Markdown, with a line below it that says over how many seeds and images.

    Raises:
        UserError: it names an unknown key or measure, or mixes runs that differ by more than their seed.
    """
    # Choose the entries.
    places = (*table.rows, table.columns)
    measures = [*(shown.measure for shown in table.measures), *filter(None, [table.sort.lstrip("-")])]
    keys = [key for key in places if key != MEASURE]
    chosen = choose(found, keys, measures, table.where, table.kind)
    chosen = with_references(chosen, keys, table.against) if table.against else chosen
    # Group them by the names of row and column: the entries of a group are the seeds of a cell.
    pairs = [
        (tuple(_name(key, entry, shown, table) for key in places), (shown, entry))
        for entry in chosen
        for shown in table.measures
    ]
    groups = grouped(pairs)
    cells = {names: _cell(group) for names, group in groups.items()}
    # Write the table.
    heads = list(dict.fromkeys(names[-1] for names, _ in pairs))
    rows = _sorted(groups, table.sort)
    most = max((cell.found for cell in cells.values() if cell.is_mean), default=0)
    named = [table.headings.get(key, "" if key == MEASURE else key) for key in table.rows]
    body = [[*row, *(_text(cells.get((*row, head), MISSING), most) for head in heads)] for row in rows]
    lines = [[*named, *heads], ["---"] * (len(named) + len(heads)), *body]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + _note(cells.values(), most))


def _name(key: str, entry: Entry, shown: ShownMeasure, table: TableSpec) -> str:
    """An entry's label in the row or column of a key."""
    if key == MEASURE:
        return shown.heading
    return label(entry.settings.get(key), key in table.percent).replace("|", "\\|")


def _sorted(groups: Mapping[tuple[str, ...], Sequence[tuple[ShownMeasure, Entry]]], by: str) -> list[tuple[str, ...]]:
    """The rows, sorted by the mean of a measure if one is given; rows without it come last."""
    rows: dict[tuple[str, ...], list[Entry]] = {}
    for names, group in groups.items():
        rows.setdefault(names[:-1], []).extend(entry for _, entry in group)
    if not by:
        return list(rows)
    sign, name = (-1, by[1:]) if by.startswith("-") else (1, by)
    known = {row: [v.value for entry in each if (v := measure(entry, name))] for row, each in rows.items()}
    return sorted(rows, key=lambda row: sign * mean(known[row]) if known[row] else float("inf"))


def _cell(group: Sequence[tuple[ShownMeasure, Entry]]) -> TableCell:
    """The cell of a group of entries, which differ by seed alone."""
    shown = group[0][0]
    seeds = [entry for _, entry in group]
    if any(other != shown for other, _ in group):
        raise UserError(f"two measures have the heading {shown.heading!r}; give each its own")
    check_alike(seeds)
    there = [entry for entry in seeds if entry.state == "found"]
    if not there:
        return TableCell("failed") if any(entry.state == "failed" for entry in seeds) else MISSING
    # The values of all seeds, for each of the cell's measures.
    of = change if shown.show == "against" else measure
    names = shown.measure.split(" / ")
    each = [[v for entry in there if (v := of(entry, name))] for name in names]
    averaged = shown.show in ("interval", "mean")
    several = max(map(len, each)) > 1
    return TableCell(
        text=" / ".join(_measure_text(shown, values) for values in each),
        seeds=len(seeds),
        found=min((len(values) for values in each if values), default=len(there)),
        is_mean=averaged and several,
        number=averaged and any(each) and not several,
        interval=shown.show in ("interval", "against")
        and not several
        and any(v.low is not None for vs in each for v in vs),
        images=tuple(v.n for vs in each for v in vs if v.n is not None and averaged),
        paired=max(map(len, each)) if shown.show == "against" and several else 0,
        half_width=_half_width(shown, [v for vs in each for v in vs]) if averaged and several else "",
        thresholds=_thresholds(names, there),
        unresolved=any(name in entry.unresolved for name in names for entry in there),
        backdoor=all(entry.backdoor for entry in there),
    )


def _thresholds(names: Sequence[str], seeds: Sequence[Entry]) -> tuple[int, ...]:
    """The number of held-out images of each seed, if one of the measures is a rate at a threshold from them."""
    at_thresholds = any(name.partition(".")[0] in RATES_BY_FPR and "." in name for name in names)
    found = [entry.values.get("n_threshold") for entry in seeds] if at_thresholds else []
    return tuple(int(count.value) for count in found if count)


def _half_width(shown: ShownMeasure, values: Sequence[Value]) -> str:
    """The greatest half-width of the seeds' intervals over images, as text."""
    ends = [max(v.high - v.value, v.value - v.low) for v in values if v.low is not None and v.high is not None]
    return f"{_unit(values) * max(ends):.{shown.digits}f}" if ends else ""


def _unit(values: Sequence[Value]) -> int:
    """The factor of values that are shown: 100 for rates, which are shown in %."""
    return 1 if values[0].n is None else 100


def _measure_text(shown: ShownMeasure, values: Sequence[Value]) -> str:
    """The text of one measure of some seeds; a rate is shown in %."""
    if not values or (shown.show == "n" and values[0].n is None):
        return NOTHING
    if shown.show == "n":
        return ", ".join(dict.fromkeys(str(value.n) for value in values))
    if shown.show == "count":
        return f"{sum(value.value > 0 for value in values)} of {len(values)}"
    unit = _unit(values)

    def number(x: float) -> str:
        return f"{round(unit * x, shown.digits) + 0.0:.{shown.digits}f}"  # + 0.0: never -0

    first = values[0]
    if shown.show == "each":
        return ", ".join(number(value.value) for value in values)
    if shown.show == "against" and len(values) > 1:
        first = mean_change([value.value for value in values])
    elif len(values) > 1:
        return f"{number(mean(v.value for v in values))} ± {number(stdev(v.value for v in values))}"
    if shown.show in ("interval", "against") and first.low is not None and first.high is not None:
        return f"{number(first.value)} [{number(first.low)}, {number(first.high)}]"
    return number(first.value)


def _text(cell: TableCell, most: int) -> str:
    """A cell's text, with a mark where there is no backdoor, and its number of seeds where that is not the table's."""
    text = cell.text if cell.backdoor else f"{cell.text} {NO_BACKDOOR_MARK}"
    if cell.found < cell.seeds:
        return f"{text} ({cell.found} of {cell.seeds} seeds)"
    return f"{text} ({cell.found} seeds)" if cell.is_mean and cell.found != most else text


def _note(cells: Collection[TableCell], most: int) -> list[str]:
    """The line below the table: over how many seeds and images its values are."""
    single = any(cell.number for cell in cells)
    paired = {cell.paired for cell in cells if cell.paired}
    images = {n for cell in cells for n in cell.images}
    held_out = {n for cell in cells for n in cell.thresholds}
    half_width = max((cell.half_width for cell in cells if cell.half_width), key=float, default="")
    parts = [
        f"mean ± standard deviation over {most} seeds" if most else "",
        f"each seed's own 95 % interval over images reaches at most {half_width} to either side" if half_width else "",
        f"of differences: mean and 95 % interval over {max(paired)} pairs of equal seed (Student's t)"
        if paired
        else "",
        ("without ±: one seed" if most else "one seed") if single else "",
        "in brackets: 95 % interval over images" if any(cell.interval for cell in cells) else "",
        f"n = {counts(images)} images" if images else "",
        f"thresholds from {counts(held_out)} held-out images" if held_out else "",
        f"{NOTHING} where these are too few for the false positive rate" if any(c.unresolved for c in cells) else "",
        f"{NO_BACKDOOR_MARK} no backdoor, so no credit to the defence" if not all(c.backdoor for c in cells) else "",
    ]
    note = "; ".join(filter(None, parts))
    return ["", f"{note[0].upper()}{note[1:]}."] if note else []
