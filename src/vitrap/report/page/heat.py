"""Makes the heat map of attacks and defences; each cell has the main measure of the defence's kind."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vitrap.experiment.defence_rows import FilterRow, JudgementRow, RepairRow, Row, ScreenRow, row_settings
from vitrap.metrics.values import Rate
from vitrap.report.page.summary import Run, text

MAIN_MEASURE = {"screen": "AUROC", "filter": "AUROC", "repair": "DER", "judgement": "score"}
SCREENED = "screened"
STEPS = 4
"""Number of colours on either side of the middle."""
BROKEN = 0.1
"""A repair gets a warning sign if it loses more clean accuracy than this."""
NO_BACKDOOR_NOTE = "⚠ no backdoor"
"""Marks figures of a defence that had no backdoor to find."""


@dataclass(frozen=True)
class HeatCell:
    """A cell of the heat map: the mean over the runs of an attack.

    Attributes:
        value: the mean, as text.
        n: number of runs.
        step: colour, from -4 over 0 (chance, no effect) to 4.
        notes: further measures, a line each.
    """

    value: str
    n: int
    step: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class HeatRow:
    """A row of the heat map: a defence with its settings; the cell is None for an attack that it was not tried on."""

    defence: str
    settings: str
    kind: str
    measure: str
    cells: tuple[HeatCell | None, ...]


@dataclass(frozen=True)
class HeatMap:
    """The heat map; each column is an attack on a data set."""

    columns: tuple[tuple[str, str], ...]
    lines: tuple[HeatRow, ...]


def to_heat(runs: Sequence[Run]) -> HeatMap:
    """The heat map of all runs, with means over the runs of an attack on a data set."""
    tried = [(run, row) for run in runs for row in run.defences]
    columns = tuple(sorted({(run.attack, run.data) for run, _ in tried}))
    named = setting_names([row for _, row in tried])
    groups: dict[tuple[str, ...], list[tuple[Row, bool]]] = defaultdict(list)
    for run, row in tried:
        groups[row.kind, row.name, describe(row, named), run.attack, run.data].append((row, run.backdoor))
    order = list(MAIN_MEASURE)
    lines = sorted({key[:3] for key in groups}, key=lambda line: (order.index(line[0]), *line[1:]))
    return HeatMap(
        columns,
        tuple(
            HeatRow(name, own, kind, MAIN_MEASURE[kind], tuple(to_cell(groups[kind, name, own, *c]) for c in columns))
            for kind, name, own in lines
        ),
    )


def setting_names(rows: Sequence[Row]) -> Mapping[str, tuple[str, ...]]:
    """For each defence, the settings that differ between rows; `screened` is always one where a row states it."""
    values: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        for key, value in row_settings(row).items():
            values[row.name][key].add(text(value))
    return {
        name: tuple(k for k, seen in table.items() if len(seen) > 1 or k == SCREENED) for name, table in values.items()
    }


def describe(row: Row, named: Mapping[str, tuple[str, ...]]) -> str:
    """Those settings of a row that are named for its defence, as text."""
    own = row_settings(row)
    return ", ".join(f"{key} {text(own[key])}" for key in named.get(row.name, ()) if key in own)


def to_cell(tried: Sequence[tuple[Row, bool]]) -> HeatCell | None:
    """The cell of some rows of one kind, each with whether its run has a backdoor; None without rows.

    A run without a backdoor takes the cell's colour away.
    """
    if not tried:
        return None
    rows = [row for row, _ in tried]
    without = sum(not backdoor for _, backdoor in tried)
    values = [measure_of(row) for row in rows]
    middle = statistics.fmean(values)
    # A judgement's score has no fixed range, so its colour is the share of models that are judged backdoored.
    judged = [row.backdoored for row in rows if isinstance(row, JudgementRow)]
    digits = 3 if judged else 2
    share = statistics.fmean(judged) if judged else 2 * middle - 1
    notes = notes_of(rows)
    if len(values) > 1:
        notes = [f"{min(values):.{digits}f} to {max(values):.{digits}f}", *notes]
    if without:
        notes = [f"{NO_BACKDOOR_NOTE} in {without} of {len(rows)}", *notes]
    step = 0 if without else max(-STEPS, min(STEPS, round(STEPS * share)))
    return HeatCell(f"{middle:.{digits}f}", len(values), step, tuple(notes))


def measure_of(row: Row) -> float:
    """The main measure of the row's kind."""
    match row:
        case ScreenRow() | FilterRow():
            return row.auroc.value
        case RepairRow():
            return row.der
        case JudgementRow():
            return row.score


def notes_of(rows: Sequence[Row]) -> list[str]:
    """Notes on rows of one kind: means of their other measures."""
    if screens := [row for row in rows if isinstance(row, ScreenRow)]:
        return _of_screens(screens)
    if filters := [row for row in rows if isinstance(row, FilterRow)]:
        return _of_filters(filters)
    if repairs := [row for row in rows if isinstance(row, RepairRow)]:
        return _of_repairs(repairs)
    return _of_judgements([row for row in rows if isinstance(row, JudgementRow)])


def _mean(rates: Iterable[Rate]) -> float:
    """The mean of some rates, in percent."""
    return 100 * statistics.fmean(rate.value for rate in rates)


def _of_screens(rows: Sequence[ScreenRow]) -> list[str]:
    return [f"clean twin {statistics.fmean(row.auroc_clean_model.value for row in rows):.2f}"]


def _of_filters(rows: Sequence[FilterRow]) -> list[str]:
    poison = _mean(row.tpr for row in rows)
    other = _mean(row.fpr for row in rows)
    return [f"flags {poison:.0f} % of poison, {other:.0f} % else"]


def _of_repairs(rows: Sequence[RepairRow]) -> list[str]:
    before = _mean(row.before.cda for row in rows)
    after = _mean(row.cda for row in rows)
    asr_before = _mean(row.before.asr for row in rows)
    asr = _mean(row.asr for row in rows)
    mark = "⚠ " if before - after > 100 * BROKEN else ""
    return [f"ASR {asr_before:.0f} → {asr:.0f} %", f"{mark}CDA {before:.0f} → {after:.0f} %"]


def _of_judgements(rows: Sequence[JudgementRow]) -> list[str]:
    victims = sum(row.backdoored for row in rows)
    twins = sum(row.backdoored_clean_model for row in rows)
    twin = statistics.fmean(row.score_clean_model for row in rows)
    return [f"clean twin {twin:.3f}", f"judged backdoored: {victims} of {len(rows)}, twins {twins}"]
