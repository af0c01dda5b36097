"""The stages of a run, surrogates, trigger, clean twin and victim: which it has, and how each is made.

A stage is a folder with weights and `facts.json`, which store.py keeps.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vitrap.contracts import Access, Checkpointer, ExtraModule, Fitted, Goal, ImageSet, Implant, Objective
from vitrap.errors import UserError
from vitrap.experiment.checksums import MODEL
from vitrap.experiment.facts import ModelFacts, TriggerFacts, read_facts, write_facts
from vitrap.experiment.plan import Plan, SeededNetwork, training_steps
from vitrap.experiment.predict import every_row, predict, spread, triggered
from vitrap.experiment.progress import Progress, Tick
from vitrap.experiment.spec import Spec
from vitrap.experiment.store import STATE, Store
from vitrap.experiment.streams import ambient, stream, training_streams
from vitrap.experiment.trigger_file import STORED, TRIGGER, check_networks, read_fitted, save_fitted
from vitrap.files import place_file
from vitrap.metrics.accuracy import attack_success, clean_accuracy
from vitrap.models.classifier import Classifier, save_model
from vitrap.tensor_file import read_tensor_file, write_tensor_file
from vitrap.train.arithmetic import Arithmetic
from vitrap.train.loop import train

STREAM = "stream.safetensors"
"""File of a trigger's stage: the state of the attacker's random stream after `fit`, from which `implant` draws on."""
CURVE_IMAGES = 500
"""Curves are measured on at most so many held-out images, spread evenly."""
Redo = Literal["nothing", "victim", "all"]
"""What is made again although the store has it."""


@dataclass(frozen=True)
class StageFolders:
    """The folders of a run's stages.

    Attributes:
        trigger: the trigger's.
        models: those of the trained models, by role: the surrogates that have one, "victim" and "twin".
    """

    trigger: Path
    models: Mapping[str, Path]


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

    def make_all(self) -> StageFolders:
        """Make every stage that is missing."""
        # Train the attacker's surrogates, and fit the trigger with their help.
        surrogates = self.surrogates()
        trigger = self.trigger(surrogates)
        # Train the clean twin, and then the victim, which starts from the twin where the attacker edits weights alone.
        twin = self.twin()
        victim = self.victim(trigger, twin)
        return StageFolders(trigger, {**surrogates, "victim": victim, "twin": twin})

    def surrogates(self) -> dict[str, Path]:
        """The stages of the attacker's own networks, by name; one that is read from a checkpoint has no stage."""
        return {
            name: self._clean(name, surrogate)
            for name, surrogate in self.plan.surrogates.items()
            if surrogate.network.checkpoint is None
        }

    def twin(self) -> Path:
        """The stage of the clean twin."""
        return self._clean("twin", self.plan.twin)

    def trigger(self, surrogates: Mapping[str, Path]) -> Path:
        """The stage of the trigger: the result of the attack's `fit`."""
        fit = partial(make_trigger, self.plan, surrogates, self.progress)
        return self.store.find_or_make(self.plan.trigger_stage(), fit, self.redo == "all")

    def victim(self, trigger: Path, twin: Path) -> Path:
        """The stage of the victim; where the attacker edits weights alone, it starts from the twin."""
        poison_and_train = partial(make_victim, self.plan, trigger, twin, self.progress)
        return self.store.find_or_make(self.plan.victim_stage(), poison_and_train, self.redo != "nothing")

    def _clean(self, name: str, model: SeededNetwork) -> Path:
        """The stage of a model that is trained on the clean training set."""
        train = self.plan.world.train
        bar = self.progress(f"train the {name.replace('_', ' ')}", training_steps(self.plan.spec, len(train)))
        train_clean = partial(make_model, self.plan, model, train, {"role": "clean"}, bar, watch=watch_clean(self.plan))
        return self.store.find_or_make(self.plan.clean_stage(model), train_clean, self.redo == "all")


@dataclass(frozen=True)
class Watch:
    """Measures a model in training after each epoch: CDA and, of a victim, ASR on held-out images.

    Its curves are for the record; nothing is chosen by them.

    Attributes:
        images: the held-out images, without the trigger.
        arithmetic: how the model computes.
        goal: the attack's goal; None for a clean model, or where the trigger is not known yet.
        with_trigger: returns the images with the trigger as it is by then; None as for `goal`.
    """

    images: ImageSet
    arithmetic: Arithmetic
    goal: Goal | None = None
    with_trigger: Callable[[], ImageSet] | None = None

    def counts(self) -> dict[str, int]:
        """How many images each curve is measured on; a curve without images is left out."""
        counting = int(self.goal.counts(self.images.labels).sum()) if self.goal else 0
        return {name: n for name, n in {"cda": len(self.images), "asr": counting}.items() if n}

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The next value of each curve."""
        found: dict[str, float] = {}
        true = self.images.labels
        if len(true):
            found["cda"] = clean_accuracy(predict(model, self.images, self.arithmetic), true).value
        if self.goal and self.with_trigger and "asr" in self.counts():
            found["asr"] = attack_success(predict(model, self.with_trigger(), self.arithmetic), true, self.goal).value
        return found


def watch_clean(plan: Plan) -> Watch:
    """The watch over a model that is trained on clean images."""
    choose = plan.world.choose
    return Watch(choose.take(spread(every_row(choose), CURVE_IMAGES)), plan.arithmetic)


def make_model(  # noqa: PLR0913 - all that a model is made of
    plan: Plan,
    model: SeededNetwork,
    data: ImageSet,
    notice: dict[str, Any],
    bar: AbstractContextManager[Tick],
    folder: Path,
    watch: Watch | None = None,
) -> None:
    """Train a network with cross-entropy on `data` into `folder`; `notice` says there what the weights carry."""
    start = time.perf_counter()
    network = model.network.build(model.seed, plan.device)
    checkpointer = checkpointer_in(folder, notice)
    curves = train_as_planned(plan, network, data, model.seed, None, bar, checkpointer, watch)
    # What an earlier call spent, whose training was resumed here, counts, too.
    seconds = checkpointer.seconds + time.perf_counter() - start
    n_poisoned = int(data.poisoned.sum())
    n_curves = watch.counts() if watch else {}
    facts = ModelFacts(seconds=seconds, curves=curves, n_curves=n_curves, n_poisoned=n_poisoned)
    save_stage(network, folder, facts, notice)


def train_as_planned(  # noqa: PLR0913 - as `train`
    plan: Plan,
    model: nn.Module,
    data: ImageSet,
    seed: int,
    objective: Objective | None,
    bar: AbstractContextManager[Tick],
    checkpointer: Checkpointer,
    watch: Watch | None = None,
) -> dict[str, list[float]]:
    """Train with the plan's recipe and arithmetic and the random streams of a seed; returns the curves."""
    with bar as tick, ambient(seed, "dropout", plan.device):
        streams = training_streams(seed, plan.device)
        return train(model, data, plan.spec.recipe, streams, objective, tick, watch, plan.arithmetic, checkpointer)


def checkpointer_in(folder: Path, notice: dict[str, Any], generator: torch.Generator | None = None) -> Checkpointer:
    """Saves the training's state in a stage's draft, with the attack's random stream where training draws from it."""
    streams = {"attack": generator} if generator is not None else {}
    return Checkpointer(folder / STATE, streams, {"vitrap": json.dumps(notice)})


def save_stage(model: nn.Module, folder: Path, facts: ModelFacts, notice: dict[str, Any]) -> None:
    """Write a model's facts and its weights, with the notice in their metadata."""
    write_facts(folder, facts)
    metadata = {"vitrap": json.dumps(notice)}
    if isinstance(model, Classifier):
        save_model(model, folder / MODEL, **metadata)
    else:  # a network of the user's own, whose state may hold more than tensors
        weights = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        write_tensor_file(folder / MODEL, weights, metadata)


def ready_surrogate(plan: Plan, surrogate: SeededNetwork, place: Path | None) -> nn.Module:
    """A surrogate with its weights, frozen: read from its stage, or from its checkpoint where it has no stage."""
    if place is None:
        return surrogate.network.build(surrogate.seed, plan.device).requires_grad_(False)
    return surrogate.network.read(place / MODEL, plan.device)


def make_trigger(plan: Plan, surrogates: Mapping[str, Path], progress: Progress, folder: Path) -> None:
    """Fit the attack, and write its triggers, its report and the state of its random stream into `folder`."""
    spec = plan.spec
    ready = {name: ready_surrogate(plan, each, surrogates.get(name)) for name, each in plan.surrogates.items()}
    start = time.perf_counter()
    generator = stream(spec.seed, "attack")
    checkpointer = checkpointer_in(folder, backdoor_notice(spec, "trigger"), generator)
    access = Access(
        plan.world.train,
        ready.get("surrogate"),
        generator,
        test_surrogate=ready.get("test_surrogate"),
        other=plan.other.train if plan.other else None,
        checkpointer=checkpointer,
    )
    # A network that the attack builds draws its first weights from torch's own random state.
    with progress(f"fit {spec.attack_name}", None), ambient(spec.seed, "fit", plan.device):
        fitted = spec.attack.fit(access)
    # Refuse a network that could not be built again from the trigger's file.
    for trigger in (fitted.trigger, fitted.stored):
        if trigger is not None:
            check_networks(trigger, spec.attack)
    notice = json.dumps(backdoor_notice(spec, "trigger"))
    save_fitted(fitted, spec.attack, folder, vitrap=notice)
    # `implant` goes on drawing where `fit` ended.
    write_tensor_file(folder / STREAM, {"state": generator.get_state()}, {"vitrap": notice})
    seconds = checkpointer.seconds + time.perf_counter() - start
    write_facts(folder, TriggerFacts(report=dict(fitted.report), seconds=seconds))


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


def read_fit(plan: Plan, trigger: Path) -> Fitted:
    """The result of the attack's `fit`, read from the trigger's stage."""
    fitted = read_fitted(trigger, plan.spec.attack, plan.device)
    return replace(fitted, report=read_facts(trigger, TriggerFacts).report)


def implant_of(plan: Plan, fitted: Fitted, generator: torch.Generator) -> Implant:
    """How the trigger gets into the victim, as the attack says; it draws from `generator`."""
    other = plan.other.train if plan.other else None
    return plan.spec.attack.implant(Access(plan.world.train, None, generator, other=other), fitted)


def make_victim(plan: Plan, trigger: Path, twin: Path, progress: Progress, folder: Path) -> None:
    """Make the victim in `folder`: poison the training set, train on it, edit the result.

    Args:
        plan: the run's plan.
        trigger: the trigger's stage.
        twin: the twin's stage, from which an attacker of weights starts.
        progress: displays what is being done.
        folder: the folder of the victim's stage.
    """
    spec = plan.spec
    # Ask the attack how the trigger gets into the victim.
    fitted = read_fit(plan, trigger)
    generator = read_stream(trigger, spec.seed)
    implant = implant_of(plan, fitted, generator)
    # Poison the stored training set, unless the attack poisons batch by batch or not at all.
    train_set = plan.world.train
    poison_seconds = 0.0
    if implant.poison is not None:
        start = time.perf_counter()
        with progress("poison the training set", None):
            train_set = stored_set(implant, train_set, spec.seed)
        poison_seconds = time.perf_counter() - start
    # Train a victim on it. An attacker of weights starts from an honestly trained model instead: the twin.
    start = time.perf_counter()
    if spec.attack.threat == "weights":
        model = plan.victim.read(twin / MODEL, plan.device)
        trained = replace(read_facts(twin, ModelFacts), seconds=0.0)
    else:
        checkpointer = checkpointer_in(folder, backdoor_notice(spec, "victim"), generator)
        model, trained = _train_victim(plan, train_set, fitted, implant, checkpointer, progress)
    # Edit the trained model; that may change the trigger, too.
    final = fitted
    report = dict(fitted.report)
    if implant.edit is not None:
        bar = progress(f"edit the weights by {spec.attack_name}", None)
        with bar, ambient(spec.seed, "edit", plan.device):
            edited = implant.edit(model, stream(spec.seed, "edit"))
        model = edited.model
        final = replace(fitted, trigger=edited.trigger)
        report |= edited.report
    facts = replace(
        trained,
        seconds=trained.seconds + time.perf_counter() - start,
        poison_seconds=poison_seconds,
        n_poisoned=int(train_set.poisoned.sum()),
        n_covers=int(train_set.covers.sum()),
        report=report,
    )
    _save_victim_triggers(spec, implant, final, trigger, folder)
    if implant.objective and implant.objective.along:
        _save_along(implant.objective.along, folder, backdoor_notice(spec, "trained along"))
    save_stage(model, folder, facts, backdoor_notice(spec, "victim"))


def _train_victim(
    plan: Plan, train_set: ImageSet, fitted: Fitted, implant: Implant, checkpointer: Checkpointer, progress: Progress
) -> tuple[nn.Module, ModelFacts]:
    """Train a victim on the poisoned set; returns it with its curves and the seconds that earlier calls spent on it."""
    model = plan.victim.build(plan.spec.seed, plan.device)
    watch = watch_victim(plan, fitted, implant)
    bar = progress("train the victim", training_steps(plan.spec, len(train_set)))
    curves = train_as_planned(plan, model, train_set, plan.spec.seed, implant.objective, bar, checkpointer, watch)
    return model, ModelFacts(seconds=checkpointer.seconds, curves=curves, n_curves=watch.counts())


def watch_victim(plan: Plan, fitted: Fitted, implant: Implant) -> Watch:
    """The watch over the victim of an attack."""
    watch = watch_clean(plan)
    if fitted.trigger is None or not len(watch.images):
        return watch
    # A trigger that is trained along changes, and is applied again after each epoch; any other is applied once.
    if implant.objective and implant.objective.along:
        return replace(watch, goal=plan.goal, with_trigger=partial(triggered, watch.images, fitted.trigger))
    fixed = triggered(watch.images, fitted.trigger)
    return replace(watch, goal=plan.goal, with_trigger=lambda: fixed)


def stored_set(implant: Implant, train: ImageSet, seed: int) -> ImageSet:
    """The training set as stored for the victim: poisoned, or the clean one where the attack stores no poison."""
    return train if implant.poison is None else implant.poison(train, stream(seed, "poison"))


def _save_victim_triggers(spec: Spec, implant: Implant, final: Fitted, trigger: Path, folder: Path) -> None:
    """Put the triggers into the victim's folder, so that a run can be opened from there alone.

    Args:
        spec: the run's spec.
        implant: how the trigger got into the victim.
        final: the triggers after training and editing.
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
        notice = json.dumps(backdoor_notice(spec, "trigger"))
        save_fitted(replace(final, stored=None), spec.attack, folder, vitrap=notice)


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


def _save_along(along: Mapping[str, ExtraModule], folder: Path, notice: dict[str, Any]) -> None:
    """Write the modules that were trained along with the victim, each weight under the name of its module."""
    weights = {f"{name}.{k}": v for name, each in along.items() for k, v in each.module.state_dict().items()}
    write_tensor_file(folder / "along.safetensors", weights, {"vitrap": json.dumps(notice)})
