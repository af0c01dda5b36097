"""Reads `record.json` files: one run's, those of a folder of runs, or the abridged ones in results/.

The classes are in record.py and defence_rows.py. Reading is strict: every key must be as docs/record.md says, and keys
that older versions of vitrap did not write have defaults. Imports no torch.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from vitrap.errors import UserError, shown
from vitrap.experiment.record import RECORD, SCHEMA, Failure, Record
from vitrap.files import read_bytes
from vitrap.formats import adapter, parse_json

PLACES = "places.json"
"""File beside the runs: where the files that they were made from lie."""
FAILURE = "failure.json"
"""File in a run's folder that says why a run of a sweep failed."""
EARLIER = "record.earlier"
"""File in a run's folder: its earlier record, while the run is being written anew."""
T = TypeVar("T", Record, Failure)


@dataclass(frozen=True)
class Found:
    """A record and where it was found: the run's folder or, of an abridged record, its file."""

    place: Path
    record: Record


@dataclass(frozen=True)
class Loaded:
    """All records that were read from a folder or a file.

    Attributes:
        records: one for each run, in the order of their paths.
        failures: of runs that ended with an error, whether or not they have an earlier record.
        skipped: one line for each file that could not be read: damaged, or of a newer version of vitrap.
    """

    records: tuple[Found, ...]
    failures: tuple[Failure, ...]
    skipped: tuple[str, ...]


def read_record(folder: Path, name: str = RECORD) -> Record:
    """The record in a run's folder; `name` is that of its file.

    Raises:
        UserError: there is none, it is damaged, or a later vitrap wrote it.
    """
    path = folder / name
    try:
        return parse(read_bytes(path), Record)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{str(folder)!r} holds no {RECORD}; give the folder of a finished run") from error
    except OSError as error:
        why = f"cannot be read ({error.strerror}); check its permissions"
        raise UserError(f"record {str(path)!r} {why}, or run its spec again") from error
    except ValueError as error:
        raise UserError(f"record {str(path)!r} {error}") from error


def read_records(place: str | Path) -> Loaded:
    """All records in a folder of runs, in a run's own folder, or in abridged form in `.json` and `.jsonl` files.

    Raises:
        UserError: there is no such file or folder.
    """
    place = Path(place)
    if not os.path.exists(place):  # also False for a name that no file can have
        raise UserError(f"records {str(place)!r} are not there; give a folder of runs, or make some with vitrap run")
    records: list[Found] = []
    failures: list[Failure] = []
    skipped: list[str] = []
    for file, text in _texts(place):
        try:
            if isinstance(text, OSError):
                raise ValueError(f"cannot be read ({text.strerror})")
            if file.name == FAILURE:
                failures.append(parse(text, Failure))
            else:
                records.append(Found(file.parent if file.name == RECORD else file, parse(text, Record)))
        except ValueError as error:
            skipped.append(f"{str(file)!r} is skipped: it {error}")
    return Loaded(tuple(records), tuple(failures), tuple(skipped))


def parse(text: bytes, kind: type[T]) -> T:
    """The record, or failure record, in a JSON text.

    Raises:
        ValueError: it is no JSON, not such a record, or of a later vitrap. The message has no subject: the caller puts
            the file's name before it.
    """
    try:
        content = parse_json(text)
    except UserError as error:
        raise _damaged(str(error)) from error
    # A later format may give the same keys another meaning.
    schema = content.get("schema") if isinstance(content, dict) else None
    if isinstance(schema, int | float) and schema > SCHEMA:
        raise ValueError(f"has schema {schema}, this vitrap reads up to {SCHEMA}; update vitrap")
    # The types of the classes decide about everything else.
    try:
        return adapter(kind).validate_json(text, strict=True, extra="forbid")
    except ValidationError as errors:
        error = errors.errors()[0]
        place = ".".join(map(str, error["loc"]))
        # A key without a field would be lost when the record is written again.
        if error["type"] == "unexpected_keyword_argument":
            raise ValueError(f"has a key {shown(place)} that this vitrap does not know; update vitrap") from errors
        raise _damaged(f"{place}: {error['msg']}") from errors


def _damaged(why: str) -> ValueError:
    return ValueError(f"is damaged ({' '.join(why.split())}); run its spec again with --force")


def _texts(place: Path) -> Iterator[tuple[Path, bytes | OSError]]:
    """Each file that should hold a record, in order, with its text; of a `.jsonl` file each line."""
    if not place.is_dir():
        files = [place]
    else:
        own = [file for name in (RECORD, FAILURE) for file in (place / name, *place.glob(f"*/{name}"))]
        others = (file for ending in ("json", "jsonl") for file in place.glob(f"*.{ending}") if file.name != PLACES)
        files = sorted({file for file in (*own, *others) if os.path.exists(file)})
    for file in files:
        try:
            content = read_bytes(file)
        except OSError as error:
            yield file, error
            continue
        yield from ((file, text) for text in (content.splitlines() if file.suffix == ".jsonl" else [content]))
