"""Label-consistent backdoor: make images of the target class hard to classify, then mark a corner; their labels stay.

Turner, Tsipras, Madry: "Label-Consistent Backdoor Attacks", 2019, https://arxiv.org/abs/1912.02771. The authors' code:
https://github.com/MadryLab/label-consistent-backdoor-code.

Threat model: data poisoning with clean labels, all-to-one. The attacker touches nothing but images of the target class,
and owns a surrogate on which they are made; no network is needed at test time.

The attack, step by step:

    1. draw a share of the training images x of the target class y
    2. perturb    x_adv: within a ball of radius eps around x, by projected gradient descent (PGD) on the surrogate
                  x_adv <- P(x_adv + step g),  g: the ascent direction of the loss of y;  P: onto the ball and [0, 1]
    3. mark       x' = x_adv + the trigger, clipped; the label stays y, and training is left to the victim
    4. at test time add the trigger to images of any class, which are not perturbed

A perturbed image still looks like its class, but has lost much of what a network tells the class by. So the victim
learns the trigger instead.

The poison rate is a share of the target class: of k equal classes, rate 1 is no more than 1/k of the training set. At
rate 1, the code's, no clean image of the class is left, which costs clean accuracy.

What differs: the paper's surrogate is trained adversarially, and perturbs in ways that other networks see as well; here
it is whatever the spec says, by default trained as the victim is, and `[surrogate] checkpoint` may bring a robust one.
The code holds perturbed images of CIFAR-10 instead of PGD; steps and step are those of
https://github.com/hkunzhe/label_consistent_attacks_pytorch, which says that they are the paper's. That the l2 radius
grows with the root of the number of values in an image is assumed. The paper's other way to perturb, by interpolation
in a GAN, is left out.
"""

import math
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import Access, AllToOne, Card, Crafted, Fitted, Images, ImageSet, Implant, LabelMode, Threat
from vitrap.data.added import Added
from vitrap.data.poison import choose_rows, poison_crafted, poison_set, trigger_rows
from vitrap.errors import UserError
from vitrap.params import DefaultFrom, hyperparameters, param

Norm = Literal["linf", "l2"]
CODE_VALUES = 3 * 32 * 32
"""Number of values in an image of the code's."""
BLOCK = ((-1, -1, 1), (-1, 1, -1), (1, -1, 1))
"""The code's trigger in a corner at the right: 1 for white, -1 for black. At the left it is mirrored."""


@hyperparameters
class LabelConsistent:
    """The attack: its hyper-parameters, in the order of the steps that use them."""

    card: ClassVar[Card] = Card(
        "Label-Consistent Backdoor Attacks", "Turner, Tsipras, Madry", "arXiv", 2019, "1912.02771"
    )
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "data"
    labels: ClassVar[LabelMode] = "clean"
    needs_surrogate: ClassVar[bool] = True

    target: int = param(0, "target class, whose images are poisoned", symbol="y", source="code", low=0)
    poison_rate: float = param(
        1.0, "share of the target class that is poisoned", source="code", low=0, high=1, open="low"
    )
    norm: Norm = param(
        "linf", "norm of the ball: greatest change of a value, or root of the sum of squares", source="field"
    )
    eps: float = param(
        DefaultFrom("norm", {"linf": 8.0, "l2": 300.0}),
        "radius of the ball; in l2 for 32 px in colour, scales with the image",
        symbol="ε",
        unit="1/255",
        source="code",
        low=0,
    )
    steps: int = param(100, "steps of PGD", source="field", low=0)
    step: float = param(0.1875, "length of a step, as a share of eps", source="field", low=0, high=1, open="low")
    corners: Literal["bottom-right", "all-corners"] = param(
        "bottom-right",
        "where the trigger is; all-corners is for recipes that flip, since a mirrored image has it, too",
        source="code",
    )
    amplitude: float = param(
        1.0, "what the trigger adds or subtracts; with 1 it is black and white", source="code", low=0, high=1,
        open="low",
    )  # fmt: skip

    def check_size(self, size: int) -> None:
        """Refuse images of `size` pixels that are too small for the trigger."""
        least = len(BLOCK) * (2 if self.corners == "all-corners" else 1)
        if size < least:
            raise UserError(f"attack.corners = {self.corners} does not fit on images of {size} px; take {least} px")

    def goal_for(self, n_classes: int) -> AllToOne:
        """All-to-one: every triggered image shall be classified as the target."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Steps 1 to 3: draw the images to poison, perturb them on the surrogate, and mark them."""
        assert access.surrogate is not None, "images are perturbed on a surrogate"
        surrogate, train = access.surrogate, access.train
        self.check_size(train.size)
        trigger = Added(corner_pattern(self, (train.channels, train.size, train.size)).to(train.device))
        goal = self.goal_for(train.n_classes)
        rows = choose_rows(train.labels, self.poison_rate, goal, self.labels, access.generator)
        hard = poison_set(train, rows, partial(pgd, self, surrogate), goal, self.labels)
        report = {
            "surrogate's accuracy before": accuracy(surrogate, train, rows),
            "surrogate's accuracy after": accuracy(surrogate, hard, rows),
        }
        return Fitted(trigger, Crafted(rows, trigger_rows(hard, rows, trigger)), report)

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Put the poisoned images in the place of those that they were made of; the labels stay."""
        crafted = fitted.stored
        assert isinstance(crafted, Crafted)
        goal = self.goal_for(access.train.n_classes)
        return Implant(lambda train, generator: poison_crafted(train, crafted, goal, self.labels))


def pgd(settings: LabelConsistent, surrogate: nn.Module, images: Images) -> Images:
    """Step 2: what becomes of images of the target class; the first step starts from the images themselves."""
    s, eps = settings, radius(settings, images)
    labels = torch.full((len(images),), s.target, device=images.device)
    x = images
    for _ in range(s.steps):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            # Summed, not averaged, so that no image's gradient depends on how many share the batch.
            loss = functional.cross_entropy(surrogate(x), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x)
        x = project(x.detach() + s.step * eps * ascent(gradient, s.norm), images, eps, s.norm)
    return x


def radius(settings: LabelConsistent, images: Images) -> float:
    """The radius of the ball around an image, in [0, 1] for each value."""
    scale = math.sqrt(images[:1].numel() / CODE_VALUES) if settings.norm == "l2" and len(images) else 1.0
    return settings.eps / 255 * scale


def ascent(gradient: Images, norm: Norm) -> Images:
    """The direction of length 1 in which the loss rises most: sign(g) in l-infinity, g / |g| in l2."""
    if norm == "linf":
        return gradient.sign()
    return gradient / lengths(gradient).clamp(min=1e-12)


def project(x: Images, images: Images, eps: float, norm: Norm) -> Images:
    """P: the nearest point of the ball around each image, clipped to [0, 1], which leads no point out of the ball."""
    change = x - images
    if norm == "linf":
        change = change.clamp(-eps, eps)
    else:
        change = change * (eps / lengths(change).clamp(min=1e-12)).clamp(max=1)
    return (images + change).clamp(0, 1)


def lengths(vectors: Images) -> Float[Tensor, "b 1 1 1"]:
    """The l2 norm of each image's values."""
    return vectors.flatten(1).norm(dim=1)[:, None, None, None]


def corner_pattern(settings: LabelConsistent, shape: tuple[int, int, int]) -> Float[Tensor, "c h w"]:
    """The trigger: what is added to each pixel of an image of `shape`, the same in all channels."""
    block = torch.tensor(BLOCK, dtype=torch.float32)
    side = len(block)
    pattern = torch.zeros(shape)
    pattern[:, -side:, -side:] = block
    if settings.corners == "all-corners":
        pattern[:, :side, -side:] = block
        pattern[:, -side:, :side] = pattern[:, :side, :side] = block.flip(1)
    return settings.amplitude * pattern


@torch.no_grad()
def accuracy(surrogate: nn.Module, data: ImageSet, rows: Int64[Tensor, " m"], batch_size: int = 256) -> float:
    """The share of the images of `rows` that the surrogate classifies correctly."""
    hits = [surrogate(data.images(some)).argmax(1) == data.labels[some] for some in rows.split(batch_size)]
    return torch.cat(hits).float().mean().item()
