"""The training loop: the same steps for every attack.

The set lives on the device as 8-bit pixels; batches are gathered, augmented and learned from there. Nothing in a
step waits for the device: losses are summed where they arise and read once an epoch.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import Batch, ImageSet, Objective
from vitrap.data.augment import random_crop, random_flip
from vitrap.errors import UserError
from vitrap.models.observe import eager_attention
from vitrap.train.recipe import Recipe

Curves = dict[str, list[float]]


@dataclass(frozen=True)
class Streams:
    """The random streams of a training, each with one purpose, so that a victim and its twin share them all."""

    order: torch.Generator
    augmentation: torch.Generator


def train(
    model: nn.Module,
    data: ImageSet,
    recipe: Recipe,
    streams: Streams,
    objective: Objective | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Curves:
    """Train `model` in place on `data` and leave it in evaluation mode.

    Args:
        model: a function of images in [0, 1], on the device of `data`.
        data: the training set, poisoned or not.
        recipe: how.
        streams: the order of images (a CPU generator) and the augmentation (a generator on the device).
        objective: named loss terms, which are added up; None for cross-entropy with the recipe's smoothing.
        tick: called after each step.

    Returns:
        The mean of each loss term, epoch by epoch.

    Raises:
        UserError: a loss term is no longer finite.
    """
    objective = objective or cross_entropy(recipe.label_smoothing)
    optimiser = adamw(model, recipe)
    curves: Curves = {}
    step, steps = 0, recipe.epochs * math.ceil(len(data) / recipe.batch_size)
    model.train()
    for _ in range(recipe.epochs):
        sums: dict[str, Tensor] = {}
        for rows in shuffled(data, recipe.batch_size, streams.order):
            for group in optimiser.param_groups:
                group["lr"] = recipe.lr * warmup_cosine(step / steps, recipe.warmup)
            batch = augment(data.batch(rows), recipe, streams.augmentation)
            with arithmetic(model, data.device, recipe.precision):
                terms = objective(model, batch)
            descend(model, optimiser, terms, recipe.clip)
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach() * len(rows)
            step += 1
            tick()
        for name, total in sums.items():
            curves.setdefault(name, []).append(total.item() / len(data))
            if not math.isfinite(curves[name][-1]):
                raise UserError(f"training diverged ({name} is {curves[name][-1]}); lower recipe.lr = {recipe.lr:g}")
    model.eval()
    return curves


def descend(model: nn.Module, optimiser: torch.optim.Optimizer, terms: Mapping[str, Tensor], clip: float) -> None:
    """One step down the sum of the loss terms."""
    optimiser.zero_grad(set_to_none=True)
    torch.stack(tuple(terms.values())).sum().backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimiser.step()


def cross_entropy(label_smoothing: float) -> Objective:
    """The neutral objective."""

    def objective(model: nn.Module, batch: Batch) -> Mapping[str, Float[Tensor, ""]]:
        logits = model(batch.images)
        return {"cross_entropy": functional.cross_entropy(logits, batch.labels, label_smoothing=label_smoothing)}

    return objective


def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW that decays matrices only: biases, norms and one-token embeddings stay free, as ViTs are trained."""
    weights = [w for w in model.parameters() if w.requires_grad]
    matrices = [w for w in weights if w.ndim >= 2 and w.shape[0] > 1]
    others = [w for w in weights if not (w.ndim >= 2 and w.shape[0] > 1)]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)


def warmup_cosine(progress: float, warmup: float) -> float:
    """The learning rate over its peak at `progress` in [0, 1): a line up to `warmup`, then half a cosine down.

    Never exactly 0 at the first step, which would be wasted.
    """
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def shuffled(data: ImageSet, batch_size: int, order: torch.Generator) -> Iterator[Int64[Tensor, " b"]]:
    """All row numbers of `data` in random order, a batch at a time."""
    return iter(torch.randperm(len(data), generator=order).to(data.device, non_blocking=True).split(batch_size))


def augment(batch: Batch, recipe: Recipe, generator: torch.Generator) -> Batch:
    """Crop and flip as the recipe says, each image by itself."""
    images = batch.images
    if recipe.crop:
        images = random_crop(images, recipe.crop, generator)
    if recipe.flip:
        images = random_flip(images, generator)
    return replace(batch, images=images)


@contextmanager
def arithmetic(model: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """bf16 where `precision` asks for it, or on a GPU by default, with the kind of attention that is fast there."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    with eager_attention(model, bf16 and device.type == "cpu"), torch.autocast(device.type, torch.bfloat16, bf16):
        yield
