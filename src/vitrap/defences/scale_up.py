"""SCALE-UP: multiply all pixels of an input; one whose predicted class stays the same is suspicious.

Guo, Li, Chen, Guo, Sun, Liu: "SCALE-UP: An Efficient Black-box Input-level Backdoor Detection via Analyzing Scaled
Prediction Consistency", ICLR 2023, https://arxiv.org/abs/2302.03251; code: https://github.com/JunfengGo/SCALE-UP.

A screen at test time that needs predicted classes alone:

    1. multiply the image x by each factor n of a set S, and clip at 1
    2. SPC(x) = share of the factors with C(n x) = C(x), where C is the predicted class
    3. setting = "data-free": the score is SPC(x)
    4. setting = "data-limited": with the mean mu_i and the standard deviation sigma_i of SPC over the clean images of
       class i, the score is NSPC(x) = (SPC(x) - mu_c) / sigma_c, where c = C(x)

SPC is scaled prediction consistency. Multiplying washes out what a class is told by, but a strong trigger goes on
working. The paper gives S = {3, 5, 7, 9, 11} as an example. SPC has few values, so many images may tie with a
threshold, which counts as not above it. An image costs 1 + |S| forward passes, 6 by default.

What differs: a class with few clean images, of which the paper has 100 each, takes mean and deviation of all clean
images; and sigma is at least half a step of SPC, since the few clean images of a class often agree. The authors' code
has S = {1, ..., 11} and adds uniform noise of up to 0.02 to the images; the paper's equations have neither. Nothing is
particular to CNNs, so nothing is re-derived for ViTs.

What others' ports do: BackdoorBox multiplies whatever its loader gives, which is wrong where images are normalised;
backdoor-toolbox goes back to pixels first, as here. Both compare with the true class for mu and sigma, where the paper
compares with C(x), and leave out images that are classified wrongly. BackdoorBox has one mu and sigma for all classes.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import Card, Images, OutcomeKind, Screen, Suspect
from vitrap.models.batched import logits_under
from vitrap.params import hyperparameters, param

BATCH = 256
"""Clean images looked at together; it bounds memory, not the result."""
PerClass = Float[Tensor, " classes"]


@hyperparameters
class ScaleUp:
    """The defence: SCALE-UP's hyper-parameters."""

    card: ClassVar[Card] = Card(
        "SCALE-UP: An Efficient Black-box Input-level Backdoor Detection via Analyzing Scaled Prediction Consistency",
        "Guo, Li, Chen, Guo, Sun, Liu",
        "ICLR",
        2023,
        "2302.03251",
    )
    version: ClassVar[int] = 1
    kind: ClassVar[OutcomeKind] = "screen"
    needs_train: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False

    setting: Literal["data-free", "data-limited"] = param(
        "data-free", "the score: SPC, or SPC relative to that of clean images of the predicted class", source="paper"
    )
    largest: int = param(
        11, "the largest factor; the factors are 3, 5, 7, ... up to it", symbol="S", source="paper", low=3, high=255,
        odd=True,
    )  # fmt: skip
    least: int = param(
        5, "clean images that a class needs for a mean and deviation of its own (data-limited only)", low=1
    )

    def apply(self, suspect: Suspect) -> Screen:
        """Measure SPC on clean images where the setting asks for it; otherwise nothing is fitted."""
        clean = suspect.clean
        score = Consistency(suspect.model, torch.tensor([1, *range(3, self.largest + 1, 2)], device=clean.device))
        if self.setting == "data-free":
            return Screen(score)
        # Step 4 on clean images; half a step of SPC is the least deviation.
        with suspect.computing():
            spc = torch.cat([score.spc(clean.images(rows))[0] for rows in clean.row_batches(BATCH)])
        floor = 0.5 / (len(score.factors) - 1)
        statistics = class_statistics(spc, clean.labels, suspect.n_classes, self.least, floor)
        return Screen(replace(score, statistics=statistics), report={"SPC, clean images": spc.mean().item()})


@dataclass(frozen=True)
class Consistency:
    """The score: SPC, or NSPC where there are statistics of clean images.

    Attributes:
        model: the suspect's model.
        factors: 1, and the factors of S.
        statistics: mean and standard deviation of SPC in each class; None in the data-free setting.
    """

    model: nn.Module
    factors: Int64[Tensor, " n"]
    statistics: tuple[PerClass, PerClass] | None = None

    def __call__(self, images: Images) -> Float[Tensor, " b"]:
        """The score of each image: SPC is in [0, 1], NSPC counts standard deviations."""
        spc, predicted = self.spc(images)
        if self.statistics is None:
            return spc
        mean, deviation = self.statistics
        return (spc - mean[predicted]) / deviation[predicted]

    def spc(self, images: Images) -> tuple[Float[Tensor, " b"], Int64[Tensor, " b"]]:
        """Steps 1 and 2: SPC of each image, and the class predicted for it."""
        logits = logits_under(self.model, images, partial(amplify, factors=self.factors), len(self.factors))
        classes = logits.argmax(2)
        return share_that_stays(classes), classes[:, 0]


def amplify(images: Float[Tensor, "b c h w"], factors: Int64[Tensor, " n"]) -> Float[Tensor, "b*n c h w"]:
    """Step 1: each image times each factor, clipped at 1; the n products of an image follow each other.

    >>> amplify(torch.full((1, 1, 1, 1), 0.25), torch.tensor([1, 3, 5])).flatten().tolist()
    [0.25, 0.75, 1.0]
    """
    return (images[:, None] * factors[:, None, None, None]).clamp_(max=1).flatten(0, 1)


def share_that_stays(classes: Int64[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """Step 2: SPC, the share of the products that keep the class of the first, the image itself (eq. 2).

    >>> share_that_stays(torch.tensor([[7, 7, 3, 7, 1]])).tolist()
    [0.5]
    """
    return (classes[:, 1:] == classes[:, :1]).float().mean(1)


def class_statistics(
    spc: Float[Tensor, " n"], labels: Int64[Tensor, " n"], n_classes: int, least: int, floor: float
) -> tuple[PerClass, PerClass]:
    """Step 4: mean and standard deviation of SPC in each class; those of all images where a class has too few.

    Args:
        spc: of clean images.
        labels: their classes.
        n_classes: number of classes.
        least: images that a class needs.
        floor: the least deviation.

    >>> mean, deviation = class_statistics(torch.tensor([0.25, 0.75, 1.0]), torch.tensor([0, 0, 1]), 2, 1, 0.125)
    >>> mean.tolist(), deviation.tolist()
    ([0.5, 1.0], [0.25, 0.125])
    """
    member = functional.one_hot(labels, n_classes).T.float()
    counts = member.sum(1)
    mean = member @ spc / counts.clamp(min=1)
    variance = member @ (spc - mean[labels]).square() / counts.clamp(min=1)
    few = counts < least
    mean = torch.where(few, spc.mean(), mean)
    deviation = torch.where(few, spc.std(correction=0), variance.sqrt())
    return mean, deviation.clamp(min=floor)
