"""Measures a victim and its clean twin: accuracy and success rates on the whole test set, and the trigger's stealth.

Nothing here chooses anything. Defences are measured in measure_defences.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from vitrap.contracts import Goal, Images, ImageSet, Trigger
from vitrap.experiment.predict import BATCH, batch_of, every_row, no_tick, predict, spread, triggered
from vitrap.metrics.accuracy import attack_success, clean_accuracy, robust_accuracy
from vitrap.metrics.stealth import stealth
from vitrap.metrics.values import Measures, Stealth
from vitrap.tensors.pixels import round8, to_bytes
from vitrap.train.arithmetic import Arithmetic

STEALTH_IMAGES = 2000
"""Stealth is measured on at most so many images, spread evenly over the set; its n says on how many."""
EXAMINED_IMAGES = 512
"""An attack examines a model on at most so many triggered test images that count for the ASR, spread evenly."""


@dataclass(frozen=True)
class Backdoor:
    """What an attack is measured by.

    Attributes:
        trigger: fires at test time.
        goal: which label triggered images should get.
        examine: the attack's own numbers about a model that sees triggered images, as `Implant.examine`; None: none.
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
    tick: Callable[[], None] = no_tick,
) -> Measures:
    """CDA, ASR and RA of the victim, the base rates, and the trigger's stealth.

    It calls `tick` as often as `measuring_ticks` says.
    """
    # Fire the trigger on every test image, and round to 8 bits.
    attacked = triggered(test, backdoor.trigger, tick)
    # Both models classify all test images, clean and triggered.
    clean = predict(victim, test, arithmetic, tick)
    fired = predict(victim, attacked, arithmetic, tick)
    clean_twin = predict(twin, test, arithmetic, tick)
    fired_twin = predict(twin, attacked, arithmetic, tick)
    # Base rates of the ASR: the twin has no backdoor, and clean images have no trigger.
    true = test.labels
    goal = backdoor.goal
    return Measures(
        cda=clean_accuracy(clean, true),
        asr=attack_success(fired, true, goal),
        ra=robust_accuracy(fired, true, goal),
        asr_clean_model=attack_success(fired_twin, true, goal),
        cda_clean_model=clean_accuracy(clean_twin, true),
        stealth=stealth_of(test, attacked, every_row(test)),
        asr_clean_images=attack_success(clean, true, goal),
        majority=int(true.bincount().max()) / len(true),
    )


def measuring_ticks(test: ImageSet) -> int:
    """How often `measure_victim` calls its `tick`: for each batch that the trigger, or a model, is applied to."""
    return 5 * -(-len(test) // batch_of(test))


def stealth_of(clean: ImageSet, touched: ImageSet, rows: Int64[Tensor, " n"]) -> Stealth:
    """How far the images in `touched` are from those in `clean`, on at most `STEALTH_IMAGES` of the rows."""
    sample = spread(rows, STEALTH_IMAGES)
    before = torch.cat([to_bytes(clean.images(some)) for some in sample.split(BATCH)])
    after = torch.cat([to_bytes(touched.images(some)) for some in sample.split(BATCH)])
    return stealth(before, after)


@torch.no_grad()
def examine(victim: nn.Module, twin: nn.Module, test: ImageSet, backdoor: Backdoor) -> dict[str, Any]:
    """The attack's own numbers about victim and twin, on the same triggered images; {} where it has none."""
    if backdoor.examine is None:
        return {}
    rows = spread(backdoor.goal.counts(test.labels).nonzero().squeeze(1), EXAMINED_IMAGES)
    images = round8(backdoor.trigger(test.images(rows)))
    found = {"victim": backdoor.examine(victim, images), "clean_model": backdoor.examine(twin, images)}
    return {**found, "n_examined": len(images)}
