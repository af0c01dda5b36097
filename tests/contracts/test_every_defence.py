"""The contract of a defence, held for every registered one.

A rule is a function that asserts something of a defence at work. Every rule is also shown a defence that breaks it.
"""

import copy
import json
import math
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass, replace
from functools import cache, cached_property
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.cases import DEFENCES
from vitrap import registry
from vitrap.contracts import (
    Card,
    Defence,
    Flagged,
    ImageSet,
    Judged,
    Outcome,
    OutcomeKind,
    Repaired,
    Screen,
    Suspect,
    undeclared,
)
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier
from vitrap.models.observe import features, head_layer, transformer
from vitrap.params import Param
from vitrap.train.arithmetic import Arithmetic
from vitrap.train.loop import Streams, train
from vitrap.train.recipe import Recipe

N_CLASSES = 10
MISSING = 3
"""The class that is missing where one is."""
KINDS: dict[OutcomeKind, type[Any]] = {"screen": Screen, "repair": Repaired, "filter": Flagged, "judgement": Judged}
SOURCES = ("paper", "code", "field", "assumed")
HALF = Arithmetic("bf16", "eager")


def kind_of(name: str) -> type[Any]:
    """The defence of a case; after a stroke stands which of its settings."""
    return registry.get("defences", name.split("/")[0])


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Bench:
    """A defence at work.

    Attributes:
        name: the case.
        defence: with the settings of the case.
        model: a tiny ViT that tells most digits apart.
        cnn: a small network without attention.
        clean: the defender's images.
        train: what the model was trained on.
        test: other images.
    """

    name: str
    defence: Any
    model: nn.Module
    cnn: nn.Module
    clean: ImageSet
    train: ImageSet
    test: ImageSet

    @cached_property
    def images(self) -> Tensor:
        """A batch to look at."""
        return self.test.images(torch.arange(12))

    def suspect(self, **other: Any) -> Suspect:
        """Always the same one, but for the parts given."""
        usual = {
            "model": self.model,
            "clean": self.clean,
            "n_classes": N_CLASSES,
            "generator": generator(),
            "train": self.train if self.defence.needs_train else None,
        }
        return Suspect(**{**usual, **other})

    def apply(self, **other: Any) -> Outcome:
        """A fresh outcome."""
        return self.defence.apply(self.suspect(**other))

    @cached_property
    def outcome(self) -> Any:
        """What comes of the usual suspect; applied once."""
        return self.apply()


Rule = Callable[[Bench], None]
Broken = Callable[[Bench], Bench]
Change = Callable[[Tensor, Tensor], Tensor]


def said(outcome: Any, images: Tensor) -> list[Tensor]:
    """All that an outcome says, of `images` where it looks at any."""
    if isinstance(outcome, Screen):
        return [outcome.score(images)]
    if isinstance(outcome, Repaired):
        with torch.no_grad():
            return [outcome.model(images), *outcome.model.state_dict().values()]
    if isinstance(outcome, Flagged):
        return [outcome.score, outcome.flagged]
    by_class = [] if outcome.by_class is None else [outcome.by_class]
    numbers = [outcome.score, outcome.threshold, *outcome.suspected]
    return [torch.tensor(numbers, dtype=torch.float64), *by_class]


def assert_same(one: Outcome, other: Outcome, images: Tensor) -> None:
    pairs = zip(said(one, images), said(other, images), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "it says something else"
    assert (one.layer, dict(one.report)) == (other.layer, dict(other.report))


def assert_sound(outcome: Any, bench: Bench, train: ImageSet | None = None) -> None:
    """The outcome can be used: right shapes, finite numbers."""
    assert type(outcome) is KINDS[bench.defence.kind]
    if isinstance(outcome, Screen):
        for images in (bench.images, bench.images[:1]):
            scores = outcome.score(images)
            assert scores.shape == (len(images),)
            assert scores.is_floating_point()
            assert scores.isfinite().all()
            assert not scores.requires_grad, "the scores hold on to a graph"
    elif isinstance(outcome, Repaired):
        for images in (bench.images, bench.images[:1]):
            with torch.no_grad():
                logits = outcome.model(images)
            assert logits.shape == (len(images), N_CLASSES)
            assert logits.isfinite().all()
    elif isinstance(outcome, Flagged):
        n = len(train or bench.train)
        assert (outcome.score.shape, outcome.flagged.shape) == ((n,), (n,))
        assert outcome.score.is_floating_point()
        assert outcome.score.isfinite().all()
        assert not outcome.score.requires_grad
        assert outcome.flagged.dtype == torch.bool
    else:
        assert isinstance(outcome.score, float)
        assert isinstance(outcome.threshold, float)
        assert math.isfinite(outcome.score)
        assert math.isfinite(outcome.threshold)
        assert type(outcome.suspected) is tuple
        assert all(type(suspected) is int and suspected in range(N_CLASSES) for suspected in outcome.suspected)
        assert len(set(outcome.suspected)) == len(outcome.suspected), "it names a class twice"
        if outcome.by_class is not None:
            assert outcome.by_class.shape == (N_CLASSES,)
            assert outcome.by_class.is_floating_point()
            assert outcome.by_class.isfinite().all()


def refusal(work: Callable[[], object]) -> str:
    """The one line in which `work` is refused."""
    try:
        work()
    except UserError as refused:
        message = str(refused)
        assert message
        assert "\n" not in message
        return message
    raise AssertionError("it is not refused")


# What must stay as it was


def state_of(model: nn.Module) -> list[Any]:
    """All that a defence could leave behind in a model."""
    modules = list(model.modules())
    hooks = [{k: list(v) for k, v in vars(m).items() if k.endswith("_hooks") and v is not None} for m in modules]
    plain = [
        {k: v for k, v in vars(m).items() if isinstance(v, bool | int | float | str | tuple | None)} for m in modules
    ]
    weights = [(id(w), w.requires_grad, w.grad is None, w.dtype) for w in model.parameters()]
    return [[sorted(vars(m)) for m in modules], hooks, plain, weights, list(model.state_dict()), repr(model)]


def suspects_model_stays(bench: Bench) -> None:
    """Some of its weights ask for a gradient, some do not."""
    model = copy.deepcopy(bench.model).requires_grad_(True)
    next(model.parameters()).requires_grad_(False)
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    outcome = bench.apply(model=model)
    said(outcome, bench.images)
    assert state_of(model) == before
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), f"{name} was changed in place"


def data_sets_stay(bench: Bench) -> None:
    suspect = bench.suspect()
    before = copy.deepcopy([suspect.clean, suspect.train])
    bench.defence.apply(suspect)
    for was, now in zip(before, (suspect.clean, suspect.train), strict=True):
        for name, value in vars(was).items() if was is not None else ():
            found = getattr(now, name)
            assert torch.equal(found, value) if isinstance(value, Tensor) else found == value, f"{name} was changed"


def images_stay(bench: Bench) -> None:
    images = bench.images.clone()
    said(bench.outcome, images)
    assert torch.equal(images, bench.images), "what it is shown was changed in place"


def global_state() -> list[Any]:
    cuda = torch.backends.cuda
    return [
        torch.get_rng_state().tolist(),
        [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state(legacy=True)],  # noqa: NPY002
        (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()),
        (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()),
    ]


def global_state_stays(bench: Bench) -> None:
    before = global_state()
    said(bench.apply(), bench.images)
    assert global_state() == before, "it draws from, or sets, what all share"


def only_the_generator_decides(bench: Bench) -> None:
    """Twice with the same generator, under another global seed."""
    once = bench.outcome
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + 1)
        assert_same(once, bench.apply(), bench.images)


def a_frozen_model_is_as_good(bench: Bench) -> None:
    """Whether the weights ask for a gradient is the caller's business."""
    frozen = copy.deepcopy(bench.model).requires_grad_(False)
    assert_same(bench.outcome, bench.apply(model=frozen), bench.images)


# What comes of it


def outcome_is_sound(bench: Bench) -> None:
    assert_sound(bench.outcome, bench)


def report_can_be_kept(bench: Bench) -> None:
    assert isinstance(bench.outcome.layer, str)
    json.dumps({**bench.outcome.report}, allow_nan=False)


def outcome_is_the_same_at_every_call(bench: Bench) -> None:
    """Nor does looking at images draw from the defender's generator."""
    suspect = bench.suspect()
    outcome = bench.defence.apply(suspect)
    drawn = suspect.generator.get_state()
    wanted = said(outcome, bench.images)
    said(outcome, 1 - bench.images)
    with torch.no_grad():
        again = said(outcome, bench.images)
    for one, other in zip(wanted, again, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(suspect.generator.get_state(), drawn)


def each_image_is_seen_alone(bench: Bench) -> None:
    if not isinstance(bench.outcome, Screen | Repaired):
        return
    together = said(bench.outcome, bench.images)[0]
    alone = torch.cat([said(bench.outcome, image)[0] for image in bench.images.split(1)])
    turned = said(bench.outcome, bench.images.flip(0))[0].flip(0)
    for other in (alone, turned):
        torch.testing.assert_close(other, together, rtol=1e-3, atol=1e-4)


def repair_is_a_model_of_its_own(bench: Bench) -> None:
    """A copy, or a wrapper around the suspect's model that leaves all weights to it."""
    if not isinstance(bench.outcome, Repaired):
        return
    repaired = bench.outcome.model
    assert isinstance(repaired, nn.Module)
    assert repaired is not bench.model
    assert not any(module.training for module in repaired.modules()), "not in evaluation mode"
    suspects, its = ({w.untyped_storage().data_ptr() for w in m.parameters()} for m in (bench.model, repaired))
    assert its <= suspects or not its & suspects, "it shares some weights with the suspect's model, and not others"


# What it may ask for


def lacking(data: ImageSet) -> ImageSet:
    """Without the images of a class."""
    return data.take((data.labels != MISSING).nonzero().squeeze(1))


def a_class_may_be_missing(bench: Bench) -> None:
    train = lacking(bench.train)
    outcome = bench.apply(clean=lacking(bench.clean), train=train if bench.defence.needs_train else None)
    assert_sound(outcome, bench, train)


def one_clean_image_is_enough(bench: Bench) -> None:
    assert_sound(bench.apply(clean=bench.clean.take(torch.tensor([1]))), bench)


def the_training_set_is_asked_for_by_name(bench: Bench) -> None:
    """With it every defence works; without it those that need none."""
    assert_sound(bench.apply(train=bench.train), bench)
    if not bench.defence.needs_train:
        assert_sound(bench.apply(train=None), bench)
        return
    message = refusal(lambda: bench.apply(train=None))
    assert bench.name.split("/")[0] in message.lower().replace(" ", "_"), "it does not say which defence asks"
    assert "Suspect(train=" in message, "it does not say what to do"


def attention_is_asked_for_only_where_it_is_needed(bench: Bench) -> None:
    if not bench.defence.needs_attention:
        assert_sound(bench.apply(model=bench.cnn), bench)
        return
    assert "attention" in refusal(lambda: bench.apply(model=bench.cnn))


def it_works_where_the_suspect_computes_in_bf16(bench: Bench) -> None:
    outcome = bench.apply(compute=HALF)
    with torch.autocast("cpu", torch.bfloat16):
        assert_sound(outcome, bench)
    json.dumps({**outcome.report}, allow_nan=False)


def it_computes_as_the_suspect_does(bench: Bench) -> None:
    """Every forward pass of its own, of the model or of a copy."""
    passes: list[bool] = []
    model = copy.deepcopy(bench.model)
    model.register_forward_pre_hook(lambda module, args: passes.append(torch.is_autocast_enabled("cpu")))
    bench.apply(model=model, compute=HALF)
    assert all(passes), "a forward pass outside of suspect.computing()"


# What it says of itself


def its_version_is_a_positive_whole_number(bench: Bench) -> None:
    assert type(bench.defence.version) is int
    assert bench.defence.version > 0


def it_has_no_attribute_that_no_contract_knows(bench: Bench) -> None:
    assert undeclared(type(bench.defence)) == []


def a_clean_model_survives(bench: Bench) -> None:
    """A repair leaves more than half of its accuracy, a filter more than half of its training set."""
    if isinstance(bench.outcome, Repaired):
        before, after = (accuracy(model, bench.test) for model in (bench.model, bench.outcome.model))
        assert before > 0.8
        assert after > before / 2
    if isinstance(bench.outcome, Flagged):
        assert bench.outcome.flagged.float().mean() < 0.5


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageSet) -> float:
    return (model(data.images(torch.arange(len(data)))).argmax(1) == data.labels).float().mean().item()


# Defences that keep the contract, one of a kind, for others to break


@dataclass(frozen=True)
class Plain:
    """A defence whose work is a function."""

    kind: OutcomeKind
    work: Callable[[Suspect], Any]
    needs_train: bool = False
    needs_attention: bool = False
    version: int = 1
    card: Card = Card("Plain", "nobody", "nowhere", 2024)

    def apply(self, suspect: Suspect) -> Any:
        return self.work(suspect)


@dataclass(frozen=True)
class Misspelt:
    """A defence with a power that nobody will ever ask for."""

    work: Callable[[Suspect], Any]
    kind: ClassVar[OutcomeKind] = "screen"
    needs_train: ClassVar[bool] = False
    needs_attentions: ClassVar[bool] = True
    needs_attention: ClassVar[bool] = False
    version: ClassVar[int] = 1

    def apply(self, suspect: Suspect) -> Any:
        return self.work(suspect)


@dataclass(frozen=True)
class Either:
    """A defence whose kind and needs are a setting's business."""

    sifts: bool = False
    honest: bool = True
    version: ClassVar[int] = 2
    needs_attention: ClassVar[bool] = False
    card: ClassVar[Card] = Card("Either", "nobody", "nowhere", 2024)

    @property
    def kind(self) -> OutcomeKind:
        return "filter" if self.sifts else "screen"

    @property
    def needs_train(self) -> bool:
        return self.sifts

    def apply(self, suspect: Suspect) -> Outcome:
        return sift(suspect) if self.sifts == self.honest else screen(suspect)


class Through(nn.Module):
    """A model of which either the images that it sees or the logits that it gives are changed."""

    def __init__(self, model: nn.Module, seen: Change | None = None, given: Change | None = None) -> None:
        super().__init__()
        self.model, self.seen, self.given = model, seen, given

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(self.seen(images, images) if self.seen else images)
        return self.given(logits, images) if self.given else logits


def everything(data: ImageSet) -> Tensor:
    return data.images(torch.arange(len(data)))


def screen(suspect: Suspect) -> Screen:
    """How sure the model is of an image in coloured light."""
    light = torch.rand(3, 1, 1, generator=suspect.generator)

    @torch.no_grad()
    def score(images: Tensor) -> Tensor:
        return suspect.model((images + light) / 2).float().softmax(1).amax(1)

    return Screen(score, "outputs", {"red": light[0].item()})


def repair(suspect: Suspect) -> Repaired:
    """A copy with other biases."""
    model = copy.deepcopy(suspect.model).requires_grad_(True)
    with torch.no_grad():
        head_layer(model)[1].bias.add_(0.01 * torch.randn(N_CLASSES, generator=suspect.generator))
    return Repaired(model.eval())


def wrap(suspect: Suspect) -> Repaired:
    """The model in darker light."""
    transformer(suspect.model)
    return Repaired(Through(suspect.model, seen=lambda images, _: 0.95 * images).eval())


def sift(suspect: Suspect) -> Flagged:
    """The images of the longest features."""
    images = everything(suspect.training_set("plain"))
    with suspect.computing():
        score = features(suspect.model, images).norm(dim=1)
    return Flagged(score, score > score.quantile(0.9))


@torch.no_grad()
def judge(suspect: Suspect) -> Judged:
    """The greatest mean logit, and the two classes with the greatest."""
    with suspect.computing():
        mean = suspect.model(everything(suspect.clean)).float().mean(0)
    return Judged(mean.max().item(), 2.0, tuple(mean.topk(2).indices.tolist()), mean)


@torch.no_grad()
def judge_plainly(suspect: Suspect) -> Judged:
    """As if the suspect computed in fp32."""
    return Judged(suspect.model(everything(suspect.clean)).max().item(), 2.0)


PLAIN: dict[str, Any] = {
    "screen": Plain("screen", screen),
    "repair": Plain("repair", repair),
    "wrapper": Plain("repair", wrap, needs_attention=True),
    "filter": Plain("filter", sift, needs_train=True),
    "judgement": Plain("judgement", judge),
    "either, a screen": Either(),
    "either, a filter": Either(sifts=True),
}


# The rules at work


def working(work: Callable[[Suspect], Any]) -> Broken:
    """The bench with a defence that works otherwise."""
    return lambda bench: replace(bench, defence=replace(bench.defence, work=work))


def claims(**facts: Any) -> Broken:
    """The bench with a defence that says other things of itself."""
    return lambda bench: replace(bench, defence=replace(bench.defence, **facts))


def first(change: Callable[[Suspect], Any]) -> Broken:
    """A `change` of the suspect, or of the world, then the usual work."""

    def breaking(bench: Bench) -> Bench:
        def work(suspect: Suspect) -> Any:
            change(suspect)
            return bench.defence.apply(suspect)

        return working(work)(bench)

    return breaking


def then(**parts: Callable[[Any, Suspect], Any]) -> Broken:
    """The usual outcome with other parts, made from the outcome and the suspect."""

    def breaking(bench: Bench) -> Bench:
        def work(suspect: Suspect) -> Any:
            outcome = bench.defence.apply(suspect)
            return replace(outcome, **{name: part(outcome, suspect) for name, part in parts.items()})

        return working(work)(bench)

    return breaking


def scoring(change: Change) -> Broken:
    """A screen that gives other scores, made from the usual ones and the images."""
    return then(score=lambda outcome, suspect: lambda images: change(outcome.score(images), images))


def answering(change: Change) -> Broken:
    """A repair that gives other logits, made from the usual ones and the images."""
    return then(model=lambda outcome, suspect: Through(outcome.model, given=change).eval())


def at_each_call(act: Callable[[Suspect], Any]) -> Broken:
    """A screen that does something beside, whenever it scores."""
    return then(score=lambda outcome, suspect: lambda images: (act(suspect), outcome.score(images))[1])


def remembering(bench: Bench) -> Bench:
    """A screen whose scores depend on those before."""
    seen: list[float] = [0.0]

    def change(scores: Tensor, images: Tensor) -> Tensor:
        seen.append(images.mean().item())
        return scores + seen[-2]

    return scoring(change)(bench)


def counting(bench: Bench) -> Bench:
    """A defence that knows how often it has been applied."""
    calls: list[Suspect] = []
    return then(report=lambda outcome, suspect: {"calls": (calls.append(suspect), len(calls))[1]})(bench)


def unseeded(suspect: Suspect) -> Screen:
    with torch.random.fork_rng(devices=[]):
        return screen(replace(suspect, generator=generator(int(torch.randint(2**31, ())))))


def nudge(suspect: Suspect) -> None:
    with torch.no_grad():
        next(suspect.model.parameters()).mul_(1.001)


def leave_gradients(suspect: Suspect) -> None:
    suspect.model(everything(suspect.clean)).sum().backward()


def hook(suspect: Suspect) -> None:
    head_layer(suspect.model)[1].register_forward_hook(lambda *args: None)


def unfuse(suspect: Suspect) -> None:
    transformer(suspect.model).blocks[-1].attn.fused_attn = False


def patch(suspect: Suspect) -> None:
    suspect.model.forward = suspect.model.forward


def drop(suspect: Suspect) -> None:
    next(m for m in suspect.model.modules() if isinstance(m, nn.Dropout)).p = 0.1


def explain(suspect: Suspect) -> Judged:
    """Without freezing the weights, and then it takes for granted that they are not frozen."""
    weight = head_layer(suspect.model)[1].weight
    (slope,) = torch.autograd.grad(suspect.model(everything(suspect.clean)).sum(), weight)
    return Judged(slope.norm().item(), 1.0)


def need_every_class(suspect: Suspect) -> Judged:
    counts = torch.bincount(suspect.clean.labels, minlength=N_CLASSES)
    return Judged((1 / counts).max().item(), 1.0)


def need_two_images(suspect: Suspect) -> Judged:
    n = torch.tensor(len(suspect.clean))
    return Judged((n / (n - 1)).item(), 1.0)


def need_attention(suspect: Suspect) -> Screen:
    transformer(suspect.model)
    return screen(suspect)


def need_training_set(suspect: Suspect) -> Screen:
    suspect.training_set("plain")
    return screen(suspect)


def sift_nameless(suspect: Suspect) -> Flagged:
    if suspect.train is None:
        raise UserError("train = None; give it as Suspect(train=...)")
    return sift(suspect)


def sift_helpless(suspect: Suspect) -> Flagged:
    if suspect.train is None:
        raise UserError("plain has no training set")
    return sift(suspect)


def sift_crashing(suspect: Suspect) -> Flagged:
    assert suspect.train is not None
    return sift(suspect)


def wrap_wordy(suspect: Suspect) -> Repaired:
    try:
        return wrap(suspect)
    except UserError as error:
        raise UserError(f"{error}\nplease take another model") from error


def share_blocks(suspect: Suspect) -> Repaired:
    found = repair(suspect)
    transformer(found.model).blocks = transformer(suspect.model).blocks
    return found


def half_in_training(suspect: Suspect) -> Repaired:
    found = repair(suspect)
    transformer(found.model).blocks.train()
    return found


def forget(suspect: Suspect) -> Repaired:
    found = repair(suspect)
    with torch.no_grad():
        head_layer(found.model)[1].weight.mul_(-1)
    return found


@torch.no_grad()
def judge_with_numpy(suspect: Suspect) -> Judged:
    """Which has no bf16."""
    with suspect.computing():
        return Judged(float(suspect.model(everything(suspect.clean)).numpy().max()), 2.0)


def graph(scores: Tensor, images: Tensor) -> Tensor:
    return scores + torch.zeros(1, requires_grad=True)


BROKEN: list[tuple[Rule, str, Broken]] = [
    (suspects_model_stays, "screen", first(nudge)),
    (suspects_model_stays, "screen", at_each_call(nudge)),
    (suspects_model_stays, "repair", first(lambda suspect: suspect.model.requires_grad_(True))),
    (suspects_model_stays, "repair", first(lambda suspect: suspect.model.requires_grad_(False))),
    (suspects_model_stays, "judgement", first(lambda suspect: suspect.model.train())),
    (suspects_model_stays, "judgement", first(leave_gradients)),
    (suspects_model_stays, "filter", first(hook)),
    (suspects_model_stays, "screen", at_each_call(hook)),
    (suspects_model_stays, "wrapper", first(unfuse)),
    (suspects_model_stays, "screen", first(patch)),
    (suspects_model_stays, "screen", first(drop)),
    (data_sets_stay, "screen", first(lambda suspect: suspect.clean.pixels[:1].fill_(7))),
    (data_sets_stay, "repair", first(lambda suspect: suspect.clean.labels.fill_(7))),
    (data_sets_stay, "filter", first(lambda suspect: suspect.training_set("plain").pixels[:1].fill_(7))),
    (images_stay, "screen", scoring(lambda scores, images: scores + 0 * images.mul_(0.5).sum())),
    (images_stay, "wrapper", answering(lambda logits, images: logits + 0 * images.mul_(0.5).sum())),
    (global_state_stays, "screen", first(lambda suspect: torch.rand(1))),
    (global_state_stays, "screen", at_each_call(lambda suspect: torch.rand(1))),
    (global_state_stays, "judgement", first(lambda suspect: np.random.rand())),  # noqa: NPY002
    (global_state_stays, "judgement", first(lambda suspect: torch.set_grad_enabled(False))),
    (global_state_stays, "screen", first(lambda suspect: torch.set_autocast_enabled("cpu", True))),
    (global_state_stays, "screen", at_each_call(lambda suspect: torch.set_autocast_dtype("cpu", torch.float16))),
    (only_the_generator_decides, "screen", working(unseeded)),
    (only_the_generator_decides, "judgement", counting),
    (only_the_generator_decides, "repair", counting),
    (a_frozen_model_is_as_good, "judgement", working(explain)),
    (outcome_is_sound, "screen", claims(kind="repair")),
    (outcome_is_sound, "screen", scoring(lambda scores, images: scores[:-1])),
    (outcome_is_sound, "screen", scoring(lambda scores, images: scores[:, None])),
    (outcome_is_sound, "screen", scoring(lambda scores, images: scores.squeeze())),
    (outcome_is_sound, "screen", scoring(lambda scores, images: scores.round().long())),
    (outcome_is_sound, "screen", scoring(lambda scores, images: scores.log() / (len(images) - 1))),
    (outcome_is_sound, "screen", scoring(graph)),
    (outcome_is_sound, "repair", answering(lambda logits, images: logits[:, :-1])),
    (outcome_is_sound, "repair", answering(lambda logits, images: logits.squeeze())),
    (outcome_is_sound, "wrapper", answering(lambda logits, images: logits / 0)),
    (outcome_is_sound, "filter", then(score=lambda outcome, suspect: outcome.score / 0)),
    (
        outcome_is_sound,
        "filter",
        working(lambda suspect: Flagged(torch.rand(7), torch.zeros(7, dtype=torch.bool))),
    ),
    (outcome_is_sound, "filter", then(score=lambda outcome, suspect: graph(outcome.score, outcome.score))),
    (outcome_is_sound, "judgement", then(score=lambda outcome, suspect: math.nan)),
    (outcome_is_sound, "judgement", then(threshold=lambda outcome, suspect: math.inf)),
    (outcome_is_sound, "screen", lambda bench: replace(bench, defence=Either(honest=False))),
    (outcome_is_sound, "filter", lambda bench: replace(bench, defence=Either(sifts=True, honest=False))),
    (outcome_is_sound, "judgement", then(suspected=lambda outcome, suspect: (N_CLASSES,))),
    (outcome_is_sound, "judgement", then(suspected=lambda outcome, suspect: (3, -1))),
    (outcome_is_sound, "judgement", then(suspected=lambda outcome, suspect: (3, 3))),
    (outcome_is_sound, "judgement", then(suspected=lambda outcome, suspect: (True,))),
    (outcome_is_sound, "judgement", then(by_class=lambda outcome, suspect: outcome.by_class[1:])),
    (outcome_is_sound, "judgement", then(by_class=lambda outcome, suspect: outcome.by_class / 0)),
    (outcome_is_sound, "judgement", then(by_class=lambda outcome, suspect: outcome.by_class.long())),
    (report_can_be_kept, "screen", then(report=lambda outcome, suspect: {"share": math.nan})),
    (report_can_be_kept, "filter", then(report=lambda outcome, suspect: {"share": torch.ones(())})),
    (outcome_is_the_same_at_every_call, "screen", remembering),
    (
        outcome_is_the_same_at_every_call,
        "screen",
        at_each_call(lambda suspect: torch.rand(1, generator=suspect.generator)),
    ),
    (
        outcome_is_the_same_at_every_call,
        "screen",
        scoring(lambda scores, images: scores if torch.is_grad_enabled() else -scores),
    ),
    (
        outcome_is_the_same_at_every_call,
        "repair",
        answering(lambda logits, images: logits + torch.rand(logits.shape)),
    ),
    (each_image_is_seen_alone, "screen", scoring(lambda scores, images: scores - images.mean())),
    (each_image_is_seen_alone, "screen", scoring(lambda scores, images: scores + torch.arange(len(scores)))),
    (each_image_is_seen_alone, "wrapper", answering(lambda logits, images: logits - images.mean())),
    (repair_is_a_model_of_its_own, "repair", working(lambda suspect: Repaired(suspect.model))),
    (repair_is_a_model_of_its_own, "repair", working(share_blocks)),
    (repair_is_a_model_of_its_own, "repair", working(half_in_training)),
    (a_class_may_be_missing, "judgement", working(need_every_class)),
    (one_clean_image_is_enough, "judgement", working(need_two_images)),
    (the_training_set_is_asked_for_by_name, "screen", working(need_training_set)),
    (the_training_set_is_asked_for_by_name, "screen", claims(needs_train=True)),
    (the_training_set_is_asked_for_by_name, "filter", working(sift_nameless)),
    (the_training_set_is_asked_for_by_name, "filter", working(sift_helpless)),
    (the_training_set_is_asked_for_by_name, "filter", working(sift_crashing)),
    (attention_is_asked_for_only_where_it_is_needed, "screen", working(need_attention)),
    (attention_is_asked_for_only_where_it_is_needed, "screen", claims(needs_attention=True)),
    (attention_is_asked_for_only_where_it_is_needed, "wrapper", working(wrap_wordy)),
    (it_works_where_the_suspect_computes_in_bf16, "judgement", working(judge_with_numpy)),
    (it_computes_as_the_suspect_does, "judgement", working(judge_plainly)),
    (its_version_is_a_positive_whole_number, "screen", claims(version=0)),
    (its_version_is_a_positive_whole_number, "screen", claims(version=True)),
    (its_version_is_a_positive_whole_number, "screen", claims(version="1")),
    (
        it_has_no_attribute_that_no_contract_knows,
        "screen",
        lambda bench: replace(bench, defence=Misspelt(bench.defence.work)),
    ),
    (a_clean_model_survives, "repair", working(forget)),
    (a_clean_model_survives, "filter", then(flagged=lambda outcome, suspect: outcome.score > 0)),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in BROKEN))
each_defence = pytest.mark.parametrize("name", DEFENCES)


def trained(model: nn.Module, world: World, epochs: int) -> nn.Module:
    """With most of the digits right, after a second or two."""
    streams = Streams(*map(generator, range(4)))
    train(model, world.train, Recipe(epochs=epochs, batch_size=32, lr=1e-2), streams)
    return model


@pytest.fixture(scope="module")
def victim(tiny_vit: Callable[..., Classifier], digits_world: World) -> nn.Module:
    return trained(tiny_vit(), digits_world, 10)


@pytest.fixture(scope="module")
def cnn(digits_world: World) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(128, N_CLASSES)]
    return trained(nn.Sequential(*layers), digits_world, 6)


@pytest.fixture(scope="module")
def bench_for(victim: nn.Module, cnn: nn.Module, digits_world: World) -> Callable[[str, Any], Bench]:
    """A bench of its own for each defence: networks, images and all."""
    sets = [
        data.take(torch.arange(n))
        for data, n in ((digits_world.clean, 40), (digits_world.train, 80), (digits_world.test, 100))
    ]
    assert all(MISSING in data.labels for data in sets)
    return lambda name, defence: Bench(name, defence, *copy.deepcopy((victim, cnn, *sets)))


@pytest.fixture(scope="module")
def bench_of(bench_for: Callable[[str, Any], Bench]) -> Callable[[str], Bench]:
    @cache
    def bench(name: str) -> Bench:
        return bench_for(name, kind_of(name)(**DEFENCES[name]))

    return bench


def label(value: object) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", "")


@each_defence
@pytest.mark.parametrize("rule", RULES, ids=label)
def test_defence_keeps(rule: Rule, name: str, bench_of: Callable[[str], Bench]) -> None:
    rule(bench_of(name))


@pytest.mark.parametrize("rule", RULES, ids=label)
@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_defence_keeps(rule: Rule, kind: str, bench_for: Callable[[str, Any], Bench]) -> None:
    rule(bench_for("plain", PLAIN[kind]))


@pytest.mark.parametrize(("rule", "kind", "broken"), BROKEN, ids=label)
def test_rule_catches(rule: Rule, kind: str, broken: Broken, bench_for: Callable[[str, Any], Bench]) -> None:
    bench = broken(bench_for("plain", PLAIN[kind]))
    try:
        with torch.enable_grad(), pytest.raises((AssertionError, TypeError, ValueError, RuntimeError)):
            rule(bench)
    finally:
        torch.set_autocast_enabled("cpu", False)
        torch.set_autocast_dtype("cpu", torch.bfloat16)


def test_every_rule_is_held() -> None:
    held = {f for f in globals().values() if getattr(f, "__annotations__", {}) == {"bench": Bench, "return": None}}
    assert set(RULES) == held


def test_every_defence_has_a_case() -> None:
    assert set(registry.names("defences")) == {name.split("/")[0] for name in DEFENCES}


# The defence as a record of settings


@each_defence
def test_it_is_a_defence_and_says_which(name: str) -> None:
    defence = kind_of(name)(**DEFENCES[name])
    assert isinstance(defence, Defence)
    assert defence.kind in KINDS
    assert isinstance(defence.needs_train, bool)
    assert isinstance(defence.needs_attention, bool)
    card = defence.card
    assert isinstance(card, Card)
    assert card.title
    assert card.authors
    assert card.venue
    assert 2016 <= card.year <= 2100
    assert not card.arxiv or re.fullmatch(r"\d{4}\.\d{4,5}", card.arxiv)
    assert registry.headline("defences", name.split("/")[0]).endswith(".")


@each_defence
def test_it_is_a_frozen_record(name: str) -> None:
    kind = kind_of(name)
    assert is_dataclass(kind)
    defence = kind(**DEFENCES[name])
    for setting in ("card", "version", *(f.name for f in fields(defence))):
        with pytest.raises(FrozenInstanceError):
            setattr(defence, setting, None)
    assert defence == kind(**DEFENCES[name])
    assert hash(defence) == hash(kind(**DEFENCES[name]))
    assert defence != kind() or not fields(defence), "the case is the default: it would not show a setting that is lost"


@each_defence
def test_every_parameter_says_what_it_is_and_allows_its_default(name: str) -> None:
    for f in fields(kind_of(name)()):
        about = f.metadata["param"]
        assert isinstance(about, Param)
        assert about.doc
        assert about.source in SOURCES
        assert about.allows(f.default)
        assert about.range() or isinstance(f.default, bool), f"{f.name} needs low, high, odd, choices or a Literal type"


def beyond(about: Param) -> list[Any]:
    """Values that the parameter must refuse."""
    values: list[Any] = ["nonsense"] if about.choices else []
    values += [] if about.low is None else [about.low if about.open else about.low - 1]
    values += [] if about.high is None else [about.high if about.open is True else about.high + 1]
    return [*values, 2] if about.odd else values


@each_defence
def test_values_out_of_range_are_refused(name: str) -> None:
    kind = kind_of(name)
    for f in fields(kind):
        for value in beyond(f.metadata["param"]):
            same_kind = int(value) if isinstance(f.default, int) and isinstance(value, float) else value
            made = object.__new__(kind)  # the type checks of these tests would refuse a wrong string first
            for name_of, setting in {**vars(kind()), f.name: same_kind}.items():
                object.__setattr__(made, name_of, setting)
            with pytest.raises(UserError, match=f"{f.name} = .* is out of range"):
                made.__post_init__()


@each_defence
def test_unknown_settings_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"unknown setting of \w+ 'nonsense'"):
        kind_of(name)(nonsense=1)
