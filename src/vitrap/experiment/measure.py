"""Measuring a victim beside its clean twin on the whole test set. Nothing here chooses anything."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from vitrap.contracts import ImageSet, Implant, Trigger
from vitrap.metrics.accuracy import attack_success, clean_accuracy, robust_accuracy
from vitrap.metrics.stealth import stealth
from vitrap.tensors.pixels import round8, to_bytes
from vitrap.train.arithmetic import Arithmetic

BATCH = 256
STEALTH_IMAGES = 2000
"""Stealth is measured on so many test images, spread evenly over the set, and says so by its n."""
EXAMINED_IMAGES = 512
"""What an attack examines a model with: so many triggered test images that count for the ASR, spread evenly."""


def silent() -> None:
    """A tick that nobody hears."""


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Write the block's wall-clock time into `seconds[name]`, with what it asked of a GPU done."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - start


@torch.no_grad()
def predict(
    model: nn.Module, data: ImageSet, arithmetic: Arithmetic, tick: Callable[[], None] = silent
) -> Int64[Tensor, " n"]:
    """The class that `model` gives to each image of `data`."""
    found = []
    with arithmetic(model, data.device):
        for rows in data.rows(BATCH):
            found.append(model(data.images(rows)).argmax(1))
            tick()
    return torch.cat(found)


def triggered(data: ImageSet, trigger: Trigger, tick: Callable[[], None] = silent) -> ImageSet:
    """`data` with the trigger on every image, rounded to 8 bits, the labels as they were."""
    shape = (len(data), data.pixels.shape[1], data.size, data.size)
    stamped = torch.empty(shape, dtype=torch.uint8, device=data.device)
    for rows in data.rows(BATCH):
        stamped[rows] = to_bytes(trigger(data.images(rows)))
        tick()
    return data.stamp(every_row(data), stamped, data.labels)


def measure_victim(
    victim: nn.Module,
    twin: nn.Module,
    test: ImageSet,
    implant: Implant,
    arithmetic: Arithmetic,
    tick: Callable[[], None] = silent,
) -> dict[str, Any]:
    """CDA, ASR and RA of the victim, the twin's base rates, and the trigger's stealth, as the record has them.

    Makes `5 * ceil(n / BATCH)` ticks.
    """
    attacked = triggered(test, implant.trigger, tick)
    clean, fired = predict(victim, test, arithmetic, tick), predict(victim, attacked, arithmetic, tick)
    clean_twin, fired_twin = predict(twin, test, arithmetic, tick), predict(twin, attacked, arithmetic, tick)
    true, goal = test.labels, implant.goal
    sample = spread(every_row(test), STEALTH_IMAGES)
    assert attacked.stamped is not None
    clean_sample = torch.cat([to_bytes(test.images(rows)) for rows in sample.split(BATCH)])
    distances = asdict(stealth(clean_sample, attacked.stamped[sample]))
    return {
        "cda": asdict(clean_accuracy(clean, true)),
        "asr": asdict(attack_success(fired, true, goal)),
        "ra": asdict(robust_accuracy(fired, true, goal)),
        "asr_clean_model": asdict(attack_success(fired_twin, true, goal)),
        "cda_clean_model": asdict(clean_accuracy(clean_twin, true)),
        "stealth": {**distances, "n": len(sample)},
    }


@torch.no_grad()
def examine(victim: nn.Module, twin: nn.Module, test: ImageSet, implant: Implant) -> dict[str, Any]:
    """What the attack says of victim and twin on the same triggered images; {} where it says nothing."""
    if implant.examine is None:
        return {}
    rows = spread(implant.goal.counts(test.labels).nonzero().squeeze(1), EXAMINED_IMAGES)
    images = round8(implant.trigger(test.images(rows)))
    found = {"victim": implant.examine(victim, images), "clean_model": implant.examine(twin, images)}
    return {**found, "n_examined": len(images)}


def every_row(data: ImageSet) -> Int64[Tensor, " n"]:
    """All row numbers of a set."""
    return torch.arange(len(data), device=data.device)


def spread(rows: Int64[Tensor, " n"], most: int) -> Int64[Tensor, " k"]:
    """At most so many of the rows, spread evenly over them."""
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows)), device=rows.device).long()]
