"""Poisoning a training set: which images, what they look like afterwards, and what they are called.

Poison replaces images and never appends them: the poisoned set has the clean one's length and order.
"""

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

import torch
from jaxtyping import Int64
from torch import Tensor

from vitrap.contracts import Goal, ImageSet, Labels, Trigger
from vitrap.errors import UserError
from vitrap.tensors.pixels import to_bytes


def choose_rows(
    labels: Int64[Tensor, " n"], rate: float, goal: Goal, kind: Labels, generator: torch.Generator
) -> Int64[Tensor, " m"]:
    """Draw the images to poison.

    Args:
        labels: true labels of the training set.
        rate: for "dirty" labels, a share of the whole training set, drawn from the images that the goal
            counts; for "clean" labels, a share of the target class, drawn from it.
        goal: what the attacker wants.
        kind: whether poisoned images get the goal's label ("dirty") or keep their own ("clean").
        generator: the random stream, on the CPU.

    Returns:
        Row numbers, sorted, on the labels' device: the share rounded half up, at least one.

    Raises:
        UserError: the rate is out of range or asks for more images than there are.
    """
    if not 0 < rate <= 1:
        raise UserError(f"poison_rate = {rate} is out of range: it must be in (0, 1]")
    counts = goal.counts(labels)
    candidates = (counts if kind == "dirty" else ~counts).nonzero().squeeze(1)
    wanted = _share(rate, len(labels) if kind == "dirty" else len(candidates))
    if wanted > len(candidates):
        where = "outside the target class" if kind == "dirty" else "of the target class"
        raise UserError(
            f"poison_rate = {rate} asks for {wanted} of the training images, but only {len(candidates)} are "
            f"{where}; choose a lower rate or another target"
        )
    drawn = torch.randperm(len(candidates), generator=generator)[:wanted].sort().values
    return candidates[drawn.to(labels.device)]


@torch.no_grad()
def poison_set(
    train: ImageSet,
    rows: Int64[Tensor, " m"],
    trigger: Trigger,
    goal: Goal,
    kind: Labels,
    batch_size: int = 256,
) -> ImageSet:
    """A copy of a clean training set in which the images of `rows` carry the trigger, rounded to 8 bits.

    Args:
        train: the clean set.
        rows: which images, without repeats.
        trigger: applied at working size, a batch at a time.
        goal: gives the labels where `kind` is "dirty".
        kind: whether poisoned images get the goal's label ("dirty") or keep their own ("clean").
        batch_size: images triggered at a time; it bounds memory, not the result.

    Raises:
        ValueError: the set is poisoned already, and its earlier poison would be lost.
    """
    if train.slot is not None:
        raise ValueError("the training set is poisoned already; poison the clean one once, with all its rows")
    shape = (len(rows), train.pixels.shape[1], train.size, train.size)
    stamped = torch.empty(shape, dtype=torch.uint8, device=train.device)
    for start in range(0, len(rows), batch_size):
        some = slice(start, start + batch_size)
        stamped[some] = to_bytes(trigger(train.images(rows[some])))
    true = train.labels[rows]
    return train.stamp(rows, stamped, goal.labels(true) if kind == "dirty" else true)


@dataclass(frozen=True)
class Poison:
    """What most attacks do to a training set; fits `Implant.poison`.

    Attributes:
        trigger: what poisoned images carry.
        goal: what they should be classified as.
        rate: a share of the training set for "dirty" labels, of the target class for "clean" ones.
        kind: whether they get the goal's label ("dirty") or keep their own ("clean").
    """

    trigger: Trigger
    goal: Goal
    rate: float
    kind: Labels

    def __call__(self, train: ImageSet, generator: torch.Generator) -> ImageSet:
        """The poisoned copy of a clean training set."""
        rows = choose_rows(train.labels, self.rate, self.goal, self.kind, generator)
        return poison_set(train, rows, self.trigger, self.goal, self.kind)


def _share(rate: float, n: int) -> int:
    """`rate` of `n`, rounded half up as the decimal that the user wrote, at least 1."""
    return max(1, int((Decimal(str(rate)) * n).to_integral_value(ROUND_HALF_UP)))
