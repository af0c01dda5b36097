"""Where lines and marks of the charts stand; the template draws them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitrap.experiment.record import Record
from vitrap.report.page.summary import Run

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 44
CHART_WIDTH, CHART_HEIGHT = 220, 90
NARROW = 2.0
"""Least span of the PSNR axis, dB."""
KINDS = 6
"""Colours, and shapes, that marks have."""
ROLES = ("victim", "twin", "surrogate")
RATES = {"cda": "clean accuracy (CDA)", "asr": "attack success (ASR)"}
"""Curves that are rates on held-out images."""


@dataclass(frozen=True)
class Tick:
    """A mark of an axis: where, and its number."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A run in the scatter chart."""

    run: Run
    x: float
    y: float
    low: float
    high: float
    shape: int
    colour: int


@dataclass(frozen=True)
class Scatter:
    """ASR over PSNR."""

    marks: tuple[Mark, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    legend: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Line:
    """A model's curve: its points, and what it ends at."""

    role: str
    points: str
    last: str


@dataclass(frozen=True)
class Chart:
    """One term of some models by epoch."""

    title: str
    epochs: int
    top: str
    bottom: str
    lines: tuple[Line, ...]


def ticks(low: float, high: float, wanted: int = 6) -> tuple[float, ...]:
    """Round numbers that span a range, the outer ones at or beyond its ends.

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
    """A pair of shape and colour for each name, all different as long as there are pairs.

    >>> styles(["b", "a"])
    {'a': (0, 0), 'b': (1, 1)}
    """
    return {name: (i % KINDS, (i + i // KINDS) % KINDS) for i, name in enumerate(sorted(set(names)))}


def to_scatter(runs: Sequence[Run]) -> Scatter | None:
    """A mark for each run, None without any."""
    if not runs:
        return None
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
    return Scatter(
        tuple(marks),
        tuple(Tick(across(value), f"{value:g}") for value in axis),
        tuple(Tick(up(share / 100), str(share)) for share in range(0, 101, 20)),
        tuple((name, *pair) for name, pair in look.items()),
    )


def to_charts(record: Record) -> tuple[Chart, ...]:
    """A chart for each term of a record's curves, the models of the run together; rates first."""
    found: dict[str, dict[str, list[float]]] = {}
    for role, terms in record.curves.items():
        for term, values in terms.items():
            if values:
                found.setdefault(term, {})[role] = values
    order = [term for term in RATES if term in found] + [term for term in found if term not in RATES]
    return tuple(_chart(term, found[term], record.data.n_curves) for term in order)


def _chart(term: str, curves: Mapping[str, Sequence[float]], counts: Mapping[str, int]) -> Chart:
    rate = term in RATES
    low, high = (0.0, 1.0) if rate else span([value for curve in curves.values() for value in curve])
    lines = tuple(
        Line(role, points(curve, low, high), f"{100 * curve[-1]:.1f} %" if rate else f"{curve[-1]:.4g}")
        for role, curve in curves.items()
    )
    title = RATES.get(term, term.replace("_", " "))
    if rate:
        title += f", {counts[term]} held-out images" if term in counts else ", held-out images"
    ends = ("100 %", "0 %") if rate else (f"{high:.3g}", f"{low:.3g}")
    return Chart(title, max(map(len, curves.values())), *ends, lines)


def span(values: Sequence[float]) -> tuple[float, float]:
    """The range of a loss chart: from 0 where nothing is below it.

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
