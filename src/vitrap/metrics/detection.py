"""Measures of detectors and repairs: AUROC with its interval, thresholds from held-out clean scores, and DER.

Triggered images are the positives, and a higher score is more suspicious. TPR and FPR are the `rate` of scores `above`
a threshold.
"""

from math import exp, log, sqrt

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vitrap.metrics.interval import Z95
from vitrap.metrics.values import Auroc

HALVINGS = 60
"""Bisection steps of an interval of length 1, down to less than the spacing of floats."""


def auroc(triggered: Float[Tensor, " p"], clean: Float[Tensor, " q"]) -> Auroc:
    """The probability that a triggered image scores higher than a clean one; a tie counts half.

    One-sided: a score that ranks the wrong way round has an AUROC below 0.5. The interval is DeLong's on the logit
    scale, which keeps it within [0, 1] and covers better near the ends (Perme, Manevski: "Confidence intervals for the
    Mann-Whitney test", 2019). Where DeLong's variance is useless (at 0 and 1, where all scores are equal, or with one
    score on a side), the interval is Newcombe's, see `least_auroc`; Perme and Manevski's own remedy, a bootstrap of
    shifted samples, is slow. All scores are taken as independent. Where the triggered images are the clean ones with a
    trigger, scores come in pairs, and the interval is approximate: too wide, as far as the scores of a pair correlate.

    >>> auroc(torch.tensor([3.0, 2.0, 5.0]), torch.tensor([1.0, 2.0])).value.__round__(4)
    0.9167
    >>> auroc(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])).value
    0.0

    Raises:
        ValueError: a score is not finite.
    """
    positives = finite(triggered)
    negatives = finite(clean)
    p = len(positives)
    q = len(negatives)
    if not p or not q:
        return Auroc(0.5, 0.0, 1.0, p, q)
    # Counted in whole numbers, so that no rounding depends on the order of the scores.
    wins = doubled_wins(positives, negatives)
    losses = 2 * p - doubled_wins(negatives, positives)
    value = int(wins.sum()) / (2 * p * q)
    variance = delong_variance(wins.double() / (2 * q), losses.double() / (2 * p))
    if not 0 < value < 1 or not variance > 0:
        return Auroc(value, least_auroc(value, p, q), 1 - least_auroc(1 - value, p, q), p, q)
    # The interval is symmetric on the logit scale; the logistic function brings its ends back.
    logit = log(value / (1 - value))
    half = Z95 * sqrt(variance) / (value * (1 - value))
    return Auroc(value, 1 / (1 + exp(half - logit)), 1 / (1 + exp(-half - logit)), p, q)


def finite(scores: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The scores, on the CPU in double precision.

    Raises:
        ValueError: one is not finite.
    """
    if not scores.isfinite().all():
        raise ValueError(f"{int((~scores.isfinite()).sum())} of {len(scores)} scores are not finite")
    return scores.detach().cpu().double()


def doubled_wins(ours: Float[Tensor, " p"], theirs: Float[Tensor, " q"]) -> Int64[Tensor, " p"]:
    """For each of our scores, twice the number of their scores that it beats, plus the number that it ties with.

    >>> doubled_wins(torch.tensor([0.0, 2.0]), torch.tensor([2.0, 1.0])).tolist()
    [0, 3]
    """
    ranked = theirs.sort().values
    return torch.searchsorted(ranked, ours, side="left") + torch.searchsorted(ranked, ours, side="right")


def delong_variance(wins: Float[Tensor, " p"], losses: Float[Tensor, " q"]) -> float:
    """The variance of the AUROC (DeLong, DeLong, Clarke-Pearson 1988); NaN where there is one score on a side.

    Args:
        wins: for each triggered image, the share of clean ones that it beats.
        losses: for each clean image, the share of triggered ones that beat it.
    """
    if min(len(wins), len(losses)) < 2:
        return float("nan")
    return (wins.var() / len(wins) + losses.var() / len(losses)).item()


def hanley_mcneil_variance(value: float, p: int, q: int) -> float:
    """The variance of an AUROC of `value` for exponential scores and samples of equal size (Hanley, McNeil 1982).

    In Newcombe's form, which puts the mean of `p` and `q` in the place of both: `value` and 1 - `value` then have the
    same variance.
    """
    others = (p + q) / 2 - 1
    return value * (1 - value) * (1 + others * (1 - value) / (2 - value) + others * value / (1 + value)) / (p * q)


def least_auroc(value: float, p: int, q: int) -> float:
    """The least AUROC that is at most 1.96 standard errors below `value` (Newcombe 2006, part 2, method 5).

    As in Wilson's interval, the standard error is that of the least AUROC, not of `value`. So the interval has a width
    even where every triggered image scores higher than every clean one.

    >>> least_auroc(1.0, 50, 50).__round__(4), least_auroc(0.0, 50, 50)
    (0.9603, 0.0)
    """
    low, high = 0.0, value
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_low = (value - middle) ** 2 > Z95**2 * hanley_mcneil_variance(middle, p, q)
        if too_low:
            low = middle
        else:
            high = middle
    return low


def threshold_at(clean: Float[Tensor, " q"], fpr: float) -> float:
    """The lowest threshold that at most a share `fpr` of the held-out clean scores exceeds.

    Ties are never split: with few scores, or many equal ones, the share is lower than `fpr`.

    >>> threshold_at(torch.tensor([1.0, 2.0, 3.0, 4.0]), 0.25), threshold_at(torch.tensor([1.0, 4.0, 4.0]), 0.4)
    (3.0, 4.0)

    Raises:
        ValueError: there are no scores, one is not finite, or `fpr` is not in [0, 1).
    """
    if not len(clean) or not 0 <= fpr < 1:
        raise ValueError(f"no threshold has an FPR of {fpr} on {len(clean)} clean scores")
    ranked = finite(clean).sort(descending=True).values
    allowed = int((torch.arange(len(ranked)).double() / len(ranked) <= fpr).sum()) - 1
    return ranked[allowed].item()


def above(scores: Float[Tensor, " n"], threshold: float) -> Bool[Tensor, " n"]:
    """Mark the scores strictly above a threshold: the images that a screen would refuse."""
    return scores.double() > threshold


def defence_effectiveness(asr_before: float, asr_after: float, acc_before: float, acc_after: float) -> float:
    """DER, defence effectiveness rate: the fall of the ASR against the loss of accuracy; 0.5 for no effect, at best 1.

    Zhu, Wei, Shen, Fan, Wu: "Enhancing Fine-Tuning based Backdoor Defense with Sharpness-Aware Minimization", ICCV
    2023, equation 7. A rise of the ASR or of the accuracy counts as no change.

    >>> defence_effectiveness(1.0, 0.0, 0.9, 0.8)
    0.95
    """
    return (max(0.0, asr_before - asr_after) - max(0.0, acc_before - acc_after) + 1) / 2
