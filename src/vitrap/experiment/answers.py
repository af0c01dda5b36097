"""Whether a run was answered before, told without opening its data: what it rests on is known by path, size and time.

Beside the runs, the folder `answers` has a file for each question (a spec's table, a device): the run's folder, and of
everything that could change the answer a trace that is quick to take. Where a trace differs, the long way is taken,
which hashes content; the answer is then remembered anew. Imports no torch.
"""

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vitrap.data.cache import cache_folder
from vitrap.errors import UserError
from vitrap.experiment.code import PACKAGE, defending_code, fitting_code, measuring_code, training_code
from vitrap.experiment.record import Record
from vitrap.experiment.records import FAILURE, RECORD, read_record
from vitrap.experiment.rows import lacks_scores
from vitrap.experiment.spec import UNNAMED, digest
from vitrap.files import read_json, write_json

ANSWERS = "answers"
LIBRARIES = ("torch", "timm", "torchvision", "torchmetrics", "numpy")
Asked = Mapping[str, Any]
"""A spec as a nested table, before or after its defaults are filled in."""
Traces = dict[str, Any]


def recall(asked: Asked, out: Path, device: str) -> Record | None:
    """The record that answers, if nothing that it rests on has changed since; None where that is not certain."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        known = read_json(_place(asked, out, device))
        traces = traces_of(asked, device)
        folder = out / known["folder"]
        if traces is None or known["traces"] != traces or known["record"] != _trace(folder / RECORD):
            return None
        record = read_record(folder)
        if not any(lacks_scores(row, folder) for row in record.defences) and not (folder / FAILURE).exists():
            return record
    return None


def remember(asked: Asked, out: Path, device: str, folder: Path, traces: Traces | None) -> None:
    """Keep that the record in `folder` answers, by traces that were taken before the run began."""
    if traces is None:
        return
    place = _place(asked, out, device)
    with suppress(OSError):  # a full disk: the next call goes the long way
        known = {"folder": folder.name, "record": _trace(folder / RECORD), "traces": traces}
        place.parent.mkdir(exist_ok=True)
        write_json(place, known)


def traces_of(asked: Asked, device: str) -> Traces | None:
    """A trace of everything that may change the answer; None where something has none, as weights of the hub."""
    tables = {key: value for key, value in asked.items() if isinstance(value, Mapping)}
    attack, data = (tables.get(key, {}).get("name", UNNAMED[key]) for key in ("attack", "data"))
    defences = [row.get("name") for row in asked.get("defences", ())]
    method = PACKAGE / "attacks" / f"{attack}.py"
    against = [PACKAGE / "defences" / f"{defence}.py" for defence in defences]
    from_hub = any(table.get("pretrained") for table in tables.values())
    if from_hub or str(data).startswith("imagefolder:") or not all(file.is_file() for file in (method, *against)):
        return None
    return {
        "device": device,
        "versions": {library: version(library) for library in LIBRARIES},
        "machine": digest(list(_machine())),
        "code": [training_code(str(method)), fitting_code(str(method)), measuring_code()],
        "defences": [defending_code(str(file)) for file in against],
        "files": digest([[str(file), *_trace(file)] for file in _named(asked)]),  # no path of the machine's
    }


def _place(asked: Asked, out: Path, device: str) -> Path:
    return out / ANSWERS / f"{digest([asked, device])}.json"


def _trace(file: Path) -> list[int]:
    """Size and time of change, in nanoseconds."""
    about = file.stat()
    return [about.st_size, about.st_mtime_ns]


def _named(asked: Any) -> Iterator[Path]:
    """Files and data sets whose names stand anywhere in a table, by whole path."""
    if isinstance(asked, Mapping | list):
        for value in asked.values() if isinstance(asked, Mapping) else asked:
            yield from _named(value)
    elif isinstance(asked, str) and asked:
        with suppress(OSError, ValueError):  # no name that a file can have
            for place in (Path(asked.removeprefix("npy:")), cache_folder() / asked.removeprefix("npy:")):
                if place.is_file():
                    yield place.absolute()
                elif place.is_dir() and place != Path():
                    yield from (file.absolute() for file in sorted(place.iterdir()) if file.is_file())


def _machine() -> Iterator[str]:
    """What decides device and arithmetic, and whether there is LPIPS."""
    yield platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        yield from sorted({line for line in lines if line.startswith(("flags", "Features"))})
    yield from sorted(str(file) for file in Path("/dev").glob("nvidia*"))
    for name in ("CUDA_VISIBLE_DEVICES", "VITRAP_DATA", "TORCH_HOME", "XDG_CACHE_HOME"):
        yield os.environ.get(name, "")
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch")
    yield from sorted(file.name for file in Path(home).expanduser().glob("hub/checkpoints/alexnet-owt-*.pth"))
