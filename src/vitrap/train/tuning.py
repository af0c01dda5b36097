"""Fine-tuning: what repairs share. A copy of the suspect's model is trained on, mostly on the few clean images.

A repair says what differs: its objective, its step (a sharpness-aware one, an adversarial one, one that keeps pruned
channels at 0), which weights learn, a learning rate that follows what the clean images say.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from vitrap.contracts import ImageSet, Objective, Suspect
from vitrap.errors import UserError
from vitrap.train.arithmetic import uncompiled
from vitrap.train.loop import Curves, Epoch, Step, Streams, epochs, falling, keep, make_learner
from vitrap.train.recipe import ARITHMETIC, Recipe

Control = Callable[[nn.Module, Epoch, float], float]
"""The model after an epoch, in evaluation mode, the epoch's losses and its learning rate to the next epoch's."""


@dataclass(frozen=True)
class Tuning:
    """One fine-tuning, as a repair wants it.

    Attributes:
        defence: the repair's name, for a refusal.
        recipe: how. Its precision says nothing here: the copy computes as the suspect does.
        streams: what is random about it, from the defender's own generator.
        objective: what for; None for cross-entropy.
        step: what a step does; None for going down the objective.
        control: the learning rate from epoch to epoch, starting with the recipe's; None for the recipe's schedule.
        model: what is trained, in place: a copy that the repair has changed already, or a model that it retrained;
            None for a copy of the suspect's.
        weights: which weights of that model learn; None for all.
        images: what it is trained on; None for the clean images.
        training: whether the copy is in training mode: dropout drops, and batch norm follows the images.
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
    """A model after fine-tuning: ready, frozen, apart from the suspect's; and the mean of each loss by epoch."""

    model: nn.Module
    curves: Curves

    def last(self) -> dict[str, float]:
        """The losses of the last epoch."""
        return {name: curve[-1] for name, curve in self.curves.items()}


@torch.enable_grad()
def tune(suspect: Suspect, tuning: Tuning) -> Tuned:
    """Train a copy of the suspect's model, in evaluation mode unless the repair asks for training mode.

    Raises:
        UserError: the training diverges.
    """
    model = copy.deepcopy(suspect.model) if tuning.model is None else tuning.model
    images = suspect.clean if tuning.images is None else tuning.images
    # All weights learn, or those that the repair names.
    model.requires_grad_(tuning.weights is None)
    for weight in tuning.weights(model) if tuning.weights else ():
        weight.requires_grad_(True)
    recipe, streams = tuning.recipe, tuning.streams
    arithmetic = uncompiled(suspect.compute, images.device)
    learner = make_learner(model, recipe, tuning.objective, streams, arithmetic)
    lr = recipe.lr

    def held(progress: float) -> float:
        """What the control has said last."""
        return lr

    curves: Curves = {}
    # Dropout draws from torch's own state, which is the defender's meanwhile, and afterwards as it was.
    with torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []):
        torch.set_rng_state(streams.preparation.get_state())
        model.train(tuning.training)
        for epoch in epochs(learner, images, held if tuning.control else falling(recipe), tuning.step):
            if wrong := keep(curves, {**epoch.means(), **learner.combination.learned()}):
                raise UserError(f"{tuning.defence} diverged ({wrong}); lower its lr = {recipe.lr:g}")
            if tuning.control is not None:
                lr = tuning.control(model.eval(), epoch, lr)
                model.train(tuning.training)
    model.zero_grad(set_to_none=True)
    return Tuned(model.eval().requires_grad_(False), curves)


def recipe_of(settings: Any, images: int) -> Recipe:
    """The recipe that a repair's settings of the same names stand for; a batch has at most all images.

    How it is computed is the suspect's business: a setting called `attention`, say, means something else.
    """
    names = [f.name for f in fields(Recipe) if f.name not in ARITHMETIC and hasattr(settings, f.name)]
    named = {name: getattr(settings, name) for name in names}
    return Recipe(**{**named, "batch_size": min(settings.batch_size, images)})


def streams_of(generator: torch.Generator, device: torch.device) -> Streams:
    """The streams of a training, each with a seed drawn from the defender's own."""
    order, augmentation, projection = torch.randint(2**62, (3,), generator=generator).tolist()
    preparation = int(torch.randint(2**62, (), generator=generator))
    return Streams(
        torch.Generator().manual_seed(order),
        torch.Generator(device).manual_seed(augmentation),
        torch.Generator().manual_seed(projection),
        torch.Generator().manual_seed(preparation),
    )
