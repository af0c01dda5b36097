"""`collect`: copies the records of a sweep, abridged, from a folder of runs to the file that a page is made from."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from vitrap.errors import UserError
from vitrap.experiment.record import Record, to_table
from vitrap.experiment.records import parse, read_records
from vitrap.files import check_folder, read_bytes, write_bytes
from vitrap.report.study.entries import current_hash, known_hash, records_by_hash
from vitrap.report.study.fill_page import check_below
from vitrap.report.study.layout import read_page
from vitrap.sweeps.grid import load_sweep

FILE = "records.jsonl"


@dataclass(frozen=True)
class Collected:
    """What `collect` has done.

    Attributes:
        file: the file of abridged records.
        new: number of runs that were added to it.
        superseded: number of runs whose record was replaced.
        missing: number of runs of the sweep that are neither in the file nor in the folder.
        skipped: one line for each record that could not be read.
    """

    file: Path
    new: int
    superseded: int
    missing: int
    skipped: tuple[str, ...]


def abridge(record: Record) -> Record:
    """A record without memory, machine and curves; `last` has the last values of the victim's curves."""
    versions = replace(record.environment, system="", device="", cores=0)
    curves = record.curves.get("victim", {})
    last = {name: curve[-1] for name, curve in curves.items() if curve} or record.last
    return replace(record, memory=None, environment=versions, curves={}, last=last)


def collect(spec: str | Path, runs: str | Path, out: str | Path | None = None) -> Collected:
    """Copy the records of a sweep's runs, abridged, from a folder of runs to the file that its page is made from.

    A record that is in the file already is replaced if that in `runs` is another; all other lines stay as they are.

    Args:
        spec: a TOML file with a `[grid]` and `page.records`.
        runs: the folder of runs.
        out: the folder below which the file may be written; None: the spec's folder.

    Raises:
        UserError: the spec is wrong or does not say where the records lie, the file may not or cannot be written there
            or has other things than records, or there is no folder of runs.
    """
    sweep = load_sweep(spec)
    records = read_page(sweep, Path(spec).parent).records
    if records is None:
        raise UserError(f"the spec of sweep {sweep.name!r} has no page.records: it does not say where to keep them")
    file = records / FILE
    check_below(file, Path(spec).parent if out is None else out)
    check_folder(records, f"folder {str(records)!r}", "name another as page.records in the spec")
    loaded = read_records(runs)
    known = records_by_hash(loaded)
    # The lines of the file, and on which line each run's record is.
    lines = _lines(file)
    kept = [_record(line) for line in lines]
    place = {current_hash(record): i for i, record in enumerate(kept) if record is not None}
    # Of the runs that the sweep names, those that are new, and those whose record has changed.
    wanted = list(dict.fromkeys(known_hash(point.spec, {*known, *place}) for point in sweep.points))
    taken = {key: abridge(known[key]) for key in wanted if key in known}
    new = [key for key in taken if key not in place]
    changed = [key for key in taken if key in place and kept[place[key]] != taken[key]]
    for key in changed:
        lines[place[key]] = _line(taken[key])
    if new or changed:
        records.mkdir(parents=True, exist_ok=True)
        lines += [_line(taken[key]) for key in new]
        write_bytes(file, "".join(f"{line}\n" for line in lines).encode())
    missing = [key for key in wanted if key not in taken and key not in place]
    return Collected(file, len(new), len(changed), len(missing), loaded.skipped)


def _lines(file: Path) -> list[str]:
    """The lines of a file of records; none where it is not there.

    Raises:
        UserError: it is no file of JSON lines.
    """
    try:
        lines = [line for line in read_bytes(file).decode().split("\n") if line]
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(file)!r} cannot be read ({error}); name another page.records in the spec") from error
    if lines and not any(line.startswith("{") for line in lines):
        raise UserError(f"{str(file)!r} is there, and has no records; name another page.records in the spec")
    return lines


def _record(line: str) -> Record | None:
    """The record in a line; None where it cannot be read, and the line stays as it is."""
    try:
        return parse(line.encode(), Record)
    except ValueError:
        return None


def _line(record: Record) -> str:
    """A record as a line of JSON."""
    return json.dumps(to_table(record))
