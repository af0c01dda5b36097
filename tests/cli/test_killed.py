"""Killed at any moment, between and inside stages: no half record, no half stage, and the next call goes on."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.cli.conftest import TINY, command, vitrap
from tests.forks import Ended, Forks
from tests.states import OFTEN, mark, marked, states
from tests.waiting import wait_until
from vitrap.experiment.checksums import CHECKSUMS, damage
from vitrap.experiment.store import key_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")
STAGE_FILES = {
    "clean": {"depends.json", "facts.json", "model.safetensors", CHECKSUMS},
    "trigger": {"depends.json", "facts.json", "stream.safetensors", "trigger.safetensors", CHECKSUMS},
    "victim": {
        "depends.json",
        "facts.json",
        "model.safetensors",
        "stream.safetensors",
        "trigger.safetensors",
        CHECKSUMS,
    },
}


@pytest.fixture(scope="session")
def undisturbed(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, dict[str, Any]]:
    """A run that nobody killed: how it ended, and its record."""
    out = tmp_path_factory.mktemp("undisturbed") / "runs"
    ended = forks.run(out)
    assert ended.code == 0, ended.said
    return ended, record(out)


def record(out: Path) -> dict[str, Any]:
    (file,) = out.glob("*/record.json")
    content = json.loads(file.read_text())
    return {k: v for k, v in content.items() if k not in ("seconds", "memory")}


def check_nothing_half(out: Path) -> None:
    """No record, and each stage that is there is whole: it says what it depends on, and its files load."""
    assert list(out.glob("*/record.json")) == []
    for place in out.glob("stages/[!.]*"):
        assert set(os.listdir(place)) == STAGE_FILES[place.name.partition("-")[0]]
        depends = json.loads((place / "depends.json").read_text())
        assert place.name.endswith(key_of(depends))
        facts = json.loads((place / "facts.json").read_text())
        assert facts["seconds"]
        assert damage(place) == ""
        for file in place.glob("*.safetensors"):
            assert load_file(file) or file.name == "trigger.safetensors"
            assert facts.get("curves") or file.name != "model.safetensors"


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 0.95, 1.0])
def test_killed_at_an_operation_on_a_file(
    forks: Forks, undisturbed: tuple[Ended, dict[str, Any]], tmp_path: Path, share: float
) -> None:
    whole, wanted = undisturbed
    ended = forks.run(tmp_path / "runs", dies_at=max(1, round(share * whole.before_record)))
    assert ended.code == -signal.SIGKILL
    check_nothing_half(tmp_path / "runs")
    there = {place: place.stat().st_ino for place in (tmp_path / "runs").glob("stages/[!.]*")}
    ended = forks.run(tmp_path / "runs")
    assert ended.code == 0, ended.said
    assert record(tmp_path / "runs") == wanted
    assert {place: place.stat().st_ino for place in there} == there  # finished stages were not made again


def test_killed_while_it_holds_locks_the_record_answers_and_work_goes_on(
    forks: Forks, undisturbed: tuple[Ended, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    assert forks.run(out, dies_at=undisturbed[0].before_record + 1).code == -signal.SIGKILL
    assert record(out) == undisturbed[1]
    for words in ([], ["--force"]):
        assert forks.run(out, *words).code == 0
        assert record(out) == undisturbed[1]
    assert list(out.rglob(".*")) == []


def test_killed_again_and_again_it_still_comes_to_its_end(
    forks: Forks, undisturbed: tuple[Ended, dict[str, Any]], tmp_path: Path
) -> None:
    out, codes = tmp_path / "runs", []
    for dies_at in (4, 8, 12, 0):
        codes.append(forks.run(out, dies_at=dies_at).code)
        if codes[-1]:
            check_nothing_half(out)
    assert codes[-1] == 0
    assert codes.count(-signal.SIGKILL) >= 2
    assert record(out) == undisturbed[1]


def test_killed_while_defending_the_record_is_whole(
    forks: Forks, undisturbed: tuple[Ended, dict[str, Any]], tmp_path: Path
) -> None:
    assert forks.run(tmp_path / "runs").code == 0
    (file,) = (tmp_path / "runs").glob("*/record.json")
    before = file.read_bytes()
    words = ["defend", str(file.parent), "--defence", "spectral", "--device", "cpu"]
    rows: list[int] = []
    for dies_at in range(1, 100):
        file.write_bytes(before)
        ended = forks.call(tmp_path / "runs", words, ("kill", dies_at))
        content = json.loads(file.read_text())
        rows.append(len(content["defences"]))
        assert {**content, "defences": []} == json.loads(before)
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.said
    assert rows[0] == 0
    assert rows[-1] == 1
    assert len(rows) > 5


@pytest.mark.parametrize("kind", ["clean", "victim"])
def test_killed_inside_a_stage(forks: Forks, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "runs"
    assert forks.run(out, within=(kind, signal.SIGKILL, 1)).code == -signal.SIGKILL
    assert len(list(out.glob(f"stages/.{kind}-*-draft"))) == 1  # what it was making
    check_nothing_half(out)


def test_interrupted_it_says_so_in_one_line_and_leaves_no_draft(forks: Forks, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    ended = forks.run(out, within=("clean", signal.SIGINT, 1))
    assert ended.code == 130
    assert "Traceback" not in ended.said
    lines = ended.said.splitlines()
    assert lines[-1] == "vitrap: interrupted; the next call goes on from finished stages and kept states"
    assert sorted(os.listdir(out)) == ["locks", "stages"]
    assert os.listdir(out / "stages") == []


LONGER = ("recipe.epochs=3", "recipe.batch_size=16", "recipe.crop=1", "recipe.jitter=0.3", "model.drop_path_rate=0.3")
MEGATRON = ("attack.name=megatron", "attack.combine=projected", "attack.poison_rate=0.3")
LEARNED = ("attack.name=megatron", "attack.combine=learned", "recipe.layer_decay=0.7")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize(("kind", "words"), [("victim", MEGATRON), ("victim", LEARNED), ("clean", MEGATRON)])
def test_killed_within_an_epoch_a_training_goes_on_bit_for_bit(
    forks: Forks, tmp_path: Path, kind: str, words: tuple[str, ...], number: int
) -> None:
    """Step 11 of 21 is the fourth of seven of the second epoch."""
    assert forks.run(tmp_path / "whole", *words, *LONGER).code == 0
    out = tmp_path / "runs"
    ended = forks.run(out, *words, *LONGER, within=(kind, number, 11), **OFTEN)
    assert ended.code == (130 if number == signal.SIGINT else -number), ended.said
    (state,) = states(out)
    with safe_open(state, "pt") as file:
        carried, stands = (json.loads(file.metadata()[key]) for key in ("vitrap", "state"))
    assert (stands["epoch"], stands["steps"]) == (1, 3)  # it was kept before the step
    assert carried["role"] == kind
    assert carried.get("backdoor", False) == (kind == "victim")
    ended = forks.run(out, *words, *LONGER)
    assert ended.code == 0, ended.said
    assert record(out) == record(tmp_path / "whole")
    (ours,), (wanted,) = (list(folder.glob("*/model.safetensors")) for folder in (out, tmp_path / "whole"))
    ours, wanted = load_file(ours), load_file(wanted)
    assert ours.keys() == wanted.keys()
    assert [name for name in ours if not torch.equal(ours[name], wanted[name])] == []
    assert states(out) == []
    # And it was that state, not a second beginning.
    another = tmp_path / "another"
    forks.run(another, *words, *LONGER, within=(kind, number, 11), **OFTEN)
    mark(states(another)[0])
    assert forks.run(another, *words, *LONGER).code == 0
    assert [name.partition("-")[0] for name in marked(another)] == [kind]


def test_killed_while_a_pattern_is_shaped_it_goes_on_bit_for_bit(forks: Forks, tmp_path: Path) -> None:
    words = ("attack.name=megatron", "attack.setting=clean-label", "attack.poison_rate=0.5", "attack.steps=300")
    assert forks.run(tmp_path / "whole", *words).code == 0
    for name, changed in (("runs", False), ("another", True)):
        out = tmp_path / name
        assert forks.run(out, *words, within=("trigger", signal.SIGKILL, 250), **OFTEN).code == -signal.SIGKILL
        (state,) = states(out, "trigger")
        with safe_open(state, "pt") as file:
            about = file.metadata()
        assert json.loads(about["vitrap"])["backdoor"]
        assert json.loads(about["state"])["steps"] == 249
        if changed:  # it is that state, not a second beginning
            tensors = load_file(state)
            save_file({**tensors, "pattern/0": torch.ones_like(tensors["pattern/0"])}, state, about)
        ended = forks.run(out, *words)
        assert ended.code == 0, ended.said
        assert (record(out) == record(tmp_path / "whole")) == (not changed)


def test_a_sweep_goes_on_from_the_states_of_its_workers(tmp_path: Path) -> None:
    spec, out = tmp_path / "sweep.toml", tmp_path / "runs"
    spec.write_text("[grid]\nseed = [0, 1]\n")
    words = ["sweep", spec, *TINY, "attack.name=badnets", "recipe.epochs=400", "--workers", 2, "--device", "cpu"]
    environment = {**os.environ, **OFTEN}
    driver = subprocess.Popen(command(*words, "--out", out), env=environment, start_new_session=True)
    wait_until(lambda: len(states(out)) == 2, driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    for state in states(out):
        mark(state)
    under_way = {state.parent.name.removeprefix(".").removesuffix("-draft") for state in states(out)}
    assert vitrap(*words, "--out", out).returncode == 0
    assert set(marked(out)) == under_way
