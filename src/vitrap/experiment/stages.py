"""Making the stages of a run: a clean model (surrogate or twin) and a victim, each a folder with weights and facts."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vitrap.contracts import Access, Along, Fitted, Goal, ImageSet, Implant, Keeper, Objective
from vitrap.experiment.plan import Network, Plan, training_steps
from vitrap.experiment.predict import every_row, predict, spread, timed, triggered
from vitrap.experiment.progress import Steps, Tick
from vitrap.experiment.spec import Spec
from vitrap.experiment.store import STATE
from vitrap.experiment.streams import ambient, stream, training_streams
from vitrap.experiment.trigger_file import STORED, TRIGGER, check_networks, save_trigger
from vitrap.files import place_file, read_json, write_json
from vitrap.metrics.accuracy import attack_success, clean_accuracy
from vitrap.models.classifier import Classifier, save_model
from vitrap.train.arithmetic import Arithmetic
from vitrap.train.loop import train
from vitrap.train.recipe import Recipe

STREAM = "stream.safetensors"
"""In a trigger's stage: the state of the attacker's random stream after `fit`, where `implant` goes on."""
WATCHED = 500
"""Curves count at most so many held-out images, spread evenly."""


def make_clean(plan: Plan, network: Network, seed: int, show: AbstractContextManager[Tick], folder: Path) -> None:
    """Train a network on the clean training set into `folder`."""
    start = time.perf_counter()
    model = network.build(seed, plan.device)
    watch = _watch(plan)
    keeper = _keeper(folder, {"role": "clean"})
    curves = _train(plan, model, plan.world.train, seed, None, show, keeper, watch)
    seconds = {"train": keeper.seconds + time.perf_counter() - start}
    _keep(model, folder, {"curves": curves, "n_curves": watch.counts(), "seconds": seconds}, {"role": "clean"})


def make_retrained(plan: Plan, kept: ImageSet, show: AbstractContextManager[Tick], folder: Path) -> None:
    """Train the victim's network on what a filter kept, with cross-entropy, as the defender would."""
    start = time.perf_counter()
    model = plan.victim.build(plan.spec.seed, plan.device)
    keeper = _keeper(folder, carries(plan.spec, "retrained"))
    curves = _train(plan, model, kept, plan.spec.seed, None, show, keeper)
    facts = {
        "curves": curves,
        "seconds": {"train": keeper.seconds + time.perf_counter() - start},
        "n_poisoned": int(kept.poisoned.sum()),
    }
    _keep(model, folder, facts, carries(plan.spec, "retrained"))


@dataclass(frozen=True)
class Retraining:
    """Trains the network of victim and twin anew, as a defender asks; keeps nothing, and knows of no attack.

    Attributes:
        network: with its first weights.
        recipe: of the run.
        seed: of the run.
        device: where.
        arithmetic: how it computes.
        steps: how to show what is under way.
    """

    network: Network
    recipe: Recipe
    seed: int
    device: torch.device
    arithmetic: Arithmetic
    steps: Steps

    def __call__(
        self,
        images: ImageSet,
        objective: Objective | None = None,
        epochs: int | None = None,
        start: nn.Module | None = None,
    ) -> nn.Module:
        """As `contracts.Retrain` has it."""
        recipe = self.recipe if epochs is None else replace(self.recipe, epochs=epochs)
        model = self.network.build(self.seed, self.device) if start is None else deepcopy(start).requires_grad_(True)
        show = self.steps("train for the defender", recipe.epochs * -(-len(images) // recipe.batch_size))
        with show as tick, ambient(self.seed, "dropout", self.device):
            streams = training_streams(self.seed, self.device)
            train(model, images, recipe, streams, objective, tick, arithmetic=self.arithmetic)
        return model.eval().requires_grad_(False)


def make_trigger(plan: Plan, access: Access, show: AbstractContextManager[Tick], folder: Path) -> None:
    """Fit the attack into `folder`: its triggers, what it says of itself, and where its random stream ended."""
    spec, start = plan.spec, time.perf_counter()
    keeper = _keeper(folder, carries(spec, "trigger"), access.generator)
    access = replace(access, keeper=keeper)
    with show, ambient(spec.seed, "fit", plan.device):  # for first weights of networks, which draw from torch's state
        fitted = spec.attack.fit(access)
    for trigger in (fitted.trigger, fitted.stored):
        if trigger is not None:
            check_networks(trigger, spec.attack)
    keep_triggers(spec, fitted, folder)
    carried = {"vitrap": json.dumps(carries(spec, "trigger"))}
    save_file({"state": access.generator.get_state()}, folder / STREAM, carried)
    write_json(
        folder / "facts.json", {"report": dict(fitted.report), "seconds": keeper.seconds + time.perf_counter() - start}
    )


def read_stream(folder: Path, seed: int) -> torch.Generator:
    """The attacker's random stream as `fit` left it: of a trigger's or a victim's stage, or of a finished run.

    A run of an older vitrap has no such file: its stream begins anew.
    """
    generator = stream(seed, "attack")
    if (folder / STREAM).exists():
        generator.set_state(load_file(folder / STREAM)["state"])
    return generator


def make_victim(  # noqa: PLR0913 - all that a victim is made of
    plan: Plan,
    fitted: Fitted,
    implant: Implant,
    generator: torch.Generator,
    places: Mapping[str, Path],
    steps: Steps,
    folder: Path,
) -> None:
    """Poison the training set, train on it, edit the result, all into `folder`.

    Args:
        plan: of the run.
        fitted: the attack's trigger.
        implant: how it gets into the victim.
        generator: the random stream that the implant draws from.
        places: folders of the stages that it starts from: "trigger", and "twin" where the attack edits weights alone.
        steps: how to show what is under way.
        folder: the victim's own.
    """
    spec, train_set = plan.spec, plan.world.train
    facts: dict[str, Any] = {}
    poisoned = train_set
    if implant.poison is not None:
        with timed(facts.setdefault("seconds", {}), "poison"), steps("poison the training set", None):
            poisoned = implant.poison(train_set, stream(spec.seed, "poison"))
    start = time.perf_counter()
    if spec.attack.threat == "weights":
        # An attacker of weights starts from the model that an honest training gives: the twin.
        model = plan.victim.read(places["twin"] / "model.safetensors", plan.device)
        earlier = read_json(places["twin"] / "facts.json")
        facts |= {"curves": earlier["curves"], "n_curves": earlier["n_curves"]}
    else:
        keeper = _keeper(folder, carries(spec, "victim"), generator)
        model, learned = _train_victim(plan, poisoned, fitted, implant, keeper, steps)
        facts |= learned
        start -= keeper.seconds
    after, report = fitted, dict(fitted.report)
    if implant.edit is not None:
        show = steps(f"edit the weights by {spec.attack_name}", None)
        with show, ambient(spec.seed, "edit", plan.device):
            edited = implant.edit(model, stream(spec.seed, "edit"))
        model, after = edited.model, replace(fitted, trigger=edited.trigger)
        report |= edited.report
    facts.setdefault("seconds", {})["train"] = time.perf_counter() - start
    facts |= {"n_poisoned": int(poisoned.poisoned.sum()), "n_covers": int(poisoned.covers.sum()), "report": report}
    for name in (TRIGGER, STORED, STREAM):
        if (places["trigger"] / name).exists():
            place_file(places["trigger"] / name, folder / name)
    along = implant.objective.along if implant.objective else {}
    if along or implant.edit is not None:
        # The trigger is another one by now; what is stored carries the one that `fit` made.
        if implant.poison is not None and not (folder / STORED).exists():
            place_file(places["trigger"] / TRIGGER, folder / STORED)
        keep_triggers(spec, replace(after, stored=None), folder)
    if along:
        _keep_along(along, folder, carries(spec, "trained along"))
    _keep(model, folder, facts, carries(spec, "victim"))


def _train_victim(  # noqa: PLR0913 - as `make_victim`
    plan: Plan, poisoned: ImageSet, fitted: Fitted, implant: Implant, keeper: Keeper, steps: Steps
) -> tuple[nn.Module, dict[str, Any]]:
    """A victim trained on the poisoned set, and its curves."""
    model = plan.victim.build(plan.spec.seed, plan.device)
    watch = _watch(plan, fitted, implant)
    show = steps("train the victim", training_steps(plan.spec, len(poisoned)))
    curves = _train(plan, model, poisoned, plan.spec.seed, implant.objective, show, keeper, watch)
    return model, {"curves": curves, "n_curves": watch.counts()}


def keep_triggers(spec: Spec, fitted: Fitted, folder: Path) -> None:
    """Write what fires at test time and what poisoned images carry, each where there is such a trigger."""
    carried = json.dumps(carries(spec, "trigger"))
    for name, trigger in ((TRIGGER, fitted.trigger), (STORED, fitted.stored)):
        if trigger is not None:
            save_trigger(trigger, spec.attack, folder / name, vitrap=carried)


def carries(
    spec: Spec, role: Literal["victim", "trigger", "trained along", "retrained", "scores", "poisoned set"]
) -> dict[str, Any]:
    """What the metadata of every file that belongs to a backdoor, or may, say of it; no defence is part of that."""
    return {
        "role": role,
        "backdoor": True,
        "attack": spec.attack_name,
        "warning": f"{role} of a backdoor ({spec.attack_name}), implanted for research; not to be deployed",
        "spec": {k: v for k, v in spec.table().items() if k not in ("name", "defences")},
    }


@dataclass(frozen=True)
class Watch:
    """CDA and, of a victim, ASR on held-out images after each epoch, for the curves: nothing is chosen by them.

    Attributes:
        held: the images.
        arithmetic: how the model computes.
        goal: of the attack; None for a clean model, or where the trigger is not known yet.
        fired: gives the images with the trigger as it is by then; None as for `goal`.
    """

    held: ImageSet
    arithmetic: Arithmetic
    goal: Goal | None = None
    fired: Callable[[], ImageSet] | None = None

    def counts(self) -> dict[str, int]:
        """How many images each curve counts; one that would count none is left out."""
        counting = int(self.goal.counts(self.held.labels).sum()) if self.goal else 0
        return {name: n for name, n in {"cda": len(self.held), "asr": counting}.items() if n}

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Each curve's next value."""
        found, true = {}, self.held.labels
        if len(true):
            found["cda"] = clean_accuracy(predict(model, self.held, self.arithmetic), true).value
        if self.goal and self.fired and "asr" in self.counts():
            found["asr"] = attack_success(predict(model, self.fired(), self.arithmetic), true, self.goal).value
        return found


def _watch(plan: Plan, fitted: Fitted | None = None, implant: Implant | None = None) -> Watch:
    """What looks at a model in training; a trigger that is trained along is fired anew each time."""
    held = plan.world.choose
    held = held.take(spread(every_row(held), WATCHED))
    trigger = fitted.trigger if fitted else None
    if trigger is None or implant is None or not len(held):
        return Watch(held, plan.arithmetic)
    if implant.objective and implant.objective.along:
        return Watch(held, plan.arithmetic, plan.goal, partial(triggered, held, trigger))
    fired = triggered(held, trigger)
    return Watch(held, plan.arithmetic, plan.goal, lambda: fired)


def _train(  # noqa: PLR0913 - as `train`
    plan: Plan,
    model: nn.Module,
    data: ImageSet,
    seed: int,
    objective: Objective | None,
    show: AbstractContextManager[Tick],
    keeper: Keeper,
    watch: Watch | None = None,
) -> dict[str, list[float]]:
    with show as tick, ambient(seed, "dropout", plan.device):
        streams = training_streams(seed, plan.device)
        return train(model, data, plan.spec.recipe, streams, objective, tick, watch, plan.arithmetic, keeper)


def _keeper(folder: Path, carried: dict[str, Any], generator: torch.Generator | None = None) -> Keeper:
    """Keeps the state of a stage's work in its draft, with what the attack's own stream has drawn by then."""
    streams = {"attack": generator} if generator is not None else {}
    return Keeper(folder / STATE, streams, {"vitrap": json.dumps(carried)})


def _keep_along(along: Mapping[str, Along], folder: Path, carried: dict[str, Any]) -> None:
    """Keep what was trained with the victim, each weight under the name of its module."""
    weights = {f"{name}.{k}": v for name, each in along.items() for k, v in each.module.state_dict().items()}
    kept = {k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}
    save_file(kept, folder / "along.safetensors", {"vitrap": json.dumps(carried)})


def _keep(model: nn.Module, folder: Path, facts: dict[str, Any], carried: dict[str, Any]) -> None:
    write_json(folder / "facts.json", facts)
    metadata = {"vitrap": json.dumps(carried)}
    if isinstance(model, Classifier):
        save_model(model, folder / "model.safetensors", **metadata)
        return
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    save_file({k: v for k, v in weights.items() if isinstance(v, torch.Tensor)}, folder / "model.safetensors", metadata)
