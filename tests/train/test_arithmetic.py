"""Arithmetic: what it switches, that it restores everything, and what a precision stands for."""

import pytest
import torch

from vitrap.models.classifier import Architecture, Classifier, open_model
from vitrap.train.arithmetic import Arithmetic, compiled, usual

CPU, SIZE = torch.device("cpu"), 8
TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
EAGER = Arithmetic("bf16", "eager")


@pytest.fixture
def model() -> Classifier:
    with torch.random.fork_rng(devices=[]):
        return open_model(Architecture("vit_tiny_patch16_224", SIZE, 3, TINY))


def fused(model: Classifier) -> list[bool]:
    return [block.attn.fused_attn for block in model.body.blocks]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("precision", "device", "wanted"),
    [
        ("auto", "cpu", Arithmetic("fp32", "fused")),
        ("fp32", "cpu", Arithmetic("fp32", "fused")),
        ("bf16", "cpu", Arithmetic("bf16", "eager")),
        ("auto", "cuda", Arithmetic("bf16", "fused")),
        ("fp32", "cuda", Arithmetic("fp32", "fused")),
        ("bf16", "cuda", Arithmetic("bf16", "fused")),
    ],
)
def test_what_a_precision_stands_for_where_nothing_is_measured(precision, device: str, wanted: Arithmetic) -> None:
    assert usual(precision, torch.device(device)) == wanted


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
