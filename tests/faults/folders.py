"""What is in a folder that a command was at work in: whole or half, as before it, as after it, or something else."""

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open

from vitrap.experiment.checksums import CHECKSUMS
from vitrap.experiment.records import EARLIER

MEASURED = {"seconds", "poison_seconds", "memory"}
"""What no two runs have in common."""
CHOSEN = {"precision", "attention", "compiled"}
"""What `tune` chooses by the clock."""


@dataclass(frozen=True)
class Content:
    """The files of a folder by their relative paths; locks and answers, which only save time, do not count.

    Attributes:
        whole: what each whole file says, without what was measured by the clock.
        half: the other files, and what is wrong with each.
        drafts: hidden files and folders.
    """

    whole: Mapping[str, Any]
    half: Mapping[str, str]
    drafts: frozenset[str]


def look(folder: Path) -> Content:
    """The content of a folder."""
    whole: dict[str, Any] = {}
    half: dict[str, str] = {}
    drafts: set[str] = set()
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        name = "/".join(parts)
        if path.name.startswith("."):
            drafts.add(name)
        elif path.is_file() and not any(part.startswith(".") or part in ("locks", "answers") for part in parts):
            try:
                whole[name] = said(path)
            except Exception as error:
                half[name] = repr(error)
    return Content(whole, half, frozenset(drafts))


def said(file: Path) -> Any:
    """What a file says; an error where it is not whole."""
    match file.suffix:
        case ".json":
            return unmeasured(json.loads(file.read_text()))
        case ".jsonl":
            return [unmeasured(json.loads(line)) for line in file.read_text().splitlines()]
        case ".toml":
            content = tomllib.loads(file.read_text())
            return {**content, "recipe": {k: v for k, v in content["recipe"].items() if k not in CHOSEN}}
        case ".npy":
            array = np.load(file, allow_pickle=False)
            return array.dtype, array.shape, array.tobytes()
        case ".png":
            return Image.open(file).convert("RGBA").tobytes()
        case ".html":
            text = file.read_text()
            assert text.endswith("</html>"), text[-40:]
            return text
        case ".safetensors":
            with safe_open(file, "np") as tensors:
                return {name: tensors.get_tensor(name).tobytes() for name in tensors.keys()}  # noqa: SIM118 - no mapping
        case _ if file.name == CHECKSUMS:  # of files that hold what was measured by the clock
            return [line.partition("  ")[2] for line in file.read_text().splitlines()]
        case _:
            return file.read_bytes()


def unmeasured(content: Any) -> Any:
    """A record, or a part of it, without what was measured by the clock, and without sums of files that hold that."""
    if isinstance(content, dict):
        return {key: unmeasured(value) for key, value in content.items() if key not in MEASURED}
    if isinstance(content, list):
        return [unmeasured(value) for value in content]
    return "a sum" if isinstance(content, str) and len(content) == 64 and content.isalnum() else content


def wrong_between(before: Content, now: Content, after: Content, redone: tuple[str, ...]) -> Iterator[str]:
    """What is wrong with a folder whose content should be on its way from `before` to `after`."""
    for name, error in now.half.items():
        yield f"{name} is half written: {error}"
    for name, content in now.whole.items():
        wanted = [content.whole[name] for content in (before, after) if name in content.whole]
        # The record of before stands aside until the new one is there.
        if not wanted and not name.endswith(("failure.json", EARLIER)):
            yield f"{name} belongs to nothing"
        elif wanted and without_rows(content) not in map(without_rows, wanted):
            yield f"{name} is neither as before nor as it should become"
    for name in before.whole.keys() & after.whole.keys() - now.whole.keys() - now.half.keys():
        if not any(Path(name).match(pattern) for pattern in redone):
            yield f"{name} is gone"
    # A folder appears whole; that of a run is whole once its record is there.
    for folder in {str(Path(name).parent) for name in after.whole} - {"."}:
        files = {name for name in after.whole if str(Path(name).parent) == folder}
        there = files & now.whole.keys()
        record = f"{folder}/record.json"
        if there and there != files and (record in there or record not in files):
            yield f"{folder} is half: {', '.join(sorted(files - there))} not there"


def without_rows(content: Any) -> Any:
    """A record's rows of defences come one by one."""
    return {**content, "defences": ()} if isinstance(content, dict) and "defences" in content else content
