"""Draws the figures of a sweep: heat map, scatter, lines, curves.

The metadata of each PNG have a digest of what was drawn, so that a figure can be checked without drawing it again.
"""

import hashlib
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitrap.data.picture import open_picture
from vitrap.errors import UserError
from vitrap.printable import drawable, plain_text
from vitrap.report.study.entries import (
    NO_BACKDOOR_MARK,
    Entry,
    Value,
    check_alike,
    choose,
    grouped,
    label,
    measure,
)
from vitrap.report.study.layout import CurvesSpec, FigureSpec, HeatSpec, LinesSpec, ScatterSpec
from vitrap.report.tables import counts

DIGEST = "vitrap"
"""The key of the PNG's metadata under which the digest stands."""
MARKS = "os^Dv*"
"""Shapes of the marks of a scatter, one for each series."""
HUES = colormaps["tab20"]
"""Colours of curves, one for each series."""
OWN_TEXTS = ("title", "scale", "xlabel", "ylabel")
LONG = 200
"""Greatest number of characters of a label."""
Data = list[dict[str, Any]]


def draw(figure: FigureSpec, found: Sequence[Entry]) -> bytes:
    """Draw a figure as PNG."""
    data = figure_data(figure, found)
    # Names stand for themselves: they are made drawable, and a dollar sign begins no formula.
    shown = [{key: drawable(x, LONG) if isinstance(x, str) else x for key, x in point.items()} for point in data]
    own = {key: drawable(text, LONG) for key, text in asdict(figure).items() if key in OWN_TEXTS}
    labelled = replace(figure, **own)
    content = io.BytesIO()
    with plain_text():
        drawing = Figure(figsize=_size(figure, data), layout="constrained", dpi=120)
        axis = drawing.subplots()
        axis.set_title(labelled.title)
        if isinstance(labelled, HeatSpec):
            _heat(axis, labelled, shown)
        elif isinstance(labelled, ScatterSpec):
            _scatter(axis, labelled, shown)
        elif isinstance(labelled, CurvesSpec):
            _curves(axis, labelled, shown)
        else:
            _lines(axis, labelled, shown)
        drawing.savefig(content, format="png", metadata={"Software": "vitrap", DIGEST: digest(figure, data)})
    return content.getvalue()


def is_current(figure: FigureSpec, found: Sequence[Entry]) -> bool:
    """Whether the figure's file was drawn from the same values, by the same lines of the spec."""
    return drawn_from(Path(figure.file)) == digest(figure, figure_data(figure, found))


def drawn_from(file: Path) -> str | None:
    """The digest of what a figure's file was drawn from; None where vitrap did not draw it."""
    try:
        with open_picture(file, ("PNG",)) as image:
            return image.info.get(DIGEST)
    except UserError:
        return None


def digest(figure: FigureSpec, data: Data) -> str:
    """Sixteen hex digits that change with the spec of the figure and its values, which are rounded to nine digits."""
    about = {**asdict(figure), "file": Path(figure.file).name}
    text = json.dumps([about, data], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def figure_data(figure: FigureSpec, found: Sequence[Entry]) -> Data:
    """The values that are drawn: a dictionary for each cell of a heat map, or for each run.

    Raises:
        UserError: the figure names an unknown key or measure.
    """
    if isinstance(figure, HeatSpec):
        return _heat_data(figure, found)
    if isinstance(figure, LinesSpec):
        return _lines_data(figure, found)
    if isinstance(figure, CurvesSpec):
        return _places(figure, found, (figure.series,), ())
    return _places(figure, found, (figure.series, figure.note), figure.percent)


def _places(
    figure: ScatterSpec | CurvesSpec, found: Sequence[Entry], keys: Sequence[str], percent: Sequence[str]
) -> Data:
    """For each run its "x", its "y" with the interval, and the labels of some settings, by their keys."""
    chosen = choose(found, keys, (figure.x, figure.y), figure.where)
    if isinstance(figure, CurvesSpec):
        _check_rates(figure.y, chosen)
    data = []
    for entry in chosen:
        x = measure(entry, figure.x)
        place: dict[str, Any] = {"x": _rounded(x.value) if x else None, "y": _with_interval(measure(entry, figure.y))}
        data.append(place | _labels(entry, keys, percent))
    return data


def _lines_data(figure: LinesSpec, found: Sequence[Entry]) -> Data:
    """For each run its "x", its "y" with the interval, and the labels of its series and its x, by their keys."""
    keys = (figure.series, figure.x)
    chosen = choose(found, keys, (figure.y,), figure.where)
    _check_lines(figure, chosen)
    data = []
    for entry in chosen:
        place: dict[str, Any] = {"x": entry.settings.get(figure.x), "y": _with_interval(measure(entry, figure.y))}
        data.append(place | _labels(entry, keys, figure.percent))
    return data


def _with_interval(y: Value | None) -> list[float | None] | None:
    """Value, lower and upper end of a measure; None where the run does not have it."""
    return [_rounded(part) for part in (y.value, y.low, y.high)] if y else None


def _labels(entry: Entry, keys: Sequence[str], percent: Sequence[str]) -> dict[str, str]:
    """The labels of some settings of a run."""
    return {key: label(entry.settings.get(key), key in percent) for key in keys}


def _check_lines(figure: LinesSpec, chosen: Sequence[Entry]) -> None:
    """Refuse values that a logarithmic axis or an axis of rates cannot show, and means over more than seeds."""
    keys = (figure.series, figure.x)
    for seeds in grouped((tuple(label(entry.settings.get(key)) for key in keys), entry) for entry in chosen).values():
        check_alike(seeds)
        x = seeds[0].settings.get(figure.x)
        if not isinstance(x, int | float) or x <= 0:
            raise UserError(f"{figure.x!r} = {x!r} has no place on a logarithmic axis; choose another x, or a where")
        _check_rates(figure.y, seeds)


def _check_rates(name: str, found: Sequence[Entry]) -> None:
    """Refuse to show in % what is no rate."""
    if any(value.n is None for entry in found if (value := measure(entry, name))):
        raise UserError(f"{name!r} is no rate; a figure of lines or curves shows rates, in %")


def _heat_data(figure: HeatSpec, found: Sequence[Entry]) -> Data:
    data = []
    for block in figure.blocks:
        keys = (figure.rows, figure.columns)
        chosen = choose(found, keys, [block.measure], figure.where, block.kind)
        groups = grouped((tuple(label(entry.settings.get(key)) for key in keys), entry) for entry in chosen)
        for (row, column), seeds in groups.items():
            check_alike(seeds)
            values = [v.value for entry in seeds if (v := measure(entry, block.measure))]
            missing = "failed" if any(entry.state == "failed" for entry in seeds) else "not run"
            cell: dict[str, Any] = {
                "row": row.replace("`", ""),
                "column": column,
                "measure": block.heading,
                "missing": missing,
                "value": _rounded(mean(values)) if values else None,
                "seeds": len(values),
            }
            if not all(entry.backdoor for entry in seeds):
                cell["mark"] = NO_BACKDOOR_MARK
            data.append(cell)
    return data


def _rounded(value: float | None) -> float | None:
    """A value to nine digits, so that the last bits of a mean do not make a figure outdated."""
    return None if value is None else float(f"{value:.9g}")


def _size(figure: FigureSpec, data: Data) -> tuple[float, float]:
    """Width and height in inches; a heat map grows with its rows."""
    rows = len({(cell["row"], cell["measure"]) for cell in data}) if isinstance(figure, HeatSpec) else 0
    if isinstance(figure, HeatSpec):
        return (8.2, 0.42 * rows + 1.5)
    return (9.0, 5.0) if isinstance(figure, CurvesSpec) else (7.0, 3.8)


def _heat(axis: Axes, figure: HeatSpec, data: Data) -> None:
    """Draw a heat map with a row for each line of each block, from 0 to 1; green where the defence wins."""
    rows = list(dict.fromkeys((cell["row"], cell["measure"]) for cell in data))
    columns = list(dict.fromkeys(cell["column"] for cell in data))
    cells = {(cell["row"], cell["measure"], cell["column"]): cell for cell in data}
    values = [[_value(cells.get((*row, column))) for column in columns] for row in rows]
    shown = axis.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(columns)), [name.replace(", ", ",\n") for name in columns])
    axis.set_yticks(range(len(rows)), [f"{name} ({of}; {_seeds(data, name, of)})" for name, of in rows])
    # Write each value into its cell, or why there is none.
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            cell = cells.get((*rows[y], columns[x]), {"missing": "not run"})
            text = f"{value:.2f}{cell.get('mark', '')}" if not math.isnan(value) else cell["missing"]
            axis.text(x, y, text, ha="center", va="center", fontsize=9)
    # A line between blocks, whose measures differ.
    for y, ((_, above), (_, below)) in enumerate(pairwise(rows)):
        if above != below:
            axis.axhline(y + 0.5, color="black", linewidth=1.5)
    if axis.figure is not None:
        marked = any("mark" in cell for cell in data)
        legend = f"; {NO_BACKDOOR_MARK} no backdoor" if marked else ""
        axis.figure.colorbar(shown).set_label(f"{figure.scale}{legend}")


def _value(cell: dict[str, Any] | None) -> float:
    """A cell's value; NaN, which is drawn blank, where there is none."""
    return float("nan") if cell is None or cell["value"] is None else cell["value"]


def _seeds(data: Data, row: str, of: str) -> str:
    """Over how many seeds the cells of a row are means."""
    return _count(cell["seeds"] for cell in data if (cell["row"], cell["measure"]) == (row, of) and cell["seeds"])


def _count(numbers: Iterable[int]) -> str:
    """A number of seeds, or their least and greatest number, in words: "3 seeds", "1 to 3 seeds"."""
    found = set(numbers) or {0}
    return f"{counts(found)} seed{'s' * (max(found) != 1)}"


def _scatter(axis: Axes, figure: ScatterSpec, data: Data) -> None:
    """Draw a scatter: a mark with its interval for each run, and its note beside it."""
    there = [point for point in data if point["y"] and point["x"] is not None]
    places = [point["x"] for point in there]
    width = 0.04 * (max(places) - min(places)) if there else 0
    for i, name in enumerate(dict.fromkeys(point[figure.series] for point in there)):
        points = [point for point in there if point[figure.series] == name]
        x = [point["x"] for point in points]
        y = [point["y"][0] for point in points]
        below = [0.0 if low is None else at - low for at, low, _ in (point["y"] for point in points)]
        above = [0.0 if high is None else high - at for at, _, high in (point["y"] for point in points)]
        axis.errorbar(x, y, [below, above], fmt=MARKS[i % len(MARKS)], capsize=2, label=name)
        # Notes of the first series are above their marks, and those of others below, so that they do not overlap.
        up = -10 if i else 3
        for at, point in zip(zip(x, y, strict=True), points, strict=True):
            # A note goes to the left of its mark if there is a mark close by on the right.
            near = any(0 < a - at[0] < width and abs(b - at[1]) < 0.05 for a, b in zip(x, y, strict=True))
            axis.annotate(
                point[figure.note],
                at,
                xytext=(-5 if near else 5, up),
                textcoords="offset points",
                ha="right" if near else "left",
                fontsize=7,
            )
    axis.margins(x=0.08)
    axis.set(xlabel=figure.xlabel, ylabel=_with_missing(figure.ylabel, data, there), ylim=(0, 1.02))
    if there:
        axis.legend()


def _lines(axis: Axes, figure: LinesSpec, data: Data) -> None:
    """Draw lines: for each series a mark for each seed, and a line through the means over seeds."""
    there = [point for point in data if point["y"]]
    for name in dict.fromkeys(point[figure.series] for point in there):
        seeds: dict[float, list[float]] = {}
        for point in (point for point in there if point[figure.series] == name):
            seeds.setdefault(point["x"], []).append(100 * point["y"][0])
        places = sorted(seeds)
        of = _count(map(len, seeds.values()))
        line = axis.plot(places, [mean(seeds[x]) for x in places], label=f"{name} ({of})")
        each = [(x, y) for x in places for y in seeds[x]]
        axis.plot(*zip(*each, strict=True), "o", ms=4, alpha=0.6, color=line[0].get_color())
    ticks = {point["x"]: point[figure.x] for point in there}
    axis.set(xscale="log", xlabel=figure.xlabel, ylabel=_with_missing(figure.ylabel, data, there), ylim=(-3, 103))
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.minorticks_off()
    if there:
        axis.legend(fontsize=8)


def _curves(axis: Axes, figure: CurvesSpec, data: Data) -> None:
    """Draw curves: for each series a mark for each run, and a line through them from the least x to the greatest."""
    there = [point for point in data if point["y"] and point["x"] is not None]
    for i, name in enumerate(dict.fromkeys(point[figure.series] for point in there)):
        points = sorted((point for point in there if point[figure.series] == name), key=lambda point: point["x"])
        bold = name in figure.bold
        axis.plot(
            [point["x"] for point in points],
            [100 * point["y"][0] for point in points],
            marker=MARKS[i % len(MARKS)],
            markersize=7 if bold else 4,
            linewidth=3 if bold else 1,
            zorder=3 if bold else 2,
            color=HUES(i % HUES.N),
            label=name,
        )
    axis.set(xlabel=figure.xlabel, ylabel=_with_missing(figure.ylabel, data, there), ylim=(-3, 103))
    if there:
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _with_missing(text: str, data: Data, there: Data) -> str:
    """An axis label that also says how many runs are missing."""
    missing = len(data) - len(there)
    return f"{text} ({missing} of {len(data)} missing)" if missing else text
