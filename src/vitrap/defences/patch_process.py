"""Patch processing: how often the predicted class changes when patches are dropped, or change places.

Doan, Lao, Yang, Li: "Defending Backdoor Attacks on Vision Transformer via Patch Processing", AAAI 2023,
https://arxiv.org/abs/2206.12381. No official code is known.

A screen at test time:

    1. change each image several times at random, before the positional encoding: PatchDrop blanks some of its patches,
       PatchShuffle permutes all of them
    2. count in how many trials the predicted class differs from that of the unchanged image
    3. compare this share with a threshold that is set on held-out clean images

A trigger that sits in few patches is dropped with them: under PatchDrop the class of a triggered image changes more
often than a clean one's. A trigger that is blended over the whole image survives the loss of order, which costs clean
images their class: under PatchShuffle the class of a triggered image changes less often.

Both are done on pixels here. The patch embedding treats each patch by itself and all patches alike, so permuting the
patches of the image is the same as permuting the tokens between the embedding and the positional encoding (the tests
compare the two in every family), and a blank patch is a token without content at the same place.

The two statistics become one score. With transform = "drop" it is the share of trials that change the class; with
"shuffle" the share that keep it. With "both", each statistic is replaced by the share of the defender's clean images
that it exceeds, and the score is the greater of the two. Thresholding this score at 1 - a is the same as thresholding
each statistic at its own false-positive rate a, and taking an input as suspicious if either exceeds its threshold. The
price: all inputs with a statistic above those of all clean images get the same score, 1.

What differs: only the paper's abstract, the start of its introduction, and summaries of it could be read. What is done
to patches, and in which direction each statistic points, is the paper's. Assumed: that one suspicious statistic
suffices, the number of trials, the share dropped, and the blank. 0.3 is the least round share at which 10 independent
draws all miss a given patch in less than 5 % of cases (0.7 ** 10 is 2.8 %). The blank is black, as in the code of
Naseer et al. (https://arxiv.org/abs/2105.10497), where PatchDrop comes from; another public code sets the tokens to
zero. The changes are drawn once for all images, so that the score of an image does not depend on others. By chance,
some patch would then be dropped too often or too seldom, for every image alike; so the draws are balanced: each patch
is dropped equally often, give or take one.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Generator, Tensor, nn

from vitrap.contracts import Card, Images, ImageSet, OutcomeKind, Screen, Suspect
from vitrap.errors import UserError
from vitrap.models.batched import logits_under
from vitrap.models.observe import token_layout
from vitrap.params import hyperparameters, param

Patches = Float[Tensor, "b tokens c ph pw"]
Order = Int64[Tensor, "trials tokens"]
"""For each trial, the patch that comes to each place."""
Kept = Bool[Tensor, "trials tokens"]
"""For each trial, the places that are not blanked."""
TRANSFORMS = {"drop": ("drop",), "shuffle": ("shuffle",), "both": ("drop", "shuffle")}
BATCH = 512
"""Images per forward pass where they are not changed; it bounds memory, not the result."""
REPORTED = {"drop": "class changes under drop", "shuffle": "class stays under shuffle"}


@hyperparameters
class PatchProcess:
    """The defence: the hyper-parameters of patch processing."""

    card: ClassVar[Card] = Card(
        "Defending Backdoor Attacks on Vision Transformer via Patch Processing",
        "Doan, Lao, Yang, Li",
        "AAAI",
        2023,
        "2206.12381",
    )
    version: ClassVar[int] = 1
    kind: ClassVar[OutcomeKind] = "screen"
    needs_train: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = True

    transform: Literal["drop", "shuffle", "both"] = param(
        "both",
        "how patches are changed; both, since the defender does not know the kind of trigger",
        source="paper",
    )
    trials: int = param(10, "changed copies of an image for each transform", low=1, high=1000)
    drop: float = param(0.3, "share of the patches that PatchDrop blanks, at least one", low=0, high=1)
    blank: Literal["black", "mean"] = param(
        "black", "a dropped patch's colour: black, or the clean images' mean", source="field"
    )

    def apply(self, suspect: Suspect) -> Screen:
        """Draw the changes, and measure on clean images how often they change the class."""
        clean, transforms = suspect.clean, TRANSFORMS[self.transform]
        # Step 1: the changes are drawn once, for all images.
        grid = patch_grid(suspect)
        drawn = [draw_changes(self, transform, grid[0] * grid[1], suspect.generator) for transform in transforms]
        order = torch.cat([order for order, _ in drawn]).to(clean.device)
        kept = torch.cat([kept for _, kept in drawn]).to(clean.device)
        blank = mean_colour(clean) if self.blank == "mean" else torch.zeros(clean.channels, device=clean.device)
        score = PatchScore(suspect.model, transforms, PatchChange(grid, order, kept, blank))
        # Step 2 on clean images: what each statistic is without a trigger.
        with suspect.computing():
            statistics = torch.cat([score.statistics(clean.images(rows)) for rows in clean.row_batches(BATCH)])
        report = {
            f"{REPORTED[name]}, clean images": statistics[:, i].mean().item() for i, name in enumerate(transforms)
        }
        # Two statistics need a common scale, which the clean images give; a single one is the score as it is.
        if len(transforms) > 1:
            score = replace(score, clean=statistics.sort(0).values)
        return Screen(score, report=report)


def draw_changes(settings: PatchProcess, transform: str, tokens: int, generator: Generator) -> tuple[Order, Kept]:
    """Step 1: the random changes of every trial of one transform, in an image of `tokens` patches."""
    trials = settings.trials
    if transform == "shuffle":
        order = torch.rand(trials, tokens, generator=generator).argsort(1)
        return order, torch.ones_like(order, dtype=torch.bool)
    each = max(1, round(settings.drop * tokens))
    dropped = balanced_draws(trials, tokens, each, generator)
    return torch.arange(tokens).expand(trials, tokens), ~dropped


@dataclass(frozen=True)
class PatchChange:
    """Makes a changed copy of each image for every trial.

    Attributes:
        grid: rows and columns of patches.
        order: for each trial, the patch that comes to each place.
        kept: for each trial, the places that are not blanked.
        blank: the colour of blanked places.
    """

    grid: tuple[int, int]
    order: Order
    kept: Kept
    blank: Float[Tensor, " c"]

    def __call__(self, images: Images) -> Float[Tensor, "copies c h w"]:
        """The changed copies; those of one image follow each other."""
        patches = to_patches(images, self.grid)[:, self.order].flatten(0, 1)
        kept = self.kept.repeat(len(images), 1)[..., None, None, None]
        return from_patches(torch.where(kept, patches, self.blank[:, None, None]), self.grid)


@dataclass(frozen=True)
class PatchScore:
    """The score: how often the class of an image changes under drop, or stays under shuffle.

    Attributes:
        model: the suspect's model.
        transforms: "drop", "shuffle" or both; each has an equal share of the trials, in this order.
        change: changes the patches, in the same way for every image.
        clean: the statistics of clean images, each sorted; None where the single statistic is the score.
    """

    model: nn.Module
    transforms: tuple[str, ...]
    change: PatchChange
    clean: Float[Tensor, "n transforms"] | None = None

    def __call__(self, images: Images) -> Float[Tensor, " b"]:
        """The score of each image, in [0, 1]."""
        statistics = self.statistics(images)
        if self.clean is None:
            return statistics[:, 0]
        return share_exceeded(statistics, self.clean).amax(1)

    @torch.no_grad()
    def statistics(self, images: Images) -> Float[Tensor, "b transforms"]:
        """Step 2: the share of trials that change the class (drop), or that keep it (shuffle)."""
        own = torch.cat([self.model(some).argmax(1) for some in images.split(BATCH)])
        logits = logits_under(self.model, images, self.change, len(self.change.order))
        classes = logits.argmax(2).unflatten(1, (len(self.transforms), -1))
        changed = label_changes(own, classes)
        suspicious = [
            1 - changed[:, i] if name == "shuffle" else changed[:, i] for i, name in enumerate(self.transforms)
        ]
        return torch.stack(suspicious, 1)


def patch_grid(suspect: Suspect) -> tuple[int, int]:
    """Rows and columns of the patches that the suspect's model divides an image into.

    Raises:
        UserError: the model has no plain token attention, or its grid does not fit the images.
    """
    rows, columns = token_layout(suspect.model).grid
    size = suspect.clean.size
    if size % rows or size % columns or rows * columns < 2:
        raise UserError(
            f"patch processing needs images that divide into 2 patches or more; {size} px images do not by the"
            f" model's grid of {rows} x {columns}: give images of the model's own size, or a smaller patch"
        )
    return rows, columns


def balanced_draws(trials: int, tokens: int, each: int, generator: Generator) -> Bool[Tensor, "trials tokens"]:
    """Which tokens each trial draws: `each` at random, with totals over the trials that differ by one at most.

    >>> balanced_draws(4, 6, 3, torch.Generator()).sum(0).tolist()
    [2, 2, 2, 2, 2, 2]
    """
    drawn = torch.zeros(trials, tokens, dtype=torch.bool)
    for trial in range(trials):
        # Tokens drawn in fewer trials so far come first; the noise, which is below 1, shuffles those with equal counts.
        rarest_first = (drawn.sum(0) + torch.rand(tokens, generator=generator)).argsort()
        drawn[trial, rarest_first[:each]] = True
    return drawn


def to_patches(images: Images, grid: tuple[int, int]) -> Patches:
    """The patches of each image, row by row, as a ViT's patch embedding takes them.

    >>> to_patches(torch.arange(4.0).view(1, 1, 2, 2), (2, 1)).squeeze().tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    return images.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def from_patches(patches: Patches, grid: tuple[int, int]) -> Images:
    """Put patches together to images: the inverse of `to_patches`."""
    return patches.unflatten(1, grid).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def label_changes(
    own: Int64[Tensor, " b"], classes: Int64[Tensor, "b transforms trials"]
) -> Float[Tensor, "b transforms"]:
    """The share of trials whose predicted class differs from that of the unchanged image.

    >>> label_changes(torch.tensor([3]), torch.tensor([[[3, 1, 3, 3], [2, 1, 3, 2]]])).tolist()
    [[0.25, 0.75]]
    """
    return (classes != own[:, None, None]).float().mean(2)


def share_exceeded(
    statistics: Float[Tensor, "b transforms"], clean: Float[Tensor, "n transforms"]
) -> Float[Tensor, "b transforms"]:
    """The share of clean images with a lower statistic, for each transform; `clean` is sorted.

    >>> share_exceeded(torch.tensor([[0.4], [0.5], [1.0]]), torch.tensor([[0.0], [0.4], [0.4], [0.6]])).T.tolist()
    [[0.25, 0.75, 1.0]]
    """
    return torch.searchsorted(clean.T.contiguous(), statistics.T.contiguous()).T / len(clean)


def mean_colour(clean: ImageSet) -> Float[Tensor, " c"]:
    """The mean over all pixels of the clean images."""
    return torch.cat([clean.images(rows).mean((2, 3)) for rows in clean.row_batches(BATCH)]).mean(0)
