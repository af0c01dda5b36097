"""Finds the record of a run that was made before, in milliseconds: no data are opened, and nothing is hashed.

Beside the runs, the folder `answers` has a file for each pair of spec and device. It names the run's folder, and has a
trace of the files in it and of everything that could change the result: of a file its size and time of change, of code
a digest, of libraries their versions. If all traces are as they were, that run's record is the answer. If one differs,
`run` compares keys and checksums, which takes longer since it digests contents, and `remember` writes the file again.
This module imports no torch.
"""

import os
import platform
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vitrap.data.cache import cache_folder
from vitrap.errors import UserError
from vitrap.experiment.code import PACKAGE, defending_code, fitting_code, measuring_code, training_code
from vitrap.experiment.defence_rows import lacks_scores
from vitrap.experiment.record import Record
from vitrap.experiment.records import read_record
from vitrap.experiment.spec import digest
from vitrap.experiment.spec_file import DEFAULT_NAMES, FOLDERS
from vitrap.files import read_json, write_json

ANSWERS = "answers"
LIBRARIES = ("torch", "timm", "torchvision", "torchmetrics", "numpy")
SpecMapping = Mapping[str, Any]
"""A spec as a nested table, before or after its defaults are filled in."""
Traces = dict[str, Any]


def recall(spec: SpecMapping, out: Path, device: str, threads: int | None = None) -> Record | None:
    """The record of this spec's run if nothing that it rests on has changed since; None where that is not certain.

    Where `threads` is given, the run must have been made with so many.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        known = read_json(_answer_file(spec, out, device))
        traces = traces_of(spec, device)
        folder = out / known["folder"]
        if traces is None or known["traces"] != traces or known["files"] != _files_of(folder):
            return None
        record = read_record(folder)
        if threads not in (None, record.environment.threads):
            return None
        if not any(lacks_scores(row, folder) for row in record.defences):
            return record
    return None


def remember(spec: SpecMapping, out: Path, device: str, folder: Path, traces: Traces | None) -> None:
    """Write down that the record in `folder` is the result of a spec, with traces taken before the run began.

    Where `traces` is None, nothing is written.
    """
    if traces is None:
        return
    place = _answer_file(spec, out, device)
    with suppress(OSError):  # the disk may be full: the next call then compares keys
        known = {"folder": folder.name, "files": _files_of(folder), "traces": traces}
        place.parent.mkdir(exist_ok=True)
        write_json(place, known)


def traces_of(spec: SpecMapping, device: str) -> Traces | None:
    """A trace of everything that may change a spec's result.

    None where something leaves no trace: weights of the hub, folders of images, methods of other packages.
    """
    tables = {key: value for key, value in spec.items() if isinstance(value, Mapping)}
    attack = tables.get("attack", {}).get("name", DEFAULT_NAMES["attack"])
    folders = any(str(value).startswith("imagefolder:") for table in tables.values() for value in table.values())
    attack_file = PACKAGE / "attacks" / f"{attack}.py"
    defence_files = [PACKAGE / "defences" / f"{row.get('name')}.py" for row in spec.get("defences", ())]
    if folders or any(table.get("pretrained") for table in tables.values()):
        return None
    if not all(file.is_file() for file in (attack_file, *defence_files)):
        return None
    return {
        "device": device,
        "versions": {library: version(library) for library in LIBRARIES},
        "machine": digest(list(_machine_facts())),
        "code": [training_code(str(attack_file)), fitting_code(str(attack_file)), measuring_code()],
        "defences": [defending_code(str(file)) for file in defence_files],
        # A digest, so that no path of the machine is written.
        "files": digest([[str(file), *_size_and_time(file)] for file in _named_files(spec, _folders(spec))]),
    }


def _answer_file(spec: SpecMapping, out: Path, device: str) -> Path:
    """The file with the answer to a spec on a device."""
    return out / ANSWERS / f"{digest([spec, device])}.json"


def _size_and_time(file: Path) -> list[int]:
    """A file's size in bytes and its time of change in nanoseconds."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _files_of(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of each file in a run's folder: its record, its model, its trigger, ..."""
    return {file.name: _size_and_time(file) for file in folder.iterdir() if file.is_file()}


def _folders(spec: SpecMapping) -> set[Path]:
    """The folders that paths in the table are relative to, and the data cache."""
    return {Path(), cache_folder(), *map(Path, spec.get(FOLDERS, {}).values())}


def _named_files(spec: Any, folders: Collection[Path]) -> Iterator[Path]:
    """The absolute path of every file, and of every file of a data set, that a value of the table names."""
    if isinstance(spec, Mapping | list):
        for value in spec.values() if isinstance(spec, Mapping) else spec:
            yield from _named_files(value, folders)
    elif isinstance(spec, str) and spec:
        with suppress(OSError, ValueError):  # most texts are names that no file can have
            path = os.path.expanduser(spec.removeprefix("npy:"))  # unlike Path's, it leaves an unknown user's ~name
            for place in sorted(folder / path for folder in folders):
                if place.is_file():
                    yield place.absolute()
                elif place.is_dir() and place != Path():
                    yield from (file.absolute() for file in sorted(place.iterdir()) if file.is_file())


def _machine_facts() -> Iterator[str]:
    """Facts of the machine that decide device and arithmetic, and whether LPIPS is measured."""
    yield platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        yield from sorted({line for line in lines if line.startswith(("flags", "Features"))})
    yield from sorted(str(file) for file in Path("/dev").glob("nvidia*"))
    for name in ("CUDA_VISIBLE_DEVICES", "VITRAP_DATA", "TORCH_HOME", "XDG_CACHE_HOME"):
        yield os.environ.get(name, "")
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch")
    yield from sorted(file.name for file in Path(home).expanduser().glob("hub/checkpoints/alexnet-owt-*.pth"))
