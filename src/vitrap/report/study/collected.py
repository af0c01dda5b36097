"""The records that a page's tables are made from: abridged, one a line, kept beside the documentation."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrap.errors import UserError
from vitrap.experiment.records import read_records
from vitrap.files import write_bytes
from vitrap.report.study.entries import find, today
from vitrap.report.study.layout import read_page
from vitrap.sweeps.grid import load_sweep

FILE = "records.jsonl"
DROPPED = ("memory", "curves")
MACHINE = ("system", "device", "cores")
"""What a record says of the machine that is not kept."""


@dataclass(frozen=True)
class Collected:
    """What was taken from a folder of runs.

    Attributes:
        file: where the records are kept.
        new: runs that were not there.
        superseded: runs whose record is another now.
        missing: runs that the sweep names and that are neither there nor in the folder.
        skipped: one line for each record that could not be read.
    """

    file: Path
    new: int
    superseded: int
    missing: int
    skipped: tuple[str, ...]


def abridge(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without memory, machine and the history of its curves; `last` has where the victim's ended."""
    kept = {key: value for key, value in record.items() if key not in DROPPED}
    kept["environment"] = {k: v for k, v in record.get("environment", {}).items() if k not in MACHINE}
    curves = record.get("curves", {}).get("victim", {})
    return kept | ({"last": {name: curve[-1] for name, curve in curves.items() if curve}} if curves else {})


def collect(spec: str | Path, runs: str | Path) -> Collected:
    """Take the records that a sweep names from a folder of runs to where its page's lie, abridged.

    A run that is there already is superseded where its record in `runs` is another; everything else stays.

    Raises:
        UserError: the spec is wrong or does not say where the records lie, or there is no folder of runs.
    """
    sweep = load_sweep(spec)
    records = read_page(sweep, Path(spec).parent).records
    if records is None:
        raise UserError(f"the spec of sweep {sweep.name!r} has no page.records: it does not say where to keep them")
    shelf = read_records(runs)
    known, file = find(shelf), records / FILE
    kept = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    wanted = {point.spec.hash() for point in sweep.points}
    taken = {key: json.dumps(abridge(known[key])) for key in wanted if key in known}
    place = {_key(line): i for i, line in enumerate(kept)}
    new = [point.spec.hash() for point in sweep.points if point.spec.hash() in taken.keys() - place.keys()]
    changed = [key for key in taken.keys() & place.keys() if kept[place[key]] != taken[key]]
    for key in changed:
        kept[place[key]] = taken[key]
    if new or changed:
        records.mkdir(parents=True, exist_ok=True)
        write_bytes(file, "".join(f"{line}\n" for line in [*kept, *(taken[key] for key in new)]).encode())
    return Collected(file, len(new), len(changed), len(wanted - taken.keys() - place.keys()), shelf.skipped)


def _key(line: str) -> str:
    """What a line is found by; one that cannot be read stays, and is found by nothing."""
    try:
        return today(json.loads(line))
    except (ValueError, KeyError, TypeError):
        return ""
