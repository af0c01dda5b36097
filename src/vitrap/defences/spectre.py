"""SPECTRE: spectral signatures, made stand out by whitening features with a robust estimate of the clean covariance.

Hayase, Kong, Somani, Oh: "SPECTRE: Defending Against Backdoor Attacks Using Robust Statistics", ICML 2021,
https://arxiv.org/abs/2104.11315; code, in Julia: SewoongLab/spectre-defense.

A filter of the training set. For each class, as labelled there, with e the number of its images that the defender
expects to be poisoned:

    1. take the features of its images, centre them, and keep the first k principal components
    2. estimate the covariance of the clean ones: drop up to 2 e images that the covariance filter of Diakonikolas et
       al. (https://arxiv.org/abs/1703.00893) finds far out, and take the covariance S of the others
    3. whiten all images, x = S^(-1/2) h; S' is the covariance of x
    4. the quantum entropy score of an image is x^T M x, where M = exp(alpha (S' - I) / (|S'| - 1)), divided by its
       trace. This is a matrix exponential, with |S'| the largest eigenvalue: M weighs the directions where S' exceeds I
    5. leave out the 1.5 e images with the highest scores
    6. of ten k between 1 and 100, take the one whose choice in step 5 stands out most: whiten all 100 components with
       the covariance of the images that are left; the mean quantum entropy score of all images is then greatest

The filter of step 2 whitens with the present covariance, and drops images whose squared length is above
10 k log(n / tau). If there are none, it looks for the quadratic form V of unit norm for which x^T V x varies most. It
stops where that variance is no larger than clean images explain; else it drops the images whose value is furthest from
the median, and begins anew.

What differs: features are what the head of a ViT reads, where the code reads its ResNet's representation. Nobody tells
the defender the target class, nor how many of its images are poisoned: `epsilon`, a share of each class, is a guess,
and each class loses images, unless classes = "highest" takes only the class whose score in step 6 is greatest. There
are no more components than half the images of a class, so that covariances can be inverted (assumed). Covariances are
centred everywhere, and k = 1 is whitened, too. The score of an image, which an AUROC over all classes needs, is that of
step 6 (assumed): each class is measured by its own images that are left. The paper's text could not be read: what is
said here of the method is what its code does.

What others' ports do: BackdoorBench and the Python port in backdoor-toolbox take the exponential of each element in
step 4, not of the matrix, which weighs directions by the axes that they happen to be written in. The latter looks at
two components only.

What to expect: as with spectral signatures, the poisoned must be the few of their class.
"""

from math import log, sqrt
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from vitrap.contracts import Card, Flagged, OutcomeKind, Suspect
from vitrap.models.observe import features, head_layer
from vitrap.params import hyperparameters, param

BATCH = 256
"""Images per forward pass; it bounds memory, not the result."""
CANDIDATES = 10
"""How many k are tried, from the code: the squares of evenly spaced numbers, rounded."""
C = 10
"""The constant of the covariance filter, from the code."""
MARGIN = 3
"""How much the filter's bound is below the value that sets it, from the code."""
POWER_STEPS = 100
"""Most steps of the power iteration for V."""
POWER_TOLERANCE = 1e-5
"""It ends when a step raises the variance by a smaller share."""

Points = Float64[Tensor, "n k"]
Square = Float64[Tensor, "k k"]


@hyperparameters
class Spectre:
    """The defence: SPECTRE's hyper-parameters."""

    card: ClassVar[Card] = Card(
        "SPECTRE: Defending Against Backdoor Attacks Using Robust Statistics",
        "Hayase, Kong, Somani, Oh",
        "ICML",
        2021,
        "2104.11315",
    )
    version: ClassVar[int] = 1
    kind: ClassVar[OutcomeKind] = "filter"
    needs_train: ClassVar[bool] = True
    needs_attention: ClassVar[bool] = False

    epsilon: float = param(
        0.1, "share of a class expected to be poisoned", symbol="ε", source="field", low=0, high=0.33, open="low"
    )
    alpha: float = param(4.0, "how sharply M picks directions", symbol="α", source="code", low=0)
    tau: float = param(
        0.1, "chance that the covariance filter may fail", symbol="τ", source="code", low=0, high=1, open=True
    )
    drop: float = param(2.0, "images that the covariance may leave out, divided by e", source="code", low=0, high=2)
    factor: float = param(1.5, "images to flag, divided by e", source="code", low=0, high=2, open="low")
    dimensions: int = param(100, "most principal components", source="code", low=1, high=1000)
    classes: Literal["all", "highest"] = param(
        "all", "which classes lose images: all, or the one whose score is greatest", source="field"
    )

    def apply(self, suspect: Suspect) -> Flagged:
        """Score the images of each class, and flag those with the highest scores."""
        train = suspect.training_set("spectre")
        with suspect.computing():
            batches = [features(suspect.model, train.images(rows)) for rows in train.row_batches(BATCH)]
        representations = torch.cat(batches).double()
        score = representations.new_zeros(len(train))
        flagged = torch.zeros_like(train.labels, dtype=torch.bool)
        of_class = representations.new_zeros(suspect.n_classes)
        for label in train.labels.unique():
            rows = (train.labels == label).nonzero().squeeze(1)
            if len(rows) < 2:
                continue  # nothing to compare a single image with
            components = principal_components(representations[rows], min(self.dimensions, len(rows) // 2))
            score[rows], flagged[rows], of_class[label] = best_filter(self, components)
        highest = int(of_class.argmax())
        if self.classes == "highest":
            flagged &= train.labels == highest
        found = int(flagged.sum())
        report = {
            "flagged": found,
            "share flagged": found / len(train),
            "class with the greatest score": highest,
            "greatest score of a class": of_class[highest].item(),
            "median score of a class": of_class.quantile(0.5).item(),
        }
        return Flagged(score.float(), flagged, head_layer(suspect.model)[0], report)


def best_filter(
    settings: Spectre, components: Points
) -> tuple[Float64[Tensor, " n"], Bool[Tensor, " n"], Float64[Tensor, ""]]:
    """Steps 2 to 6 for one class: the scores of step 6 and the flags of the best k, and the mean that makes it so."""
    n, most = components.shape
    flag = int(settings.factor * settings.epsilon * n + 0.5)
    tried = []
    for k in candidates(most):
        some = components[:, :k]
        clean = likely_clean(some, settings.epsilon, settings.tau, int(settings.drop * settings.epsilon * n + 0.5))
        outlying = quantum_scores(whitened(some, clean), settings.alpha)
        flagged = torch.zeros_like(clean).index_fill(0, outlying.topk(flag).indices, True)
        # Step 6: with all components, how far do all images stand out from those that are left?
        scores = quantum_scores(whitened(components, ~flagged), settings.alpha)
        tried.append((scores, flagged, scores.mean()))
    return max(tried, key=lambda one: one[2].item())


def principal_components(features: Float64[Tensor, "n wide"], most: int) -> Float64[Tensor, "n few"]:
    """Step 1, for all k at once: the components from the first one on."""
    left, spread, _ = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    return (left * spread)[:, :most]


def candidates(most: int) -> list[int]:
    """Step 6: the k to try.

    >>> candidates(100)
    [1, 4, 9, 16, 25, 36, 49, 64, 81, 100]
    """
    squares = torch.linspace(1, sqrt(most), CANDIDATES, dtype=torch.float64).square().round()
    return sorted({int(k) for k in squares})


def covariance(points: Points) -> Square:
    """The mean of x x^T around the mean of x."""
    centred = points - points.mean(0)
    return centred.T @ centred / len(points)


def whitened(points: Points, clean: Bool[Tensor, " n"]) -> Points:
    """Step 3: S^(-1/2) h, with S the covariance of the clean ones. A direction that they do not have becomes 0."""
    return points @ inverse_root(covariance(points[clean]))


def inverse_root(matrix: Square) -> Square:
    """The inverse of the square root of a positive semi-definite matrix, where it has one, and 0 elsewhere."""
    values, vectors = torch.linalg.eigh(matrix)
    there = values > 1e-10 * values[-1]
    return (vectors * torch.where(there, values.clamp(min=1e-300).rsqrt(), 0.0)) @ vectors.T


def quantum_scores(white: Points, alpha: float) -> Float64[Tensor, " n"]:
    """Step 4: x^T M x of each image.

    M has the eigenvectors of S', and as eigenvalues the softmax of alpha / (|S'| - 1) times those of S'.
    """
    values, vectors = torch.linalg.eigh(covariance(white))
    # Where S' is I, all directions weigh the same.
    weights = (alpha * (values - values[-1]) / (values[-1] - 1).clamp(min=1e-9)).softmax(0)
    return (white @ vectors).square() @ weights


def likely_clean(points: Points, epsilon: float, tau: float, budget: int) -> Bool[Tensor, " n"]:
    """Step 2: the images that are left after up to `budget` have been dropped."""
    left = torch.arange(len(points), device=points.device)
    while budget:
        some = points[left]
        white = some @ inverse_root(some.T @ some / len(some))
        far = far_out(white, epsilon, tau)
        count = min(budget, int((far > 0).sum()))
        if not count:
            break
        keep = torch.ones_like(left, dtype=torch.bool).index_fill(0, far.topk(count).indices, False)
        left = left[keep]
        budget -= count
    return torch.zeros(len(points), dtype=torch.bool, device=points.device).index_fill(0, left, True)


def far_out(white: Points, epsilon: float, tau: float) -> Float64[Tensor, " n"]:
    """How far beyond the filter's bound each image is; those above 0 are to be dropped, the highest first.

    Above 10 log(1 / epsilon), the tail bound of Diakonikolas et al. allows no image at all in a class of less than some
    10,000, so none is computed here.
    """
    n, k = white.shape
    beyond = white.square().sum(1) - C * k * log(n / tau)
    if (beyond > 0).any():
        return beyond
    variance, form = widest_form(white)
    if variance <= 1 + C * epsilon * log(1 / epsilon) ** 2:
        return torch.zeros_like(beyond)
    values = ((white @ form) * white).sum(1) / sqrt(2)
    gaps = (values - values.quantile(0.5)).abs()
    bounds = gaps - MARGIN
    certain = bounds[bounds > 10 * log(1 / epsilon)]
    # Where none is that far out, the code goes by the furthest one.
    bound = certain.min() if len(certain) else bounds.max()
    return gaps - bound if bound > 0 else torch.zeros_like(gaps)


def widest_form(white: Points) -> tuple[Float64[Tensor, ""], Square]:
    """The variance of x^T V x, and the V of unit norm for which it is greatest, by power iteration."""
    mean = white.T @ white / len(white)
    form = torch.eye(white.shape[1], dtype=white.dtype, device=white.device) / sqrt(white.shape[1])
    variance = form.new_zeros(())
    for _ in range(POWER_STEPS):
        values = ((white @ form) * white).sum(1)
        stepped = (white * values[:, None]).T @ white / len(white) - (form * mean).sum() * mean
        before = variance
        variance = stepped.norm()
        form = stepped / variance.clamp(min=1e-300)
        if variance - before <= POWER_TOLERANCE * variance:
            break
    return variance, form
