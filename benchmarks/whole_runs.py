"""The share of a whole command's wall-clock time inside forward, backward and optimiser: what is left is ours to lose.

A run is a process of its own, from the interpreter's start to its end, in which these calls are timed; on a CPU, where
a call is done when it returns. The loss is part of forward, clearing gradients part of the optimiser. Attacks and
measures count where they go through a network, nothing else does.
"""

import atexit
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.compare import Figure, Scale

WANTED = 0.85
RUNS = {
    "embedded default": (),
    "GTSRB, one epoch of the spec's eight": ("specs/ageb_gtsrb.toml", "recipe.epochs=1"),
}
"""One epoch is less matrix work beside the same start-up, data and measures: the whole spec's share is higher."""


def figures(scale: Scale) -> Iterator[Figure]:
    """The embedded default, and GTSRB where its data are in the cache."""
    for name, words in RUNS.items():
        found = [share((*words, *scale.run)) for _ in range(scale.runs)]
        if all(found):
            wall, inside = zip(*found, strict=True)
            note = " ".join(["vitrap run", *words, *scale.run])
            yield Figure("whole_runs", f"{name}: share inside", wall, inside, at_least=WANTED, speed=True, note=note)


def share(words: tuple[str, ...]) -> tuple[float, ...]:
    """Seconds of a whole run, and of those inside forward, backward and optimiser; () where its data are not there."""
    with TemporaryDirectory() as folder:
        kept = Path(folder) / "seconds.json"
        command = [sys.executable, "-m", "benchmarks.whole_runs", str(kept), *words, "--out", folder, "--device", "cpu"]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wall = time.perf_counter() - start
        if done.returncode == 2 and "data cache" in done.stderr:
            return ()
        done.check_returncode()
        return wall, sum(json.loads(kept.read_text(encoding="utf-8")).values())


def watch(kept: Path) -> None:
    """Run the command line with the calls timed; their seconds by name are written when it ends."""
    import torch
    from torch import nn

    from vitrap.cli.main import process
    from vitrap.models.classifier import Classifier

    seconds: dict[str, float] = {}
    inside = False

    def time_calls(owner: Any, name: str, label: str) -> None:
        plain = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:  # a call within another is part of it
                return plain(*args, **kwargs)
            inside, start = True, time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                inside = False
                seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)

    for owner, name in ((Classifier, "forward"), (nn.functional, "cross_entropy")):
        time_calls(owner, name, "forward")
    for owner, name in ((torch.Tensor, "backward"), (torch.autograd, "backward"), (torch.autograd, "grad")):
        time_calls(owner, name, "backward")
    for owner, name in (
        (torch.optim.AdamW, "step"),
        (torch.optim.SGD, "step"),
        (torch.optim.Optimizer, "zero_grad"),
        (nn.utils, "clip_grad_norm_"),
    ):
        time_calls(owner, name, "optimiser")
    atexit.register(lambda: kept.write_text(json.dumps(seconds), encoding="utf-8"))
    process()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    sys.argv = ["vitrap", "run", *sys.argv[2:]]
    watch(place)
