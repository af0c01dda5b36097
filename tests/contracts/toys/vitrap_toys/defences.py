"""Defences: one that retrains, one of two kinds, one that needs gradients, and one that names several classes."""

import copy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vitrap.contracts import Card, Images, Judged, OutcomeKind, Repaired, Screen, Suspect
from vitrap.errors import UserError
from vitrap.params import hyperparameters, param
from vitrap_toys.data import CARD


@hyperparameters
class ToyRetrain:
    """Retrains on half of the training set."""

    card: ClassVar[Card] = CARD
    version: ClassVar[int] = 2
    kind: ClassVar[OutcomeKind] = "repair"
    needs_train: ClassVar[bool] = True
    needs_attention: ClassVar[bool] = False

    epochs: int = param(1, "passes", low=1)

    def apply(self, suspect: Suspect) -> Repaired:
        """Every second image."""
        train = suspect.training_set("toy_retrain")
        if suspect.retrain is None:
            raise UserError("toy_retrain trains anew, and retrain = None; give it as Suspect(retrain=...)")
        half = train.take(torch.arange(0, len(train), 2, device=train.device))
        return Repaired(suspect.retrain(half, epochs=self.epochs))


@hyperparameters
class ToyKinds:
    """A judgement, or a repair that changes nothing."""

    card: ClassVar[Card] = CARD
    version: ClassVar[int] = 1
    needs_train: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False

    ends: Literal["judge", "repair"] = param("judge", "what it comes to")

    @property
    def kind(self) -> OutcomeKind:
        """By the setting."""
        return "judgement" if self.ends == "judge" else "repair"

    def apply(self, suspect: Suspect) -> Judged | Repaired:
        """A score of nothing, or a copy."""
        return Judged(0.25, 0.5) if self.ends == "judge" else Repaired(copy.deepcopy(suspect.model))


@dataclass(frozen=True)
class Slope:
    """The score: the length of the gradient of the greatest logit at the image."""

    model: nn.Module

    def __call__(self, images: Images) -> Tensor:
        """One number an image."""
        with torch.enable_grad():
            x = images.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.model(x).float().amax(1).sum(), x)
        return slope.flatten(1).norm(dim=1)


@dataclass(frozen=True)
class ToyGradient:
    """Looks at gradients."""

    card: ClassVar[Card] = CARD
    version: ClassVar[int] = 1
    kind: ClassVar[OutcomeKind] = "screen"
    needs_train: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False

    def apply(self, suspect: Suspect) -> Screen:
        """Nothing is fitted."""
        return Screen(Slope(suspect.model))


@hyperparameters
class ToyClasses:
    """Suspects the classes that get the most of a grey image's probability."""

    card: ClassVar[Card] = CARD
    version: ClassVar[int] = 1
    kind: ClassVar[OutcomeKind] = "judgement"
    needs_train: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False

    most: int = param(3, "classes", low=1)

    @torch.no_grad()
    def apply(self, suspect: Suspect) -> Judged:
        """One forward pass."""
        grey = torch.full_like(suspect.clean.images(torch.zeros(1, dtype=torch.int64)), 0.5)
        with suspect.computing():
            shares = suspect.model(grey).float().softmax(1)[0].cpu()
        return Judged(shares.amax().item(), 0.9, tuple(shares.topk(self.most).indices.tolist()), shares)
