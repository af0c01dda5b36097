"""Options that several commands share."""

import os
from typing import Annotated

import typer

from vitrap.memory import memory_limit


def _limit_memory(amount: str | None) -> str | None:
    """Put the limit into the environment, so that worker processes have it, too, and check it."""
    if amount is not None:
        os.environ["VITRAP_MEMORY"] = amount
        memory_limit()
    return amount


SpecWords = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SPEC] [KEY=VALUE ...]", help="a TOML spec (none: the embedded default), then overrides"),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="AMOUNT",
        callback=_limit_memory,
        help="data sets with more pixels than that (4GB, 512MiB, bytes) stay on disk; default: VITRAP_MEMORY, or 4GiB,"
        " on a GPU a quarter of its memory",
    ),
]
"""The limit is set by the callback, so a command takes this parameter and does nothing with it."""
