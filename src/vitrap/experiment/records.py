"""Many records at once: those of a folder of runs, or the abridged ones that documentation keeps.

Imports no torch.
"""

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from vitrap.errors import UserError
from vitrap.experiment.record import SCHEMA

FAILURE = "failure.json"
"""Beside where a record would be: why a run of a sweep failed."""
MOST = 1e100
"""No number of a record is greater: beyond it sums and differences would cease to be numbers."""
DEEPEST = 50


@dataclass(frozen=True)
class _Named:
    name: str


@dataclass(frozen=True)
class _Spec:
    data: _Named
    attack: _Named


Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class _Rate:
    value: Share
    low: Share
    high: Share
    n: Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True)
class _Victim:
    cda: _Rate
    asr: _Rate
    cda_clean_model: _Rate
    asr_clean_model: _Rate
    stealth: dict[str, Any]
    ra: _Rate | None = None


@dataclass(frozen=True)
class _Row:
    name: str
    kind: str
    params: dict[str, Any]


@dataclass(frozen=True)
class _Failure:
    """What a failure record cannot do without."""

    name: str
    hash: str
    seed: int
    spec: _Spec
    error: str
    schema: int = SCHEMA


@dataclass(frozen=True)
class _Record:
    """What a record cannot do without, also where documentation keeps it abridged."""

    name: str
    hash: str
    seed: int
    spec: _Spec
    victim: _Victim
    schema: int = SCHEMA
    defences: list[_Row] = field(default_factory=list)


_KINDS = {kind: TypeAdapter(kind) for kind in (_Record, _Failure)}


@dataclass(frozen=True)
class Found:
    """A record, or the failure record of a run that has none, and where it lies.

    Attributes:
        place: the run's folder; of an abridged record, its file.
        content: what `record.json` or `failure.json` holds.
    """

    place: Path
    content: dict[str, Any]


@dataclass(frozen=True)
class Shelf:
    """What a place holds.

    Attributes:
        records: one a run, in the order of their places.
        failures: of runs that ended with an error, whether or not an earlier record of theirs is there.
        skipped: one line for each file that was passed over: damaged, or of a newer vitrap.
    """

    records: tuple[Found, ...]
    failures: tuple[Found, ...]
    skipped: tuple[str, ...]


def read_records(place: str | Path) -> Shelf:
    """All records in a folder of runs, in a run's own folder, or in abridged form in `.json` and `.jsonl` files.

    Raises:
        UserError: there is no such file or folder.
    """
    place = Path(place)
    if not os.path.exists(place):  # False, too, of a name that no file can have
        raise UserError(f"records {str(place)!r} are not there; give a folder of runs, or make some with vitrap run")
    records, failures, skipped = [], [], []
    for where, text in _texts(place):
        kind, found = (_Failure, failures) if where.name == FAILURE else (_Record, records)
        try:
            content = _read(text, kind)
        except ValueError as error:
            skipped.append(f"{str(where)!r} is skipped: {error}")
        else:
            found.append(Found(where.parent if where.name in (FAILURE, "record.json") else where, content))
    return Shelf(tuple(records), tuple(failures), tuple(skipped))


def _read(text: bytes | OSError, kind: type[_Record] | type[_Failure]) -> dict[str, Any]:
    if isinstance(text, OSError):
        raise ValueError(f"it cannot be read ({text.strerror})") from text
    try:
        content = json.loads(text, parse_constant=_refuse, parse_int=_bounded(int), parse_float=_bounded(float))
        _shallow(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is damaged ({error})") from error
    schema = content.get("schema", SCHEMA) if isinstance(content, dict) else SCHEMA
    if isinstance(schema, int | float) and schema > SCHEMA:
        raise ValueError(f"it has schema {schema}, this vitrap reads up to {SCHEMA}; update vitrap")
    try:
        _KINDS[kind].validate_json(text, strict=True)
    except ValidationError as errors:
        error = errors.errors()[0]
        raise ValueError(f"it is damaged ({'.'.join(map(str, error['loc']))}: {error['msg']})") from errors
    return content


def _shallow(content: Any) -> None:
    """Refuse what is nested so deep that no record is, before anybody goes down there."""
    level, depth = [content] if isinstance(content, dict | list) else [], 0
    while level:
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(inner, dict | list)]  # fmt: skip
        if (depth := depth + 1) > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")


def _bytes(file: Path) -> bytes:
    """What a file holds; a pipe would never end."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no file")
    return file.read_bytes()


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no finite number")


def _bounded(kind: type[int] | type[float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        number = kind(text)
        return number if abs(number) <= MOST else _refuse(text[:20])

    return read


def _texts(place: Path) -> Iterator[tuple[Path, bytes | OSError]]:
    """Each file that should hold a record, and each line of a file of many, in order."""
    if place.is_file():
        files = [place]
    else:
        own = [file for name in ("record.json", FAILURE) for file in (place / name, *place.glob(f"*/{name}"))]
        files = sorted({file for file in (*own, *place.glob("*.json"), *place.glob("*.jsonl")) if file.exists()})
    for file in files:
        try:
            content = _bytes(file)
        except OSError as error:
            yield file, error
            continue
        yield from ((file, text) for text in (content.splitlines() if file.suffix == ".jsonl" else [content]))
