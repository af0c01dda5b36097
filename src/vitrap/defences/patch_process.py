"""Patch processing: how often the predicted class changes when patches are dropped, or change places.

Doan, Lao, Yang, Li: "Defending Backdoor Attacks on Vision Transformer via Patch Processing", AAAI 2023,
https://arxiv.org/abs/2206.12381. No official code is known.

An image is shown to the model several times, changed at random before the positional encoding. PatchDrop blanks some
of its patches, PatchShuffle permutes them all. The statistic is how often the class differs from that of the image as
it is. A trigger that sits in few patches goes with them: under PatchDrop the class of a triggered image changes more
often than a clean one's. A trigger that is blended over the whole image outlives the loss of order, which costs clean
images their class: under PatchShuffle the class of a triggered image changes less often.

Both are done on the pixels here: the patch embedding treats each patch by itself and alike, so permuting tokens
between the embedding and the positional encoding is permuting the patches of the image (the tests compare the two in
every family), and a blank patch is a token without content at the same place.

One score: with transform = "drop" the share of trials that change the class; with "shuffle" the share that keep it.
The thresholds are set on held-out clean images, and either statistic beyond its own makes an image suspicious. With
"both", each statistic is replaced by the share of the defender's clean images that it exceeds, and the score is the
greater of the two: above 1 - a exactly where one of the two lies beyond its own threshold at false-positive rate a.
So one threshold on the score is a pair of them. The price: a statistic says no more once it exceeds that of all clean
images.

What differs: only the paper's abstract, the start of its introduction and summaries of it could be read. What is done
to patches and in which direction each statistic points is theirs; that either one suffices, the number of trials, the
share dropped and the blank are assumed. The share: 0.3 is the least round one at which 10 independent draws all leave
a given patch in place in less than 5 % of cases (0.7 ** 10 is 2.8 %). The blank is black, as in the code of Naseer et
al. (https://arxiv.org/abs/2105.10497), where PatchDrop comes from; another public code sets the tokens to zero. The
changes are drawn once, for all images, so that an image's score does not depend on the others. A trigger's patch
would then be dropped in too many trials or too few for every image alike, so the draws are balanced: each patch is
dropped equally often, give or take one.
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
Orders = Int64[Tensor, "trials tokens"]
Kept = Bool[Tensor, "trials tokens"]
TRANSFORMS = {"drop": ("drop",), "shuffle": ("shuffle",), "both": ("drop", "shuffle")}
SEEN = 512
"""Images at a time where they are not changed."""
MEANING = {"drop": "class changes under drop", "shuffle": "class stays under shuffle"}


@hyperparameters
class PatchProcess:
    """The paper's table of hyper-parameters."""

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
        "what is done to the patches; both, as the defender does not know the kind of trigger",
        source="paper",
    )
    trials: int = param(10, "changed copies of an image for each transform", low=1)
    drop: float = param(0.3, "share of the patches that PatchDrop blanks, at least one", low=0, high=1)
    blank: Literal["black", "mean"] = param(
        "black", "a dropped patch's colour: black, or the clean images' mean", source="field"
    )

    def apply(self, suspect: Suspect) -> Screen:
        """Draw the changes, and see what they do to clean images."""
        clean, transforms = suspect.clean, TRANSFORMS[self.transform]
        grid = patch_grid(suspect)
        # The changes are drawn once, for all images.
        drawn = [changes(self, name, grid[0] * grid[1], suspect.generator) for name in transforms]
        order, kept = (torch.cat(parts).to(clean.device) for parts in zip(*drawn, strict=True))
        blank = mean_colour(clean) * (self.blank == "mean")
        score = PatchScore(suspect.model, transforms, PatchChange(grid, order, kept, blank))
        # Clean images give each statistic its scale.
        with suspect.computing():
            found = torch.cat([score.statistics(clean.images(rows)) for rows in clean.rows(SEEN)])
        report = {f"{MEANING[name]}, clean images": found[:, i].mean().item() for i, name in enumerate(transforms)}
        return Screen(replace(score, clean=found.sort(0).values) if len(transforms) > 1 else score, report=report)


def changes(settings: PatchProcess, transform: str, tokens: int, generator: Generator) -> tuple[Orders, Kept]:
    """For each trial, which patch comes where and which places are not blanked."""
    trials = settings.trials
    if transform == "shuffle":
        order = torch.rand(trials, tokens, generator=generator).argsort(1)
        return order, torch.ones_like(order, dtype=torch.bool)
    dropped = balanced_draws(trials, tokens, max(1, round(settings.drop * tokens)), generator)
    return torch.arange(tokens).expand(trials, tokens), ~dropped


@dataclass(frozen=True)
class PatchChange:
    """Images to as many changed copies as there are trials.

    Attributes:
        grid: rows and columns of patches.
        order: for each trial, the patch that comes to each place.
        kept: for each trial, the places that are not blanked.
        blank: colour of the others.
    """

    grid: tuple[int, int]
    order: Orders
    kept: Kept
    blank: Float[Tensor, " c"]

    def __call__(self, images: Images) -> Float[Tensor, "copies c h w"]:
        """The copies of each image, image by image."""
        patches = to_patches(images, self.grid)[:, self.order].flatten(0, 1)
        kept = self.kept.repeat(len(images), 1)[..., None, None, None]
        return from_patches(torch.where(kept, patches, self.blank[:, None, None]), self.grid)


@dataclass(frozen=True)
class PatchScore:
    """The score: how the class of an image answers to the changes.

    Attributes:
        model: the suspect's.
        transforms: which of drop and shuffle; each has an equal share of the trials, in this order.
        change: of the patches, the same for every image.
        clean: the statistics of clean images, each sorted; None for a single statistic, taken as it is.
    """

    model: nn.Module
    transforms: tuple[str, ...]
    change: PatchChange
    clean: Float[Tensor, "n transforms"] | None = None

    def __call__(self, images: Images) -> Float[Tensor, " b"]:
        """In [0, 1]."""
        found = self.statistics(images)
        return found[:, 0] if self.clean is None else exceeded(found, self.clean).amax(1)

    @torch.no_grad()
    def statistics(self, images: Images) -> Float[Tensor, "b transforms"]:
        """The share of trials that change the class under drop, that keep it under shuffle."""
        own = torch.cat([self.model(some).argmax(1) for some in images.split(SEEN)])
        logits = logits_under(self.model, images, self.change, len(self.change.order))
        changed = label_changes(own, logits.argmax(2).unflatten(1, (len(self.transforms), -1)))
        return torch.stack(
            [1 - changed[:, i] if name == "shuffle" else changed[:, i] for i, name in enumerate(self.transforms)], 1
        )


def patch_grid(suspect: Suspect) -> tuple[int, int]:
    """Rows and columns of the patches that the suspect's model takes an image apart into.

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
    """Which tokens each trial draws: `each` of them at random, but none oftener than another by more than one.

    >>> balanced_draws(4, 6, 3, torch.Generator()).sum(0).tolist()
    [2, 2, 2, 2, 2, 2]
    """
    drawn = torch.zeros(trials, tokens, dtype=torch.bool)
    for trial in range(trials):
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
    """The images that patches make up: the inverse of `to_patches`."""
    return patches.unflatten(1, grid).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def label_changes(
    own: Int64[Tensor, " b"], classes: Int64[Tensor, "b transforms trials"]
) -> Float[Tensor, "b transforms"]:
    """The share of trials in which the class is not the image's own.

    >>> label_changes(torch.tensor([3]), torch.tensor([[[3, 1, 3, 3], [2, 1, 3, 2]]])).tolist()
    [[0.25, 0.75]]
    """
    return (classes != own[:, None, None]).float().mean(2)


def exceeded(
    found: Float[Tensor, "b transforms"], clean: Float[Tensor, "n transforms"]
) -> Float[Tensor, "b transforms"]:
    """The share of clean images whose statistic is less; `clean` is sorted.

    >>> exceeded(torch.tensor([[0.4], [0.5], [1.0]]), torch.tensor([[0.0], [0.4], [0.4], [0.6]])).T.tolist()
    [[0.25, 0.75, 1.0]]
    """
    return torch.searchsorted(clean.T.contiguous(), found.T.contiguous()).T / len(clean)


def mean_colour(clean: ImageSet) -> Float[Tensor, " c"]:
    """Of all pixels of the clean images."""
    return torch.cat([clean.images(rows).mean((2, 3)) for rows in clean.rows(SEEN)]).mean(0)
