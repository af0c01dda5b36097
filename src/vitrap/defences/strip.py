"""STRIP: superimpose clean images on an input; one whose predicted class never changes is suspicious.

Gao, Xu, Wang, Chen, Ranasinghe, Nepal: "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", ACSAC 2019,
https://arxiv.org/abs/1902.06531; code: https://github.com/garrisongys/STRIP.

A screen at test time. It needs the model's outputs and some clean images without labels:

    1. draw N clean images
    2. add each of them to the input x, which gives N sums
    3. score(x) = - mean over the sums of the Shannon entropy H, in bits, of the model's softmax

Adding another image usually makes the class of a clean input uncertain; it does not where a trigger that works on any
image decides the class. So a low entropy is suspicious. The base of the logarithm scales all scores alike.

Both weights of the sum are 1, as in the authors' notebook (cv2.addWeighted(x, 1, overlay, 1, 0)) and in BackdoorBench,
which adds normalised images. To average the two images, as TrojanZoo does, set weight = overlay_weight = 0.5.

What differs: sums are clipped at 1, as adding 8-bit images does, since a model here is a function of images in [0, 1];
the notebook adds floats and lets them exceed 1. The authors draw new clean images for each input; here they are drawn
once for all inputs, so that the score of an input depends on that input alone. The authors set a threshold at a false
rejection rate; here the metric does. Nothing is particular to CNNs, so nothing is re-derived for ViTs.
"""

from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrap.contracts import Card, Images, ImageSet, OutcomeKind, Screen, Suspect
from vitrap.models.batched import logits_under
from vitrap.params import hyperparameters, param


@hyperparameters
class Strip:
    """The defence: STRIP's hyper-parameters."""

    card: ClassVar[Card] = Card(
        "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks",
        "Gao, Xu, Wang, Chen, Ranasinghe, Nepal",
        "ACSAC",
        2019,
        "1902.06531",
    )
    version: ClassVar[int] = 1
    kind: ClassVar[OutcomeKind] = "screen"
    needs_train: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False

    overlays: int = param(100, "clean images superimposed on each input", symbol="N", source="code", low=1, high=1000)
    weight: float = param(1.0, "weight of the input in a sum", source="code", low=0, high=1, open="low")
    overlay_weight: float = param(1.0, "weight of the clean image in a sum", source="code", low=0, high=1, open="low")

    def apply(self, suspect: Suspect) -> Screen:
        """Draw the clean images that every input is added to; nothing is fitted."""
        overlays = draw_overlays(suspect.clean, self.overlays, suspect.generator)
        return Screen(NegativeEntropy(suspect.model, self.overlay_weight * overlays, self.weight))


@dataclass(frozen=True)
class NegativeEntropy:
    """The score: minus the mean entropy of the model's softmax over the superimposed images.

    Attributes:
        model: the suspect's model.
        overlays: the clean images, times their weight.
        weight: weight of the input in a sum.
    """

    model: nn.Module
    overlays: Float[Tensor, "n c h w"]
    weight: float

    @torch.no_grad()
    def __call__(self, images: Images) -> Float[Tensor, " b"]:
        """The score of each image, in [-log2 K, 0] for K classes."""
        logits = logits_under(self.model, images, self._superimposed, len(self.overlays))
        return -entropy(logits).mean(1)

    def _superimposed(self, images: Images) -> Float[Tensor, "sums c h w"]:
        return superimpose(images, self.overlays, self.weight)


def draw_overlays(clean: ImageSet, n: int, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Step 1: `n` clean images at random, with replacement where there are fewer than `n`."""
    if len(clean) < n:
        rows = torch.randint(len(clean), (n,), generator=generator)
    else:
        rows = torch.randperm(len(clean), generator=generator)[:n]
    return clean.images(rows.to(clean.device))


def superimpose(
    images: Float[Tensor, "b c h w"], overlays: Float[Tensor, "n c h w"], weight: float = 1.0
) -> Float[Tensor, "b*n c h w"]:
    """Step 2: `weight` times each image plus each overlay, clipped at 1; the n sums of an image follow each other.

    >>> superimpose(torch.full((1, 1, 1, 1), 0.75), torch.tensor([0.125, 0.5]).view(2, 1, 1, 1)).flatten().tolist()
    [0.875, 1.0]
    """
    return ((weight * images)[:, None] + overlays).clamp_(max=1).flatten(0, 1)


def entropy(logits: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
    """Step 3: H = - sum_i y_i log2 y_i of the softmax y, in bits.

    >>> entropy(torch.zeros(1, 2)).tolist()
    [1.0]
    """
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1) / log(2)
