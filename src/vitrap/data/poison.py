"""Poisoning a training set: drawing the images, putting the trigger on them, and relabelling them.

Poison replaces images and never appends any: the poisoned set has the length and the order of the clean one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_UP, Decimal

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from vitrap.contracts import Batch, Crafted, Goal, ImageSet, LabelMode, Trigger
from vitrap.errors import UserError
from vitrap.tensors.pixels import to_bytes


def choose_rows(
    labels: Int64[Tensor, " n"], rate: float, goal: Goal, label_mode: LabelMode, generator: torch.Generator
) -> Int64[Tensor, " m"]:
    """Draw the images to poison, among those that the goal allows.

    Args:
        labels: true labels of the training set.
        rate: for "dirty" labels, a share of the whole training set; for "clean" labels, a share of the images that may
            be poisoned, which are those of the target class.
        goal: the attacker's goal; it says which images may be poisoned.
        label_mode: whether poisoned images get the goal's label ("dirty") or keep their own ("clean").
        generator: the random stream, on the CPU.

    Returns:
        Row numbers, sorted, on the labels' device. Their number is the share rounded half up, at least one.

    Raises:
        UserError: the rate is out of range or asks for more images than there are.
    """
    if not 0 < rate <= 1:
        raise UserError(f"poison_rate = {rate} is out of range: it must be in (0, 1]")
    candidates = goal.may_poison(labels, label_mode).nonzero().squeeze(1)
    wanted = _share(rate, len(labels) if label_mode == "dirty" else len(candidates))
    if wanted > len(candidates):
        raise UserError(
            f"poison_rate = {rate} asks for {wanted} of the training images, but only {len(candidates)} may be poisoned"
            f" with {label_mode} labels; choose a lower rate, or another target, source or goal"
        )
    return _draw(candidates, wanted, generator)


def choose_covers(free: Bool[Tensor, " n"], rate: float, generator: torch.Generator) -> Int64[Tensor, " m"]:
    """Draw the covers, among the images that are no poison.

    Args:
        free: which training images are no poison.
        rate: a share of the whole training set.
        generator: the random stream, on the CPU.

    Returns:
        Row numbers, sorted. Their number is the share rounded half up, at least one.

    Raises:
        UserError: the rate is out of range or asks for more images than are free.
    """
    if not 0 < rate <= 1:
        raise UserError(f"cover_rate = {rate} is out of range: it must be in (0, 1]")
    candidates = free.nonzero().squeeze(1)
    wanted = _share(rate, len(free))
    if wanted > len(candidates):
        raise UserError(
            f"cover_rate = {rate} asks for {wanted} of the training images, but poison leaves {len(candidates)};"
            " choose a lower rate"
        )
    return _draw(candidates, wanted, generator)


@torch.no_grad()
def poison_set(
    train: ImageSet,
    rows: Int64[Tensor, " m"],
    trigger: Trigger,
    goal: Goal,
    label_mode: LabelMode,
    batch_size: int = 256,
) -> ImageSet:
    """A copy of a clean training set in which the images of `rows` carry the trigger, rounded to 8 bits.

    Args:
        train: the clean set.
        rows: the images to poison, without repeats.
        trigger: the trigger, applied at working size, a batch at a time.
        goal: the attacker's goal; it gives the labels where `label_mode` is "dirty".
        label_mode: whether poisoned images get the goal's label ("dirty") or keep their own ("clean").
        batch_size: images per batch; it bounds memory, not the result.

    Raises:
        ValueError: an image of `rows` carries a trigger already, which would be overwritten.
    """
    true = train.labels[rows]
    stamped = trigger_rows(train, rows, trigger, batch_size)
    return train.stamp(rows, stamped, goal.labels(true) if label_mode == "dirty" else true)


@torch.no_grad()
def trigger_rows(
    data: ImageSet, rows: Int64[Tensor, " m"], trigger: Trigger, batch_size: int = 256
) -> UInt8[Tensor, "m c s s"]:
    """The images of `rows` with the trigger, rounded to 8 bits; computed a batch at a time."""
    shape = (len(rows), data.channels, data.size, data.size)
    stamped = torch.empty(shape, dtype=torch.uint8, device=data.device)
    for start in range(0, len(rows), batch_size):
        some = slice(start, start + batch_size)
        stamped[some] = to_bytes(trigger(data.images(rows[some])))
    return stamped


@dataclass(frozen=True)
class Covers:
    """How to choose and make covers: images with a trigger and their true label, which are no poison.

    They teach the model not to respond to their trigger.

    Attributes:
        trigger: the covers' trigger.
        rate: a share of the training set.
    """

    trigger: Trigger
    rate: float


@dataclass(frozen=True)
class Poison:
    """Poisons a share of a training set at random: what `Implant.poison` is in most attacks.

    Attributes:
        trigger: the trigger of poisoned images.
        goal: the attacker's goal, which gives their labels.
        rate: a share of the training set for "dirty" labels, of the target class for "clean" ones.
        label_mode: whether poisoned images get the goal's label ("dirty") or keep their own ("clean").
        covers: how to make covers beside them; None for no covers.
    """

    trigger: Trigger
    goal: Goal
    rate: float
    label_mode: LabelMode
    covers: Covers | None = None

    def __call__(self, train: ImageSet, generator: torch.Generator) -> ImageSet:
        """The poisoned copy of a clean training set."""
        # Draw, trigger and relabel the poison.
        rows = choose_rows(train.labels, self.rate, self.goal, self.label_mode, generator)
        poisoned = poison_set(train, rows, self.trigger, self.goal, self.label_mode)
        if self.covers is None:
            return poisoned
        # Covers come from the rest; they keep their labels.
        others = choose_covers(~poisoned.poisoned, self.covers.rate, generator)
        stamped = trigger_rows(train, others, self.covers.trigger)
        return poisoned.stamp(others, stamped, train.labels[others], cover=True)


def _draw(candidates: Int64[Tensor, " n"], wanted: int, generator: torch.Generator) -> Int64[Tensor, " m"]:
    """`wanted` of the candidates at random, in their original order."""
    drawn = torch.randperm(len(candidates), generator=generator)[:wanted].sort().values
    return candidates[drawn.to(candidates.device)]


def _share(rate: float, n: int) -> int:
    """`rate` times `n`, rounded half up, at least 1; the rate is taken as the decimal number that the user wrote."""
    return max(1, int((Decimal(str(rate)) * n).to_integral_value(ROUND_HALF_UP)))


def poison_crafted(train: ImageSet, crafted: Crafted, goal: Goal, label_mode: LabelMode) -> ImageSet:
    """A copy of a clean training set in which images that `fit` made one by one replace the original ones."""
    rows = crafted.rows.to(train.device)
    images = crafted.images.to(train.device)
    true = train.labels[rows]
    return train.stamp(rows, images, goal.labels(true) if label_mode == "dirty" else true)


def stamp_after_augmentation(
    trigger: Trigger, cover: Trigger | None = None
) -> Callable[[Batch, torch.Generator], Batch]:
    """Make an `Objective.prepare` that puts triggers on a batch after its augmentation, in place of the stored ones.

    Args:
        trigger: the trigger of poisoned images.
        cover: the trigger of covers; None where the attack has none.
    """

    def prepare(batch: Batch, generator: torch.Generator) -> Batch:
        for rows, stamp in ((batch.poison_at, trigger), (batch.cover_at, cover)):
            if len(rows) and stamp is not None:
                triggered = stamp(batch.images[rows])
                batch = replace(batch, images=batch.images.index_copy(0, rows, triggered))
        return batch

    return prepare
