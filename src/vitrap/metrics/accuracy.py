"""How a model does on clean and on triggered images: CDA, ASR and RA."""

from jaxtyping import Int64
from torch import Tensor

from vitrap.contracts import Goal
from vitrap.metrics.interval import rate
from vitrap.metrics.values import Rate

Classes = Int64[Tensor, " n"]


def clean_accuracy(predicted: Classes, true: Classes) -> Rate:
    """CDA: the share of clean images classified rightly."""
    return rate(predicted == true)


def attack_success(predicted: Classes, true: Classes, goal: Goal) -> Rate:
    """ASR: of the triggered images that count for the goal, the share that the goal's label is given to."""
    counts = goal.counts(true)
    return rate(predicted[counts] == goal.labels(true)[counts])


def robust_accuracy(predicted: Classes, true: Classes, goal: Goal) -> Rate:
    """RA: of the triggered images that count for the goal, the share still classified rightly."""
    counts = goal.counts(true)
    return rate(predicted[counts] == true[counts])
