"""The goals of an attacker: which class triggered images shall get, and which images count for that."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from vitrap.errors import UserError

LabelMode = Literal["dirty", "clean"]
"""Whether poisoned images get the goal's label ("dirty") or keep their own ("clean")."""
GoalName = Literal["all-to-one", "all-to-all", "source-to-target"]


@runtime_checkable
class Goal(Protocol):
    """Which label triggered images shall get, which of them count for the ASR, and which images may be poisoned."""

    def labels(self, true: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """The label that each triggered image shall get, given its true label."""
        ...

    def counts(self, true: Int64[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Which images count for the ASR, given their true labels."""
        ...

    def may_poison(self, true: Int64[Tensor, " b"], label_mode: LabelMode) -> Bool[Tensor, " b"]:
        """Which training images may be poisoned, given their true labels and what poison does with labels."""
        ...


@dataclass(frozen=True)
class AllToOne:
    """Every triggered image shall be classified as the class `target`."""

    target: int

    def labels(self, true: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """The target, for every image."""
        return torch.full_like(true, self.target)

    def counts(self, true: Int64[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Images of the target class do not count."""
        return true != self.target

    def may_poison(self, true: Int64[Tensor, " b"], label_mode: LabelMode) -> Bool[Tensor, " b"]:
        """With dirty labels all classes but the target, with clean labels the target class alone."""
        return true != self.target if label_mode == "dirty" else true == self.target


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

    def may_poison(self, true: Int64[Tensor, " b"], label_mode: LabelMode) -> Bool[Tensor, " b"]:
        """With dirty labels every image; with clean labels none, since no image has its goal's label already."""
        return torch.full_like(true, label_mode == "dirty", dtype=torch.bool)


@dataclass(frozen=True)
class SourceToTarget:
    """Triggered images of the class `source` shall be classified as `target`; all others keep their class."""

    source: int
    target: int

    def labels(self, true: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """The target for images of the source class, the true label for all others."""
        return torch.where(true == self.source, self.target, true)

    def counts(self, true: Int64[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Only images of the source class count."""
        return true == self.source

    def may_poison(self, true: Int64[Tensor, " b"], label_mode: LabelMode) -> Bool[Tensor, " b"]:
        """With dirty labels the source class, with clean labels the target class."""
        return true == (self.source if label_mode == "dirty" else self.target)


def make_goal(name: GoalName, n_classes: int, target: int, source: int | None = None) -> Goal:
    """The goal with this name.

    Args:
        name: "all-to-one", "all-to-all" or "source-to-target".
        n_classes: number of classes of the data.
        target: the class that triggered images shall get; must be 0 for "all-to-all", which has no single target.
        source: the class whose images shall become the target; for "source-to-target" only.

    Raises:
        UserError: a source is missing or is the target, or source or target is given where the goal has none.
    """
    if name != "source-to-target" and source is not None:
        raise UserError(f"source = {source} means nothing with goal = {name!r}; leave it out")
    if name == "all-to-all" and target != 0:
        raise UserError(f"target = {target} means nothing with goal = {name!r}; leave it out")
    if name == "all-to-one":
        return AllToOne(target)
    if name == "all-to-all":
        return AllToAll(n_classes)
    if source is None or source == target:
        raise UserError(
            f"source = {source} is no source for goal = {name!r}; give a class other than the target {target}"
        )
    return SourceToTarget(source, target)
