"""The commands that write, each with what is there before it, as small as they can be."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPEC = """
name = "small"
[data]
name = "squares"
[model]
name = "vit_tiny_patch16_224"
patch_size = 4
embed_dim = 8
depth = 1
num_heads = 2
[attack]
name = "badnets"
poison_rate = 0.2
size = 2
[recipe]
epochs = 2
batch_size = 32
precision = "fp32"
"""
DEFENCES = """
[[defences]]
name = "max_softmax"
[[defences]]
name = "fine_tune"
epochs = 1
"""
GRID = "[grid]\nseed = [0, 1]\n"
STUDY = """
[page]
file = "page.md"
records = "kept"
[[table]]
part = "asr"
rows = "seed"
measures = "asr"
[[figure]]
kind = "scatter"
file = "cloud.png"
title = "A cloud"
x = "stealth.psnr_db"
y = "asr"
series = "data.name"
note = "seed"
xlabel = "PSNR, dB"
ylabel = "ASR"
"""
PAGE = "# A page\n\n<!-- asr -->\n<!-- /asr -->\n\nEnd.\n"
Words = tuple[str, ...]
RUN = ("run", "spec.toml", "--device", "cpu")
SWEEP = ("sweep", "sweep.toml", "--device", "cpu", "--workers", "1")
PREPARE = ("data", "prepare", "mine", "--from", "source")


@dataclass(frozen=True)
class Command:
    """A call that writes.

    Attributes:
        words: the call, made in a folder with the files of `lay_out`.
        before: calls that were made before it.
        change: what else is changed before it.
        again: the call that is made after a disturbed one; () for the same.
        several: it does several runs, each of which may fail: it says so line by line, and ends with 1 then.
        redone: glob patterns of files that it takes away before it makes them anew.
    """

    words: Words
    before: tuple[Words, ...] = ()
    change: Callable[[Path], object] = lambda folder: None
    again: Words = ()
    several: bool = False
    redone: tuple[str, ...] = ()


def lay_out(folder: Path) -> None:
    """Specs, a page, and two small data sets: one in the cache, another to prepare."""
    (folder / "spec.toml").write_text(SPEC + DEFENCES)
    (folder / "plain.toml").write_text(SPEC)
    (folder / "sweep.toml").write_text(SPEC + GRID + STUDY)
    (folder / "page.md").write_text(PAGE)
    write_squares(folder / "data" / "squares", 0)
    write_squares(folder / "source", 1)


def write_squares(folder: Path, seed: int) -> None:
    """A data set of 8 px noise, each class of its own grey."""
    draws = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for part, n in (("train", 60), ("test", 24)):
        labels = np.arange(n) % 4
        noise = draws.integers(0, 60, (n, 8, 8, 3))
        np.save(folder / f"{part}_images.npy", (noise + 60 * labels[:, None, None, None]).astype(np.uint8))
        np.save(folder / f"{part}_labels.npy", labels)


def age(folder: Path) -> None:
    """The measuring code has changed since: a run is measured anew."""
    for file in folder.glob("runs/*/record.json"):
        content = json.loads(file.read_text())
        content["stages"]["measure"] = "0" * 16
        file.write_text(json.dumps(content))
    shutil.rmtree(folder / "runs" / "answers", ignore_errors=True)


def renew_source(folder: Path) -> None:
    """Another data set is to be prepared under the same name."""
    shutil.rmtree(folder / "source")
    write_squares(folder / "source", 2)


PLAIN = ("run", "plain.toml", "--device", "cpu")
DEFEND = ("defend", "runs/small-*", "--defence", "max_softmax", "--device", "cpu")
TABLE = ("table", "sweep.toml", "--collect", "runs")
COMMANDS = {
    "run": Command(RUN),
    "run --force": Command((*RUN, "--force"), (RUN,), again=RUN, redone=("runs/small-*/*", "runs/stages/victim-*/*")),
    "run, measured anew": Command(PLAIN, (PLAIN, DEFEND), age, redone=("runs/small-*/*",)),
    "sweep": Command(SWEEP, several=True),
    "defend": Command(DEFEND, (PLAIN,)),
    "tune": Command(("tune", "spec.toml", "--device", "cpu")),
    "table": Command(TABLE, (SWEEP,)),
    "table, anew": Command(TABLE, (SWEEP, TABLE), age),
    "report": Command(("report", "runs", "-o", "report.html"), (PLAIN,)),
    "data prepare": Command(PREPARE),
    "data prepare, anew": Command(PREPARE, (PREPARE,), renew_source),
    "poison": Command(("poison", "spec.toml", "-o", "poisoned", "--device", "cpu")),
}
