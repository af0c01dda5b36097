"""The probe: what is chosen from times, that it is measured once, and that nothing else changes."""

import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from tests.experiment.conftest import tiny
from vitrap.errors import UserError
from vitrap.experiment import probe
from vitrap.experiment.defend import defend
from vitrap.experiment.plan import make_plan
from vitrap.experiment.probe import COMPILED, PLAIN, fastest, measured, name_of, time_ways
from vitrap.experiment.progress import silent
from vitrap.experiment.run import run
from vitrap.experiment.spec import load_defence, parse_spec
from vitrap.experiment.store import locked
from vitrap.models.classifier import Classifier
from vitrap.train.arithmetic import Arithmetic

CPU = torch.device("cpu")
EVEN = {name_of(way): 1.0 for way in PLAIN}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITRAP_CACHE", str(tmp_path))
    return tmp_path / "arithmetic"


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What a step takes, in place of a clock; "calls" counts how often it was asked."""
    found = {**EVEN, "bf16 eager": 0.5}

    def told(*args: Any) -> dict[str, float]:
        calls.append(args)
        return found

    calls: list[Any] = []
    monkeypatch.setattr(probe, "time_ways", told)
    monkeypatch.setattr(probe, "calls", calls, raising=False)
    return found


def test_the_fastest_is_taken_and_of_near_ties_the_plainest() -> None:
    assert fastest(EVEN, 1) == Arithmetic("fp32", "fused")
    assert fastest({**EVEN, "bf16 eager": 0.95}, 1) == Arithmetic("fp32", "fused")
    assert fastest({**EVEN, "bf16 eager": 0.5}, 1) == Arithmetic("bf16", "eager")
    assert fastest({**EVEN, "bf16 eager": 0.5, "fp32 eager": 0.54}, 1) == Arithmetic("fp32", "eager")
    assert fastest({"bf16 fused": 3.0}, 1) == Arithmetic("bf16", "fused")


def test_a_compilation_must_pay_for_itself() -> None:
    seconds = {**EVEN, "bf16 fused": 0.01, name_of(COMPILED[0]): 0.005, f"{name_of(COMPILED[0])} first": 40.0}
    assert fastest(seconds, 1000) == Arithmetic("bf16", "fused")
    assert fastest(seconds, 12_000) == Arithmetic("bf16", "fused")  # 80 s of compiling, 60 s saved
    assert fastest(seconds, 100_000) == Arithmetic("bf16", "fused", compiled=True)


def test_every_way_is_timed_and_the_model_stays_as_it_was(tiny_vit: Any) -> None:
    model: Classifier = tiny_vit(proj_drop_rate=0.2).requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    seconds = time_ways(model, (3, 16, 10), 8, CPU)
    assert seconds.keys() == EVEN.keys()
    assert all(0 < took < math.inf for took in seconds.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert not any(w.requires_grad for w in model.parameters())


def test_a_way_that_fails_is_no_way(tiny_vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(step: Any, way: Arithmetic, *rest: Any) -> Any:
        if way.precision == "bf16":
            raise torch.OutOfMemoryError
        return lambda: None

    monkeypatch.setattr(probe, "_step", none)
    assert time_ways(tiny_vit(), (3, 16, 10), 8, CPU).keys() == {"fp32 fused", "fp32 eager"}


def ask(**changes: Any) -> Arithmetic:
    asked: dict[str, Any] = {
        "network": "one",
        "size": (3, 16, 10),
        "batch": 8,
        "steps": 100,
        "device": CPU,
        "show": silent,
    }
    return measured(torch.nn.Identity(), **{**asked, **changes})


def test_it_is_measured_once_for_a_network_a_batch_and_a_size(times: dict[str, float], cache: Path) -> None:
    calls = probe.calls  # type: ignore[attr-defined]
    assert [ask(), ask(), ask(steps=7)] == [Arithmetic("bf16", "eager")] * 3
    assert len(calls) == 1
    for change in ({"network": "two"}, {"size": (3, 32, 10)}, {"batch": 16}):
        ask(**change)
    assert len(calls) == 4
    times["bf16 eager"] = 2.0
    assert ask() == Arithmetic("bf16", "eager")  # what was measured stands
    assert len(list(cache.glob("*.json"))) == 4
    assert not list(cache.glob("*.lock"))


def test_a_way_that_failed_is_not_remembered(times: dict[str, float], cache: Path) -> None:
    del times["bf16 fused"]
    assert ask() == Arithmetic("bf16", "eager")
    assert not list(cache.glob("*.json"))


def test_where_nothing_fits_the_remedy_is_named() -> None:
    with pytest.raises(UserError, match=r"lower recipe\.batch_size"):
        fastest({}, 10)


def test_another_that_measures_is_waited_for_and_believed(times: dict[str, float], cache: Path) -> None:
    ask()
    (file,) = cache.glob("*.json")
    found = file.read_bytes()
    file.unlink()
    holds, shown, names = Event(), Event(), list[str]()

    def other() -> None:
        with locked(file.with_name(f".{file.stem}.lock")):
            holds.set()
            shown.wait()
            file.write_bytes(found)

    def show(name: str, ticks: int | None) -> Any:
        names.append(name)
        shown.set()
        return silent(name, ticks)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(other)
        holds.wait()
        assert ask(show=show) == Arithmetic("bf16", "eager")
        done.result()
    assert names == ["wait for another's measuring"]


def test_threads_are_no_part_of_it(times: dict[str, float]) -> None:
    """So that a sweep's workers, with a thread each, and a single run choose alike."""
    ask()
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        ask()
    finally:
        torch.set_num_threads(before)
    assert len(probe.calls) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "{}", '{"seconds": 3}', '{"seconds": {}}', '{"seconds": {"fp32 fused": -1}}']
)
def test_a_damaged_memory_is_measured_anew(times: dict[str, float], cache: Path, damage: str) -> None:
    ask()
    (file,) = cache.glob("*.json")
    file.write_text(damage, encoding="utf-8")
    assert ask() == Arithmetic("bf16", "eager")
    assert json.loads(file.read_text(encoding="utf-8"))["seconds"] == times


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_no_obstacle(times: dict[str, float], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert ask() == Arithmetic("bf16", "eager")


def test_a_cache_below_a_file_is_no_obstacle(
    times: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VITRAP_CACHE", str(tmp_path / "file"))
    assert ask() == Arithmetic("bf16", "eager")


SPEC = {
    "name": "tiny",
    "data": {"name": "digits"},
    "model": {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "attack": {"name": "badnets"},
}


def plan(**recipe: Any) -> Any:
    return make_plan(parse_spec({**SPEC, "recipe": {"epochs": 1, **recipe}}), "cpu")


def test_a_plan_takes_what_was_measured_and_its_keys_say_so(times: dict[str, float]) -> None:
    chosen = plan()
    assert chosen.arithmetic == Arithmetic("bf16", "eager")
    depends = chosen.twin_stage().depends
    assert depends["arithmetic"] == {"precision": "bf16", "attention": "eager", "compiled": False}
    assert "precision" not in depends["recipe"]
    assert chosen.keys() == plan(precision="bf16").keys()  # what it comes to decides, not how it was said
    times.update(EVEN)
    other = plan(batch_size=32)
    assert other.arithmetic == Arithmetic("fp32", "fused")


def test_a_pinned_precision_is_not_measured(times: dict[str, float]) -> None:
    assert plan(precision="fp32").arithmetic == Arithmetic("fp32", "fused")
    assert plan(precision="bf16").arithmetic == Arithmetic("bf16", "eager")
    assert probe.calls == []  # type: ignore[attr-defined]


def test_a_defence_takes_the_arithmetic_of_its_run(times: dict[str, float], tmp_path: Path) -> None:
    """Even where this machine would choose otherwise by now: a twin that was deleted comes back under its key."""
    times["fp32 eager"] = 0.1
    made = run(tiny("attack.name=badnets", "recipe.precision=auto"), tmp_path / "runs", device="cpu")
    assert (made.precision, made.attention, made.compiled) == ("fp32", "eager", False)
    shutil.rmtree(tmp_path / "runs" / "stages")
    shutil.rmtree(tmp_path / "arithmetic")
    times.update(EVEN)
    folder = tmp_path / "runs" / f"{made.name}-{made.hash}"
    assert [row["name"] for row in defend(folder, [load_defence("max_softmax", [])], device="cpu").defences] == [
        "max_softmax"
    ]
    assert (tmp_path / "runs" / "stages" / f"clean-{made.stages['twin']}").is_dir()


def test_grey_images_are_probed_as_such() -> None:
    grey = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1 * 8 * 8, 4))
    assert time_ways(grey, (1, 8, 4), 8, CPU).keys() == EVEN.keys()
