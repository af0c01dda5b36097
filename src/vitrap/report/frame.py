"""`load_records`: reads records into one pandas DataFrame, with a row for each run and measure."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pandas

from vitrap.experiment.defence_rows import Row, row_settings
from vitrap.experiment.record import Record
from vitrap.experiment.records import Found, read_records
from vitrap.experiment.spec_file import leaves
from vitrap.metrics.diagnosis import diagnose
from vitrap.metrics.values import Auroc, Centre, Rate

ABOUT_ROW = ("name", "kind", "version", "params", "screened", "key", "layer", "scores")
"""Keys of a row of `defences` that are not measures."""
Measured = tuple[str, float, float | None, float | None, int | None]
"""A measure's name and value and, where it has them, the ends of its interval and n."""


def load_records(place: str | Path = "runs") -> pandas.DataFrame:
    """Read all records in a folder of runs into a pandas DataFrame, with a row for each run and measure.

    Columns:

    - `run` (the run's folder), `name`, `hash`, `seed`;
    - `diagnosis`: the faults of the attack in a line, "" where the backdoor is in;
    - every setting of the spec by its dotted key (`attack.poison_rate`, `recipe.lr`, ...), missing where a run has no
      such setting;
    - `defence`, `defence.kind` and `defence.params` (its settings as JSON, with `screened` where it is not 1,000); all
      are "" for measures of the victim itself;
    - `measure`: the key of docs/record.md below `victim`, `attack`, `seconds`, `memory` or a row of `defences`, such as
      `asr`, `asr_clean_model`, `stealth.psnr_db`, `tpr_at_fpr.0.05`;
    - `value` and, of rates, `low`, `high` and `n`; where the record has mean and median, the value is the mean.

    Args:
        place: a folder of runs, one run's folder, or a `.json` or `.jsonl` file of records.

    Raises:
        UserError: there is no such place.

    Warns:
        UserWarning: for each record that is damaged or of a newer vitrap; it is left out, and counted in the frame's
            `attrs["skipped"]`.
    """
    loaded = read_records(place)
    for complaint in loaded.skipped:
        warnings.warn(complaint, stacklevel=2)
    frame = to_frame(loaded.records)
    frame.attrs["skipped"] = len(loaded.skipped)
    return frame


def to_frame(records: Sequence[Found]) -> pandas.DataFrame:
    """The DataFrame of some records; see `load_records` for its columns."""
    # One row for each run with its settings, and one for each measure, which are then joined.
    runs = pandas.DataFrame([_run(found) for found in records])
    lines = [(i, *line) for i, found in enumerate(records) for line in _lines(found.record)]
    columns = ["run", "defence", "defence.kind", "defence.params", "measure", "value", "low", "high", "n"]
    measures = pandas.DataFrame(lines, columns=columns)
    if not len(runs):
        return measures.assign(name="", hash="", seed=0, diagnosis="")
    measures = measures.astype({"value": float, "low": float, "high": float, "n": "Int64"})
    settings = runs.take(measures.pop("run")).reset_index(drop=True)
    return pandas.concat([settings, measures], axis="columns")


def _run(found: Found) -> dict[str, Any]:
    """The columns of a run: folder, name, hash, seed and settings."""
    record = found.record
    head = {"run": found.place.name, "name": record.name, "hash": record.hash, "seed": record.seed}
    faults = "; ".join(diagnose(record.victim, record.data.classes))
    settings = {key: value for key, value in leaves(record.spec) if key not in (*head, "defences")}
    return {**head, "diagnosis": faults, **settings}


def _lines(record: Record) -> Iterator[tuple[Any, ...]]:
    """A line for each measure of a record: defence, its kind and settings, and the measure."""
    yield from (("", "", "", *line) for line in of_run(record))
    for row in record.defences:
        own = json.dumps(row_settings(row))
        yield from ((row.name, row.kind, own, *line) for line in of_row(row))


def of_run(record: Record) -> Iterator[Measured]:
    """The measures of a run itself, without those of defences."""
    yield from measured(record.victim)
    yield from measured({"attack": record.attack, "seconds": record.seconds, "memory": record.memory})


def of_row(row: Row) -> Iterator[Measured]:
    """The measures of a row of defences."""
    return measured({key: value for key, value in vars(row).items() if key not in ABOUT_ROW})


def measured(thing: Any, place: str = "") -> Iterator[Measured]:
    """Every number in a part of a record by its dotted key, with its interval where it has one."""
    match thing:
        case Rate():
            yield place, thing.value, thing.low, thing.high, thing.n
        case Auroc():
            yield place, thing.value, thing.low, thing.high, None
        case Centre():
            yield place, thing.mean, None, None, None
        case int() | float():
            yield place, thing, None, None, None
        case _:
            parts = thing if isinstance(thing, Mapping) else vars(thing) if is_dataclass(thing) else {}
            for key, value in parts.items():
                yield from measured(value, f"{place}.{key}" if place else key)
