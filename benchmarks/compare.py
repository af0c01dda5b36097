"""Timing one piece of work against a plain version of it, in turns, and what came out."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        images: images that are poisoned or get a trigger.
        batch: images at a time, for triggers and for training.
        steps: training steps a repeat.
        repeats: how often ours and plain take turns, after one untimed turn.
        runs: how often whole runs take turns.
        least: seconds that a turn lasts at least, by repeating work that is done sooner.
        network: timm's arguments for the surrogate and the trained model.
        run: overrides of the embedded default, for whole runs.
        device: where everything but whole runs is computed.
    """

    images: int = 10_000
    batch: int = 128
    steps: int = 8
    repeats: int = 5
    runs: int = 3
    least: float = 0.5
    network: tuple[tuple[str, int], ...] = (("patch_size", 4), ("depth", 6), ("embed_dim", 128), ("num_heads", 4))
    run: tuple[str, ...] = ()
    device: str = "cpu"


FULL = Scale()
QUICK = Scale(images=512, steps=2, repeats=3, runs=1, least=0.1, run=("recipe.epochs=1",))


@dataclass(frozen=True)
class Figure:
    """One comparison.

    Attributes:
        part: which benchmark it belongs to.
        name: what is compared, ours over plain.
        ours: seconds of one call in each of our turns.
        plain: the same of the plain turn after it.
        at_most: greatest ratio wanted; None for no bound.
        at_least: least ratio wanted; None for no bound.
        within: most seconds wanted of one of our calls; None for no bound.
        speed: whether the ratio is one of throughputs (plain over our seconds), so that more is better.
        note: what else should be known.
        unit: of both; "s", or "bytes" in place of seconds.
    """

    part: str
    name: str
    ours: tuple[float, ...]
    plain: tuple[float, ...]
    at_most: float | None = None
    at_least: float | None = None
    within: float | None = None
    speed: bool = False
    note: str = ""
    unit: str = "s"

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratio of each turn."""
        pairs = zip(self.ours, self.plain, strict=True)
        return tuple(plain / ours if self.speed else ours / plain for ours, plain in pairs)

    @property
    def ratio(self) -> float:
        """The median ratio."""
        return median(self.ratios)

    @property
    def seconds(self) -> tuple[float, float]:
        """The median time of a turn, ours and plain."""
        return median(self.ours), median(self.plain)

    @property
    def kind(self) -> str:
        """What the ratio is one of."""
        return "memory" if self.unit != "s" else "throughput" if self.speed else "time"

    @property
    def wanted(self) -> str:
        """The bounds in words, "" where there is none."""
        bounds = ((">= {:g}", self.at_least), ("<= {:g}", self.at_most), (f"<= {{:g}} {self.unit}", self.within))
        return ", ".join(words.format(bound) for words, bound in bounds if bound is not None)

    @property
    def met(self) -> bool | None:
        """Whether the medians keep the bounds; None where there is none."""
        kept = []
        if self.at_least is not None:
            kept.append(self.ratio >= self.at_least)
        if self.at_most is not None:
            kept.append(self.ratio <= self.at_most)
        if self.within is not None:
            kept.append(self.seconds[0] <= self.within)
        return all(kept) if kept else None

    def table(self) -> dict[str, Any]:
        """The figure as JSON has it."""
        return {
            "part": self.part,
            "name": self.name,
            "kind": f"{self.kind}, ours over plain",
            "ratio": {"median": self.ratio, "low": min(self.ratios), "high": max(self.ratios), "n": len(self.ratios)},
            "wanted": self.wanted or None,
            "met": self.met,
            "seconds" if self.unit == "s" else self.unit: {"ours": list(self.ours), "plain": list(self.plain)},
            "note": self.note,
        }


def in_turns(ours: Work, plain: Work, scale: Scale) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of a call of each, ours, plain, ours, plain, ..., after two untimed calls."""
    once = [seconds(work, scale.device) for work in (ours, plain, ours, plain)]
    calls = max(1, math.ceil(scale.least / min(once[2:])))
    return alternate(lambda: repeat(ours, calls), lambda: repeat(plain, calls), scale.repeats, calls, scale.device)


def alternate(
    ours: Work, plain: Work, turns: int, calls: int = 1, device: str = "cpu"
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of each turn over its `calls`: ours, plain, ours, plain, ..."""
    pairs = [(seconds(ours, device) / calls, seconds(plain, device) / calls) for _ in range(turns)]
    return tuple(mine for mine, _ in pairs), tuple(other for _, other in pairs)


def repeat(work: Work, calls: int) -> None:
    """Call `work` so many times."""
    for _ in range(calls):
        work()


def seconds(work: Work, device: str = "cpu") -> float:
    """Wall-clock time of one call, until the device is done."""
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
