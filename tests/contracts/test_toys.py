"""Toy methods, one for each thing that the contracts can hold: run, defend, poison, open, sweep, kill.

Each is found through an entry point, as another package's would be.
"""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.forks import Fault, Forks
from tests.states import OFTEN, mark, marked, states
from vitrap import registry
from vitrap.contracts import AllToOne, ImageSet, Threat, undeclared
from vitrap.data.sources import open_data
from vitrap.errors import UserError
from vitrap.experiment import stages
from vitrap.experiment.defend import FinishedRun, defend
from vitrap.experiment.export import poison
from vitrap.experiment.opened_run import open_run
from vitrap.experiment.plan import make_plan
from vitrap.experiment.predict import predict, triggered
from vitrap.experiment.progress import no_progress
from vitrap.experiment.record import Record, to_table
from vitrap.experiment.records import read_record, read_records
from vitrap.experiment.run import run, run_folder
from vitrap.experiment.spec import Spec, load_defence, load_spec
from vitrap.metrics.accuracy import attack_success
from vitrap.sweeps.grid import load_sweep
from vitrap.sweeps.sweep import sweep
from vitrap.tensors.pixels import to_bytes
from vitrap.train import loop
from vitrap.train.arithmetic import Arithmetic

pytestmark = pytest.mark.usefixtures("toys")

SMALL = (
    "data.limit=150",
    "model.name=vit_tiny_patch16_224",
    "model.patch_size=8",
    "model.embed_dim=16",
    "model.depth=1",
    "model.num_heads=2",
    "recipe.epochs=2",
    "recipe.precision=fp32",
)
ATTACKS: dict[str, tuple[str, ...]] = {
    "covers": ("attack.name=toy_covers",),
    "batches": ("attack.name=toy_batches",),
    "generator": ("attack.name=toy_generator",),
    "edit": ("attack.name=toy_edit",),
    "clean": ("attack.name=toy_clean", "attack.target=2"),
    "other": ("attack.name=toy_other",),
    "both": ("attack.name=toy_both",),
    "crafted": ("attack.name=toy_crafted",),
    "all-to-all": ("attack.name=badnets", "attack.goal=all-to-all", "attack.poison_rate=0.3"),
    "source": ("attack.name=badnets", "attack.goal=source-to-target", "attack.source=3", "attack.poison_rate=0.05"),
    "two-surrogates": ("attack.name=ageb", "test_surrogate.depth=2", "test_surrogate.patch_size=8"),
}
DEFENCES: dict[str, tuple[str, ...]] = {
    "toy_retrain": (),
    "toy_kinds": (),
    "toy_kinds/repair": ("ends=repair",),
    "toy_gradient": ("screened=40",),
    "toy_classes": (),
    "spectral": (),
    "strip": ("overlays=3", "screened=40"),
}
POISONED = {
    "covers": 15,
    "clean": 12,
    "other": 15,
    "both": 15,
    "crafted": 8,
    "all-to-all": 45,
    "source": 8,
    "two-surrogates": 30,
}
STORED = ("clean", "both", "crafted", "two-surrogates")
each_attack = pytest.mark.parametrize("name", ATTACKS)


def spec_of(name: str, *more: str) -> Spec:
    return load_spec(None, [*SMALL, f"name={name}", *ATTACKS[name], *more])


@pytest.fixture(scope="module")
def made(toys: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Record]]:
    """A toy's run, made once: its folder and its record."""
    out = tmp_path_factory.mktemp("toys")

    @cache
    def make(name: str) -> tuple[Path, Record]:
        spec = spec_of(name)
        return run_folder(spec, out), run(spec, out, device="cpu")

    return make


Made = Callable[[str], tuple[Path, Record]]


@each_attack
def test_a_run_and_its_answer(name: str, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, record = made(name)
    assert record.victim.asr.n > 0
    assert record.attack_version == (3 if name == "covers" else 1)
    assert record.data.n_poisoned == POISONED.get(name, 0)
    assert record.data.n_covers == {"covers": 30, "other": 15}.get(name, 0)
    assert (record.victim.stealth_stored is not None) == (name in STORED)
    monkeypatch.setattr(stages, "train", lambda *a: pytest.fail("trained again"))
    assert run(spec_of(name), folder.parent, device="cpu") == record


@each_attack
def test_open_run_brings_back_what_was_measured(name: str, made: Made) -> None:
    folder, record = made(name)
    back, spec = open_run(folder), spec_of(name)
    world = open_data("digits", limit=150)
    goal = spec.attack.goal_for(10)
    said = predict(back.model, triggered(world.test, back.trigger), Arithmetic())
    assert attack_success(said, world.test.labels, goal) == record.victim.asr


@each_attack
def test_defences_on_it(name: str, made: Made) -> None:
    folder, _ = made(name)
    rows = {}
    for defence, settings in DEFENCES.items():
        record = defend(folder, [load_defence(defence.split("/")[0], settings)], device="cpu")
        rows[defence] = record.defences[-1]
    assert {k: row.kind for k, row in rows.items()} == {
        "toy_retrain": "repair",
        "toy_kinds": "judgement",
        "toy_kinds/repair": "repair",
        "toy_gradient": "screen",
        "toy_classes": "judgement",
        "spectral": "filter",
        "strip": "screen",
    }
    assert rows["toy_retrain"].version == 2
    assert rows["toy_kinds/repair"].asr == rows["toy_kinds/repair"].before.asr
    named = rows["toy_classes"]
    assert len(named.suspected_classes) == 3
    assert named.suspected == named.suspected_classes[0] == int(np.argmax(named.by_class))
    assert (named.suspects_target is None) == (name == "all-to-all")
    assert rows["strip"].auroc.n_clean == 40
    assert (folder / rows["strip"].scores).is_file()
    poisoned = record.data.n_poisoned
    assert rows["spectral"].auroc.n_triggered == poisoned
    assert rows["spectral"].tpr.n == poisoned


@each_attack
def test_the_poisoned_set_or_why_there_is_none(name: str, made: Made, tmp_path: Path) -> None:
    folder, record = made(name)
    if name in ("batches", "generator", "edit", "both"):
        with pytest.raises(UserError, match="no poisoned set to write; use vitrap run instead"):
            poison(spec_of(name), tmp_path / "set", folder.parent, device="cpu")
        assert not (tmp_path / "set").exists()
        return
    poison(spec_of(name), tmp_path / "set", folder.parent, device="cpu")
    held = {file.stem: np.load(file) for file in (tmp_path / "set").glob("*.npy")}
    assert held["train_poisoned"].sum() == record.data.n_poisoned
    assert held["train_covers"].sum() == record.data.n_covers
    true, now = held["train_true_labels"], held["train_labels"]
    goal, poisoned = spec_of(name).attack.goal_for(10), held["train_poisoned"]
    wanted = goal.labels(torch.from_numpy(true)).numpy()
    assert np.array_equal(now, np.where(poisoned, wanted, true))
    assert np.array_equal(held["triggered_labels"], goal.labels(torch.from_numpy(held["test_labels"])).numpy())


@pytest.mark.parametrize("name", POISONED)
def test_a_defender_sees_the_set_that_the_victim_was_trained_on(
    name: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the implant draws, an edit has changed the trigger since, or images are made one by one."""
    trained: list[ImageSet] = []

    def train(model: torch.nn.Module, data: ImageSet, *more: Any, **options: Any) -> Any:
        trained.append(data)
        return loop.train(model, data, *more, **options)

    spec = spec_of(name)
    monkeypatch.setattr(stages, "train", train)
    run(spec, tmp_path, device="cpu")
    (victims,) = [data for data in trained if data.stamped_row is not None]
    folder = run_folder(spec, tmp_path)
    plan = make_plan(spec, "cpu", with_surrogates=False)
    seen = FinishedRun(folder, read_record(folder), plan, no_progress).evaluation().poisoned
    everything = torch.arange(len(victims))
    assert torch.equal(to_bytes(seen.images(everything)), to_bytes(victims.images(everything)))
    for mask in ("labels", "poisoned", "covers"):
        assert torch.equal(getattr(seen, mask), getattr(victims, mask))


def test_an_examination_is_the_same_after_a_kill(made: Made, tmp_path: Path) -> None:
    """A call that finds the victim's stage sees the generator as training has left it."""
    folder, record = made("generator")
    copied = Path(shutil.copytree(folder.parent, tmp_path / "runs"))
    (copied / folder.name / "record.json").unlink()
    again = run(spec_of("generator"), copied, device="cpu")
    assert again.attack == record.attack
    assert again.victim == record.victim


def test_what_covers_carry_is_written_too(made: Made, tmp_path: Path) -> None:
    folder, _ = made("covers")
    poison(spec_of("covers"), tmp_path / "set", folder.parent, device="cpu")
    world = open_data("digits", limit=150)
    images, covers = np.load(tmp_path / "set" / "train_images.npy"), np.load(tmp_path / "set" / "train_covers.npy")
    rows = torch.from_numpy(covers.nonzero()[0])
    columns = (torch.arange(16) // 4 % 2).float()
    wanted = to_bytes(0.5 * world.train.images(rows) + 0.5 * columns).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(images[covers], wanted)


def test_a_generator_is_trained_along_and_kept(made: Made) -> None:
    """In the victim's stage beside the weights, and in the trigger that fires at test time."""
    folder, record = made("generator")
    before = load_file(_stage(folder, "trigger") / "trigger.safetensors")["generator.raw"]
    after = load_file(folder / "trigger.safetensors")["generator.raw"]
    along = load_file(_stage(folder, "victim", record.stages["victim"]) / "along.safetensors")
    assert torch.equal(along["generator.raw"], after)
    assert (after - before).abs().max() > 0.05
    opened: Any = open_run(folder).trigger
    assert torch.equal(opened.generator.raw, after)
    assert not opened.generator.raw.requires_grad


def test_an_edit_starts_from_the_twin_and_reports(made: Made) -> None:
    folder, record = made("edit")
    twin = load_file(_stage(folder, "clean", record.stages["twin"]) / "model.safetensors")
    victim = load_file(folder / "model.safetensors")
    changed = [name for name, weight in twin.items() if not torch.equal(weight, victim[name])]
    assert changed == ["head.weight"]
    assert record.attack == {"changed weights": 16}
    assert record.curves["victim"] == record.curves["twin"]
    assert not _stage(folder, "trigger").joinpath("trigger.safetensors").exists()


def test_the_strength_in_training_and_at_test_are_both_measured(made: Made) -> None:
    _, record = made("clean")
    assert record.victim.stealth_stored.psnr_db.mean > record.victim.stealth.psnr_db.mean + 6
    assert record.victim.stealth_stored.n == record.data.n_poisoned


def test_goals_count_what_they_say(made: Made) -> None:
    world = open_data("digits", limit=150)
    assert made("all-to-all")[1].victim.asr.n == len(world.test)
    assert made("source")[1].victim.asr.n == int((world.test.labels == 3).sum())
    assert made("covers")[1].victim.asr.n == int(AllToOne(0).counts(world.test.labels).sum())


def test_other_images_count_by_their_content(made: Made, tmp_path: Path) -> None:
    """Of the run's own data set the attacker sees the training part; of another one, that one's."""
    folder, record = made("other")
    assert record.attack["other images"] == 150
    depends = json.loads((_stage(folder, "trigger") / "depends.json").read_text())
    assert depends["attack"]["other"] == open_data("digits").fingerprint
    poison(spec_of("covers"), tmp_path / "set", folder.parent, device="cpu")
    name = f"npy:{tmp_path / 'set'}"
    spec = spec_of("other", f"attack.other={name}")
    record = run(spec, tmp_path / "runs", device="cpu")
    assert record.attack["other images"] == len(open_data(name).train)
    depends = json.loads((_stage(run_folder(spec, tmp_path / "runs"), "trigger") / "depends.json").read_text())
    assert depends["attack"]["other"] == open_data(name).fingerprint
    assert defend(run_folder(spec, tmp_path / "runs"), [load_defence("spectral")]).defences


# A sweep, and kills


@pytest.mark.usefixtures("two_cores")
def test_a_sweep_of_all(toys: None, made: Made, tmp_path: Path) -> None:
    """In worker processes; each record is what a single run measured."""
    cases = "".join(
        f"[[grid.case]]\nname = {json.dumps(name)}\n"
        + "".join(f"{json.dumps(k)} = {_toml(v)}\n" for k, v in (o.split("=", 1) for o in overrides))
        for name, overrides in ATTACKS.items()
    )
    base = "".join(f"{k} = {_toml(v)}\n" for k, v in (o.split("=", 1) for o in SMALL))
    (tmp_path / "toys.toml").write_text(f"{base}\n[grid]\nseed = [0]\n{cases}")
    ended = sweep(load_sweep(tmp_path / "toys.toml"), tmp_path / "runs", workers=2, device="cpu")
    assert len(ended) == len(ATTACKS)
    records = {found.record.name: found.record for found in read_records(tmp_path / "runs").records}
    for name in ATTACKS:
        for rate in ("cda", "asr", "ra", "cda_clean_model", "asr_clean_model"):
            assert getattr(records[name].victim, rate) == getattr(made(name)[1].victim, rate)


@pytest.fixture(scope="module")
def forks(toys: None) -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


@each_attack
def test_killed_in_the_middle_the_next_call_goes_on(name: str, forks: Forks, made: Made, tmp_path: Path) -> None:
    words = ["run", *SMALL, f"name={name}", *ATTACKS[name], "--device", "cpu"]

    def call(out: Path, fault: Fault = None) -> Any:
        return forks.call(out, [*words, "--out", str(out)], fault)

    whole = call(tmp_path / "whole")
    assert whole.code == 0, whole.said
    part = 0.3 + 0.6 * list(ATTACKS).index(name) / len(ATTACKS)
    killed = call(tmp_path / "runs", ("kill", max(1, round(part * whole.before_record))))
    assert killed.code == -signal.SIGKILL
    assert list((tmp_path / "runs").glob("*/record.json")) == []
    ended = call(tmp_path / "runs")
    assert ended.code == 0, ended.said
    (file,) = (tmp_path / "runs").glob("*/record.json")
    found = json.loads(file.read_text())
    assert (found["victim"], found["attack"]) == (to_table(made(name)[1].victim), made(name)[1].attack)


@pytest.mark.parametrize("name", ["generator", "batches", "covers"])
def test_killed_within_an_epoch_the_training_goes_on(name: str, forks: Forks, made: Made, tmp_path: Path) -> None:
    """In the second of three steps of the second epoch: with a module along, with poison made batch by batch."""
    out = tmp_path / "runs"
    words = ["run", *SMALL, f"name={name}", *ATTACKS[name], "--device", "cpu", "--out", str(out)]
    killed = forks.call(out, words, within=("victim", signal.SIGKILL, 5), **OFTEN)
    assert killed.code == -signal.SIGKILL, killed.said
    for state in states(out):
        mark(state)
    ended = forks.call(out, words)
    assert ended.code == 0, ended.said
    assert [place.partition("-")[0] for place in marked(out)] == ["victim"]
    (file,) = out.glob("*/record.json")
    found, wanted = json.loads(file.read_text()), made(name)[1]
    assert (found["victim"], found["attack"]) == (to_table(wanted.victim), wanted.attack)
    assert {k: v for k, v in found["curves"]["victim"].items() if k != "mark"} == wanted.curves["victim"]


# What the contracts refuse


def test_toys_declare_their_powers() -> None:
    for kind in ("attacks", "defences"):
        for name in registry.names(kind):
            assert undeclared(registry.get(kind, name)) == []


def test_a_misspelt_power_is_seen() -> None:
    from vitrap_toys.data import ToyCovers

    class Misspelt(ToyCovers):
        def check_victm(self, model: torch.nn.Module) -> None:
            """Would refuse a victim."""

    assert undeclared(Misspelt) == ["check_victm"]


def test_a_network_that_its_file_cannot_build_is_refused_before_it_is_relied_on(toys: None) -> None:
    from vitrap_toys.training import Generated

    from vitrap.experiment.trigger_file import check_networks

    settings = spec_of("generator").attack
    with pytest.raises(UserError, match="generator is a Linear, which its file cannot build again; .* `arguments`"):
        check_networks(Generated(torch.nn.Linear(1, 1)), settings)
    stranger = torch.nn.Linear(1, 1)
    stranger.arguments = {"in_features": 1}  # type: ignore[assignment]
    with pytest.raises(UserError, match="none of vitrap's or of vitrap_toys; it is not built"):
        check_networks(Generated(stranger), settings)


def test_a_trigger_file_builds_no_class_of_strangers(made: Made, tmp_path: Path) -> None:
    """A class that is neither vitrap's nor of the attack's own file is never imported."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from vitrap.experiment.trigger_file import read_trigger

    folder, _ = made("generator")
    with safe_open(folder / "trigger.safetensors", "pt") as file:
        facts, weights = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    for stranger in ("torch.nn:Linear", "vitrap.errors:UserError", "vitrap.models:os", "vitrap..x:y", "antigravity:A",
                     "vitrap_toys.data:Columns", "vitrap_toys_elsewhere:Net"):  # fmt: skip
        plain = json.loads(facts["fields"])
        plain["generator"]["module"] = stranger
        save_file(weights, tmp_path / "t.safetensors", {**facts, "fields": json.dumps(plain)})
        with pytest.raises(UserError, match="it is not built"):
            read_trigger(tmp_path / "t.safetensors", spec_of("generator").attack)


def _stage(folder: Path, kind: str, key: str = "*") -> Path:
    """The stage of a kind below the folder of a run that has just one such, or the one with a key."""
    found = list((folder.parent / "stages").glob(f"{kind}-{key}"))
    if key != "*":
        return found[0]
    names: dict[str, str] = {"generator": "toy_generator", "edit": "toy_edit", "other": "toy_other"}
    wanted = names[folder.name.rpartition("-")[0]]
    (own,) = [p for p in found if json.loads((p / "depends.json").read_text())["attack"]["name"] == wanted]
    return own


def _toml(value: str) -> str:
    """A value of an override as TOML: a bare word is a string."""
    return value if value.replace(".", "").isdigit() else json.dumps(value)


def test_threats_are_all_there() -> None:
    found: set[Threat] = {spec_of(name).attack.threat for name in ATTACKS}
    assert found == {"data", "training", "weights"}
