"""`tune`: fine-tunes a copy of the suspect's model, by default on the few clean images; repairs share it.

A repair states what is special about it: its objective, its step (a sharpness-aware one, an adversarial one, one that
keeps pruned channels at 0), which weights learn, or how the learning rate follows the losses.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from vitrap.contracts import ImageSet, Objective, Suspect
from vitrap.errors import UserError
from vitrap.probe import weight_fault
from vitrap.train.arithmetic import uncompiled
from vitrap.train.loop import Curves, Epoch, Step, Streams, add_to_curves, make_learner, recipe_schedule, train_epochs
from vitrap.train.recipe import ARITHMETIC, Recipe

Control = Callable[[nn.Module, Epoch, float], float]
"""Returns the next epoch's learning rate, given the model in evaluation mode, an epoch's losses, and its rate."""


@dataclass(frozen=True)
class Tuning:
    """One fine-tuning, as a repair wants it.

    Attributes:
        defence: the repair's name, for error messages.
        recipe: hyper-parameters. Its arithmetic is ignored: the copy computes as the suspect does.
        streams: random streams, drawn from the defender's own generator.
        objective: the loss terms to minimise; None for cross-entropy.
        step: what a step does; None for a plain step.
        control: sets the learning rate from epoch to epoch, from the recipe's on; None for the recipe's schedule.
        model: the model to train, in place: a copy that the repair has changed already, or one that it retrained; None
            for a copy of the suspect's.
        weights: returns the weights of that model that learn; None: all do.
        images: the training set; None for the clean images.
        training: whether the copy is in training mode, in which dropout is on and batch norm updates its statistics.
    """

    defence: str
    recipe: Recipe
    streams: Streams
    objective: Objective | None = None
    step: Step | None = None
    control: Control | None = None
    model: nn.Module | None = None
    weights: Callable[[nn.Module], Iterable[nn.Parameter]] | None = None
    images: ImageSet | None = None
    training: bool = False


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model, frozen and in evaluation mode, and the mean of each loss by epoch."""

    model: nn.Module
    curves: Curves

    def last(self) -> dict[str, float]:
        """The losses of the last epoch."""
        return {name: curve[-1] for name, curve in self.curves.items()}


@torch.enable_grad()
def tune(suspect: Suspect, tuning: Tuning) -> Tuned:
    """Fine-tune a copy of the suspect's model, in evaluation mode unless the repair asks for training mode.

    Raises:
        UserError: the training diverges.
    """
    model = copy.deepcopy(suspect.model) if tuning.model is None else tuning.model
    images = suspect.clean if tuning.images is None else tuning.images
    # All weights learn, or those that the repair selects.
    model.requires_grad_(tuning.weights is None)
    for weight in tuning.weights(model) if tuning.weights else ():
        weight.requires_grad_(True)
    recipe, streams = tuning.recipe, tuning.streams
    arithmetic = uncompiled(suspect.compute, images.device)
    learner = make_learner(model, recipe, tuning.objective, streams, arithmetic)
    lr = recipe.lr

    def held_rate(progress: float) -> float:
        """The learning rate that the control has set last."""
        return lr

    curves: Curves = {}
    # Dropout draws from torch's own random state, which is set from the defender's stream here and restored at the end.
    with torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []):
        torch.set_rng_state(streams.preparation.get_state())
        model.train(tuning.training)
        schedule = held_rate if tuning.control else recipe_schedule(recipe)
        for epoch in train_epochs(learner, images, schedule, tuning.step):
            found = {**epoch.means(), **learner.combination.learned()}
            if wrong := add_to_curves(curves, found) or weight_fault(model.state_dict()):
                raise UserError(f"{tuning.defence} diverged ({wrong}); lower its lr = {recipe.lr:g}")
            if tuning.control is not None:
                lr = tuning.control(model.eval(), epoch, lr)
                model.train(tuning.training)
    model.zero_grad(set_to_none=True)
    return Tuned(model.eval().requires_grad_(False), curves)


def recipe_of(settings: Any, images: int) -> Recipe:
    """A recipe with those settings of a repair that have the names of a recipe's fields.

    A batch has at most `images` images. Fields of the arithmetic are left out, since the copy computes as the suspect
    does; a repair's setting called `attention`, say, means something else.
    """
    names = [f.name for f in fields(Recipe) if f.name not in ARITHMETIC and hasattr(settings, f.name)]
    named = {name: getattr(settings, name) for name in names}
    return Recipe(**{**named, "batch_size": min(settings.batch_size, images)})


def streams_of(generator: torch.Generator, device: torch.device) -> Streams:
    """The random streams of a training, with seeds drawn from the defender's generator."""
    order, augmentation, projection = torch.randint(2**62, (3,), generator=generator).tolist()
    preparation = int(torch.randint(2**62, (), generator=generator))
    return Streams(
        torch.Generator().manual_seed(order),
        torch.Generator(device).manual_seed(augmentation),
        torch.Generator().manual_seed(projection),
        torch.Generator().manual_seed(preparation),
    )
