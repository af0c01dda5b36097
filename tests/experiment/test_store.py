"""The store: whole or not at all, once for many, and never another's half."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vitrap.errors import UserError
from vitrap.experiment.checksums import CHECKSUMS
from vitrap.experiment.store import LOCKS, STALE, STATE, Stage, Store

STAGE = Stage("clean", {"seed": 0, "data": {"limit": 3}})


def make(text: str = "weights"):
    return lambda folder: (folder / "model").write_text(text)


def content(folder: Path) -> dict[str, str]:
    """All files below a folder, hidden ones included."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.parent.name != LOCKS]
    return {str(file.relative_to(folder)): file.read_text() for file in files}


def hidden(folder: Path) -> list[str]:
    return [f.name for f in folder.rglob("*") if f.name.startswith(".")]


# ---- stages


def test_a_stages_key_changes_with_whatever_it_depends_on() -> None:
    depends = ({"a": 1}, {"a": 2}, {"b": 1}, {"a": 1, "b": 1}, {"a": "1"}, {"a": {"b": 1}}, {"a": None})
    keys = {Stage("clean", d).key for d in depends}
    assert len(keys) == len(depends)
    assert Stage("clean", {"a": 1, "b": 2}).key == Stage("clean", {"b": 2, "a": 1}).key


def test_a_stage_is_made_once(tmp_path: Path) -> None:
    place = Store(tmp_path).find_or_make(STAGE, make("one"))
    assert place == tmp_path / "stages" / f"clean-{STAGE.key}"
    assert Store(tmp_path).find_or_make(STAGE, make("two")) == place
    assert set(content(place)) == {"model", "depends.json", CHECKSUMS}
    assert content(place)["model"] == "one"
    assert json.loads((place / "depends.json").read_text()) == STAGE.depends


def test_force_makes_it_anew_in_place_of_the_old(tmp_path: Path) -> None:
    Store(tmp_path).find_or_make(STAGE, make("one"))
    place = Store(tmp_path).find_or_make(STAGE, make("two"), force=True)
    assert content(place)["model"] == "two"
    assert os.listdir(tmp_path / "stages") == [place.name]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("there", [True, False])
def test_a_stage_that_fails_leaves_nothing_or_what_was_there(tmp_path: Path, error: BaseException, there: bool) -> None:
    if there:
        Store(tmp_path).find_or_make(STAGE, make("one"))
    before = content(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "model").write_text("half")
        raise error

    with pytest.raises(type(error)):
        Store(tmp_path).find_or_make(STAGE, fail, force=True)
    assert content(tmp_path) == before
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_the_state_of_a_training_outlives_what_stopped_it(tmp_path: Path, error: BaseException) -> None:
    def fail(folder: Path) -> None:
        (folder / "model").write_text("half")
        (folder / STATE).write_text("step 7")
        raise error

    def go_on(folder: Path) -> None:
        assert content(folder) == {STATE: "step 7"}
        make("whole")(folder)

    with pytest.raises(type(error)):
        Store(tmp_path).find_or_make(STAGE, fail)
    assert list(content(tmp_path).values()) == ["step 7"]
    place = Store(tmp_path).find_or_make(STAGE, go_on)
    assert set(content(place)) == {"model", "depends.json", CHECKSUMS}
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("forced", [True, False])
def test_a_state_that_would_lead_to_the_same_refusal_or_is_unwanted_goes(tmp_path: Path, forced: bool) -> None:
    def fail(folder: Path) -> None:
        (folder / STATE).write_text("step 7")
        raise RuntimeError if forced else UserError("training diverged")

    def begin(folder: Path) -> None:
        assert content(folder) == {}
        make("whole")(folder)

    with pytest.raises((RuntimeError, UserError)):
        Store(tmp_path).find_or_make(STAGE, fail)
    assert content(Store(tmp_path).find_or_make(STAGE, begin, force=forced))["model"] == "whole"


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_full_disk_leaves_no_half_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    with monkeypatch.context() as full:
        full.setattr(os, failing, lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            Store(tmp_path).find_or_make(STAGE, make())
    assert content(tmp_path) == {}
    assert hidden(tmp_path) == []
    assert content(Store(tmp_path).find_or_make(STAGE, make()))["model"] == "weights"


def test_who_comes_second_waits_and_takes_what_the_first_made(tmp_path: Path) -> None:
    inside, said = threading.Event(), []

    def slow(folder: Path) -> None:
        inside.set()
        waits.wait()
        make("first")(folder)

    @contextmanager
    def waiting(name: str) -> Iterator[None]:
        said.append(name)
        waits.set()
        yield

    waits, places = threading.Event(), []
    thread = threading.Thread(target=lambda: places.append(Store(tmp_path).find_or_make(STAGE, slow)), daemon=True)
    thread.start()
    inside.wait()
    places.append(Store(tmp_path, waiting).find_or_make(STAGE, make("second")))
    thread.join()
    assert places[0] == places[1]
    assert content(places[0])["model"] == "first"
    assert said == ["wait for another's clean"]
    assert hidden(tmp_path) == []


def test_who_waits_for_one_that_fails_makes_it(tmp_path: Path) -> None:
    inside, waits = threading.Event(), threading.Event()

    def fail(folder: Path) -> None:
        inside.set()
        waits.wait()
        raise OSError(errno.ENOSPC, "full")

    @contextmanager
    def waiting(name: str) -> Iterator[None]:
        waits.set()
        yield

    def first() -> None:
        with pytest.raises(OSError, match="full"):
            Store(tmp_path).find_or_make(STAGE, fail)

    thread = threading.Thread(target=first, daemon=True)
    thread.start()
    inside.wait()
    place = Store(tmp_path, waiting).find_or_make(STAGE, make("second"))
    thread.join()
    assert content(place)["model"] == "second"
    assert hidden(tmp_path) == []


RACE = """
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from vitrap.experiment.store import Stage, Store
def make(folder):
    for part in range(20):
        (folder / str(part)).write_text(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for number in range(40):
    place = Store(Path(sys.argv[1])).find_or_make(Stage("clean", {"n": number}), make)
    assert {(place / str(part)).read_text() for part in range(20)} in ({"a"}, {"b"}), place
"""


def test_two_processes_may_make_the_same_stages_at_once(tmp_path: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path), who], **pipes) for who in "ab"]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        racer.communicate()
    assert [racer.returncode for racer in racers] == [0, 0]
    stages = list((tmp_path / "stages").iterdir())
    assert len(stages) == 40
    assert hidden(tmp_path) == []
    assert all(len(list(stage.iterdir())) == 22 for stage in stages)


# ---- damage


def flip(file: Path) -> None:
    """Flip a bit of a file, in place."""
    text = bytearray(file.read_bytes())
    text[len(text) // 2] ^= 1
    file.write_bytes(text)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [flip, truncate, empty, Path.unlink, replace_by_folder])
@pytest.mark.parametrize("file", ["model", "depends.json", CHECKSUMS])
def test_a_damaged_stage_is_made_anew_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: Callable[[Path], object]
) -> None:
    place = Store(tmp_path).find_or_make(STAGE, make("one"))
    damage(place / file)
    if (file, damage) == (CHECKSUMS, Path.unlink):  # as it is with stages from before there were checksums
        assert content(Store(tmp_path).find_or_make(STAGE, make("two")))["model"] == "one"
        return
    assert Store(tmp_path).find("clean", STAGE.key) is None
    assert content(Store(tmp_path).find_or_make(STAGE, make("two")))["model"] == "two"
    assert Store(tmp_path).find("clean", STAGE.key) == place
    (word,) = caplog.messages
    assert word.startswith(f"vitrap: stage {str(place)!r} is damaged (")
    assert word.endswith("; it is made anew")
    assert os.listdir(tmp_path / "stages") == [place.name]


def test_stages_that_were_exchanged_are_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stages = [Stage("clean", {"seed": seed}) for seed in (0, 1)]
    one, two = (Store(tmp_path).find_or_make(stage, make(f"of {stage.depends}")) for stage in stages)
    two.rename(tmp_path / "aside")
    one.rename(two)
    (tmp_path / "aside").rename(one)
    for stage in stages:
        assert content(Store(tmp_path).find_or_make(stage, make("anew")))["model"] == "anew"
    assert [word.count("it is another stage") for word in caplog.messages] == [1, 1]


def test_a_damaged_stage_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    place = Store(tmp_path).find_or_make(STAGE, make("one"))
    flip(place / "model")
    before = content(place)

    def fail(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        Store(tmp_path).find_or_make(STAGE, fail)
    assert content(place) == before


# ---- the folder


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError) as refusal:
            Store(root).check()
        assert str(refusal.value).startswith(f"output folder {str(root)!r} cannot be written (")
        assert str(refusal.value).endswith("; choose another with --out")


def test_checking_makes_nothing(tmp_path: Path) -> None:
    Store(tmp_path / "new" / "er").check()
    assert list(tmp_path.iterdir()) == []


def test_a_draft_that_is_gone_on_with_is_no_old_one(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / STATE).write_text("step 7")
        raise KeyboardInterrupt

    def slow(folder: Path) -> None:
        Store(tmp_path).check()  # as another run does meanwhile
        make("whole")(folder)

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).find_or_make(STAGE, fail)
    (draft,) = (tmp_path / "stages").glob(".*-draft")
    then = time.time() - STALE - 60
    os.utime(draft, (then, then))
    assert content(Store(tmp_path).find_or_make(STAGE, slow))["model"] == "whole"


def test_a_draft_that_is_worked_on_is_not_swept_however_old(tmp_path: Path) -> None:
    def slow(folder: Path) -> None:
        make("half")(folder)
        then = time.time() - STALE - 60
        os.utime(folder, (then, then))
        Store(tmp_path).check()  # as another run does meanwhile
        make("whole")(folder)

    assert content(Store(tmp_path).find_or_make(STAGE, slow))["model"] == "whole"


def test_old_drafts_are_swept_and_young_ones_and_stages_stay(tmp_path: Path) -> None:
    place = Store(tmp_path).find_or_make(STAGE, make())
    drafts = [tmp_path / "stages" / name for name in (".clean-old", ".victim-old", ".young-empty", ".clean-young")]
    for draft in drafts:
        draft.mkdir()
        (draft / "model").write_text("half")
        if draft.name != ".young-empty":  # this one has no training to go on with
            (draft / STATE).write_text("a state")
    for folder in (*drafts[:2], place):
        then = time.time() - STALE - 60
        os.utime(folder, (then, then))
    Store(tmp_path).check()
    assert sorted(f.name for f in (tmp_path / "stages").iterdir()) == [".clean-young", place.name]
    assert content(place)["model"] == "weights"
