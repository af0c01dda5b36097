"""One odd record never hides the others: whatever one file holds, table, page and estimates are made of the rest."""

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.report.made import record, screen, write
from vitrap.experiment.records import Found, read_records
from vitrap.report.frame import load_records
from vitrap.report.page.make_page import make_page
from vitrap.sweeps.estimate import estimate_runs
from vitrap.sweeps.grid import load_sweep

Change = Callable[[dict[str, Any]], None]


def put(path: str, value: Any) -> Change:
    """Set what a dotted path leads to."""

    def change(content: dict[str, Any]) -> None:
        *way, last = path.split(".")
        for key in way:
            content = content.setdefault(key, {})
        content[last] = value

    return change


def drop(path: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        *way, last = path.split(".")
        for key in way:
            content = content[key]
        content.pop(last, None)

    return change


DEEP: dict[str, Any] = {}
for _ in range(200):
    DEEP = {"deeper": DEEP}

REFUSED = {
    "value a string": put("victim.asr.value", "0.5"),
    "value above 1": put("victim.asr.value", 1e5),
    "value huge": put("victim.asr.value", 1e308),
    "value true": put("victim.asr.value", True),
    "n a string": put("victim.asr.n", "450"),
    "n negative": put("victim.asr.n", -1),
    "n huge": put("victim.asr.n", 10**30),
    "n broken": put("victim.asr.n", 2.5),
    "asr null": put("victim.asr", None),
    "seed a string": put("seed", "5"),
    "seed true": put("seed", True),
    "integer of 400 digits": put("attack", {"a": 10**400}),
    "float out of bounds": put("victim.stealth.psnr_db", {"mean": 1e308, "median": 1.0}),
    "curves out of bounds": put("curves", {"victim": {"loss": [1e308, -1e308]}}),
    "deep": put("attack", DEEP),
    "defences null": put("defences", None),
    "a row without kind": put("defences", [{"name": "strip"}]),
    "schema of tomorrow": put("schema", 99),
    "schema of tomorrow, as a float": put("schema", 99.0),
    "schema a string": put("schema", "99"),
    "no victim": drop("victim"),
    "no attack": drop("spec.attack"),
    "attack a string": put("attack", "x"),
    "a row with an odd measure": put("defences", [screen() | {"auroc": {"value": "x"}}]),
    "a row of an unknown kind": put("defences", [{"name": "x", "kind": "y", "params": {"a": {"b": [1]}}}]),
    "a row without seconds": put("defences", [screen() | {"seconds": None}]),
    "a row with odd seconds": put("defences", [screen() | {"seconds": {"apply": "x"}}]),
    "seconds odd": put("seconds", {"victim": "x", "poison": None}),
    "seconds a list": put("seconds", [1]),
    "environment a string": put("environment", "x"),
    "curves odd": put("curves", {"victim": {"cda": "xx", "asr": [None, "a"], "loss": 5}}),
    "curves a list": put("curves", [1, 2]),
    "stealth odd": put("victim.stealth", {"psnr_db": [1, 2], "x": None}),
    "model odd": put("spec.model", [1, {"a": 2}]),
    "data odd": put("data", {"n_curves": "x"}),
    "data's attack odd": put("spec.attack.name", 5),
}
READ = {
    "attack's numbers odd": put("attack", {"a": {"value": "x"}, "b": {"mean": [1]}, "c": {"value": 0.5, "n": 2.5}}),
    "attack's rate with a huge n": put("attack", {"a": {"value": 0.5, "n": 10**30}}),
    "a row with odd settings": put("defences", [screen() | {"params": {"a": {"b": [1]}}}]),
    "no curves": drop("curves"),
    "no models": drop("models"),
    "no stages": drop("stages"),
    "no model": drop("spec.model"),
    "no recipe": drop("spec.recipe"),
    "no seed in the spec": drop("spec.seed"),
    "limit odd": put("spec.data.limit", ["x"]),
    "spec's defences odd": put("spec.defences", 5),
    "name odd": put("name", "\x1b[31mred[/bold]\u202e"),
    "hash odd": put("hash", "../../../x"),
}
TEXTS = {
    "empty": b"", "list": b"[]", "number": b"5", "latin": b"\xff\xfe{}", "nul": b"\0", "brackets": b"[" * 200_000,
    "newer": b'{"schema": 99}', "nan": b'{"seed": NaN}',
}  # fmt: skip


@pytest.fixture
def look(tmp_path: Path) -> Callable[[], tuple[set[str], int, str]]:
    """What everybody who reads the folder makes of it: runs in the frame, skipped files, the page."""
    (tmp_path / "sweep.toml").write_text('defences = [{name = "strip"}]\n[grid]\nseed = [0, 1]\n')
    sweep = load_sweep(tmp_path / "sweep.toml")

    def like(found: Found) -> Found:
        """A record of the sweep's own data, model and recipe, where it says anything of them."""
        spec = sweep.points[0].spec.table()
        own = {key: spec[key] for key in ("data", "model", "recipe") if key in found.record.spec}
        return replace(found, record=replace(found.record, spec={**found.record.spec, **own}))

    def look() -> tuple[set[str], int, str]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frame = load_records(tmp_path / "runs")
        loaded = read_records(tmp_path / "runs")
        assert all("\n" not in line for line in loaded.skipped)
        assert frame.attrs["skipped"] == len(loaded.skipped)
        estimate_runs(sweep, replace(loaded, records=tuple(map(like, loaded.records))))
        return set(frame["run"]), len(loaded.skipped), make_page(loaded, "runs").content.decode()

    return look


def good(folder: Path) -> str:
    return write(folder, record(number=7)).name


def beside(folder: Path, change: Change) -> str:
    """A changed record beside a good one, whose name is returned."""
    kept, odd = good(folder), record(number=8)
    change(odd)
    (folder / "odd").mkdir()
    (folder / "odd" / "record.json").write_text(json.dumps(odd))
    return kept


@pytest.mark.parametrize("name", REFUSED)
def test_a_record_that_cannot_be_true_is_skipped(tmp_path: Path, look, name: str):
    kept = beside(tmp_path / "runs", REFUSED[name])
    runs, skipped, page = look()
    assert (runs, skipped) == ({kept}, 1)
    assert page.count(kept) > 0


@pytest.mark.parametrize("name", READ)
def test_a_record_is_read_whatever_its_free_parts_hold(tmp_path: Path, look, name: str):
    kept = beside(tmp_path / "runs", READ[name])
    runs, skipped, _ = look()
    assert (runs, skipped) == ({kept, "odd"}, 0)


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_that_is_no_record_is_skipped(tmp_path: Path, look, name: str):
    kept = good(tmp_path / "runs")
    (tmp_path / "runs" / "odd").mkdir()
    (tmp_path / "runs" / "odd" / "record.json").write_bytes(TEXTS[name])
    assert look()[:2] == ({kept}, 1)


def test_a_pipe_is_not_waited_for(tmp_path: Path, look):
    kept = good(tmp_path / "runs")
    os.mkfifo(tmp_path / "runs" / "x.json")
    assert look()[:2] == ({kept}, 1)
