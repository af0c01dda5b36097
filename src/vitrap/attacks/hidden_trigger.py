"""Hidden trigger: make images of the target class that a network takes for patched ones of another class.

Saha, Subramanya, Pirsiavash: "Hidden Trigger Backdoor Attacks", AAAI 2020, https://arxiv.org/abs/1910.00033; and on
ViTs Subramanya, Saha, Koohpayegani, Tejankar, Pirsiavash: "Backdoor Attacks on Vision Transformers", 2022,
https://arxiv.org/abs/2206.08477. Code: https://github.com/UMBCvision/Hidden-Trigger-Backdoor-Attacks and
https://github.com/UCDvision/backdoor_transformer.

Threat model: data poisoning with clean labels, source-to-target. The attacker touches nothing but images of the target
class, and knows the victim's features f: the victim trains a new head on a public network, which is the surrogate. The
patch is in no training image, and is secret until the test.

The attack, step by step:

    1. patch     a few random colours, at a random place of each image
    2. draw a share of the training images t of the target class, and as many of the source class; s: these, patched
    3. pair      each image z, at first t, with the s whose features are nearest: the closest pair first, each s once
    4. descend   z <- P(z - lr d/dz |f(z) - f(s)|^2)    P: within eps of t, and in [0, 1]
    5. repeat 3 and 4, a batch of images at a time, until all are near or the steps are done
    6. poison    z takes the place of t and keeps its label; training is left to the victim
    7. at test time put the patch on images of the source class

z looks like t, and a head on f that learns z as the target takes patched images of the source class for it, too. A
victim with features of its own has no reason to: give it the surrogate's by `model.weights` and `model.linear_probe`,
which the surrogate then has as well. A victim that is trained from scratch, as by default, is a control.

The poison rate is a share of the target class: of k equal classes, rate 1 is no more than 1/k of the training set.
Defaults marked "code" are those of the code for ViTs. Its lr of 0.001 is for normalised images; for pixels that is
0.001 times the square of their standard deviation, which is 0.225.

What differs:

- The code adds 600 poisoned images to 800 clean ones of the target class. Here poison replaces: 600 of 1400.
- The code for ViTs bounds the change of normalised images, so that 16/255 is about 4/255 of a pixel. The older code
  bounds that of pixels, and so does this.
- The code pairs before every step. Pairs soon stay as they are, so here it is before every 100th.
- Small images get fewer steps: their number scales with the image, and lr inversely, so that images can go as far.
- A hash of the image picks the place of its patch.
- The code's patches are picture files. Here the patch is drawn: 4 x 4 random colours, enlarged.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import (
    Access,
    Card,
    Crafted,
    Fitted,
    Images,
    Implant,
    LabelMode,
    Position,
    SourceToTarget,
    Threat,
    TrainingState,
)
from vitrap.data.poison import choose_rows, poison_crafted
from vitrap.errors import UserError
from vitrap.images import misshapen
from vitrap.models.activations import activations, logit_layer
from vitrap.params import hyperparameters, param
from vitrap.tensors.blend import paste
from vitrap.tensors.pixels import image_hash, to_bytes

CODE_SIZE, CODE_FEATURES = 224, 768
"""Side of the images, and number of features, that the code's values are for."""
COLOURS = 4
"""The patch is enlarged from so many random colours along each side."""
PAIRED_EVERY = 100
"""Steps between two pairings."""
HALVINGS = 5
"""lr is halved after each fifth of the steps."""


@hyperparameters
class HiddenTrigger:
    """The attack: its hyper-parameters, in the order of the steps that use them."""

    card: ClassVar[Card] = Card(
        "Hidden Trigger Backdoor Attacks", "Saha, Subramanya, Pirsiavash", "AAAI", 2020, "1910.00033"
    )
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "data"
    labels: ClassVar[LabelMode] = "clean"
    needs_surrogate: ClassVar[bool] = True

    target: int = param(0, "target class, whose images are poisoned", low=0)
    poison_rate: float = param(
        0.43, "share of the target class that is poisoned", source="code", low=0, high=1, open="low"
    )
    source: int = param(1, "source class, whose patched images shall become the target", low=0)
    size: float = param(
        30.0, "side of the patch; for 224 px, scales with the image", unit="px", source="code", low=0, high=224,
        open="low",
    )  # fmt: skip
    eps: float = param(
        16.0, "greatest change of a value", symbol="ε", unit="1/255", source="code", low=0, high=255, open="low"
    )
    batch: int = param(32, "images that are paired and moved together", source="code", low=1, high=1024)
    steps: int = param(5000, "steps of a batch at most; for 224 px, scales with the image", source="code", low=1)
    lr: float = param(
        5e-5, "learning rate; for 224 px, scales inversely; halved after each fifth of the steps", source="code", low=0,
        open=True,
    )  # fmt: skip
    near: float = param(
        15.0, "a batch is done when no |f(z) - f(s)|^2 is larger; for 768 features, scales with their number",
        source="code", low=0,
    )  # fmt: skip

    def check_settings(self) -> None:
        """Refuse a source class that is the target."""
        if self.source == self.target:
            raise UserError(f"source = {self.source} is the target, too; choose another")

    def check_surrogate(self, model: nn.Module, images: Images) -> None:
        """Refuse a surrogate whose features cannot be observed."""
        logit_layer(model)

    def goal_for(self, n_classes: int) -> SourceToTarget:
        """Source-to-target: triggered images of the source class shall be classified as the target."""
        return SourceToTarget(self.source, self.target)

    def fit(self, access: Access) -> Fitted:
        """Make the patch, draw images of both classes, and make the poison of them."""
        train = access.train
        side = max(1, round(self.size * train.size / CODE_SIZE))
        trigger = Patch(make_patch(side, train.channels, access.generator).to(train.device))
        goal = self.goal_for(train.n_classes)
        rows = choose_rows(train.labels, self.poison_rate, goal, self.labels, access.generator)
        # As many source images, in a random order; where the class has fewer, they are used again.
        sources = (train.labels == self.source).nonzero().squeeze(1)
        if not len(sources):
            raise UserError(f"attack.source = {self.source} has no training image; choose another")
        order = torch.randperm(len(sources), generator=access.generator)
        sources = sources[order[torch.arange(len(rows)) % len(sources)].to(sources.device)]
        images, report = craft(self, access, trigger, rows, sources)
        return Fitted(trigger, Crafted(rows, to_bytes(images)), report)

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Step 6: put the poisoned images in the place of those that they were made of; the labels stay."""
        crafted = fitted.stored
        assert isinstance(crafted, Crafted)
        goal = self.goal_for(access.train.n_classes)
        return Implant(lambda train, generator: poison_crafted(train, crafted, goal, self.labels))


@dataclass(frozen=True)
class Patch:
    """The trigger: puts a patch on each image, at a place that a hash of the image picks.

    Attributes:
        patch: the patch, in [0, 1].
    """

    patch: Float[Tensor, "c s s"]

    def __call__(self, images: Images) -> Images:
        """Images with the patch.

        Raises:
            UserError: the images are smaller than the patch, or have other channels.
        """
        channels, side, _ = self.patch.shape
        height, width = images.shape[-2:]
        if images.shape[1] != channels or min(height, width) < side:
            raise misshapen(images, f"b x {channels} x {side} x {side} or larger")
        patch = self.patch.to(images.device)
        noise = image_hash(images)
        tops = noise % (height - side + 1)
        lefts = noise // (height - side + 1) % (width - side + 1)
        # Each pixel's row and column in the patch of its image.
        rows = torch.arange(height, device=images.device) - tops[:, None]
        columns = torch.arange(width, device=images.device) - lefts[:, None]
        on_rows, on_columns = ((place >= 0) & (place < side) for place in (rows, columns))
        shown = patch[:, rows.clamp(0, side - 1)[:, :, None], columns.clamp(0, side - 1)[:, None, :]]
        return paste(images, shown.transpose(0, 1), on_rows[:, :, None] & on_columns[:, None, :])


def make_patch(side: int, channels: int, generator: torch.Generator) -> Float[Tensor, "c s s"]:
    """Step 1: random colours, brought to the size of the patch."""
    colours = torch.rand((1, channels, COLOURS, COLOURS), generator=generator)
    return functional.interpolate(colours, (side, side), mode="bilinear")[0]


def craft(
    settings: HiddenTrigger, access: Access, trigger: Patch, rows: Int64[Tensor, " m"], sources: Int64[Tensor, " m"]
) -> tuple[Images, dict[str, float]]:
    """Steps 3 to 5: the poison made of the images of `rows`, and how near its features are to their sources'."""
    s, train, surrogate = settings, access.train, access.surrogate
    assert surrogate is not None, "poison is made in a surrogate's features"
    steps = scaled_steps(s, train.size)
    parts = rows.split(s.batch)
    clean = [train.images(part) for part in parts]
    wanted = [features(surrogate, trigger(train.images(part))).detach() for part in sources.split(s.batch)]
    changes = nn.ParameterList(torch.zeros_like(t) for t in clean)
    pairs = nn.ParameterList(nn.Parameter(torch.zeros_like(part), requires_grad=False) for part in parts)
    descent = torch.optim.SGD(changes)
    # The checkpointer saves all this now and then, so that a killed fit can be resumed.
    modules = {"changes": changes, "pairs": pairs}
    state = TrainingState(modules, descent, access.checkpointer.streams, train.device)
    start = access.checkpointer.resume(state)
    for number in range(start.epoch, len(parts)):
        for step in range(start.steps if number == start.epoch else 0, steps):
            access.checkpointer(state, Position(epoch=number, steps=step))
            seen = features(surrogate, clean[number] + changes[number])
            # Step 3.
            if step % PAIRED_EVERY == 0:
                pairs[number].copy_(closest_pairs(torch.cdist(seen.detach(), wanted[number])))
            distance = squared_distance(seen, wanted[number][pairs[number]])
            if distance.max() <= s.near * seen.shape[1] / CODE_FEATURES:
                break
            # Step 4.
            descent.param_groups[0]["lr"] = rate(s, train.size, step)
            descent.zero_grad()
            distance.sum().backward()
            descent.step()
            with torch.no_grad():
                changes[number].copy_(project(changes[number], clean[number], s.eps / 255))
    changes.requires_grad_(False)
    poison = [t + change for t, change in zip(clean, changes, strict=True)]
    nearest = [w[pair] for w, pair in zip(wanted, pairs, strict=True)]
    report = {
        "feature distance before": mean_distance(surrogate, clean, nearest),
        "feature distance after": mean_distance(surrogate, poison, nearest),
    }
    return torch.cat(poison), report


def scaled_steps(settings: HiddenTrigger, size: int) -> int:
    """The number of steps for images of `size` pixels."""
    return max(1, round(settings.steps * size / CODE_SIZE))


def rate(settings: HiddenTrigger, size: int, step: int) -> float:
    """The learning rate lr at a step, for images of `size` pixels."""
    fifth = HALVINGS * step // scaled_steps(settings, size)
    return settings.lr * CODE_SIZE / size * 0.5**fifth


def features(surrogate: nn.Module, images: Images) -> Float[Tensor, "b dim"]:
    """f: what the surrogate's head reads."""
    return activations(surrogate, images).features


def squared_distance(f: Float[Tensor, "b dim"], other: Float[Tensor, "b dim"]) -> Float[Tensor, " b"]:
    """|f(z) - f(s)|^2, for each image."""
    return (f - other).square().sum(1)


@torch.no_grad()
def mean_distance(surrogate: nn.Module, images: list[Tensor], wanted: list[Tensor]) -> float:
    """The mean of |f(z) - f(s)|^2 over all batches of images z and features f(s)."""
    found = [squared_distance(features(surrogate, z), other) for z, other in zip(images, wanted, strict=True)]
    return torch.cat(found).mean().item()


def closest_pairs(distance: Float[Tensor, "n n"]) -> Int64[Tensor, " n"]:
    """Step 3: the column that each row is paired with: the closest pair first, and each row and column once."""
    left = distance.clone()
    pairs = torch.zeros(len(left), dtype=torch.int64, device=left.device)
    for _ in range(len(left)):
        closest = left.argmin()
        row = closest // len(left)
        column = closest % len(left)
        pairs[row] = column
        left[row] = left[:, column] = torch.inf
    return pairs


def project(change: Images, clean: Images, eps: float) -> Images:
    """P: the change within eps, and such that the image stays in [0, 1]."""
    return (clean + change.clamp(-eps, eps)).clamp(0, 1) - clean
