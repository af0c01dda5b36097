"""Adaptive-Blend: blend a picture over few images, in training only pieces of it, and show it whole at test time.

Qi, Xie, Li, Mahloujifar, Mittal: "Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR 2023,
https://arxiv.org/abs/2205.13613. Code: https://github.com/Unispac/Circumventing-Backdoor-Defenses, which goes on in
https://github.com/vtu81/backdoor-toolbox.

Threat model: data poisoning with dirty labels, all-to-one; the attacker touches nothing but the training data.

The attack, step by step:

    1. cut the picture t into equal pieces
    2. poison           x' = x + alpha m (t - x)        for a share of the images, which are relabelled as the target
    3. covers           the same                        for as many others, which keep their labels
    4. at test time     x' = x + alpha_test (t - x)     the whole picture, and stronger

m is 0 on half of the pieces, drawn for each image, and 1 on the others. Covers keep the network from relying on the
picture alone, and pieces make the poison differ from image to image: in the network's features, poison no longer lies
apart from the clean images of the target class. The whole picture at test time makes up for what this costs in success.
The defaults are the code's.

What differs:

- The picture. The paper blends a cartoon that comes with its code; nothing is downloaded here, so it is uniform noise
  by default (assumed), or white, or a file of yours.
- The pieces of an image follow from a hash of it, so that poisoning can be repeated.
- Where the image cannot be cut evenly, pieces differ by a pixel; the code refuses such images.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitrap.contracts import Access, AllToOne, Card, Fitted, Images, Implant, LabelMode, Threat
from vitrap.data.pattern import make_pattern
from vitrap.data.poison import Covers, Poison
from vitrap.errors import UserError
from vitrap.images import misshapen
from vitrap.params import hyperparameters, param
from vitrap.tensors.blend import blend, paste
from vitrap.tensors.pixels import hashed_noise


@hyperparameters
class AdaptiveBlend:
    """The attack: Adaptive-Blend's hyper-parameters."""

    card: ClassVar[Card] = Card(
        "Revisiting the Assumption of Latent Separability for Backdoor Defenses",
        "Qi, Xie, Li, Mahloujifar, Mittal",
        "ICLR",
        2023,
        "2205.13613",
    )
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "data"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "target class, which triggered images shall get", source="code", low=0)
    poison_rate: float = param(
        0.003, "share of the training set that is poisoned", source="code", low=0, high=1, open=True
    )
    cover_rate: float = param(
        0.003, "share of the training set that is made covers; 0: none", source="code", low=0, high=1
    )
    picture: str = param("noise", "the picture t", symbol="t", choices=("noise", "white"), file=True)
    pieces: int = param(4, "pieces along each side, so that the code's 16 are 4", source="code", low=1)
    mask_rate: float = param(
        0.5, "share of the pieces that a training image does not get", source="code", low=0, high=1
    )
    alpha: float = param(
        0.15, "weight of the picture in training", symbol="α", source="code", low=0, high=1, open="low"
    )
    test_alpha: float = param(
        0.2, "weight of the picture at test time", symbol="α_test", source="code", low=0, high=1, open="low"
    )

    def check_settings(self) -> None:
        """Refuse a share of masked pieces that leaves none."""
        if self._masked() == self.pieces**2:
            raise UserError(
                f"mask_rate = {self.mask_rate} masks all {self.pieces**2} pieces; lower it, or increase pieces"
            )

    def check_size(self, size: int) -> None:
        """Refuse images of `size` pixels that are too small to be cut, and a picture that cannot be read."""
        if self.pieces > size:
            raise UserError(f"attack.pieces = {self.pieces} along a side of {size} px leaves pieces empty; lower it")
        make_pattern(self.picture, torch.Generator(), (3, size, size))

    def goal_for(self, n_classes: int) -> AllToOne:
        """All-to-one: every triggered image shall be classified as the target."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Make both triggers: pieces in training, the whole picture at test time."""
        train = access.train
        self.check_size(train.size)
        shape = (train.channels, train.size, train.size)
        picture = make_pattern(self.picture, access.generator, shape).to(train.device)
        whole = Pieces(picture, self.test_alpha, self.pieces, masked=0)
        return Fitted(whole, stored=Pieces(picture, self.alpha, self.pieces, self._masked()))

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Steps 2 and 3: blend pieces over a share of the training images and relabel them; the same for covers."""
        trigger = fitted.in_training
        covers = Covers(trigger, self.cover_rate) if self.cover_rate else None
        goal = self.goal_for(access.train.n_classes)
        return Implant(Poison(trigger, goal, self.poison_rate, self.labels, covers))

    def _masked(self) -> int:
        """How many pieces a training image does not get."""
        return round(self.mask_rate * self.pieces**2)


@dataclass(frozen=True)
class Pieces:
    """The trigger: blends a picture over an image, except for some of its pieces.

    Attributes:
        picture: the picture t, in [0, 1].
        alpha: weight of the picture, in [0, 1].
        pieces: pieces along each side.
        masked: how many of all pieces an image does not get; a hash of it picks which.
    """

    picture: Float[Tensor, "c h w"]
    alpha: float
    pieces: int
    masked: int

    def __call__(self, images: Images) -> Images:
        """Images with the picture: x + alpha m (t - x).

        Raises:
            UserError: the images have another shape than the picture.
        """
        if images.shape[1:] != self.picture.shape:
            channels, height, width = self.picture.shape
            raise misshapen(images, f"b x {channels} x {height} x {width}")
        blended = blend(images, self.picture[None].to(images.device), 1 - self.alpha)
        return paste(images, blended, pieces_shown(images, self.pieces, self.masked)) if self.masked else blended


def pieces_shown(images: Images, pieces: int, masked: int) -> Bool[Tensor, "b h w"]:
    """m: false on `masked` pieces of each image, picked by a hash of the image."""
    height, width = images.shape[-2:]
    # The pieces with the least noise are masked; the first pixels' noise stands for that of the pieces.
    noise = hashed_noise(images)[:, :pieces, :pieces]
    rank = noise.flatten(1).argsort(1).argsort(1).view_as(noise)
    rows, columns = (torch.arange(side, device=images.device) * pieces // side for side in (height, width))
    return (rank >= masked)[:, rows][:, :, columns]
