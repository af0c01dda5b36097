"""How a detector does: AUROC with its interval, thresholds from held-out clean scores, and DER for repairs.

Triggered is positive, and a higher score is more suspicious. TPR and FPR are the `rate` of what lies `above` a
threshold.
"""

from math import exp, log, sqrt

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vitrap.metrics.interval import Z95
from vitrap.metrics.values import Auroc

HALVINGS = 60
"""Of an interval of length 1: down to less than the spacing of floats there."""


def auroc(triggered: Float[Tensor, " p"], clean: Float[Tensor, " q"]) -> Auroc:
    """The chance that a triggered image scores higher than a clean one; ties count half.

    One-sided: a score that ranks the wrong way round stays below 0.5. The interval is DeLong's, taken on the logit
    scale, which keeps it within [0, 1] and covers better near the ends (Perme, Manevski: "Confidence intervals for the
    Mann-Whitney test", 2019). Where DeLong's variance says nothing (at 0 and 1, with all scores alike, or with one
    score on a side), it is Newcombe's, see `least_auroc`; their own remedy, a bootstrap of shifted samples, is slow.
    All scores are taken for independent. Where the triggered images are the clean ones with a trigger on, they come in
    pairs, so it is approximate: too wide, as far as the two scores of a pair rise and fall together.

    >>> auroc(torch.tensor([3.0, 2.0, 5.0]), torch.tensor([1.0, 2.0])).value.__round__(4)
    0.9167
    >>> auroc(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])).value
    0.0

    Raises:
        ValueError: a score is not finite.
    """
    ours = finite(triggered)
    theirs = finite(clean)
    p = len(ours)
    q = len(theirs)
    if not p or not q:
        return Auroc(0.5, 0.0, 1.0, p, q)
    beaten, lost = doubled_wins(ours, theirs), 2 * p - doubled_wins(theirs, ours)
    value = int(beaten.sum()) / (2 * p * q)
    variance = delong_variance(beaten.double() / (2 * q), lost.double() / (2 * p))
    if not 0 < value < 1 or not variance > 0:
        return Auroc(value, least_auroc(value, p, q), 1 - least_auroc(1 - value, p, q), p, q)
    middle, half = log(value / (1 - value)), Z95 * sqrt(variance) / (value * (1 - value))
    return Auroc(value, 1 / (1 + exp(half - middle)), 1 / (1 + exp(-half - middle)), p, q)


def finite(scores: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The scores on the CPU in double precision.

    Raises:
        ValueError: one is not finite.
    """
    if not scores.isfinite().all():
        raise ValueError(f"{int((~scores.isfinite()).sum())} of {len(scores)} scores are not finite")
    return scores.detach().cpu().double()


def doubled_wins(ours: Float[Tensor, " p"], theirs: Float[Tensor, " q"]) -> Int64[Tensor, " p"]:
    """For each of our scores, twice the number of theirs that it beats, a tie counting half: whole numbers.

    >>> doubled_wins(torch.tensor([0.0, 2.0]), torch.tensor([2.0, 1.0])).tolist()
    [0, 3]
    """
    ranked = theirs.sort().values
    return torch.searchsorted(ranked, ours, side="left") + torch.searchsorted(ranked, ours, side="right")


def delong_variance(wins: Float[Tensor, " p"], losses: Float[Tensor, " q"]) -> float:
    """The variance of the AUROC (DeLong, DeLong, Clarke-Pearson 1988); NaN with one score on a side.

    Args:
        wins: for each triggered image, the share of clean ones that it beats.
        losses: for each clean image, the share of triggered ones that beat it.
    """
    if min(len(wins), len(losses)) < 2:
        return float("nan")
    return (wins.var() / len(wins) + losses.var() / len(losses)).item()


def hanley_mcneil_variance(value: float, p: int, q: int) -> float:
    """The variance of an AUROC of `value` if scores are exponential (Hanley, McNeil 1982), the samples of equal size.

    In Newcombe's form: he puts the mean of `p` and `q` for each, which makes it the same for `value` and 1 - `value`.
    """
    others = (p + q) / 2 - 1
    return value * (1 - value) * (1 + others * (1 - value) / (2 - value) + others * value / (1 + value)) / (p * q)


def least_auroc(value: float, p: int, q: int) -> float:
    """The least AUROC from which `value` is 1.96 standard errors away at most (Newcombe 2006, part 2, method 5).

    As in Wilson's interval the standard error is that of the AUROC asked about, not of `value`, so that the interval
    has a width even where every triggered image scores higher than every clean one.

    >>> least_auroc(1.0, 50, 50).__round__(4), least_auroc(0.0, 50, 50)
    (0.9603, 0.0)
    """
    low, high = 0.0, value
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_low = (value - middle) ** 2 > Z95**2 * hanley_mcneil_variance(middle, p, q)
        low, high = (middle, high) if too_low else (low, middle)
    return low


def threshold_at(clean: Float[Tensor, " q"], fpr: float) -> float:
    """The lowest threshold with a share of at most `fpr` of held-out clean scores strictly above it.

    Ties are never split: with too few or too equal scores, the share is lower than asked for.

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
    """Which scores are strictly above a threshold: the images that a screen would refuse."""
    return scores.double() > threshold


def defence_effectiveness(asr_before: float, asr_after: float, acc_before: float, acc_after: float) -> float:
    """DER: how much ASR a repair takes away, less what it costs in clean accuracy; 0.5 for no effect, at best 1.

    Zhu, Wei, Shen, Fan, Wu: "Enhancing Fine-Tuning based Backdoor Defense with Sharpness-Aware Minimization", ICCV
    2023, equation 7. Neither a higher ASR nor a higher accuracy counts.

    >>> defence_effectiveness(1.0, 0.0, 0.9, 0.8)
    0.95
    """
    return (max(0.0, asr_before - asr_after) - max(0.0, acc_before - acc_after) + 1) / 2
