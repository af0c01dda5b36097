"""The training loop: the same steps for every attack and every repair.

The set lives on the device as 8-bit pixels; batches are gathered, augmented and learned from there. Where it is mapped
from a file, a thread gathers them on the host ahead of time. Nothing in a step waits for the device: losses stay
where they arise and are read once an epoch.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from vitrap.contracts import Batch, Criterion, ImageSet, Keeper, Moving, Objective, Position
from vitrap.data.augment import random_crop, random_flip, random_jitter
from vitrap.errors import UserError
from vitrap.images import Gathered, Marks
from vitrap.tensors.pixels import round8, straight_round8
from vitrap.train.arithmetic import Arithmetic, arithmetic_of, compiled
from vitrap.train.combine import Combination
from vitrap.train.optimiser import Rate, falling, make_optimiser
from vitrap.train.prefetch import prefetched
from vitrap.train.recipe import Recipe

Curves = dict[str, list[float]]
Terms = Mapping[str, Float[Tensor, ""]]


@dataclass(frozen=True)
class Streams:
    """The random streams of a training, each with one purpose, so that a victim and its twin share them all.

    Attributes:
        order: of the images; on the CPU.
        augmentation: on the device.
        projection: the order in which conflicting gradients meet; on the CPU.
        preparation: of poison that is made batch by batch; on the CPU.
    """

    order: torch.Generator
    augmentation: torch.Generator
    projection: torch.Generator
    preparation: torch.Generator


@dataclass(frozen=True)
class Learner:
    """A model in training, with all that a step takes.

    Attributes:
        model: as steps see it: compiled, or as it is.
        objective: what it is trained for.
        criterion: the recipe's loss.
        combination: how loss terms become gradients.
        optimiser: how gradients become a step.
        arithmetic: how the model computes.
        recipe: how it is trained.
        streams: what is random about it.
        parts: the weights that learn, of the model first, then of each module trained along; clipped apart.
    """

    model: nn.Module
    objective: Objective
    criterion: Criterion
    combination: Combination
    optimiser: torch.optim.Optimizer
    arithmetic: Arithmetic
    recipe: Recipe
    streams: Streams
    parts: tuple[Sequence[nn.Parameter], ...]

    @property
    def weights(self) -> Sequence[nn.Parameter]:
        """What is trained of the model."""
        return self.parts[0]

    def terms(self, batch: Batch) -> Terms:
        """The loss terms of a batch, with their graph."""
        with self.arithmetic.autocast(batch.images.device):
            return self.objective.terms(self.model, batch, self.criterion)

    def backward(self, terms: Terms) -> None:
        """Leave in each weight's `grad` what the terms together ask of it, and nothing of earlier ones."""
        self.optimiser.zero_grad(set_to_none=True)
        self.combination.backward(terms)

    def step(self) -> None:
        """Clip the gradients and go down them."""
        if self.recipe.clip:
            for part in self.parts:
                nn.utils.clip_grad_norm_(part, self.recipe.clip)
        self.optimiser.step()

    def descend(self, terms: Terms) -> None:
        """One step down what the loss terms ask for together."""
        self.backward(terms)
        self.step()

    def set_rate(self, lr: float) -> None:
        """The model learns at `lr` from now on, and what is trained along at the same share of its own peak."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * (lr / self.recipe.lr) if "peak" in group else lr


Step = Callable[[Learner, Batch], Terms]
"""One step of a training: it moves the weights and returns the loss terms for the curves."""


@dataclass(frozen=True)
class Epoch:
    """The loss terms of one epoch, batch by batch; they stay on the device until somebody reads them.

    Attributes:
        terms: by name; 0 for a batch that had none, or is still to come.
        counts: images of each batch that had the term, else 0.
    """

    terms: dict[str, Float[Tensor, " batches"]]
    counts: dict[str, list[int]]

    def note(self, number: int, batches: int, terms: Terms, images: int) -> None:
        """Write down the terms of a batch, one of so many, and how many images it had."""
        for name, term in terms.items():
            if name not in self.terms:
                self.terms[name] = term.new_zeros(batches)
                self.counts[name] = [0] * batches
            self.terms[name][number] = term.detach()
            self.counts[name][number] = images

    def means(self) -> dict[str, float]:
        """Each term's mean over the epoch, each batch weighing as much as it has images; waits for the device."""
        return {name: mean(terms, self.counts[name]) for name, terms in self.terms.items()}


def train(  # noqa: PLR0913 - all that a training is made of
    model: nn.Module,
    data: ImageSet,
    recipe: Recipe,
    streams: Streams,
    objective: Objective | None = None,
    tick: Callable[[], None] = lambda: None,
    watch: Callable[[nn.Module], Mapping[str, float]] | None = None,
    arithmetic: Arithmetic | None = None,
    keeper: Keeper | None = None,
) -> Curves:
    """Train `model` in place on `data` and leave it in evaluation mode.

    Args:
        model: a function of images in [0, 1], on the device of `data`.
        data: the training set, poisoned or not.
        recipe: how.
        streams: what is random about it.
        objective: what it is for; None for the recipe's cross-entropy. Modules that it has trained along are left
            frozen and in evaluation mode, too.
        tick: called after each step.
        watch: measures the model after each epoch, in evaluation mode; it must draw nothing from torch's random state.
        arithmetic: how to compute; None for what the recipe's precision stands for on the device.
        keeper: keeps the training's state now and then; where it has one already, training goes on from there.

    Returns:
        By epoch: the mean of each loss term over the batches that had it, learned weights, and what `watch` found.

    Raises:
        UserError: a loss term is no longer finite.
    """
    # What learns: the model, what is trained along with it, and the weights of loss terms where these are learned.
    along = nn.ModuleList([one.module for one in objective.along.values()] if objective else ()).requires_grad_(True)
    learner = make_learner(model, recipe, objective, streams, arithmetic or arithmetic_of(recipe, model, data.device))
    together = set_training(nn.ModuleList([model, along]))

    # Where it begins: anew, or where an earlier call was stopped, whose steps count for the caller, too.
    curves: Curves = {}
    keeper = keeper or Keeper()
    moving = Moving(
        {"model": model, "along": along, "scales": nn.ParameterList(learner.combination.scales)},
        learner.optimiser,
        {**vars(streams), **keeper.streams},
        data.device,
        curves,
    )
    begun = keeper.resume(moving)
    for _ in range(begun.epoch * len(batched(torch.arange(len(data)), learner)) + begun.steps):
        tick()

    def reached(position: Position) -> None:
        """Say that a step is done, and keep the state that the training has by now."""
        tick()
        keeper(moving, position)

    for epoch in epochs(learner, data, falling(recipe), learner.objective.step, begun, reached):
        found = {**epoch.means(), **learner.combination.learned()}
        # Measure the model as it would be used; then training goes on as it was.
        if watch is not None:
            together.eval()
            found |= watch(model)
            set_training(together)
        if wrong := keep(curves, found):
            raise UserError(f"training diverged ({wrong}); lower recipe.lr = {recipe.lr:g}")

    together.eval()
    along.requires_grad_(False).zero_grad(set_to_none=True)
    return curves


def make_learner(
    model: nn.Module, recipe: Recipe, objective: Objective | None, streams: Streams, arithmetic: Arithmetic
) -> Learner:
    """A model ready to be trained: those of its weights that require a gradient, and all of what is trained along.

    Args:
        model: what is trained.
        recipe: how.
        objective: what for; None for cross-entropy, the only one that is compiled.
        streams: what is random about it.
        arithmetic: how to compute.
    """
    seen: Any = compiled(model) if arithmetic.compiled and objective is None else model
    objective = objective or Objective(cross_entropy)
    modules = (model, *(one.module for one in objective.along.values()))
    parts = tuple([w for w in module.parameters() if w.requires_grad] for module in modules)
    combination = Combination(objective, [w for part in parts for w in part], streams.projection)
    optimiser = make_optimiser(model, recipe, combination.scales)
    for one, weights in zip(objective.along.values(), parts[1:], strict=True):
        optimiser.add_param_group({"params": weights, "lr": one.lr, "peak": one.lr, "weight_decay": 0.0})
    criterion = smoothed(recipe.label_smoothing)
    return Learner(seen, objective, criterion, combination, optimiser, arithmetic, recipe, streams, parts)


def set_training(modules: nn.ModuleList) -> nn.ModuleList:
    """Training mode, but for what is frozen: there nothing drops out, and batch norm keeps its statistics."""
    modules.train()
    for module in modules.modules():
        weights = list(module.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            module.eval()
    return modules


def epochs(
    learner: Learner,
    data: ImageSet,
    rate: Rate,
    step: Step | None = None,
    begun: Position | None = None,
    reached: Callable[[Position], None] = lambda position: None,
) -> Iterator[Epoch]:
    """Train, and halt after each epoch: what happens in between is up to the caller, as is the mode of the modules.

    Args:
        learner: what is trained.
        data: what it is trained on.
        rate: the learning rate, asked before each step.
        step: what a step does; None for `plain_step`.
        begun: how far the training is already; None for its start.
        reached: called after each step with how far it is by then.

    Raises:
        UserError: an autocast is on around it, which would go on with the weights of the first step.
    """
    if torch.is_autocast_enabled(data.device.type):
        raise UserError("training within torch.autocast would not see its own steps; train outside of that block")
    recipe, marks = learner.recipe, data.marks()
    step, done = step or plain_step, begun or Position()
    for epoch in range(done.epoch, recipe.epochs):
        # The batches: all images in an order drawn anew, without those that are done.
        drawn = learner.streams.order.get_state()
        batches = batched(torch.randperm(len(data), generator=learner.streams.order), learner)
        losses = Epoch(dict(done.terms), dict(done.counts))
        with learner.arithmetic.attending(learner.model), prefetched(data, batches[done.steps :]) as coming:
            for number, (rows, pixels) in enumerate(coming, done.steps):
                # A step: at the rate of its place, on a batch as the model is to see it.
                learner.set_rate(rate((epoch * len(batches) + number) / (recipe.epochs * len(batches))))
                batch = next_batch(learner, data, rows, marks, pixels)
                losses.note(number, len(batches), step(learner, batch), len(rows))
                reached(Position(epoch, number + 1, drawn, losses.terms, losses.counts))
        # The epoch's means: they wait for the device, and so are left to who asks for them.
        yield losses
        done = Position()


def batched(order: Int64[Tensor, " n"], learner: Learner) -> Sequence[Int64[Tensor, " b"]]:
    """The batches of an epoch: a last one of a single image joins the one before where batch norm could not take it."""
    batches = order.split(learner.recipe.batch_size)
    modules = nn.ModuleList([learner.model, *(one.module for one in learner.objective.along.values())]).modules()
    if len(batches) < 2 or len(batches[-1]) > 1:
        return batches
    if not any(isinstance(module, _BatchNorm) and module.training for module in modules):
        return batches
    return (*batches[:-2], torch.cat(batches[-2:]))


def next_batch(
    learner: Learner, data: ImageSet, rows: Int64[Tensor, " b"], marks: Marks, pixels: Gathered | None = None
) -> Batch:
    """The images of `rows` as the model is to see them: augmented, with the poison that was stored, or made anew.

    Args:
        learner: whose recipe, random streams and objective they are made by.
        data: where they come from.
        rows: on the CPU.
        marks: `data.marks()`.
        pixels: `data.gather(rows)`; None to gather them now.
    """
    batch = data.batch(rows, marks, bare=learner.objective.prepare is not None, pixels=pixels)
    augmented = augment(batch, learner.recipe, learner.streams.augmentation)
    return prepared(augmented, learner.objective, learner.streams.preparation)


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


def prepared(batch: Batch, objective: Objective, generator: torch.Generator) -> Batch:
    """The batch with the objective's own poison and covers, rounded to 8 bits as if they were stored."""
    if objective.prepare is None:
        return batch
    with torch.set_grad_enabled(bool(objective.along)):
        made = objective.prepare(batch, generator)
        touched = torch.cat([made.poisoned, made.covers])
        if not len(touched):
            return made
        # Nothing learns through a rounding, whose slope is 0: for what is trained along it is taken as 1.
        rounding = straight_round8 if objective.along else round8
        return replace(made, images=made.images.index_copy(0, touched, rounding(made.images[touched])))


def plain_step(learner: Learner, batch: Batch) -> Terms:
    """One step down the batch's loss terms."""
    terms = learner.terms(batch)
    learner.descend(terms)
    return terms


def cross_entropy(model: nn.Module, batch: Batch, criterion: Criterion) -> Terms:
    """The neutral objective's terms."""
    return {"cross_entropy": criterion(model(batch.images), batch.labels)}


def smoothed(label_smoothing: float) -> Criterion:
    """Cross-entropy with a share of each label spread over all classes."""
    return partial(functional.cross_entropy, label_smoothing=label_smoothing)


def mean(terms: Float[Tensor, " steps"], counts: Sequence[int]) -> float:
    """A loss term over an epoch, each batch weighing as much as it has images; waits for the device.

    Args:
        terms: of each batch, on any device.
        counts: images of each batch that has the term, else 0.
    """
    return (terms.cpu().double() @ torch.tensor(counts, dtype=torch.float64) / sum(counts)).item()


def keep(curves: Curves, found: Mapping[str, float]) -> str:
    """Add what was found to the curves; the first of it that is not finite, in words, else ""."""
    for name, value in found.items():
        curves.setdefault(name, []).append(value)
    return next((f"{name} is {value}" for name, value in found.items() if not math.isfinite(value)), "")
