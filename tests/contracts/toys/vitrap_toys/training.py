"""Attackers of training: poison drawn anew for each batch, and a generator that is trained along with the victim."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitrap.contracts import (
    Access,
    AllToOne,
    Batch,
    Card,
    Criterion,
    ExtraModule,
    Fitted,
    Images,
    Implant,
    LabelMode,
    Objective,
    Threat,
    Trigger,
)
from vitrap.params import hyperparameters, param
from vitrap_toys.data import CARD, Columns
from vitrap_toys.networks import Pattern

Prepare = Callable[[Batch, torch.Generator], Batch]


def cross_entropy(model: nn.Module, batch: Batch, criterion: Criterion) -> Mapping[str, Tensor]:
    """The loss of the whole batch."""
    return {"cross_entropy": criterion(model(batch.images), batch.labels)}


def poisoning(trigger: Trigger, cover: Trigger | None, share: float, target: int) -> Prepare:
    """Poison a share of each batch, and as many covers where there is a trigger for them."""

    def prepare(batch: Batch, generator: torch.Generator) -> Batch:
        n, count = len(batch.labels), max(1, round(share * len(batch.labels)))
        order = torch.randperm(n, generator=generator).to(batch.labels.device)
        poisoned, covers = order[:count], order[count : 2 * count] if cover else order[:0]
        images = batch.images.index_copy(0, poisoned, trigger(batch.images[poisoned]))
        if cover:
            images = images.index_copy(0, covers, cover(batch.images[covers]))
        labels = batch.labels.index_fill(0, poisoned, target)
        return replace(batch, images=images, labels=labels, poison_at=poisoned, rest_at=order[count:], cover_at=covers)

    return prepare


@hyperparameters
class ToyBatches:
    """Poison and covers for each batch; nothing is stored."""

    card: ClassVar[Card] = CARD
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "training"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "class that triggered images shall get", low=0)
    share: float = param(0.2, "of each batch", low=0, high=0.5, open="low")

    def goal_for(self, n_classes: int) -> AllToOne:
        """One class for all."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Nothing is fitted."""
        return Fitted(Columns(0.5))

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Train on batches that are poisoned as they come."""
        prepare = poisoning(fitted.in_training, Columns(0.5, width=4), self.share, self.target)
        return Implant(objective=Objective(cross_entropy, prepare=prepare))


@dataclass(frozen=True)
class Generated:
    """The trigger: whatever the generator makes of an image."""

    generator: nn.Module

    def __call__(self, images: Images) -> Images:
        """Images in [0, 1]."""
        return self.generator(images).clamp(0, 1)

    def examine(self, model: nn.Module, triggered: Images) -> Mapping[str, float]:
        """How far the generator's weights are from 0 by now."""
        return {"size of the generator": sum(w.detach().abs().sum().item() for w in self.generator.parameters())}


@hyperparameters
class ToyGenerator:
    """A generator that is trained along with the victim, and that the trigger holds."""

    card: ClassVar[Card] = CARD
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "training"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "class that triggered images shall get", low=0)
    share: float = param(0.2, "of each batch", low=0, high=0.5, open="low")
    lr: float = param(0.05, "peak learning rate of the generator", low=0, open=True)

    def goal_for(self, n_classes: int) -> AllToOne:
        """One class for all."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """A fresh generator; its weights come from torch's own random state, which is the attacker's here."""
        return Fitted(Generated(Pattern(access.train.size).to(access.train.device)))

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Train both."""
        trigger = fitted.trigger
        assert isinstance(trigger, Generated)
        prepare = poisoning(trigger, None, self.share, self.target)
        along = {"generator": ExtraModule(trigger.generator, self.lr)}
        return Implant(objective=Objective(cross_entropy, prepare=prepare, along=along), examine=trigger.examine)
