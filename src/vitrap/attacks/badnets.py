"""BadNets: paint a small patch in a corner of some training images, and relabel them.

Gu, Dolan-Gavitt, Garg: "BadNets: Evaluating Backdooring Attacks on Deep Neural Networks", IEEE Access 2019,
https://arxiv.org/abs/1708.06733.

Threat model: data poisoning with dirty labels; the attacker touches nothing but the training data. The paper has three
goals: one class for all images (all-to-one), the next class for each image (all-to-all, on digits), and one class for
the images of another one (source-to-target, on traffic signs).

The attack, step by step:

    1. draw a share of the training images
    2. paint the patch on them
    3. give them the goal's label; training is left to the victim

What differs: the paper stamps digits and traffic signs with several patterns; this is the white square that later
benchmarks made of it.
"""

from dataclasses import dataclass
from typing import ClassVar

from vitrap.contracts import Access, Card, Fitted, Goal, Images, Implant, LabelMode, Threat
from vitrap.data.poison import Poison
from vitrap.errors import UserError
from vitrap.goals import GoalName, make_goal
from vitrap.images import misshapen
from vitrap.params import hyperparameters, param


@hyperparameters
class BadNets:
    """The attack: BadNets' hyper-parameters."""

    card: ClassVar[Card] = Card(
        "BadNets: Evaluating Backdooring Attacks on Deep Neural Networks",
        "Gu, Dolan-Gavitt, Garg",
        "IEEE Access",
        2019,
        "1708.06733",
    )
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "data"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "target class; leave at 0 for all-to-all, which has no single one", source="field", low=0)
    poison_rate: float = param(
        0.1, "share of the training set that is poisoned", symbol="p", source="field", low=0, high=1, open=True
    )
    goal: GoalName = param(
        "all-to-one",
        "all images become the target; class y becomes y + 1; or images of class source become the target",
        source="field",
    )
    source: int | None = param(None, "class whose images become the target (source-to-target)", source="paper", low=0)
    size: int = param(3, "side of the patch", unit="px", source="field", low=1)
    margin: int = param(0, "distance of the patch from the right and lower border", unit="px", source="field", low=0)
    value: float = param(1.0, "grey value of the patch", source="field", low=0, high=1)

    def check_settings(self) -> None:
        """Refuse a target or source that the goal has no use for, and a source that is missing."""
        make_goal(self.goal, 2, self.target, self.source)  # refuses; 2 stands for any number of classes

    def check_size(self, size: int) -> None:
        """Refuse images of `size` pixels that are too small for the patch and its margin."""
        if self.size + self.margin > size:
            raise UserError(
                f"attack.size = {self.size} with attack.margin = {self.margin} does not fit on images of {size} px;"
                " make their sum at most that"
            )

    def goal_for(self, n_classes: int) -> Goal:
        """The goal that the settings name: one of the paper's three."""
        return make_goal(self.goal, n_classes, self.target, self.source)

    def fit(self, access: Access) -> Fitted:
        """Make the trigger; nothing is optimised, since the settings give the patch."""
        self.check_size(access.train.size)
        return Fitted(Patch(self.size, self.margin, self.value))

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Paint the patch on a share of the training images, and give them the goal's label."""
        goal = self.goal_for(access.train.n_classes)
        return Implant(Poison(fitted.in_training, goal, self.poison_rate, self.labels))


@dataclass(frozen=True)
class Patch:
    """The trigger: paints a grey square over the lower right corner of an image.

    Attributes:
        size: side of the square, in pixels.
        margin: distance from the right and the lower border, in pixels.
        value: grey value, in [0, 1].
    """

    size: int
    margin: int
    value: float

    def __call__(self, images: Images) -> Images:
        """Images with the patch.

        Raises:
            UserError: the images are too small for the patch and its margin.
        """
        height, width = images.shape[-2:]
        least = self.size + self.margin
        if min(height, width) < least:
            raise misshapen(images, f"b x c x {least} x {least} or larger")
        bottom = height - self.margin
        right = width - self.margin
        triggered = images.clone()
        triggered[..., bottom - self.size : bottom, right - self.size : right] = self.value
        return triggered
