"""Runs made before a format changed still open, report and take a defence."""

import json
import shutil
from pathlib import Path

import pytest

from vitrap.data.sources import open_data
from vitrap.errors import UserError
from vitrap.experiment.defend import defend
from vitrap.experiment.opened_run import open_run
from vitrap.experiment.predict import predict, triggered
from vitrap.experiment.records import read_record, read_records
from vitrap.experiment.scores import read_scores
from vitrap.experiment.spec import load_defence, parse_spec
from vitrap.metrics.accuracy import attack_success
from vitrap.report.frame import load_records
from vitrap.report.page.make_page import make_page
from vitrap.train.arithmetic import Arithmetic

OLD = Path(__file__).parents[1] / "old_runs"
RUNS = sorted(file.parent for file in OLD.glob("*/*/record.json"))
each_run = pytest.mark.parametrize("old", RUNS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")


@pytest.fixture
def copied(old: Path, tmp_path: Path) -> Path:
    """The run's folder in a copy of its folder of runs."""
    return Path(shutil.copytree(old.parent, tmp_path / "runs")) / old.name


def test_there_is_one_of_each_attack_and_setting() -> None:
    specs = [json.loads((run / "record.json").read_text())["spec"]["attack"] for run in RUNS]
    kinds = {(spec["name"], spec.get("setting")) for spec in specs}
    assert kinds == {("ageb", None), ("badnets", None), ("megatron", "training"), ("megatron", "clean-label")}


@each_run
def test_it_opens_and_its_trigger_fires_as_it_did(old: Path) -> None:
    opened, record = open_run(old), json.loads((old / "record.json").read_text())
    spec, world = parse_spec(record["spec"]), open_data("digits", limit=300)
    assert world.fingerprint == record["data"]["fingerprint"]
    said = predict(opened.model, triggered(world.test, opened.trigger), Arithmetic())
    found = attack_success(said, world.test.labels, spec.attack.goal_for(10))
    assert found.n == record["victim"]["asr"]["n"]
    assert found.value == pytest.approx(record["victim"]["asr"]["value"], abs=0.01)


@each_run
def test_it_takes_a_defence(copied: Path) -> None:
    before = read_record(copied)
    asked = [
        load_defence("strip", ["overlays=4", "screened=50"]),
        load_defence("fine_tune", ["epochs=1"]),
        load_defence("spectral"),
    ]
    record = defend(copied, asked, device="cpu")
    names = [(row.name, row.kind) for row in record.defences[-3:]]
    assert names == [("strip", "screen"), ("fine_tune", "repair"), ("spectral", "filter")]
    assert record.victim == before.victim
    assert record.defences[-1].auroc.n_triggered == before.data.n_poisoned
    assert len(read_scores(copied, record.defences[-3]).victim.clean) == 50


@each_run
def test_its_old_rows_say_that_they_kept_no_scores(copied: Path) -> None:
    row = next(row for row in read_record(copied).defences if row.name == "strip")
    with pytest.raises(UserError, match="defend"):
        read_scores(copied, row)


@pytest.mark.parametrize("runs", sorted(p for p in OLD.iterdir() if p.is_dir()), ids=lambda folder: folder.name)
def test_they_report(runs: Path, tmp_path: Path) -> None:
    loaded = read_records(runs)
    assert loaded.skipped == ()
    assert len(loaded.records) == len(list(runs.glob("*/record.json")))
    assert len(load_records(runs)) >= len(loaded.records)
    page = make_page(loaded, "old runs").content.decode()
    for found in loaded.records:
        assert found.record.name in page
