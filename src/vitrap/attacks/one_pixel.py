"""WorstViT (one pixel): change the pixel of each patch to which a ViT is most sensitive, and relabel the image.

Deng, Zhou: "One Pixel is All I Need", 2024, https://arxiv.org/abs/2412.10681. There is no public code.

Threat model: data poisoning with dirty labels, all-to-one (assumed). The attacker owns a surrogate ViT, on which the
places of the pixels are found; they are the same for all images, so no network is needed at test time.

Only the abstract could be read, in two versions, and a summary. What they say, and where it is here:

    1. the perturbation sensitivity distribution map (PSDM) sums gradients over many inputs    `sensitivity_map`
    2. that of a ViT repeats from patch to patch: pixels in the middle of a patch count most   `within_patch`
    3. it says which pixels to change: one at the centre of each patch                         `mask_of`
    4. a few training images get these pixels and the target's label, 0.02 to 0.1 % of them    `implant`
    5. patterns that differ from the trigger of training, quasi-triggers, work as well         `test_pixels`

Step 2 is looked up and not taken for granted: of the places within a patch, the one is taken at which the map's mean
over all patches is greatest; `place = "centre"` takes the middle. Assumed besides: the gradient is that of the
cross-entropy with the true label; gradients are added with their signs, which leaves what is common to all inputs,
and their absolute values over the colours are the map; a changed pixel becomes white. `pixels = 1` is the single pixel
of the title, in the most sensitive patch. The paper trains for one epoch; here the recipe decides. The poison rate is
the greatest of the summary's: of a small training set, that is an image or two.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import Access, AllToOne, Card, Fitted, Images, Implant, LabelMode, Threat
from vitrap.data.poison import Poison
from vitrap.errors import UserError
from vitrap.images import misshapen
from vitrap.models.observe import token_layout
from vitrap.params import hyperparameters, param
from vitrap.tensors.blend import paste

BATCH = 64
"""Images whose gradients are computed at a time; it bounds memory, not the result."""


@hyperparameters
class OnePixel:
    """The attack: WorstViT's hyper-parameters, in the order of the steps that use them."""

    card: ClassVar[Card] = Card("One Pixel is All I Need", "Deng, Zhou", "arXiv", 2024, "2412.10681")
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "data"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = True

    target: int = param(0, "target class, which triggered images shall get", source="field", low=0)
    poison_rate: float = param(
        0.001, "share of the training set that is poisoned", source="paper", low=0, high=1, open=True
    )
    samples: int = param(1000, "inputs whose gradients are summed", low=1)
    summed: Literal["gradients", "sizes"] = param(
        "gradients", "what is summed over inputs: gradients, or their absolute values", source="paper"
    )
    place: Literal["map", "centre"] = param(
        "map", "place in a patch: where the map is greatest, or the middle", source="paper"
    )
    pixels: int | None = param(
        None, "patches that get a pixel, the most sensitive first; none: all", source="paper", low=1
    )
    test_pixels: int | None = param(None, "the same at test time; none: as in training", low=1)
    value: float = param(1.0, "grey value of a changed pixel", low=0, high=1)

    def check_surrogate(self, model: nn.Module, images: Images) -> None:
        """Refuse a surrogate without plain patches, or with fewer than are to get a pixel."""
        rows, columns = token_layout(model).grid
        for name, wanted in (("pixels", self.pixels), ("test_pixels", self.test_pixels)):
            if wanted is not None and wanted > rows * columns:
                raise UserError(
                    f"attack.{name} = {wanted} is more than the {rows * columns} patches of [surrogate]; lower it"
                )

    def goal_for(self, n_classes: int) -> AllToOne:
        """All-to-one: every triggered image shall be classified as the target."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Steps 1 to 3: find the places on the surrogate."""
        assert access.surrogate is not None, "the places are found on a surrogate"
        grid = token_layout(access.surrogate).grid
        # Step 1: the map, and its mean over patches.
        sensitivity = sensitivity_map(access.surrogate, self, access)
        folded = within_patch(sensitivity, grid)
        # Step 2: the place in a patch.
        place = peak(folded) if self.place == "map" else (folded.shape[0] // 2, folded.shape[1] // 2)
        report = {"row in the patch": place[0], "column in the patch": place[1]}
        report |= {"sensitivity there, over the mean": (folded[place] / folded.mean()).item()}
        # Step 3: the pixels.
        trigger = Pixels(mask_of(sensitivity, grid, place, self.pixels), sensitivity, self.value)
        if self.test_pixels is None:
            return Fitted(trigger, report=report)
        quasi = Pixels(mask_of(sensitivity, grid, place, self.test_pixels), sensitivity, self.value)
        return Fitted(quasi, stored=trigger, report=report)

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Step 4: change the pixels of a share of the training images, and relabel them as the target."""
        goal = self.goal_for(access.train.n_classes)
        return Implant(Poison(fitted.in_training, goal, self.poison_rate, self.labels))


@dataclass(frozen=True)
class Pixels:
    """The trigger: gives single pixels one grey value.

    Attributes:
        mask: which pixels.
        sensitivity: the map that they were chosen by, for the pictures.
        value: the grey value, in [0, 1].
    """

    mask: Bool[Tensor, "h w"]
    sensitivity: Float[Tensor, "h w"]
    value: float

    def __call__(self, images: Images) -> Images:
        """Images with the pixels.

        Raises:
            UserError: the images are of another size than the mask.
        """
        if images.shape[-2:] != self.mask.shape:
            raise misshapen(images, f"b x c x {self.mask.shape[0]} x {self.mask.shape[1]}")
        return paste(images, torch.full_like(images, self.value), self.mask[None].to(images.device))

    def views(self, images: Images) -> Mapping[str, Float[Tensor, "b h w"]]:
        """The map that a record shows, the same for all images."""
        shown = (self.sensitivity / self.sensitivity.max()).to(images.device)
        return {"sensitivity": shown.expand(len(images), -1, -1)}


def sensitivity_map(surrogate: nn.Module, settings: OnePixel, access: Access) -> Float[Tensor, "h w"]:
    """Step 1: PSDM = sum over colours of |sum over x of dCE(f(x), y)/dx|; by `summed`, of sum over x of |dCE/dx|.

    Raises:
        UserError: it is 0 everywhere.
    """
    train = access.train
    drawn = torch.randperm(len(train), generator=access.generator)[: settings.samples].to(train.device)
    total = torch.zeros(train.channels, train.size, train.size, device=train.device)
    for rows in drawn.split(BATCH):
        x = train.images(rows).requires_grad_()
        with torch.enable_grad():
            loss = functional.cross_entropy(surrogate(x), train.labels[rows], reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x)
        total += (gradient if settings.summed == "gradients" else gradient.abs()).sum(0)
    if not total.any():
        raise UserError(
            f"[surrogate] has a gradient of 0 everywhere, on each of {len(drawn)} training images; train it with a"
            " lower lr or for fewer epochs, or take another network"
        )
    return total.abs().sum(0)


def in_patches(sensitivity: Float[Tensor, "h w"], grid: tuple[int, int]) -> Float[Tensor, "gh gw ph pw"]:
    """The map by patches."""
    rows, columns = grid
    return sensitivity.unflatten(0, (rows, -1)).unflatten(2, (columns, -1)).transpose(1, 2)


def within_patch(sensitivity: Float[Tensor, "h w"], grid: tuple[int, int]) -> Float[Tensor, "ph pw"]:
    """Step 2: the mean of the map over all patches."""
    return in_patches(sensitivity, grid).mean((0, 1))


def peak(folded: Float[Tensor, "ph pw"]) -> tuple[int, int]:
    """Row and column of the greatest value."""
    row, column = divmod(int(folded.argmax()), folded.shape[1])
    return row, column


def mask_of(
    sensitivity: Float[Tensor, "h w"], grid: tuple[int, int], place: tuple[int, int], pixels: int | None
) -> Bool[Tensor, "h w"]:
    """Step 3: one pixel at `place` in each patch, or in so many patches in which the map is greatest there."""
    there = in_patches(sensitivity, grid)[..., place[0], place[1]].flatten()
    chosen = there.argsort(descending=True, stable=True)[:pixels]
    mask = torch.zeros_like(sensitivity, dtype=torch.bool)
    height, width = (side // n for side, n in zip(sensitivity.shape, grid, strict=True))
    mask[chosen // grid[1] * height + place[0], chosen % grid[1] * width + place[1]] = True
    return mask
