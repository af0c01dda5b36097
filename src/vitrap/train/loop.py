"""The training loop, `train`; every attack and every repair trains with it.

The training set is on the device as 8-bit pixels, where batches are gathered and augmented. If it is mapped from a
file, a thread gathers batches on the host in advance. No step waits for the device: losses stay on it and are read once
an epoch.
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

from vitrap.contracts import Batch, Checkpointer, Criterion, ImageSet, Objective, Position, TrainingState
from vitrap.data.augment import random_crop, random_flip, random_jitter
from vitrap.errors import UserError
from vitrap.images import Gathered, Marks
from vitrap.probe import weight_fault
from vitrap.tensors.pixels import round8, straight_round8
from vitrap.train.arithmetic import Arithmetic, arithmetic_of, compiled
from vitrap.train.combine import Combination
from vitrap.train.optimiser import Schedule, make_optimiser, recipe_schedule
from vitrap.train.prefetch import prefetched
from vitrap.train.recipe import Recipe

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Layers that need more than one image in a batch to train on."""
Curves = dict[str, list[float]]
Terms = Mapping[str, Float[Tensor, ""]]


@dataclass(frozen=True)
class Streams:
    """The random streams of a training, one for each purpose; a victim and its twin have the same.

    Attributes:
        order: for the order of the images; on the CPU.
        augmentation: for augmentation; on the device.
        projection: for the order in which conflicting gradients are projected; on the CPU.
        preparation: for poison that is made batch by batch; on the CPU.
    """

    order: torch.Generator
    augmentation: torch.Generator
    projection: torch.Generator
    preparation: torch.Generator


@dataclass(frozen=True)
class Learner:
    """A model in training, with all that a step needs.

    Attributes:
        model: the model as steps call it, compiled or not.
        objective: the loss terms to minimise.
        criterion: the recipe's classification loss.
        combination: turns loss terms into gradients.
        optimiser: updates the weights.
        arithmetic: how the model computes.
        recipe: hyper-parameters of the training.
        streams: its random streams.
        parts: the trained weights, first of the model, then of each module trained along. The gradient of each part is
            clipped separately.
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
        """The trained weights of the model."""
        return self.parts[0]

    def terms(self, batch: Batch) -> Terms:
        """The loss terms of a batch, with their autograd graph."""
        with self.arithmetic.autocast(batch.images.device):
            return self.objective.terms(self.model, batch, self.criterion)

    def backward(self, terms: Terms) -> None:
        """Clear the gradients, and compute those of the terms together."""
        self.optimiser.zero_grad(set_to_none=True)
        self.combination.backward(terms)

    def step(self) -> None:
        """Clip the gradients, and update the weights."""
        if self.recipe.clip:
            for part in self.parts:
                nn.utils.clip_grad_norm_(part, self.recipe.clip)
        self.optimiser.step()

    def descend(self, terms: Terms) -> None:
        """Compute the gradients of the loss terms, and update the weights."""
        self.backward(terms)
        self.step()

    def set_rate(self, lr: float) -> None:
        """Set the model's learning rate; that of a group with its own peak is scaled by `lr / recipe.lr`, too."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * (lr / self.recipe.lr) if "peak" in group else lr


Step = Callable[[Learner, Batch], Terms]
"""One step of a training: it updates the weights, and returns the loss terms for the curves."""


class Epoch:
    """The loss terms of an epoch's batches, noted batch by batch; they stay on the device until they are read.

    Attributes:
        terms: values by name of the term; 0 for a batch without it, or still to come.
        counts: number of images of each batch that had the term; 0 for other batches.
    """

    def __init__(
        self,
        terms: Mapping[str, Float[Tensor, " batches"]] | None = None,
        counts: Mapping[str, list[int]] | None = None,
    ) -> None:
        """Begin an epoch, or go on with one whose first batches left these."""
        self.terms = dict(terms or {})
        self.counts = dict(counts or {})

    def note(self, number: int, batches: int, terms: Terms, images: int) -> None:
        """Store the terms of batch `number` of `batches`, which has `images` images."""
        for name, term in terms.items():
            if name not in self.terms:
                self.terms[name] = term.new_zeros(batches)
                self.counts[name] = [0] * batches
            self.terms[name][number] = term.detach()
            self.counts[name][number] = images

    def means(self) -> dict[str, float]:
        """Each term's mean over the epoch, weighted by images; this waits for the device."""
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
    checkpointer: Checkpointer | None = None,
) -> Curves:
    """Train `model` in place on `data` and leave it in evaluation mode.

    Args:
        model: a function of images in [0, 1], on the device of `data`.
        data: the training set, poisoned or not.
        recipe: hyper-parameters.
        streams: random streams.
        objective: the loss terms to minimise; None for the recipe's cross-entropy. Modules that are trained along with
            the model are left frozen and in evaluation mode, too.
        tick: called after each step.
        watch: measures the model after each epoch, in evaluation mode; it must draw nothing from torch's random state.
        arithmetic: how to compute; None for the recipe's own on the device.
        checkpointer: saves the training's state now and then; if it has one already, training goes on from there.

    Returns:
        Curves by epoch: the mean of each loss term over the batches that had it, learned weights, and the values that
        `watch` returned.

    Raises:
        UserError: the weights that training starts from have a fault; or a loss term or a weight is no longer finite.
    """
    # What learns: the model, what is trained along with it, and the weights of loss terms where these are learned.
    along = nn.ModuleList([one.module for one in objective.along.values()] if objective else ()).requires_grad_(True)
    learner = make_learner(model, recipe, objective, streams, arithmetic or arithmetic_of(recipe, model, data.device))
    modules = set_training(nn.ModuleList([model, along]))

    # Whether the weights were finite at first; looked at only where training fails, since a look waits for the device.
    finite = torch.stack([weight.isfinite().all() for weight in model.parameters()]).all()

    # Where it begins: at the start, or where an earlier call was stopped. Its steps count as ticks, too.
    curves: Curves = {}
    checkpointer = checkpointer or Checkpointer()
    state = TrainingState(
        {"model": model, "along": along, "scales": nn.ParameterList(learner.combination.scales)},
        learner.optimiser,
        {**vars(streams), **checkpointer.streams},
        data.device,
        curves,
    )
    begun = checkpointer.resume(state)
    steps_an_epoch = len(batched(torch.arange(len(data)), learner))
    for _ in range(begun.epoch * steps_an_epoch + begun.steps):
        tick()

    def reached(position: Position) -> None:
        """Report that a step is done, and give the checkpointer an opportunity to save the state."""
        tick()
        checkpointer(state, position)

    for epoch in train_epochs(learner, data, recipe_schedule(recipe), learner.objective.step, begun, reached):
        found = {**epoch.means(), **learner.combination.learned()}
        # Measure the model in evaluation mode; then training goes on as before.
        if watch is not None:
            modules.eval()
            found |= watch(model)
            set_training(modules)
        if wrong := add_to_curves(curves, found) or weight_fault(model.state_dict()):
            if not finite:
                raise UserError("the network to train has weights that are NaN or infinite; give sound weights")
            raise UserError(f"training diverged ({wrong}); lower recipe.lr = {recipe.lr:g}")

    modules.eval()
    along.requires_grad_(False).zero_grad(set_to_none=True)
    return curves


def make_learner(
    model: nn.Module, recipe: Recipe, objective: Objective | None, streams: Streams, arithmetic: Arithmetic
) -> Learner:
    """Prepare a model for training; weights learn that require a gradient.

    Args:
        model: the model.
        recipe: hyper-parameters.
        objective: the loss terms to minimise; None for cross-entropy, the only objective that is compiled.
        streams: random streams.
        arithmetic: how to compute.
    """
    forward: Any = compiled(model) if arithmetic.compiled and objective is None else model
    objective = objective or Objective(cross_entropy)
    modules = (model, *(one.module for one in objective.along.values()))
    parts = tuple([w for w in module.parameters() if w.requires_grad] for module in modules)
    combination = Combination(objective, [w for part in parts for w in part], streams.projection)
    optimiser = make_optimiser(model, recipe, combination.scales)
    for one, weights in zip(objective.along.values(), parts[1:], strict=True):
        optimiser.add_param_group({"params": weights, "lr": one.lr, "peak": one.lr, "weight_decay": 0.0})
    criterion = smoothed(recipe.label_smoothing)
    return Learner(forward, objective, criterion, combination, optimiser, arithmetic, recipe, streams, parts)


def set_training(modules: nn.ModuleList) -> nn.ModuleList:
    """Set training mode, except for frozen modules: in these dropout is off, and batch norm keeps its statistics."""
    modules.train()
    for module in modules.modules():
        weights = list(module.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            module.eval()
    return modules


def train_epochs(
    learner: Learner,
    data: ImageSet,
    schedule: Schedule,
    step: Step | None = None,
    begun: Position | None = None,
    reached: Callable[[Position], None] = lambda position: None,
) -> Iterator[Epoch]:
    """Train, and yield after each epoch; the caller may measure or change the model in between, and sets its mode.

    Args:
        learner: the model in training.
        data: the training set.
        schedule: returns the learning rate of each step.
        step: what a step does; None for `plain_step`.
        begun: how far the training is already; None for its start.
        reached: called after each step with the position that is reached.

    Raises:
        UserError: it is called within an autocast, which would keep the weights of the first step.
    """
    if torch.is_autocast_enabled(data.device.type):
        raise UserError("training within torch.autocast would not see its own steps; train outside of that block")
    recipe = learner.recipe
    marks = data.marks()
    step = step or plain_step
    done = begun or Position()
    for epoch in range(done.epoch, recipe.epochs):
        # The batches: all images in a new random order, without those that are done.
        drawn = learner.streams.order.get_state()
        batches = batched(torch.randperm(len(data), generator=learner.streams.order), learner)
        losses = Epoch(done.terms, done.counts)
        with learner.arithmetic.attending(learner.model), prefetched(data, batches[done.steps :]) as coming:
            for number, (rows, pixels) in enumerate(coming, done.steps):
                # A step, at the learning rate of its place in the schedule, on an augmented batch.
                learner.set_rate(schedule((epoch * len(batches) + number) / (recipe.epochs * len(batches))))
                batch = next_batch(learner, data, rows, marks, pixels)
                losses.note(number, len(batches), step(learner, batch), len(rows))
                reached(Position(epoch, number + 1, drawn, losses.terms, losses.counts))
        # The caller reads the means: that waits for the device.
        yield losses
        done = Position()


def batched(order: Int64[Tensor, " n"], learner: Learner) -> Sequence[Int64[Tensor, " b"]]:
    """Split an epoch into batches; a single last image joins the batch before it if the model has batch norm."""
    batches = order.split(learner.recipe.batch_size)
    modules = nn.ModuleList([learner.model, *(one.module for one in learner.objective.along.values())]).modules()
    if len(batches) < 2 or len(batches[-1]) > 1:
        return batches
    if not any(isinstance(module, BATCH_NORMS) and module.training for module in modules):
        return batches
    return (*batches[:-2], torch.cat(batches[-2:]))


def next_batch(
    learner: Learner, data: ImageSet, rows: Int64[Tensor, " b"], marks: Marks, pixels: Gathered | None = None
) -> Batch:
    """The batch of `rows` as the model sees it: augmented, with stored poison or with poison made for this batch.

    Args:
        learner: has recipe, random streams and objective.
        data: the training set.
        rows: row numbers, on the CPU.
        marks: `data.marks()`.
        pixels: `data.gather(rows)`; None to gather them now.
    """
    batch = data.batch(rows, marks, bare=learner.objective.prepare is not None, pixels=pixels)
    augmented = augment(batch, learner.recipe, learner.streams.augmentation)
    return prepared(augmented, learner.objective, learner.streams.preparation)


def augment(batch: Batch, recipe: Recipe, generator: torch.Generator) -> Batch:
    """Crop, flip and jitter each image as the recipe says."""
    images = batch.images
    if recipe.crop:
        images = random_crop(images, recipe.crop, generator)
    if recipe.flip:
        images = random_flip(images, generator)
    if recipe.jitter:
        images = random_jitter(images, recipe.jitter, generator)
    return replace(batch, images=images)


def prepared(batch: Batch, objective: Objective, generator: torch.Generator) -> Batch:
    """The batch with poison and covers that the objective makes, rounded to 8 bits as stored ones are."""
    if objective.prepare is None:
        return batch
    with torch.set_grad_enabled(bool(objective.along)):
        made = objective.prepare(batch, generator)
        touched = torch.cat([made.poison_at, made.cover_at])
        if not len(touched):
            return made
        # The gradient of rounding is 0. For modules that are trained along it is taken as 1 (straight-through).
        rounding = straight_round8 if objective.along else round8
        return replace(made, images=made.images.index_copy(0, touched, rounding(made.images[touched])))


def plain_step(learner: Learner, batch: Batch) -> Terms:
    """One step that minimises the batch's loss terms."""
    terms = learner.terms(batch)
    learner.descend(terms)
    return terms


def cross_entropy(model: nn.Module, batch: Batch, criterion: Criterion) -> Terms:
    """The loss terms of plain training: cross-entropy alone."""
    return {"cross_entropy": criterion(model(batch.images), batch.labels)}


def smoothed(label_smoothing: float) -> Criterion:
    """Cross-entropy with a share of each label spread over all classes."""
    return partial(functional.cross_entropy, label_smoothing=label_smoothing)


def mean(terms: Float[Tensor, " steps"], counts: Sequence[int]) -> float:
    """The mean of a loss term over an epoch, weighted by images; this waits for the device.

    Args:
        terms: the term's value in each batch, on any device.
        counts: number of images of each batch that has the term; 0 for other batches.
    """
    return (terms.cpu().double() @ torch.tensor(counts, dtype=torch.float64) / sum(counts)).item()


def add_to_curves(curves: Curves, found: Mapping[str, float]) -> str:
    """Append an epoch's values to the curves; returns the first that is not finite, in words, or ""."""
    for name, value in found.items():
        curves.setdefault(name, []).append(value)
    return next((f"{name} is {value}" for name, value in found.items() if not math.isfinite(value)), "")
