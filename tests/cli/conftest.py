"""The command as its users call it, and as the same process can."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from vitrap.cli import console
from vitrap.cli.main import main

TINY = (
    "data.limit=100",
    "attack.poison_rate=0.1",
    "model.name=vit_tiny_patch16_224",
    "model.patch_size=8",
    "model.embed_dim=16",
    "model.depth=1",
    "model.num_heads=2",
    "recipe.epochs=1",
)


def command(*words: object) -> list[str]:
    """`vitrap WORDS`, without warnings of Python's passing unseen."""
    return [sys.executable, "-W", "error", "-m", "vitrap.cli.main", *map(str, words)]


def vitrap(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """What the command does in a process of its own, on a wide screen."""
    wide = {**os.environ, "COLUMNS": "250", **environment}
    return subprocess.run(command(*words), capture_output=True, text=True, env=wide)


@dataclass(frozen=True)
class Said:
    """How a call in this process ended, and what it said."""

    code: object
    out: str
    err: str


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`vitrap WORDS` in this process; without bars, which come or not with the machine's load."""
    monkeypatch.setattr(console, "PATIENCE", threading.TIMEOUT_MAX)

    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["vitrap", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return Said(end.value.code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A tiny run with --json, and its --out."""
    out = tmp_path_factory.mktemp("cli") / "runs"
    return vitrap("run", *TINY, "--json", "--device", "cpu", "--out", out), out
