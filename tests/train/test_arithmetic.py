"""Arithmetic: what it switches, that it restores everything, and what a precision stands for."""

from pathlib import Path

import pytest
import torch

from vitrap.models.classifier import Architecture, Classifier, open_model
from vitrap.train import arithmetic
from vitrap.train.arithmetic import Arithmetic, arithmetic_of, compiled, default_arithmetic, has_bf16, width_of
from vitrap.train.recipe import Recipe

CPU, SIZE = torch.device("cpu"), 8
FP32, EAGER, FUSED = Arithmetic("fp32", "fused"), Arithmetic("bf16", "eager"), Arithmetic("bf16", "fused")
TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture
def model() -> Classifier:
    with torch.random.fork_rng(devices=[]):
        return open_model(Architecture("vit_tiny_patch16_224", SIZE, 3, TINY))


def fused(model: Classifier) -> list[bool]:
    return [block.attn.fused_attn for block in model.body.blocks]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("precision", "device", "units", "width", "wanted"),
    [
        ("auto", "cpu", True, 63, FP32),
        ("auto", "cpu", True, 64, EAGER),
        ("auto", "cpu", True, None, FP32),
        ("auto", "cpu", False, 768, FP32),
        ("fp32", "cpu", True, 768, FP32),
        ("bf16", "cpu", False, 16, EAGER),
        ("auto", "cuda", True, 16, FUSED),
        ("auto", "cuda", False, 768, FP32),
        ("fp32", "cuda", True, 768, FP32),
        ("bf16", "cuda", True, None, FUSED),
    ],
)
def test_what_a_precision_stands_for(  # noqa: PLR0913 - a row of the rule
    monkeypatch: pytest.MonkeyPatch, precision, device: str, units: bool, width: int | None, wanted: Arithmetic
) -> None:
    monkeypatch.setattr(arithmetic, "has_bf16", lambda device: units)
    assert default_arithmetic(precision, torch.device(device), width) == wanted


def test_units_of_this_processor_are_those_that_the_system_names() -> None:
    if not (cpuinfo := Path("/proc/cpuinfo")).exists():
        pytest.skip("the system does not say")
    flags = cpuinfo.read_text("utf-8").split()
    assert has_bf16(CPU) == ("amx_bf16" in flags or "avx512_bf16" in flags)


def test_a_recipe_pins_what_it_says_and_no_more(model: Classifier) -> None:
    assert width_of(model) == model.body.num_features
    assert width_of(torch.nn.Identity()) is None
    assert arithmetic_of(Recipe(precision="bf16"), model, CPU) == EAGER
    assert arithmetic_of(Recipe(precision="bf16", attention="fused"), model, CPU) == FUSED
    assert arithmetic_of(Recipe(precision="fp32", attention="eager", compiled=True), model, CPU) == Arithmetic(
        "fp32", "eager", compiled=True
    )


def test_plain_arithmetic_switches_nothing(model: Classifier) -> None:
    with Arithmetic()(model, CPU):
        assert not torch.is_autocast_enabled("cpu")
        assert all(fused(model))
        assert model(torch.rand(2, 3, SIZE, SIZE)).dtype == torch.float32


def test_bf16_and_eager_attention_and_everything_restored(model: Classifier) -> None:
    model.body.blocks[1].attn.fused_attn = False  # type: ignore[union-attr]
    with EAGER(model, CPU):
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert not any(fused(model))
        assert model(torch.rand(2, 3, SIZE, SIZE)).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    assert fused(model) == [True, False]


@pytest.mark.parametrize(("attention", "wanted"), [("fused", True), ("eager", False)])
def test_precision_and_attention_are_apart(model: Classifier, attention, wanted: bool) -> None:
    for precision in ("fp32", "bf16"):
        with Arithmetic(precision, attention)(model, CPU):
            assert fused(model) == [wanted, wanted]
            assert torch.is_autocast_enabled("cpu") == (precision == "bf16")


def test_what_fails_within_leaves_nothing_switched(model: Classifier) -> None:
    with pytest.raises(RuntimeError, match="within"), EAGER(model, CPU):
        raise RuntimeError("within")
    assert not torch.is_autocast_enabled("cpu")
    assert all(fused(model))


def test_a_model_is_compiled_once_and_the_next_one_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch stops compiling after some models, in silence, unless it forgets the earlier ones."""
    done: list[str] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: done.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: done.append("compile") or object())
    one, other = torch.nn.Identity(), torch.nn.Identity()
    assert compiled(one) is compiled(one)
    assert done == ["reset", "compile"]
    assert compiled(other) is not compiled(one)
    assert done == ["reset", "compile"] * 3
    compiled.cache_clear()
