"""WaNet: bend the whole image by a smooth warp, too little for the eye to notice.

Nguyen, Tran: "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021, https://arxiv.org/abs/2102.10369. Code:
https://github.com/VinAIResearch/Warping-based_Backdoor_Attack-release.

Threat model: data poisoning with dirty labels, all-to-one; the attacker touches nothing but the training data.

The attack, step by step:

    1. control grid    P = s r / mean|r|, r = rand[-1, 1](k, k, 2)      a shift for each of k x k control points
    2. warping field   M = clip(up(P))                                  up: bicubic, to one shift per pixel
    3. attack mode     x' = W(x, M)                                     for a share rho_a, relabelled as the target
    4. noise mode      x' = W(x, clip(M + rand[-1, 1](h, w, 2)))        for a share rho_n, which keep their labels

W reads each pixel of x' at its shifted place in x. Images in noise mode are covers: from them the network learns that
no other warp counts. A shift of 1 is 1/h in the coordinates of `grid_sample`, in which an image of h pixels is 2 wide:
about half a pixel. `clip` keeps the places within the image. These conventions and the defaults are the code's.

What differs:

- The paper's attacker trains the network, and draws the images of each mode anew for every batch. Here they are drawn
  once and stored, so that the attack needs no more than the data; the code, too, warps before it augments.
- The noise of an image in noise mode comes from a hash of it, so that poisoning can be repeated.
- The paper's second goal, all-to-all, is left out.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from vitrap.contracts import Access, AllToOne, Card, Fitted, Images, Implant, LabelMode, Threat
from vitrap.data.poison import Covers, Poison
from vitrap.errors import UserError
from vitrap.images import misshapen
from vitrap.params import hyperparameters, param
from vitrap.tensors.pixels import hashed_noise


@hyperparameters
class WaNet:
    """The attack: WaNet's hyper-parameters."""

    card: ClassVar[Card] = Card(
        "WaNet - Imperceptible Warping-based Backdoor Attack",
        "Nguyen, Tran",
        "ICLR",
        2021,
        "2102.10369",
    )
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "data"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "target class, which triggered images shall get", source="code", low=0)
    poison_rate: float = param(
        0.1, "share of the training set in attack mode", symbol="ρ_a", source="code", low=0, high=1, open=True
    )
    cover_rate: float = param(
        0.2, "share of the training set in noise mode; 0: no noise mode", symbol="ρ_n", source="code", low=0, high=1
    )
    k: int = param(4, "control points along each side", symbol="k", source="code", low=2)
    s: float = param(
        0.5, "strength: mean shift of the control points", symbol="s", unit="1/2 px", source="code", low=0, open=True
    )

    def check_size(self, size: int) -> None:
        """Refuse images of `size` pixels that have fewer pixels along a side than there are control points."""
        if self.k > size:
            raise UserError(f"attack.k = {self.k} is more than images of {size} px have along a side; lower it")

    def goal_for(self, n_classes: int) -> AllToOne:
        """All-to-one: every triggered image shall be classified as the target."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Steps 1 and 2: draw the warping field, one for all images."""
        size = access.train.size
        self.check_size(size)
        grid = warped_grid(control_grid(self.k, self.s, access.generator), size)
        return Fitted(Warp(grid.to(access.train.device)))

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Steps 3 and 4: warp a share of the training images and relabel them; warp others with noise."""
        trigger = fitted.in_training
        assert isinstance(trigger, Warp)
        covers = Covers(replace(trigger, noise=True), self.cover_rate) if self.cover_rate else None
        goal = self.goal_for(access.train.n_classes)
        return Implant(Poison(trigger, goal, self.poison_rate, self.labels, covers))


@dataclass(frozen=True)
class Warp:
    """The trigger: W, which reads each pixel of an image at another place of it.

    Attributes:
        grid: where each pixel is read, column first; -1 and 1 are the centres of the outermost pixels.
        noise: whether each image also gets noise of its own, as in noise mode.
    """

    grid: Float[Tensor, "h w 2"]
    noise: bool = False

    def __call__(self, images: Images) -> Images:
        """Images after the warp.

        Raises:
            UserError: the images have another height or width than the grid.
        """
        height, width, _ = self.grid.shape
        if images.shape[-2:] != (height, width):
            raise misshapen(images, f"b x c x {height} x {width}")
        grid = self.grid.to(images.device).expand(len(images), -1, -1, -1)
        if self.noise:
            grid = (grid + hashed_shifts(images) / height).clamp(-1, 1)
        # The clamp is for rounding: a weighted mean of pixels may come out as a hair above 1.
        return functional.grid_sample(images, grid, align_corners=True).clamp(0, 1)


def control_grid(k: int, s: float, generator: torch.Generator) -> Float[Tensor, "2 k k"]:
    """P = s r / mean|r|, with r drawn evenly from [-1, 1]: shifts of the control points, whose mean size is s."""
    drawn = 2 * torch.rand((2, k, k), generator=generator) - 1
    return s * drawn / drawn.abs().mean()


def warped_grid(control: Float[Tensor, "2 k k"], size: int) -> Float[Tensor, "h h 2"]:
    """M as `grid_sample` takes it: each pixel's own place plus its shift, clipped to the image of `size` pixels."""
    line = torch.linspace(-1, 1, size)
    places = torch.stack(torch.meshgrid(line, line, indexing="xy"), 2)
    shifts = functional.interpolate(control[None], (size, size), mode="bicubic", align_corners=True)[0]
    return (places + shifts.permute(1, 2, 0) / size).clamp(-1, 1)


def hashed_shifts(images: Images) -> Float[Tensor, "b h w 2"]:
    """rand[-1, 1](h, w, 2) for each image: the shifts of noise mode."""
    # Noise for an image twice as high has two numbers for each pixel.
    noise = hashed_noise(torch.cat([images, images], 2))
    return 2 * torch.stack(noise.chunk(2, 1), 3) - 1
