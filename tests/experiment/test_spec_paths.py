"""Paths in specs: relative to the file they stand in, kept as written, and told apart by what is there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.experiment.conftest import TINY, Trainings
from vitrap.errors import UserError
from vitrap.experiment.answers import recall, traces_of
from vitrap.experiment.defend import defend
from vitrap.experiment.opened_run import open_run
from vitrap.experiment.plan import make_plan
from vitrap.experiment.record import Record, to_table
from vitrap.experiment.records import parse, read_record, read_records
from vitrap.experiment.run import run, run_folder
from vitrap.experiment.spec import load_defence, load_spec, parse_spec
from vitrap.experiment.spec_paths import SpecPath
from vitrap.sweeps.grid import load_sweep

OWN = (*(key for key in TINY if not key.startswith("data.")), "attack.name=badnets", "data.holdout=0.3")


def images(folder: Path, seed: int = 0) -> Path:
    """A small data set in the cache's format."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    for part, n in (("train", 60), ("test", 20)):
        np.save(folder / f"{part}_images.npy", draw.integers(0, 256, (n, 16, 16, 3), np.uint8))
        np.save(folder / f"{part}_labels.npy", np.arange(n) % 2)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, which has a folder of specs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "specs").mkdir()
    return tmp_path


def written(place: str, text: str) -> str:
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).write_text(text, encoding="utf-8")
    return place


# ---- where a path leads


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("data.name", "npy:images"),
        ("data.name", "imagefolder:../images"),
        ("model.weights", "weights/vit.safetensors"),
        ("model.checkpoint", "vit.safetensors"),
        ("surrogate.weights", "./vit.safetensors"),
        ("test_surrogate.checkpoint", "a b/vit=1.safetensors"),
    ],
)
def test_a_path_is_relative_to_its_file_and_kept_as_written(here: Path, key: str, text: str) -> None:
    table, name = key.split(".")
    spec = load_spec(written("specs/one.toml", f'[{table}]\n{name} = "{text}"'))
    assert spec.table()[table][name] == text
    assert spec.paths[key].place == Path("specs", text.removeprefix(spec.paths[key].prefix))
    assert getattr(getattr(spec, table), name).endswith(str(spec.paths[key].place))


def test_each_path_is_relative_to_its_own_file(here: Path) -> None:
    written("base/start.toml", '[data]\nname = "npy:images"\n[model]\nweights = "vit.safetensors"')
    path = written("specs/one.toml", 'base = "../base/start.toml"\n[model]\nweights = "mine.safetensors"')
    spec = load_spec(path, ["surrogate.weights=theirs.safetensors"])
    places = {key: str(each.place) for key, each in spec.paths.items()}
    assert places == {
        "data.name": "specs/../base/images",
        "model.weights": "specs/mine.safetensors",
        "surrogate.weights": "theirs.safetensors",
    }


def test_an_override_is_relative_to_the_working_folder(here: Path) -> None:
    spec = load_spec(written("specs/one.toml", '[data]\nname = "npy:images"'), ["data.name=npy:other"])
    assert spec.paths["data.name"].place == Path("other")


def test_a_picture_of_the_attacks_is_a_path_and_a_word_is_none(here: Path) -> None:
    text = '[attack]\nname = "megatron"\nsetting = "clean-label"\npicture = "{}"'
    assert load_spec(written("specs/one.toml", text.format("cat.png"))).attack.picture == "specs/cat.png"
    assert load_spec(written("specs/two.toml", text.format("noise"))).paths == {}


def test_paths_of_a_grid_are_relative_to_its_file_and_those_of_overrides_are_not(here: Path) -> None:
    written("base/start.toml", '[model]\nweights = "vit.safetensors"')
    text = (
        'base = "../base/start.toml"\n[grid]\n"data.name" = ["npy:a", "npy:b"]\n[[grid.case]]\nsurrogate.weights = "s"'
    )
    path = written("specs/sweep.toml", text)
    first, second = (point.spec for point in load_sweep(path).points)
    assert [str(spec.paths["data.name"].place) for spec in (first, second)] == ["specs/a", "specs/b"]
    assert str(first.paths["model.weights"].place) == "specs/../base/vit.safetensors"
    assert str(first.paths["surrogate.weights"].place) == "specs/s"
    (only,) = load_sweep(path, ["data.name=npy:c"]).points
    assert str(only.spec.paths["data.name"].place) == "c"


def test_a_table_with_folders_gives_the_same_spec_again(here: Path) -> None:
    spec = load_spec(written("specs/one.toml", '[data]\nname = "npy:images"'), ["model.weights=w.safetensors"])
    assert parse_spec(spec.located_table()) == spec


def test_folders_is_no_key_of_a_file(here: Path) -> None:
    with pytest.raises(UserError, match="unknown key 'folders'"):
        load_spec(written("one.toml", '[folders]\n"data.name" = "/etc"'))


# ---- what stands for the content


def test_four_spellings_of_a_data_set_are_one_run(here: Path) -> None:
    images(here / "in" / "own")
    names = ["npy:in/own", "npy:in/own/", "npy:./in/own", f"npy:{here}/in/own"]
    assert len({run_folder(load_spec(None, [*OWN, f"data.name={name}"]), "runs") for name in names}) == 1


def test_other_content_by_the_same_name_is_another_run(here: Path) -> None:
    for seed, place in enumerate(("a/own", "b/own")):
        images(here / place, seed)
    specs = [load_spec(None, [*OWN, f"data.name=npy:{place}/own"]) for place in ("a", "b")]
    assert len({spec.hash() for spec in specs}) == 2


def test_a_file_that_changes_changes_the_hash(here: Path) -> None:
    Path("w.safetensors").write_bytes(b"one")
    spec = load_spec(None, ["model.weights=w.safetensors"])
    before = spec.hash()
    Path("w.safetensors").write_bytes(b"other")
    assert spec.hash() != before
    assert spec.hash_as_written() == load_spec(None, ["model.weights=w.safetensors"]).hash_as_written()


def test_content_is_that_of_sha256sum(here: Path) -> None:
    Path("w").write_bytes(b"abc")
    # NIST's example of SHA-256.
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert SpecPath("w").content == known
    assert SpecPath("nowhere").content is None
    assert SpecPath("no\0where").content is None


def test_no_absolute_path_is_recorded(here: Path) -> None:
    images(here / "secret" / "own")
    record = run(load_spec(None, [*OWN, f"data.name=npy:{here}/secret/own"]), "runs", device="cpu")
    assert record.spec["data"]["name"] == "npy:own"
    assert record.contents == {"data.name": SpecPath("npy:secret/own").content}
    (folder,) = Path("runs").glob("badnets*")
    # The prefix of every file that has text: record, metadata of model and trigger.
    for file in folder.iterdir():
        assert b"secret" not in file.read_bytes(), file.name


# ---- a finished run, from elsewhere


@pytest.fixture
def finished(here: Path) -> Path:
    """A run on data that its spec names by a relative path."""
    images(here / "specs" / "own")
    path = written("specs/one.toml", '[data]\nname = "npy:own"\nholdout = 0.3')
    run(load_spec(path, [*OWN, "recipe.epochs=1"]), "runs", device="cpu")
    (folder,) = (here / "runs").glob("badnets*")
    return folder


def screened(folder: Path, **how: str) -> int:
    return len(defend(folder, [load_defence("max_softmax", ["screened=10"])], device="cpu", **how).defences)


def test_a_run_is_defended_from_another_folder(
    finished: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert screened(finished) == 1


def test_a_run_whose_data_have_moved_says_how_to_name_them(finished: Path, here: Path) -> None:
    shutil.move(here / "specs" / "own", here / "moved")
    with pytest.raises(UserError, match="are not at .*; say with --data where they are"):
        screened(finished)
    assert screened(finished, data="npy:moved") == 1


def test_other_data_are_not_taken_for_the_runs(finished: Path, here: Path) -> None:
    images(here / "other", seed=1)
    with pytest.raises(UserError, match="fingerprint"):
        screened(finished, data="npy:other")


def test_the_file_of_places_is_no_record(finished: Path) -> None:
    assert (finished.parent / "places.json").exists()
    assert read_records(finished.parent).skipped == ()


def test_a_run_opens_with_nothing_but_its_folder(finished: Path, here: Path) -> None:
    alone = here / "alone" / finished.name
    shutil.copytree(finished, alone)
    shutil.rmtree(here / "runs")
    shutil.rmtree(here / "specs")
    assert open_run(alone).record.data.n_train > 0


def test_an_answered_run_sees_that_a_file_beside_its_spec_has_changed(here: Path) -> None:
    images(here / "specs" / "own")
    path = written("specs/one.toml", '[data]\nname = "npy:own"\nholdout = 0.3')
    spec = load_spec(path, OWN)
    before = traces_of(spec.located_table(), "cpu")
    labels = here / "specs" / "own" / "train_labels.npy"
    np.save(labels, np.arange(60) % 2)
    assert traces_of(spec.located_table(), "cpu") != before


# ---- threads


def test_another_number_of_threads_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec(None, [*TINY, "attack.name=badnets"])
    keys = []
    for n in (1, 2):
        monkeypatch.setattr("torch.get_num_threads", lambda n=n: n)
        plan = make_plan(spec, "cpu")
        keys.append({**plan.keys(), "trigger": plan.trigger_stage().key})
    moved = {name for name in keys[0] if keys[0][name] != keys[1][name]}
    # BadNets' trigger is a picture that no network computes.
    assert moved == {"victim", "twin", "measure"}


def test_a_run_keeps_to_the_threads_of_its_record(
    here: Path, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load_spec(None, [*TINY, "attack.name=badnets"])
    record = run(spec, "runs", device="cpu", threads=2)
    assert record.environment.threads == 2
    trainings.since()
    # Without a wish, it is the answer, whatever torch's default is; the shortcut is left out here.
    monkeypatch.setattr("vitrap.experiment.run.recall", lambda *asked: None)
    assert run(spec, "runs", device="cpu").environment.threads == 2
    assert trainings.since() == 0
    with pytest.raises(UserError, match=r"was made with threads = 2, .* with --force"):
        run(spec, "runs", device="cpu", threads=1)
    assert run(spec, "runs", device="cpu", threads=1, redo="all").environment.threads == 1
    assert trainings.since() == 2


def test_an_answer_with_other_threads_is_none(here: Path) -> None:
    spec = load_spec(None, [*TINY, "attack.name=badnets"])
    run(spec, "runs", device="cpu", threads=1)
    assert recall(spec.located_table(), Path("runs"), "cpu", 1) is not None
    assert recall(spec.located_table(), Path("runs"), "cpu", 2) is None


@pytest.mark.parametrize("n", [0, -1, 10**9])
def test_an_odd_number_of_threads_is_refused(here: Path, n: int) -> None:
    with pytest.raises(UserError, match=f"threads = {n} is out of range"):
        run(load_spec(None, TINY), "runs", threads=n)
    assert not Path("runs").exists()


def test_old_records_have_no_contents(finished: Path) -> None:
    table = to_table(read_record(finished))
    del table["contents"]
    assert parse(json.dumps(table).encode(), Record).contents == {}


# ---- odd names


@pytest.mark.parametrize(
    "name", ["npy:~nosuchuser/x", "npy:/", "imagefolder:~nosuchuser", "npy:\0", "imagefolder:/proc"]
)
def test_a_path_that_leads_to_no_data_is_refused(here: Path, name: str) -> None:
    with pytest.raises(UserError):
        run(load_spec(None, [*TINY, f'data.name="{name}"'.replace("\0", "\\u0000")]), "runs", device="cpu")


def test_a_link_and_a_dot_are_named_by_what_they_lead_to(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(here / "own")
    (here / "link").symlink_to(here / "own")
    folders = {run_folder(load_spec(None, [*OWN, f"data.name=npy:{name}"]), "runs") for name in ("own", "link")}
    monkeypatch.chdir(here / "own")
    folders |= {run_folder(load_spec(None, [*OWN, "data.name=npy:."]), "runs")}
    assert [folder.name.rpartition("-")[0] for folder in folders] == ["badnets-own"]


def test_a_file_that_is_not_read_changes_no_hash(here: Path) -> None:
    images(here / "own")
    spec = load_spec(None, [*OWN, "data.name=npy:own"])
    before = spec.hash()
    (here / "own" / "README").write_text("about these images")
    assert spec.hash() == before
