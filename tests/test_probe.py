"""The probe of a network: any bad number in any tensor, and whatever a network may answer."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vitrap.errors import UserError
from vitrap.probe import check_network, weight_fault

CLASSES = 3
PIXELS = 3 * 4 * 4
IMAGES = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def state() -> dict[str, Tensor]:
    """Weights of all kinds, zero where that is normal."""
    return {
        "pos_embed": torch.zeros(1, 4, 2),
        "norm.weight": torch.ones(2),
        "norm.bias": torch.zeros(2),
        "norm.num_batches_tracked": torch.tensor(0),
        "mixed.weight": torch.ones(2, 2, dtype=torch.float16),
        "attn_mask": torch.tensor([[0.0, -math.inf], [0.0, 0.0]]),
        "head.weight": torch.zeros(CLASSES, 2),
        "head.bias": torch.zeros(CLASSES),
    }


FLOATING = [name for name, tensor in state().items() if tensor.is_floating_point()]


def test_biases_scales_heads_and_masks_may_be_what_they_usually_are() -> None:
    assert weight_fault(state()) == ""
    assert weight_fault({}) == weight_fault({"_extra_state": "text", "bias": torch.zeros(3)}) == ""


@given(st.sampled_from(FLOATING), st.integers(0), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_one_number_that_is_not_finite_is_found_wherever_it_is(name: str, place: int, number: float) -> None:
    weights = state()
    weights[name].view(-1)[place % weights[name].numel()] = number
    fault = f"{name} holds {'NaN' if math.isnan(number) else 'infinite numbers'}"
    assert weight_fault(weights) == ("" if name == "attn_mask" and number == -math.inf else fault)


def test_a_network_of_zeros_is_found_though_its_biases_are_not() -> None:
    weights = {name: torch.zeros_like(tensor) for name, tensor in state().items()} | {"head.bias": torch.ones(CLASSES)}
    assert weight_fault(weights) == "pos_embed holds zeros alone, as do all weight matrices"


def linear(change: Callable[[nn.Linear], Any] = lambda layer: None) -> nn.Sequential:
    layer = nn.Linear(PIXELS, CLASSES)
    with torch.no_grad():
        change(layer)
    return nn.Sequential(nn.Flatten(), layer)


class Answering(nn.Module):
    """Answers as `answer` makes it of its logits."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net = linear()
        self.answer = answer

    def forward(self, images: Tensor) -> Any:
        return self.answer(self.net(images))


def broken(logits: Tensor) -> Tensor:
    raise KeyError("no such part\nand more lines")


REFUSED: dict[str, tuple[Any, str]] = {
    "a function": (lambda images: images, "is of type function; give one of type Module"),
    "a class": (nn.Flatten, "is of type type; give one of type Module"),
    "nothing": (None, "is of type NoneType; give one of type Module"),
    "fp16": (linear().half(), r"has weights of fp16 \(1\.weight\), and images are fp32; call its float\(\) first"),
    "bf16": (linear().bfloat16(), r"has weights of bf16 \(1\.weight\)"),
    "fp64": (linear().double(), r"has weights of fp64 \(1\.weight\)"),
    "no values": (linear().to("meta"), "fails on images of 3 x 4 x 4: "),
    "NaN": (linear(lambda m: m.bias[1:].fill_(math.nan)), "cannot be used: 1.bias holds NaN; give sound weights"),
    "zeros": (linear(lambda m: m.weight.zero_()), "cannot be used: 1.weight holds zeros alone"),
    "other images": (nn.Sequential(nn.Flatten(), nn.Linear(5, 3)), "fails on images of 3 x 4 x 4: .*; take another"),
    "an error of its own": (Answering(broken), "fails on images of 3 x 4 x 4: 'no such part"),
    "a tuple": (
        Answering(lambda x: (x, x)),
        "answers with a tuple, not a tensor; wrap it in a module that returns its",
    ),
    "a dict": (Answering(lambda x: {"logits": x}), "answers with a dict, not a tensor"),
    "an object": (Answering(lambda x: SimpleNamespace(logits=x)), "answers with a SimpleNamespace, not a tensor"),
    "classes": (Answering(lambda x: x.argmax(1)), "answers with int64; have it return its logits"),
    "too few": (Answering(lambda x: x[:, :2]), r"answers to 4 images with shape \(4, 2\), wanted \(4, 3\): one logit"),
    "too many": (
        Answering(lambda x: torch.cat([x, x], 1)),
        r"answers to 4 images with shape \(4, 6\), wanted \(4, 3\)",
    ),
    "maps": (
        Answering(lambda x: x[..., None, None]),
        r"answers to 4 images with shape \(4, 3, 1, 1\), wanted \(4, 3\)",
    ),
    "one for all": (
        Answering(lambda x: x.mean(0, keepdim=True)),
        r"answers to 4 images with shape \(1, 3\), wanted \(4, 3\)",
    ),
    "overflow": (Answering(lambda x: x * 1e30 * 1e30), "answers with NaN or infinite logits"),
    "probabilities": (Answering(lambda x: x.softmax(1)), "answers with probabilities, which sum to 1; take off its"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_classifier_is_refused_in_one_line(case: str) -> None:
    model, message = REFUSED[case]
    with pytest.raises(UserError, match=rf"^it {message}") as refusal:
        check_network(model, IMAGES, CLASSES, "it")
    assert "\n" not in str(refusal.value)


def test_a_head_of_zeros_may_be_trained_and_not_be_used() -> None:
    deep = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    nn.init.zeros_(deep[3].weight)
    check_network(deep, IMAGES, CLASSES, "it", untrained=True)
    with pytest.raises(UserError, match=r"^it answers alike to all images, with zeros alone in 3\.weight; train it$"):
        check_network(deep, IMAGES[:1], CLASSES, "it")


def test_a_sound_network_passes_whatever_its_precision_within_autocast() -> None:
    check_network(linear(), IMAGES, CLASSES, "it")
    with torch.autocast("cpu", torch.bfloat16):
        check_network(linear(), IMAGES, CLASSES, "it")
    check_network(Answering(lambda x: x.clamp(min=0)), IMAGES, CLASSES, "it")
