"""Paths that a spec names: where the files are, how a record speaks of them, and what stands for their content.

A relative path is relative to the file that it stands in; one of an override, or from Python, to the working folder.
Imports no torch.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import lru_cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from vitrap import registry
from vitrap.errors import UserError, shown
from vitrap.experiment.spec_file import DEFAULT_NAMES, FOLDERS, NETWORKS, leaves

PREFIXES = ("npy:", "imagefolder:")
"""How the name of a data set begins that is a path."""
CONTENT_FILES = {
    "npy:": ("*_images.npy", "*_labels.npy", "train_groups.npy", "classes.txt"),
    "imagefolder:": tuple(f"{part}/{'*/' * depth}*" for part in ("train", "val", "test") for depth in range(1, 4)),
}
"""Which files below the folder of a data set are its content, as patterns: those that are read."""


@dataclass(frozen=True)
class SpecPath:
    """A path as a spec has it.

    Attributes:
        written: the text in the spec, such as "npy:images" or "weights.safetensors".
        folder: the folder that it is relative to; "" for the working folder.
    """

    written: str
    folder: str = ""

    @property
    def prefix(self) -> str:
        """What stands before the path: "npy:", "imagefolder:" or ""."""
        return next((prefix for prefix in PREFIXES if self.written.startswith(prefix)), "")

    @property
    def place(self) -> Path:
        """Where the file or the folder is."""
        return Path(self.folder, os.path.expanduser(self.written.removeprefix(self.prefix)))

    @property
    def located(self) -> str:
        """The text with a path that is relative to the working folder."""
        return f"{self.prefix}{self.place}"

    @property
    def in_record(self) -> str:
        """The text for a record: as written, but an absolute path, which tells of a machine, as its last part alone."""
        path = Path(self.written.removeprefix(self.prefix))
        return f"{self.prefix}{path.name}" if path.is_absolute() else self.written

    @property
    def content(self) -> str | None:
        """The SHA-256 (hex) of the file, or of all files in the folder; None where it is not there."""
        try:
            files = tuple(_files(self.place, CONTENT_FILES.get(self.prefix, ())))
            return _digest(self.place, files) if files else None
        except (OSError, ValueError):  # a name that no file can have
            return None


def is_data_path(name: Any) -> bool:
    """Whether the name of a data set is a path: `npy:PATH` or `imagefolder:PATH`."""
    return isinstance(name, str) and name.startswith(PREFIXES)


def located(table: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, SpecPath]]:
    """The table of a spec with its paths relative to the working folder, and the paths as they are written.

    Returns:
        The table without `FOLDERS`, and each path by its dotted key.

    Raises:
        UserError: `FOLDERS` is no table of texts.
    """
    folders = table.get(FOLDERS, {})
    if not all(isinstance(folder, str) for folder in folders.values()):
        raise UserError(f"{FOLDERS} = {shown(folders)} must name a folder for each key")
    paths = {key: SpecPath(value, folders.get(key, "")) for key, value in leaves(table) if _is_path(table, key, value)}
    found = {key: deepcopy(value) for key, value in table.items() if key != FOLDERS}
    for key, path in paths.items():
        set_leaf(found, key, path.located)
    return found, paths


def _is_path(table: Mapping[str, Any], key: str, value: Any) -> bool:
    """Whether the value of a dotted key is a path."""
    part, _, name = key.partition(".")
    if not isinstance(value, str) or not value:
        return False
    if part in NETWORKS:
        return name in ("checkpoint", "weights")
    if part == "data":
        return name == "name" and is_data_path(value)
    if part != "attack" or name == "name":
        return False
    # Only the attack's own file knows which of its settings name files or data sets.
    attack = table["attack"].get("name", DEFAULT_NAMES["attack"])
    kinds = [registry.get("attacks", attack)] if attack in registry.names("attacks") else []
    about = next((f.metadata["param"] for kind in kinds for f in fields(kind) if f.name == name), None)
    return about is not None and ((about.file and value not in about.choices) or (about.data and is_data_path(value)))


def _files(place: Path, patterns: Iterable[str]) -> Iterator[tuple[str, int, int]]:
    """A file, or each file of a folder that matches, in order: path within the folder, size and time of change."""
    found = sorted(file for each in patterns for file in place.glob(each)) if place.is_dir() else [place]
    for file in found:
        if file.is_file() and not file.name.startswith("."):
            about = file.stat()
            yield os.path.relpath(file, place), about.st_size, about.st_mtime_ns


@lru_cache(maxsize=64)
def _digest(place: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    """The digest of these files; computed once for each size and time of change."""
    whole = sha256()
    for name, _, _ in files:
        with (place / name if place.is_dir() else place).open("rb") as file:
            content = file_digest(file, "sha256").hexdigest()
        if not place.is_dir():
            return content
        whole.update(f"{name} {content}\n".encode())
    return whole.hexdigest()


def set_leaf(table: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key, whose tables are there, in place."""
    *tables, last = key.split(".")
    for name in tables:
        table = table[name]
    table[last] = value


def folders_of(paths: Mapping[str, SpecPath]) -> dict[str, str]:
    """The folder of each path that is not relative to the working folder, by the path's dotted key."""
    return {key: path.folder for key, path in paths.items() if path.folder}
