"""Spectral signatures: within a class, poisoned images lie far out along the direction in which features vary most.

Tran, Li, Madry: "Spectral Signatures in Backdoor Attacks", NeurIPS 2018, https://arxiv.org/abs/1811.00636; code:
MadryLab/backdoor_data_poisoning.

A filter of the training set. For each class, as labelled there:

    1. take the features R(x_i) of its images, and centre them
    2. v = the top right singular vector of the centred features
    3. tau_i = ((R(x_i) - mean) . v)^2 is the score of image i
    4. leave out the images with the highest scores: 1.5 times as many as the defender expects to be poisoned

What differs: features are what the head of a ViT reads, where the code reads its ResNet's representation. The code
does not centre the features that it projects; ART and backdoor-toolbox, which name the paper's Algorithm 1, centre
them, and so does this file. Nobody tells the defender how many images are poisoned: `epsilon` is a guess. It is a share
of each class (as in the code, in ART, and in BackdoorBench, which takes the highest 15 %), or of the whole set: then
each class in turn is taken to hold all poisoned images, but at most half of it is flagged (as in backdoor-toolbox). A
class of one image has nothing to compare: its score is 0, and it is never flagged.

The scores of two classes have no common scale: where features vary much, all images of a class may score higher than
those of another, so an AUROC over all training images also compares classes. No public code ranks across classes; all
flag within each class. With score = "rank", a score is the share of the other images of its class that an image
outranks, and the ROC is that of this filter as `epsilon` grows from nothing to everything. The flagged images are the
same.

What to expect: the method takes the minority of a class for poisoned. In a set of many classes, a tenth of all images,
relabelled as one class, is most of that class: its clean images then lie far out and are flagged. When half of a class
is poisoned, both halves lie equally far out and cannot be told apart.
"""

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from vitrap.contracts import Card, Flagged, OutcomeKind, Suspect
from vitrap.models.observe import features, head_layer
from vitrap.params import hyperparameters, param

BATCH = 256
"""Images per forward pass; it bounds memory, not the result."""


@hyperparameters
class Spectral:
    """The defence: the hyper-parameters of spectral signatures."""

    card: ClassVar[Card] = Card(
        "Spectral Signatures in Backdoor Attacks", "Tran, Li, Madry", "NeurIPS", 2018, "1811.00636"
    )
    version: ClassVar[int] = 1
    kind: ClassVar[OutcomeKind] = "filter"
    needs_train: ClassVar[bool] = True
    needs_attention: ClassVar[bool] = False

    epsilon: float = param(
        0.1, "share that the defender expects to be poisoned", symbol="ε", source="field", low=0, high=1, open=True
    )
    factor: float = param(
        1.5, "images to flag, divided by images expected to be poisoned", source="code", low=0, open=True
    )
    share_of: Literal["class", "set"] = param(
        "class",
        "what epsilon is a share of: each class, or the whole set (then at most half of a class is flagged)",
        source="code",
    )
    score: Literal["projection", "rank"] = param(
        "projection",
        "the squared projection, or the share of its class that an image outranks",
        source="code",
    )

    def apply(self, suspect: Suspect) -> Flagged:
        """Score the images of each class by their features, and flag those with the highest scores."""
        train = suspect.training_set("spectral")
        # Step 1: the representation R of every training image.
        with suspect.computing():
            batches = [features(suspect.model, train.images(rows)) for rows in train.row_batches(BATCH)]
            representations = torch.cat(batches)
        score = representations.new_zeros(len(train))
        flagged = torch.zeros_like(train.labels, dtype=torch.bool)
        for label in train.labels.unique():
            rows = (train.labels == label).nonzero().squeeze(1)
            if len(rows) < 2:
                continue  # nothing to compare a single image with
            # Steps 2 to 4, within the class.
            outlying = outlier_scores(representations[rows])
            flagged[rows] = highest(outlying, flag_count(self, len(rows), len(train)))
            score[rows] = (ranks(outlying) if self.score == "rank" else outlying).float()
        found = int(flagged.sum())
        report = {"flagged": found, "share flagged": found / max(1, len(train))}
        return Flagged(score, flagged, head_layer(suspect.model)[0], report)


def flag_count(settings: Spectral, in_class: int, in_set: int) -> int:
    """Step 4: how many images of a class to flag, rounded down.

    Args:
        settings: the defence.
        in_class: number of images of the class.
        in_set: number of images of the training set.
    """
    share = settings.factor * settings.epsilon
    # 1e-9, because 0.29 * 100 is 28.999... in floats and would become 28.
    if settings.share_of == "set":
        return min(int(share * in_set + 1e-9), in_class // 2)
    return min(int(share * in_class + 1e-9), in_class)


def outlier_scores(features: Float[Tensor, "n dim"]) -> Float64[Tensor, " n"]:
    """Steps 2 and 3, in fp64: tau_i = ((R(x_i) - mean) . v)^2, v the first right singular vector."""
    centred = features.double() - features.double().mean(0)
    top = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    return (centred @ top).square()


def highest(scores: Float64[Tensor, " n"], count: int) -> Bool[Tensor, " n"]:
    """Mark the `count` highest scores.

    >>> highest(torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), 2).tolist()
    [False, True, True]
    """
    return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, scores.topk(count).indices, True)


def ranks(scores: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """The share of the others that each score is above; ties count half.

    >>> ranks(torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)).tolist()
    [0.0, 1.0, 0.5]
    """
    ordered = scores.sort().values
    lower = torch.searchsorted(ordered, scores)
    lower_or_equal = torch.searchsorted(ordered, scores, right=True)
    # Their sum is twice the number of lower scores plus the ties; 1 is taken off, since a score ties with itself.
    return (lower + lower_or_equal - 1).double() / (2 * (len(scores) - 1))
