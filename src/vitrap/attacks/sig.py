"""SIG: add a faint wave to some training images of the target class; their labels stay.

Barni, Kallas, Tondi: "A New Backdoor Attack in CNNs by Training Set Corruption without Label Poisoning", ICIP 2019,
https://arxiv.org/abs/1902.11237. There is no public code of the authors'.

Threat model: data poisoning with clean labels, all-to-one; the attacker touches nothing but images of the target class.

The attack, step by step:

    1. signal    v(i, j) = Delta sin(2 pi j f / m)    in row i and column j of an image with m columns
    2. draw a share of the training images x of the target class t
    3. add       x' = x + v, clipped; the label stays t, and training is left to the victim
    4. at test time add v to images of any class

The poison rate is a share of the target class: of k equal classes, rate 1 is no more than 1/k of the training set.
BackdoorBench and the backdoor toolbox give it as a share of the training set and stop where the class ends, so that
10 % of CIFAR-10 is the whole class: hence the default.

What differs: columns are counted from 0, as both of these do. For digits the paper has a signal of another shape, which
is not here. Delta and f are BackdoorBench's; those of the paper's tables could not be checked. `delta_test` lets the
signal be stronger at test time than in training.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from vitrap.contracts import Access, AllToOne, Card, Fitted, Images, Implant, LabelMode, Threat
from vitrap.data.poison import Poison
from vitrap.errors import UserError
from vitrap.params import hyperparameters, param


@hyperparameters
class Sig:
    """The attack: SIG's hyper-parameters."""

    card: ClassVar[Card] = Card(
        "A New Backdoor Attack in CNNs by Training Set Corruption without Label Poisoning",
        "Barni, Kallas, Tondi",
        "ICIP",
        2019,
        "1902.11237",
    )
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "data"
    labels: ClassVar[LabelMode] = "clean"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "target class, whose images are poisoned", symbol="t", source="field", low=0)
    poison_rate: float = param(
        1.0, "share of the target class that is poisoned", source="field", low=0, high=1, open="low"
    )
    delta: float = param(
        40.0, "amplitude of the signal", symbol="Δ", unit="1/255", source="field", low=0, high=255, open="low"
    )
    frequency: float = param(6.0, "periods of the wave across the image", symbol="f", source="field", low=0, open=True)
    delta_test: float | None = param(
        None, "amplitude at test time; none: as in training", symbol="Δ", unit="1/255", low=0, high=255, open="low"
    )

    def check_size(self, size: int) -> None:
        """Refuse images of `size` pixels that have too few columns for the wave."""
        if 2 * self.frequency >= size:
            raise UserError(
                f"attack.frequency = {self.frequency:g} on images of {size} px leaves a period two pixels or less;"
                f" make it less than {size / 2:g}"
            )

    def goal_for(self, n_classes: int) -> AllToOne:
        """All-to-one: every triggered image shall be classified as the target."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Make the trigger; nothing is optimised, since the settings give the signal."""
        self.check_size(access.train.size)
        trigger = Wave(self.delta, self.frequency)
        if self.delta_test is None:
            return Fitted(trigger)
        return Fitted(Wave(self.delta_test, self.frequency), stored=trigger)

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Add the signal to a share of the target class, whose labels stay."""
        goal = self.goal_for(access.train.n_classes)
        return Implant(Poison(fitted.in_training, goal, self.poison_rate, self.labels))


@dataclass(frozen=True)
class Wave:
    """The trigger: adds a wave that runs from left to right, the same in every row and channel.

    Attributes:
        delta: its amplitude, in 1/255.
        frequency: its periods across the image.
    """

    delta: float
    frequency: float

    def __call__(self, images: Images) -> Images:
        """Images with the wave: x + v, clipped."""
        columns = torch.arange(images.shape[-1], device=images.device, dtype=images.dtype)
        # v(i, j) = Delta sin(2 pi j f / m)
        signal = self.delta / 255 * torch.sin(2 * math.pi * self.frequency / len(columns) * columns)
        return (images + signal).clamp(0, 1)
