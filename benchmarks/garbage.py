"""A small run of the command, over the same with Python's own ways of looking for garbage.

Ours looks for cycles seldom while it imports and computes, and not at all when it ends.
"""

import subprocess
import sys
from collections.abc import Iterator
from tempfile import TemporaryDirectory

from benchmarks.compare import Figure, Scale, alternate

RUN = ("data.limit=100", "recipe.epochs=1", "model.depth=1", "model.embed_dim=16", "model.num_heads=2")
OURS = "from vitrap.cli.main import process; process()"
PLAIN = f"import gc; gc.set_threshold = gc.freeze = lambda *_: None; {OURS}"


def figures(scale: Scale) -> Iterator[Figure]:
    """Whole processes, in turns after one that is not timed."""
    run(OURS)
    times = alternate(lambda: run(OURS), lambda: run(PLAIN), scale.repeats)
    note = " ".join(["vitrap run", *RUN])
    yield Figure("garbage", "a small run over one that looks for garbage as Python does", *times, note=note)


def run(code: str) -> None:
    """A run from nothing, by a process that begins with `code`."""
    with TemporaryDirectory() as folder:
        words = ["run", *RUN, "--out", folder, "--device", "cpu"]
        subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)
