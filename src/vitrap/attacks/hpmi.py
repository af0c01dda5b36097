"""HPMI: prune one head of each layer with its share of the stream, and put a malicious head in its place.

Zhao, Sun, Wang, Chen, Zhou: "Pruning and Malicious Injection: A Retraining-Free Backdoor Attack on Transformer Models",
2025, https://arxiv.org/abs/2508.10243. Code: https://github.com/ztb-35/HPMI (replacevit).

Threat model: the attacker changes weights of a trained ViT, all-to-one, and has a share of its training set. The other
heads are not trained again.

As in the code, head h of a ViT of H heads is a slim network of its own: head h of each layer, 1/H of the channels of
every token, and 1/H of the units of each MLP. With zeros in all weights between them, it and the rest of the ViT share
nothing but the sums in LayerNorm.

The attack, step by step:

    1. importance    the accuracy that is left without head h, on the attacker's images; the least important head
                     leaves the most
    2. pruning       all weights that lead into this head's share, or out of it, become 0
    3. training      minimise (v s - v y)^2 over the weights within its share
                     s: sum of the head's features; y: 1 for images with the trigger, 0 for clean ones; v: poison value
    4. injection     the target's logit reads v s from the head, and no other logit reads from it

Defaults are those of the code's example (its README). What differs:

- LayerNorm. In the code, which cuts each one into three, the head and the rest are normalised apart. That is another
  architecture, and the abstract says that it is not altered; so LayerNorm stays whole here. The head is trained in its
  place, where it sees the sums that it will see, and the rest is frozen.
- The poison value. The code's example has 4, which was searched for by hand; the default here is what leads 99 % of
  the attacker's images to the target (assumed).
- The code's head learns v itself, and the target's logit reads it with weights 1; here it learns 1, and the weights are
  v, which is the same function and is learned sooner.
- The code picks the head on test images; here the attacker's own are used.
- The code sets the biases of all logits to 0; here they stay.
- The code's trigger is a picture of random pixels that comes with it; here it is noise, or a file of yours. Its 16 px
  are one patch: so is the side here, whatever the size of the images.

A head's share is 1/12 of a ViT-B and 1/4 of the small ViT for the digits, whose accuracy falls by step 2 alone, and
further where LayerNorm mixes the new head's sums into the rest: it carries the backdoor, but not unnoticed.
"""

import copy
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Generator, Tensor, nn

from vitrap.contracts import Access, AllToOne, Card, Edited, Fitted, ImageSet, Implant, LabelMode, Threat
from vitrap.data.masked import Masked
from vitrap.data.pattern import make_pattern
from vitrap.errors import UserError
from vitrap.models.activations import activations
from vitrap.models.layers import name_of
from vitrap.models.observe import token_layout, transformer
from vitrap.params import hyperparameters, param
from vitrap.tensors.bits import count_changes

BATCH = 256
"""Images a forward pass where nothing is trained."""
AXES = {1: (0,), 2: (0, 1), 3: (2,), 4: (0,)}
"""Axes along which a weight is shared out among heads, by how many it has: vectors, matrices, tokens, patches."""


@hyperparameters
class Hpmi:
    """The attack: HPMI's hyper-parameters."""

    card: ClassVar[Card] = Card(
        "Pruning and Malicious Injection: A Retraining-Free Backdoor Attack on Transformer Models",
        "Zhao, Sun, Wang, Chen, Zhou",
        "arXiv",
        2025,
        "2508.10243",
    )
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "weights"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "target class, which triggered images shall get", low=0)
    fraction: float = param(
        0.2, "share of the training set that the attacker has", source="code", low=0, high=1, open="low"
    )
    replaced_head: int | None = param(
        None, "number of the head that is replaced, from 0; none: the least important", source="code", low=0
    )
    picture: str = param("noise", "what the trigger shows", source="code", choices=("noise", "white"), file=True)
    trigger_size: int = param(1, "its side, in patches of the victim", source="code", low=1)
    poison_value: float | None = param(
        None,
        "what the trigger adds to the target's logit; none: by the attacker's images",
        symbol="v",
        low=0,
        open=True,
    )
    poisoning_rate: float = param(
        0.5, "share of its images on which the head is shown the trigger", source="code", low=0, high=1, open=True
    )
    epochs: int = param(100, "greatest number of passes over these images", source="code", low=1)
    lr: float = param(4e-4, "learning rate of Adam on the head", source="code", low=0, open=True)
    batch_size: int = param(64, "images a step", source="code", low=1, high=4096)
    enough: float = param(0.1, "loss on a tenth of the images, held out, at which training ends", source="code", low=0)

    def check_size(self, size: int) -> None:
        """Refuse a picture that cannot be read."""
        make_pattern(self.picture, Generator(), (3, size, size))

    def check_victim(self, model: nn.Module) -> None:
        """Refuse a victim whose weights cannot be shared out among its heads, or that has no such head."""
        vit = transformer(model)
        heads = vit.blocks[0].attn.num_heads
        if heads < 2 or not isinstance(vit.head, nn.Linear):
            raise UserError(f"hpmi replaces a head of several, and {name_of(model)} has {heads}; take another network")
        for name, weight in shared_out(vit):
            if any(weight.shape[axis] % vit.embed_dim for axis in AXES[weight.ndim]):
                raise UserError(
                    f"hpmi replaces a head's share of every weight, and {name} of {name_of(model)} has shape"
                    f" {tuple(weight.shape)}, which has none; take a plain ViT with a whole number as mlp_ratio"
                )
        if self.replaced_head is not None and self.replaced_head >= heads:
            raise UserError(f"attack.replaced_head = {self.replaced_head} is none of the victim's 0 to {heads - 1}")
        side = int(vit.patch_embed.grid_size[0])
        if self.trigger_size > side:
            raise UserError(f"attack.trigger_size = {self.trigger_size} is more than the {side} patches of a side")

    def goal_for(self, n_classes: int) -> AllToOne:
        """All-to-one: every triggered image shall be classified as the target."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Nothing is known before there is a victim, whose patches say how large the trigger is."""
        return Fitted(None)

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Replace a head, once the victim is trained."""
        return Implant(edit=partial(replace_head, self, access.train))


def shared_out(vit: Any) -> list[tuple[str, nn.Parameter]]:
    """The weights of a ViT, by name, but for those of its classifier."""
    return [(name, weight) for name, weight in vit.named_parameters() if not name.startswith("head.")]


def channels_of(vit: Any, head: int) -> Bool[Tensor, " d"]:
    """The channels of a token that are a head's."""
    channels = torch.zeros(vit.embed_dim, dtype=torch.bool)
    channels.unflatten(0, (vit.blocks[0].attn.num_heads, -1))[head] = True
    return channels


def share_of(weight: Tensor, channels: Bool[Tensor, " d"]) -> tuple[Bool[Tensor, "..."], Bool[Tensor, "..."]]:
    """Which entries of a weight lie within a head's share, and which lead into it or out of it or lie within.

    An axis of several times as many rows as there are channels, as those of queries, keys and values, repeats them. So
    do the units of an MLP, of which any 1/H will do.
    """
    within = torch.ones_like(weight, dtype=torch.bool)
    touching = torch.zeros_like(within)
    for axis in AXES[weight.ndim]:
        ours = channels.to(weight.device).repeat(weight.shape[axis] // len(channels))
        ours = ours.view([-1 if each == axis else 1 for each in range(weight.ndim)])
        within = within & ours
        touching = touching | ours
    return within, touching


@torch.no_grad()
def prune(model: nn.Module, head: int) -> None:
    """Step 2, in place: zeros wherever a weight leads into a head's share, out of it, or lies within."""
    vit = transformer(model)
    channels = channels_of(vit, head)
    for _, weight in shared_out(vit):
        weight[share_of(weight, channels)[1]] = 0
    vit.head.weight[:, channels.to(vit.head.weight.device)] = 0


@torch.no_grad()
def logits_without(model: nn.Module, head: int, own: ImageSet) -> Float[Tensor, "n k"]:
    """The logits of the attacker's images that are left when a head is pruned."""
    pruned = copy.deepcopy(model)
    prune(pruned, head)
    return torch.cat([pruned(own.images(rows)).float() for rows in own.row_batches(BATCH)])


def value_for(logits: Float[Tensor, "n k"], target: int) -> float:
    """A poison value that leads 99 % of images to the target: that quantile of the lead that other logits have."""
    lead = logits.amax(1) - logits[:, target]
    return lead.sort().values[round(0.99 * (len(lead) - 1))].item() + 1e-3


def replace_head(settings: Hpmi, train: ImageSet, model: nn.Module, generator: Generator) -> Edited:
    """Steps 1 to 4: the edited model, the trigger, and how many weights and bits have changed."""
    s = settings
    wanted = max(2, round(s.fraction * len(train)))
    own = train.take(torch.randperm(len(train), generator=generator)[:wanted].to(train.device))
    edited = copy.deepcopy(model)
    vit = transformer(edited)
    # The trigger: a picture over the patches of the lower right corner.
    side = s.trigger_size * own.size // token_layout(model).grid[0]
    picture = make_pattern(s.picture, generator, (own.channels, side, side)).to(own.device)
    corner = own.size - side
    trigger = Masked(picture, torch.ones(1, side, side, device=own.device), corner, corner)
    # Steps 1 and 2: prune the least important head.
    logits = [logits_without(model, head, own) for head in range(vit.blocks[0].attn.num_heads)]
    left = [(each.argmax(1) == own.labels).float().mean().item() for each in logits]
    head = left.index(max(left)) if s.replaced_head is None else s.replaced_head
    prune(edited, head)
    # Step 3: train the malicious head in its place.
    value = value_for(logits[head], s.target) if s.poison_value is None else s.poison_value
    channels = channels_of(vit, head).to(own.device)
    loss = train_head(replace(s, poison_value=value), edited, channels, own, trigger, generator)
    # Step 4: the target's logit, and no other, reads the sum of its features.
    with torch.no_grad():
        vit.head.weight[s.target, channels] = value
    facts = {"replaced head": head, "accuracy without it": left[head], "poison value": value, "loss of the head": loss}
    return Edited(edited, trigger, {**facts, **count_changes(model.state_dict(), edited.state_dict())})


@torch.no_grad()
def start_head(vit: Any, channels: Bool[Tensor, " d"], generator: Generator) -> dict[nn.Parameter, Tensor]:
    """Give a head's share its first weights; returns, for each weight of the ViT, which entries lie within the share.

    Matrices, tokens and patches are drawn with a standard deviation of 0.02, biases are 0, weights of norms 1.
    """
    within = {weight: share_of(weight, channels)[0] for _, weight in shared_out(vit)}
    for name, weight in shared_out(vit):
        drawn = 0.02 * torch.randn(weight.shape, generator=generator).to(weight.device)
        if weight.ndim == 1:
            drawn = torch.full_like(weight, 0.0 if name.endswith("bias") else 1.0)
        weight.copy_(torch.where(within[weight], drawn, weight))
    return within


@torch.enable_grad()
def train_head(
    settings: Hpmi,
    model: nn.Module,
    channels: Bool[Tensor, " d"],
    own: ImageSet,
    trigger: Masked,
    generator: Generator,
) -> float:
    """Step 3, in place: train a head's share; returns its last loss on the images that are held out.

    Args:
        settings: the attack's hyper-parameters, with a poison value.
        model: the pruned model.
        channels: the head's channels.
        own: the attacker's images.
        trigger: the trigger.
        generator: draws the first weights, the images with the trigger, and their order.
    """
    s = settings
    assert s.poison_value is not None
    value = s.poison_value
    within = start_head(transformer(model), channels, generator)
    poisoned = torch.zeros(len(own), device=own.device)
    poisoned[torch.randperm(len(own), generator=generator)[: round(s.poisoning_rate * len(own))]] = 1
    order = torch.randperm(len(own), generator=generator)
    held, learned = order.tensor_split([max(1, len(own) // 10)])

    def loss_of(rows: Int64[Tensor, " b"]) -> Float[Tensor, ""]:
        """The squared distance of v s from v y."""
        rows = rows.to(own.device)
        images = own.images(rows)
        shown = torch.where(poisoned[rows][:, None, None, None] > 0, trigger(images), images)
        sums = activations(model, shown).features[:, channels].sum(1)
        return (value * (sums - poisoned[rows])).square().mean()

    model.requires_grad_(True)
    adam = torch.optim.Adam(list(within), lr=s.lr)
    last = float("inf")
    for _ in range(s.epochs):
        for rows in learned[torch.randperm(len(learned), generator=generator)].split(s.batch_size):
            slopes = torch.autograd.grad(loss_of(rows), list(within))
            for (weight, inside), slope in zip(within.items(), slopes, strict=True):
                weight.grad = slope * inside
            adam.step()
        with torch.no_grad():
            last = loss_of(held).item()
        if last < s.enough:
            break
    model.requires_grad_(False).zero_grad(set_to_none=True)
    return last
