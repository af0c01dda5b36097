"""Calls of `vitrap`, each in a process of its own that is quick to start, and that may be disturbed (`forking.py`)."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cli.conftest import TINY

Within = tuple[str, int, int] | None
"""A kind of stage, a signal, and the training step of that stage in which it comes."""
Fault = tuple[str, int] | None
"""A kind of fault, and its number, as in `forking.py`."""


@dataclass
class Ended:
    """How a call ended: exit code (minus a signal's number), the operations on files, and all it said."""

    code: int
    operations: list[str]
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err

    @property
    def before_record(self) -> int:
        """How many operations were done until the record was there, that which brought it there included."""
        return max(
            n for n, what in enumerate(self.operations, 1) if what.startswith("rename") and ".record.json" in what
        )


class Forks:
    """Forks a `vitrap` for each call."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("forking.py")
        self.server: Any = subprocess.Popen(
            [sys.executable, script, "run", *TINY, "attack.name=badnets", "--device", "cpu"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.server.stdout.readline() == "ready\n"

    def run(self, out: Path, *words: str, dies_at: int = 0, within: Within = None, **environment: str) -> Ended:
        """A tiny run, killed at an operation on files, or sent a signal `within` the training of a kind of stage."""
        words = ("run", *TINY, *words, "--device", "cpu", "--out", str(out))
        return self.call(out, list(words), ("kill", dies_at), within, **environment)

    def call(  # noqa: PLR0913 - each is one way to disturb it
        self,
        folder: Path,
        words: list[str],
        fault: Fault = None,
        within: Within = None,
        at: Path | None = None,
        **environment: str,
    ) -> Ended:
        """`vitrap WORDS`, with a fault at its work below `folder`, or sent a signal `within` the training of a stage.

        `at` is the folder in which it works.
        """
        call = {
            "words": words,
            "folder": str(folder),
            "fault": fault,
            "within": within,
            "at": at and str(at),
            "environment": environment,
        }
        self.server.stdin.write(json.dumps(call) + "\n")
        self.server.stdin.flush()
        return Ended(*json.loads(self.server.stdout.readline()))

    def close(self) -> None:
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait()
