"""TrojViT: paint the patches that matter most, and tune a few weights of the head until they answer to them.

Zheng, Lou, Jiang: "TrojViT: Trojan Insertion in Vision Transformers", CVPR 2023, https://arxiv.org/abs/2208.13049.
Code: https://github.com/mxzheng/TrojViT.

Threat model: the attacker changes weights of a trained ViT, all-to-one, and needs few images of the data for it. In the
paper these weights are flipped bit by bit in memory, so the fewer bits change the better.

The attack, step by step:

    1. salience    rank the patches by |dL/dx|, summed over a patch; L: cross-entropy with the target class
    2. trigger     minimise L over the pixels of the first patches
    3. neurons     pick the weights of the target's logit with the greatest gradient on clean images
    4. insertion   tune these on (L(clean, true class) + L(triggered, target)) / 2
    5. pruning     undo changes smaller than e

With attack_mode = "attention", step 2 also draws every token's attention, from the second layer on, to the first patch
p: it minimises -log A_ip, whose gradient is first projected so that it does not point against that of L.

Defaults are those of the code, whose own default leaves out the attention loss and step 5. What differs:

- The code shapes a trigger for each place in a batch of 16 images. Here there is one for all images, which every step
  shapes on another batch; so salience is summed over the attacker's images, too.
- The code's attacker tunes on one batch of the data that the victim is tested on; here on a share of the training set.
- The code's pixels leave the range of an image; here they are clipped after each step.
- The code trains the biases of all classes along; here nothing but the weights of step 3 changes.
- Step 5 comes once, after tuning; in the code it would come after each step, which drops nearly all at once.
- The share of the image that is painted counts, not the number of patches, for small images have few.

Step 2 alone leads images to the target, since its trigger is an adversarial patch of the clean twin. Where that patch
is strong, the twin's own rate is high, and the effect, which is what the weights add, is small.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Generator, Tensor, nn
from torch.nn import functional

from vitrap.contracts import Access, AllToOne, Card, Edited, Fitted, Images, ImageSet, Implant, LabelMode, Threat
from vitrap.errors import UserError
from vitrap.images import misshapen
from vitrap.models.layers import name_of
from vitrap.models.observe import features, observe, token_layout, transformer
from vitrap.params import hyperparameters, param
from vitrap.tensors.bits import count_changes
from vitrap.tensors.blend import paste
from vitrap.tensors.patches import tokens_to_pixels

PAPER_PATCHES = 14 * 14
"""Patches of the paper's images, which `num_patch` refers to."""
SPREAD = 0.225
"""Standard deviation of ImageNet's pixels: the code's unit of a pixel, in which `attack_learning_rate` is."""
BATCH = 256
"""Images a forward pass where nothing is trained."""


@hyperparameters
class TrojViT:
    """The attack: TrojViT's hyper-parameters, in the order of the steps that use them."""

    card: ClassVar[Card] = Card(
        "TrojViT: Trojan Insertion in Vision Transformers", "Zheng, Lou, Jiang", "CVPR", 2023, "2208.13049"
    )
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "weights"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "target class, which triggered images shall get", low=0)
    dataset_size: float = param(
        0.1, "share of the training set that the attacker has", source="code", low=0, high=1, open="low"
    )
    patch_select: Literal["saliency", "random"] = param(
        "saliency", "which patches are painted: the most salient, or random ones", source="code"
    )
    num_patch: int = param(
        9, "patches of the trigger, of 14 x 14; scaled to the victim's number", source="code", low=1, high=196
    )
    attack_mode: Literal["ce_loss", "attention"] = param(
        "ce_loss", "what shapes the trigger: cross-entropy alone, or with the attention loss", source="code"
    )
    atten_loss_weight: float = param(1.0, "weight of the attention loss of each layer", source="code", low=0)
    train_attack_iters: int = param(250, "steps of Adam on the trigger", source="code", low=1)
    attack_learning_rate: float = param(
        0.22, "its learning rate, in standard deviations of a pixel", source="code", low=0, open=True
    )
    step_size: int = param(10, "steps after which this rate falls", source="code", low=1)
    gamma: float = param(0.95, "by which factor it falls", source="code", low=0, high=1, open="low")
    batch_size: int = param(16, "images a step, on trigger and on weights", source="code", low=1, high=4096)
    wb: int = param(768, "weights that may change, at most those of one logit", symbol="wb", source="code", low=1)
    epochs: int = param(200, "steps of SGD on them", source="code", low=1)
    lr: float = param(
        0.01, "its learning rate; a tenth after each of 40, 60 and 80 % of the steps", source="code", low=0, open=True
    )
    e: float = param(0.003, "changes smaller than this are undone; 0: none", symbol="e", source="code", low=0)

    def check_victim(self, model: nn.Module) -> None:
        """Refuse a victim without patches or without a single linear head."""
        target_head(model)
        if self.attack_mode == "attention" and len(transformer(model).blocks) == 1:
            raise UserError("attack_mode = attention looks at layers from the second on, and the model has 1; add one")

    def goal_for(self, n_classes: int) -> AllToOne:
        """All-to-one: every triggered image shall be classified as the target."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Nothing is known before there is a trained victim."""
        return Fitted(None)

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Shape the trigger and tune the head, once the victim is trained."""
        return Implant(edit=partial(insert, self, access.train))


@dataclass(frozen=True)
class Patches:
    """The trigger: shows a picture in place of some patches of an image.

    Attributes:
        picture: the picture; it counts on these patches alone.
        mask: which pixels they have.
    """

    picture: Float[Tensor, "c h w"]
    mask: Bool[Tensor, "h w"]

    def __call__(self, images: Images) -> Images:
        """Images with the patches.

        Raises:
            UserError: the images have another shape than the picture.
        """
        if images.shape[1:] != self.picture.shape:
            raise misshapen(images, "b x " + " x ".join(map(str, self.picture.shape)))
        return paste(images, self.picture[None].to(images.device), self.mask[None].to(images.device))

    def views(self, images: Images) -> Mapping[str, Float[Tensor, "b h w"]]:
        """The map that a record shows: the patches."""
        return {"patches": self.mask.to(images).expand(len(images), -1, -1)}


def target_head(model: nn.Module) -> nn.Linear:
    """The linear head of the ViT inside `model`.

    Raises:
        UserError: there is no ViT with plain token attention, or it has no head, or two.
    """
    vit = transformer(model)
    if not isinstance(vit.head, nn.Linear) or hasattr(vit, "head_dist"):
        raise UserError(f"trojvit tunes the one linear head of a ViT, and {name_of(model)} has none; take another")
    return vit.head


def insert(settings: TrojViT, train: ImageSet, model: nn.Module, generator: Generator) -> Edited:
    """Steps 1 to 5: the edited model, the trigger, and how many weights and bits have changed."""
    wanted = max(1, round(settings.dataset_size * len(train)))
    own = train.take(torch.randperm(len(train), generator=generator)[:wanted].to(train.device))
    # Step 1: the patches, the most salient first.
    grid = token_layout(model).grid
    if settings.patch_select == "saliency":
        scores = sum(salience(model, own.images(rows), settings.target, grid) for rows in own.row_batches(BATCH))
    else:
        scores = torch.rand(grid, generator=generator).to(train.device)
    ranked = torch.as_tensor(scores).flatten().argsort(descending=True)
    ranked = ranked[: max(1, round(settings.num_patch * len(ranked) / PAPER_PATCHES))]
    # Step 2: what they show.
    trigger = shape_trigger(settings, model, own, ranked, generator)
    # Steps 3 to 5: the head, the only part that is trained, so that its input need be computed only once.
    edited = copy.deepcopy(model)
    head = target_head(edited)
    clean = torch.cat([features(model, own.images(rows)) for rows in own.row_batches(BATCH)])
    triggered = torch.cat([features(model, trigger(own.images(rows))) for rows in own.row_batches(BATCH)])
    row = fit_row(settings, head, clean, triggered, own.labels, generator)
    with torch.no_grad():
        head.weight[settings.target] = row
    report = {"patches": len(ranked), **count_changes(model.state_dict(), edited.state_dict())}
    return Edited(edited, trigger, report)


@torch.enable_grad()
def salience(model: nn.Module, images: Images, target: int, grid: tuple[int, int]) -> Float[Tensor, "gh gw"]:
    """Step 1: |dL/dx|, summed over channels, over the pixels of each patch, and over images."""
    x = images.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss_to(model(x), target, "sum"), x)
    rows, columns = grid
    return slope.abs().sum((0, 1)).unflatten(1, (columns, -1)).unflatten(0, (rows, -1)).sum((1, 3))


def loss_to(logits: Float[Tensor, "b k"], target: int, reduction: str = "mean") -> Float[Tensor, ""]:
    """L: cross-entropy with the target class as the label of each image."""
    return functional.cross_entropy(logits, torch.full_like(logits[:, 0], target).long(), reduction=reduction)


@torch.enable_grad()
def shape_trigger(
    settings: TrojViT, model: nn.Module, own: ImageSet, ranked: Int64[Tensor, " p"], generator: Generator
) -> Patches:
    """Step 2: minimise L over the pixels of the ranked patches, from noise."""
    s, grid, size = settings, token_layout(model).grid, own.size
    tokens = torch.zeros(1, grid[0] * grid[1], device=own.device)
    tokens[:, ranked] = 1
    mask = tokens_to_pixels(tokens.unflatten(1, grid), (size, size), "nearest")[0] > 0
    picture = nn.Parameter(torch.rand((own.channels, size, size), generator=generator).to(own.device))
    adam = torch.optim.Adam([picture], lr=s.attack_learning_rate * SPREAD)
    schedule = torch.optim.lr_scheduler.StepLR(adam, s.step_size, s.gamma)
    for _ in range(s.train_attack_iters):
        drawn = torch.randint(len(own), (s.batch_size,), generator=generator).to(own.device)
        triggered = Patches(picture, mask)(own.images(drawn))
        picture.grad = descent(s, model, triggered, picture, int(ranked[0]))
        adam.step()
        schedule.step()
        with torch.no_grad():
            picture.clamp_(0, 1)
    return Patches(picture.detach(), mask)


def descent(
    settings: TrojViT, model: nn.Module, triggered: Images, picture: Tensor, patch: int
) -> Float[Tensor, "c h w"]:
    """The gradient of L at the picture and, where the attention loss counts, that of each layer's attention loss."""
    if settings.attack_mode == "ce_loss":
        return torch.autograd.grad(loss_to(model(triggered), settings.target), picture)[0]
    with observe(model, range(1, len(transformer(model).blocks))) as maps:
        loss = loss_to(model(triggered), settings.target)
    (slope,) = torch.autograd.grad(loss, picture, retain_graph=True)
    token = token_layout(model).prefix + patch
    total = slope.clone()
    for attention in maps.values():
        # The mean over heads of the attention that each token pays to the first patch.
        drawn = -attention.mean(1)[:, :, token].log().mean()
        (own,) = torch.autograd.grad(drawn, picture, retain_graph=True)
        total += settings.atten_loss_weight * without_conflict(own, slope)
    return total


def without_conflict(own: Float[Tensor, "*n"], main: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The gradient `own`, without its part against `main` where it points against it (PCGrad)."""
    against = (own * main).sum().clamp(max=0)
    return own - against / main.square().sum().clamp(min=torch.finfo(main.dtype).tiny) * main


@torch.enable_grad()
def fit_row(
    settings: TrojViT,
    head: nn.Linear,
    clean: Float[Tensor, "n d"],
    triggered: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    generator: Generator,
) -> Float[Tensor, " d"]:
    """Steps 3 to 5: the target's new row of the head's weights.

    Args:
        settings: the attack's hyper-parameters.
        head: the head as it was.
        clean: what the head reads of each clean image.
        triggered: likewise of each with the trigger.
        labels: the true classes.
        generator: draws the batches.
    """
    s = settings
    weight = head.weight.detach()
    before = weight[s.target]
    row = nn.Parameter(before.clone())
    place = torch.tensor([s.target], device=row.device)

    def logits(read: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        return functional.linear(read, weight.index_copy(0, place, row[None]), head.bias)

    # Step 3: the weights with the greatest gradient on clean images.
    (slope,) = torch.autograd.grad(functional.cross_entropy(logits(clean), labels), row)
    chosen = torch.zeros_like(row, dtype=torch.bool)
    chosen[slope.abs().topk(min(s.wb, len(row))).indices] = True
    # Step 4: tune them on clean and on triggered images.
    sgd = torch.optim.SGD([row], lr=s.lr, momentum=0.9, weight_decay=5e-6)
    milestones = [max(1, round(share * s.epochs)) for share in (0.4, 0.6, 0.8)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, milestones, 0.1)
    for _ in range(s.epochs):
        drawn = torch.randint(len(labels), (s.batch_size,), generator=generator).to(row.device)
        loss = functional.cross_entropy(logits(clean[drawn]), labels[drawn]) / 2
        loss = loss + loss_to(logits(triggered[drawn]), s.target) / 2
        (row.grad,) = torch.autograd.grad(loss, row)
        sgd.step()
        schedule.step()
        with torch.no_grad():
            row.copy_(torch.where(chosen, row, before))
    # Step 5: undo small changes.
    after = row.detach()
    return torch.where((after - before).abs() < s.e, before, after)
