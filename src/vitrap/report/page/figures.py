"""Computes the positions of marks, lines and ticks in the report's charts; the templates draw them as SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitrap.experiment.record import Record
from vitrap.report.page.summary import Run

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 44
CHART_WIDTH, CHART_HEIGHT = 220, 90
NARROW = 2.0
"""Least range of the PSNR axis, dB."""
N_STYLES = 6
"""Number of colours, and of shapes, of marks."""
ROLES = ("victim", "twin", "surrogate")
RATES = {"cda": "clean accuracy (CDA)", "asr": "attack success (ASR)"}
"""Curves that are rates on held-out images."""


@dataclass(frozen=True)
class Tick:
    """A tick of an axis: its position and its label."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A run in the scatter chart: its position, the ends of its interval, and its style."""

    run: Run
    x: float
    y: float
    low: float
    high: float
    shape: int
    colour: int


@dataclass(frozen=True)
class ScatterChart:
    """The chart of ASR over PSNR: marks, ticks of both axes, and the legend."""

    marks: tuple[Mark, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    legend: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Curve:
    """A model's curve: its points, and its last value."""

    role: str
    points: str
    last: str


@dataclass(frozen=True)
class Chart:
    """A chart of one term by epoch, with a line for each model."""

    title: str
    epochs: int
    top: str
    bottom: str
    lines: tuple[Curve, ...]


def ticks(low: float, high: float, wanted: int = 6) -> tuple[float, ...]:
    """Round numbers for the ticks of an axis, about `wanted` of them; the outer ones are at or beyond the range's ends.

    >>> ticks(18.3, 31.0, 4)
    (15.0, 20.0, 25.0, 30.0, 35.0)
    """
    rough = max((high - low) / wanted, 1e-9)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(f for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return tuple(round(step * i, 9) for i in range(first, max(last, first + 1) + 1))


def styles(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """A shape and a colour for each name; pairs repeat only after all of them are used.

    >>> styles(["b", "a"])
    {'a': (0, 0), 'b': (1, 1)}
    """
    return {name: (i % N_STYLES, (i + i // N_STYLES) % N_STYLES) for i, name in enumerate(sorted(set(names)))}


def to_scatter(runs: Sequence[Run]) -> ScatterChart | None:
    """The scatter chart, with a mark for each run; None without runs."""
    if not runs:
        return None
    # The axis of PSNR spans all runs, and is at least `NARROW` wide.
    values = [run.psnr for run in runs]
    spare = max(0.0, NARROW - (max(values) - min(values))) / 2
    axis = ticks(min(values) - spare, max(values) + spare)
    look = styles([run.attack for run in runs])

    def across(psnr: float) -> float:
        return round(LEFT + (psnr - axis[0]) / (axis[-1] - axis[0]) * (WIDTH - LEFT - RIGHT), 1)

    def up(share: float) -> float:
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    marks = []
    for run in runs:
        asr = run.victim.asr
        marks.append(Mark(run, across(run.psnr), up(asr.value), up(asr.low), up(asr.high), *look[run.attack]))
    return ScatterChart(
        tuple(marks),
        tuple(Tick(across(value), f"{value:g}") for value in axis),
        tuple(Tick(up(share / 100), str(share)) for share in range(0, 101, 20)),
        tuple((name, *pair) for name, pair in look.items()),
    )


def to_charts(record: Record) -> tuple[Chart, ...]:
    """A chart for each term of a record's curves, with a line for each model of the run; charts of rates come first."""
    found: dict[str, dict[str, list[float]]] = {}
    for role, terms in record.curves.items():
        for term, values in terms.items():
            if values:
                found.setdefault(term, {})[role] = values
    order = [term for term in RATES if term in found] + [term for term in found if term not in RATES]
    return tuple(_chart(term, found[term], record.data.n_curves) for term in order)


def _chart(term: str, curves: Mapping[str, Sequence[float]], counts: Mapping[str, int]) -> Chart:
    """The chart of a term, given each model's curve, and on how many images rates are measured."""
    rate = term in RATES
    low, high = (0.0, 1.0) if rate else span([value for curve in curves.values() for value in curve])
    lines = tuple(
        Curve(role, points(curve, low, high), f"{100 * curve[-1]:.1f} %" if rate else f"{curve[-1]:.4g}")
        for role, curve in curves.items()
    )
    title = RATES.get(term, term.replace("_", " "))
    if rate:
        title += f", {counts[term]} held-out images" if term in counts else ", held-out images"
    ends = ("100 %", "0 %") if rate else (f"{high:.3g}", f"{low:.3g}")
    return Chart(title, max(map(len, curves.values())), *ends, lines)


def span(values: Sequence[float]) -> tuple[float, float]:
    """The range of a loss chart, which includes 0.

    >>> span([2.0, 0.5]), span([-1.0, -1.0])
    ((0.0, 2.0), (-1.0, 0.0))
    """
    low = min(0.0, *values)
    high = max(0.0, *values)
    return (low, high) if high > low else (low, low + 1.0)


def points(curve: Sequence[float], low: float, high: float) -> str:
    """A curve as points of an SVG polyline, in whole pixels, y downwards.

    >>> points([1.0, 0.5, 0.0], 0.0, 1.0)
    '0,0 110,45 220,90'
    """
    wide = max(len(curve) - 1, 1)
    values = [*curve, curve[0]] if len(curve) == 1 else curve
    pairs = [
        (round(CHART_WIDTH * i / wide), round(CHART_HEIGHT * (high - value) / (high - low)))
        for i, value in enumerate(values)
    ]
    return " ".join(f"{x},{y}" for x, y in pairs)
