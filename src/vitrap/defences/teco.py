"""TeCo: corrupt an input in many ways; one that withstands some and not others is suspicious.

Liu, Li, Wang, Hu, Ye, Jin, Wu, Xiao: "Detecting Backdoors During the Inference Stage Based on Corruption Robustness
Consistency", CVPR 2023, https://arxiv.org/abs/2303.18191; code: https://github.com/CGCL-codes/TeCo.

A screen at test time that needs predicted classes alone (Algorithm 1):

    1. corrupt the image x by each of K common corruptions, each at N severities
    2. for each corruption, take the least severity at which the predicted class differs from that of x; N + 1 if none
    3. the score is the standard deviation of these K numbers

A clean image is about as robust to one corruption as to another. A trigger is not: a patch withstands fog and is lost
in a blur, a faint pattern over the whole image the other way round. An image costs 1 + K N forward passes, 71 by
default.

The paper names the 15 corruptions of ImageNet-C, in 5 severities. Here they are 14, all but frost, which overlays
photographs. They are computed in torch (`tensors/corruptions.py`, which says what differs from the package that the
code calls), with the code's severities at every image size, and rounded to 8 bits. What they draw at random is drawn
once for all images, so that the score of an image depends on that image alone. The luck of a draw, such as the angle
of the motion, is then that of all images: in the planted case of our tests, at 16 px, AUROC is between 0.63 and 0.78
over five draws (exploratory). Nothing is particular to CNNs, so nothing is re-derived for ViTs; the paper itself has
two transformers, MobileViT and Swin.

What others' ports do: the authors' own code and BackdoorBench never start again from x. Each corruption comes on top of
all corruptions and severities before it, so that after a few of them nothing remains of the image. Here each is applied
to x, as Algorithm 1 says. The deviation, which the code calls `mad`, is numpy's `std`: over K, not K - 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vitrap.contracts import Card, Images, OutcomeKind, Screen, Suspect
from vitrap.models.batched import logits_under
from vitrap.params import hyperparameters, param
from vitrap.tensors.corruptions import SEVERITIES, Canvas, Corruption
from vitrap.tensors.pixels import round8


@hyperparameters
class TeCo:
    """The defence: TeCo's hyper-parameters."""

    card: ClassVar[Card] = Card(
        "Detecting Backdoors During the Inference Stage Based on Corruption Robustness Consistency",
        "Liu, Li, Wang, Hu, Ye, Jin, Wu, Xiao",
        "CVPR",
        2023,
        "2303.18191",
    )
    version: ClassVar[int] = 1
    kind: ClassVar[OutcomeKind] = "screen"
    needs_train: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False

    severities: int = param(5, "severities of each corruption", symbol="N", source="paper", low=1, high=5)

    def apply(self, suspect: Suspect) -> Screen:
        """Draw what is random in the corruptions; nothing is fitted."""
        clean = suspect.clean
        canvas = Canvas(clean.channels, clean.size, suspect.generator, clean.device)
        corruptions = [
            Severities([corruption(canvas, *strength) for strength in strengths[: self.severities]])
            for corruption, strengths in SEVERITIES.items()
        ]
        return Screen(Spread(suspect.model, corruptions, self.severities))


@dataclass(frozen=True)
class Severities:
    """One corruption at each of its severities.

    Attributes:
        rising: the corruption, from the least severity on.
    """

    rising: Sequence[Corruption]

    def __call__(self, images: Images) -> Float[Tensor, "copies c h w"]:
        """Step 1: the corrupted copies, each made of the image itself; those of one image follow each other."""
        return torch.stack([round8(corrupt(images)) for corrupt in self.rising], 1).flatten(0, 1)


@dataclass(frozen=True)
class Spread:
    """The score: the standard deviation of the severities at which the class changes.

    Attributes:
        model: the suspect's model.
        corruptions: K of them, each at all severities.
        severities: N.
    """

    model: nn.Module
    corruptions: Sequence[Severities]
    severities: int

    def __call__(self, images: Images) -> Float[Tensor, " b"]:
        """The score of each image, in [0, N / 2]."""
        own = logits_under(self.model, images, lambda some: some, 1).argmax(2)
        changes = []
        for corrupt in self.corruptions:
            classes = logits_under(self.model, images, corrupt, self.severities).argmax(2)
            changes.append(first_change(own, classes))
        return deviation(torch.stack(changes, 1))


def first_change(own: Int64[Tensor, "b 1"], classes: Int64[Tensor, "b n"]) -> Int64[Tensor, " b"]:
    """Step 2: the least severity, from 1 on, at which the class differs from the image's own; n + 1 if none.

    >>> first_change(torch.tensor([[4]]), torch.tensor([[4, 4, 2, 4, 1]])).item()
    3
    """
    unchanged = (classes == own).long().cumprod(1)
    return 1 + unchanged.sum(1)


def deviation(changes: Int64[Tensor, "b k"]) -> Float[Tensor, " b"]:
    """Step 3: the standard deviation over the k corruptions.

    >>> deviation(torch.tensor([[1, 1, 6, 6]])).item()
    2.5
    """
    centred = changes - changes.float().mean(1, keepdim=True)
    return centred.square().mean(1).sqrt()
