"""Activation clustering: within a class, poisoned images form a second, smaller cluster of features.

Chen, Carvalho, Baracaldo, Ludwig, Edwards, Lee, Molloy, Srivastava: "Detecting Backdoor Attacks on Deep Neural Networks
by Activation Clustering", SafeAI at AAAI 2019, https://arxiv.org/abs/1811.03728; code: ART,
Trusted-AI/adversarial-robustness-toolbox, begun at IBM as the paper was.

A filter of the training set. For each class, as labelled there:

    1. take the features of its images, and reduce them to 10 dimensions
    2. split them into two clusters by k-means
    3. the silhouette of image i is s(i) = (b - a) / max(a, b), with a its mean distance to the rest of its own cluster
       and b that to the other cluster
    4. the smaller cluster is suspicious if it has less than 35 % of the class, and if the mean silhouette of the class
       is above 0.1: k-means splits every class, but few classes into parts that lie apart
    5. leave out the suspicious clusters

What differs: features are what the head of a ViT reads, where the paper takes the last hidden layer of a CNN. The paper
reduces by ICA; PCA is the default here, as in ART and in backdoor-toolbox. Its exclusionary reclassification, which
trains again without a cluster and looks at how the cluster is then classified, is left out: it is a training for every
class. The paper's text could not be read: what is not in public code is from summaries of it. The method only says
yes or no of an image. The score here, which an AUROC needs, is assumed: s(i) in the smaller cluster, -s(i) in the
larger one, and 2 more in a cluster that is left out, so that what is left out ranks above all else.

What others' ports do: by default ART leaves out the smaller cluster of every class, whatever its size (analysis =
"smaller"); backdoor-toolbox prints the silhouette, and goes by the share alone (analysis = "relative-size").

What to expect: where more than 35 % of a class is poisoned, nothing is flagged. A tenth of all images, relabelled as
one of many classes, is more than that.
"""

from math import sqrt
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float64
from torch import Generator, Tensor

from vitrap.contracts import Card, Flagged, OutcomeKind, Suspect
from vitrap.models.observe import features, head_layer
from vitrap.params import hyperparameters, param

BATCH = 256
"""Images per forward pass; it bounds memory, not the result."""
ROWS = 1024
"""Images whose distances to a whole class are in memory at once."""
MOST_STEPS = 300
"""Most steps of k-means and of ICA; scikit-learn's for k-means."""
ICA_TOLERANCE = 1e-4
"""ICA has converged when the cosine of every row between two steps is within this of 1; scikit-learn's."""

Points = Float64[Tensor, "n dim"]
InSecond = Bool[Tensor, " n"]
"""Which of the points are in the second of two clusters."""


@hyperparameters
class ActivationClustering:
    """The defence: the hyper-parameters of activation clustering."""

    card: ClassVar[Card] = Card(
        "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering",
        "Chen, Carvalho, Baracaldo, Ludwig, Edwards, Lee, Molloy, Srivastava",
        "SafeAI",
        2019,
        "1811.03728",
    )
    version: ClassVar[int] = 1
    kind: ClassVar[OutcomeKind] = "filter"
    needs_train: ClassVar[bool] = True
    needs_attention: ClassVar[bool] = False

    reduce: Literal["pca", "ica"] = param("pca", "how features are reduced; the paper's is ica", source="code")
    dimensions: int = param(10, "dimensions after the reduction", source="paper", low=1, high=10_000)
    analysis: Literal["silhouette", "relative-size", "smaller"] = param(
        "silhouette",
        "when the smaller cluster is flagged: if it is small and lies apart, if it is small, or always",
        source="code",
    )
    size: float = param(0.35, "share of its class below which a cluster is small", source="code", low=0, high=1)
    silhouette: float = param(
        0.1, "mean silhouette above which the clusters of a class lie apart", source="code", low=-1, high=1
    )
    starts: int = param(10, "starts of k-means, of which the best is taken", source="field", low=1, high=1000)

    def apply(self, suspect: Suspect) -> Flagged:
        """Split each class into two clusters, and flag the smaller ones that are suspicious."""
        train = suspect.training_set("activation_clustering")
        with suspect.computing():
            batches = [features(suspect.model, train.images(rows)) for rows in train.row_batches(BATCH)]
        activations = torch.cat(batches).double().cpu()
        labels = train.labels.cpu()
        score = torch.zeros(len(train))
        flagged = torch.zeros(len(train), dtype=torch.bool)
        clearest = 0.0  # the greatest mean silhouette of a class
        for label in labels.unique():
            rows = (labels == label).nonzero().squeeze(1)
            if len(rows) < 2:
                continue  # a single image has no second cluster
            # Steps 1 and 2.
            points = reduced(activations[rows], self.dimensions, self.reduce, suspect.generator)
            second = two_means(points, self.starts, suspect.generator)
            # Step 3; the smaller cluster is the suspicious one.
            separation = silhouettes(points, second)
            smaller = second if second.sum() <= (~second).sum() else ~second
            score[rows] = torch.where(smaller, separation, -separation).float()
            # Steps 4 and 5.
            apart = separation.mean().item()
            clearest = max(clearest, apart)
            if is_suspicious(self, smaller.double().mean().item(), apart):
                flagged[rows] = smaller
                score[rows] += 2 * smaller
        found = int(flagged.sum())
        report = {"flagged": found, "share flagged": found / len(train), "greatest silhouette of a class": clearest}
        device = train.device
        return Flagged(score.to(device), flagged.to(device), head_layer(suspect.model)[0], report)


def is_suspicious(settings: ActivationClustering, share: float, silhouette: float) -> bool:
    """Step 4: whether to flag the smaller cluster of a class, of which it is a share."""
    if settings.analysis == "smaller":
        return True
    small = share < settings.size
    return small and (settings.analysis == "relative-size" or silhouette > settings.silhouette)


def reduced(
    features: Float64[Tensor, "n wide"], dimensions: int, how: Literal["pca", "ica"], generator: Generator
) -> Float64[Tensor, "n few"]:
    """Step 1: the principal or the independent components, as many as there are if those are fewer."""
    left, spread, _ = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    there = int((spread > 1e-9 * spread[0]).sum())
    few = min(dimensions, max(1, there))
    if how == "pca":
        return left[:, :few] * spread[:few]
    white = left[:, :few] * sqrt(len(features))
    return white @ unmixing(white, torch.randn(few, few, generator=generator, dtype=torch.float64)).T


def unmixing(white: Points, start: Float64[Tensor, "dim dim"]) -> Float64[Tensor, "dim dim"]:
    """FastICA: the rotation that makes whitened points least Gaussian, by g = tanh, all rows at once.

    A step takes each row w to the mean of x g(w x) - g'(w x) w, and then makes the rows orthonormal.
    """
    rotation = orthonormal(start)
    for _ in range(MOST_STEPS):
        pushed = (white @ rotation.T).tanh()
        slope = (1 - pushed.square()).mean(0)
        stepped = orthonormal(pushed.T @ white / len(white) - slope[:, None] * rotation)
        moved = 1 - (stepped * rotation).sum(1).abs()
        rotation = stepped
        if moved.max() < ICA_TOLERANCE:
            break
    return rotation


def orthonormal(matrix: Float64[Tensor, "dim dim"]) -> Float64[Tensor, "dim dim"]:
    """The nearest matrix with orthonormal rows."""
    left, _, right = torch.linalg.svd(matrix)
    return left @ right


def two_means(points: Points, starts: int, generator: Generator) -> InSecond:
    """Step 2: k-means with two clusters, from several starts at once; the split with the least sum of squares.

    The first centre of a start is a random point, the second one is drawn by its squared distance to the first, as in
    k-means++.
    """
    first = torch.randint(len(points), (starts,), generator=generator)
    chances = torch.cdist(points[first], points).square()
    second = torch.multinomial(chances + 1e-300, 1, generator=generator)[:, 0]  # any point where all are equal
    centres = torch.stack([points[first], points[second]], 1)
    for _ in range(MOST_STEPS):
        gaps = distances(centres, points)
        nearer = gaps[:, 1] < gaps[:, 0]
        members = torch.stack([~nearer, nearer], 1).double()
        sizes = members.sum(2, keepdim=True)
        moved = torch.where(sizes > 0, members @ points / sizes.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    gaps = distances(centres, points)
    best = gaps.amin(1).square().sum(1).argmin()
    return gaps[best, 1] < gaps[best, 0]


def distances(centres: Float64[Tensor, "starts 2 dim"], points: Points) -> Float64[Tensor, "starts 2 n"]:
    """From both centres of each start to each point."""
    return torch.cdist(centres.flatten(0, 1), points).unflatten(0, centres.shape[:2])


def silhouettes(points: Points, second: InSecond) -> Float64[Tensor, " n"]:
    """Step 3: (b - a) / max(a, b) of each point; 0 where its cluster has no other point, or where there is but one."""
    members = torch.stack([~second, second], 1).double()
    sums = torch.cat([torch.cdist(some, points) @ members for some in points.split(ROWS)])
    own = second.long()
    sizes = members.sum(0)
    within = sums.gather(1, own[:, None])[:, 0] / (sizes[own] - 1).clamp(min=1)
    across = sums.gather(1, 1 - own[:, None])[:, 0] / sizes[1 - own].clamp(min=1)
    width = (across - within) / torch.maximum(across, within).clamp(min=1e-300)
    return torch.where((sizes[own] > 1) & (sizes[1 - own] > 0), width, 0.0)
