"""Reads JSON and TOML that anybody may have written.

`check_plain` refuses values that a record could not hold: nested too deep, infinite, or of a type that JSON lacks.
`parse_json` calls it; who calls `parse_toml` does so too, with the key that the text belongs to.
"""

import json
import math
import re
import tomllib
from collections.abc import Mapping
from datetime import date, time
from functools import cache
from typing import TYPE_CHECKING, Any

from vitrap.errors import UserError, shown
from vitrap.printable import printable

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Table = dict[str, Any]
"""A table of TOML, or an object of JSON."""
DEEPEST = 50
"""Greatest depth of nesting."""
GREATEST = 1e100
"""Greatest number, of either sign: sums and differences of greater ones could overflow."""
MOST_DOTS = 200
"""Most dots in one part of a TOML line; the time that tomllib takes for a dotted key grows with their square."""


def parse_json(text: str | bytes) -> Any:
    """The content of a JSON text.

    Raises:
        UserError: it is no JSON, or not plain (`check_plain`). The message has no subject: the caller puts it before.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise UserError(f"it is nested more than {DEEPEST} deep") from error
    except ValueError as error:
        raise UserError(f"it is no JSON: {error}") from error
    check_plain(content)
    return content


def parse_toml(text: str) -> Table:
    """The content of a TOML text.

    Raises:
        UserError: it is no TOML, or a key is too long. The message has no subject: the caller puts it before.
    """
    if any(part.count(".") > MOST_DOTS for part in re.split(r"[=,\[\]{}\n]", text)):
        raise UserError(f"a key has more than {MOST_DOTS} dots")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise UserError(f"it is nested more than {DEEPEST} deep") from error
    except ValueError as error:  # beside TOML's own: an integer of more digits than Python reads
        raise UserError(f"it is not TOML: {error}") from error


@cache
def adapter(kind: Any) -> "TypeAdapter[Any]":
    """Pydantic's reader of a type, which is costly to make and so made once."""
    from pydantic import TypeAdapter  # imported here, for most commands that read a file need no types

    return TypeAdapter(kind)


def check_plain(content: Any, place: str = "") -> None:
    """Refuse what a record could not hold: deep nesting, numbers out of bounds, and values that JSON does not have.

    Args:
        content: tables (mappings), lists, text, numbers, true, false and None, in any nesting.
        place: the dotted key that leads to it, for the message.

    Raises:
        UserError: naming the dotted key of what is wrong.
    """
    level = [(place, content)]
    for _ in range(DEEPEST):
        below: list[tuple[str, Any]] = []
        for where, value in level:
            if isinstance(value, Mapping):
                below += ((f"{where}.{key}" if where else str(key), inner) for key, inner in value.items())
            elif isinstance(value, list | tuple):
                below += ((where, inner) for inner in value)
            else:
                _check_value(where or "it", value)
        level = below
    if level:
        raise UserError(f"{level[0][0][:40] or 'it'} is nested more than {DEEPEST} deep")


def _check_value(place: str, value: Any) -> None:
    """Refuse a single value that no record could hold."""
    if value is None or isinstance(value, str | bool):
        return
    place = " ".join(printable(place).split()) or "it"
    if isinstance(value, date | time):
        raise UserError(f"{place} = {value} is a date or a time; put a string in quotes")
    if not isinstance(value, int | float):
        raise UserError(f"{place} = {shown(value)} is of type {type(value).__name__}; give text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{place} = {value} is no finite number")
    if abs(value) > GREATEST:
        raise UserError(f"{place} = {shown(value)} is out of range: no number may be greater than {GREATEST:g}")
