"""FTrojan: raise a middle and a high frequency of the colours of some training images, and relabel them.

Wang, Yao, Xu, An, Tong, Wang: "An Invisible Black-Box Backdoor Attack Through Frequency Domain", ECCV 2022,
https://arxiv.org/abs/2111.10991. Code: https://github.com/FTrojanAttack/FTrojan.

Threat model: data poisoning with dirty labels, all-to-one; the attacker touches nothing but the training data.

The trigger of an image x, step by step:

    1. colours      RGB to YUV: Y is the brightness, U and V are the colours
    2. frequencies  cut each channel into square blocks; discrete cosine transform (DCT) of each block
    3. trigger      add the magnitude to the coefficients (15, 15) and (31, 31) of each block of U and V
    4. pixels       inverse transform of the blocks
    5. colours      YUV to RGB, clipped

A share of the training images gets the trigger and the target's label; training is left to the victim.

Steps 1 to 5 are linear, up to clipping. So they add the same pattern to every image: steps 4 and 5 of what step 3 adds.
`fit` computes this pattern once.

Defaults marked "code" are those of the authors' code. YUV is what that code takes for it, OpenCV's YCrCb. What differs
from the code: it truncates pixels to 8 bits after steps 4 and 5, so that a value below 0 or above 255 wraps around;
here pixels are clipped, and rounded when they are stored. It has images no smaller than a block; here, a smaller image
is one block of its own size, with the frequencies at the same share of the side: (7, 7) and (15, 15) at 16 px.
"""

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vitrap.contracts import Access, AllToOne, Card, Fitted, Implant, LabelMode, Threat
from vitrap.data.added import Added
from vitrap.data.poison import Poison
from vitrap.errors import UserError
from vitrap.params import hyperparameters, param

RED, GREEN, BLUE = 0.299, 0.587, 0.114
"""Weights of the primaries in the brightness Y."""
PER_RED, PER_BLUE = 0.713, 0.564
"""U = 0.713 (R - Y) and V = 0.564 (B - Y), as in OpenCV's YCrCb."""


@hyperparameters
class FTrojan:
    """The attack: FTrojan's hyper-parameters."""

    card: ClassVar[Card] = Card(
        "An Invisible Black-Box Backdoor Attack Through Frequency Domain",
        "Wang, Yao, Xu, An, Tong, Wang",
        "ECCV",
        2022,
        "2111.10991",
    )
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "data"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "target class, which triggered images shall get", source="field", low=0)
    poison_rate: float = param(
        0.05, "share of the training set that is poisoned", source="code", low=0, high=1, open=True
    )
    channels: Literal["uv", "yuv"] = param(
        "uv", "the channels that get the trigger: colours alone, or the brightness, too", source="code"
    )
    window: int = param(32, "side of a block", unit="px", source="code", low=1)
    middle: int = param(15, "the middle frequency, in rows and columns of a block's coefficients", source="code", low=0)
    high: int = param(31, "the high frequency, in rows and columns of a block's coefficients", source="code", low=0)
    magnitude: float = param(
        30.0, "what each coefficient is raised by", unit="1/255", source="code", low=0, high=1e4, open="low"
    )

    def check_settings(self) -> None:
        """Refuse frequencies that a block does not have."""
        if (greatest := max(self.middle, self.high)) >= self.window:
            raise UserError(
                f"window = {self.window} has the frequencies 0 to {self.window - 1}, and {greatest} is not among them;"
                " lower middle or high, or raise window"
            )

    def check_size(self, size: int) -> None:
        """Refuse images of `size` pixels that blocks do not tile."""
        if size % min(self.window, size):
            raise UserError(
                f"attack.window = {self.window} does not tile images of {size} px; choose a divisor of {size}"
            )

    def goal_for(self, n_classes: int) -> AllToOne:
        """All-to-one: every triggered image shall be classified as the target."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Compute the pattern that the steps add to any image; nothing is optimised."""
        train = access.train
        self.check_size(train.size)
        # Step 3: what is added to a block's coefficients. Step 4: the same in pixels, block beside block.
        block = block_of_waves(self, min(self.window, train.size))
        blocks = train.size // len(block)
        wave = block.repeat(blocks, blocks)
        # Step 5: a change of U and V, and perhaps Y, as a change of RGB.
        brightness = wave if self.channels == "yuv" else torch.zeros_like(wave)
        if train.channels == 1:
            if self.channels == "uv":
                raise UserError("attack.channels = 'uv' are colours, and the images are grey; set it to 'yuv'")
            pattern = brightness[None]
        else:
            pattern = yuv_to_rgb(brightness, wave, wave)
        return Fitted(Added(pattern.to(train.device)))

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Put the trigger on a share of the training images, and relabel them as the target."""
        goal = self.goal_for(access.train.n_classes)
        return Implant(Poison(fitted.in_training, goal, self.poison_rate, self.labels))


def block_of_waves(settings: FTrojan, side: int) -> Float[Tensor, "side side"]:
    """What steps 3 and 4 add to a block: the inverse DCT of the magnitude at both frequencies, and 0 elsewhere."""
    coefficients = torch.zeros(side, side)
    for frequency in (settings.middle, settings.high):
        # In a block smaller than the window, the same share of its side.
        k = max(0, (frequency + 1) * side // settings.window - 1)
        coefficients[k, k] += settings.magnitude / 255
    transform = dct_matrix(side)
    return transform.T @ coefficients @ transform


def dct_matrix(n: int) -> Float[Tensor, "n n"]:
    """The orthonormal DCT: C_ku = sqrt(2/n) cos(pi (2u + 1) k / 2n), and C_0u = sqrt(1/n).

    C x C^T are the coefficients of a block x, and C^T y C is the block with the coefficients y.
    """
    k = torch.arange(n)[:, None]
    u = torch.arange(n)[None, :]
    waves = math.sqrt(2 / n) * torch.cos(math.pi * (2 * u + 1) * k / (2 * n))
    waves[0] = math.sqrt(1 / n)
    return waves


def yuv_to_rgb(y: Float[Tensor, "h w"], u: Float[Tensor, "h w"], v: Float[Tensor, "h w"]) -> Float[Tensor, "3 h w"]:
    """R = Y + U / 0.713, B = Y + V / 0.564, and G from Y = 0.299 R + 0.587 G + 0.114 B."""
    red, blue = y + u / PER_RED, y + v / PER_BLUE
    green = (y - RED * red - BLUE * blue) / GREEN
    return torch.stack([red, green, blue])
