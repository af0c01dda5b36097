"""The GPU script on a CPU: operations by hand, checks that check, and a table that loses nothing. Nothing is timed."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry

from benchmarks import gpu, gpu_rows, victim
from benchmarks.gpu_rows import Bench, Case, Found, Row
from benchmarks.operations import Waits, best_rate, counted, matrix_rate, training_operations
from vitrap.experiment.plan import Network
from vitrap.models.classifier import Architecture
from vitrap.train import loop

BENCH = Bench("cpu", small=True, until=float("inf"))
SHAPES = {
    "ViT-S/4, depth 7": (gpu_rows.vit_s(7, small=False), 64, 4, 384, 7),
    "ViT-S/4, depth 12": (gpu_rows.vit_s(12, small=False), 64, 4, 384, 12),
    "ViT-B/16": (gpu_rows.vit_b(small=False), 196, 16, 768, 12),
}


FUSED = {
    "_scaled_dot_product_flash_attention_for_cpu": 2,  # scores, and values weighted by them
    "_scaled_dot_product_flash_attention_for_cpu_backward": 5,  # the gradients of both's factors; the scores once more
}
"""Products of matrices of one attention in a CPU's fused kernels."""


def by_hand(patches: int, side: int, dim: int, depth: int, products: int = 6) -> int:
    """Two operations a multiplication: backward costs twice forward, but for the patches, whose pixels need none.

    `products` are those of an attention: two forward, and for each of their four factors one backward.
    """
    tokens = patches + 1
    layers = 12 * tokens * dim * dim  # q, k, v, projection, MLP of 4 dim
    attention = products * tokens * tokens * dim
    embedding, head = patches * 3 * side * side * dim, 10 * dim
    return 2 * (depth * (3 * layers + attention) + 2 * embedding + 3 * head)


@pytest.mark.parametrize("name", SHAPES)
def test_a_steps_operations_are_those_of_a_formula(name: str) -> None:
    architecture, *shape = SHAPES[name]
    assert training_operations(architecture) == by_hand(*shape)


def test_fused_attention_is_counted_as_torch_knows_its_kernels() -> None:
    """With the scores that they compute twice, or not at all: torch before 2.15 has no formula for a CPU's."""
    tiny = Architecture("vit_tiny_patch16_224", 32, 10, {"patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 2})
    model, images = Network(tiny).build(0).train(), torch.rand(2, 3, 32, 32)
    known = sum(products for name, products in FUSED.items() if getattr(torch.ops.aten, name) in flop_registry)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert counted(model, images, fused=True) == 2 * by_hand(16, 8, 32, 3, known)
    assert counted(model, images, fused=False) == 2 * by_hand(16, 8, 32, 3) == 2 * training_operations(tiny)


def test_the_matrix_rate_is_the_best_median() -> None:
    found = matrix_rate("cpu", (16, 32), turns=2)
    assert [len(turns) for turns in found.values()] == [2, 2]
    assert all(rate > 0 for turns in found.values() for rate in turns)
    assert best_rate({1: (1.0, 9.0, 2.0), 2: (3.0, 3.0, 3.0)}) == (2, 3.0)


def test_waits_are_seen_and_the_loops_own_mask_is_not_one() -> None:
    numbers = torch.arange(3.0)
    with Waits() as waits:
        (numbers > 1).nonzero()
        numbers.sum().item()
        numbers.nonzero()
    assert waits.seen == ["_local_scalar_dense", "nonzero"]


def test_the_loop_does_not_wait_and_one_that_does_is_found() -> None:
    assert (gpu_rows.waiting(BENCH).values["operations"], gpu_rows.waiting(BENCH).met) == (0, True)
    descend = loop.Learner.descend

    def peeking(learner: loop.Learner, terms: loop.Terms) -> None:
        descend(learner, terms)
        torch.ones(()).item()

    with patch.object(loop.Learner, "descend", peeking):
        found = gpu_rows.waiting(BENCH)
    assert (found.values["operations"], found.met) == (7, False)


def test_bf16_keeps_to_fp32() -> None:
    assert gpu_rows.near_fp32(BENCH).met


def test_what_needs_a_gpu_says_so() -> None:
    found = gpu_rows.same_as_cpu(BENCH)
    assert (found.met, gpu.kept(found, "cpu")) == (None, "needs a GPU")


def test_a_timed_step_has_ours_and_plain() -> None:
    with patch.object(gpu_rows, "rates", lambda device, small: {1: (1e9,)}):
        found = gpu_rows.timed(BENCH, Case("tiny", gpu_rows.vit_s(7, small=True), 4, 35.0))
    assert found.figure is not None
    ours, plain = found.figure.seconds
    work = training_operations(gpu_rows.vit_s(7, small=True))
    assert found.values["images/s"] == pytest.approx(2 * 4 / ours)
    assert found.values["plain MFU, %"] == pytest.approx(100 * 2 * 4 * work / plain / 1e9)
    assert found.met is None


def test_compiling_is_left_out_where_there_is_no_time() -> None:
    case = Case("tiny", gpu_rows.vit_s(7, small=True), 4, 35.0, compiled=True)
    assert "no time" in gpu_rows.timed(Bench("cpu", small=True, until=0.0), case).note


# ---- a whole victim


def cifar10(folder: Path) -> None:
    """A few images of the form of CIFAR-10, in the data cache."""
    (folder / "cifar10").mkdir()
    draw = np.random.default_rng(0)
    for part, n in (("train", 200), ("test", 40)):
        np.save(folder / "cifar10" / f"{part}_images.npy", draw.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8))
        np.save(folder / "cifar10" / f"{part}_labels.npy", np.arange(n) % 10)


def test_a_victim_is_poisoned_trained_and_measured_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VITRAP_DATA", str(tmp_path))
    cifar10(tmp_path)
    surrogate, epoch, found = (row() for _, row in victim.accuracy(BENCH))
    assert surrogate.values["seconds"] > 0
    assert epoch.values["epochs"] >= 1
    assert 0 <= found.values["CDA, %"] <= 100
    assert "n = 40" in found.note
    assert "n = 36" in found.note
    assert found.met is None


def test_without_cifar10_one_line_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VITRAP_DATA", str(tmp_path))
    ((_, row),) = victim.accuracy(BENCH)
    assert row().note.startswith("skipped: data set 'cifar10' is not in the data cache")


# ---- the command


def rows(*works: Callable[[], Found]) -> Callable[[Bench], Iterator[Row]]:
    return lambda bench: iter([(f"row {i}", work) for i, work in enumerate(works)])


def broken() -> Found:
    raise RuntimeError("CUDA out of memory.\nTried to allocate")


def test_what_fails_stops_nothing_else(tmp_path, capsys) -> None:
    def no_start(bench: Bench) -> Iterator[Row]:
        yield "first", lambda: Found("trigger", "first")
        raise OSError("no process")

    path = tmp_path / "deep" / "gpu.json"
    good = Found("step", "good", {"MFU, %": 36.0}, wanted=">= 35", met=True)
    late = Found("check", "late", wanted="<= 1", met=False, note="[0, 1]")
    parts = {"step": rows(broken, lambda: good), "trigger": no_start, "check": rows(lambda: late)}
    with patch.dict(gpu.PARTS, parts):
        gpu.main(["step", "trigger", "check", "--small", "--device", "cpu", "--json", str(path)])
    printed = capsys.readouterr().out
    assert "RuntimeError: CUDA out of memory." in printed
    assert "OSError: no process" in printed
    assert "wanted and missed: late" in printed
    assert "[0, 1]" in printed
    content = json.loads(path.read_text("utf-8"))
    assert [(row["name"], row["failed"]) for row in content["rows"]] == [
        ("row 0", True), ("good", False), ("first", False), ("its set-up", True), ("late", False)
    ]  # fmt: skip
    assert list(path.parent.iterdir()) == [path]


def test_the_figures_so_far_are_kept_when_it_is_cut_off(tmp_path) -> None:
    def cut_off() -> Found:
        raise KeyboardInterrupt

    path = tmp_path / "gpu.json"
    with (
        patch.dict(gpu.PARTS, {"step": rows(lambda: Found("step", "done"), cut_off)}),
        pytest.raises(KeyboardInterrupt),
    ):
        gpu.main(["step", "--small", "--device", "cpu", "--json", str(path)])
    assert [row["name"] for row in json.loads(path.read_text("utf-8"))["rows"]] == ["done"]


def test_whole_networks_are_refused_on_a_cpu(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu.main(["peak", "--device", "cpu"])
    assert stop.value.code == 2
    assert "give --small" in capsys.readouterr().err


def test_an_unknown_part_is_named(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu.main(["stepp"])
    assert stop.value.code == 2
    assert "unknown part 'stepp'; known: peak, check" in capsys.readouterr().err
