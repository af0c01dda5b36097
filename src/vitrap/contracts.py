"""The nouns: what attacks, training, defences and metrics hand to each other.

Every image is float in [0, 1], `b c h w`; normalisation lives inside the model. Records are frozen: a function that
changes something returns a new one.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from vitrap.computing import Compute as Compute
from vitrap.computing import DefaultCompute as DefaultCompute
from vitrap.errors import UserError
from vitrap.goals import AllToAll as AllToAll
from vitrap.goals import AllToOne as AllToOne
from vitrap.goals import Goal as Goal
from vitrap.goals import Labels as Labels
from vitrap.goals import SourceToTarget as SourceToTarget
from vitrap.images import Batch as Batch
from vitrap.images import Images as Images
from vitrap.images import ImageSet as ImageSet
from vitrap.keeping import Keeper as Keeper
from vitrap.keeping import Moving as Moving
from vitrap.keeping import Position as Position

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
    """All that the attacker may see. There is no test set in it.

    Attributes:
        train: the training samples.
        surrogate: a ready, frozen model of the attacker's own; None where the attack asks for none, or is not to look
            at it any more.
        generator: the attacker's random stream, on the CPU; `implant` goes on where `fit` left it.
        test_surrogate: a second one, for the trigger at test time; None where the spec has no `[test_surrogate]`.
        other: images that are not the training set, where a setting of the attack names a data set; else None.
        keeper: keeps the state of a long `fit` now and then, where the attack hands it over.
    """

    train: ImageSet
    surrogate: nn.Module | None
    generator: torch.Generator
    test_surrogate: nn.Module | None = None
    other: ImageSet | None = None
    keeper: Keeper = field(default_factory=Keeper)


Trigger = Callable[[Images], Images]
"""Images in [0, 1] to images in [0, 1]; each image's result depends on that image alone."""


@runtime_checkable
class Shown(Protocol):
    """A trigger that has pictures of how it works."""

    def views(self, images: Images) -> Mapping[str, Float[Tensor, "b h w"]]:
        """Named maps in [0, 1] of each image."""
        ...


@dataclass(frozen=True)
class Crafted:
    """Poisoned training images that `fit` has made one by one, where no function of an image alone does it.

    Attributes:
        rows: which training images they replace.
        images: what these become, 8 bits at working size.
    """

    rows: Int64[Tensor, " m"]
    images: UInt8[Tensor, "m c s s"]


@dataclass(frozen=True)
class Fitted:
    """What an attack makes before anything is poisoned.

    Attributes:
        trigger: what is done to an image at test time; None where it is known only after training.
        stored: what poisoned training images carry, or those images themselves; None for the trigger.
        report: what the attack says of itself, by name.
    """

    trigger: Trigger | None
    stored: Trigger | Crafted | None = None
    report: Mapping[str, float] = field(default_factory=dict)

    @property
    def in_training(self) -> Trigger:
        """What poisoned training images carry.

        Raises:
            TypeError: nothing is known of it before training, or the images are made one by one.
        """
        found = self.trigger if self.stored is None else self.stored
        if found is None or isinstance(found, Crafted):
            raise TypeError("this attack has no trigger that makes a training image poison")
        return found


Criterion = Callable[[Float[Tensor, "b k"], Int64[Tensor, " b"]], Float[Tensor, ""]]
"""Logits and labels to the loss that the recipe trains with."""

Combine = Literal["fixed", "learned", "projected"]
"""How loss terms become one step: see `train.combine`."""


@dataclass(frozen=True)
class Along:
    """A module that is trained along with the victim, and its peak learning rate."""

    module: nn.Module
    lr: float


@dataclass(frozen=True)
class Objective:
    """What training is for.

    Whatever it remembers from one step to the next lies in `along`, or in the generator that `implant` was handed: from
    these a training that was killed goes on.

    Attributes:
        terms: model, batch and the recipe's criterion to named loss terms, which the record's curves name, too. A term
            that a batch has nothing for (the poisoned images' in a batch without any) is left out.
        weights: of the terms that the attack adds; the others count once.
        combine: by fixed weights, learned ones, or gradients projected so that they do not conflict.
        prepare: makes poison and covers of a batch after augmentation, with a random stream of its own (on the CPU).
            It gets the images bare, with what is stored left out, and returns the batch with the positions of those
            that it changed as `poisoned` or `covers`; these are then rounded to 8 bits. None for what was stored.
        along: modules that are trained with the victim, by name. While there are any, gradients flow through `prepare`
            and its rounding.
        step: what one step of the training does, in place of going down the terms: it gets the loop's
            `train.loop.Learner` and the batch, and returns the terms for the curves.
    """

    terms: Callable[[nn.Module, Batch, Criterion], Mapping[str, Float[Tensor, ""]]]
    weights: Mapping[str, float] = field(default_factory=dict)
    combine: Combine = "fixed"
    prepare: Callable[[Batch, torch.Generator], Batch] | None = None
    along: Mapping[str, Along] = field(default_factory=dict)
    step: Callable[[Any, Batch], Mapping[str, Float[Tensor, ""]]] | None = None


@dataclass(frozen=True)
class Edited:
    """What an attack makes of a trained model.

    Attributes:
        model: the edited model, apart from the one handed in.
        trigger: what is done to an image at test time, from now on.
        report: what the attack says of the edit, by name.
    """

    model: nn.Module
    trigger: Trigger
    report: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Implant:
    """How the backdoor gets into the victim; a field left None is neutral.

    Attributes:
        poison: training set and generator to poisoned training set; None where nothing that is stored is poisoned.
        objective: what training is for; None for the recipe's cross-entropy.
        edit: what is done to the trained model, with the attacker's random stream.
        examine: what the attack says of a model that looks at triggered images: of victim and clean twin.
    """

    poison: Callable[[ImageSet, torch.Generator], ImageSet] | None = None
    objective: Objective | None = None
    edit: Callable[[nn.Module, torch.Generator], Edited] | None = None
    examine: Callable[[nn.Module, Images], Mapping[str, float]] | None = None


@runtime_checkable
class Attack(Protocol):
    """A frozen dataclass that is the paper's table of hyper-parameters, with two verbs.

    Class attributes, or properties where a setting decides:
        card: the paper.
        version: a whole number, raised when the attack comes to mean something else.
        threat: what the attacker controls: the data, the training, or the weights. Where it is the weights, nothing is
            poisoned, and the victim is the clean twin until `edit` gets it.
        labels: whether poisoned images keep their true label ("clean") or not ("dirty").
        needs_surrogate: whether `fit` looks at a model of the attacker's own.

    It may also have what `ATTACK_MAY` lists, and no other public attribute: a misspelt power would do nothing.
    """

    card: ClassVar[Card]
    version: ClassVar[int]
    threat: Threat
    labels: Labels
    needs_surrogate: bool

    def goal_for(self, n_classes: int) -> Goal:
        """What triggered images of a data set with so many classes should be classified as."""
        ...

    def fit(self, access: Access) -> Fitted:
        """Make the trigger, at whatever cost: it is kept as a stage."""
        ...

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """How a trigger that `fit` made gets into the victim; cheap, and done again whenever a run is opened."""
        ...


ATTACK_MAY = {
    "check": "check(size) refuses images of `size` pixels with a UserError",
    "check_victim": "check_victim(model) refuses a victim's network before any work is done",
    "check_surrogate": "check_surrogate(model, images) refuses a surrogate's network before any work is done",
    "test_surrogate": "true where the trigger may use another surrogate at test time",
}
"""What an attack may have beside its verbs."""


@runtime_checkable
class Retrain(Protocol):
    """Trains the suspect's network anew with the recipe it came from, and tells nothing but the model."""

    def __call__(
        self,
        images: ImageSet,
        objective: Objective | None = None,
        epochs: int | None = None,
        start: nn.Module | None = None,
    ) -> nn.Module:
        """A ready model, trained on some images.

        Args:
            images: what it is trained on.
            objective: what for; None for cross-entropy.
            epochs: how long; None for as long as the recipe says.
            start: a model whose copy is trained on; None for the network's first weights.

        Raises:
            UserError: the training diverges.
        """
        ...


@dataclass(frozen=True)
class Suspect:
    """All that the defender may see: no trigger, no goal, no mask of poisoned images, no test set.

    Attributes:
        model: a function of images in [0, 1], in evaluation mode; a defence leaves it as it is.
        clean: a few images that the defender trusts, with true labels; a class may be missing from them.
        n_classes: how many there are.
        generator: the defender's random stream, on the CPU.
        train: what the model was trained on; None where the defender does not have it.
        compute: how the model computes. A defence runs its own forward passes within `computing()`; whoever calls an
            outcome sees to it that the outcome computes so.
        retrain: trains the network anew; None where the defender does not have the training set, or no such means.
    """

    model: nn.Module
    clean: ImageSet
    n_classes: int
    generator: torch.Generator
    train: ImageSet | None = None
    compute: Compute = field(default_factory=DefaultCompute)
    retrain: Retrain | None = None

    def __post_init__(self) -> None:
        """Refuse what a defender cannot work with or must not see."""
        if self.model.training:
            raise UserError("suspect.model is in training mode; call model.eval() first")
        if not len(self.clean):
            raise UserError("the clean set has 0 images; a defender needs at least one: raise data.holdout")
        for name, images in (("clean", self.clean), ("train", self.train)):
            if images is not None and images.slot is not None:
                raise UserError(f"suspect.{name} says which of its images are poisoned; hand in {name}.unmarked()")

    def training_set(self, asks: str) -> ImageSet:
        """The training set, for the defence `asks`; a UserError where there is none."""
        if self.train is None:
            raise UserError(f"{asks} filters a training set, and train = None; give it as Suspect(train=...)")
        return self.train

    def computing(self) -> AbstractContextManager[None]:
        """Within the block, the suspect's model computes as it was trained and is measured."""
        return self.compute(self.model, self.clean.device)


@dataclass(frozen=True)
class Screen:
    """A score for each input at test time: higher for triggered ones, the same at every call, of that image alone.

    It is called without gradients; a score that needs them switches them on (`torch.enable_grad`).

    As in all outcomes, `layer` is where in the model it looks, "" where at its outputs alone; `report` is what the
    defence says of itself, by name.
    """

    score: Callable[[Images], Float[Tensor, " b"]]
    layer: str = ""
    report: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Repaired:
    """A model in which the backdoor should no longer work: in evaluation mode, apart from the suspect's."""

    model: nn.Module
    layer: str = ""
    report: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Flagged:
    """A score for each training image, higher for poisoned ones, and which of them the defender would leave out."""

    score: Float[Tensor, " n"]
    flagged: Bool[Tensor, " n"]
    layer: str = ""
    report: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """A judgement of the whole model.

    Attributes:
        score: higher for a backdoored model.
        threshold: the paper's own: a model that scores above it counts as backdoored.
        suspected: the classes that the backdoor seems to lead to, the likeliest first; () where the method names none.
        by_class: a score for each class, higher for a likelier target; None where the method has none.
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
    """A frozen dataclass that is the paper's table of hyper-parameters, with one verb.

    Class attributes, or properties where a setting decides:
        card: the paper.
        version: a whole number, raised when the defence comes to mean something else.
        kind: which outcome `apply` returns: a "screen" a Screen, a "repair" a Repaired, a "filter" a Flagged, a
            "judgement" a Judged.
        needs_train: whether it looks at the training set.
        needs_attention: whether the model must have plain token attention.

    It has no other public attribute: a misspelt one would do nothing.
    """

    card: ClassVar[Card]
    version: ClassVar[int]
    kind: OutcomeKind
    needs_train: bool
    needs_attention: bool

    def apply(self, suspect: Suspect) -> Outcome:
        """The paper's method; the suspect's model stays as it was. A UserError where the suspect lacks something."""
        ...


def undeclared(method: type[Any]) -> list[str]:
    """Public attributes of an attack's or a defence's class that no contract knows: misspelt powers, as a rule."""
    contract = Attack if hasattr(method, "fit") else Defence
    known = {*contract.__annotations__, *vars(contract), *(ATTACK_MAY if contract is Attack else ())}
    known |= {f.name for f in fields(method)} if is_dataclass(method) else set()
    return sorted(name for name in dir(method) if not name.startswith("_") and name not in known)
