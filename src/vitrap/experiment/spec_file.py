"""Reads specs' files and overrides as nested tables; spec.py checks what is in them. Imports no torch."""

import os
from codecs import BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitrap.errors import UserError, shown, unknown
from vitrap.files import open_file
from vitrap.formats import DEEPEST, Table, check_plain, parse_toml

KEPT_KEYS = {"attack": ("target",), "model": (), "surrogate": (), "test_surrogate": (), "data": ("limit",)}
"""Tables with a name; if an override changes the name, the table loses its other keys except these."""
DEFAULT_NAMES = {"attack": "ageb", "data": "digits"}
"""The names of tables that have no name."""
FOLDERS = "folders"
"""Key that `read_table` and `set_keys` add: the folder of the file that each text stands in, by its dotted key.

Only `spec_paths.located` knows which of these texts are paths, and that they are relative to that folder.
"""
NETWORKS = ("model", "surrogate", "test_surrogate")
MOST_BYTES = 2**16
"""Greatest size of a spec's file."""
ENCODINGS = {BOM_UTF32_LE: "UTF-32", BOM_UTF32_BE: "UTF-32", BOM_UTF16_LE: "UTF-16", BOM_UTF16_BE: "UTF-16"}
"""Encodings by the bytes that a file begins with; the first that fits holds."""
PAGE = ("page", "table", "figure")
"""Keys of a sweep's spec that say which tables and figures `vitrap table` makes of its records."""


def read_table(path: Path, seen: tuple[tuple[int, int], ...] = ()) -> Table:
    """Read a spec's file as a table; its keys replace those of the spec that its `base` names.

    Args:
        path: the file.
        seen: device and number of each file that led here by its `base`.

    Raises:
        UserError: a file is missing or not TOML, or is its own base.
    """
    text, identity = _read_text(path)
    if identity in seen:
        raise UserError(f"spec {str(path)!r} is its own base; remove the circle")
    try:
        table = parse_toml(text)
        check_plain(table)
    except UserError as error:
        raise UserError(f"spec {str(path)!r} cannot be read: {error}") from error
    if FOLDERS in table:
        raise unknown("key", FOLDERS, ["name", "seed", "data", *NETWORKS, "attack", "recipe", "defences"])
    table |= _folders(table, str(path.parent)) if path.parent != Path() else {}
    base = table.pop("base", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise UserError(f"base = {shown(base)} in spec {str(path)!r} must be the path of another spec")
    if len(seen) == DEEPEST:
        raise UserError(f"spec {str(path)!r} is the base of a base, more than {DEEPEST} times; leave some out")
    start = read_table(path.parent / base, (*seen, identity))
    start = {key: value for key, value in start.items() if key not in ("grid", *PAGE)}
    return lay_over(start, table)


def _read_text(path: Path) -> tuple[str, tuple[int, int]]:
    """The text of a spec's file, and the device and the number by which the system knows the file."""
    try:
        with open_file(path, MOST_BYTES) as file:
            content = file.read()
            found = os.fstat(file.fileno())
    except OSError as error:
        raise UserError(
            f"spec {shown(str(path), 300)} cannot be read: {error.strerror}; give the path of a TOML file"
        ) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = next((name for start, name in ENCODINGS.items() if content.startswith(start)), None)
        line = content.count(b"\n", 0, error.start) + 1
        why = f"it is {encoding}" if encoding else f"byte {content[error.start]:#04x} in line {line} is no UTF-8"
        raise UserError(f"spec {str(path)!r} cannot be read: {why}; save it as UTF-8") from error
    return text, (found.st_dev, found.st_ino)


def set_keys(table: Table, pairs: Sequence[tuple[list[str], Any]], folder: str = "") -> Table:
    """Set each value at its place in `table`, in place, and return the table; `folder` is that of paths among them."""
    # Names are set first, for a new name drops the other keys of its table.
    for keys, value in sorted(pairs, key=lambda pair: pair[0][1:] != ["name"]):
        new = nest(keys, value)
        lay_over(table, new)
        # A path that was set before had a folder of its own.
        lay_over(table, _folders(new, folder))
    return table


def lay_over(table: Table, over: Mapping[str, Any]) -> Table:
    """Merge `over` into `table` in place; a new name drops the other keys of its table."""
    for key, value in over.items():
        below = table.get(key)
        if not isinstance(value, Mapping) or not isinstance(below, dict):
            table[key] = value
            continue
        if key in KEPT_KEYS and "name" in value and value["name"] != below.get("name", DEFAULT_NAMES.get(key)):
            table[key] = below = {k: v for k, v in below.items() if k in KEPT_KEYS[key]}
        lay_over(below, value)
    return table


def parse_override(text: str) -> tuple[list[str], Any]:
    """The keys and the value of an override, `table.key=value`.

    Raises:
        UserError: it is not of that form.
    """
    if len(text.strip().splitlines()) > 1:
        raise UserError(f"override {shown(text)} has more than one line; give each key=value by itself")
    key, equals, value = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys) or len(keys) > DEEPEST or keys[0] == FOLDERS:
        raise UserError(f"override {shown(text)} is not of the form key=value or table.key=value")
    try:
        read = parse_toml(f"value = {value}")["value"]
    except UserError:
        return keys, value.strip()
    check_plain(read, ".".join(keys))
    return keys, read


def nest(keys: Sequence[str], value: Any) -> Table:
    """A nested table with `value` under these keys, and nothing else."""
    for key in reversed(keys):
        value = {key: value}
    return value


def _folders(table: Table, folder: str) -> Table:
    """A table that says of each text of `table` which folder a path there is relative to; empty where it has none."""
    parts = {key: value for key, value in table.items() if key in ("data", "attack", *NETWORKS)}
    found = {key: folder for key, value in leaves(parts) if isinstance(value, str)}
    return {FOLDERS: found} if found else {}


def leaves(table: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested table by its dotted key."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{place}{key}.")
        else:
            yield f"{place}{key}", value
