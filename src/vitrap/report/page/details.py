"""All that a run's own section shows, from its record as far as it is there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitrap.experiment.named import defence_settings
from vitrap.report.frame import ABOUT_ROW, measured, settings
from vitrap.report.page.claims import model_of
from vitrap.report.page.figures import Chart, to_charts
from vitrap.report.page.heat import KINDS, MEASURE, NOTES, describe, setting_names
from vitrap.report.page.summary import Run, attempt, number, text
from vitrap.report.tables import defence_measures, measures

Measured = Sequence[tuple[str, str, str, str]]
Pair = tuple[str, str]


@dataclass(frozen=True)
class Tried:
    """A defence on this run: its name, settings, what it comes to, and all its measures.

    Attributes:
        own: the settings that tell it from the same defence tried another time.
    """

    name: str
    own: str
    settings: str
    kind: str
    outcome: str
    seconds: str
    rows: Measured


@dataclass(frozen=True)
class Detail:
    """A run's section.

    Attributes:
        parts: tables of names and values, by their headings.
    """

    run: Run
    model: str
    measures: Measured
    tried: tuple[Tried, ...]
    charts: tuple[Chart, ...]
    parts: Mapping[str, tuple[Pair, ...]]


def to_detail(run: Run, curves: bool = True) -> Detail:
    """What the section of a run shows."""
    record = run.record
    asked = {key: value for key, value in record["spec"].items() if key != "defences"}
    parts = {
        "Spec": pairs(asked),
        "Environment": pairs(record.get("environment")),
        "Data": pairs(record.get("data")),
        "What the attack reports": pairs(record.get("attack")),
        "Time": tuple((key, _seconds(value)) for key, value in pairs(record.get("seconds"))),
        "Memory": tuple((key, _bytes(value)) for key, value in pairs(record.get("memory"))),
        "Arithmetic and stages": pairs({k: record[k] for k in ("precision", "schema", "stages") if k in record}),
    }
    return Detail(
        run,
        text(attempt(model_of, record) or "not recorded"),
        attempt(measures, run.victim) or every_number(run.victim),
        tuple(to_tried(row, describe(row, setting_names(run.defences))) for row in run.defences),
        to_charts(record) if curves else (),
        {name: found for name, found in parts.items() if found},
    )


def pairs(table: Any) -> tuple[Pair, ...]:
    """Every value of a nested table by its dotted key."""
    if not isinstance(table, Mapping):
        return (("", text(table)),) if table else ()
    return tuple((key, text(value)) for key, value in settings(table))


def every_number(table: Mapping[str, Any]) -> Measured:
    """Rows for a part of a record that is not as this version writes it."""
    return [
        (
            name,
            f"{value:.6g}" if low is None or high is None else f"{value:.4f} [{low:.4f}, {high:.4f}]",
            "",
            text(n or ""),
        )
        for name, value, low, high, n in measured(table)
    ]


def to_tried(row: Mapping[str, Any], own: str) -> Tried:
    """A defence's row; one that is abridged, or of an unknown kind, shows what numbers it has."""
    value = number(attempt(MEASURE[row["kind"]], row)) if row["kind"] in KINDS else None
    notes = (attempt(NOTES[row["kind"]], [row]) or []) if row["kind"] in KINDS else []
    outcome = [] if value is None else [f"{KINDS[row['kind']]} {value:.3f}"]
    plain = {key: part for key, part in row.items() if key not in (*ABOUT_ROW, "seconds")}
    report = tuple((f"reports: {key}", said, "", "") for key, said in pairs(row.get("report")))
    whole = attempt(defence_measures, row)
    return Tried(
        row["name"],
        own,
        ", ".join(f"{key} {said}" for key, said in pairs(defence_settings(row)) if said != "none"),
        row["kind"],
        "; ".join([*outcome, *notes]),
        ", ".join(f"{key} {_seconds(said)}" for key, said in pairs(row.get("seconds"))),
        [*whole, *report] if whole else attempt(every_number, plain) or [],
    )


def _seconds(value: str) -> str:
    took = number(attempt(float, value))
    if took is None:
        return value
    return "under 0.1 s" if took < 0.1 else f"{took:.1f} s" if took < 600 else f"{took / 60:.0f} min"


def _bytes(value: str) -> str:
    size = number(attempt(float, value))
    return value if size is None else f"{size / 2**20:,.0f} MiB"
