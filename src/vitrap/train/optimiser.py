"""Makes the optimiser of a training: which weights decay, each layer's learning rate, and the schedule over steps."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage] - it is timm's own name
from torch import nn

from vitrap.errors import UserError
from vitrap.models.classifier import Classifier
from vitrap.train.recipe import Recipe

Schedule = Callable[[float], float]
"""Maps the share of a training that is done, in [0, 1), to the model's learning rate."""
Group = dict[str, Any]
"""A parameter group as torch's optimisers take it; one with a "peak" has a peak learning rate of its own."""
MOMENTUM = 0.9
"""Momentum of SGD."""


def make_optimiser(model: nn.Module, recipe: Recipe, more: Sequence[nn.Parameter] = ()) -> torch.optim.Optimizer:
    """The recipe's optimiser over all weights that require a gradient, and over `more`, which never decay.

    Raises:
        UserError: layers are to learn at different rates, and the network does not say what its layers are.
    """
    groups = groups_of(model.body if isinstance(model, Classifier) else model, recipe)
    if more:
        groups.append({"params": list(more), "weight_decay": 0.0})
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=MOMENTUM, fused=True)
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)


def groups_of(body: nn.Module, recipe: Recipe) -> list[Group]:
    """Parameter groups: a layer's rate is `layer_decay` times that of the layer above; the head may have its own.

    Raises:
        UserError: the network has no layers that timm knows, or no layer that it calls its head.
    """
    groups = _by_decay(body, recipe) if recipe.layer_decay == 1 else _by_layer(body, recipe)
    if recipe.head_lr is None:
        return groups
    # Take the head's weights out of each group, and give them a group with their own rate.
    head = {id(weight) for weight in head_weights(body, "recipe.head_lr")}
    found: list[Group] = []
    for group in groups:
        own = [weight for weight in group["params"] if id(weight) in head]
        found.append({**group, "params": [weight for weight in group["params"] if id(weight) not in head]})
        found.append({**group, "params": own, "lr": recipe.head_lr, "peak": recipe.head_lr})
    return [group for group in found if group["params"]]


def decays(weight: nn.Parameter) -> bool:
    """Whether weight decay acts on a weight: on matrices, as usual for ViTs, but not on biases, norms and tokens."""
    return weight.ndim >= 2 and weight.shape[0] > 1


def _by_decay(body: nn.Module, recipe: Recipe) -> list[Group]:
    """Two groups: the weights that decay, and those that do not."""
    weights = [w for w in body.parameters() if w.requires_grad]
    return [
        {"params": [w for w in weights if decays(w)], "weight_decay": recipe.weight_decay},
        {"params": [w for w in weights if not decays(w)], "weight_decay": 0.0},
    ]


def _by_layer(body: nn.Module, recipe: Recipe) -> list[Group]:
    """Groups by layer, as BEiT is fine-tuned; timm's learning rate scale of a layer becomes the group's peak."""
    if not hasattr(body, "group_matcher"):
        raise UserError(
            f"recipe.layer_decay = {recipe.layer_decay:g} needs a network whose layers timm knows, and"
            f" {type(body).__name__} is none; leave it out"
        )
    free = [name for name, weight in body.named_parameters() if not decays(weight)]
    layers = param_groups_layer_decay(body, recipe.weight_decay, free, layer_decay=recipe.layer_decay)
    peaks = [recipe.lr * layer["lr_scale"] for layer in layers]
    return [
        {"params": layer["params"], "weight_decay": layer["weight_decay"], "lr": peak, "peak": peak}
        for layer, peak in zip(layers, peaks, strict=True)
    ]


def head_weights(body: nn.Module, asked: str) -> Iterator[nn.Parameter]:
    """The weights of a network's head, which computes the logits; a distilled ViT has two heads.

    Args:
        body: a network.
        asked: the key of the spec that needs the head, for the error message.

    Raises:
        UserError: the network does not name its head, as timm's do.
    """
    named: Any = body
    if not hasattr(body, "get_classifier"):
        raise UserError(
            f"{asked} needs a network that says what its head is, as timm's do, and {type(body).__name__} does not;"
            " leave it out"
        )
    found = named.get_classifier()
    for layer in found if isinstance(found, (tuple, list)) else (found,):
        yield from layer.parameters()


def recipe_schedule(recipe: Recipe) -> Schedule:
    """The recipe's schedule of the learning rate: warm-up, then half a cosine."""
    return lambda progress: recipe.lr * warmup_cosine(progress, recipe.warmup)


def warmup_cosine(progress: float, warmup: float) -> float:
    """The learning rate over its peak at `progress` in [0, 1): a line up to `warmup`, then half a cosine down.

    At the first step it is a little above 0, so that this step is not wasted.
    """
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
