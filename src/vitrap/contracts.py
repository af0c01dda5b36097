"""The contracts: what attacks, training, defences and metrics hand to each other.

In the order of a run: `Access` goes into `Attack.fit`, which returns `Fitted`; `Attack.implant` turns that into an
`Implant`, which poisons data, trains with an `Objective`, or edits the model into an `Edited`. A `Suspect` goes into
`Defence.apply`, which returns a `Screen`, a `Repaired`, a `Flagged` or a `Judged`.

Images are float in [0, 1], `b c h w`; normalisation is part of the model. All classes here are frozen: a function that
changes something returns a new object.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

# `X as X` hands a name on: attacks and defences import all nouns from here.
from vitrap.computing import Compute as Compute
from vitrap.computing import DefaultCompute as DefaultCompute
from vitrap.errors import UserError
from vitrap.goals import AllToAll as AllToAll
from vitrap.goals import AllToOne as AllToOne
from vitrap.goals import Goal as Goal
from vitrap.goals import LabelMode as LabelMode
from vitrap.goals import SourceToTarget as SourceToTarget
from vitrap.images import Batch as Batch
from vitrap.images import Images as Images
from vitrap.images import ImageSet as ImageSet
from vitrap.probe import check_network, check_type
from vitrap.resuming import Checkpointer as Checkpointer
from vitrap.resuming import Position as Position
from vitrap.resuming import TrainingState as TrainingState

Threat = Literal["data", "training", "weights"]


@dataclass(frozen=True)
class Card:
    """The paper that an attack or a defence comes from."""

    title: str
    authors: str
    venue: str
    year: int
    arxiv: str = ""


@dataclass(frozen=True)
class Access:
    """All that the attacker may see: there is no test set in it.

    Attributes:
        train: the training set.
        surrogate: a ready, frozen model of the attacker's own; None where the attack needs none, and in `implant`.
        generator: the attacker's random stream, on the CPU; `implant` continues it where `fit` left it.
        test_surrogate: a second surrogate, for the trigger at test time; None without `[test_surrogate]` in the spec.
        other: images from outside the training set, where a setting of the attack names a data set; else None.
        checkpointer: saves the state of a long `fit` where the attack calls it, so that the work can be resumed.
    """

    train: ImageSet
    surrogate: nn.Module | None
    generator: torch.Generator
    test_surrogate: nn.Module | None = None
    other: ImageSet | None = None
    checkpointer: Checkpointer = field(default_factory=Checkpointer)


Trigger = Callable[[Images], Images]
"""Puts the trigger on images in [0, 1] and returns images in [0, 1]. The result of an image depends on it alone."""


@runtime_checkable
class Shown(Protocol):
    """A trigger that can show how it works, for the pictures of a record."""

    def views(self, images: Images) -> Mapping[str, Float[Tensor, "b h w"]]:
        """Maps of each image, in [0, 1], by name."""
        ...


@dataclass(frozen=True)
class Crafted:
    """Poisoned training images that `fit` made one by one, where no function of an image alone gives them.

    Attributes:
        rows: rows of the training images that they replace.
        images: the new images, 8 bits at working size.
    """

    rows: Int64[Tensor, " m"]
    images: UInt8[Tensor, "m c s s"]


@dataclass(frozen=True)
class Fitted:
    """What `Attack.fit` makes, before anything is poisoned.

    Attributes:
        trigger: the trigger at test time; None where it is known only after training.
        stored: the trigger of poisoned training images, or these images themselves; None: they carry `trigger`, too.
        report: numbers for the record, by name.
    """

    trigger: Trigger | None
    stored: Trigger | Crafted | None = None
    report: Mapping[str, float] = field(default_factory=dict)

    @property
    def in_training(self) -> Trigger:
        """The trigger that poisoned training images carry: `stored` or, where that is None, `trigger`.

        Raises:
            TypeError: there is none: it is known only after training, or the images are made one by one.
        """
        trigger = self.trigger if self.stored is None else self.stored
        if trigger is None or isinstance(trigger, Crafted):
            raise TypeError("this attack has no trigger that makes a training image poison")
        return trigger


Criterion = Callable[[Float[Tensor, "b k"], Int64[Tensor, " b"]], Float[Tensor, ""]]
"""The loss that the recipe trains with, given logits and labels."""

Combine = Literal["fixed", "learned", "projected"]
"""How several loss terms become one step of training: see `train.combine`."""


@dataclass(frozen=True)
class ExtraModule:
    """A module that is trained along with the victim, such as a trigger generator.

    Attributes:
        module: the module.
        lr: its own peak learning rate.
    """

    module: nn.Module
    lr: float


@dataclass(frozen=True)
class Objective:
    """What a training minimises, and how it makes its batches.

    A killed training is resumed from the modules in `along` and the generator that `implant` got, so whatever an
    objective remembers from one step to the next must be in one of them.

    Attributes:
        terms: returns the loss terms by name, given model, batch and the recipe's criterion. The record's curves use
            the same names. A term for which a batch has nothing (such as poisoned images) is left out.
        weights: weights of the terms that the attack adds; all other terms have weight 1.
        combine: "fixed" weights, "learned" ones, or gradients "projected" so that they do not conflict.
        prepare: puts triggers on the poison and the covers of a batch after augmentation; it has a random stream of its
            own, on the CPU. It gets the images without any trigger, and returns the batch with the positions of those
            that it changed as `poison_at` or `cover_at`. These are then rounded to 8 bits. None: the stored images are
            used.
        along: modules that are trained with the victim, by name. While there are any, gradients flow through `prepare`
            and its rounding.
        step: replaces the step down the terms. It gets the loop's `train.loop.Learner` and the batch, and returns the
            terms for the curves.
    """

    terms: Callable[[nn.Module, Batch, Criterion], Mapping[str, Float[Tensor, ""]]]
    weights: Mapping[str, float] = field(default_factory=dict)
    combine: Combine = "fixed"
    prepare: Callable[[Batch, torch.Generator], Batch] | None = None
    along: Mapping[str, ExtraModule] = field(default_factory=dict)
    step: Callable[[Any, Batch], Mapping[str, Float[Tensor, ""]]] | None = None


@dataclass(frozen=True)
class Edited:
    """What `Implant.edit` makes of a trained model.

    Attributes:
        model: the edited model, a new one.
        trigger: the trigger at test time, from now on.
        report: numbers for the record, by name.
    """

    model: nn.Module
    trigger: Trigger
    report: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Implant:
    """How the backdoor gets into the victim; a field that is None changes nothing.

    Attributes:
        poison: returns the poisoned training set, given the clean one and a generator with a stream of its own.
        objective: what training minimises; None for the recipe's cross-entropy.
        edit: changes the trained model, given a generator with a stream of its own.
        examine: numbers about a model and triggered images, for the record; called for victim and clean twin.
    """

    poison: Callable[[ImageSet, torch.Generator], ImageSet] | None = None
    objective: Objective | None = None
    edit: Callable[[nn.Module, torch.Generator], Edited] | None = None
    examine: Callable[[nn.Module, Images], Mapping[str, float]] | None = None


@runtime_checkable
class Attack(Protocol):
    """An attack: a frozen dataclass of the paper's hyper-parameters, with the methods `goal_for`, `fit` and `implant`.

    Class attributes, or properties where a setting decides:
        card: the paper.
        version: a whole number, raised when the same settings come to give another attack.
        threat: what the attacker controls: the "data", the "training", or the "weights". Where it is the weights,
            nothing is poisoned, and `edit` turns the clean twin into the victim.
        labels: whether poisoned images keep their true label ("clean") or not ("dirty").
        needs_surrogate: whether `fit` needs a model of the attacker's own.

    It may also have the attributes that `ATTACK_MAY` lists, and no other public one: a misspelt name would do nothing.
    """

    card: ClassVar[Card]
    version: ClassVar[int]
    threat: Threat
    labels: LabelMode
    needs_surrogate: bool

    def goal_for(self, n_classes: int) -> Goal:
        """The attack's goal in a data set of `n_classes` classes."""
        ...

    def fit(self, access: Access) -> Fitted:
        """Make the trigger; this may take long, since the result is stored and reused."""
        ...

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Say how the trigger gets into the victim; this must be cheap, since every opening of a run repeats it."""
        ...


ATTACK_MAY = {
    "check_size": "check_size(size) refuses images of `size` pixels with a UserError",
    "check_victim": "check_victim(model) refuses a victim's network before any work is done",
    "check_surrogate": "check_surrogate(model, images) refuses a surrogate's network before any work is done",
    "takes_test_surrogate": "true where the trigger may use another surrogate at test time",
}
"""What an attack may have beside the attributes and methods that every attack has."""


@runtime_checkable
class Retrain(Protocol):
    """Trains the suspect's network again, with the recipe it came from. The defender learns nothing but the model."""

    def __call__(
        self,
        images: ImageSet,
        objective: Objective | None = None,
        epochs: int | None = None,
        start: nn.Module | None = None,
    ) -> nn.Module:
        """A model trained on `images`, in evaluation mode.

        Args:
            images: the training set.
            objective: what training minimises; None for cross-entropy.
            epochs: number of epochs; None for the recipe's.
            start: a model of which a copy is trained further; None for the network's initial weights.

        Raises:
            UserError: the training diverges.
        """
        ...


PROBED = 4
"""Clean images that a suspect's model classifies when the suspect is made, at most."""


@dataclass(frozen=True)
class Suspect:
    """All that the defender may see: no trigger, no goal, no mask of poisoned images, no test set.

    When a suspect is made, its model classifies a few of the clean images. So no defence has to ask whether the model
    can be used.

    Attributes:
        model: a module in evaluation mode with fp32 weights; it maps images in [0, 1] to one finite logit per class. A
            defence must not change it.
        clean: a few images that the defender trusts, with true labels; a class may be missing from them.
        n_classes: number of classes.
        generator: the defender's random stream, on the CPU.
        train: the model's training set; None where the defender does not have it.
        compute: how the model computes (precision, kind of attention); `computing` applies it. A defence runs its
            forward passes inside `with suspect.computing():`. Whoever calls `Screen.score` or `Repaired.model` opens
            this block; the score itself need not.
        retrain: trains the network again; None where the defender has no training set, or no means to train.
    """

    model: nn.Module
    clean: ImageSet
    n_classes: int
    generator: torch.Generator
    train: ImageSet | None = None
    compute: Compute = field(default_factory=DefaultCompute)
    retrain: Retrain | None = None

    def __post_init__(self) -> None:
        """Refuse what a defender cannot work with or must not see.

        Raises:
            UserError: an attribute is of another type; a set of images is empty, marked, or does not fit the model or
                the number of classes; the model is in training mode, or not what `probe.check_network` asks for.
        """
        kinds = {"model": nn.Module, "clean": ImageSet, "n_classes": int, "generator": torch.Generator}
        for name, kind in kinds.items() if self.train is None else {**kinds, "train": ImageSet}.items():
            check_type(getattr(self, name), kind, f"suspect.{name}")
        if any(module.training for module in self.model.modules()):
            raise UserError("suspect.model is in training mode; call model.eval() first")
        for name, images in (("clean", self.clean), ("train", self.train)):
            if images is not None:
                self._check_images(name, images)
        some = self.clean.images(torch.arange(min(len(self.clean), PROBED), device=self.clean.device))
        with self.computing():
            check_network(self.model, some, self.n_classes, "suspect.model")

    def _check_images(self, name: str, images: ImageSet) -> None:
        """Refuse an empty set, one that says which of its images are poisoned, and labels that are no classes."""
        if not len(images):
            raise UserError(f"the {name} set has 0 images; a defender needs at least one; increase data.holdout")
        if images.stamped_row is not None:
            raise UserError(f"suspect.{name} says which of its images are poisoned; hand in {name}.unmarked()")
        if (least := int(images.labels.min())) < 0:
            raise UserError(f"suspect.{name} has the label {least}; number classes from 0")
        if (greatest := int(images.labels.max())) >= self.n_classes:
            raise UserError(f"suspect.{name} has the label {greatest}, and n_classes = {self.n_classes}; raise it")

    def training_set(self, defence: str) -> ImageSet:
        """The training set.

        Args:
            defence: the name of the defence that needs it, for the message.

        Raises:
            UserError: there is none.
        """
        if self.train is None:
            raise UserError(f"{defence} filters a training set, and train = None; give it as Suspect(train=...)")
        return self.train

    def computing(self) -> AbstractContextManager[None]:
        """Within the block, the suspect's model computes as it does in training and in measuring."""
        return self.compute(self.model, self.clean.device)


@dataclass(frozen=True)
class Screen:
    """The outcome of a defence that scores inputs at test time.

    Attributes:
        score: a score for each image, higher for triggered ones. It depends on that image alone and is the same at
            every call. It is called without gradients; a score that needs them uses `torch.enable_grad`. An image that
            ties with a threshold counts as not above it, so a score of few values may have a TPR of 0.
        layer: which part of the model the defence observes; "" where it is the outputs alone. All outcomes have it.
        report: numbers for the record, by name. All outcomes have it.
    """

    score: Callable[[Images], Float[Tensor, " b"]]
    layer: str = ""
    report: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Repaired:
    """The outcome of a repair: a new model, in evaluation mode, in which the backdoor should no longer work."""

    model: nn.Module
    layer: str = ""
    report: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Flagged:
    """The outcome of a filter of the training set.

    Attributes:
        score: a score for each training image, higher for poisoned ones.
        flagged: the images that the defender would leave out.
        layer: as in `Screen`.
        report: as in `Screen`.
    """

    score: Float[Tensor, " n"]
    flagged: Bool[Tensor, " n"]
    layer: str = ""
    report: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """The outcome of a defence that judges the whole model.

    Attributes:
        score: higher for a backdoored model.
        threshold: the paper's own threshold; a model that scores above it counts as backdoored.
        suspected: the likely target classes, the likeliest first; () where the method names none.
        by_class: a score for each class, higher for a likelier target; None where the method has none.
        layer: as in `Screen`.
        report: as in `Screen`.
    """

    score: float
    threshold: float
    suspected: tuple[int, ...] = ()
    by_class: Float[Tensor, " k"] | None = None
    layer: str = ""
    report: Mapping[str, float] = field(default_factory=dict)


Outcome = Screen | Repaired | Flagged | Judged
OutcomeKind = Literal["screen", "repair", "filter", "judgement"]


@runtime_checkable
class Defence(Protocol):
    """A defence: a frozen dataclass of the paper's hyper-parameters, with the method `apply`.

    Class attributes, or properties where a setting decides:
        card: the paper.
        version: a whole number, raised when the same settings come to give another defence.
        kind: the outcome that `apply` returns: a "screen" returns a Screen, a "repair" a Repaired, a "filter" a
            Flagged, a "judgement" a Judged.
        needs_train: whether it needs the training set.
        needs_attention: whether the model must have plain token attention.

    It has no other public attribute: a misspelt name would do nothing.
    """

    card: ClassVar[Card]
    version: ClassVar[int]
    kind: OutcomeKind
    needs_train: bool
    needs_attention: bool

    def apply(self, suspect: Suspect) -> Outcome:
        """Apply the paper's method, without changing the suspect's model.

        Raises:
            UserError: the suspect lacks something that the defence needs.
        """
        ...


def undeclared(method: type[Any]) -> list[str]:
    """The public attributes of an attack's or a defence's class that its contract does not know: misspelt names."""
    contract = Attack if hasattr(method, "fit") else Defence
    known = {"check_settings", *contract.__annotations__, *vars(contract)}  # see params.hyperparameters
    if contract is Attack:
        known |= set(ATTACK_MAY)
    if is_dataclass(method):
        known |= {f.name for f in fields(method)}
    return sorted(name for name in dir(method) if not name.startswith("_") and name not in known)
