"""Every reader, fed any bytes: the outcome is a result or a `UserError`, within a second, and never anything else."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import vitrap
from tests.faults.commands import lay_out
from tests.faults.conftest import ALL, Tally
from tests.faults.damage import ENDLESS, ODD, contents
from vitrap.data import prepare as preparing
from vitrap.data.cache import read_folder
from vitrap.data.pattern import make_pattern
from vitrap.data.sources import decode
from vitrap.errors import UserError
from vitrap.experiment.answers import recall
from vitrap.experiment.checksums import damage, write_checksums
from vitrap.experiment.places import found_again
from vitrap.experiment.records import EARLIER, read_record, read_records
from vitrap.experiment.scores import read_scores
from vitrap.experiment.spec import load_defence, load_spec, read_spec
from vitrap.experiment.stages import read_stream
from vitrap.models.classifier import load_weights, read_model
from vitrap.report.page.make_page import make_page
from vitrap.report.study.collected import collect
from vitrap.report.study.fill_page import open_study
from vitrap.resuming import Checkpointer, Position, TrainingState
from vitrap.sweeps.estimate import estimate_runs
from vitrap.sweeps.grid import load_sweep

FORMATS = ("png", "jpeg", "bmp", "ppm", "gif", "webp", "tiff")


@dataclass(frozen=True)
class Reader:
    """What reads a file.

    Attributes:
        file: the file, as a glob pattern below the folder that `made` makes.
        read: reads it, and returns anything.
        tries: contents that are tried in a sample.
        most: seconds of processor time that it may take, which do not depend on what else the machine does.
    """

    file: str
    read: Callable[[Path], Any]
    tries: int = 40
    most: float = 1.0


def run_in(folder: Path) -> Path:
    return next(folder.glob("runs/small-*"))


def state() -> TrainingState:
    """A small piece of work, whose state is kept."""
    model = nn.Linear(2, 2)
    return TrainingState({"model": model}, torch.optim.SGD(model.parameters(), momentum=0.9), {}, torch.device("cpu"))


def keep_state(file: Path) -> None:
    work = state()
    sum(p.sum() for p in work.modules["model"].parameters()).backward()
    work.optimiser.step()
    Checkpointer(file)._write(file, work, Position(1, 2, None, {"loss": torch.ones(3)}, {"loss": [1, 2]}))


def prepared(folder: Path, name: str, source: str) -> Any:
    """Prepare a data set from an archive whose hash is that of the file that is there."""
    file = folder / source
    if file.is_file():
        origin = preparing.ORIGINS[name]
        archive = dataclasses.replace(origin.archives[0], md5=hashlib.md5(file.read_bytes()).hexdigest())
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(preparing.ORIGINS, name, dataclasses.replace(origin, archives=(archive,)))
            return preparing.prepare(name, str(file), folder / "cache")
    return preparing.prepare(name, str(file), folder / "cache")


def run_anew(folder: Path) -> Any:
    """Measure a run whose record is gone from its stages."""
    (run_in(folder) / "record.json").unlink(missing_ok=True)
    return vitrap.run(load_spec(folder / "plain.toml"), folder / "runs", device="cpu")


RECORD = "runs/small-*/record.json"
READERS = {
    "spec": Reader("spec.toml", lambda f: load_spec(f / "spec.toml")),
    "sweep": Reader("sweep.toml", lambda f: load_sweep(f / "sweep.toml")),
    "study": Reader("sweep.toml", lambda f: open_study(f / "sweep.toml", f / "runs").tables()),
    "record": Reader(RECORD, lambda f: read_record(run_in(f)), 80),
    "record, in a page": Reader(RECORD, lambda f: make_page(read_records(f / "runs"), "x", False)),
    "record, in a table": Reader(RECORD, lambda f: open_study(f / "sweep.toml", f / "runs").tables()),
    "record, ahead of a sweep": Reader(
        RECORD, lambda f: estimate_runs(load_sweep(f / "sweep.toml"), read_records(f / "runs"))
    ),
    "record, of a run to open": Reader(RECORD, lambda f: vitrap.open_run(run_in(f))),
    "records": Reader("kept/records.jsonl", lambda f: read_records(f / "kept")),
    "records, collected": Reader("kept/records.jsonl", lambda f: collect(f / "sweep.toml", f / "runs")),
    "failure": Reader("runs/small-*/failure.json", lambda f: read_records(f / "runs")),
    "model": Reader("runs/small-*/model.safetensors", lambda f: vitrap.open_run(run_in(f)), 80),
    "model alone": Reader("runs/small-*/model.safetensors", lambda f: read_model(run_in(f) / "model.safetensors")),
    "checkpoint": Reader("one.safetensors", lambda f: load_weights(nn.Linear(2, 2), f / "one.safetensors")),
    "trigger": Reader("runs/small-*/trigger.safetensors", lambda f: vitrap.open_run(run_in(f)), 80),
    "stream": Reader("runs/small-*/stream.safetensors", lambda f: read_stream(run_in(f), 0)),
    "scores": Reader("runs/small-*/scores/*", lambda f: read_scores(run_in(f), read_record(run_in(f)).defences[0])),
    "state": Reader("state.safetensors", lambda f: Checkpointer(f / "state.safetensors").resume(state())),
    "answer": Reader("runs/answers/*.json", lambda f: recall(read_spec(f / "plain.toml"), f / "runs", "cpu")),
    "places": Reader("runs/places.json", lambda f: found_again(load_spec(f / "plain.toml"), {"x": "0"}, f / "runs")),
    "checksums": Reader("summed/SHA256SUMS", lambda f: damage(f / "summed")),
    "earlier record": Reader("runs/small-*/record.earlier", run_anew, 4, most=5.0),
    "facts": Reader("runs/stages/victim-*/facts.json", run_anew, 4, most=5.0),
    "npy, images": Reader("data/squares/train_images.npy", lambda f: read_folder(f / "data" / "squares"), 80),
    "npy, labels": Reader("data/squares/train_labels.npy", lambda f: read_folder(f / "data" / "squares"), 80),
    "npy, groups": Reader("data/squares/train_groups.npy", lambda f: read_folder(f / "data" / "squares")),
    "classes": Reader("data/squares/classes.txt", lambda f: read_folder(f / "data" / "squares")),
    **{
        name: Reader(f"pictures/a.{name}", partial(lambda file, f: decode([f / file], 8), f"pictures/a.{name}"))
        for name in FORMATS
    },
    "picture of an attack": Reader(
        "pictures/a.png", lambda f: make_pattern(str(f / "pictures" / "a.png"), torch.Generator(), (3, 8, 8))
    ),
    "csv": Reader("signs/GT-final_test.csv", lambda f: prepared(f, "gtsrb", "signs")),
    "csv of Kaggle": Reader("kaggle/Test.csv", lambda f: prepared(f, "gtsrb", "kaggle")),
    "words": Reader("tiny/words.txt", lambda f: prepared(f, "tiny-imagenet", "tiny")),
    "wnids": Reader("tiny/wnids.txt", lambda f: prepared(f, "tiny-imagenet", "tiny")),
    "names of cifar": Reader("cifar/batches.meta.txt", lambda f: prepared(f, "cifar10", "cifar")),
    "annotations": Reader("tiny/val/val_annotations.txt", lambda f: prepared(f, "tiny-imagenet", "tiny")),
    "cifar": Reader("cifar/data_batch_1.bin", lambda f: prepared(f, "cifar10", "cifar")),
    "zip": Reader("tiny.zip", lambda f: prepared(f, "tiny-imagenet", "tiny.zip")),
    "tar": Reader("cifar.tar.gz", lambda f: prepared(f, "cifar10", "cifar.tar.gz")),
}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each reader."""
    folder = tmp_path_factory.mktemp("whole") / "work"
    folder.mkdir()
    lay_out(folder)
    (folder / "data" / "squares" / "classes.txt").write_text("a\nb\nc\nd\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITRAP_DATA", str(folder / "data"))
        vitrap.run(load_spec(folder / "plain.toml", ['defences=[{name="max_softmax"}]']), folder / "runs", device="cpu")
        vitrap.run(load_spec(folder / "plain.toml"), folder / "runs", device="cpu")
    collect(folder / "sweep.toml", folder / "runs")
    # Without checksums, as in runs of before, what is damaged reaches the readers; test_store.py has the checksums.
    for sums in folder.glob("runs/**/SHA256SUMS"):
        sums.unlink()
    record = json.loads((run_in(folder) / "record.json").read_text())
    failure = {key: record[key] for key in ("schema", "name", "hash", "seed", "spec")} | {"error": "it failed"}
    (run_in(folder) / "failure.json").write_text(json.dumps(failure))
    keep_state(folder / "state.safetensors")
    shutil.copy(folder / "state.safetensors", folder / "one.safetensors")
    shutil.copy(run_in(folder) / "record.json", run_in(folder) / EARLIER)
    (folder / "runs" / "places.json").write_text(json.dumps({"0": "../data/squares"}))
    (folder / "summed").mkdir()
    (folder / "summed" / "one").write_text("1")
    write_checksums(folder / "summed", ["one"])
    np.save(folder / "data" / "squares" / "train_groups.npy", np.arange(60) // 2)
    published(folder)
    return folder


def published(folder: Path) -> None:
    """Pictures, and data sets as they are published, but for their size."""
    image = Image.new("RGB", (9, 9), (200, 100, 0))
    (folder / "pictures").mkdir()
    for kind in FORMATS:
        image.save(folder / "pictures" / f"a.{kind}", kind)
    (folder / "signs" / "00000").mkdir(parents=True)
    image.save(folder / "signs" / "00000" / "00000_00000.ppm")
    image.save(folder / "signs" / "00000.ppm")
    (folder / "signs" / "GT-final_test.csv").write_text("Filename;Width;ClassId\r\n00000.ppm;9;0\r\n")
    (folder / "kaggle" / "Train" / "0").mkdir(parents=True)
    image.save(folder / "kaggle" / "Train" / "0" / "00000_00000_00000.png")
    (folder / "kaggle" / "Test").mkdir()
    image.save(folder / "kaggle" / "Test" / "00000.png")
    (folder / "kaggle" / "Test.csv").write_text("Width,ClassId,Path\n9,0,Test/00000.png\n")
    (folder / "cifar").mkdir()
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        (folder / "cifar" / name).write_bytes(bytes(3073))
    (folder / "cifar" / "batches.meta.txt").write_text("a\n" * 10)
    tiny = folder / "tiny"
    (tiny / "train" / "n1" / "images").mkdir(parents=True)
    (tiny / "val" / "images").mkdir(parents=True)
    (tiny / "wnids.txt").write_text("n1\n")
    (tiny / "words.txt").write_text("n1\tone\n")
    (tiny / "val" / "val_annotations.txt").write_text("v.png\tn1\t0\t0\t8\t8\n")
    for place in (tiny / "train" / "n1" / "images" / "t.png", tiny / "val" / "images" / "v.png"):
        image.save(place)
    for packed, source in (("zip", "tiny"), ("gztar", "cifar")):
        shutil.make_archive(str(folder / source), packed, folder / source)


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.setenv("VITRAP_DATA", str(tmp_path / "work" / "data"))
    return tmp_path / "work"


def outcome(read: Callable[[], Any], most: float) -> str:
    """What is wrong with how a reader ends; "" where it returns or refuses within `most` seconds."""
    begun = time.process_time()
    try:
        read()
    except UserError:
        pass
    except Exception as error:
        places = [
            frame for frame in traceback.extract_tb(error.__traceback__) if f"{os.sep}vitrap{os.sep}" in frame.filename
        ]
        where = f"{Path(places[-1].filename).name}:{places[-1].lineno}" if places else "?"
        return f"{type(error).__name__} at {where}: {str(error)[:100]}"
    took = time.process_time() - begun
    return "" if took < most else f"{took:.1f} s"


def check(
    inputs: st.SearchStrategy[Any], read: Callable[[Any], Any], tally: Tally, tries: int, most: float = 1.0
) -> None:
    """Feed a reader, and fail with an example of each wrong outcome."""
    found: dict[str, tuple[int, Any]] = {}
    tried = 0

    @settings(max_examples=25 * tries if ALL else tries, derandomize=True, database=None, phases=[Phase.generate])
    @given(inputs)
    def try_one(content: Any) -> None:
        nonlocal tried
        tried += 1
        if wrong := outcome(lambda: read(content), most):
            place = wrong.partition(": ")[0]
            found[place] = (found.get(place, (0,))[0] + 1, (wrong, content))

    try_one()
    wrong = sum(n for n, _ in found.values())
    tally("hostile inputs", tried, wrong)
    if wrong:
        lines = [f"{n} x {said}, of {content!r:.300}" for n, (said, content) in found.values()]
        pytest.fail(f"{wrong} of {tried} answered wrongly:\n" + "\n".join(lines), pytrace=False)


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_in_a_file(name: str, folder: Path, tally: Tally) -> None:
    reader = READERS[name]
    file = next(folder.glob(reader.file))
    valid = file.read_bytes()

    def read(content: bytes) -> Any:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        return reader.read(folder)

    outcome(lambda: read(valid), reader.most)  # so that what it imports is there
    assert outcome(lambda: read(valid), reader.most) == ""
    check(contents(valid, file.suffix), read, tally, reader.tries, reader.most)


KEYS = (
    "seed", "name", "base", "data", "data.limit", "data.size", "data.holdout", "model.depth", "model.name",
    "attack.size", "attack.poison_rate", "attack.target", "attack.name", "recipe.epochs", "recipe.lr",
    "defences", "a.b.c", "", ".",
)  # fmt: skip
VALUES = st.sampled_from([*map(json.dumps, ODD), *ENDLESS]) | st.text(max_size=50) | st.integers().map(str)
OVERRIDES = {
    "override": lambda text: load_spec(None, [text]),
    "defence's setting": lambda text: load_defence("strip", [text]),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_any_text_as_an_override(name: str, tally: Tally) -> None:
    keys = st.sampled_from([*KEYS, "copies", "alpha", "frr", "layer"]) | st.text(max_size=20)
    check(st.tuples(keys, VALUES).map("=".join) | st.text(max_size=80), OVERRIDES[name], tally, 200)


FREE = """
import os, sys, time
while True:
    time.sleep(0.5)
    try:
        os.close(os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK))
        print("freed", flush=True)
    except OSError:  # nobody reads it
        pass
"""


@contextmanager
def nobody_writes_to(pipe: Path) -> Iterator[list[str]]:
    """Ends the wait of whoever reads a pipe, and notes that somebody did.

    A process of its own does it, since who waits may hold the interpreter.
    """
    waited: list[str] = []
    watcher = subprocess.Popen([sys.executable, "-IS", "-c", FREE, pipe], stdout=subprocess.PIPE, text=True)
    try:
        yield waited
    finally:
        watcher.kill()
        if watcher.communicate()[0]:
            waited.append("it waits for a pipe")


def in_place(file: Path, kind: str) -> None:
    """Something else than a regular file."""
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    file.unlink(missing_ok=True)
    match kind:
        case "a pipe":
            os.mkfifo(file)
        case "a folder":
            file.mkdir()
        case "a device":
            file.symlink_to(os.devnull)
        case "a link to itself":
            file.symlink_to(file.name)
        case "a link to nothing":
            file.symlink_to("nothing")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file(name: str, folder: Path, tally: Tally) -> None:
    reader = READERS[name]
    file = next(folder.glob(reader.file))
    outcome(lambda: reader.read(folder), reader.most)  # so that what it imports is there
    wrong: dict[str, list[str]] = {}
    kinds = ("a pipe", "a folder", "a device", "a link to itself", "a link to nothing")
    for kind in kinds:
        in_place(file, kind)
        with nobody_writes_to(file) if kind == "a pipe" else nullcontext([]) as waited:
            said = outcome(lambda: reader.read(folder), reader.most)
        if found := [*filter(None, [said]), *waited]:
            wrong[kind] = found
    tally("hostile inputs", len(kinds), len(wrong))
    if wrong:
        pytest.fail("\n".join(f"{kind}: {', '.join(found)}" for kind, found in wrong.items()), pytrace=False)
