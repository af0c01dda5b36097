"""The optimiser of a training: which weights decay, how fast each layer learns, and how the rate rises and falls."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage] - it is timm's own name
from torch import nn

from vitrap.errors import UserError
from vitrap.train.recipe import Recipe

Rate = Callable[[float], float]
"""How much of a training is done, in [0, 1), to the model's learning rate."""
Group = dict[str, Any]
"""A parameter group as torch's optimisers take it. With a "peak" it has a learning rate of its own."""
MOMENTUM = 0.9
"""Of SGD."""


def make_optimiser(model: nn.Module, recipe: Recipe, more: Sequence[nn.Parameter] = ()) -> torch.optim.Optimizer:
    """The recipe's optimiser over the weights that require a gradient, and `more`, which never decay.

    Raises:
        UserError: the head has a rate of its own, and the network does not say what its head is.
    """
    plain = recipe.layer_decay == 1 and recipe.head_lr is None
    groups = _two_groups(model, recipe) if plain else _groups_by_layer(model, recipe)
    groups.append({"params": list(more), "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=MOMENTUM, fused=True)
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)


def decays(weight: nn.Parameter) -> bool:
    """Whether weight decay acts on it: on matrices, as ViTs are trained, not on biases, norms and tokens."""
    return weight.ndim >= 2 and weight.shape[0] > 1


def _two_groups(model: nn.Module, recipe: Recipe) -> list[Group]:
    """All layers learn at one rate."""
    weights = [w for w in model.parameters() if w.requires_grad]
    matrices = [w for w in weights if decays(w)]
    others = [w for w in weights if not decays(w)]
    return [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _groups_by_layer(model: nn.Module, recipe: Recipe) -> list[Group]:
    """Timm's groups: each layer learns at `layer_decay` times the rate of the one above; the head may have its own."""
    body = getattr(model, "body", model)
    free = [name for name, weight in body.named_parameters() if not decays(weight)]
    layers = param_groups_layer_decay(body, recipe.weight_decay, free, layer_decay=recipe.layer_decay)
    head = {id(weight) for weight in head_weights(body)} if recipe.head_lr is not None else set()
    groups: list[Group] = []
    for layer in layers:
        peaks = {recipe.lr * layer["lr_scale"]: [w for w in layer["params"] if id(w) not in head]}
        if recipe.head_lr is not None:
            peaks.setdefault(recipe.head_lr, []).extend(w for w in layer["params"] if id(w) in head)
        groups += [
            {"params": weights, "weight_decay": layer["weight_decay"], "lr": peak, "peak": peak}
            for peak, weights in peaks.items()
        ]
    return groups


def head_weights(body: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of a network's head, which gives the logits; a distilled ViT has two.

    Raises:
        UserError: the network does not name its head, as timm's do.
    """
    if not hasattr(body, "get_classifier"):
        raise UserError(
            f"network {type(body).__name__} does not say which layer is its head (timm's get_classifier);"
            " leave out recipe.head_lr"
        )
    named: Any = body
    found = named.get_classifier()
    for layer in found if isinstance(found, (tuple, list)) else (found,):
        yield from layer.parameters()


def falling(recipe: Recipe) -> Rate:
    """The recipe's own schedule."""
    return lambda progress: recipe.lr * warmup_cosine(progress, recipe.warmup)


def warmup_cosine(progress: float, warmup: float) -> float:
    """The learning rate over its peak at `progress` in [0, 1): a line up to `warmup`, then half a cosine down.

    Never exactly 0 at the first step, which would be wasted.
    """
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
