"""Defences on a finished run: rows of its record, measured once, added whole, kept as long as they hold."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import vitrap.experiment.defend as defending
import vitrap.experiment.run as runner
from tests.experiment.conftest import Runs, Trainings, tiny
from vitrap.contracts import Flagged, Suspect
from vitrap.data.sources import open_data
from vitrap.errors import UserError
from vitrap.experiment.defend import add_row, defend
from vitrap.experiment.record import Record, read_record
from vitrap.experiment.run import run, run_folder
from vitrap.experiment.spec import Named, load_defence, load_spec, parse_spec
from vitrap.experiment.store import locked

NULL = load_defence("max_softmax")


@pytest.fixture(autouse=True)
def no_drawing(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "draw_examples", lambda *args: b"a picture")


@pytest.fixture
def folder(runs: Runs, copied: Path) -> Path:
    """The BadNets run, to change."""
    return run_folder(runs.specs["badnets"], copied)


def lasting(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != "seconds"}


def refuse_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*args: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(defending, "measure_defence", measure)


def test_a_row_joins_the_record_and_nothing_else_changes(folder: Path) -> None:
    before = read_record(folder)
    record = defend(folder, [NULL], device="cpu")
    assert record == read_record(folder)
    assert replace(record, defences=[]) == before
    (row,) = record.defences
    assert (row["name"], row["params"], row["kind"]) == ("max_softmax", {}, "screen")
    assert not list(folder.glob(".*"))


def test_the_same_again_answers_from_the_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = defend(folder, [NULL], device="cpu")
    content = (folder / "record.json").read_bytes()
    refuse_measuring(monkeypatch)
    assert defend(folder, [NULL, NULL], device="cpu") == record
    assert (folder / "record.json").read_bytes() == content


def test_other_settings_are_another_row_and_other_code_replaces_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, more = load_defence("strip", ["overlays=2"]), load_defence("strip", ["overlays=3"])
    record = defend(folder, [few, more, few], device="cpu")
    assert [row["params"]["overlays"] for row in record.defences] == [2, 3]
    assert record.defences[0]["auroc"] != record.defences[1]["auroc"]
    keys = [row["key"] for row in record.defences]
    monkeypatch.setattr(defending, "code_digest", lambda *places: "edited")
    again = defend(folder, [few], device="cpu")
    assert [row["params"]["overlays"] for row in again.defences] == [3, 2]
    assert again.defences[0]["key"] == keys[1]
    assert again.defences[1]["key"] != keys[0]


def test_a_spec_with_defences_does_the_same(runs: Runs, copied: Path, trainings: Trainings) -> None:
    defended = defend(run_folder(runs.specs["badnets"], copied), [NULL], device="cpu")
    out = copied.parent / "other"
    shutil.copytree(runs.out, out)
    spec = replace(runs.specs["badnets"], defences=(NULL,))
    record = run(spec, out, device="cpu")
    assert trainings.since() == 0
    assert [lasting(row) for row in record.defences] == [lasting(row) for row in defended.defences]
    assert spec.hash() == runs.specs["badnets"].hash()


def test_defences_in_a_spec_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[[defences]]\nname = "strip"\noverlays = 7\n[[defences]]\nname = "max_softmax"\n')
    spec = load_spec(path)
    assert [d.name for d in spec.defences] == ["strip", "max_softmax"]
    assert spec.defences[0].params.overlays == 7
    assert spec.table()["defences"][0]["overlays"] == 7
    assert parse_spec(spec.table()) == spec
    path.write_text('[[defences]]\nname = "max_softmax"\n[[defences]]\nname = "max_softmax"\n')
    assert load_spec(path).defences == (NULL,)


@pytest.mark.parametrize(
    ("defences", "message"),
    [
        ("strip", r"defences = 'strip' must be tables with a name each: \[\[defences\]\]"),
        (["strip"], "must be tables"),
        ([{}], r"defences\[0\].name = None is wrong: it must be one of attention_block"),
        ([{"name": 3}], r"defences\[0\].name = 3 is wrong"),
        ([{"name": "strop"}], "unknown defence 'strop'; did you mean 'strip'"),
        ([{"name": "strip", "overlay": 3}], r"unknown key 'defences\[0\].overlay'; did you mean .*overlays'"),
        ([{"name": "strip", "overlays": 0}], r"defences\[0\].overlays = 0 is out of range"),
        ([{"name": "strip", "overlays": 1.5}], r"defences\[0\].overlays = 1.5 is wrong"),
        ([{"name": "fine_tune", "lr": float("nan")}], "is no finite number"),
    ],
)  # fmt: skip
def test_a_wrong_defence_in_a_spec(defences: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_spec({"defences": defences})


# ---- what it rests on


def test_a_deleted_twin_is_made_anew(folder: Path, trainings: Trainings) -> None:
    place = folder.parent / "stages" / f"clean-{read_record(folder).stages['twin']}"
    shutil.rmtree(place)
    defend(folder, [NULL], device="cpu")
    assert trainings.since() == 1
    assert place.exists()


def test_a_twin_that_cannot_be_made_again_is_missed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder.parent / "stages" / f"clean-{read_record(folder).stages['twin']}"
    shutil.rmtree(place)
    content = (folder / "record.json").read_bytes()
    monkeypatch.setattr("vitrap.experiment.plan.code_digest", lambda *places: "edited")
    with pytest.raises(UserError, match=r"the clean twin of run .* is gone .*; run its spec again"):
        defend(folder, [NULL], device="cpu")
    assert (folder / "record.json").read_bytes() == content


def test_other_data_are_refused(folder: Path) -> None:
    world = replace(open_data("digits"), fingerprint="0" * 64)
    with pytest.raises(UserError, match=r"the data of run .* are not here: 'digits' has fingerprint 000000000000"):
        defend(folder, [NULL], device="cpu", world=world)
    assert read_record(folder).defences == []


def test_a_run_with_a_network_of_ones_own(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3 * 16 * 16, 10)

        def forward(self, images: Any) -> Any:
            return self.head(images.flatten(1))

    spec = tiny("attack.name=badnets")
    record = run(spec, tmp_path, device="cpu", model=Own())
    folder = tmp_path / f"{record.name}-{record.hash}"
    assert len(defend(folder, [NULL], device="cpu", model=Own()).defences) == 1
    with pytest.raises(UserError, match="model Own has no plain token attention"):
        defend(folder, [load_defence("attention_block")], device="cpu", model=Own())
    with pytest.raises(UserError, match="no plain token attention"):
        run(replace(spec, name="other", defences=(load_defence("psbd"),)), tmp_path, device="cpu", model=Own())
    assert not list(tmp_path.glob("other-*"))


@pytest.mark.parametrize("content", [None, "{", '{"schema": 99}'])
def test_no_finished_run(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "record.json").write_text(content)
    with pytest.raises(UserError, match="holds no record.json|is damaged|has schema 99"):
        defend(tmp_path, [NULL])
    assert os.listdir(tmp_path) == ([] if content is None else ["record.json"])


@pytest.mark.parametrize("file", ["model.safetensors", "trigger.safetensors"])
def test_a_run_without_its_files(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(UserError, match=rf"{file}.* is (not there|missing or damaged)"):
        defend(folder, [NULL], device="cpu")
    assert read_record(folder).defences == []


def test_rows_stay_when_a_run_is_measured_anew_and_go_when_it_is_forced(runs: Runs, copied: Path) -> None:
    spec = runs.specs["badnets"]
    row = defend(run_folder(spec, copied), [NULL], device="cpu").defences
    folder = run_folder(spec, copied)
    record = read_record(folder)
    replace(record, stages={**record.stages, "measure": "outdated"}).write(folder)
    assert run(spec, copied, device="cpu").defences == row
    assert run(spec, copied, device="cpu", redo="victim").defences == []
    replace(record, stages={**record.stages, "measure": "outdated"}, defences=[{**row[0], "key": "other"}]).write(
        folder
    )
    assert run(spec, copied, device="cpu").defences == []


def test_a_trigger_that_no_longer_works_is_noticed(folder: Path) -> None:
    record = read_record(folder)
    asr = {**record.victim["asr"], "value": record.victim["asr"]["value"] + 0.02}
    replace(record, victim={**record.victim, "asr": asr}).write(folder)
    with pytest.raises(UserError, match=r"its attack's code has changed since; run its spec again"):
        defend(folder, [NULL], device="cpu")
    assert read_record(folder).defences == []


def test_an_edited_attack_leaves_no_row_standing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = defend(folder, [NULL], device="cpu").defences[0]
    monkeypatch.setattr(defending, "POISON_CODE", ("tensors",))
    assert defend(folder, [NULL], device="cpu").defences[0]["key"] != row["key"]


def test_a_run_that_ends_late_keeps_the_rows_that_came_meanwhile(
    runs: Runs, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = runs.specs["badnets"]
    folder = run_folder(spec, copied)
    whole = read_record(folder)
    replace(whole, stages={**whole.stages, "measure": "outdated"}).write(folder)

    def draw(*args: object) -> bytes:  # while this run measures, another one ends and is defended
        whole.write(folder)
        defend(folder, [NULL], device="cpu")
        return b"a picture"

    monkeypatch.setattr(runner, "draw_examples", draw)
    assert [row["name"] for row in run(spec, copied, device="cpu").defences] == ["max_softmax"]


def test_a_filter_that_flags_everything_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="all 100 training images are flagged"):
        defend(folder, [Named("head", Head(first=1000))], device="cpu")
    assert read_record(folder).defences == []


# ---- filters retrain in a stage


@dataclass(frozen=True)
class Head:
    """Flags the first images."""

    first: int = 5
    kind: str = "filter"
    needs_train: bool = True
    needs_attention: bool = False
    card: Any = None

    def apply(self, suspect: Suspect) -> Flagged:
        import torch

        assert suspect.train is not None
        place = torch.arange(len(suspect.train))
        return Flagged(-place.float(), place < self.first)


def test_what_a_filter_keeps_is_trained_on_once(folder: Path, trainings: Trainings) -> None:
    defend(folder, [Named("head", Head())], device="cpu")
    assert trainings.since() == 1
    (place,) = (folder.parent / "stages").glob("retrained-*")
    facts = json.loads((place / "facts.json").read_text())
    kept = read_record(folder).data["n_train"] - 5
    assert len(facts["curves"]["cross_entropy"]) == 1
    assert facts["n_poisoned"] <= kept
    defend(folder, [Named("other", Head())], device="cpu")
    assert trainings.since() == 0
    defend(folder, [Named("head", Head(first=6))], device="cpu")
    assert trainings.since() == 1


# ---- the twin's part of a row is shared


def test_what_a_twin_comes_to_is_measured_once_for_all_attacks(
    runs: Runs, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = load_defence("fine_tune", ["epochs=1"])
    applied: list[nn.Module] = []
    apply = type(tuned.params).apply
    monkeypatch.setattr(type(tuned.params), "apply", lambda self, s: applied.append(s.model) or apply(self, s))
    rows = [defend(run_folder(runs.specs[name], copied), [tuned], device="cpu").defences[0] for name in runs.specs]
    assert len(applied) == 3
    assert rows[0]["cda_clean_model"] == rows[1]["cda_clean_model"]
    (place,) = (copied / "stages").glob("defended-*")
    assert json.loads((place / "facts.json").read_text())["cda_clean_model"] == rows[0]["cda_clean_model"]
    defend(run_folder(runs.specs["ageb"], copied), [load_defence("fine_tune", ["epochs=2"])], device="cpu")
    assert len(applied) == 5


# ---- several at once


def test_two_processes_at_once_lose_no_row(folder: Path) -> None:
    def add(number: int) -> Record:
        return add_row(folder, {"name": "made", "params": {"n": number}, "key": str(number)})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(24)))
    assert sorted(row["params"]["n"] for row in read_record(folder).defences) == list(range(24))


def test_a_lock_is_given_back(folder: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), locked(folder / ".record.lock"):
            raise KeyError
    assert not (folder / ".record.lock").exists()


def test_the_record_holds_what_a_row_is(folder: Path) -> None:
    (row,) = defend(folder, [NULL], device="cpu").defences
    assert json.loads(json.dumps(row)) == row
    assert asdict(read_record(folder))["defences"] == [row]
