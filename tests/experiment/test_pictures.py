"""The pictures of a run are drawn whatever its classes are called."""

import io

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vitrap.contracts import AllToOne, ImageSet
from vitrap.experiment.measure import Backdoor
from vitrap.experiment.pictures import draw_examples
from vitrap.train.arithmetic import Arithmetic

NAMES = {
    "unknown": (),
    "plain": ("cat", "dog"),
    "empty": ("", " "),
    "alike": ("cat", "cat"),
    "very long": ("a" * 3_000_000, "dog"),
    "lines": ("a\nb\n\n", "\r\n"),
    "nul": ("a\0", "\0"),
    "right to left": ("\u202ecat", "\u2066x"),
    "no UTF-8": ("\udcff\udcfe", "dog"),
    "formulas": ("$x^{$", "$\\frac{1$"),
    "other scripts": ("犬", "кот 🐈"),
    "escape sequence": ("\x1b[2J", "dog"),
}


def turn(images: Tensor) -> Tensor:
    return 1 - images


@pytest.mark.parametrize("name", NAMES)
def test_classes_may_have_any_names(name: str) -> None:
    pixels = torch.arange(4 * 3 * 8 * 8, dtype=torch.int32).remainder(256).to(torch.uint8).view(4, 3, 8, 8)
    labels = torch.arange(4) % 2
    test = ImageSet(pixels, labels, torch.arange(4), 2, 8, classes=NAMES[name])
    victim = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval()
    content = draw_examples(test, Backdoor(turn, AllToOne(0)), victim, Arithmetic())
    width, height = Image.open(io.BytesIO(content)).size
    assert width < 1200
    assert height < 500
