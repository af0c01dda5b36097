"""Input-Aware: train a network that gives each image a trigger of its own, of no use on any other image.

Nguyen, Tran: "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020, https://arxiv.org/abs/2010.08138. Code:
https://github.com/VinAIResearch/input-aware-backdoor-attack-release.

Threat model: the attacker controls training; labels are dirty, all-to-one.

Two networks make the trigger of an image x: a generator g, which paints a pattern, and a mask network m, which says
where the pattern shows.

    trigger     B(x, x') = x + (g(x') - x) m(x')        x' = x: the image's own trigger
    diversity   L_div(f) = mean |x - x'| / (|f(x) - f(x')| + 1e-7)        |.|: root mean square; large where f is flat

The attack, step by step:

    1. train m first, alone, on lambda_norm mean max(0, m(x) - mask_density) + lambda_div L_div(m); then freeze it
    2. backdoor mode    x becomes B(x, x) for a share rho_b of the images, which are relabelled as the target
    3. cross mode       x becomes B(x, x') for a share rho_c, which keep their labels; x': another image
    4. train victim and g together on cross-entropy + lambda_div L_div(g)

The images of each mode are drawn anew for every batch, so nothing of the training set is poisoned as it is stored.
Images in cross mode are covers: from them the victim learns that the trigger of another image does not count. The
defaults are the code's, and so is the form of both losses.

What differs:

- Images in backdoor mode are not of the target class, unless a batch has no others left; the code takes any. In cross
  mode x' is another image of the batch; the code has a second one for it.
- L_div(g) compares pairs of training images that are drawn for it, as many as the batch has in backdoor mode. The code
  compares each image in backdoor mode with the x' of one in cross mode.
- g learns with the victim's optimiser and schedule, from a peak rate of its own; the code has Adam, in steps.
- m learns for a number of steps, so that a small set is no reason for a poor mask. The code passes 25 times over the
  set, which for its CIFAR-10 are 9,775 steps; its rate falls to a tenth after 10 and again after 20 passes, ours after
  the same shares of the steps.
- Both networks are those that the code has for MNIST, for images of any size. Groups of channels are normalised within
  an image, where the code normalises each channel over the batch: so the trigger is the same in training and at test
  time.
- Distances are those of images in [0, 1], as in the code for GTSRB; for CIFAR-10 it normalises images and patterns.
- The code also rotates images before they get their trigger, and has a second goal, all-to-all; both are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import (
    Access,
    AllToOne,
    Batch,
    Card,
    Criterion,
    ExtraModule,
    Fitted,
    Images,
    ImageSet,
    Implant,
    LabelMode,
    Objective,
    Position,
    Threat,
    TrainingState,
)
from vitrap.errors import UserError
from vitrap.images import misshapen
from vitrap.models.drawn import drawn
from vitrap.params import hyperparameters, param

WIDTH = 16
"""Channels of both networks at the size of the image; twice as many below."""
GROUPS = 4
"""Groups of channels that are normalised together."""
BETAS = (0.5, 0.9)
"""Adam's decay rates while m learns."""
FALLS = (10 / 25, 20 / 25)
"""Shares of m's steps after which its rate falls to a tenth."""


@hyperparameters
class InputAware:
    """The attack: Input-Aware's hyper-parameters, in the order of the steps that use them."""

    card: ClassVar[Card] = Card("Input-Aware Dynamic Backdoor Attack", "Nguyen, Tran", "NeurIPS", 2020, "2010.08138")
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "training"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "target class, which triggered images shall get", source="code", low=0)
    poison_rate: float = param(
        0.1, "share of each batch in backdoor mode", symbol="ρ_b", source="code", low=0, high=1, open=True
    )
    cover_rate: float = param(
        0.1, "share of each batch in cross mode; 0: no cross mode", symbol="ρ_c", source="code", low=0, high=1
    )
    mask_density: float = param(
        0.032, "value of the mask above which a pixel costs something", source="code", low=0, high=1
    )
    lambda_norm: float = param(100.0, "weight of that cost", symbol="λ_norm", source="code", low=0)
    lambda_div: float = param(
        1.0, "weight of the diversity of masks, and of patterns", symbol="λ_div", source="code", low=0
    )
    mask_steps: int = param(300, "steps of Adam on the mask network", low=1)
    mask_batch: int = param(64, "pairs of images that each of them draws", low=1, high=1024)
    mask_lr: float = param(0.01, "first learning rate of the mask network", source="code", low=0, open=True)
    lr: float = param(0.01, "peak learning rate of the generator", source="code", low=0, open=True)

    def check_settings(self) -> None:
        """Refuse shares that are more than a batch together."""
        if self.poison_rate + self.cover_rate > 1:
            raise UserError(
                f"poison_rate = {self.poison_rate:g} and cover_rate = {self.cover_rate:g} are more than all images;"
                " lower one of them"
            )

    def goal_for(self, n_classes: int) -> AllToOne:
        """All-to-one: every triggered image shall be classified as the target."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Step 1: train the mask network; the generator is still untrained."""
        if len(access.train) < 2:
            raise UserError("input_aware compares training images with each other, and there is one; give at least two")
        mask, report = train_mask(self, access)
        generator = drawn(partial(Painter, access.train.channels, access.train.channels), access.generator)
        return Fitted(Generated(generator.to(access.train.device).eval().requires_grad_(False), mask), report=report)

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Steps 2 to 4: put images of each batch into both modes, and train the victim and the generator together."""
        trigger = fitted.trigger
        assert isinstance(trigger, Generated)
        together = Together(self, trigger, access.train, access.generator)
        weights = {"diversity": self.lambda_div} if self.lambda_div else {}
        along = {"generator": ExtraModule(trigger.generator, self.lr)}
        return Implant(objective=Objective(together.terms, weights, prepare=together.prepare, along=along))


class Painter(nn.Module):
    """Both networks, g and m: convolutions down to a quarter of the image's side and back, to values in [0, 1]."""

    def __init__(self, channels: int, out: int) -> None:
        """Make a network from images of `channels` colour channels to `out` values for each pixel."""
        super().__init__()
        self.arguments = {"channels": channels, "out": out}
        upper, lower = WIDTH, 2 * WIDTH
        self.down = nn.ModuleList([two(channels, upper, upper), two(upper, lower, lower)])
        self.middle = convolution(lower, lower)
        self.up = nn.ModuleList([two(lower, lower, upper), convolution(upper, upper)])
        # Without this normalisation a mask can vanish for good: far from its threshold it passes no gradient.
        self.last = nn.Sequential(nn.Conv2d(upper, out, 3, padding=1), nn.GroupNorm(1, out))

    def forward(self, images: Images) -> Float[Tensor, "b out h w"]:
        """(tanh(y) + 1) / 2 of the last layer's output y, which is the logistic function of 2 y."""
        y, sizes = images, []
        for layers in self.down:
            y = layers(y)
            sizes.append(y.shape[-2:])
            y = functional.max_pool2d(y, 2, ceil_mode=True)
        y = self.middle(y)
        for layers, size in zip(self.up, reversed(sizes), strict=True):
            y = layers(functional.interpolate(y, size))
        return torch.sigmoid(2 * self.last(y))


def convolution(channels: int, out: int) -> nn.Sequential:
    """A 3 x 3 convolution, normalised, without what is negative."""
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(GROUPS, out), nn.ReLU())


def two(channels: int, between: int, out: int) -> nn.Sequential:
    """Two convolutions."""
    return nn.Sequential(convolution(channels, between), convolution(between, out))


def threshold(values: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
    """(tanh(20 v - 10) + 1) / 2: draws the mask's values towards 0 and 1."""
    return torch.sigmoid(40 * values - 20)


def put(images: Images, pattern: Images, mask: Float[Tensor, "b 1 h w"]) -> Images:
    """B(x, x') = x + (g(x') - x) m(x')."""
    return (images + (pattern - images) * mask).clamp(0, 1)


def diversity(x: Images, other: Images, of_x: Tensor, of_other: Tensor) -> Float[Tensor, ""]:
    """L_div(f) = mean |x - x'| / (|f(x) - f(x')| + 1e-7), given the images and what f makes of them."""
    return (distance(x, other) / (distance(of_x, of_other) + 1e-7)).mean()


def distance(one: Float[Tensor, "b c h w"], other: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """|x - x'|: the root mean square over the pixels; where they are equal, its gradient is 0."""
    return (one - other).float().square().mean((1, 2, 3)).clamp(min=1e-12).sqrt()


@dataclass(frozen=True)
class Generated:
    """The trigger: shows the generator's pattern of an image through the mask of that image.

    Attributes:
        generator: g, which paints the pattern.
        network: m before its threshold, which makes the mask.
    """

    generator: Painter
    network: Painter

    def __call__(self, images: Images) -> Images:
        """B(x, x).

        Raises:
            UserError: the images have another number of channels than those that the networks were trained on.
        """
        if images.shape[1] != (channels := self.generator.arguments["channels"]):
            raise misshapen(images, f"b x {channels} x h x w")
        return put(images, *self.parts(images))

    def parts(self, images: Images) -> tuple[Images, Float[Tensor, "b 1 h w"]]:
        """The pattern g(x) and the mask m(x) of each image."""
        return self.generator(images), threshold(self.network(images))

    def views(self, images: Images) -> Mapping[str, Float[Tensor, "b h w"]]:
        """For the pictures of a record: the pattern's mean over the colours, and the mask."""
        pattern, mask = self.parts(images)
        return {"pattern": pattern.mean(1), "mask": mask[:, 0]}


@dataclass(frozen=True)
class Together:
    """Trains the victim and the generator: makes the triggers of a batch, and computes the losses.

    Attributes:
        settings: the attack's hyper-parameters.
        trigger: has both networks.
        train: the training images, of which pairs are drawn for the diversity.
        random: the attacker's random stream, which draws them.
    """

    settings: InputAware
    trigger: Generated
    train: ImageSet
    random: torch.Generator

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Steps 2 and 3: draw the images of both modes, and put the triggers on them.

        Args:
            batch: images without triggers, with their true labels.
            generator: the random stream, on the CPU.
        """
        s, x, n = self.settings, batch.images, len(batch.images)
        # Backdoor mode: a random order in which images of the target come last.
        order = (torch.rand(n, generator=generator).to(x.device) + (batch.labels == s.target)).argsort()
        poison_at, rest_at = order.tensor_split([max(1, round(s.poison_rate * n))])
        # Cross mode: any of the rest; x' lies a random number of places further on in the batch.
        rest_at = rest_at[torch.randperm(len(rest_at), generator=generator).to(x.device)]
        cover_at = rest_at[: round(s.cover_rate * n)]
        places = int(torch.randint(1, max(n, 2), (), generator=generator))
        # B(x, x) and B(x, x').
        rows = torch.cat([poison_at, cover_at])
        sources = torch.cat([poison_at, (cover_at + places) % n])
        images = x.index_copy(0, rows, put(x[rows], *self.trigger.parts(x[sources])))
        labels = batch.labels.index_fill(0, poison_at, s.target)
        return replace(batch, images=images, labels=labels, poison_at=poison_at, rest_at=rest_at, cover_at=cover_at)

    def terms(self, model: nn.Module, batch: Batch, criterion: Criterion) -> Mapping[str, Float[Tensor, ""]]:
        """Step 4: cross-entropy of the batch, and L_div(g)."""
        terms = {"cross_entropy": criterion(model(batch.images), batch.labels)}
        if self.settings.lambda_div and (pairs := len(batch.poison_at)):
            x, other = draw_pairs(self.train, pairs, self.random)
            of_x, of_other = self.trigger.generator(torch.cat([x, other])).chunk(2)
            terms["diversity"] = diversity(x, other, of_x, of_other)
        return terms


def draw_pairs(train: ImageSet, pairs: int, generator: torch.Generator) -> tuple[Images, Images]:
    """Pairs of different training images."""
    first = torch.randint(len(train), (pairs,), generator=generator)
    further = torch.randint(1, len(train), (pairs,), generator=generator)
    rows = torch.cat([first, (first + further) % len(train)]).to(train.device, non_blocking=True)
    x, other = train.images(rows).chunk(2)
    return x, other


def train_mask(settings: InputAware, access: Access) -> tuple[Painter, dict[str, float]]:
    """Step 1: the mask network, frozen, and how it came out: the mean of its masks, and their diversity loss."""
    s, train = settings, access.train
    network = drawn(partial(Painter, train.channels, 1), access.generator).to(train.device)
    adam = torch.optim.Adam(network.parameters(), lr=s.mask_lr, betas=BETAS)
    state = TrainingState({"mask": network}, adam, access.checkpointer.streams, train.device)
    report: dict[str, Tensor] = {}
    for step in range(access.checkpointer.resume(state).steps, s.mask_steps):
        access.checkpointer(state, Position(steps=step))
        for group in adam.param_groups:
            group["lr"] = s.mask_lr * 0.1 ** sum(step >= share * s.mask_steps for share in FALLS)
        x, other = draw_pairs(train, s.mask_batch, access.generator)
        masks = threshold(network(torch.cat([x, other])))
        cost = functional.relu(masks - s.mask_density).mean()
        differ = diversity(x, other, *masks.chunk(2))
        adam.zero_grad()
        (s.lambda_norm * cost + s.lambda_div * differ).backward()
        adam.step()
        report = {"mask density": masks.detach().mean(), "last mask diversity loss": differ.detach()}
    return network.eval().requires_grad_(False), {name: value.item() for name, value in report.items()}
