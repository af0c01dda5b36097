"""BppAttack: leave each colour channel only a few values, as an image of low colour depth has.

Wang, Zhai, Ma: "BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via Image Quantization
and Contrastive Adversarial Learning", CVPR 2022, https://arxiv.org/abs/2205.13383. Code:
https://github.com/RU-System-Software-and-Security/BppAttack.

Threat model: data poisoning with dirty labels, all-to-one; the attacker touches nothing but the training data.

The attack, step by step:

    1. quantisation   T(x) = round(x (n - 1)) / (n - 1)     n: values that a channel keeps
    2. dithering      the error x - T(x) of each pixel goes to its neighbours (Floyd-Steinberg); off by default
    3. poison         x' = T(x) for a share of the images, which are relabelled as the target
    4. negatives      x' = x + (T(z) - z) for another share, which keep their labels; z: another training image

A negative is a cover: it has the residual of another image, which does not quantise it. From negatives the network
learns that faint noise alone does not count. The defaults are the code's.

What differs:

- The paper's attacker trains the network, and draws poison and negatives anew for every batch. Here they are drawn once
  and stored, so that the attack needs no more than the data; the code, too, quantises before it augments.
- The abstract speaks of negatives made by adversarial attacks, in a contrastive learning. The code has neither: its
  negatives are those of step 4, under the usual cross-entropy, and so are ours.
- z is any training image as it is stored, picked by a hash of x; the code augments z first.
- The paper's second goal, all-to-all, is left out.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from vitrap.contracts import Access, AllToOne, Card, Fitted, Images, ImageSet, Implant, LabelMode, Threat, Trigger
from vitrap.data.poison import Covers, Poison
from vitrap.params import hyperparameters, param
from vitrap.tensors.pixels import image_hash

NEIGHBOURS = {(0, 1): 7 / 16, (1, -1): 3 / 16, (1, 0): 5 / 16, (1, 1): 1 / 16}
"""Floyd and Steinberg's shares of a pixel's error, by rows down and columns right."""


@hyperparameters
class Bpp:
    """The attack: BppAttack's hyper-parameters."""

    card: ClassVar[Card] = Card(
        "BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via Image Quantization and"
        " Contrastive Adversarial Learning",
        "Wang, Zhai, Ma",
        "CVPR",
        2022,
        "2205.13383",
    )
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "data"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "target class, which triggered images shall get", source="code", low=0)
    poison_rate: float = param(
        0.2, "share of the training set that is poisoned", source="code", low=0, high=1, open=True
    )
    cover_rate: float = param(
        0.2, "share of the training set that is made negatives; 0: none", source="code", low=0, high=1
    )
    squeeze_num: int = param(8, "values that each colour channel keeps", symbol="n", source="code", low=2, high=128)
    dithering: bool = param(False, "spread each pixel's error over its neighbours", source="code")

    def goal_for(self, n_classes: int) -> AllToOne:
        """All-to-one: every triggered image shall be classified as the target."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Make the trigger; nothing is optimised, since the settings give it."""
        return Fitted(Quantisation(self.squeeze_num, self.dithering))

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Steps 3 and 4: quantise a share of the training images and relabel them; add residuals to others."""
        trigger = fitted.in_training
        covers = Covers(Negatives(trigger, access.train), self.cover_rate) if self.cover_rate else None
        goal = self.goal_for(access.train.n_classes)
        return Implant(Poison(trigger, goal, self.poison_rate, self.labels, covers))


@dataclass(frozen=True)
class Quantisation:
    """The trigger: T, steps 1 and 2.

    Attributes:
        squeeze_num: values that each colour channel keeps, n.
        dithering: whether each pixel's error goes to its neighbours.
    """

    squeeze_num: int
    dithering: bool

    def __call__(self, images: Images) -> Images:
        """Images of n values a channel."""
        return dither(images, self.squeeze_num) if self.dithering else quantise(images, self.squeeze_num)


@dataclass(frozen=True)
class Negatives:
    """What makes the negatives: adds the residual of a training image, step 4.

    Attributes:
        trigger: T.
        train: the training images z.
    """

    trigger: Trigger
    train: ImageSet

    def __call__(self, images: Images) -> Images:
        """Images with a residual that is not their own; a hash of each picks its z."""
        others = self.train.images(image_hash(images) % len(self.train))
        return (images + self.trigger(others) - others).clamp(0, 1)


def quantise(values: Float[Tensor, "*any"], n: int) -> Float[Tensor, "*any"]:
    """T(x) = round(x (n - 1)) / (n - 1): the nearest of n values from 0 to 1."""
    return (values * (n - 1)).round() / (n - 1)


def dither(images: Images, n: int) -> Images:
    """Quantise pixel by pixel, row by row, and add each pixel's error to those still to come.

    All images are done at once; the time is that of a loop over the pixels of one.
    """
    height, width = images.shape[-2:]
    # One more column on either side and one more row below take the errors that leave the image.
    canvas = functional.pad(images, (1, 1, 0, 1))
    for row in range(height):
        for column in range(1, width + 1):
            wanted = canvas[..., row, column].clone()
            canvas[..., row, column] = quantise(wanted, n)
            error = wanted - canvas[..., row, column]
            for (down, right), share in NEIGHBOURS.items():
                canvas[..., row + down, column + right] += share * error
    return canvas[..., :height, 1 : width + 1].clamp(0, 1)
