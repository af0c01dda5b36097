"""Max softmax: the more certain the model, the more suspicious the input. The null model of every table.

Hendrycks, Gimpel: "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks", ICLR
2017, https://arxiv.org/abs/1610.02136.

A screen that knows nothing of backdoors: one forward pass, no clean images, no parameters. A screen made for backdoors
that does not beat it has only found out that triggered images are classified with confidence.

What differs: the paper looks for inputs of which the model is unsure. A trigger makes the model sure, so here the
greatest softmax probability itself is the score.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrap.contracts import Card, Images, OutcomeKind, Screen, Suspect
from vitrap.params import hyperparameters


@hyperparameters
class MaxSoftmax:
    """The defence; it has no hyper-parameters."""

    card: ClassVar[Card] = Card(
        "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks",
        "Hendrycks, Gimpel",
        "ICLR",
        2017,
        "1610.02136",
    )
    version: ClassVar[int] = 1
    kind: ClassVar[OutcomeKind] = "screen"
    needs_train: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False

    def apply(self, suspect: Suspect) -> Screen:
        """Return the score as it is; nothing is fitted."""
        return Screen(GreatestProbability(suspect.model))


@dataclass(frozen=True)
class GreatestProbability:
    """The score: the softmax probability of the predicted class."""

    model: nn.Module

    @torch.no_grad()
    def __call__(self, images: Images) -> Float[Tensor, " b"]:
        """The score of each image, in (0, 1]."""
        return self.model(images).float().softmax(1).amax(1)
