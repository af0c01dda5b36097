"""The stages of a run, surrogates, trigger, clean twin and victim: which it has, and how each is made.

A stage is a folder with weights and `facts.json`, which store.py keeps. A model retrained after a filter is one, too.
"""

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
from safetensors.torch import save
from torch import nn

from vitrap.contracts import Access, Along, Fitted, Goal, ImageSet, Implant, Keeper, Objective
from vitrap.errors import UserError
from vitrap.experiment.plan import Network, Plan, training_steps
from vitrap.experiment.predict import every_row, predict, spread, timed, triggered
from vitrap.experiment.progress import Progress, Tick
from vitrap.experiment.spec import Spec
from vitrap.experiment.store import STATE, Store
from vitrap.experiment.streams import ambient, stream, training_streams
from vitrap.experiment.trigger_file import STORED, TRIGGER, check_networks, read_fitted, save_trigger
from vitrap.files import place_file, read_json, write_bytes, write_json
from vitrap.metrics.accuracy import attack_success, clean_accuracy
from vitrap.models.classifier import Classifier, save_model
from vitrap.tensor_file import read_tensor_file
from vitrap.train.arithmetic import Arithmetic
from vitrap.train.loop import train
from vitrap.train.recipe import Recipe

STREAM = "stream.safetensors"
"""File of a trigger's stage: the state of the attacker's random stream after `fit`, from which `implant` draws on."""
CURVE_IMAGES = 500
"""Curves are measured on at most so many held-out images, spread evenly."""


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

    def victim(self, trigger: Path, twin: Path) -> Path:
        """The stage of the victim; where the attacker edits weights alone, it starts from the twin."""

        def make(folder: Path) -> None:
            """Ask the attack how the trigger gets into the victim, and train or edit one accordingly."""
            fitted = fit_of(self.plan, trigger)
            generator = read_stream(trigger, self.plan.spec.seed)
            implant = implant_of(self.plan, fitted, generator)
            places = {"trigger": trigger, "twin": twin}
            make_victim(self.plan, fitted, implant, generator, places, self.progress, folder)

        return self.store.stage(self.plan.victim_stage(), make, self.redo != "nothing")

    def _clean(self, name: str, network: Network, seed: int) -> Path:
        """The stage of a model that is trained on the clean training set."""
        ticks = training_steps(self.plan.spec, len(self.plan.world.train))
        bar = self.progress(f"train the {name.replace('_', ' ')}", ticks)
        make = partial(make_clean, self.plan, network, seed, bar)
        return self.store.stage(self.plan.clean_stage(network, seed), make, self.redo == "all")


def make_clean(plan: Plan, network: Network, seed: int, bar: AbstractContextManager[Tick], folder: Path) -> None:
    """Train a network on the clean training set into `folder`."""
    start = time.perf_counter()
    model = network.build(seed, plan.device)
    watch = _watch(plan)
    keeper = _keeper(folder, {"role": "clean"})
    curves = _train(plan, model, plan.world.train, seed, None, bar, keeper, watch)
    # What an earlier call spent, whose training was resumed here, counts, too.
    seconds = {"train": keeper.seconds + time.perf_counter() - start}
    _save_stage(model, folder, {"curves": curves, "n_curves": watch.counts(), "seconds": seconds}, {"role": "clean"})


def make_retrained(plan: Plan, kept: ImageSet, bar: AbstractContextManager[Tick], folder: Path) -> None:
    """Train the victim's network into `folder` on what a filter kept, with cross-entropy, as the defender would."""
    start = time.perf_counter()
    model = plan.victim.build(plan.spec.seed, plan.device)
    keeper = _keeper(folder, backdoor_notice(plan.spec, "retrained"))
    curves = _train(plan, model, kept, plan.spec.seed, None, bar, keeper)
    facts = {
        "curves": curves,
        "seconds": {"train": keeper.seconds + time.perf_counter() - start},
        "n_poisoned": int(kept.poisoned.sum()),
    }
    _save_stage(model, folder, facts, backdoor_notice(plan.spec, "retrained"))


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


def ready_surrogate(plan: Plan, network: Network, place: Path | None) -> nn.Module:
    """A surrogate with its weights, frozen: read from its stage, or from its checkpoint where it has no stage."""
    if place is None:
        return network.build(0, plan.device).requires_grad_(False)
    return network.read(place / "model.safetensors", plan.device)


def make_trigger(plan: Plan, access: Access, bar: AbstractContextManager[Tick], folder: Path) -> None:
    """Fit the attack, and write its triggers, its report and the state of its random stream into `folder`."""
    spec = plan.spec
    start = time.perf_counter()
    keeper = _keeper(folder, backdoor_notice(spec, "trigger"), access.generator)
    access = replace(access, keeper=keeper)
    # A network that the attack builds draws its first weights from torch's own random state.
    with bar, ambient(spec.seed, "fit", plan.device):
        fitted = spec.attack.fit(access)
    # Refuse a network that could not be built again from the trigger's file.
    for trigger in (fitted.trigger, fitted.stored):
        if trigger is not None:
            check_networks(trigger, spec.attack)
    save_triggers(spec, fitted, folder)
    # `implant` goes on drawing where `fit` ended.
    notice = {"vitrap": json.dumps(backdoor_notice(spec, "trigger"))}
    write_bytes(folder / STREAM, save({"state": access.generator.get_state()}, notice))
    seconds = keeper.seconds + time.perf_counter() - start
    write_json(folder / "facts.json", {"report": dict(fitted.report), "seconds": seconds})


def read_stream(folder: Path, seed: int) -> torch.Generator:
    """The attacker's random stream as `fit` left it.

    `folder` is that of a trigger's or a victim's stage, or of a finished run. Older runs have no file of it; their
    stream starts from the beginning.

    Raises:
        UserError: the file is damaged.
    """
    generator = stream(seed, "attack")
    path = folder / STREAM
    if path.exists():
        try:
            generator.set_state(read_tensor_file(path).tensors["state"])
        except (OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"random stream {str(path)!r} is damaged ({error}); run its spec again") from error
    return generator


def fit_of(plan: Plan, trigger: Path) -> Fitted:
    """The result of the attack's `fit`, read from the trigger's stage."""
    fitted = read_fitted(trigger, plan.spec.attack, device=plan.device)
    return replace(fitted, report=read_json(trigger / "facts.json")["report"])


def implant_of(plan: Plan, fitted: Fitted, generator: torch.Generator) -> Implant:
    """How the trigger gets into the victim, as the attack says; it draws from `generator`."""
    other = plan.other.train if plan.other else None
    return plan.spec.attack.implant(Access(plan.world.train, None, generator, other=other), fitted)


def make_victim(  # noqa: PLR0913 - all that a victim is made of
    plan: Plan,
    fitted: Fitted,
    implant: Implant,
    generator: torch.Generator,
    places: Mapping[str, Path],
    progress: Progress,
    folder: Path,
) -> None:
    """Make the victim in `folder`: poison the training set, train on it, edit the result.

    Args:
        plan: the run's plan.
        fitted: the result of the attack's `fit`.
        implant: how the trigger gets into the victim.
        generator: the random stream that the implant draws from.
        places: folders of the stages that it starts from: "trigger" and, where the attack edits weights alone, "twin".
        progress: displays what is being done.
        folder: the folder of the victim's stage.
    """
    spec, train_set = plan.spec, plan.world.train
    facts: dict[str, Any] = {}
    # Poison the stored training set, unless the attack poisons batch by batch or not at all.
    poisoned = train_set
    if implant.poison is not None:
        with timed(facts.setdefault("seconds", {}), "poison"), progress("poison the training set", None):
            poisoned = implant.poison(train_set, stream(spec.seed, "poison"))
    start = time.perf_counter()
    if spec.attack.threat == "weights":
        # An attacker of weights starts from an honestly trained model: the twin.
        model = plan.victim.read(places["twin"] / "model.safetensors", plan.device)
        earlier = read_json(places["twin"] / "facts.json")
        facts |= {"curves": earlier["curves"], "n_curves": earlier["n_curves"]}
    else:
        # All others train a model of their own; the time of an earlier call that was stopped counts, too.
        keeper = _keeper(folder, backdoor_notice(spec, "victim"), generator)
        model, learned = _train_victim(plan, poisoned, fitted, implant, keeper, progress)
        facts |= learned
        start -= keeper.seconds
    # Edit the trained model; that may change the trigger, too.
    after = fitted
    report = dict(fitted.report)
    if implant.edit is not None:
        bar = progress(f"edit the weights by {spec.attack_name}", None)
        with bar, ambient(spec.seed, "edit", plan.device):
            edited = implant.edit(model, stream(spec.seed, "edit"))
        model, after = edited.model, replace(fitted, trigger=edited.trigger)
        report |= edited.report
    facts.setdefault("seconds", {})["train"] = time.perf_counter() - start
    facts |= {"n_poisoned": int(poisoned.poisoned.sum()), "n_covers": int(poisoned.covers.sum()), "report": report}
    _save_victim_triggers(spec, implant, after, places["trigger"], folder)
    if implant.objective and implant.objective.along:
        _save_along(implant.objective.along, folder, backdoor_notice(spec, "trained along"))
    _save_stage(model, folder, facts, backdoor_notice(spec, "victim"))


def _save_victim_triggers(spec: Spec, implant: Implant, after: Fitted, trigger: Path, folder: Path) -> None:
    """Put the triggers into the victim's folder, so that a run can be opened from there alone.

    Args:
        spec: the run's spec.
        implant: how the trigger got into the victim.
        after: the triggers after training and editing.
        trigger: folder of the trigger's stage.
        folder: folder of the victim's stage.
    """
    for name in (TRIGGER, STORED, STREAM):
        if (trigger / name).exists():
            place_file(trigger / name, folder / name)
    # Training along, or an edit, has changed the trigger. Stored images still carry the one that `fit` made.
    if implant.edit is not None or (implant.objective and implant.objective.along):
        if implant.poison is not None and not (folder / STORED).exists():
            place_file(trigger / TRIGGER, folder / STORED)
        save_triggers(spec, replace(after, stored=None), folder)


def _train_victim(  # noqa: PLR0913 - as `make_victim`
    plan: Plan, poisoned: ImageSet, fitted: Fitted, implant: Implant, keeper: Keeper, progress: Progress
) -> tuple[nn.Module, dict[str, Any]]:
    """Train a victim on the poisoned set; returns it and, for its facts, its curves."""
    model = plan.victim.build(plan.spec.seed, plan.device)
    watch = _watch(plan, fitted, implant)
    bar = progress("train the victim", training_steps(plan.spec, len(poisoned)))
    curves = _train(plan, model, poisoned, plan.spec.seed, implant.objective, bar, keeper, watch)
    return model, {"curves": curves, "n_curves": watch.counts()}


def save_triggers(spec: Spec, fitted: Fitted, folder: Path) -> None:
    """Write the trigger at test time and the one that stored poison carries, each where there is one."""
    notice = json.dumps(backdoor_notice(spec, "trigger"))
    for name, trigger in ((TRIGGER, fitted.trigger), (STORED, fitted.stored)):
        if trigger is not None:
            save_trigger(trigger, spec.attack, folder / name, vitrap=notice)


def backdoor_notice(
    spec: Spec, role: Literal["victim", "trigger", "trained along", "retrained", "scores", "poisoned set"]
) -> dict[str, Any]:
    """Metadata of every file that belongs to a backdoor, or may: role, attack, warning, and spec without defences."""
    return {
        "role": role,
        "backdoor": True,
        "attack": spec.attack_name,
        "warning": f"{role} of a backdoor ({spec.attack_name}), implanted for research; not to be deployed",
        "spec": {k: v for k, v in spec.table().items() if k not in ("name", "defences")},
        "contents": spec.contents(),
    }


@dataclass(frozen=True)
class Watch:
    """Measures a model in training after each epoch: CDA and, of a victim, ASR on held-out images.

    Its curves are for the record; nothing is chosen by them.

    Attributes:
        held_out: the images, without the trigger.
        arithmetic: how the model computes.
        goal: the attack's goal; None for a clean model, or where the trigger is not known yet.
        fired: returns the images with the trigger as it is by then; None as for `goal`.
    """

    held_out: ImageSet
    arithmetic: Arithmetic
    goal: Goal | None = None
    fired: Callable[[], ImageSet] | None = None

    def counts(self) -> dict[str, int]:
        """How many images each curve is measured on; a curve without images is left out."""
        counting = int(self.goal.counts(self.held_out.labels).sum()) if self.goal else 0
        return {name: n for name, n in {"cda": len(self.held_out), "asr": counting}.items() if n}

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The next value of each curve."""
        found: dict[str, float] = {}
        true = self.held_out.labels
        if len(true):
            found["cda"] = clean_accuracy(predict(model, self.held_out, self.arithmetic), true).value
        if self.goal and self.fired and "asr" in self.counts():
            found["asr"] = attack_success(predict(model, self.fired(), self.arithmetic), true, self.goal).value
        return found


def _watch(plan: Plan, fitted: Fitted | None = None, implant: Implant | None = None) -> Watch:
    """The watch over a model in training: over a clean one, or over the victim of `fitted` and `implant`."""
    choose = plan.world.choose
    held_out = choose.take(spread(every_row(choose), CURVE_IMAGES))
    trigger = fitted.trigger if fitted else None
    if trigger is None or implant is None or not len(held_out):
        return Watch(held_out, plan.arithmetic)
    # A trigger that is trained along changes, and is fired again after each epoch; any other is fired once.
    if implant.objective and implant.objective.along:
        return Watch(held_out, plan.arithmetic, plan.goal, partial(triggered, held_out, trigger))
    fired = triggered(held_out, trigger)
    return Watch(held_out, plan.arithmetic, plan.goal, lambda: fired)


def _train(  # noqa: PLR0913 - as `train`
    plan: Plan,
    model: nn.Module,
    data: ImageSet,
    seed: int,
    objective: Objective | None,
    bar: AbstractContextManager[Tick],
    keeper: Keeper,
    watch: Watch | None = None,
) -> dict[str, list[float]]:
    """Train with the plan's recipe and arithmetic and the random streams of a seed; returns the curves."""
    with bar as tick, ambient(seed, "dropout", plan.device):
        streams = training_streams(seed, plan.device)
        return train(model, data, plan.spec.recipe, streams, objective, tick, watch, plan.arithmetic, keeper)


def _keeper(folder: Path, notice: dict[str, Any], generator: torch.Generator | None = None) -> Keeper:
    """A keeper of the training's state in a stage's draft, and of the attack's random stream where it draws on."""
    streams = {"attack": generator} if generator is not None else {}
    return Keeper(folder / STATE, streams, {"vitrap": json.dumps(notice)})


def _save_along(along: Mapping[str, Along], folder: Path, notice: dict[str, Any]) -> None:
    """Write the modules that were trained along with the victim, each weight under the name of its module."""
    weights = {f"{name}.{k}": v for name, each in along.items() for k, v in each.module.state_dict().items()}
    kept = {k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}
    write_bytes(folder / "along.safetensors", save(kept, {"vitrap": json.dumps(notice)}))


def _save_stage(model: nn.Module, folder: Path, facts: dict[str, Any], notice: dict[str, Any]) -> None:
    """Write a model's facts and its weights, with the notice in their metadata."""
    write_json(folder / "facts.json", facts)
    metadata = {"vitrap": json.dumps(notice)}
    if isinstance(model, Classifier):
        save_model(model, folder / "model.safetensors", **metadata)
        return
    # A network of the user's own; each weight is copied, for safetensors refuses tensors that share memory.
    kept = {
        k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)
    }
    write_bytes(folder / "model.safetensors", save(kept, metadata))
