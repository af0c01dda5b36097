"""An answered run: told without data, networks or torch, and only where nothing that it rests on has changed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.experiment.conftest import TINY, tiny
from vitrap.errors import UserError
from vitrap.experiment import answers
from vitrap.experiment import run as running
from vitrap.experiment.answers import ANSWERS, recall, traces_of
from vitrap.experiment.record import Record
from vitrap.experiment.run import run, run_folder
from vitrap.experiment.spec import Spec

Edit = Callable[[str], None]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    """A run on data and with a picture of one's own."""
    place = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for part, n in (("train", 60), ("test", 20)):
        np.save(place / f"{part}_images.npy", generator.integers(0, 256, (n, 16, 16, 3), np.uint8))
        np.save(place / f"{part}_labels.npy", np.arange(n) % 2)
    return tiny(
        "attack.name=megatron", f"data.name=npy:{place}", "attack.setting=clean-label", "attack.steps=0",
        "attack.poison_rate=0.5", "attack.cell=1", "data.holdout=0.3",
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(asked: Spec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    run(asked, out, device="cpu")
    return out


@pytest.fixture
def out(made: Path, asked: Spec, tmp_path: Path) -> Path:
    """A copy of the runs: a file's time of change goes with it."""
    shutil.copytree(made, tmp_path / "runs")
    assert recall(asked.located_table(), tmp_path / "runs", "cpu") is not None
    return tmp_path / "runs"


def data_of(spec: Spec) -> Path:
    return Path(spec.data.name.removeprefix("npy:"))


def test_an_answered_run_opens_nothing(asked: Spec, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_nothing(*_: Any) -> None:
        raise AssertionError("it opens the data")

    monkeypatch.setattr(running, "make_plan", open_nothing)
    record = run(asked, out, device="cpu")
    assert isinstance(record, Record)
    assert record.hash == asked.hash()
    with pytest.raises(AssertionError, match="opens the data"):
        run(asked, out, device="cpu", redo="victim")


@pytest.mark.parametrize("file", ["train_images.npy", "test_labels.npy"])
def test_changed_data_are_noticed_and_looked_at(asked: Spec, out: Path, file: str) -> None:
    path = data_of(asked) / file
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    try:
        assert recall(asked.located_table(), out, "cpu") is None
        record = run(asked, out, device="cpu")  # the long way: the content is the same
        assert record.seconds == recall(asked.located_table(), out, "cpu").seconds  # type: ignore[union-attr]
    finally:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("file", ["attacks/megatron.py", "train/loop.py", "experiment/measure.py"])
def test_changed_code_is_noticed(asked: Spec, out: Path, edit: Edit, file: str) -> None:
    edit(file)
    assert recall(asked.located_table(), out, "cpu") is None


def test_other_versions_are_noticed(asked: Spec, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "version", lambda library: "0")
    assert recall(asked.located_table(), out, "cpu") is None


def test_another_device_setting_or_defence_is_another_question(asked: Spec, out: Path) -> None:
    assert recall(asked.located_table(), out, "auto") is None
    assert recall(replace(asked, seed=1).table(), out, "cpu") is None
    assert recall({**asked.table(), "defences": [{"name": "max_softmax"}]}, out, "cpu") is None


def test_a_record_that_is_gone_or_another_is_noticed(asked: Spec, out: Path) -> None:
    file = run_folder(asked, out) / "record.json"
    text = file.read_text("utf-8")
    file.write_text(text + " ", "utf-8")
    assert recall(asked.located_table(), out, "cpu") is None
    file.unlink()
    assert recall(asked.located_table(), out, "cpu") is None


def test_a_failure_since_is_noticed(asked: Spec, out: Path) -> None:
    (run_folder(asked, out) / "failure.json").write_text("{}", "utf-8")
    assert recall(asked.located_table(), out, "cpu") is None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"folder": 3}', '{"folder": "a", "record": [], "traces": {}}'])
def test_a_damaged_memory_is_no_answer(asked: Spec, out: Path, damage: str) -> None:
    (file,) = (out / ANSWERS).iterdir()
    file.write_text(damage, "utf-8")
    assert recall(asked.located_table(), out, "cpu") is None


@pytest.mark.parametrize(
    "table",
    [
        {"data": {"name": "imagefolder:x"}},
        {"attack": {"name": "dbia", "other": "imagefolder:x"}},
        {"model": {"name": "vit_tiny_patch16_224", "pretrained": True}},
        {"attack": {"name": "of a plug-in"}},
        {"defences": [{"name": "of a plug-in"}]},
    ],
)
def test_what_leaves_no_trace_is_not_remembered(table: dict[str, Any]) -> None:
    assert traces_of({}, "cpu") is not None
    assert traces_of(table, "cpu") is None


@pytest.mark.parametrize("table", [{"attack": 3}, {"defences": 3}, {"defences": ["strip"]}, {"data": {"name": ["a"]}}])
def test_a_spec_that_is_wrong_is_left_to_be_refused(table: dict[str, Any], tmp_path: Path) -> None:
    assert recall(table, tmp_path, "cpu") is None


def test_the_command_answers_without_torch(tmp_path: Path) -> None:
    words = ["run", *TINY, "attack.name=badnets", "--device", "cpu", "--json"]
    code = f"import sys; sys.argv = ['vitrap', *{words!r}]; from vitrap.cli.main import app; app(standalone_mode=False)"
    tell = "print('torch' in sys.modules, file=sys.stderr)"
    first, second = (
        subprocess.run(
            [sys.executable, "-c", f"{code}; {tell}"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        for _ in range(2)
    )
    assert first.stderr.endswith("True\n")
    assert second.stderr == "False\n"
    assert second.stdout == first.stdout


def test_a_refused_run_leaves_no_answer(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run(tiny("attack.target=99"), tmp_path, device="cpu")
    assert not (tmp_path / ANSWERS).exists()
