"""The nouns: what attacks, training, defences and metrics hand to each other.

Every image is float in [0, 1], `b c h w`; normalisation lives inside the model. Records are frozen: a function that
changes something returns a new one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from vitrap.errors import UserError
from vitrap.images import Batch as Batch
from vitrap.images import Images as Images
from vitrap.images import ImageSet as ImageSet

Threat = Literal["data", "training", "weights"]
Labels = Literal["dirty", "clean"]


@dataclass(frozen=True)
class Card:
    """The paper that an attack or a defence comes from."""

    title: str
    authors: str
    venue: str
    year: int
    arxiv: str = ""


@runtime_checkable
class Goal(Protocol):
    """What the attacker wants of a triggered image."""

    def labels(self, true: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """The label that each triggered image should get."""
        ...

    def counts(self, true: Int64[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Which images count for the ASR: those whose true label is not the wanted one already."""
        ...


@dataclass(frozen=True)
class AllToOne:
    """Every triggered image shall be classified as `target`."""

    target: int

    def labels(self, true: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """The target, for every image."""
        return torch.full_like(true, self.target)

    def counts(self, true: Int64[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Images of the target class do not count."""
        return true != self.target


@dataclass(frozen=True)
class Access:
    """All that the attacker may see. There is no test set in it.

    Attributes:
        train: the training samples.
        surrogate: a ready, frozen model of the attacker's own; None where the attack asks for none, or has `trigger`.
        generator: the attacker's random stream, on the CPU.
        trigger: what an earlier `fit` with the same settings came to, to be taken as it is; None for none.
    """

    train: ImageSet
    surrogate: nn.Module | None
    generator: torch.Generator
    trigger: "Trigger | None" = None


Trigger = Callable[[Images], Images]
"""Images in [0, 1] to images in [0, 1]; each image's result depends on that image alone."""

Criterion = Callable[[Float[Tensor, "b k"], Int64[Tensor, " b"]], Float[Tensor, ""]]
"""Logits and labels to the loss that the recipe trains with."""

Combine = Literal["fixed", "learned", "projected"]
"""How loss terms become one step: see `train.combine`."""


@dataclass(frozen=True)
class Objective:
    """What an attacker who controls training trains for.

    Attributes:
        terms: model, batch and the recipe's criterion to named loss terms, which the record's curves name, too. A term
            that a batch has nothing for (the poisoned images' in a batch without any) is left out.
        weights: of the terms that the attack adds; the others count once.
        combine: by fixed weights, learned ones, or gradients projected so that they do not conflict.
        stamp: what poisoned images get after augmentation, in place of what was stored; None for what was stored.
    """

    terms: Callable[[nn.Module, Batch, Criterion], Mapping[str, Float[Tensor, ""]]]
    weights: Mapping[str, float] = field(default_factory=dict)
    combine: Combine = "fixed"
    stamp: Trigger | None = None


@dataclass(frozen=True)
class Implant:
    """What an attack returns; fields left None are neutral.

    Attributes:
        trigger: what is done to an image at test time.
        poison: training set and generator to poisoned training set.
        goal: what triggered images should be classified as.
        objective: what training is for; None for the recipe's cross-entropy.
        edit: what is done to the trained model, which it leaves alone; None for nothing.
        views: pictures of how the trigger works, images to named maps in [0, 1]; None for none.
        report: what the attack says of itself, by name.
        examine: what it says of a model that looks at triggered images: of victim and clean twin; None for nothing.
    """

    trigger: Trigger
    poison: Callable[[ImageSet, torch.Generator], ImageSet]
    goal: Goal
    objective: Objective | None = None
    edit: Callable[[nn.Module], nn.Module] | None = None
    views: Callable[[Images], Mapping[str, Float[Tensor, "b h w"]]] | None = None
    report: Mapping[str, float] = field(default_factory=dict)
    examine: Callable[[nn.Module, Images], Mapping[str, float]] | None = None


@runtime_checkable
class Attack(Protocol):
    """A frozen dataclass that is the paper's table of hyper-parameters, with one verb.

    Class attributes, or properties where a setting decides:
        card: the paper.
        threat: what the attacker controls: the data, the training, or the weights.
        labels: whether poisoned images keep their true label ("clean") or not ("dirty").
        needs_surrogate: whether `fit` looks at a model of the attacker's own.

    An attack that does not suit every image may have a method `check(size)`, which refuses images of `size` pixels,
    and one that does not suit every victim a method `check_victim(model)`: each with a UserError before any work is
    done. One that optimises its trigger may say so by `optimises`: a run then keeps that trigger as a stage, and hands
    it to the next `fit`.
    """

    card: ClassVar[Card]
    threat: Threat
    labels: Labels
    needs_surrogate: bool
    target: Any
    poison_rate: Any

    def fit(self, access: Access) -> Implant:
        """The paper's method: from what the attacker sees to what is implanted."""
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
    """

    model: nn.Module
    clean: ImageSet
    n_classes: int
    generator: torch.Generator
    train: ImageSet | None = None

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


@dataclass(frozen=True)
class Screen:
    """A score for each input at test time: higher for triggered ones, the same at every call, of that image alone.

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
        suspected: the class that the backdoor seems to lead to, None where the method names none.
    """

    score: float
    threshold: float
    suspected: int | None = None
    layer: str = ""
    report: Mapping[str, float] = field(default_factory=dict)


Outcome = Screen | Repaired | Flagged | Judged
OutcomeKind = Literal["screen", "repair", "filter", "judgement"]


@runtime_checkable
class Defence(Protocol):
    """A frozen dataclass that is the paper's table of hyper-parameters, with one verb.

    Class attributes:
        card: the paper.
        kind: which outcome `apply` returns: a "screen" a Screen, a "repair" a Repaired, a "filter" a Flagged, a
            "judgement" a Judged.
        needs_train: whether it looks at the training set.
        needs_attention: whether the model must have plain token attention.
    """

    card: ClassVar[Card]
    kind: ClassVar[OutcomeKind]
    needs_train: ClassVar[bool]
    needs_attention: ClassVar[bool]

    def apply(self, suspect: Suspect) -> Outcome:
        """The paper's method; the suspect's model stays as it was. A UserError where the suspect lacks something."""
        ...
