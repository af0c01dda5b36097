"""Runs from Python, end to end on a tiny ViT: what they leave, what they share, and when they are made anew."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import vitrap
import vitrap.experiment.run as runner
from tests.experiment.conftest import Runs, Trainings, tiny
from vitrap.contracts import Access
from vitrap.data.sources import open_data
from vitrap.errors import UserError
from vitrap.experiment.answers import recall
from vitrap.experiment.opened_run import open_run
from vitrap.experiment.plan import choose_device, make_plan
from vitrap.experiment.predict import predict, triggered
from vitrap.experiment.progress import no_progress
from vitrap.experiment.record import SCHEMA, Record, to_table
from vitrap.experiment.records import read_record
from vitrap.experiment.run import run, run_folder
from vitrap.experiment.spec import parse_spec
from vitrap.tensor_file import read_tensor_file
from vitrap.train.arithmetic import Arithmetic

RUN_FILES = [
    "SHA256SUMS", "model.safetensors", "pictures.png", "record.json", "stream.safetensors", "trigger.safetensors",
]  # fmt: skip
BOTH = pytest.mark.parametrize("name", ["ageb", "badnets"])


@pytest.fixture(autouse=True)
def no_drawing(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a second, and one test looks at what `runs` drew."""
    monkeypatch.setattr(runner, "draw_examples", lambda *args: b"a picture")


def lasting(record: Record) -> dict[str, Any]:
    """What two equal runs have in common."""
    return {k: v for k, v in asdict(record).items() if k not in ("seconds", "memory", "environment")}


def stage_folders(out: Path) -> list[str]:
    return sorted(os.listdir(out / "stages"))


def refuse_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*args: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr("vitrap.experiment.stages.train", train)


# ---- what a run leaves


@BOTH
def test_a_record_has_every_key_of_its_format(runs: Runs, name: str) -> None:
    record = json.loads((runs.folder(name) / "record.json").read_text())
    assert list(record) == [f.name for f in fields(Record) if f.name not in ("contents", "last")]
    assert {"schema", "name", "spec", "hash", "seed", "environment", "data", "victim", "attack", "curves", "defences",
            "precision", "memory", "seconds"} <= set(record)  # fmt: skip
    assert record["schema"] == SCHEMA == 1
    assert record["defences"] == []
    assert record["precision"] == "fp32"
    assert set(record["data"]) == {"n_train", "n_test", "n_poisoned", "n_covers", "classes", "fingerprint", "n_curves"}
    goal = runs.specs[name].attack.target
    held = open_data("digits", limit=100).choose.labels
    assert record["data"]["n_curves"] == {"cda": 45, "asr": int((held != goal).sum())}
    last = record["curves"]["victim"]
    assert all(round(last[rate][-1] * n, 6).is_integer() for rate, n in record["data"]["n_curves"].items())
    assert [record["data"][k] for k in ("n_train", "n_test", "n_poisoned", "classes")] == [100, 450, 10, 10]
    assert set(record["memory"]) == {"host_peak_bytes", "device_peak_bytes"}
    assert record["memory"]["host_peak_bytes"] > 10**7
    assert set(record["seconds"]) == {"poison", "victim", "twin", "fit", "measure"} | (
        {"surrogate"} if name == "ageb" else set()
    )
    assert all(seconds >= 0 for seconds in record["seconds"].values())
    assert set(record["curves"]) == set(record["stages"]) - {"measure"}
    assert all(len(curve["cross_entropy"]) == 1 for curve in record["curves"].values())
    assert {"python", "torch", "timm", "vitrap", "device", "device_kind", "cores"} <= set(record["environment"])


def test_settings_are_chosen_on_what_was_held_out(tmp_path: Path) -> None:
    spec = tiny("attack.name=badnets", "data.measured=choose")
    record = run(spec, tmp_path, device="cpu")
    held = open_data("digits", limit=100).choose
    assert record.data.n_test == record.victim.cda.n == len(held) == 45
    assert record.victim.asr.n == int((held.labels != 0).sum())
    assert record.victim.stealth.n == 45
    assert record.spec["data"]["measured"] == "choose"
    given = run(spec, tmp_path / "given", device="cpu", world=open_data("digits", limit=100))
    assert given.victim == record.victim


@BOTH
def test_a_record_has_rates_with_intervals_and_stealth(runs: Runs, name: str) -> None:
    victim = runs.records[name].victim
    rates = {"cda": 450, "asr": 405, "ra": 405, "asr_clean_model": 405, "cda_clean_model": 450, "asr_clean_images": 405}
    assert set(to_table(victim)) == {*rates, "stealth", "majority"}
    for name, n in rates.items():
        rate = getattr(victim, name)
        assert 0 <= rate.low <= rate.value <= rate.high <= 1
        assert rate.n == n
    assert set(to_table(victim.stealth)) == {"psnr_db", "ssim", "linf", "l1", "lpips", "n"}
    assert victim.stealth.n == 450
    assert 0 < victim.stealth.psnr_db.mean < 100


@BOTH
def test_a_record_says_which_spec_it_answers(runs: Runs, name: str) -> None:
    record, spec = runs.records[name], runs.specs[name]
    assert parse_spec(record.spec) == spec
    assert (record.name, record.hash, record.seed) == (name, spec.hash(), 0)
    assert runs.folder(name).name == f"{name}-{spec.hash()}"
    assert read_record(runs.folder(name)) == record


@BOTH
def test_a_run_folder_holds_its_files_and_no_drafts(runs: Runs, name: str) -> None:
    assert sorted(os.listdir(runs.folder(name))) == RUN_FILES
    assert not list(runs.out.rglob(".*"))


@BOTH
def test_pictures_are_a_picture(runs: Runs, name: str) -> None:
    with Image.open(runs.folder(name) / "pictures.png") as picture:
        assert picture.format == "PNG"
        picture.load()
        assert min(picture.size) > 300
        assert len(set(picture.convert("RGB").resize((50, 50)).tobytes())) > 100


@BOTH
@pytest.mark.parametrize("file", ["model.safetensors", "trigger.safetensors"])
def test_files_say_that_they_belong_to_a_backdoor(runs: Runs, name: str, file: str) -> None:
    with safe_open(runs.folder(name) / file, "pt") as content:
        said = json.loads(content.metadata()["vitrap"])
    assert said["backdoor"] is True
    assert said["attack"] == name
    assert said["role"] == ("victim" if file == "model.safetensors" else "trigger")
    assert "name" not in said["spec"]  # runs of several names share a victim
    assert replace(parse_spec(said["spec"]), name=name) == runs.specs[name]
    assert "backdoor" in said["warning"]


def test_clean_models_say_that_they_are_clean(runs: Runs) -> None:
    for place in (runs.out / "stages").glob("clean-*"):
        with safe_open(place / "model.safetensors", "pt") as content:
            assert json.loads(content.metadata()["vitrap"]) == {"role": "clean"}


# ---- the same again


@BOTH
def test_two_folders_get_equal_records(runs: Runs, name: str, tmp_path: Path) -> None:
    again = run(runs.specs[name], tmp_path, device="cpu")
    assert lasting(again) == lasting(runs.records[name])
    one, two = (load_file(run_folder(runs.specs[name], out) / "model.safetensors") for out in (runs.out, tmp_path))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


@BOTH
def test_a_second_call_answers_from_the_record(runs: Runs, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_training(monkeypatch)
    monkeypatch.setattr(runner, "measure_victim", None)
    assert run(runs.specs[name], runs.out, device="cpu") == runs.records[name]


def test_another_name_is_another_folder_and_trains_nothing(
    runs: Runs, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_training(monkeypatch)
    record = run(replace(runs.specs["ageb"], name="other"), copied, device="cpu")
    assert record.name == record.spec["name"] == "other"
    assert record.victim == runs.records["ageb"].victim
    assert sorted(os.listdir(copied / f"other-{record.hash}")) == RUN_FILES


# ---- what runs share


def test_runs_share_the_twin_and_the_surrogate(runs: Runs) -> None:
    assert runs.trainings == {"ageb": 3, "badnets": 1}
    ageb, badnets = (runs.records[name].stages for name in ("ageb", "badnets"))
    assert ageb["twin"] == badnets["twin"]
    assert ageb["victim"] != badnets["victim"]
    assert set(ageb) == {"surrogate", "twin", "victim", "measure"}
    assert set(badnets) == {"twin", "victim", "measure"}
    trained = [f"clean-{ageb['surrogate']}", f"clean-{ageb['twin']}"]
    victims = [f"victim-{each['victim']}" for each in (ageb, badnets)]
    found = stage_folders(runs.out)
    assert [name for name in found if not name.startswith("trigger-")] == sorted([*trained, *victims])
    assert len(found) == 6, "each attack has a trigger of its own"
    assert runs.records["ageb"].victim.cda_clean_model == runs.records["badnets"].victim.cda_clean_model


@pytest.mark.parametrize(
    ("override", "moved"),
    [
        ("name=other", set()),
        ("seed=1", {"victim", "twin"}),
        ("attack.alpha=0.35", {"victim"}),
        ("surrogate.depth=2", {"surrogate", "victim"}),
        ("model.depth=2", {"surrogate", "victim", "twin"}),
        ("recipe.lr=0.01", {"surrogate", "victim", "twin"}),
        ("data.limit=110", {"surrogate", "victim", "twin"}),
        ("data.holdout=0.2", {"surrogate", "victim", "twin"}),
        ("data.size=32", {"surrogate", "victim", "twin"}),
    ],
)
def test_a_change_moves_the_keys_of_what_it_touches_alone(override: str, moved: set[str]) -> None:
    before, after = (make_plan(tiny(*change), "cpu").keys() for change in ((), (override,)))
    assert {k for k in before if before[k] != after[k]} == moved | ({"measure"} if moved else set())


@pytest.mark.parametrize(
    ("edited", "moved"),
    [
        ("attacks/ageb.py", {"victim", "measure"}),
        ("data/poison.py", {"victim", "measure"}),
        ("metrics/stealth.py", {"measure"}),
        ("tensors/morphology.py", {"victim", "measure"}),
        ("train/loop.py", {"victim", "twin", "surrogate", "measure"}),
        ("attacks/badnets.py", set()),
        ("defences/strip.py", set()),
    ],
)
def test_edited_code_moves_the_keys_of_what_uses_it_alone(
    edit: Callable[[str], None], edited: str, moved: set[str]
) -> None:
    plan = make_plan(tiny(), "cpu")
    before = plan.keys()
    edit(edited)
    after = plan.keys()
    assert {k for k in before if before[k] != after[k]} == moved


def test_an_attack_that_means_something_else_has_other_victims(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tiny(), "cpu")
    before, trigger = plan.keys(), plan.trigger_stage().key
    monkeypatch.setattr(type(plan.spec.attack), "version", plan.spec.attack.version + 1)
    after = plan.keys()
    assert {k for k in before if before[k] != after[k]} == {"victim", "measure"}
    assert plan.trigger_stage().key != trigger


def test_the_victims_start_and_order_are_the_twins(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def train(model: nn.Module, data: Any, recipe: Any, streams: Any, *rest: Any) -> dict[str, list[float]]:
        start = {k: v.clone() for k, v in model.state_dict().items()}
        drawn = [torch.rand(3, generator=g).tolist() for g in (streams.order, streams.augmentation)]
        seen.append((start, drawn, data.poisoned.sum().item(), torch.rand(3).tolist()))
        return {"cross_entropy": [0.0]}

    monkeypatch.setattr("vitrap.experiment.stages.train", train)
    run(runs.specs["ageb"], tmp_path, device="cpu")
    surrogate, twin, victim = seen
    assert [count for _, _, count, _ in seen] == [0, 0, 10]
    assert all(torch.equal(victim[0][k], twin[0][k]) for k in twin[0])
    assert victim[1] == twin[1] != surrogate[1]
    assert victim[3] == twin[3] != surrogate[3]
    assert not all(torch.equal(surrogate[0][k], twin[0][k]) for k in twin[0])


# ---- made anew


@pytest.mark.parametrize(("redo", "n"), [("victim", 1), ("all", 3)])
def test_redoing_makes_the_victim_or_every_stage_anew(
    runs: Runs, copied: Path, trainings: Trainings, redo: Any, n: int
) -> None:
    before = stage_folders(copied)
    record = run(runs.specs["ageb"], copied, device="cpu", redo=redo)
    assert trainings.since() == n
    assert lasting(record) == lasting(runs.records["ageb"])
    assert stage_folders(copied) == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '{"schema": 1}', '{"schema": "1"}', "\xff", '{"schema": null}']
)
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"record .*record\.json' is damaged \(.*; run its spec again with --force"):
        read_record(tmp_path)


def test_a_later_vitraps_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text('{"schema": 99, "new": []}')
    with pytest.raises(UserError, match="has schema 99, this vitrap reads up to 1; update vitrap"):
        read_record(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"schema": 1}', '{"schema": 99}'])
def test_a_record_that_cannot_be_read_is_made_anew(
    runs: Runs, copied: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    refuse_training(monkeypatch)
    folder = run_folder(runs.specs["badnets"], copied)
    (folder / "record.json").write_text(text)
    record = run(runs.specs["badnets"], copied, device="cpu")
    assert lasting(record) == lasting(runs.records["badnets"])
    assert read_record(folder) == record


@pytest.mark.parametrize("key", ["victim", "twin", "measure"])
def test_a_record_whose_stages_have_moved_is_made_anew(
    runs: Runs, copied: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    refuse_training(monkeypatch)
    file = run_folder(runs.specs["badnets"], copied) / "record.json"
    record = json.loads(file.read_text())
    record["stages"][key] = "0" * 16
    record["victim"]["cda"]["value"] = 2.0
    file.write_text(json.dumps(record))
    assert lasting(run(runs.specs["badnets"], copied, device="cpu")) == lasting(runs.records["badnets"])
    assert json.loads(file.read_text())["victim"]["cda"]["value"] <= 1


@pytest.mark.parametrize("failing", ["draw_examples", "place_file", "write_checksums", "write_record"])
def test_an_old_record_never_stands_beside_new_files(
    runs: Runs, copied: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    folder = run_folder(runs.specs["badnets"], copied)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(*args: object) -> bytes:
        raise RuntimeError("killed")

    monkeypatch.setattr(runner, failing, fail)
    monkeypatch.setattr("vitrap.experiment.stages.train", lambda *args: {"cross_entropy": [0.0]})
    with pytest.raises(RuntimeError, match="killed"):
        run(runs.specs["badnets"], copied, device="cpu", redo="victim")
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert "record.json" not in after or after == before


# ---- damaged


RUN_PARTS = ["model.safetensors", "trigger.safetensors", "stream.safetensors", "pictures.png"]


def flip(file: Path) -> None:
    """Flip a bit in a file, which is no longer another's link then."""
    text = bytearray(file.read_bytes())
    text[-1] ^= 1
    file.unlink()
    file.write_bytes(text)


@pytest.mark.parametrize("damage", [Path.unlink, flip])
@pytest.mark.parametrize("file", RUN_PARTS)
def test_a_run_without_its_files_is_no_answer_and_is_made_anew(
    runs: Runs, copied: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, file: str, damage: Any
) -> None:
    refuse_training(monkeypatch)  # the victim's stage is whole
    spec = runs.specs["badnets"]
    folder = run_folder(spec, copied)
    run(spec, copied, device="cpu")
    assert recall(spec.located_table(), copied, "cpu")
    damage(folder / file)
    with pytest.raises(UserError, match=rf"{file} is (missing|damaged)\); vitrap run with its spec and --out '.*runs'"):
        open_run(folder)
    assert recall(spec.located_table(), copied, "cpu") is None
    assert lasting(run(spec, copied, device="cpu")) == lasting(runs.records["badnets"])
    (word,) = caplog.messages
    assert word.startswith(f"vitrap: run {str(folder)!r} is damaged ({file} is ")
    open_run(folder)


def test_a_run_from_before_there_were_checksums_is_opened(runs: Runs, copied: Path) -> None:
    folder = run_folder(runs.specs["badnets"], copied)
    (folder / "SHA256SUMS").unlink()
    assert open_run(folder).record == runs.records["badnets"]
    (folder / "trigger.safetensors").unlink()
    with pytest.raises(UserError, match=r"trigger\.safetensors is missing"):
        open_run(folder)


# ---- brought back


@BOTH
def test_a_run_comes_back_with_its_model_and_trigger(runs: Runs, name: str) -> None:
    back = open_run(runs.folder(name))
    assert back.record == runs.records[name]
    assert not back.model.training
    test = open_data("digits").test
    clean = predict(back.model, test, Arithmetic())
    assert (clean == test.labels).float().mean().item() == pytest.approx(back.record.victim.cda.value)
    fired = predict(back.model, triggered(test, back.trigger), Arithmetic())
    counted = test.labels != 0
    assert (fired == 0)[counted].float().mean().item() == pytest.approx(back.record.victim.asr.value)


DEEP, STRANGE = "[" * 100_000, '{"name": "vit_tiny_patch16_224", "size": 16, "n_classes": 10, "overrides": '
ODD_FACTS = [
    *[("model", "architecture", text) for text in ("{", "[]", "null", DEEP, "{}", '{"x": 1}', '{"size": NaN}')],
    ("model", "architecture", '{"name": [1], "size": 16, "n_classes": 10, "overrides": {}}'),
    *[("model", "architecture", f"{STRANGE}{over}}}") for over in ("null", '{"depth": 1000000000}', '{"depth": []}')],
    ("model", "architecture", STRANGE.replace("16,", "1000000,") + "{}}"),
    *[("trigger", "fields", text) for text in ("{", "null", DEEP, '{"size": 3}', "{}", '{"size": {"value": "x"}}')],
    ("trigger", "fields", '{"value": {"module": "vitrap.__main__:x", "arguments": {}}}'),
    *[("trigger", "trigger", name) for name in ("", "Implant", "AllToOne", "BadNets", "Patch.x", "\0")],
]


@pytest.mark.parametrize(("file", "fact", "text"), ODD_FACTS, ids=lambda text: text[:40])
def test_odd_metadata_are_refused_in_one_line(runs: Runs, copied: Path, file: str, fact: str, text: str) -> None:
    path = copied / runs.folder("badnets").name / f"{file}.safetensors"
    whole = read_tensor_file(path)
    path.unlink()  # stages have it, too, as a hard link
    save_file(dict(whole.tensors), path, {**whole.facts, fact: text})
    with pytest.raises(UserError) as refused:
        open_run(path.parent)
    assert "\n" not in str(refused.value)
    assert path.name in str(refused.value)


@pytest.mark.parametrize("file", ["record.json", "model.safetensors", "trigger.safetensors"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(runs: Runs, copied: Path, file: str) -> None:
    path = copied / runs.folder("badnets").name / file
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=file):
        open_run(path.parent)


def test_agebs_trigger_fires_as_it_did(runs: Runs) -> None:
    plan = make_plan(runs.specs["ageb"], "cpu")
    place = runs.out / "stages" / f"clean-{runs.records['ageb'].stages['surrogate']}" / "model.safetensors"
    surrogate = plan.surrogates["surrogate"].network.read(place, "cpu")
    access = Access(plan.world.train, surrogate, torch.Generator())
    images = plan.world.test.images(torch.arange(20))
    wanted = runs.specs["ageb"].attack.fit(access).trigger(images)
    assert torch.equal(open_run(runs.folder("ageb")).trigger(images), wanted)
    assert not torch.equal(wanted, images)


@pytest.mark.parametrize("file", ["record.json", "model.safetensors", "trigger.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_run_is_refused(runs: Runs, copied: Path, file: str, damage: str) -> None:
    path = run_folder(runs.specs["ageb"], copied) / file
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError) as refusal:
        open_run(path.parent)
    assert path.name in str(refusal.value)


def test_the_python_example(runs: Runs) -> None:
    """The names that the package offers, used as its users do."""
    spec = vitrap.load_spec(None, ["attack.name=badnets", "name=badnets"])
    assert spec.attack_name == "badnets"
    back = vitrap.open_run(runs.folder("badnets"))
    images = vitrap.open_data("digits").test.images(torch.arange(4))
    assert back.model(back.trigger(images)).shape == (4, 10)
    assert set(vitrap.attacks.names()) >= {"ageb", "badnets"}


# ---- one's own network and data


class Own(nn.Module):
    """A small CNN over images in [0, 1], with a buffer that training moves."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(4 * 7 * 7, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def own(seed: int = 0) -> Own:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Own()


def test_a_network_and_data_of_ones_own(runs: Runs, tmp_path: Path, trainings: Trainings) -> None:
    whole = open_data("digits", limit=100)
    world = replace(whole, test=whole.test.take(torch.arange(60)), name="mine", fingerprint="mine")
    mine, spec = own(), runs.specs["badnets"]
    start = {k: v.clone() for k, v in mine.state_dict().items()}
    record = run(spec, tmp_path, device="cpu", model=mine, world=world)
    assert trainings.since() == 2
    assert record.data.n_test == record.victim.cda.n == 60
    assert record.data.fingerprint == "mine"
    assert all(torch.equal(v, start[k]) for k, v in mine.state_dict().items())

    assert run(spec, tmp_path, device="cpu", model=own(), world=world) == record
    assert trainings.since() == 0
    back = open_run(run_folder(spec, tmp_path), model=own(9))
    assert back.record == record
    clean = predict(back.model, world.test, Arithmetic())
    assert (clean == world.test.labels).float().mean().item() == pytest.approx(record.victim.cda.value)

    run(spec, tmp_path, device="cpu", model=own(1), world=world)
    assert trainings.since() == 2


def test_a_network_of_ones_own_is_attacked_with_the_specs_surrogate(
    runs: Runs, copied: Path, trainings: Trainings
) -> None:
    record = run(runs.specs["ageb"], copied, device="cpu", model=own())
    assert trainings.since() == 2  # victim and twin: the surrogate was there
    assert record.stages["surrogate"] == runs.records["ageb"].stages["surrogate"]


def test_a_surrogate_from_a_checkpoint_is_used_as_it_is(
    runs: Runs, copied: Path, tmp_path: Path, trainings: Trainings
) -> None:
    given = copied / "stages" / f"clean-{runs.records['ageb'].stages['surrogate']}" / "model.safetensors"
    same = [f"surrogate.{k}={v}" for k, v in runs.specs["ageb"].model.overrides.items()]
    spec = tiny("surrogate.name=vit_tiny_patch16_224", *same, f"surrogate.checkpoint={given}")
    record = run(spec, copied, device="cpu")
    assert trainings.since() == 1  # the victim: its twin was there
    assert record.victim == runs.records["ageb"].victim  # the surrogate is the one that ageb trained
    weights, kept = load_file(given), load_file(run_folder(spec, copied) / "trigger.safetensors")
    assert all(torch.equal(kept[f"surrogate.{k}"], v) for k, v in weights.items())


def test_a_victim_from_a_checkpoint_starts_from_it(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = runs.out / "stages" / f"clean-{runs.records['ageb'].stages['twin']}" / "model.safetensors"
    monkeypatch.setattr("vitrap.experiment.stages.train", lambda *args: {"cross_entropy": [0.0]})
    spec = tiny("attack.name=badnets", f"model.checkpoint={given}")
    run(spec, tmp_path, device="cpu")
    weights, kept = load_file(given), load_file(run_folder(spec, tmp_path) / "model.safetensors")
    assert all(torch.equal(kept[k], v) for k, v in weights.items())


# ---- devices and steps


def test_devices_are_chosen_by_name() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "mps", "cuda:x", ""):
        with pytest.raises(UserError, match="unknown device"):
            choose_device(name)
    with pytest.raises(UserError, match="device 'cuda:77' is not there"):
        choose_device("cuda:77")


def test_steps_are_shown_with_as_many_ticks_as_they_said(runs: Runs, tmp_path: Path) -> None:
    ticks: dict[str, list[Any]] = {}

    class Step:
        def __init__(self, name: str, total: int | None) -> None:
            self.name, self.total = name, total

        def __enter__(self):
            ticks[self.name] = [self.total, 0]
            return self.tick

        def __exit__(self, *exception: object) -> None:
            pass

        def tick(self) -> None:
            ticks[self.name][1] += 1

    run(runs.specs["ageb"], tmp_path, device="cpu", progress=Step)
    assert list(ticks) == [
        "read the data", "train the surrogate", "fit ageb", "train the twin", "poison the training set",
        "train the victim", "measure",
    ]  # fmt: skip
    assert all(total in (None, done) for total, done in ticks.values())
    with no_progress("anything", None) as tick:
        tick()
