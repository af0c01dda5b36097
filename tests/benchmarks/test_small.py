"""Every benchmark runs in its tiniest form and compares like with like. Nothing here is timed."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import arithmetic, first_result, garbage, start_up, together, trigger, whole_runs
from benchmarks.__main__ import PARTS, main, shown
from benchmarks.compare import Figure, Scale
from benchmarks.poisoning import OPTIMISED, PLAIN
from benchmarks.subjects import images, surrogate
from vitrap import registry
from vitrap.attacks.ageb import Ageb, Erosion
from vitrap.cli.main import app
from vitrap.models.classifier import Architecture

TINY = Scale(
    images=20,
    batch=4,
    steps=2,
    repeats=2,
    runs=1,
    least=0,
    network=(("patch_size", 8), ("depth", 2), ("embed_dim", 16), ("num_heads", 2)),
    run=("recipe.epochs=1", "data.limit=20", "model.depth=1", "model.embed_dim=16"),
)


def in_this_process(command: Sequence[str], **options: Any) -> None:
    """A fresh process spends seconds on imports, which tests need not wait for."""
    assert command[1:3] == ["-m", "vitrap.cli.main"]
    done = CliRunner().invoke(app, list(command[3:]))
    assert done.exit_code == 0, done.output


@contextmanager
def crew_of_one(
    network: Architecture, models: int, workers: int, threads: int, scale: Scale
) -> Iterator[Callable[[int], None]]:
    """Nor need they wait for worker processes."""
    yield together.Trainees(network, range(models), scale).advance


@pytest.fixture(scope="module")
def figures() -> dict[str, list[Figure]]:
    tiny = Architecture("vit_tiny_patch16_224", 16, 10, dict(TINY.network))
    with (
        patch.object(first_result.subprocess, "run", in_this_process),
        patch.object(start_up, "run", lambda command: None),
        patch.object(garbage, "run", lambda code: None),
        patch.object(whole_runs, "share", lambda words: (2.0, 1.0)),
        patch.object(arithmetic, "NETWORKS", {arithmetic.ALSO_COMPILED: dict(TINY.network)}),
        patch.object(torch, "compile", lambda model, **options: model),
        patch.object(together, "crew", crew_of_one),
        patch.object(together, "SUBJECTS", {"tiny": tiny}),
        patch.object(together, "BATCH", TINY.batch),
    ):
        return {name: list(part(TINY)) for name, part in PARTS.items()}


TURNS = {
    "first_result": TINY.runs,
    "memory": TINY.runs,
    "whole_runs": TINY.runs,
    "training": 2 * TINY.repeats + 1,
}
"""How often ours and plain take turns, where it is not the usual number."""


@pytest.mark.parametrize("part", PARTS)
def test_every_part_yields_finite_ratios(part: str, figures: dict[str, list[Figure]]) -> None:
    assert figures[part]
    for figure in figures[part]:
        assert figure.part == part
        assert len(figure.ratios) == TURNS.get(part, TINY.repeats)
        assert all(math.isfinite(r) and r > 0 for r in figure.ratios)
        assert json.loads(json.dumps(figure.table(), allow_nan=False))["ratio"]["median"] == figure.ratio
    assert shown(figures[part]).row_count == len(figures[part])


def test_every_attack_has_a_plain_version_unless_it_is_optimised() -> None:
    assert sorted([*PLAIN, *OPTIMISED]) == registry.names("attacks")


def test_plain_triggers_give_the_same_images(figures: dict[str, list[Figure]]) -> None:
    assert [f.name for f in figures["poisoning"]] == list(PLAIN)
    assert all("; 0.00% of pixels differ by more than 1/255" in f.note for f in figures["poisoning"])


def test_the_bare_loop_ends_where_ours_does(figures: dict[str, list[Figure]]) -> None:
    for figure in figures["training"]:
        assert float(figure.note.split()[-3]) < (1e-5 if "fp32" in figure.name else 1e-2)


def test_the_plain_gradient_is_that_of_the_models_own_class() -> None:
    model, x = surrogate(TINY), images(2, "cpu")
    slope, before = trigger.forward_backward(model, x), x.clone()
    assert slope.shape == x.shape
    assert (slope != 0).any()
    assert torch.equal(x, before)
    assert Erosion(model, Ageb(route="pixel"))(x).shape == x.shape


def test_ratios_and_bounds() -> None:
    slow = Figure("p", "n", ours=(3.0, 1.0, 2.0), plain=(1.0, 1.0, 1.0), at_most=1.5)
    assert (slow.ratio, slow.met, slow.wanted, slow.seconds) == (2.0, False, "<= 1.5", (2.0, 1.0))
    fast = Figure("p", "n", ours=(2.0, 4.0), plain=(2.0, 2.0), at_least=0.75, speed=True)
    assert (fast.ratios, fast.ratio, fast.met) == ((1.0, 0.5), 0.75, True)
    late = Figure("p", "n", ours=(91.0,), plain=(91.0,), at_most=1.0, within=90)
    assert (late.met, late.wanted) == (False, "<= 1, <= 90 s")
    assert Figure("p", "n", ours=(1.0,), plain=(1.0,)).met is None
    large = Figure("p", "n", ours=(9e9,), plain=(3e9,), within=8e9, unit="bytes")
    assert (large.ratio, large.met, large.wanted, large.kind) == (3.0, False, "<= 8e+09 bytes", "memory")
    assert large.table()["bytes"] == {"ours": [9e9], "plain": [3e9]}


def test_the_command_writes_what_it_prints(tmp_path, capsys) -> None:
    path = tmp_path / "deep" / "bench.json"
    missed = Figure("trigger", "slow", ours=(2.0,), plain=(1.0,), at_most=1.3)
    with patch.dict(PARTS, {"trigger": lambda scale: iter([missed])}):
        main(["trigger", "--quick", "--json", str(path)])
    printed = capsys.readouterr().out
    assert "MISSED" in printed
    assert "wanted and missed: trigger slow" in printed
    content = json.loads(path.read_text("utf-8"))
    assert content["trigger"]["figures"] == [missed.table()]
    assert content["trigger"]["quick"] is True
    assert content["trigger"]["environment"]["load_before"] >= 0


def test_parts_measured_one_by_one_come_together(tmp_path) -> None:
    one, other = (Figure(part, "fast", ours=(1.0,), plain=(1.0,)) for part in ("poisoning", "trigger"))
    path = tmp_path / "bench.json"
    with patch.dict(PARTS, {"poisoning": lambda scale: iter([one]), "trigger": lambda scale: iter([other])}):
        for part in ("trigger", "poisoning", "trigger"):
            main([part, "--json", str(path)])
    content = json.loads(path.read_text("utf-8"))
    assert {part: measured["figures"] for part, measured in content.items()} == {
        "poisoning": [one.table()],
        "trigger": [other.table()],
    }


def test_an_unknown_part_is_named(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["triger"])
    assert stop.value.code == 2
    assert "unknown part 'triger'; known: poisoning" in capsys.readouterr().err
