"""The memory limit: how many bytes the pixels of a data set may take. The user's choice; it changes no result."""

import os
import re
from fractions import Fraction

from vitrap.errors import UserError

MEMORY = 4 * 2**30
"""The default memory limit, in bytes."""
UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def memory_limit(default: int = MEMORY) -> int:
    """The number of bytes that the pixels of a data set may take in memory: `$VITRAP_MEMORY`, or else `default`.

    Raises:
        UserError: the variable holds no amount of memory.
    """
    chosen = os.environ.get("VITRAP_MEMORY")
    if not chosen:
        return default
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", chosen.strip().lower())
    if not parts or parts[2] not in UNITS:
        raise UserError(
            f"memory limit {chosen!r} is no amount of memory; give --memory or VITRAP_MEMORY as bytes, or with a unit"
            " (kB, MB, GB, TB, KiB, MiB, GiB, TiB): 4GB"
        )
    return int(Fraction(parts[1]) * UNITS[parts[2]])
