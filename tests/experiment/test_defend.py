"""Defences on a finished run: rows of its record, measured once, added whole, kept as long as they hold."""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import vitrap.experiment.defend as defending
import vitrap.experiment.run as runner
from tests.experiment.conftest import Runs, Trainings, tiny
from tests.report.made import judgement, to_row
from vitrap.contracts import Batch, Criterion, Flagged, Implant, Objective, Repaired, Suspect
from vitrap.data.sources import open_data
from vitrap.errors import UserError
from vitrap.experiment.defence_rows import Row
from vitrap.experiment.defence_spec import DefenceSpec
from vitrap.experiment.defend import add_row, defend, stored_set
from vitrap.experiment.plan import make_plan
from vitrap.experiment.progress import no_progress
from vitrap.experiment.record import Record, to_table
from vitrap.experiment.records import EARLIER, read_record, read_records
from vitrap.experiment.retraining import Retraining
from vitrap.experiment.run import run, run_folder
from vitrap.experiment.scores import read_scores
from vitrap.experiment.spec import load_defence, load_spec, parse_spec
from vitrap.experiment.store import locked
from vitrap.metrics.detection import auroc
from vitrap.metrics.diagnosis import backdoor_faults
from vitrap.sweeps.estimate import estimate_runs
from vitrap.sweeps.grid import Point, Sweep

NULL = load_defence("max_softmax")


@pytest.fixture(autouse=True)
def no_drawing(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "draw_examples", lambda *args: b"a picture")


@pytest.fixture
def folder(runs: Runs, copied: Path) -> Path:
    """The BadNets run, to change."""
    return run_folder(runs.specs["badnets"], copied)


def lasting(row: Row) -> Row:
    return replace(row, seconds={})


def refuse_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*args: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(defending, "measure_defence", measure)


def test_a_row_joins_the_record_and_nothing_else_changes(folder: Path) -> None:
    before = read_record(folder)
    record = defend(folder, [NULL], device="cpu")
    assert record == read_record(folder)
    assert replace(record, defences=()) == before
    (row,) = record.defences
    assert (row.name, row.params, row.kind) == ("max_softmax", {}, "screen")
    assert not list(folder.glob(".*"))


def test_the_same_again_answers_from_the_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = defend(folder, [NULL], device="cpu")
    content = (folder / "record.json").read_bytes()
    refuse_measuring(monkeypatch)
    assert defend(folder, [NULL, NULL], device="cpu") == record
    assert (folder / "record.json").read_bytes() == content


def test_other_settings_are_another_row_and_other_code_replaces_one(folder: Path, edit: Callable[[str], None]) -> None:
    few, more = load_defence("strip", ["overlays=2"]), load_defence("strip", ["overlays=3"])
    record = defend(folder, [few, more, few], device="cpu")
    assert [row.params["overlays"] for row in record.defences] == [2, 3]
    assert record.defences[0].auroc != record.defences[1].auroc
    keys = [row.key for row in record.defences]
    edit("defences/strip.py")
    again = defend(folder, [few], device="cpu")
    assert [row.params["overlays"] for row in again.defences] == [3, 2]
    assert again.defences[0].key == keys[1]
    assert again.defences[1].key != keys[0]


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
    assert spec.defences[0].method.overlays == 7
    assert spec.table()["defences"][0]["overlays"] == 7
    assert parse_spec(spec.table()) == spec
    path.write_text('[[defences]]\nname = "max_softmax"\n[[defences]]\nname = "max_softmax"\n')
    assert load_spec(path).defences == (NULL,)


@pytest.mark.parametrize(
    ("defences", "message"),
    [
        ("strip", r"defences = 'strip' must be tables with a name each: \[\[defences\]\]"),
        (["strip"], "must be tables"),
        ([{}], r"defences\[0\].name = None is wrong: it must be one of activation_clustering"),
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


# ---- how many images a screen scores


def test_the_number_of_images_is_a_setting_of_a_screen(tmp_path: Path) -> None:
    few = load_defence("strip", ["screened=200", "overlays=7"])
    assert (few.screened, few.method.overlays, few.table()["screened"]) == (200, 7, 200)
    usual = load_defence("strip", ["overlays=7"])
    assert usual.screened == 1000
    assert "screened" not in usual.table()  # so that specs and rows of older vitraps keep their hashes
    assert load_defence("strip", ["overlays=7", "screened=1000"]) == usual
    path = tmp_path / "mine.toml"
    path.write_text('[[defences]]\nname = "strip"\nscreened = 20\n[[defences]]\nname = "strip"\n')
    spec = load_spec(path)
    assert [defence.screened for defence in spec.defences] == [20, 1000]
    assert parse_spec(spec.table()) == spec


@pytest.mark.parametrize(
    ("name", "screened", "message"),
    [
        ("strip", "9", "defence.screened = 9 is wrong: it must be a whole number from 10 to 1,000,000,000"),
        ("strip", "20.5", "defence.screened = 20.5 is wrong"),
        ("strip", "true", "defence.screened = True is wrong"),
        ("strip", "many", "defence.screened = 'many' is wrong"),
        ("fine_tune", "200", "defence.screened = 200 means nothing for fine_tune, a repair, .*; leave it out"),
        ("spectral", "1000", "means nothing for spectral, a filter"),
    ],
)
def test_a_wrong_number_of_images(name: str, screened: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_defence(name, [f"screened={screened}"])


def test_a_row_says_that_there_was_no_backdoor(folder: Path) -> None:
    record = defend(folder, [NULL], device="cpu")
    faults = backdoor_faults(record.victim, record.data.classes)
    assert record.defences[0].no_backdoor == faults != ()
    assert record.diagnosis is not None
    assert set(faults) <= set(record.diagnosis)


def test_another_number_of_images_is_another_row(folder: Path) -> None:
    record = defend(folder, [NULL, replace(NULL, screened=20)], device="cpu")
    usual, few = record.defences
    assert (usual.screened, few.screened) == (1000, 20)
    assert few.auroc.n_clean == few.n_threshold == 20
    assert usual.auroc.n_clean > 20
    assert usual.key != few.key
    assert {file.name for file in (folder / "scores").glob("*.safetensors")} == {
        Path(row.scores).name for row in (usual, few)
    }


def test_a_row_of_an_older_vitrap_counts_as_the_usual_number(runs: Runs, folder: Path) -> None:
    row = defend(folder, [NULL], device="cpu").defences[0]
    table = to_table(row)
    old = to_row({k: v for k, v in table.items() if k not in ("screened", "version", "scores")} | {"key": "old"})
    add_row(folder, old)
    few = replace(row, screened=20, key="few")
    assert [r.key for r in add_row(folder, few).defences] == ["old", "few"]
    assert [r.key for r in add_row(folder, row).defences] == ["few", row.key]  # it takes the old one's place
    add_row(folder, old)
    for defence, state in ((NULL, "record there"), (replace(NULL, screened=30), "defences missing")):
        point = Point({}, replace(runs.specs["badnets"], defences=(defence,)))
        (estimate,) = estimate_runs(Sweep("sweep", (point,)), read_records(folder))
        assert estimate.state == state


# ---- a screen's scores are kept


def test_scores_are_kept_and_are_the_rows_own(folder: Path) -> None:
    record = defend(folder, [NULL], device="cpu")
    (row,) = record.defences
    assert row.scores == f"scores/max_softmax-{row.key}.safetensors"
    scores = read_scores(folder, row)
    assert auroc(scores.victim.triggered, scores.victim.clean) == row.auroc
    assert auroc(scores.twin.triggered, scores.twin.clean) == row.auroc_clean_model
    assert len(scores.victim.held_out) == row.n_threshold
    with safe_open(folder / row.scores, "pt") as file:
        about = json.loads(file.metadata()["vitrap"])
    assert (about["role"], about["backdoor"], about["attack"]) == ("scores", True, "badnets")
    assert about["spec"] == {k: v for k, v in record.spec.items() if k not in ("name", "defences")}


def test_scores_of_a_replaced_row_go_and_those_of_others_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = replace(NULL, screened=20)
    old, stays = defend(folder, [NULL, few], device="cpu").defences
    own = folder / "scores" / "combined.safetensors"
    own.write_bytes(b"of the user's making")
    monkeypatch.setattr(type(NULL.method), "version", 2)
    new = defend(folder, [NULL], device="cpu").defences[-1]
    assert new.scores != old.scores
    assert not (folder / old.scores).exists()
    assert own.exists()
    read_scores(folder, new)
    read_scores(folder, stays)


def test_a_row_whose_scores_are_gone_is_measured_again(folder: Path) -> None:
    (row,) = defend(folder, [NULL], device="cpu").defences
    (folder / row.scores).unlink()
    (again,) = defend(folder, [NULL], device="cpu").defences
    assert lasting(again) == lasting(row)
    read_scores(folder, again)


def test_scores_are_there_before_the_row_that_names_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Record, "write", break_off)
        with pytest.raises(KeyboardInterrupt):
            defend(folder, [replace(NULL, screened=20)], device="cpu")
    assert read_record(folder).defences == ()
    assert len(list((folder / "scores").glob("*.safetensors"))) == 1
    (row,) = defend(folder, [NULL], device="cpu").defences
    assert [file.name for file in (folder / "scores").glob("*.safetensors")] == [Path(row.scores).name]


# ---- what it rests on


def test_a_raised_version_leaves_no_row_standing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = load_defence("fine_tune", ["epochs=1"])
    (row,) = defend(folder, [tuned], device="cpu").defences
    assert row.version == 1
    monkeypatch.setattr(type(tuned.method), "version", 2)
    (again,) = defend(folder, [tuned], device="cpu").defences
    assert again.version == 2
    assert again.key != row.key
    assert len(list((folder.parent / "stages").glob("defended-*"))) == 2


@pytest.mark.parametrize("damage", ["deleted", "another's model"])
def test_a_deleted_or_damaged_twin_is_made_anew(folder: Path, trainings: Trainings, damage: str) -> None:
    place = folder.parent / "stages" / f"clean-{read_record(folder).stages['twin']}"
    if damage == "deleted":
        shutil.rmtree(place)
    else:
        shutil.copyfile(folder / "model.safetensors", place / "model.safetensors")
    defend(folder, [NULL], device="cpu")
    assert trainings.since() == 1
    assert place.exists()


def test_a_twin_that_cannot_be_made_again_is_missed(folder: Path, edit: Callable[[str], None]) -> None:
    place = folder.parent / "stages" / f"clean-{read_record(folder).stages['twin']}"
    shutil.rmtree(place)
    content = (folder / "record.json").read_bytes()
    edit("train/loop.py")
    with pytest.raises(UserError, match=r"the clean twin of run .* is gone or damaged .*; run its spec again"):
        defend(folder, [NULL], device="cpu")
    assert (folder / "record.json").read_bytes() == content


def test_other_data_are_refused(folder: Path) -> None:
    world = replace(open_data("digits"), fingerprint="0" * 64)
    with pytest.raises(UserError, match=r"the data of run .* are not here: 'digits' has fingerprint 000000000000"):
        defend(folder, [NULL], device="cpu", world=world)
    assert read_record(folder).defences == ()


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
    with pytest.raises(UserError, match=rf"run .* is damaged \({file} is missing\)"):
        defend(folder, [NULL], device="cpu")
    assert read_record(folder).defences == ()


def test_rows_stay_when_a_run_is_measured_anew_and_go_when_it_is_forced(runs: Runs, copied: Path) -> None:
    spec = runs.specs["badnets"]
    row = defend(run_folder(spec, copied), [NULL], device="cpu").defences
    folder = run_folder(spec, copied)
    record = read_record(folder)
    replace(record, stages={**record.stages, "measure": "outdated"}).write(folder)
    assert run(spec, copied, device="cpu").defences == row
    assert run(spec, copied, device="cpu", redo="victim").defences == ()
    replace(record, stages={**record.stages, "measure": "outdated"}, defences=(replace(row[0], key="other"),)).write(
        folder
    )
    assert run(spec, copied, device="cpu").defences == ()


@pytest.mark.parametrize(
    "failing", ["measure_victim", "draw_examples", "place_file", "write_checksums", "write_record"]
)
def test_rows_outlive_a_run_that_is_killed_while_it_is_made_anew(
    runs: Runs, copied: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    spec = runs.specs["badnets"]
    folder = run_folder(spec, copied)
    row = to_row(judgement())
    record = read_record(folder)
    replace(record, stages={**record.stages, "measure": "outdated"}, defences=(row,)).write(folder)
    monkeypatch.setattr(runner, "still_holding", lambda rows, _: tuple(rows))

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killing:
        killing.setattr(runner, failing, kill)
        with pytest.raises(KeyboardInterrupt):
            run(spec, copied, device="cpu")
    assert run(spec, copied, device="cpu").defences == (row,)
    assert not (folder / EARLIER).exists()


def test_a_trigger_that_no_longer_works_is_noticed(folder: Path) -> None:
    record = read_record(folder)
    asr = replace(record.victim.asr, value=record.victim.asr.value - 0.02)
    replace(record, victim=replace(record.victim, asr=asr)).write(folder)
    with pytest.raises(UserError, match=r"its attack's code has changed since; run its spec again"):
        defend(folder, [NULL], device="cpu")
    assert read_record(folder).defences == ()


def test_an_edited_attack_leaves_no_row_standing(folder: Path, edit: Callable[[str], None]) -> None:
    row = defend(folder, [NULL], device="cpu").defences[0]
    edit("attacks/badnets.py")
    assert defend(folder, [NULL], device="cpu").defences[0].key != row.key


def test_a_defence_that_means_something_else_has_another_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = defend(folder, [NULL], device="cpu")
    other, key = load_defence("strip", ["overlays=2"]), defending.row_key(record, NULL)
    before = defending.row_key(record, other)
    monkeypatch.setattr(type(NULL.method), "version", NULL.method.version + 1)
    assert defending.row_key(record, NULL) != key == record.defences[0].key
    assert defending.row_key(record, other) == before


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
    assert [row.name for row in run(spec, copied, device="cpu").defences] == ["max_softmax"]


def test_a_filter_that_flags_everything_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="all 100 training images are flagged"):
        defend(folder, [DefenceSpec("head", Head(first=1000))], device="cpu")
    assert read_record(folder).defences == ()


# ---- filters retrain in a stage


@dataclass(frozen=True)
class Head:
    """Flags the first images."""

    first: int = 5
    kind: ClassVar[str] = "filter"
    needs_train: ClassVar[bool] = True
    needs_attention: ClassVar[bool] = False
    card: ClassVar[Any] = None
    version: ClassVar[int] = 1

    def apply(self, suspect: Suspect) -> Flagged:
        assert suspect.train is not None
        place = torch.arange(len(suspect.train))
        return Flagged(-place.float(), place < self.first)


def test_what_a_filter_keeps_is_trained_on_once(folder: Path, trainings: Trainings) -> None:
    defend(folder, [DefenceSpec("head", Head())], device="cpu")
    assert trainings.since() == 1
    (place,) = (folder.parent / "stages").glob("retrained-*")
    facts = json.loads((place / "facts.json").read_text())
    kept = read_record(folder).data.n_train - 5
    assert len(facts["curves"]["cross_entropy"]) == 1
    assert facts["n_poisoned"] <= kept
    defend(folder, [DefenceSpec("other", Head())], device="cpu")
    assert trainings.since() == 0
    defend(folder, [DefenceSpec("head", Head(first=6))], device="cpu")
    assert trainings.since() == 1


# ---- a defender may retrain


@dataclass(frozen=True)
class Again:
    """Trains the network anew, on all images or half of them, and hands that out."""

    part: float = 1.0
    epochs: int | None = None
    doubled: bool = False
    kind: ClassVar[str] = "repair"
    needs_train: ClassVar[bool] = True
    needs_attention: ClassVar[bool] = False
    card: ClassVar[Any] = None
    version: ClassVar[int] = 1

    def apply(self, suspect: Suspect) -> Repaired:
        assert suspect.train is not None
        assert suspect.retrain is not None
        state = torch.get_rng_state()
        images = suspect.train.take(torch.arange(int(self.part * len(suspect.train))))
        model = suspect.retrain(images, Objective(doubled) if self.doubled else None, self.epochs)
        assert torch.equal(torch.get_rng_state(), state)
        assert not model.training
        assert not any(weight.requires_grad for weight in model.parameters())
        made.append(model)
        return Repaired(model)


made: list[nn.Module] = []


def doubled(model: nn.Module, batch: Batch, criterion: Criterion) -> dict[str, Tensor]:
    return {"twice": 2 * criterion(model(batch.images), batch.labels)}


def test_a_defender_retrains_with_the_runs_recipe_seed_and_streams(
    folder: Path, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the clean set that is the twin, and on BadNets' poisoned set the victim, to the last bit."""
    case_of: list[Any] = []
    measure = defending.measure_defence
    monkeypatch.setattr(defending, "measure_defence", lambda a, c, t: case_of.append(c) or measure(a, c, t))
    made.clear()
    (row,) = defend(folder, [DefenceSpec("again", Again())], device="cpu").defences
    assert trainings.since() == 2
    (case,) = case_of
    for ours, theirs in zip(made, (case.victim, case.twin), strict=True):
        assert ours is not theirs
        weights = theirs.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in ours.state_dict().items())
    assert row.cda_clean_model == row.cda_clean_model_before
    assert row.asr == row.before.asr


def test_what_retrains_knows_no_attack() -> None:
    """Not even by its attributes: what a defender is handed holds the network and how it was trained."""
    names = [f.name for f in fields(Retraining)]
    assert names == ["network", "recipe", "seed", "device", "arithmetic", "progress"]


def test_a_retraining_may_go_on_from_a_model(folder: Path) -> None:
    plan = make_plan(parse_spec(read_record(folder).spec), "cpu", with_surrogates=False)
    again = Retraining(plan.victim, plan.spec.recipe, 0, plan.device, plan.arithmetic, no_progress)
    first = again(plan.world.train, epochs=1)
    weights = {name: weight.clone() for name, weight in first.state_dict().items()}
    further = again(plan.world.train, epochs=1, start=first)
    assert all(torch.equal(weight, weights[name]) for name, weight in first.state_dict().items()), "it was changed"
    assert not first.training
    assert any(not torch.equal(weight, weights[name]) for name, weight in further.state_dict().items())
    assert not any(weight.requires_grad for weight in further.parameters())


def test_a_retraining_may_have_other_images_epochs_and_an_objective(folder: Path, trainings: Trainings) -> None:
    made.clear()
    for defence in (Again(part=0.5), Again(epochs=2), Again(doubled=True)):
        defend(folder, [DefenceSpec("again", defence)], device="cpu")
    assert trainings.since() == 6
    heads = [next(model.parameters()).flatten()[:5].tolist() for model in made]
    assert len({tuple(head) for head in heads[::2]}) == 3
    with pytest.raises(UserError, match="epochs = 0 is out of range"):
        defend(folder, [DefenceSpec("again", Again(epochs=0))], device="cpu")


# ---- what is stored for a victim


def test_where_nothing_is_poisoned_the_training_set_is_as_it_was() -> None:
    train = open_data("digits", limit=20).train
    assert stored_set(Implant(), train, 0) is train
    drawn = stored_set(
        Implant(poison=lambda images, generator: images.take(torch.randperm(5, generator=generator))), train, 0
    )
    again = stored_set(
        Implant(poison=lambda images, generator: images.take(torch.randperm(5, generator=generator))), train, 0
    )
    assert torch.equal(drawn.index, again.index)


# ---- the twin's part of a row is shared


def test_what_a_twin_comes_to_is_measured_once_for_all_attacks(
    runs: Runs, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = load_defence("fine_tune", ["epochs=1"])
    applied: list[nn.Module] = []
    apply = type(tuned.method).apply
    monkeypatch.setattr(type(tuned.method), "apply", lambda self, s: applied.append(s.model) or apply(self, s))
    rows = [defend(run_folder(runs.specs[name], copied), [tuned], device="cpu").defences[0] for name in runs.specs]
    assert len(applied) == 3
    assert rows[0].cda_clean_model == rows[1].cda_clean_model
    (place,) = (copied / "stages").glob("defended-*")
    assert json.loads((place / "facts.json").read_text())["after"] == to_table(rows[0].cda_clean_model)
    defend(run_folder(runs.specs["ageb"], copied), [load_defence("fine_tune", ["epochs=2"])], device="cpu")
    assert len(applied) == 5


# ---- several at once


def test_two_processes_at_once_lose_no_row(folder: Path) -> None:
    def add(number: int) -> Record:
        return add_row(folder, to_row(judgement() | {"params": {"n": number}, "key": str(number)}))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(24)))
    assert sorted(row.params["n"] for row in read_record(folder).defences) == list(range(24))


def test_a_lock_is_given_back(folder: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), locked(folder.parent, f"{folder.name}-record"):
            raise KeyError


def test_the_record_holds_what_a_row_is(folder: Path) -> None:
    (row,) = defend(folder, [NULL], device="cpu").defences
    assert to_row(json.loads(json.dumps(to_table(row)))) == row
    assert read_record(folder).defences == (row,)
