"""The memory limit changes no result and no key; the record's peaks are the system's."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vitrap.experiment.run as runner
from tests.experiment.conftest import tiny
from vitrap.data.sources import open_data
from vitrap.experiment.defend import defend
from vitrap.experiment.machine import memory, reset_peaks
from vitrap.experiment.plan import make_plan
from vitrap.experiment.record import Record
from vitrap.experiment.run import run
from vitrap.experiment.spec import load_defence

MEGABYTE = 10**6


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "draw_examples", lambda *args: b"a picture")


def lasting(record: Record) -> dict[str, Any]:
    return {k: v for k, v in asdict(record).items() if k not in ("seconds", "memory", "environment")}


@pytest.mark.parametrize("attack", ["ageb", "badnets", "megatron"])
def test_a_mapped_set_comes_to_the_same_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str) -> None:
    asked = tiny(f"attack.name={attack}", "recipe.crop=2", "recipe.flip=true", "recipe.precision=fp32", "data.size=24")
    resident = run(asked, tmp_path / "resident", device="cpu")
    monkeypatch.setenv("VITRAP_MEMORY", "1")
    assert open_data("digits").train.pixel_row is not None
    mapped = run(asked, tmp_path / "mapped", device="cpu")
    assert lasting(mapped) == lasting(resident)
    one, other = (load_file(next((tmp_path / k).glob("*/model.safetensors"))) for k in ("resident", "mapped"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_a_world_handed_in_has_one_key_however_its_pixels_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny("attack.name=badnets", "recipe.precision=fp32")
    resident = make_plan(spec, "cpu", world=open_data("digits")).keys()
    monkeypatch.setenv("VITRAP_MEMORY", "1")
    assert make_plan(spec, "cpu", world=open_data("digits")).keys() == resident
    assert make_plan(spec, "cpu", world=open_data("digits", limit=500)).keys() != resident


@pytest.mark.parametrize("defence", ["strip", "spectral", "fine_tune", "psbd"])
def test_a_defence_takes_a_mapped_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defence: str) -> None:
    asked = tiny("attack.name=badnets", "recipe.precision=fp32")
    made = run(asked, tmp_path, device="cpu")
    folder = tmp_path / f"{made.name}-{made.hash}"
    rows = []
    for amount in ("8GiB", "1"):
        monkeypatch.setenv("VITRAP_MEMORY", amount)
        made.write(folder)
        record = defend(folder, [load_defence(defence, [])], device="cpu")
        rows.append(replace(record.defences[-1], seconds={}))
    assert rows[0] == rows[1]


def test_peaks_are_of_what_happened_since_they_were_forgotten() -> None:
    device = torch.device("cpu")
    torch.ones(300 * MEGABYTE, dtype=torch.uint8)
    reset_peaks(device)
    before = memory(device).host_peak_bytes
    block = torch.ones(200 * MEGABYTE, dtype=torch.uint8)
    after = memory(device).host_peak_bytes
    assert before is not None
    assert after is not None
    assert 190 * MEGABYTE < after - before < 260 * MEGABYTE
    del block
    assert memory(device).host_peak_bytes == pytest.approx(after, abs=MEGABYTE), "a peak stays"
    reset_peaks(device)
    assert memory(device).host_peak_bytes < after - 150 * MEGABYTE
    assert memory(device).device_peak_bytes is None
