"""The stages of one run, each taken from the store, or made there from what it depends on."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from vitrap.contracts import Access, Fitted, Implant
from vitrap.experiment.plan import Network, Plan, training_steps
from vitrap.experiment.progress import Steps
from vitrap.experiment.stages import make_clean, make_trigger, make_victim, read_stream
from vitrap.experiment.store import Store
from vitrap.experiment.streams import stream
from vitrap.experiment.trigger_file import read_fitted
from vitrap.files import read_json

Redo = Literal["nothing", "victim", "all"]
"""What is made anew though it is there."""


@dataclass(frozen=True)
class Stages:
    """Gives the folder of each stage of a run; whatever is missing is made first.

    Attributes:
        plan: of the run.
        store: where stages are kept.
        redo: what is made anew.
        steps: how to show what is under way.
    """

    plan: Plan
    store: Store
    redo: Redo
    steps: Steps

    def surrogates(self) -> dict[str, Path]:
        """The attacker's own networks, by name; one that comes ready from a checkpoint has no stage."""
        return {
            name: self._clean(name, network, seed)
            for name, (network, seed) in self.plan.surrogates().items()
            if network.checkpoint is None
        }

    def twin(self) -> Path:
        """The clean twin."""
        return self._clean("twin", self.plan.victim, self.plan.spec.seed)

    def trigger(self, surrogates: dict[str, Path]) -> Path:
        """What the attack's `fit` comes to."""
        plan = self.plan

        def make(folder: Path) -> None:
            ready = {
                name: ready_surrogate(plan, network, surrogates.get(name))
                for name, (network, _) in plan.surrogates().items()
            }
            access = Access(
                plan.world.train,
                ready.get("surrogate"),
                stream(plan.spec.seed, "attack"),
                ready.get("test_surrogate"),
                plan.other.train if plan.other else None,
            )
            make_trigger(plan, access, self.steps(f"fit {plan.spec.attack_name}", None), folder)

        return self.store.stage(plan.trigger_stage(), make, self.redo == "all")

    def victim(self, trigger: Path, twin: Path | None) -> Path:
        """The victim; one whose attacker edits weights alone starts from the twin."""

        def make(folder: Path) -> None:
            fitted = fit_of(self.plan, trigger)
            generator = read_stream(trigger, self.plan.spec.seed)
            implant = implant_of(self.plan, fitted, generator)
            places = {"trigger": trigger} | ({"twin": twin} if twin else {})
            make_victim(self.plan, fitted, implant, generator, places, self.steps, folder)

        return self.store.stage(self.plan.victim_stage(), make, self.redo != "nothing")

    def _clean(self, name: str, network: Network, seed: int) -> Path:
        """A model trained on the clean training set."""
        ticks = training_steps(self.plan.spec, len(self.plan.world.train))
        show = self.steps(f"train the {name.replace('_', ' ')}", ticks)
        make = partial(make_clean, self.plan, network, seed, show)
        return self.store.stage(self.plan.clean_stage(network, seed), make, self.redo == "all")


def ready_surrogate(plan: Plan, network: Network, place: Path | None) -> nn.Module:
    """A surrogate with its weights, frozen: from its stage, or where there is none from its checkpoint."""
    if place is None:
        return network.build(0, plan.device).requires_grad_(False)
    return network.read(place / "model.safetensors", plan.device)


def fit_of(plan: Plan, trigger: Path) -> Fitted:
    """What `fit` came to, from the trigger's stage."""
    fitted = read_fitted(trigger, plan.spec.attack, device=plan.device)
    return replace(fitted, report=read_json(trigger / "facts.json")["report"])


def implant_of(plan: Plan, fitted: Fitted, generator: torch.Generator) -> Implant:
    """How the trigger gets into the victim; what is drawn for it comes from `generator`."""
    other = plan.other.train if plan.other else None
    return plan.spec.attack.implant(Access(plan.world.train, None, generator, other=other), fitted)
