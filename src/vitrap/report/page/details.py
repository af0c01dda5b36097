"""Makes the content of a run's section of the report, from its record; what the record lacks is left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitrap.experiment.defence_rows import Row, row_settings
from vitrap.experiment.record import to_table
from vitrap.experiment.spec_file import leaves
from vitrap.report.page.claims import model_of
from vitrap.report.page.figures import Chart, to_charts
from vitrap.report.page.heat import MAIN_MEASURE, NO_BACKDOOR_NOTE, describe, measure_of, notes_of, setting_names
from vitrap.report.page.summary import Run, text
from vitrap.report.tables import MeasureLine, defence_measures, measures

Pair = tuple[str, str]


@dataclass(frozen=True)
class Tried:
    """A defence on this run, as the section shows it.

    Attributes:
        name: the defence's name.
        own: the settings by which it differs from other tries of the same defence.
        settings: all its settings.
        kind: its kind.
        outcome: its main measure, with notes.
        seconds: how long each step took.
        rows: all its measures, and what it reports.
    """

    name: str
    own: str
    settings: str
    kind: str
    outcome: str
    seconds: str
    rows: Sequence[MeasureLine]


@dataclass(frozen=True)
class Detail:
    """The content of a run's section.

    Attributes:
        run: the run.
        model: its network, in a line.
        measures: the measures of victim and twin.
        tried: its defences.
        charts: its curves.
        parts: tables of names and values, by heading.
    """

    run: Run
    model: str
    measures: Sequence[MeasureLine]
    tried: tuple[Tried, ...]
    charts: tuple[Chart, ...]
    parts: Mapping[str, tuple[Pair, ...]]


def to_detail(run: Run, curves: bool = True) -> Detail:
    """The section of a run; without `curves` its charts are left out."""
    record = run.record
    asked = {key: value for key, value in record.spec.items() if key != "defences"}
    parts = {
        "Spec": pairs(asked),
        "Environment": pairs(to_table(record.environment)),
        "Data": pairs(to_table(record.data)),
        "What the attack reports": pairs(record.attack),
        "Time": tuple((key, _seconds(value)) for key, value in record.seconds.items()),
        "Memory": tuple((key, _bytes(value)) for key, value in vars(record.memory).items()) if record.memory else (),
        "Arithmetic and stages": pairs({key: getattr(record, key) for key in ("precision", "schema", "stages")}),
    }
    return Detail(
        run,
        model_of(record),
        measures(run.victim),
        tuple(to_tried(row, describe(row, setting_names(run.defences)), run.backdoor) for row in run.defences),
        to_charts(record) if curves else (),
        {name: found for name, found in parts.items() if found},
    )


def pairs(table: Mapping[str, Any]) -> tuple[Pair, ...]:
    """Every value of a nested table by its dotted key."""
    return tuple((key, text(value)) for key, value in leaves(table))


def to_tried(row: Row, own: str, backdoor: bool) -> Tried:
    """A row of defences as the section shows it, marked where its run has no backdoor."""
    notes = [f"{MAIN_MEASURE[row.kind]} {measure_of(row):.3f}", *notes_of([row])]
    report = [(f"reports: {key}", value, "", "") for key, value in pairs(row.report)]
    return Tried(
        row.name,
        own,
        ", ".join(f"{key} {value}" for key, value in pairs(row_settings(row)) if value != "none"),
        row.kind,
        "; ".join(notes if backdoor else [NO_BACKDOOR_NOTE, *notes]),
        ", ".join(f"{key} {_seconds(took)}" for key, took in row.seconds.items()),
        [*defence_measures(row, backdoor), *report],
    )


def _seconds(took: float) -> str:
    """A time in words."""
    if took < 0.1:
        return "under 0.1 s"
    return f"{took:.1f} s" if took < 600 else f"{took / 60:.0f} min"


def _bytes(size: int | None) -> str:
    """An amount of memory in words."""
    return text(size) if size is None else f"{size / 2**20:,.0f} MiB"
