"""The contract of an attack, held for every registered one.

A rule is a function that asserts something of an attack at work. Every rule is also shown an attack that breaks it.
"""

import copy
import json
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.cases import ATTACKS
from vitrap import registry
from vitrap.contracts import (
    Access,
    AllToOne,
    Attack,
    Batch,
    Card,
    Criterion,
    Edited,
    Goal,
    ImageSet,
    Objective,
    Shown,
    Trigger,
    undeclared,
)
from vitrap.data.poison import Poison
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.experiment.spec import Spec, parse_spec
from vitrap.experiment.trigger_file import read_trigger, save_trigger
from vitrap.models.classifier import Classifier
from vitrap.params import Param
from vitrap.tensors.pixels import to_bytes

N_CLASSES = 10
THREATS, LABELS, SOURCES = ("data", "training", "weights"), ("dirty", "clean"), ("paper", "code", "field", "assumed")


def kind_of(name: str) -> type[Any]:
    """The attack of a case; after a stroke stands which of its settings."""
    return registry.get("attacks", name.split("/")[0])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Made:
    """What both verbs of an attack and its goal come to."""

    goal: Goal
    trigger: Trigger
    stored: Trigger | None
    report: Mapping[str, float]
    poison: Callable[[ImageSet, torch.Generator], ImageSet] | None
    objective: Objective | None
    edit: Any
    examine: Any

    def poisoned(self, train: ImageSet, seed: int = 0) -> ImageSet:
        """The poisoned set; where poison is made for each batch anew, as it is in one batch of the whole set."""
        if self.poison is not None:
            return self.poison(train, generator(seed))
        if self.objective is None or self.objective.prepare is None:
            return train
        with torch.no_grad():
            made = self.objective.prepare(train.batch(torch.arange(len(train))), generator(seed))
        poison, covers = made.poison_at, made.cover_at
        poisoned = train.stamp(poison, to_bytes(made.images[poison]), made.labels[poison])
        return poisoned.stamp(covers, to_bytes(made.images[covers]), made.labels[covers], cover=True)


@dataclass(frozen=True)
class Bench:
    """An attack at work: `fit` makes all of it afresh, always from the same access."""

    attack: Any
    fit: Callable[[], Made]
    train: ImageSet
    images: Tensor
    surrogate: Classifier
    victim: Callable[[], Classifier]

    def poisoned(self, seed: int = 0) -> ImageSet:
        return self.fit().poisoned(self.train, seed)


Rule = Callable[[Bench], None]
Broken = Callable[[Bench], Bench]


# The trigger


def trigger_keeps_shape_dtype_and_device(bench: Bench) -> None:
    trigger = bench.fit().trigger
    for images in (bench.images, bench.images[:1], bench.images[:0]):
        found = trigger(images)
        assert (found.shape, found.dtype, found.device) == (images.shape, images.dtype, images.device)


def trigger_stays_in_0_to_1(bench: Bench) -> None:
    black, white = torch.zeros_like(bench.images[:1]), torch.ones_like(bench.images[:1])
    for images in (bench.images, black, white):
        found = bench.fit().trigger(images)
        assert 0 <= found.min() <= found.max() <= 1


def trigger_leaves_its_input(bench: Bench) -> None:
    images = bench.images.clone()
    found = bench.fit().trigger(images)
    assert torch.equal(images, bench.images)
    found.zero_()
    assert torch.equal(images, bench.images), "the result shares its input's memory"


def trigger_does_something(bench: Bench) -> None:
    changed = to_bytes(bench.fit().trigger(bench.images)) != to_bytes(bench.images)
    assert changed.flatten(1).any(1).all(), "some images are left as they are"


def trigger_sees_each_image_alone(bench: Bench) -> None:
    trigger = bench.fit().trigger
    together = to_bytes(trigger(bench.images)).int()
    alone = torch.cat([to_bytes(trigger(image)) for image in bench.images.split(1)]).int()
    turned = to_bytes(trigger(bench.images.flip(0))).flip(0).int()
    for other in (alone, turned):
        assert ((together - other).abs() <= 1).float().mean() >= 0.995


def trigger_is_the_same_at_every_call_and_without_gradients(bench: Bench) -> None:
    trigger = bench.fit().trigger
    wanted = trigger(bench.images)
    assert torch.equal(trigger(bench.images), wanted)
    with torch.no_grad():
        assert torch.equal(trigger(bench.images), wanted)


def trigger_comes_back_from_its_file(bench: Bench) -> None:
    trigger = bench.fit().trigger
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trigger.safetensors"
        save_trigger(trigger, bench.attack, path)
        state = torch.get_rng_state()
        with torch.random.fork_rng(devices=[]):
            again = read_trigger(path, bench.attack)
        assert torch.equal(torch.get_rng_state(), state)
    assert type(again) is type(trigger)
    assert torch.equal(again(bench.images), trigger(bench.images))


# The poison


def same_generator_same_poison(bench: Bench) -> None:
    one, other = bench.poisoned(), bench.poisoned()
    everything = torch.arange(len(bench.train))
    assert torch.equal(one.images(everything), other.images(everything))
    assert torch.equal(one.labels, other.labels)
    assert torch.equal(one.poisoned, other.poisoned)


def poison_leaves_torchs_random_state(bench: Bench) -> None:
    state = torch.get_rng_state()
    bench.poisoned()
    assert torch.equal(torch.get_rng_state(), state), "it draws from torch's own state"


def poison_rate_is_met_within_one_image(bench: Bench) -> None:
    if bench.attack.threat == "weights":
        assert bench.fit().poison is None, "an attacker of weights poisons nothing"
        return
    goal = bench.fit().goal
    may = goal.may_poison(bench.train.labels, bench.attack.labels)
    base = len(bench.train) if bench.attack.labels == "dirty" else int(may.sum())
    found = int(bench.poisoned().poisoned.sum())
    assert found >= 1
    assert abs(found - bench.attack.poison_rate * base) <= 1


def labels_change_only_as_goal_and_labels_allow(bench: Bench) -> None:
    goal, true = bench.fit().goal, bench.train.labels
    for poisoned in map(bench.poisoned, range(4)):
        rows = poisoned.poisoned
        assert torch.equal(poisoned.labels[~rows], true[~rows])
        if bench.attack.labels == "clean":
            assert torch.equal(poisoned.labels, true)
        else:
            assert torch.equal(poisoned.labels[rows], goal.labels(true[rows]))
        assert goal.may_poison(true[rows], bench.attack.labels).all(), "the goal has no use for such an image"


def poison_replaces_and_leaves_the_rest(bench: Bench) -> None:
    before, everything = copy.deepcopy(bench.train), torch.arange(len(bench.train))
    poisoned = bench.poisoned()
    assert len(poisoned) == len(bench.train)
    assert torch.equal(poisoned.index, bench.train.index)
    clean = ~(poisoned.poisoned | poisoned.covers)
    assert torch.equal(poisoned.images(everything[clean]), bench.train.images(everything[clean]))
    if bench.attack.threat != "weights":
        assert (poisoned.images(everything[~clean]) != bench.train.images(everything[~clean])).any()
    for name, value in vars(before).items():
        now = getattr(bench.train, name)
        assert torch.equal(now, value) if isinstance(value, Tensor) else now == value, f"{name} was changed in place"


def goal_is_a_class(bench: Bench) -> None:
    goal, true = bench.fit().goal, torch.arange(N_CLASSES)
    wanted = goal.labels(true)
    assert 0 <= wanted.min() <= wanted.max() < N_CLASSES
    assert torch.equal(goal.counts(true), wanted != true), "exactly the images that are not there already count"
    if isinstance(goal, AllToOne):
        assert goal.target == bench.attack.target


# The powers beyond data


def a_data_attack_has_no_other_power(bench: Bench) -> None:
    implant = bench.fit()
    assert bench.attack.threat != "data" or (implant.objective is None and implant.edit is None)


def every_loss_term_moves_a_parameter(bench: Bench) -> None:
    implant = bench.fit()
    if implant.objective is None:
        return
    poisoned, model = implant.poisoned(bench.train), bench.victim()
    rows = torch.cat([poisoned.poisoned.nonzero().squeeze(1)[:8], (~poisoned.poisoned).nonzero().squeeze(1)[:8]])
    names = list(implant.objective.terms(model, poisoned.batch(rows), functional.cross_entropy))
    assert names
    assert set(implant.objective.weights) <= set(names)
    # What learns is the victim, and what is trained along with it.
    along = nn.ModuleList([one.module for one in implant.objective.along.values()]).requires_grad_(True)
    learning = [*model.parameters(), *along.parameters()]
    for name in names:
        for weight in learning:
            weight.grad = None
        term = implant.objective.terms(model, poisoned.batch(rows), functional.cross_entropy)[name]
        assert term.requires_grad, f"{name} has no gradient at all"
        term.backward()
        assert any(w.grad is not None and w.grad.abs().max() > 0 for w in learning), f"{name} moves nothing"


def edit_leaves_its_argument(bench: Bench) -> None:
    edit = bench.fit().edit
    if edit is None:
        return
    model = bench.victim()
    before = copy.deepcopy(model.state_dict())
    edited = edit(model, generator()).model
    assert edited is not model
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model was changed in place"
    with torch.no_grad():
        assert edited(bench.images).shape == (len(bench.images), N_CLASSES)


def same_generator_same_edit(bench: Bench) -> None:
    edit = bench.fit().edit
    if edit is None:
        return
    state = torch.get_rng_state()
    one, other = (edit(bench.victim(), generator(3)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state), "it draws from torch's own state"
    again = other.model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in one.model.state_dict().items())
    assert torch.equal(one.trigger(bench.images), other.trigger(bench.images))
    assert one.report == other.report


def surrogate_stays(bench: Bench) -> None:
    def state() -> list[Any]:
        modules = list(bench.surrogate.modules())
        return [
            *(w.sum().item() for w in bench.surrogate.state_dict().values()),
            *((w.requires_grad, w.grad) for w in bench.surrogate.parameters()),
            *((m.training, getattr(m, "fused_attn", None), len(m._forward_pre_hooks)) for m in modules),
        ]

    before = state()
    bench.poisoned()
    bench.fit().trigger(bench.images)
    assert state() == before


def views_and_report_can_be_shown(bench: Bench) -> None:
    implant = bench.fit()
    views = implant.trigger.views(bench.images) if isinstance(implant.trigger, Shown) else {}
    for name, view in views.items():
        assert name
        assert view.shape == (len(bench.images), *bench.images.shape[-2:])
        assert 0 <= view.min() <= view.max() <= 1
    examined = implant.examine(bench.victim(), bench.images) if implant.examine else {}
    json.dumps({**implant.report, **examined}, allow_nan=False)


# The attack's own names


def no_power_is_misspelt(bench: Bench) -> None:
    assert undeclared(type(bench.attack)) == []
    for trigger in (bench.fit().trigger, bench.fit().stored):
        names = [name for name in dir(trigger) if not name.startswith("_") and name != "views"]
        assert get_close_matches("views", names, cutoff=0.7) == [], "a trigger shows how it works by `views`"


def version_is_a_whole_number(bench: Bench) -> None:
    assert type(bench.attack.version) is int
    assert bench.attack.version >= 1


# The rules at work


def changed(**parts: Any) -> Broken:
    """The bench with other parts of its implant; a part may be made from the bench and its implant."""

    def breaking(bench: Bench) -> Bench:
        def fit() -> Made:
            return replace(bench.fit(), **{k: v(bench) if k == "poison" else v for k, v in parts.items()})

        return replace(bench, fit=fit)

    return breaking


def claims(**facts: Any) -> Broken:
    """The bench with an attack that says other things of itself."""

    @dataclass(frozen=True)
    class Claim:
        target: Any = facts.get("target", 3)
        poison_rate: float = facts.get("poison_rate", 0.08)
        threat: str = facts.get("threat", "data")
        labels: str = facts.get("labels", "dirty")
        version: Any = facts.get("version", 1)

    return lambda bench: replace(bench, attack=Claim())


def poison_then(change: Callable[[ImageSet], Any]) -> Broken:
    """The usual poison, and then a `change` of its result."""
    return changed(poison=lambda bench: lambda train, g: change(bench.fit().poison(train, g)))


def poison_first(change: Callable[[ImageSet], Any]) -> Broken:
    """A `change` of the clean set, then the usual poison."""

    def poison(bench: Bench) -> Callable[[ImageSet, torch.Generator], ImageSet]:
        def both(train: ImageSet, g: torch.Generator) -> ImageSet:
            change(train)
            return bench.fit().poison(train, g)

        return both

    return changed(poison=poison)


def noisy(images: Tensor) -> Tensor:
    return (images + torch.rand(images.shape) / 10).clamp(0, 1)


def relabel_all(poisoned: ImageSet) -> ImageSet:
    return replace(poisoned, labels=torch.full_like(poisoned.labels, 3))


def lose_labels(poisoned: ImageSet) -> ImageSet:
    return replace(poisoned, labels=torch.where(poisoned.poisoned, 4, poisoned.labels))


def shared_terms(model: nn.Module, batch: Batch, criterion: Criterion) -> Mapping[str, Tensor]:
    logits = model(batch.images)
    return {"good": functional.cross_entropy(logits, batch.labels), "cut": logits.detach().square().mean()}


def flat_terms(model: nn.Module, batch: Batch, criterion: Criterion) -> Mapping[str, Tensor]:
    return {"flat": 0 * model(batch.images).sum()}


def unseeded(bench: Bench) -> Callable[[ImageSet, torch.Generator], ImageSet]:
    return lambda train, g: bench.fit().poison(train, generator(torch.Generator().seed() % 2**32))


def edit_in_place(model: nn.Module, g: torch.Generator) -> Edited:
    with torch.no_grad():
        next(model.parameters()).add_(1)
    return Edited(copy.deepcopy(model), torch.clone)


def edit_nothing(model: nn.Module, g: torch.Generator) -> Edited:
    return Edited(model, torch.clone)


def edit_by_chance(model: nn.Module, g: torch.Generator) -> Edited:
    return Edited(model, torch.clone, {"drawn": torch.rand(()).item()})


def veiled(x: Tensor) -> Tensor:
    return 1 - x


veiled.veiws = lambda images: {}  # type: ignore[attr-defined]


def misspelt(bench: Bench) -> Bench:
    """The bench with an attack that would refuse small images, if its method had the right name."""
    odd = type("Odd", (type(bench.attack),), {"chek": lambda self, size: None})
    return replace(bench, attack=odd())


@dataclass(frozen=True)
class Pictured:
    """A trigger with views of its own."""

    pictures: Callable[[Tensor], Mapping[str, Tensor]]

    def __call__(self, images: Tensor) -> Tensor:
        return 1 - images

    def views(self, images: Tensor) -> Mapping[str, Tensor]:
        return self.pictures(images)


@dataclass(frozen=True)
class Everywhere:
    """A goal that counts every image."""

    def labels(self, true: Tensor) -> Tensor:
        return torch.full_like(true, 3)

    def counts(self, true: Tensor) -> Tensor:
        return torch.ones_like(true, dtype=torch.bool)

    def may_poison(self, true: Tensor, label_mode: str) -> Tensor:
        return self.counts(true)


def anywhere(bench: Bench) -> Poison:
    """Poison that takes images of the target class too."""
    return Poison(bench.fit().trigger, Everywhere(), bench.attack.poison_rate, "dirty")


def thaw(bench: Bench) -> Bench:
    def fit() -> Made:
        next(bench.surrogate.parameters()).requires_grad_(True)
        return bench.fit()

    return replace(bench, fit=fit)


BROKEN: list[tuple[Rule, Broken]] = [
    (trigger_keeps_shape_dtype_and_device, changed(trigger=lambda x: x[..., :-1])),
    (trigger_keeps_shape_dtype_and_device, changed(trigger=lambda x: x.double())),
    (trigger_stays_in_0_to_1, changed(trigger=lambda x: x + 4 / 255)),
    (trigger_stays_in_0_to_1, changed(trigger=lambda x: x - 4 / 255)),
    (trigger_leaves_its_input, changed(trigger=lambda x: x.mul_(0.5))),
    (trigger_leaves_its_input, changed(trigger=lambda x: x)),
    (trigger_does_something, changed(trigger=lambda x: x.clone())),
    (trigger_sees_each_image_alone, changed(trigger=lambda x: (x + x.mean(0)) / 2)),
    (trigger_sees_each_image_alone, changed(trigger=lambda x: x * torch.linspace(1, 0, len(x)).view(-1, 1, 1, 1))),
    (trigger_is_the_same_at_every_call_and_without_gradients, changed(trigger=noisy)),
    (
        trigger_is_the_same_at_every_call_and_without_gradients,
        changed(trigger=lambda x: x / 2 if torch.is_grad_enabled() else x / 3),
    ),
    (trigger_comes_back_from_its_file, changed(trigger=lambda x: 1 - x)),
    (same_generator_same_poison, changed(poison=unseeded)),
    (
        poison_leaves_torchs_random_state,
        poison_then(lambda s: replace(s, labels=s.labels + 0 * torch.randint(2, (1,)))),
    ),
    (poison_rate_is_met_within_one_image, claims(poison_rate=0.2)),
    (poison_rate_is_met_within_one_image, claims(labels="clean")),
    (labels_change_only_as_goal_and_labels_allow, poison_then(relabel_all)),
    (labels_change_only_as_goal_and_labels_allow, poison_then(lose_labels)),
    (labels_change_only_as_goal_and_labels_allow, claims(labels="clean")),
    (labels_change_only_as_goal_and_labels_allow, changed(poison=anywhere)),
    (poison_replaces_and_leaves_the_rest, poison_then(lambda s: s.take(torch.arange(len(s) - 1)))),
    (poison_replaces_and_leaves_the_rest, poison_then(lambda s: replace(s, pixels=255 - s.pixels))),
    (poison_replaces_and_leaves_the_rest, poison_first(lambda s: s.pixels[:1].fill_(7))),
    (goal_is_a_class, changed(goal=AllToOne(N_CLASSES))),
    (goal_is_a_class, changed(goal=AllToOne(4))),
    (goal_is_a_class, changed(goal=Everywhere())),
    (a_data_attack_has_no_other_power, changed(objective=Objective(flat_terms))),
    (a_data_attack_has_no_other_power, changed(edit=edit_nothing)),
    (every_loss_term_moves_a_parameter, changed(objective=Objective(shared_terms))),
    (every_loss_term_moves_a_parameter, changed(objective=Objective(flat_terms))),
    (edit_leaves_its_argument, changed(edit=edit_in_place)),
    (edit_leaves_its_argument, changed(edit=edit_nothing)),
    (same_generator_same_edit, changed(edit=edit_by_chance)),
    (surrogate_stays, thaw),
    (views_and_report_can_be_shown, changed(trigger=Pictured(lambda x: {"mask": 2 + x[:, 0]}))),
    (views_and_report_can_be_shown, changed(trigger=Pictured(lambda x: {"mask": x[:, 0, :4]}))),
    (views_and_report_can_be_shown, changed(report={"share": float("nan")})),
    (no_power_is_misspelt, misspelt),
    (no_power_is_misspelt, changed(trigger=veiled)),
    (version_is_a_whole_number, claims(version=0)),
    (version_is_a_whole_number, claims(version="1.0")),
]
RULES = list(dict.fromkeys(rule for rule, _ in BROKEN))
each_attack = pytest.mark.parametrize("name", ATTACKS)


@pytest.fixture(scope="module")
def bench_of(tiny_vit: Callable[..., Classifier], digits_world: World) -> Callable[[str], Bench]:
    train = digits_world.train.take(torch.arange(150))

    @cache
    def bench(name: str) -> Bench:
        attack = kind_of(name)(**ATTACKS[name])
        surrogate = tiny_vit(seed=1).requires_grad_(False)

        def fit() -> Made:
            access = Access(train, surrogate if attack.needs_surrogate else None, generator(5))
            fitted = attack.fit(access)
            implant = attack.implant(replace(access, surrogate=None), fitted)
            trigger, report = fitted.trigger, fitted.report
            if attack.threat == "weights":  # the trigger is known once the weights are edited
                edited = implant.edit(tiny_vit(), generator())
                trigger, report = edited.trigger, edited.report
            return Made(
                attack.goal_for(N_CLASSES),
                trigger,
                fitted.stored,
                report,
                implant.poison,
                implant.objective,
                implant.edit,
                implant.examine,
            )

        images = digits_world.test.images(torch.arange(12))
        return Bench(attack, fit, replace(train, pixels=train.pixels.clone()), images, surrogate, tiny_vit)

    return bench


def label(value: object) -> str:
    return getattr(value, "__name__", "")


@each_attack
@pytest.mark.parametrize("rule", RULES, ids=label)
def test_attack_keeps(rule: Rule, name: str, bench_of: Callable[[str], Bench]) -> None:
    rule(bench_of(name))


@pytest.mark.parametrize(("rule", "broken"), BROKEN, ids=label)
def test_rule_catches(rule: Rule, broken: Broken, bench_of: Callable[[str], Bench]) -> None:
    bench = bench_of("badnets")
    own = replace(
        bench,
        train=replace(bench.train, pixels=bench.train.pixels.clone()),
        images=bench.images.clone(),
        surrogate=copy.deepcopy(bench.surrogate),
    )
    rule(own)
    with pytest.raises((AssertionError, TypeError, ValueError)):
        rule(broken(own))


def test_every_rule_is_held() -> None:
    held = {f for f in globals().values() if getattr(f, "__annotations__", {}) == {"bench": Bench, "return": None}}
    assert set(RULES) == held


def test_every_attack_has_a_case() -> None:
    assert set(registry.names("attacks")) == {name.split("/")[0] for name in ATTACKS}
    for name in registry.names("attacks"):
        cases = [kind_of(case)(**settings) for case, settings in ATTACKS.items() if case.split("/")[0] == name]
        assert len(cases) == len(registry.variants(kind_of(name)))


# The attack as a record of settings


@each_attack
def test_it_is_an_attack_and_says_which(name: str) -> None:
    attack = kind_of(name)(**ATTACKS[name])
    assert isinstance(attack, Attack)
    assert attack.threat in THREATS
    assert attack.labels in LABELS
    assert isinstance(attack.needs_surrogate, bool)
    card = attack.card
    assert isinstance(card, Card)
    assert card.title
    assert card.venue
    assert 2017 <= card.year <= 2100
    assert registry.headline("attacks", name.split("/")[0]).endswith(".")


@each_attack
def test_it_is_a_frozen_record(name: str) -> None:
    kind = kind_of(name)
    assert is_dataclass(kind)
    attack = kind(**ATTACKS[name])
    with pytest.raises(FrozenInstanceError):
        attack.target = 0
    assert attack == kind(**ATTACKS[name])
    assert hash(attack) == hash(kind(**ATTACKS[name]))
    assert attack != kind(), "the case is the default: it would not show a setting that gets lost"


@each_attack
def test_every_parameter_says_what_it_is_and_allows_its_default(name: str) -> None:
    for f in fields(kind_of(name)()):
        about = f.metadata["param"]
        assert isinstance(about, Param)
        assert about.doc
        assert about.source in SOURCES
        assert about.allows(f.default)
        limited = about.range() or about.data or isinstance(f.default, bool)
        assert limited, f"{f.name} needs low, high, odd, choices or a Literal type"
    names = [f.name for f in fields(kind_of(name)())]
    assert names[0] == "target"
    assert (names[1] == "poison_rate") == (kind_of(name)().threat != "weights")


def beyond(about: Param) -> list[Any]:
    """Values that the parameter must refuse."""
    values: list[Any] = ["nonsense"] if about.choices and not about.file else []
    values += [] if about.low is None else [about.low if about.open else about.low - 1]
    values += [] if about.high is None else [about.high if about.open is True else about.high + 1]
    return [*values, 2] if about.odd else values


@each_attack
def test_values_out_of_range_are_refused(name: str) -> None:
    kind = kind_of(name)
    for f in fields(kind):
        about = f.metadata["param"]
        for value in beyond(about):
            same_kind = int(value) if isinstance(f.default, int) and isinstance(value, float) else value
            # from a spec, as a user would: the attack's own check speaks
            with pytest.raises(UserError, match=f.name):
                parse_spec({"attack": {"name": name.split("/")[0], f.name: same_kind}})
            if not about.choices:  # strings that a type names are refused by the type checks of these tests first
                with pytest.raises(UserError, match=f"{f.name} = .* is out of range"):
                    kind(**{f.name: same_kind})


# The spec


def toml(table: Mapping[str, Any], place: str = "") -> str:
    """A nested table as TOML: JSON's strings, numbers, switches and lists are TOML's too."""
    plain = {k: v for k, v in table.items() if not isinstance(v, Mapping)}
    lines = [f"[{place}]"] if place else []
    lines += [f"{k} = {json.dumps(v)}" for k, v in plain.items()]
    below = [toml(v, f"{place}.{k}" if place else k) for k, v in table.items() if isinstance(v, Mapping)]
    return "\n".join([*lines, *below])


def other_value(f: Any, value: Any) -> Any:
    """A value that is allowed and not `value`."""
    about: Param = f.metadata["param"]
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, *value)
    candidates = [*about.choices, *(["another.png"] if about.file else []), *(["digits"] if about.data else [])]
    if not candidates:
        value = 0 if value is None else value
        candidates = [value + 2, value / 2, value * 3, 0.1] if isinstance(value, float) else [value + 2]
    found = next((v for v in candidates if v != value and about.allows(v)), None)
    assert found is not None, f"{f.name} allows nothing but {value!r}: is it a parameter at all?"
    return found


def assert_identity(spec: Spec) -> None:
    again = parse_spec(tomllib.loads(toml(spec.table())))
    assert again == spec
    assert again.hash() == spec.hash()


@each_attack
def test_spec_to_toml_to_spec_is_the_identity(name: str) -> None:
    own = name.split("/")[0]
    assert_identity(parse_spec({"attack": {"name": own}}))
    spec = parse_spec(
        {
            "name": f"{own}-über",
            "seed": 7,
            "data": {"name": "gtsrb", "size": 32, "holdout": 0.2},
            "model": {"name": "vit_tiny_patch16_224", "patch_size": 4, "qkv_bias": False},
            "surrogate": {"depth": 3},
            "attack": {"name": own, **ATTACKS[name]},
            "recipe": {"lr": 1e-5, "epochs": 3},
        }
    )
    assert spec.attack == kind_of(name)(**ATTACKS[name])
    assert_identity(spec)


COMPANIONS = {
    ("badnets", "source"): {"goal": "source-to-target", "source": 7},
    ("ftrojan", "high"): {"window": 64},
    ("megatron/clean-label", "stress"): {"setting": "training"},
}
"""Settings without which another is refused."""


@each_attack
def test_every_setting_goes_into_the_spec_and_its_hash(name: str) -> None:
    setting = {"name": name.split("/")[0], **{k: v for k, v in ATTACKS[name].items() if k == "setting"}}
    for f in fields(kind_of(name)):
        own = {**setting, **COMPANIONS.get((name, f.name), {})}
        plain = parse_spec({"attack": own})
        value = getattr(plain.attack, f.name)
        other = other_value(f, value)
        spec = parse_spec({"attack": {**own, f.name: other}})
        assert getattr(spec.attack, f.name) == other != value
        assert spec.hash() != plain.hash(), f"{f.name} does not count"
        assert_identity(spec)
