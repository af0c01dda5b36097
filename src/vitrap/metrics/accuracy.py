"""Accuracy on clean and on triggered images: CDA, ASR and RA."""

from jaxtyping import Int64
from torch import Tensor

from vitrap.contracts import Goal
from vitrap.metrics.interval import rate
from vitrap.metrics.values import Rate

Classes = Int64[Tensor, " n"]


def clean_accuracy(predicted: Classes, true: Classes) -> Rate:
    """CDA, clean data accuracy: the share of clean images that are classified correctly."""
    return rate(predicted == true)


def attack_success(predicted: Classes, true: Classes, goal: Goal) -> Rate:
    """ASR, attack success rate: the share that gets the goal's label, of the triggered images that count for it."""
    counts = goal.counts(true)
    return rate(predicted[counts] == goal.labels(true)[counts])


def robust_accuracy(predicted: Classes, true: Classes, goal: Goal) -> Rate:
    """RA, robust accuracy: the share that is still classified correctly, of the triggered images that count."""
    counts = goal.counts(true)
    return rate(predicted[counts] == true[counts])
