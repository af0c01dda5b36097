"""Measuring a victim beside its clean twin on the whole test set. Nothing here chooses anything."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from vitrap.contracts import Goal, Images, ImageSet, Trigger
from vitrap.experiment.predict import BATCH, every_row, predict, silent, spread, triggered
from vitrap.metrics.accuracy import attack_success, clean_accuracy, robust_accuracy
from vitrap.metrics.stealth import stealth
from vitrap.metrics.values import Measures, Stealth
from vitrap.tensors.pixels import round8, to_bytes
from vitrap.train.arithmetic import Arithmetic

STEALTH_IMAGES = 2000
"""Stealth is measured on so many test images, spread evenly over the set, and says so by its n."""
EXAMINED_IMAGES = 512
"""What an attack examines a model with: so many triggered test images that count for the ASR, spread evenly."""


@dataclass(frozen=True)
class Backdoor:
    """What is measured of an attack: the trigger at test time, what it is to do, and what the attack says of a model.

    Attributes:
        trigger: fires at test time.
        goal: what triggered images should be classified as.
        examine: as `Implant.examine`.
    """

    trigger: Trigger
    goal: Goal
    examine: Callable[[nn.Module, Images], Mapping[str, float]] | None = None


def measure_victim(
    victim: nn.Module,
    twin: nn.Module,
    test: ImageSet,
    backdoor: Backdoor,
    arithmetic: Arithmetic,
    tick: Callable[[], None] = silent,
) -> Measures:
    """CDA, ASR and RA of the victim, the twin's base rates, and the trigger's stealth.

    Makes `5 * ceil(n / batch_of(test))` ticks.
    """
    # Both models look at all test images, clean and triggered.
    attacked = triggered(test, backdoor.trigger, tick)
    clean = predict(victim, test, arithmetic, tick)
    fired = predict(victim, attacked, arithmetic, tick)
    clean_twin = predict(twin, test, arithmetic, tick)
    fired_twin = predict(twin, attacked, arithmetic, tick)
    true = test.labels
    goal = backdoor.goal
    return Measures(
        cda=clean_accuracy(clean, true),
        asr=attack_success(fired, true, goal),
        ra=robust_accuracy(fired, true, goal),
        asr_clean_model=attack_success(fired_twin, true, goal),
        cda_clean_model=clean_accuracy(clean_twin, true),
        stealth=stealth_of(test, attacked, every_row(test)),
    )


def stealth_of(clean: ImageSet, touched: ImageSet, rows: Int64[Tensor, " n"]) -> Stealth:
    """How far `touched` images are from the clean ones, on at most `STEALTH_IMAGES` of the rows, spread evenly."""
    sample = spread(rows, STEALTH_IMAGES)
    before, after = (torch.cat([to_bytes(d.images(some)) for some in sample.split(BATCH)]) for d in (clean, touched))
    return stealth(before, after)


@torch.no_grad()
def examine(victim: nn.Module, twin: nn.Module, test: ImageSet, backdoor: Backdoor) -> dict[str, Any]:
    """What the attack says of victim and twin on the same triggered images; {} where it says nothing."""
    if backdoor.examine is None:
        return {}
    rows = spread(backdoor.goal.counts(test.labels).nonzero().squeeze(1), EXAMINED_IMAGES)
    images = round8(backdoor.trigger(test.images(rows)))
    found = {"victim": backdoor.examine(victim, images), "clean_model": backdoor.examine(twin, images)}
    return {**found, "n_examined": len(images)}
