"""Trains the victim's network again, for a defender, as a defence asks."""

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import nn

from vitrap.contracts import ImageSet, Objective
from vitrap.experiment.network import Network
from vitrap.experiment.progress import Progress
from vitrap.experiment.streams import ambient, training_streams
from vitrap.train.arithmetic import Arithmetic
from vitrap.train.loop import train
from vitrap.train.recipe import Recipe


@dataclass(frozen=True)
class Retraining:
    """Trains the network of victim and twin again, on images and for an objective of the defender's.

    It knows nothing of the attack, and stores nothing.

    Attributes:
        network: the network and where its weights start.
        recipe: the run's recipe.
        seed: the run's seed.
        device: where to train.
        arithmetic: how to compute.
        progress: displays how far the training is.
    """

    network: Network
    recipe: Recipe
    seed: int
    device: torch.device
    arithmetic: Arithmetic
    progress: Progress

    def __call__(
        self,
        images: ImageSet,
        objective: Objective | None = None,
        epochs: int | None = None,
        start: nn.Module | None = None,
    ) -> nn.Module:
        """Train and return a model; see `contracts.Retrain` for the arguments."""
        recipe = self.recipe if epochs is None else replace(self.recipe, epochs=epochs)
        model = self.network.build(self.seed, self.device) if start is None else deepcopy(start).requires_grad_(True)
        bar = self.progress("train for the defender", recipe.epochs * -(-len(images) // recipe.batch_size))
        with bar as tick, ambient(self.seed, "dropout", self.device):
            streams = training_streams(self.seed, self.device)
            train(model, images, recipe, streams, objective, tick, arithmetic=self.arithmetic)
        return model.eval().requires_grad_(False)
