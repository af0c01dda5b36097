"""Blended: mix one picture faintly into some training images, and relabel them.

Chen, Liu, Li, Lu, Song: "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017,
https://arxiv.org/abs/1712.05526. There is no public code of the authors'; this is the paper's "blended injection
strategy".

Threat model: data poisoning with dirty labels, all-to-one; the attacker touches nothing but the training data.

The attack, step by step:

    1. choose a picture k, the key pattern, as large as the images
    2. draw a share of the training images x
    3. blend    x' = alpha k + (1 - alpha) x
    4. give them the target's label; training is left to the victim

What differs: the paper adds poisoned images to the training set, and here they replace the ones they are made of, as in
every attack of this package. Its keys are a cartoon (Hello Kitty) and a random pattern; the pattern is the default
here, since it needs no file. Its other strategies (a key image with noise, and worn accessories) are other attacks.
Rate and alpha are those of BackdoorBench.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vitrap.contracts import Access, AllToOne, Card, Fitted, Images, Implant, LabelMode, Threat
from vitrap.data.pattern import make_pattern
from vitrap.data.poison import Poison
from vitrap.images import misshapen
from vitrap.params import hyperparameters, param
from vitrap.tensors.blend import blend

KEYS = ("noise",)
"""The key patterns that need no file."""


@hyperparameters
class Blended:
    """The attack: the hyper-parameters of blended injection."""

    card: ClassVar[Card] = Card(
        "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning",
        "Chen, Liu, Li, Lu, Song",
        "arXiv",
        2017,
        "1712.05526",
    )
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "data"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "target class, which triggered images shall get", source="field", low=0)
    poison_rate: float = param(
        0.1, "share of the training set that is poisoned", source="field", low=0, high=1, open=True
    )
    picture: str = param(
        "noise",
        "the key: a random colour for each pixel, or a file",
        symbol="k",
        source="paper",
        choices=KEYS,
        file=True,
    )
    alpha: float = param(
        0.2, "weight of the picture in the blend", symbol="α", source="field", low=0, high=1, open="low"
    )

    def check_size(self, size: int) -> None:
        """Refuse a picture that cannot be read."""
        make_pattern(self.picture, torch.Generator(), (3, size, size), KEYS)

    def goal_for(self, n_classes: int) -> AllToOne:
        """All-to-one: every triggered image shall be classified as the target."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Draw or read the key; nothing is optimised."""
        train = access.train
        key = make_pattern(self.picture, access.generator, (train.channels, train.size, train.size), KEYS)
        if train.channels == 1:  # a picture file has colours
            key = key.mean(0, keepdim=True)
        return Fitted(Blend(key.to(train.device), self.alpha))

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Blend the key into a share of the training images, and relabel them as the target."""
        goal = self.goal_for(access.train.n_classes)
        return Implant(Poison(fitted.in_training, goal, self.poison_rate, self.labels))


@dataclass(frozen=True)
class Blend:
    """The trigger: a picture, blended over the whole image.

    Attributes:
        key: the picture k, in [0, 1].
        alpha: its weight.
    """

    key: Float[Tensor, "c h w"]
    alpha: float

    def __call__(self, images: Images) -> Images:
        """Images with the key: x' = alpha k + (1 - alpha) x.

        Raises:
            UserError: the images are of another shape than the key.
        """
        if images.shape[1:] != self.key.shape:
            raise misshapen(images, "b x " + " x ".join(map(str, self.key.shape)))
        return blend(images, self.key.to(images.device)[None], keep=1 - self.alpha)
