"""Spectral signatures: within a class, poisoned images lie far out along the direction in which features vary most.

Tran, Li, Madry: "Spectral Signatures in Backdoor Attacks", NeurIPS 2018, https://arxiv.org/abs/1811.00636; code
MadryLab/backdoor_data_poisoning.

Class by class, as labelled in the training set: the features are centred, the top right singular vector is taken, and
an image's score is the square of its projection. The images with the highest scores of every class are left out, half
as many again as the defender expects to be poisoned.

What differs: features are what the head of a ViT reads, where the code reads its ResNet's representation. The code
projects features that are not centred; ART and backdoor-toolbox, which name the paper's Algorithm 1, centre them, and
so does this file. Nobody tells the defender how many are poisoned: `epsilon` is a guess. It is a share of each class
by itself (the code, ART, and BackdoorBench, which takes the highest 15 %), or of the whole set, all of which may sit in
any one class (backdoor-toolbox, which spares half of each). A class of one image has nothing to compare: its score is
0, and it is never flagged.

Scores of two classes are not on one scale: a class whose features vary much outranks another as a whole, so that an
AUROC over all training images also compares classes. No public code ranks across classes; all flag within each. With
`score` as "rank", a score is the share of its class that an image outranks, and the ROC is that of this filter as
`epsilon` grows from nothing to everything. What is flagged is the same.

What to expect: the method takes the few for poisoned. In a set of many classes a tenth of all images, relabelled to one
class, is most of that class: the clean ones then lie far out and are flagged. At a half both lie equally far.
"""

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from vitrap.contracts import Card, Flagged, OutcomeKind, Suspect
from vitrap.models.observe import features, head_layer
from vitrap.params import hyperparameters, param

BATCH = 256
"""Images a forward pass; it bounds memory, not the result."""


@hyperparameters
class Spectral:
    """The table of hyper-parameters."""

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
    factor: float = param(1.5, "images to flag over images expected", source="code", low=0, open=True)
    share_of: Literal["class", "set"] = param(
        "class",
        "what epsilon is a share of: each class; or the whole set, in each class but for half of it",
        source="code",
    )
    score: Literal["projection", "rank"] = param(
        "projection",
        "the squared projection, or the share of its class that an image outranks",
        source="code",
    )

    def apply(self, suspect: Suspect) -> Flagged:
        """Class by class: score the images by their features, and flag the highest."""
        train = suspect.training_set("spectral")
        # The representation of every training image.
        with suspect.computing():
            seen = torch.cat([features(suspect.model, train.images(rows)) for rows in train.rows(BATCH)])
        score = seen.new_zeros(len(train))
        flagged = torch.zeros_like(train.labels, dtype=torch.bool)
        for label in train.labels.unique():
            rows = (train.labels == label).nonzero().squeeze(1)
            if len(rows) > 1:  # one image alone lies nowhere
                outlying = outlier_scores(seen[rows])
                flagged[rows] = highest(outlying, to_flag(self, len(rows), len(train)))
                score[rows] = (ranks(outlying) if self.score == "rank" else outlying).float()
        found = int(flagged.sum())
        report = {"flagged": found, "share flagged": found / max(1, len(train))}
        return Flagged(score, flagged, head_layer(suspect.model)[0], report)


def to_flag(settings: Spectral, in_class: int, in_set: int) -> int:
    """How many images of a class to flag, rounded down."""
    share = settings.factor * settings.epsilon
    if settings.share_of == "set":
        return min(int(share * in_set + 1e-9), in_class // 2)
    return min(int(share * in_class + 1e-9), in_class)


def outlier_scores(features: Float[Tensor, "n dim"]) -> Float64[Tensor, " n"]:
    """tau_i = ((R(x_i) - mean) . v)^2, v the top right singular vector of the centred features, in fp64."""
    centred = features.double() - features.double().mean(0)
    top = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    return (centred @ top).square()


def highest(scores: Float64[Tensor, " n"], count: int) -> Bool[Tensor, " n"]:
    """Which are the `count` highest scores.

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
    below, upto = (torch.searchsorted(ordered, scores, right=right) for right in (False, True))
    return (below + upto - 1).double() / (2 * (len(scores) - 1))
