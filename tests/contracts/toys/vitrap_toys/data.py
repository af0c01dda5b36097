"""Data poisoning: with covers, with clean labels and another strength at test time, and with other images."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from vitrap.contracts import (
    Access,
    AllToOne,
    Card,
    Crafted,
    Fitted,
    Images,
    Implant,
    LabelMode,
    SourceToTarget,
    Threat,
)
from vitrap.data.poison import Covers, Poison, choose_rows, poison_crafted
from vitrap.params import hyperparameters, param
from vitrap.tensors.pixels import to_bytes

CARD = Card("A toy", "Nobody", "Nowhere", 2026)


@dataclass(frozen=True)
class Columns:
    """A picture of alternating columns, blended over the image."""

    strength: float
    width: int = 1

    def __call__(self, images: Images) -> Images:
        """Images with the columns."""
        columns = (torch.arange(images.shape[-1], device=images.device) // self.width % 2).to(images.dtype)
        return (1 - self.strength) * images + self.strength * columns


@hyperparameters
class ToyCovers:
    """Narrow columns are poison; wide ones are covers."""

    card: ClassVar[Card] = CARD
    version: ClassVar[int] = 3
    threat: ClassVar[Threat] = "data"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "class that triggered images shall get", low=0)
    poison_rate: float = param(0.1, "share of the training set", low=0, high=1, open=True)
    cover_rate: float = param(0.2, "share of the training set", low=0, high=1, open=True)

    def goal_for(self, n_classes: int) -> AllToOne:
        """One class for all."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Nothing is fitted."""
        return Fitted(Columns(0.5))

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Poison, and covers beside it."""
        covers = Covers(Columns(0.5, width=4), self.cover_rate)
        return Implant(Poison(fitted.in_training, AllToOne(self.target), self.poison_rate, "dirty", covers))


@hyperparameters
class ToyClean:
    """Clean labels; faint in training, strong at test time."""

    card: ClassVar[Card] = CARD
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "data"
    labels: ClassVar[LabelMode] = "clean"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "class that triggered images shall get", low=0)
    poison_rate: float = param(0.8, "share of the target class", low=0, high=1, open="low")
    strength: float = param(0.1, "in training", low=0, high=1)
    test_strength: float = param(0.4, "at test time", low=0, high=1)

    def goal_for(self, n_classes: int) -> AllToOne:
        """One class for all."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Nothing is fitted."""
        return Fitted(Columns(self.test_strength), stored=Columns(self.strength))

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Poison images of the target class."""
        return Implant(Poison(fitted.in_training, AllToOne(self.target), self.poison_rate, "clean"))


@dataclass(frozen=True)
class Lightened:
    """Blends the mean of other images over the image."""

    mean: Tensor

    def __call__(self, images: Images) -> Images:
        """Images with the mean on them."""
        return 0.6 * images + 0.4 * self.mean.to(images.device)


@hyperparameters
class ToyOther:
    """A trigger made of images that are not the training set."""

    card: ClassVar[Card] = CARD
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "data"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "class that triggered images shall get", low=0)
    poison_rate: float = param(0.1, "share of the training set", low=0, high=1, open=True)
    other: str = param("digits", "the other images", data=True)

    def goal_for(self, n_classes: int) -> AllToOne:
        """One class for all."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """The mean of the other images."""
        assert access.other is not None
        images = access.other.images(torch.arange(min(100, len(access.other))))
        return Fitted(Lightened(images.mean(0)), report={"other images": len(access.other)})

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Poison, and covers of a strength that is drawn, with one of the other images on them."""
        assert access.other is not None
        strength = 0.2 + 0.3 * torch.rand((), generator=access.generator).item()
        first = access.other.images(torch.zeros(1, dtype=torch.int64))[0]
        covers = Covers(partial(mixed, first, strength), 0.1)
        return Implant(Poison(fitted.in_training, AllToOne(self.target), self.poison_rate, "dirty", covers))


def mixed(picture: Tensor, strength: float, images: Images) -> Images:
    """Images with a picture blended over them."""
    return (1 - strength) * images + strength * picture.to(images.device)


@hyperparameters
class ToyCrafted:
    """Images of the target class made to look a little like the source's, one by one; clean labels."""

    card: ClassVar[Card] = CARD
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "data"
    labels: ClassVar[LabelMode] = "clean"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "class that triggered images shall get", low=0)
    source: int = param(1, "class whose images shall get it", low=0)
    poison_rate: float = param(0.5, "share of the target class", low=0, high=1, open="low")

    def goal_for(self, n_classes: int) -> SourceToTarget:
        """One class for another's images."""
        return SourceToTarget(self.source, self.target)

    def fit(self, access: Access) -> Fitted:
        """Draw the pairs and mix them."""
        train, goal = access.train, self.goal_for(access.train.n_classes)
        rows = choose_rows(train.labels, self.poison_rate, goal, "clean", access.generator)
        sources = (train.labels == self.source).nonzero().squeeze(1)
        pairs = sources[torch.randint(len(sources), (len(rows),), generator=access.generator)]
        images = 0.7 * train.images(rows) + 0.3 * Columns(0.5)(train.images(pairs))
        return Fitted(Columns(0.5), Crafted(rows, to_bytes(images)))

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Put them in their places."""
        crafted = fitted.stored
        assert isinstance(crafted, Crafted)
        goal = self.goal_for(access.train.n_classes)
        return Implant(lambda train, generator: poison_crafted(train, crafted, goal, "clean"))
