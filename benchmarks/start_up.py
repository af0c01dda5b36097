"""The wall-clock time of commands that compute nothing, over that of an interpreter with the same console libraries."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.compare import Figure, Scale, alternate

WITHIN = 0.5
PLAIN = [sys.executable, "-c", "import typer, rich.table, pydantic, numpy"]


def figures(scale: Scale) -> Iterator[Figure]:
    """Help, lists, and a spec that is missing, no TOML, or wrong."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "torn.toml").write_text("[data\n", encoding="utf-8")
        (Path(folder) / "wrong.toml").write_text("[attack]\nname = 'bagnets'\n", encoding="utf-8")
        commands = {
            "--help": ["--help"],
            "list attacks": ["list", "attacks"],
            "list models": ["list", "models"],
            "a missing spec": ["run", f"{folder}/missing.toml"],
            "a spec that is no TOML": ["run", f"{folder}/torn.toml"],
            "a spec with a wrong name": ["run", f"{folder}/wrong.toml"],
        }
        for name, words in commands.items():
            ours = partial(run, [sys.executable, "-m", "vitrap.cli.main", *words])
            for work in (ours, partial(run, PLAIN)):  # once untimed: files come into the cache
                work()
            times = alternate(ours, partial(run, PLAIN), scale.repeats)
            yield Figure("start_up", name, *times, within=WITHIN, note="whole processes")


def run(command: list[str]) -> None:
    """A process from start to end; a refusal is an end, too."""
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode in (0, 2), done.stderr
