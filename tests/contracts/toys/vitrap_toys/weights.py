"""An attacker of weights, whose trigger is known only once there is a model."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from vitrap.contracts import Access, AllToOne, Card, Edited, Fitted, Images, Implant, LabelMode, Threat
from vitrap.data.poison import Poison
from vitrap.models.observe import head_layer
from vitrap.params import hyperparameters, param
from vitrap_toys.data import CARD, Columns


@dataclass(frozen=True)
class Added:
    """A pattern that is added to the image."""

    pattern: Tensor

    def __call__(self, images: Images) -> Images:
        """Images with the pattern, in [0, 1]."""
        return (images + self.pattern.to(images.device)).clamp(0, 1)


@hyperparameters
class ToyEdit:
    """A pattern found on the trained model, and a head that answers to it."""

    card: ClassVar[Card] = CARD
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "weights"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "class that triggered images shall get", low=0)
    steps: int = param(10, "gradient steps on the pattern", low=1)

    def goal_for(self, n_classes: int) -> AllToOne:
        """One class for all."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Nothing is known yet."""
        return Fitted(None)

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Edit the trained model."""
        images = access.train.images(torch.arange(min(64, len(access.train))))

        def edit(model: nn.Module, generator: Generator) -> Edited:
            edited = copy.deepcopy(model)
            pattern = 0.1 * torch.randn(images.shape[1:], generator=generator).to(images.device)
            wanted = torch.full((len(images),), self.target, device=images.device)
            for _ in range(self.steps):
                with torch.enable_grad():
                    pattern.requires_grad_()
                    loss = functional.cross_entropy(edited((images + pattern).clamp(0, 1)), wanted)
                    (slope,) = torch.autograd.grad(loss, pattern)
                pattern = (pattern.detach() - 0.05 * slope.sign()).clamp(-0.5, 0.5)
            head = head_layer(edited)[1]
            before = head.weight.clone()
            with torch.no_grad():
                head.weight[self.target] *= 1.1
            return Edited(edited, Added(pattern), {"changed weights": int((head.weight != before).sum())})

        return Implant(edit=edit)


@hyperparameters
class ToyBoth:
    """Poison that is stored, and a trigger that an edit makes stronger."""

    card: ClassVar[Card] = CARD
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "training"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "class that triggered images shall get", low=0)
    poison_rate: float = param(0.1, "share of the training set", low=0, high=1, open=True)

    def goal_for(self, n_classes: int) -> AllToOne:
        """One class for all."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Faint columns."""
        return Fitted(Columns(0.2))

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Poison with them, and have stronger ones fire at test time."""
        poison = Poison(fitted.in_training, AllToOne(self.target), self.poison_rate, "dirty")
        return Implant(poison, edit=lambda model, generator: Edited(copy.deepcopy(model), Columns(0.6)))
