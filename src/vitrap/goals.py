"""What an attacker wants of a triggered image: one class for all, the next class, or one class for another's images."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from vitrap.errors import UserError

Labels = Literal["dirty", "clean"]
GoalName = Literal["all-to-one", "all-to-all", "source-to-target"]


@runtime_checkable
class Goal(Protocol):
    """Which images may be poisoned, which count, and what triggered ones become."""

    def labels(self, true: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """The label that each triggered image should get."""
        ...

    def counts(self, true: Int64[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Which images count for the ASR."""
        ...

    def may_poison(self, true: Int64[Tensor, " b"], labels: Labels) -> Bool[Tensor, " b"]:
        """Which training images may carry the trigger, with their label changed ("dirty") or kept ("clean")."""
        ...


@dataclass(frozen=True)
class AllToOne:
    """Every triggered image shall be classified as `target`."""

    target: int

    def labels(self, true: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """The target, for every image."""
        return torch.full_like(true, self.target)

    def counts(self, true: Int64[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Images of the target class do not count."""
        return true != self.target

    def may_poison(self, true: Int64[Tensor, " b"], labels: Labels) -> Bool[Tensor, " b"]:
        """All but the target class; with clean labels the target class alone."""
        return true != self.target if labels == "dirty" else true == self.target


@dataclass(frozen=True)
class AllToAll:
    """A triggered image of class y shall be classified as y + 1, and of the last class as 0."""

    n_classes: int

    def labels(self, true: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """The next class."""
        return (true + 1) % self.n_classes

    def counts(self, true: Int64[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Every image counts."""
        return torch.ones_like(true, dtype=torch.bool)

    def may_poison(self, true: Int64[Tensor, " b"], labels: Labels) -> Bool[Tensor, " b"]:
        """Every image; none with clean labels, since no image has the wanted label already."""
        return torch.full_like(true, labels == "dirty", dtype=torch.bool)


@dataclass(frozen=True)
class SourceToTarget:
    """Triggered images of class `source` shall be classified as `target`; the trigger does nothing to others."""

    source: int
    target: int

    def labels(self, true: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """The target for images of the source class; others keep their label."""
        return torch.where(true == self.source, self.target, true)

    def counts(self, true: Int64[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Images of the source class alone."""
        return true == self.source

    def may_poison(self, true: Int64[Tensor, " b"], labels: Labels) -> Bool[Tensor, " b"]:
        """The source class; with clean labels the target class."""
        return true == (self.source if labels == "dirty" else self.target)


def make_goal(name: GoalName, n_classes: int, target: int, source: int | None = None) -> Goal:
    """The goal of a name.

    Args:
        name: "all-to-one", "all-to-all" or "source-to-target".
        n_classes: of the data.
        target: the wanted class; 0 for "all-to-all", which has none of its own.
        source: the class whose images shall become the target; for "source-to-target" alone.

    Raises:
        UserError: a source is missing or is the target, or source or target is given where the goal has none.
    """
    if name != "source-to-target" and source is not None:
        raise UserError(f"source = {source} means nothing with goal = {name!r}; leave it out")
    if name == "all-to-all" and target != 0:
        raise UserError(f"target = {target} means nothing with goal = {name!r}; leave it out")
    if name != "source-to-target":
        return AllToOne(target) if name == "all-to-one" else AllToAll(n_classes)
    if source is None or source == target:
        raise UserError(
            f"source = {source} is no source for goal = {name!r}; give a class other than the target {target}"
        )
    return SourceToTarget(source, target)
