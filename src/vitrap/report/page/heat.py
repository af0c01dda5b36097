"""The map of attacks and defences: what each defence comes to, by its kind's own measure."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitrap.experiment.named import defence_settings
from vitrap.report.page.summary import Run, attempt, number, text

Row = Mapping[str, Any]
KINDS = {"screen": "AUROC", "filter": "AUROC", "repair": "DER", "judgement": "score"}
SCREENED = "screened"
STEPS = 4
"""Colours on either side of the middle."""
BROKEN = 0.1
"""A repair that costs more clean accuracy than this is marked."""


@dataclass(frozen=True)
class Cell:
    """The mean over some runs.

    Attributes:
        n: runs that the mean is over.
        step: colour, from -4 over 0 (chance, no effect) to 4.
        notes: what else to know of it.
    """

    value: str
    n: int
    step: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """A defence with its settings; a cell of an attack that it was not tried on is None."""

    defence: str
    settings: str
    kind: str
    measure: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Heat:
    """Columns are attacks, each on one data set."""

    columns: tuple[tuple[str, str], ...]
    lines: tuple[Line, ...]


def to_heat(runs: Sequence[Run]) -> Heat:
    """Means over all runs of an attack on a data set."""
    tried = [(run, row) for run in runs for row in run.defences if row["kind"] in KINDS]
    columns = tuple(sorted({(run.attack, run.data) for run, _ in tried}))
    named = setting_names([row for _, row in tried])
    groups: dict[tuple[str, str, str], dict[tuple[str, str], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for run, row in tried:
        line = (row["kind"], row["name"], describe(row, named))
        groups[line][run.attack, run.data].append(row)
    order = list(KINDS)
    lines = sorted(groups, key=lambda line: (order.index(line[0]), *line[1:]))
    return Heat(
        columns,
        tuple(
            Line(name, how, kind, KINDS[kind], tuple(to_cell(kind, groups[kind, name, how][c]) for c in columns))
            for kind, name, how in lines
        ),
    )


def setting_names(rows: Sequence[Row]) -> Mapping[str, tuple[str, ...]]:
    """Of each defence the settings that differ between rows; an unusual number of images is always one of them."""
    values: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        for key, value in defence_settings(row).items():
            values[row["name"]][key].add(text(value))
    return {
        name: tuple(k for k, seen in table.items() if len(seen) > 1 or k == SCREENED) for name, table in values.items()
    }


def describe(row: Row, named: Mapping[str, tuple[str, ...]]) -> str:
    """The settings of a row that differ between rows of its defence."""
    how = defence_settings(row)
    return ", ".join(f"{k} {text(how[k])}" for k in named.get(row["name"], ()) if k in how)


def to_cell(kind: str, rows: Sequence[Row]) -> Cell | None:
    """The mean of a kind's measure over some rows, None without any."""
    found = [(value, row) for row in rows if (value := number(attempt(MEASURE[kind], row))) is not None]
    if not found:
        return None
    values, kept = [value for value, _ in found], [row for _, row in found]
    middle = statistics.fmean(values)
    digits = 3 if kind == "judgement" else 2
    share = statistics.fmean(bool(row.get("backdoored")) for row in kept) if kind == "judgement" else 2 * middle - 1
    notes = attempt(NOTES[kind], kept) or []
    if len(values) > 1:
        notes = [f"{min(values):.{digits}f} to {max(values):.{digits}f}", *notes]
    return Cell(f"{middle:.{digits}f}", len(values), max(-STEPS, min(STEPS, round(STEPS * share))), tuple(notes))


def _mean(rows: Sequence[Row], rate: Callable[[Row], Any]) -> float:
    return 100 * statistics.fmean(rate(row)["value"] for row in rows)


def _of_screen(rows: Sequence[Row]) -> list[str]:
    return [f"clean twin {_mean(rows, lambda row: row['auroc_clean_model']) / 100:.2f}"]


def _of_filter(rows: Sequence[Row]) -> list[str]:
    return [
        f"flags {_mean(rows, lambda row: row['tpr']):.0f} % of poison, {_mean(rows, lambda row: row['fpr']):.0f} % else"
    ]


def _of_repair(rows: Sequence[Row]) -> list[str]:
    before = _mean(rows, lambda row: row["before"]["cda"])
    after = _mean(rows, lambda row: row["cda"])
    asr_before = _mean(rows, lambda row: row["before"]["asr"])
    asr = _mean(rows, lambda row: row["asr"])
    mark = "⚠ " if before - after > 100 * BROKEN else ""
    return [f"ASR {asr_before:.0f} → {asr:.0f} %", f"{mark}CDA {before:.0f} → {after:.0f} %"]


def _of_judgement(rows: Sequence[Row]) -> list[str]:
    victims = sum(row["backdoored"] for row in rows)
    twins = sum(row["backdoored_clean_model"] for row in rows)
    twin = statistics.fmean(row["score_clean_model"] for row in rows)
    return [f"clean twin {twin:.3f}", f"judged backdoored: {victims} of {len(rows)}, twins {twins}"]


MEASURE: Mapping[str, Callable[[Row], Any]] = {
    "screen": lambda row: row["auroc"]["value"],
    "filter": lambda row: row["auroc"]["value"],
    "repair": lambda row: row["der"],
    "judgement": lambda row: row["score"],
}
NOTES = {"screen": _of_screen, "filter": _of_filter, "repair": _of_repair, "judgement": _of_judgement}
