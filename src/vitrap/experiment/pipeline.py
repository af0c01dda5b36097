"""Which stages a run has, and what each is made from: `Stages` returns their folders, and makes what is missing.

How each is made is in make_stages.py.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from vitrap.contracts import Access, Fitted, Implant
from vitrap.experiment.make_stages import make_clean, make_trigger, make_victim, read_stream
from vitrap.experiment.plan import Network, Plan, training_steps
from vitrap.experiment.progress import Progress
from vitrap.experiment.store import Store
from vitrap.experiment.streams import stream
from vitrap.experiment.trigger_file import read_fitted
from vitrap.files import read_json

Redo = Literal["nothing", "victim", "all"]
"""What is made again although the store has it."""


@dataclass(frozen=True)
class Stages:
    """Returns the folder of each stage of a run; a stage that is missing is made first.

    Attributes:
        plan: the run's plan.
        store: where stages are kept.
        redo: what is made again although it is there.
        progress: displays what is being made.
    """

    plan: Plan
    store: Store
    redo: Redo
    progress: Progress

    def surrogates(self) -> dict[str, Path]:
        """The stages of the attacker's own networks, by name; one that is read from a checkpoint has no stage."""
        return {
            name: self._clean(name, network, seed)
            for name, (network, seed) in self.plan.surrogates().items()
            if network.checkpoint is None
        }

    def twin(self) -> Path:
        """The stage of the clean twin."""
        return self._clean("twin", self.plan.victim, self.plan.spec.seed)

    def trigger(self, surrogates: dict[str, Path]) -> Path:
        """The stage of the trigger: the result of the attack's `fit`."""
        plan = self.plan

        def make(folder: Path) -> None:
            """Give the attack what it may see, and have it fit its trigger."""
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
            bar = self.progress(f"fit {plan.spec.attack_name}", None)
            make_trigger(plan, access, bar, folder)

        return self.store.stage(plan.trigger_stage(), make, self.redo == "all")

    def victim(self, trigger: Path, twin: Path | None) -> Path:
        """The stage of the victim; where the attacker edits weights alone, it starts from the twin."""

        def make(folder: Path) -> None:
            """Ask the attack how the trigger gets into the victim, and train or edit one accordingly."""
            fitted = fit_of(self.plan, trigger)
            generator = read_stream(trigger, self.plan.spec.seed)
            implant = implant_of(self.plan, fitted, generator)
            places = {"trigger": trigger} | ({"twin": twin} if twin else {})
            make_victim(self.plan, fitted, implant, generator, places, self.progress, folder)

        return self.store.stage(self.plan.victim_stage(), make, self.redo != "nothing")

    def _clean(self, name: str, network: Network, seed: int) -> Path:
        """The stage of a model that is trained on the clean training set."""
        ticks = training_steps(self.plan.spec, len(self.plan.world.train))
        bar = self.progress(f"train the {name.replace('_', ' ')}", ticks)
        make = partial(make_clean, self.plan, network, seed, bar)
        return self.store.stage(self.plan.clean_stage(network, seed), make, self.redo == "all")


def ready_surrogate(plan: Plan, network: Network, place: Path | None) -> nn.Module:
    """A surrogate with its weights, frozen: read from its stage, or from its checkpoint where it has no stage."""
    if place is None:
        return network.build(0, plan.device).requires_grad_(False)
    return network.read(place / "model.safetensors", plan.device)


def fit_of(plan: Plan, trigger: Path) -> Fitted:
    """The result of the attack's `fit`, read from the trigger's stage."""
    fitted = read_fitted(trigger, plan.spec.attack, device=plan.device)
    return replace(fitted, report=read_json(trigger / "facts.json")["report"])


def implant_of(plan: Plan, fitted: Fitted, generator: torch.Generator) -> Implant:
    """How the trigger gets into the victim, as the attack says; it draws from `generator`."""
    other = plan.other.train if plan.other else None
    return plan.spec.attack.implant(Access(plan.world.train, None, generator, other=other), fitted)
