"""The training loop: the same steps for every attack.

The set lives on the device as 8-bit pixels; batches are gathered, augmented and learned from there. Where it is mapped
from a file, a thread gathers them on the host ahead of time. Nothing in a step waits for the device: losses stay
where they arise and are read once an epoch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import Batch, Criterion, ImageSet, Objective, Trigger
from vitrap.data.augment import random_crop, random_flip, random_jitter
from vitrap.errors import UserError
from vitrap.images import Gathered
from vitrap.tensors.pixels import round8
from vitrap.train.arithmetic import Arithmetic, compiled, usual
from vitrap.train.combine import Combination
from vitrap.train.prefetch import prefetched
from vitrap.train.recipe import Recipe

Curves = dict[str, list[float]]
MOMENTUM = 0.9
"""Of SGD."""


@dataclass(frozen=True)
class Streams:
    """The random streams of a training, each with one purpose, so that a victim and its twin share them all.

    Attributes:
        order: of the images; on the CPU.
        augmentation: on the device.
        projection: the order in which conflicting gradients meet; on the CPU.
    """

    order: torch.Generator
    augmentation: torch.Generator
    projection: torch.Generator


def train(  # noqa: PLR0913 - all that a training is made of
    model: nn.Module,
    data: ImageSet,
    recipe: Recipe,
    streams: Streams,
    objective: Objective | None = None,
    tick: Callable[[], None] = lambda: None,
    watch: Callable[[nn.Module], Mapping[str, float]] | None = None,
    arithmetic: Arithmetic | None = None,
) -> Curves:
    """Train `model` in place on `data` and leave it in evaluation mode.

    Args:
        model: a function of images in [0, 1], on the device of `data`.
        data: the training set, poisoned or not.
        recipe: how.
        streams: what is random about it.
        objective: what it is for; None for the recipe's cross-entropy.
        tick: called after each step.
        watch: measures the model after each epoch, in evaluation mode; it must draw nothing from torch's random state.
        arithmetic: how to compute; None for what the recipe's precision stands for on the device.

    Returns:
        By epoch: the mean of each loss term over the batches that had it, learned weights, and what `watch` found.

    Raises:
        UserError: a loss term is no longer finite.
    """
    arithmetic = arithmetic or usual(recipe.precision, data.device)
    seen: Any = compiled(model) if arithmetic.compiled and objective is None else model
    objective, criterion = objective or Objective(cross_entropy), smoothed(recipe.label_smoothing)
    combination = Combination(objective, list(model.parameters()), streams.projection)
    optimiser = make_optimiser(model, recipe, combination.scales)
    curves: Curves = {}
    steps = recipe.epochs * math.ceil(len(data) / recipe.batch_size)
    poisoned = data.poisoned.cpu()
    model.train()
    for epoch in range(recipe.epochs):
        found: dict[str, Tensor] = {}
        counts: dict[str, list[int]] = {}
        order = torch.randperm(len(data), generator=streams.order).split(recipe.batch_size)
        with arithmetic.attending(model), prefetched(data, order) as batches:
            for step, (rows, pixels) in enumerate(batches, epoch * len(order)):
                for group in optimiser.param_groups:
                    group["lr"] = recipe.lr * warmup_cosine(step / steps, recipe.warmup)
                batch = next_batch(data, rows, poisoned[rows], recipe, streams.augmentation, objective.stamp, pixels)
                with arithmetic.autocast(data.device):
                    terms = objective.terms(seen, batch, criterion)
                descend(optimiser, combination, terms, recipe.clip)
                for name, term in terms.items():
                    found.setdefault(name, term.new_zeros(len(order)))[step % len(order)] = term.detach()
                    counts.setdefault(name, [0] * len(order))[step % len(order)] = len(rows)
                tick()
        means = {name: mean(terms, counts[name]) for name, terms in found.items()}
        for name, value in {**means, **combination.learned(), **_watched(model, watch)}.items():
            curves.setdefault(name, []).append(value)
            if not math.isfinite(value):
                raise UserError(f"training diverged ({name} is {value}); lower recipe.lr = {recipe.lr:g}")
    model.eval()
    return curves


def mean(terms: Float[Tensor, " steps"], counts: Sequence[int]) -> float:
    """A loss term over an epoch, each batch weighing as much as it has images; waits for the device.

    Args:
        terms: of each batch, on any device.
        counts: images of each batch that has the term, else 0.
    """
    return (terms.cpu().double() @ torch.tensor(counts, dtype=torch.float64) / sum(counts)).item()


def _watched(model: nn.Module, watch: Callable[[nn.Module], Mapping[str, float]] | None) -> Mapping[str, float]:
    """What `watch` says of the model as it would be used; training goes on as it was."""
    if watch is None:
        return {}
    found = watch(model.eval())
    model.train()
    return found


def descend(
    optimiser: torch.optim.Optimizer, combination: Combination, terms: Mapping[str, Tensor], clip: float
) -> None:
    """One step down what the loss terms ask for together."""
    optimiser.zero_grad(set_to_none=True)
    combination.backward(terms)
    if clip:
        nn.utils.clip_grad_norm_(combination.weights, clip)
    optimiser.step()


def next_batch(  # noqa: PLR0913 - one step's worth of everything
    data: ImageSet,
    rows: Int64[Tensor, " b"],
    poisoned: Bool[Tensor, " b"],
    recipe: Recipe,
    augmentation: torch.Generator,
    stamp: Trigger | None,
    pixels: Gathered | None = None,
) -> Batch:
    """The images of `rows` as the model is to see them: `stamp` comes after augmentation and is rounded to 8 bits.

    Rows are on the CPU; of a mapped set, `pixels` are theirs where they have been gathered already.
    """
    batch = data.batch(rows, poisoned, bare=stamp is not None, pixels=pixels)
    batch = augment(batch, recipe, augmentation)
    if stamp is None or not len(batch.poisoned):
        return batch
    with torch.no_grad():
        stamped = round8(stamp(batch.images[batch.poisoned]))
    return replace(batch, images=batch.images.index_copy(0, batch.poisoned, stamped))


def cross_entropy(model: nn.Module, batch: Batch, criterion: Criterion) -> Mapping[str, Float[Tensor, ""]]:
    """The neutral objective's terms."""
    return {"cross_entropy": criterion(model(batch.images), batch.labels)}


def smoothed(label_smoothing: float) -> Criterion:
    """Cross-entropy with a share of each label spread over all classes."""
    return partial(functional.cross_entropy, label_smoothing=label_smoothing)


def make_optimiser(model: nn.Module, recipe: Recipe, more: Sequence[nn.Parameter] = ()) -> torch.optim.Optimizer:
    """The recipe's, with decay of matrices only, as ViTs are trained: biases, norms, tokens and `more` stay free."""
    weights = [w for w in model.parameters() if w.requires_grad]
    matrices = [w for w in weights if w.ndim >= 2 and w.shape[0] > 1]
    others = [w for w in weights if not (w.ndim >= 2 and w.shape[0] > 1)] + list(more)
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=MOMENTUM, fused=True)
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)


def warmup_cosine(progress: float, warmup: float) -> float:
    """The learning rate over its peak at `progress` in [0, 1): a line up to `warmup`, then half a cosine down.

    Never exactly 0 at the first step, which would be wasted.
    """
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def augment(batch: Batch, recipe: Recipe, generator: torch.Generator) -> Batch:
    """Crop, flip and jitter as the recipe says, each image by itself."""
    images = batch.images
    if recipe.crop:
        images = random_crop(images, recipe.crop, generator)
    if recipe.flip:
        images = random_flip(images, generator)
    if recipe.jitter:
        images = random_jitter(images, recipe.jitter, generator)
    return replace(batch, images=images)
