"""What is measured of a model while it trains: clean accuracy and attack success after each epoch, for the record."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from vitrap.contracts import Fitted, Goal, ImageSet, Implant
from vitrap.experiment.plan import Plan
from vitrap.experiment.predict import every_row, predict, spread, triggered
from vitrap.metrics.accuracy import attack_success, clean_accuracy
from vitrap.train.arithmetic import Arithmetic

CURVE_IMAGES = 500
"""Curves are measured on at most so many held-out images, spread evenly."""


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
