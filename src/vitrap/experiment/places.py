"""Where the files that runs were made from lie, so that a finished run finds its data from any folder.

A record has a path as its spec was written, which is relative to a file that may be gone. So a file beside the runs,
`places.json`, has for the SHA-256 of each file and folder its place relative to the folder of runs. Imports no torch.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from vitrap.experiment.records import PLACES
from vitrap.experiment.spec import Spec, parse_spec
from vitrap.experiment.spec_file import FOLDERS
from vitrap.experiment.spec_paths import set_leaf
from vitrap.experiment.store import locked
from vitrap.files import read_json, write_json


def keep_places(out: Path, spec: Spec) -> None:
    """Write down where the files that `spec` names are."""
    now = {content: os.path.relpath(spec.paths[key].place, out) for key, content in spec.contents().items()}
    if now.items() <= _read(out).items():
        return
    # Where the disk is full, say, the run is found by its path alone.
    with suppress(OSError), locked(out, PLACES):
        write_json(out / PLACES, {**_read(out), **now})


def found_again(spec: Spec, contents: Mapping[str, str], out: Path, data: str | None = None) -> Spec:
    """The spec of a finished run with its paths as they are today.

    Args:
        spec: the spec in the run's record.
        contents: the record's digests of the files, by dotted key.
        out: the folder of runs.
        data: the name of the data set, in place of the record's.
    """
    places = _read(out)
    moved = {} if data is None else {"data.name": data}
    for key, path in spec.paths.items():
        known = places.get(contents.get(key, ""))
        if key not in moved and known and path.content != contents.get(key) and (out / known).exists():
            moved[key] = f"{path.prefix}{out / known}"
    table = spec.located_table()
    for key, text in moved.items():
        set_leaf(table, key, text)
        table.get(FOLDERS, {}).pop(key, None)
    return parse_spec(table)


def _read(out: Path) -> dict[str, str]:
    """The places that are known; none where the file is missing or odd."""
    with suppress(OSError, ValueError):
        known = read_json(out / PLACES)
        if isinstance(known, dict) and all(isinstance(place, str) for place in known.values()):
            return known
    return {}
