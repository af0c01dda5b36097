"""Sweeps: order, estimates and failures; and worker processes that are killed for real."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.waiting import wait_until
from vitrap.errors import UserError
from vitrap.experiment.records import FAILURE, Loaded, read_records
from vitrap.experiment.run import run
from vitrap.sweeps import jobs, workers
from vitrap.sweeps.estimate import estimate_runs, total
from vitrap.sweeps.grid import Sweep, load_sweep
from vitrap.sweeps.jobs import Ended, Event, Started, StepProgress, interleaved, job, work
from vitrap.sweeps.sweep import assign_devices, cores, sweep

pytestmark = pytest.mark.usefixtures("two_cores")
TINY = """
name = "tiny"
[data]
limit = 100
[model]
name = "vit_tiny_patch16_224"
patch_size = 8
embed_dim = 16
depth = 1
num_heads = 2
[attack]
name = "badnets"
[recipe]
epochs = 1
[grid]
"""


@pytest.fixture
def grid(tmp_path: Path) -> Callable[[str], Sweep]:
    def grid(text: str) -> Sweep:
        (tmp_path / "sweep.toml").write_text(TINY + text)
        return load_sweep(tmp_path / "sweep.toml")

    return grid


def records(out: Path) -> dict[str, int]:
    """When each record was written."""
    return {file.parent.name: file.stat().st_mtime_ns for file in out.glob("*/record.json")}


def loaded(out: Path) -> Loaded:
    return read_records(out) if out.exists() else Loaded((), (), ())


def here(sweep: Sweep, out: Path) -> list[Ended]:
    """Do a sweep's runs one after the other in this process."""
    return [work(job(i, p.spec, out, "cpu")) for i, p in enumerate(sweep.points)]


# ---- one run


def test_a_run_that_fails_leaves_its_error_and_the_next_try_clears_it(
    grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    points, out = grid("seed = [0]\n"), tmp_path / "runs"
    with monkeypatch.context() as broken:
        broken.setattr("vitrap.experiment.stages.train", lambda *a, **k: [][0])
        (ended,) = here(points, out)
    assert (ended.how, ended.said) == ("failed", "IndexError: list index out of range")
    (failure,) = read_records(out).failures
    spec = points.points[0].spec
    assert (out / f"tiny-{spec.hash()}" / FAILURE).exists()
    assert (failure.name, failure.hash, failure.seed, failure.error) == ("tiny", spec.hash(), 0, ended.said)
    assert failure.spec == spec.table()
    assert "IndexError" in failure.traceback[-1]
    assert estimate_runs(points, loaded(out))[0].state == "failed before"

    (ended,) = here(points, out)
    assert ended.how == "done"
    assert read_records(out).failures == ()
    (again,) = here(points, out)
    assert (again.how, again.said) == ("kept", ended.said)


def test_a_failure_that_cannot_be_written_is_told_all_the_same(grid, tmp_path: Path):
    (point,) = grid("seed = [0]\n").points
    (tmp_path / "runs").write_text("no folder")
    assert work(job(0, point.spec, tmp_path / "runs", "cpu")).how == "failed"


def test_jobs_that_share_a_twin_do_not_come_first_together(grid, tmp_path: Path):
    points = grid("attack.size = [1, 2]\nseed = [0, 1]\n").points
    todo = [job(i, p.spec, tmp_path, "cpu") for i, p in enumerate(points)]
    assert [j.number for j in interleaved(todo, lambda j: j.spec["seed"])] == [0, 1, 2, 3]
    assert [j.number for j in interleaved(todo, lambda j: j.spec["attack"]["size"])] == [0, 2, 1, 3]
    assert [j.number for j in interleaved(todo, lambda j: 0)] == [0, 1, 2, 3]


# ---- what there is to do


def test_cores_and_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vitrap.sweeps.sweep.cores", lambda: 8)
    assert assign_devices(None, "cpu", 100) == (["cpu"] * 8, 1)
    assert assign_devices(3, "cpu", 100) == (["cpu"] * 3, 2)
    assert assign_devices(None, "cpu", 2) == (["cpu"] * 2, 4)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert assign_devices(None, "auto", 100) == (["cuda:0", "cuda:1"], 4)
    assert assign_devices(3, "auto", 100) == (["cuda:0", "cuda:1", "cuda:0"], 2)
    assert assign_devices(None, "cuda", 100) == (["cuda:0", "cuda:1"], 4)
    assert assign_devices(None, "cuda:1", 100) == (["cuda:1"], 8)
    assert assign_devices(2, "cuda:1", 100) == (["cuda:1"] * 2, 4)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert assign_devices(None, "auto", 100) == (["cpu"] * 8, 1)
    with pytest.raises(UserError, match="--workers 0"):
        assign_devices(0, "cpu", 3)


def test_the_estimate_goes_by_finished_runs_alike_and_counts_shared_stages_once(grid, tmp_path: Path):
    out, points = tmp_path / "runs", grid("seed = [0, 1]\nattack.size = [2, 3, 4]\n")
    assert [a.state for a in estimate_runs(points, loaded(out))] == ["to run"] * 6
    assert total(estimate_runs(points, loaded(out)), 2) == (0, 6)
    record = run(points.points[0].spec, out, device="cpu")
    file = out / f"tiny-{record.hash}" / "record.json"
    content = json.loads(file.read_text())
    content["seconds"] = {"poison": 1, "victim": 10, "fit": 2, "measure": 3, "twin": 100}
    file.write_text(json.dumps(content))
    content["environment"] |= {"threads": 1, "device_kind": "cpu"}
    file.write_text(json.dumps(content))
    assert [a.seconds for a in estimate_runs(points, loaded(out), threads=2)][1] == 8
    assert [a.seconds for a in estimate_runs(points, loaded(out), "cuda:0")][1] is None
    without = json.loads(json.dumps(content))
    without |= {"name": "other", "seed": 7, "hash": "0" * 12}
    without["spec"]["seed"] = 7
    del without["seconds"]["twin"]
    (out / "other").mkdir()
    (out / "other" / "record.json").write_text(json.dumps(without))
    estimates = estimate_runs(points, loaded(out))
    assert [a.state for a in estimates] == ["record there", *["to run"] * 5]
    assert [a.seconds for a in estimates] == [0, 16, 16, 116, 16, 16]  # the second seed's twin is to be trained once
    assert total(estimates, 2) == (90, 0)
    other = estimate_runs(grid("seed = [0]\nrecipe.epochs = [1, 2]\n"), loaded(out))
    assert [a.seconds for a in other] == [16, None]
    with_strip = estimate_runs(grid("seed = [0]\nattack.size = [2]\ndefences = ['strip']\n"), loaded(out))
    assert [(a.state, a.seconds) for a in with_strip] == [("defences missing", 0)]


# ---- worker processes


def test_a_killed_worker_is_replaced_and_a_failing_run_stops_no_other(grid, tmp_path: Path):
    """Two workers, four runs with one twin; a worker is killed in its first training, and one run cannot succeed."""
    out = tmp_path / "runs"
    points = grid("attack.size = [1, 2, 3, 4]\n[[grid.case]]\nrecipe.epochs = 80\n").points
    broken = replace(points[3].spec, recipe=replace(points[3].spec.recipe, lr=1e30))
    points = (*points[:3], replace(points[3], spec=broken))
    killed, news = [], []

    def hear(one: Event) -> None:
        news.append(one)
        if isinstance(one, StepProgress) and one.name.startswith("train") and not killed:
            (pid,) = [p.pid for p in workers_of(os.getpid()) if p.number == one.worker]
            os.kill(pid, signal.SIGKILL)
            killed.append(one)

    ended = sweep(Sweep("s", points), out, workers=2, device="cpu", listener=hear)
    assert killed
    assert [one.number for one in ended] == [0, 1, 2, 3]
    assert [one.how for one in ended] == ["done", "done", "done", "failed"]
    assert "lower" in ended[3].said
    assert sorted(Counter(n.number for n in news if isinstance(n, Started)).values()) == [1, 1, 1, 2]
    assert len(records(out)) == 3
    assert [f.error for f in read_records(out).failures] == [ended[3].said]
    assert not list(out.glob("stages/.*"))

    before = records(out)
    again = sweep(Sweep("s", points), out, workers=2, device="cpu")
    assert [one.how for one in again] == ["kept", "kept", "kept", "failed"]
    assert records(out) == before


def test_what_runs_side_by_side_share_is_made_once(grid, tmp_path: Path):
    sides, news = grid("attack.size = [1, 2]\n[[grid.case]]\nrecipe.epochs = 200\n"), []
    sweep(sides, tmp_path / "runs", workers=2, device="cpu", listener=news.append)
    steps = [one.name for one in news if isinstance(one, StepProgress) and one.done == 0]
    assert steps.count("train the victim") == 2
    assert steps.count("train the twin") == 1


def workers_of(driver: int) -> list["Child"]:
    """The worker processes of a driver, in the order of their birth."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, line = (folder / "status").read_text(), (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if f"PPid:\t{driver}\n" in status and b"spawn_main" in line:
            found.append(int(folder.name))
    return [Child(pid, number) for number, pid in enumerate(sorted(found))]


class Child:
    def __init__(self, pid: int, number: int) -> None:
        self.pid, self.number = pid, number


def command(spec: Path, out: Path) -> list[str]:
    words = [sys.executable, "-m", "vitrap.cli.main", "sweep", spec, "--out", out, "--device", "cpu", "--workers", 2]
    return list(map(str, words))


DRIVER = """
import os, signal, sys
from multiprocessing import active_children
from pathlib import Path
from vitrap.sweeps.grid import load_sweep
from vitrap.sweeps.jobs import Ended
from vitrap.sweeps.sweep import sweep
def hear(one):
    if isinstance(one, Ended):
        print(*(worker.pid for worker in active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
sweep(load_sweep(Path(sys.argv[1])), sys.argv[2], workers=2, device="cpu", listener=hear)
"""
"""A sweep that is killed when the first of its runs has ended."""


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes through /proc")
def test_after_a_killed_driver_the_next_call_goes_on(grid, tmp_path: Path):
    out = tmp_path / "runs"
    grid("seed = [0, 1]\nattack.size = [1, 2, 3]\n")
    words = [sys.executable, "-c", DRIVER, str(tmp_path / "sweep.toml"), str(out)]
    driver = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    crew = [int(pid) for pid in driver.stdout.split()]
    assert (driver.returncode, len(crew)) == (-signal.SIGKILL, 2)
    wait_until(lambda: not any(alive(pid) for pid in crew))
    first = records(out)
    assert 1 <= len(first) < 6
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command(tmp_path / "sweep.toml", out), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = records(out)
    assert len(last) == 6
    assert {name: last[name] for name in first} == first
    assert f"6 runs: {6 - len(first)} done, {len(first)} had a record" in done.stdout


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes through /proc")
def test_a_killed_driver_takes_its_workers_along(grid, tmp_path: Path):
    """However long their runs would take: these would take days."""
    out = tmp_path / "runs"
    grid("seed = [0, 1]\n[[grid.case]]\nrecipe.epochs = 1000000\n")
    driver = subprocess.Popen(command(tmp_path / "sweep.toml", out), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: sum(place.is_dir() for place in out.glob("stages/.*")) == 2, driver)  # both are at work
    crew = [child.pid for child in workers_of(driver.pid)]
    driver.kill()
    driver.communicate()
    assert len(crew) == 2
    wait_until(lambda: not any(alive(pid) for pid in crew))
    assert not [place for kind in ("clean", "victim") for place in out.glob(f"stages/{kind}-*")]


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_two_sweeps_at_once_do_each_run_once(grid, tmp_path: Path):
    out = tmp_path / "runs"
    grid("seed = [0, 1]\n[[grid.case]]\nrecipe.epochs = 40\n")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    both = [subprocess.Popen(command(tmp_path / "sweep.toml", out), **pipes) for _ in range(2)]
    said = "".join(one.communicate()[0] for one in both)
    counted = [int(n) for n in re.findall(r"(\d) done", said)]
    assert sum(counted) == 2
    assert sum(int(n) for n in re.findall(r"(\d) had a record", said)) == 2


def test_a_run_whose_worker_always_dies_has_failed(grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    points, out = grid("seed = [0]\n").points, tmp_path / "runs"
    monkeypatch.setattr(workers, "_do_jobs", slice)  # a life that is over at once
    ended = sweep(Sweep("s", points), out, workers=1, device="cpu")
    assert [one.how for one in ended] == ["failed"]
    assert f"its worker died {jobs.TRIES} times" in ended[0].said
    assert len(read_records(out).failures) == 1


def test_missing_data_are_refused_before_any_worker_starts(grid, tmp_path: Path):
    points = grid("data.name = ['digits', 'nowhere']\n").points
    with pytest.raises(UserError, match="nowhere"):
        sweep(Sweep("s", points), tmp_path / "runs", device="cpu")
    assert not (tmp_path / "runs").exists()


def test_cores_are_those_that_this_process_may_use():
    assert 1 <= cores() <= (os.cpu_count() or 1)
