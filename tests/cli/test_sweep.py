"""`vitrap sweep` as its users call it."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import TINY, Said

Call = Callable[..., Said]
TOML = "[grid]\nseed = [0, 1]\nattack.poison_rate = [0.1, 0.2]\n"


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    (tmp_path / "sweep.toml").write_text(TOML)
    return tmp_path / "sweep.toml"


def refusal(said: Said) -> str:
    assert said.code == 2, said.err
    (line,) = said.err.splitlines()
    assert line.startswith("vitrap: ")
    assert said.out == ""
    return line


def test_a_dry_run_lists_the_runs_and_writes_nothing(call: Call, spec: Path, tmp_path: Path):
    said = call("sweep", spec, "--dry-run", "--out", tmp_path / "runs")
    assert said.code == 0
    assert said.out.count("to run") == 4
    assert "4 runs, 4 to do: no estimate; 4 runs without a finished run like it" in said.out
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_one_run_says_whether_it_is_done(call: Call, tmp_path: Path):
    words = ["run", *TINY, "--out", tmp_path / "runs", "--device", "cpu"]
    said = call(*words, "--dry-run")
    assert (said.code, said.out.count("to run")) == (0, 1)
    assert "1 run, 1 to do: no estimate; 1 run without a finished run like it" in said.out
    assert not (tmp_path / "runs").exists()
    assert call(*words).code == 0
    said = call(*words, "--dry-run")
    assert (said.out.count("record there"), said.out.count("to run")) == (1, 0)
    said = call(*words, "attack.name=badnets", "--dry-run")
    assert "1 run, 1 to do: about" in said.out


def test_a_long_run_says_how_long_before_it_starts(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["run", *TINY, "--out", tmp_path / "runs", "--device", "cpu"]
    assert call(*words).err == ""
    monkeypatch.setattr("vitrap.cli.sweep.WORTH_SAYING", 0)
    said = call(*words, "attack.name=badnets")
    assert re.fullmatch(r"vitrap: about \d+ s, by finished runs like it in '.*runs'\n", said.err)


@pytest.mark.usefixtures("two_cores")
def test_a_sweep_tells_what_came_of_it_and_then_what_is_there(call: Call, spec: Path, tmp_path: Path):
    out = tmp_path / "runs"
    words = ["sweep", spec, *TINY[2:], "data.limit=100", "seed=0", "--out", out, "--device", "cpu", "--workers", 2]
    said = call(*words)
    assert said.code == 0, said.err
    assert "sweep: 2 runs: 2 done; records:" in said.out
    assert "done: seed = 0, attack.poison_rate = 0.1: CDA" in said.err
    assert len(list(out.glob("*/record.json"))) == 2
    said = call(*words, "--dry-run")
    assert "2 runs, 0 to do: nothing to wait for" in said.out
    for record in out.glob("*/record.json"):
        record.unlink()
    said = call("sweep", spec, *TINY[2:], "seed=0", "recipe.lr=1e30", "--out", out, "--device", "cpu", "--workers", 2)
    assert said.code == 1
    assert "2 runs: 2 failed" in said.out
    assert said.err.count("vitrap: failed: seed = 0, attack.poison_rate") == 2
    assert len(list(out.glob("*/failure.json"))) == 2


@pytest.mark.parametrize(
    ("text", "words", "told"),
    [
        ("[grid]\n", [], "is empty"),
        ("seed = 0\n", [], "start it with vitrap run"),
        ("[grid]\nseed = [0]\n[[grid.case]]\nseed = 1\n", [], "contradicts itself"),
        ("[grid]\nattack.alhpa = [0.3]\n", [], "did you mean 'attack.alpha'"),
        (f"[grid]\nseed = {list(range(10001))}\n", [], "10001 runs, more than 10000; say --yes"),
        (TOML, ["--workers", "0"], "--workers 0 is too few"),
        (TOML, ["--device", "tpu"], "unknown device 'tpu'"),
        (TOML, ["data.name=nowhere"], "nowhere"),
        (TOML, ["--ray-address", "127.0.0.1:9"], "nobody answers at --ray-address '127.0.0.1:9'"),
        (TOML, ["--ray-address", "head"], "give HOST:PORT"),
        (TOML, ["--ray-address", "local"], "give HOST:PORT"),
        (TOML, ["--ray-address", ""], "give HOST:PORT"),
        (TOML, ["--ray-address", "", "--workers", "2"], "exclude each other"),
        ("grid = 5\n", [], "must be a table of lists"),
        ("[[grid]]\nseed = [0]\n", [], "must be a table of lists"),
        ("[grid]\nseed = [1979-05-27]\n", [], "seed = 1979-05-27 is a date"),
        ("[grid]\n[[grid.case]]\nseed = 1\n[[grid.case]]\nseed = 1\n", [], "stands twice"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    call: Call, tmp_path: Path, text: str, words: list[str], told: str
):
    (tmp_path / "sweep.toml").write_text(text)
    out = tmp_path / "runs"
    assert told in refusal(call("sweep", tmp_path / "sweep.toml", *words, "--out", out))
    assert not out.exists()


def test_ray_that_is_not_installed_is_named_with_the_remedy(
    call: Call, spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "ray", None)
    line = refusal(call("sweep", spec, "--ray-address", "auto", "--out", tmp_path / "runs"))
    assert "pip install 'vitrap[ray]'" in line


def test_a_sweep_handed_to_run_is_named_as_one(call: Call, spec: Path):
    assert "it is a sweep of many runs; start it with vitrap sweep" in refusal(call("run", spec))
