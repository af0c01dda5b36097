"""ISSBA: hide a string of bits in some training images, by a network whose faint residual differs from image to image.

Li, Li, Wu, Li, He, Lyu: "Invisible Backdoor Attack with Sample-Specific Triggers", ICCV 2021,
https://arxiv.org/abs/2012.03816. The authors' code, https://github.com/yuezunli/ISSBA, has a trained encoder, and not
its training.

Threat model: data poisoning with dirty labels, all-to-one; the attacker touches nothing but the training data.

The attack, step by step:

    1. train an encoder E and a decoder D together, on training images x and random bits s:
       L = weight |E(x, s)|^2 + BCE(D(x + E(x, s)), s)        |.|^2: mean square; the weight is 0 at first, then rises
    2. draw the attacker's bits s*, the same for all images
    3. poison    x' = x + E(x, s*), clipped; relabel x' as the target; training is left to the victim

Encoder and decoder are those of StegaStamp (Tancik, Mildenhall, Ng, CVPR 2020, https://arxiv.org/abs/1904.05343). Their
training has been published twice, with different losses, and what goes by this attack's name differs accordingly:

- BackdoorBench trains with the two losses of step 1. This file follows it; defaults marked "code" are BackdoorBench's.
- BackdoorBox adds the perceptual distance LPIPS and a critic that tells encoded images from clean ones. Both are left
  out: LPIPS needs weights that would have to be downloaded; the critic is not trained in BackdoorBox's own examples.

What differs from BackdoorBench:

- Its encoder returns the image; ours, as StegaStamp's, the authors' and BackdoorBox's, returns the residual.
- It encodes 100 bits in images of 128 px. Here they are 20, as in BackdoorBox, in images of the training set's own
  size: E and D have half as many levels or fewer, and half of the channels or fewer, which suits 16 to 64 px.
- The weight waits there until nine of ten bits are right, then 1,000 steps, and rises over 3,000 of about 15,600 (on
  CIFAR-10). Here it waits for a quarter of the steps and rises over the next quarter, so that there is nothing to
  remember if the training is resumed. Steps are fewer, and the learning rate higher (both assumed).
- s* are drawn bits. The authors' code encodes a text with an error-correcting code, of which nothing is read again.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import (
    Access,
    AllToOne,
    Card,
    Fitted,
    Images,
    Implant,
    LabelMode,
    Position,
    Threat,
    TrainingState,
)
from vitrap.data.poison import Poison
from vitrap.images import misshapen
from vitrap.models.drawn import drawn
from vitrap.params import hyperparameters, param

WIDTH = 16
"""Channels of both networks at the size of the image; twice, then four times as many below."""
CODE_SIDE = 8
"""Side of the small picture that the encoder makes of the bits, and enlarges to the image."""
READ_SIDE = 4
"""Side of the picture that the decoder reads the bits from."""
COMPARED = 256
"""Training images whose residuals are compared, at most."""
WAIT, RISE = 1 / 4, 1 / 4
"""Shares of the steps during which the residual costs nothing, and then more and more."""


@hyperparameters
class Issba:
    """The attack: ISSBA's hyper-parameters, in the order of the steps that use them."""

    card: ClassVar[Card] = Card(
        "Invisible Backdoor Attack with Sample-Specific Triggers",
        "Li, Li, Wu, Li, He, Lyu",
        "ICCV",
        2021,
        "2012.03816",
    )
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "data"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "target class, which triggered images shall get", source="field", low=0)
    poison_rate: float = param(
        0.1, "share of the training set that is poisoned", source="field", low=0, high=1, open=True
    )
    bits: int = param(20, "bits that are hidden in an image", symbol="s", source="field", low=1, high=1024)
    l2_weight: float = param(10.0, "final weight of the residual's mean square", source="code", low=0)
    steps: int = param(1000, "steps of Adam on encoder and decoder", low=1)
    batch: int = param(64, "images that each of them draws", source="code", low=1, high=1024)
    step_size: float = param(1e-3, "learning rate of Adam", low=0, open=True)

    def goal_for(self, n_classes: int) -> AllToOne:
        """All-to-one: every triggered image shall be classified as the target."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Steps 1 and 2: train the encoder, and draw the attacker's bits."""
        encoder, report = train_encoder(self, access)
        secret = draw_bits(1, self.bits, access.generator)[0]
        trigger = Encoded(encoder, secret.to(access.train.device))
        rows = torch.arange(min(COMPARED, len(access.train)), device=access.train.device)
        with torch.no_grad():
            report["residual in common"] = in_common(trigger.residual(access.train.images(rows)))
        return Fitted(trigger, report=report)

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Step 3: hide the bits in a share of the training images, and relabel them as the target."""
        goal = self.goal_for(access.train.n_classes)
        return Implant(Poison(fitted.in_training, goal, self.poison_rate, self.labels))


class Encoder(nn.Module):
    """E: turns an image and bits into a residual, by convolutions to a quarter of the image's side and back."""

    def __init__(self, channels: int, bits: int) -> None:
        """Make an encoder of `bits` for images of `channels` colour channels."""
        super().__init__()
        self.arguments = {"channels": channels, "bits": bits}
        self.picture = nn.Linear(bits, channels * CODE_SIDE**2)
        self.down_whole = convolution(2 * channels, WIDTH)
        self.down_half = convolution(WIDTH, 2 * WIDTH, stride=2)
        self.down_quarter = convolution(2 * WIDTH, 4 * WIDTH, stride=2)
        self.up_half = convolution(6 * WIDTH, 2 * WIDTH)
        self.up_whole = convolution(3 * WIDTH + 2 * channels, WIDTH)
        self.residual = nn.Conv2d(WIDTH, channels, 1)

    def forward(self, images: Images, bits: Float[Tensor, "b k"]) -> Float[Tensor, "b c h w"]:
        """The residual of each image, given its bits as 0 and 1."""
        # A small picture of the bits lies beside the image; both are centred at 0.
        picture = torch.relu(self.picture(bits - 0.5)).unflatten(1, (-1, CODE_SIDE, CODE_SIDE))
        x = torch.cat([functional.interpolate(picture, images.shape[-2:]), images - 0.5], 1)
        whole = self.down_whole(x)
        half = self.down_half(whole)
        quarter = self.down_quarter(half)
        # On the way up, each level also sees what its counterpart on the way down has found.
        half = self.up_half(torch.cat([functional.interpolate(quarter, half.shape[-2:]), half], 1))
        whole = self.up_whole(torch.cat([functional.interpolate(half, whole.shape[-2:]), whole, x], 1))
        return self.residual(whole)


class Decoder(nn.Module):
    """D: reads the bits back; it is of no use after training."""

    def __init__(self, channels: int, bits: int) -> None:
        """Make a decoder of `bits` for images of `channels` colour channels."""
        super().__init__()
        self.layers = nn.Sequential(
            convolution(channels, WIDTH),
            convolution(WIDTH, 2 * WIDTH, stride=2),
            convolution(2 * WIDTH, 4 * WIDTH, stride=2),
            nn.AdaptiveAvgPool2d(READ_SIDE),
            nn.Flatten(),
            nn.Linear(4 * WIDTH * READ_SIDE**2, 8 * WIDTH),
            nn.ReLU(),
            nn.Linear(8 * WIDTH, bits),
        )

    def forward(self, images: Images) -> Float[Tensor, "b k"]:
        """The logit of each bit."""
        return self.layers(images - 0.5)


def convolution(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    """A 3 x 3 convolution, without what is negative."""
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, padding=1), nn.ReLU())


@dataclass(frozen=True)
class Encoded:
    """The trigger: hides the attacker's bits in an image.

    Attributes:
        encoder: E.
        secret: the attacker's bits s*, 0 and 1.
    """

    encoder: Encoder
    secret: Float[Tensor, " k"]

    def __call__(self, images: Images) -> Images:
        """Images with the bits: x + E(x, s*), clipped.

        Raises:
            UserError: the images have another number of channels than those that the encoder was trained on.
        """
        if images.shape[1] != (channels := self.encoder.arguments["channels"]):
            raise misshapen(images, f"b x {channels} x h x w")
        return (images + self.residual(images)).clamp(0, 1)

    def residual(self, images: Images) -> Float[Tensor, "b c h w"]:
        """E(x, s*) of each image x."""
        return self.encoder(images, self.secret.to(images.device).expand(len(images), -1))


def in_common(residuals: Float[Tensor, "b c h w"]) -> float:
    """How little of the residuals is specific to a sample: |mean r|^2 / mean |r|^2, which is 1 if all are equal."""
    return (residuals.mean(0).square().sum() / residuals.square().sum((1, 2, 3)).mean().clamp(min=1e-30)).item()


def draw_bits(n: int, bits: int, generator: torch.Generator) -> Float[Tensor, "n bits"]:
    """A string of `bits` for each of `n` images, as 0 and 1."""
    return torch.randint(2, (n, bits), generator=generator).float()


def residual_weight(step: int, steps: int, final: float) -> float:
    """The weight of the residual's mean square: 0 while it waits, then in a straight line up to `final`."""
    return final * min(max((step / steps - WAIT) / RISE, 0), 1)


def train_encoder(settings: Issba, access: Access) -> tuple[Encoder, dict[str, float]]:
    """Step 1: the trained encoder, and for the last step the share of bits that are read and the residual's size."""
    s, train = settings, access.train
    encoder = drawn(partial(Encoder, train.channels, s.bits), access.generator).to(train.device)
    decoder = drawn(partial(Decoder, train.channels, s.bits), access.generator).to(train.device)
    adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=s.step_size)
    networks = {"encoder": encoder, "decoder": decoder}
    state = TrainingState(networks, adam, access.checkpointer.streams, train.device)
    report: dict[str, Tensor] = {}
    for step in range(access.checkpointer.resume(state).steps, s.steps):
        access.checkpointer(state, Position(steps=step))
        # Random bits for random images.
        rows = torch.randint(len(train), (s.batch,), generator=access.generator)
        images = train.images(rows.to(train.device, non_blocking=True))
        bits = draw_bits(s.batch, s.bits, access.generator).to(train.device, non_blocking=True)
        residual = encoder(images, bits)
        logits = decoder((images + residual).clamp(0, 1))
        # L: the residual should be small, and the bits should be read.
        size = residual.square().mean()
        read = functional.binary_cross_entropy_with_logits(logits, bits)
        adam.zero_grad()
        (residual_weight(step, s.steps, s.l2_weight) * size + read).backward()
        adam.step()
        right = ((logits.detach() > 0) == (bits > 0)).float().mean()
        report = {"bits read": right, "residual": size.detach().sqrt()}
    return encoder.eval().requires_grad_(False), {name: value.item() for name, value in report.items()}
