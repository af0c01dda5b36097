"""A whole victim on CIFAR-10: AGEB poisons the set, a ViT-S of depth 7 learns from scratch, the test set judges.

Nothing is chosen on the test set, nor on any other: the number of epochs is what fits the time, by the time that an
epoch was measured to take. Crop, flip, jitter and rate are assumed, not tuned.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from benchmarks.compare import seconds
from benchmarks.gpu_rows import Bench, Found, Row, build, vit_s
from benchmarks.training import streams
from vitrap.attacks.ageb import Ageb, Erosion
from vitrap.contracts import AllToOne, ImageSet
from vitrap.data.poison import Poison
from vitrap.data.sources import World, open_data
from vitrap.errors import UserError
from vitrap.experiment.predict import predict, triggered
from vitrap.metrics.accuracy import attack_success, clean_accuracy
from vitrap.metrics.interval import Rate
from vitrap.models.classifier import Classifier
from vitrap.train.arithmetic import Arithmetic, default_arithmetic
from vitrap.train.loop import train
from vitrap.train.recipe import Recipe

WANTED, WITHIN = 0.9, 240.0
"""Clean accuracy, and seconds of poisoning and training together."""
POISONING, MEASURING, COMPILING = 10.0, 15.0, 60.0
"""Seconds laid aside for poisoning the set, for measuring the victim, and for seeing whether to compile it."""
SPARE = 0.93
"""Share of the time that the epochs may fill: the rest is for a clock that slows down."""
NEEDED = 270.0
"""Seconds that the parts before leave: the victim has its four minutes where this part is asked for alone."""


def accuracy(bench: Bench) -> Iterator[Row]:
    """Surrogate, an epoch's time, victim; one line where CIFAR-10 is not in the data cache."""
    name, limit = "CIFAR-10 from scratch", 2000 if bench.small else None
    try:
        world = open_data("cifar10", limit=limit, holdout=0.0, device=bench.device)
    except UserError as error:
        note = f"skipped: {error}"
        yield name, lambda: Found("accuracy", name, wanted=wanted(), note=note)
        return
    cell = Cell(bench, world)
    yield "surrogate", cell.make_surrogate
    yield "epoch", cell.choose_epochs
    yield name, cell.make_victim


def wanted() -> str:
    """The bounds in words."""
    return f"CDA >= {100 * WANTED:g} %, <= {WITHIN:g} s"


@dataclass
class Cell:
    """What the rows hand to each other.

    Attributes:
        bench: where and how much.
        world: CIFAR-10 without a hold-out, on the device.
        recipe: of the victim; its epochs are settled by `choose_epochs`.
        way: how the victim is trained.
        trigger: AGEB's with the trained surrogate.
    """

    bench: Bench
    world: World
    recipe: Recipe = field(init=False)
    way: Arithmetic = field(init=False)
    trigger: Erosion = field(init=False)

    def __post_init__(self) -> None:
        batch = 100 if self.bench.small else 500  # divides the set, so that one compilation serves every step
        usually = Recipe(epochs=1, batch_size=batch, lr=1e-3, warmup=0.05, precision="bf16")
        self.recipe = replace(usually, label_smoothing=0.1, crop=4, flip=True, jitter=0.5)
        self.way = default_arithmetic("bf16", self.world.train.device)

    def train(self, seed: int, recipe: Recipe, way: Arithmetic, data: ImageSet) -> tuple[Classifier, float]:
        """A ViT-S, and the seconds that its training took."""
        model = build(vit_s(7, self.bench.small), seed, self.bench.device)
        chances = streams(self.bench.device)
        return model, seconds(lambda: train(model, data, recipe, chances, arithmetic=way), self.bench.device)

    def make_surrogate(self) -> Found:
        """The attacker's own network, trained on the clean set by a shorter recipe."""
        recipe = replace(self.recipe, epochs=1 if self.bench.small else 15)
        model, took = self.train(1, recipe, self.way, self.world.train)
        surrogate = model.eval().requires_grad_(False)
        self.trigger = Erosion(surrogate, Ageb())
        return Found("accuracy", "surrogate", {"seconds": took, "epochs": recipe.epochs}, note="not in the 4 minutes")

    def choose_epochs(self) -> Found:
        """How long an epoch takes, compiled or not, and how many so fit the time."""
        room = 2.0 if self.bench.small else min(WITHIN, self.bench.left - MEASURING) - POISONING
        _, plain = self.train(2, self.recipe, self.way, self.world.train)
        fits, values = max(1, int(SPARE * room / plain)), {"seconds an epoch": plain}
        if self.bench.on_gpu and self.bench.left > WITHIN + MEASURING + COMPILING:
            compiled = replace(self.way, compiled=True)
            _, first = self.train(2, self.recipe, compiled, self.world.train)
            _, later = self.train(3, self.recipe, compiled, self.world.train)
            values |= {"compiled": later, "first compiled": first}
            room = min(room, self.bench.left - MEASURING - POISONING)
            again = int(SPARE * (room - first) / later)  # the victim's own compilation may take as long
            fits = max(1, int(SPARE * room / plain))
            if again > fits:
                fits, self.way = again, compiled
        self.recipe = replace(self.recipe, epochs=fits)
        return Found("accuracy", "an epoch", {**values, "epochs": fits}, note=f"victim compiled: {self.way.compiled}")

    def make_victim(self) -> Found:
        """Poison, train, then measure on the whole test set, once."""
        made: list[ImageSet] = []
        chance, goal = torch.Generator().manual_seed(0), AllToOne(Ageb().target)
        poison = Poison(self.trigger, goal, Ageb().poison_rate, "dirty")
        poisoning = seconds(lambda: made.append(poison(self.world.train, chance)), self.bench.device)
        victim, training = self.train(0, self.recipe, self.way, made[0])
        test, took = self.world.test, poisoning + training
        cda = clean_accuracy(predict(victim, test, self.way), test.labels)
        fired = triggered(test, self.trigger)
        asr = attack_success(predict(victim, fired, self.way), test.labels, goal)
        kept = self.bench.judged(cda.value >= WANTED and took <= WITHIN)
        note = f"{self.recipe.epochs} epochs, one seed; CDA {shown(cda)}, ASR {shown(asr)}"
        values = {"seconds": took, "of that poisoning": poisoning, "CDA, %": 100 * cda.value, "ASR, %": 100 * asr.value}
        return Found("accuracy", "poisoned by AGEB and trained", values, wanted=wanted(), met=kept, note=note)


def shown(rate: Rate) -> str:
    """A rate in % with its 95 % interval."""
    return f"{100 * rate.value:.2f} % [{100 * rate.low:.2f}, {100 * rate.high:.2f}], n = {rate.n}"
