"""Counting what runs and cells cost, and carrying it over to other sizes: by hand, and against timm's networks."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import vitrap
from benchmarks.cost import GROWS_WITH, Study, count, counted, operations, passes
from vitrap import registry

ROOT = Path(__file__).parents[2]
WAS = {"train": 100, "test": 50, "clean": 10, "threshold": 10, "classes": 5}
TWICE = {name: 2 * n for name, n in WAS.items()}


def source(name: str, kind: str, apply: float, row: float) -> dict[str, Any]:
    return {"n": WAS, "defences": {name: {"kind": kind, "apply": apply, "row": row}}}


def test_a_product_and_its_backward_pass() -> None:
    left, right = torch.ones(2, 3), torch.ones(3, 5, requires_grad=True)
    assert counted(lambda: left @ right) == 2 * 2 * 3 * 5
    assert counted(lambda: (left @ right).sum().backward()) == 2 * (2 * 2 * 3 * 5)  # no gradient at `left`


@pytest.mark.parametrize(
    ("name", "kind", "wanted"),
    [
        ("strip", "screen", 2 * 0 + 300 * (20 + 2 * 100) / (10 + 2 * 50)),  # measured with what is scored
        (
            "fine_tune",
            "repair",
            2 * 40 * 2 + (300 - 80) * 2,
        ),  # applied with the clean images, measured with the test set
        ("spectral", "filter", 2 * 40 * 2 + (300 - 80) * 2),
        ("mm_bd", "judgement", 2 * 40 * 2 + (300 - 80)),  # applied with the classes
    ],
)
def test_a_cell_grows_as_its_law_has_it(name: str, kind: str, wanted: float) -> None:
    found = source(name, kind, 0 if kind == "screen" else 40, 300)
    assert passes(found, name, TWICE) == wanted
    assert passes(found, name, WAS) == 300


def test_what_is_bounded_stops_growing() -> None:
    found, bound = source("psbd", "screen", 40, 80), 250
    assert passes(found, "psbd", {**WAS, "clean": 10**6}) == 80 * bound / 10


def test_a_study_by_hand() -> None:
    study = Study("s", 7.0, 4.0, WAS, epochs=3, pixels=12, attacks=2, defences=4, seeds=5)
    found = operations(study, source("spectral", "filter", 40, 300))
    training = 3 * 7 * 100 * 3
    assert found["trainings"] == (2 * 5 + 5 + 1) * training
    assert found["measures"] == 10 * 7 * (10 + 5 * 50)
    assert found["defences"] == 40 * 300 * 7
    assert found["retraining for filters"] == 40 * training


def test_every_defence_that_was_counted_has_its_law() -> None:
    """A new defence need not be counted."""
    counts = json.loads((ROOT / "results" / "scale" / "digits.json").read_text("utf-8"))
    assert set(GROWS_WITH) == set(counts["defences"])
    assert set(GROWS_WITH) <= set(registry.names("defences"))


def test_the_network_of_the_page_is_timms() -> None:
    said = runpy.run_path(str(ROOT / "docs" / "make.py"))["VIT_B"]
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224").eval()
        with torch.no_grad():
            forward = counted(lambda: model(torch.zeros(1, 3, 224, 224)))
    assert forward == pytest.approx(said["forward"], rel=1e-3)
    assert 4 * sum(w.numel() for w in model.parameters()) == pytest.approx(said["weights"], rel=1e-3)


def test_a_finished_run_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ["model.depth=1", "model.embed_dim=16", "model.num_heads=2", "recipe.epochs=1", "attack.name=badnets"]
    record = vitrap.run(vitrap.load_spec(None, ["data.limit=100", *tiny]), tmp_path, device="cpu")
    # What a defence's row takes depends on its kind alone: the cheapest screen and the cheapest filter.
    monkeypatch.setattr(registry, "names", lambda kind: ["max_softmax", "spectral"])
    found = count(tmp_path / f"{record.name}-{record.hash}")
    n = found["n"]
    counting = round(n["test"] * 0.9)  # of ten classes all but the target's images
    screen, spectral = found["defences"]["max_softmax"], found["defences"]["spectral"]
    assert (screen["kind"], spectral["kind"]) == ("screen", "filter")
    assert screen["apply"] == 0
    # Both models see each held-out, clean and triggered image; the victim sees triggered ones once more, for hits.
    assert screen["row"] == pytest.approx(2 * (n["threshold"] + n["test"]) + 3 * counting, rel=0.02)
    assert spectral["apply"] == pytest.approx(n["train"], rel=0.02)
