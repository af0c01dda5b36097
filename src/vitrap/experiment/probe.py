"""Which arithmetic is fastest for a network on this machine: measured once, then remembered in the user's cache."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from platformdirs import user_cache_path
from torch import Tensor, nn
from torch.nn import functional

from vitrap.errors import UserError
from vitrap.experiment.machine import environment
from vitrap.experiment.progress import Steps
from vitrap.experiment.spec import digest
from vitrap.experiment.store import locked, write_json
from vitrap.train.arithmetic import Arithmetic, compiled

PLAIN = (
    Arithmetic("fp32", "fused"), Arithmetic("fp32", "eager"), Arithmetic("bf16", "fused"), Arithmetic("bf16", "eager"),
)  # fmt: skip
"""What is tried, the plainest first."""
COMPILED = (Arithmetic("bf16", "fused", compiled=True),)
"""Tried on a GPU, too. On a CPU a compilation takes longer than it saves in a training of minutes:
`python -m benchmarks arithmetic`."""
CLEARLY = 1.1
"""A plainer way is taken unless another is so many times as fast: near ties shall not be decided by noise."""
GOAL, PATIENCE = 0.1, 0.3
"""Seconds that a step of the probe should take in plain arithmetic, and that each way is timed for."""
FEW = 2
"""Images that the probe's batch is estimated from, and its least."""
Seconds = Mapping[str, float]


def measured(  # noqa: PLR0913 - what decides the speed, and how to show that it is measured
    model: nn.Module,
    network: Any,
    size: tuple[int, int, int],
    batch: int,
    steps: int,
    device: torch.device,
    show: Steps,
) -> Arithmetic:
    """The arithmetic that trains `model` fastest on `device`, by what was measured here, now or earlier.

    Args:
        model: the network, any weights; it stays as it is.
        network: what tells it from other networks, as JSON.
        size: channels and side of its images in pixels, and number of its classes.
        batch: images a step.
        steps: of each training, over which a compilation must pay for itself.
        device: where.
        show: shows the measuring.
    """
    about = {k: v for k, v in environment(device).items() if k not in ("threads", "vitrap", "numpy", "torchmetrics")}
    about |= {"network": network, "size": size, "batch": batch}
    place = cache_folder() / f"{digest(about)}.json"
    if (seconds := _remembered(place)) is None:
        with _alone(place, show):
            if (seconds := _remembered(place)) is None:  # nor has another process measured it by now
                with show("measure which arithmetic is fastest here", None):
                    seconds = time_ways(model, size, batch, device)
                _remember(place, about, seconds)
    return fastest(seconds, steps)


def cache_folder() -> Path:
    """Where times are kept: `arithmetic` in `$VITRAP_CACHE`, else in `vitrap` in the user's cache folder."""
    chosen = os.environ.get("VITRAP_CACHE")
    return (Path(chosen).expanduser() if chosen else user_cache_path("vitrap")) / "arithmetic"


def fastest(seconds: Seconds, steps: int) -> Arithmetic:
    """The plainest arithmetic that is not clearly slower than the fastest, over a training of so many steps.

    Args:
        seconds: of a step, by `name_of` each way that could be tried; of the first one, compilation included, with
            " first" at the end of the name.
        steps: of the training. It compiles twice: for whole batches, and for an epoch's last one.

    Raises:
        UserError: no way could be tried.
    """
    whole = {way: seconds[name_of(way)] * steps for way in (*PLAIN, *COMPILED) if name_of(way) in seconds}
    whole |= {way: took + 2 * seconds.get(f"{name_of(way)} first", 0.0) for way, took in whole.items() if way.compiled}
    if not whole:
        raise UserError("not one training step fits the device's memory; lower recipe.batch_size")
    least = min(whole.values())
    return next(way for way, took in whole.items() if took <= CLEARLY * least)


def name_of(way: Arithmetic) -> str:
    """What an arithmetic is called in the cache.

    >>> name_of(Arithmetic("bf16", "fused", compiled=True))
    'bf16 fused compiled'
    """
    return " ".join(part for part in (way.precision, way.attention, "compiled" if way.compiled else "") if part)


def time_ways(model: nn.Module, size: tuple[int, int, int], batch: int, device: torch.device) -> dict[str, float]:
    """Seconds of a step of training in each arithmetic that can be tried, on images without content.

    On a CPU the batch is cut so that a step takes about `GOAL`; on a GPU it is the training's own.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = deepcopy(model).to(device).train().requires_grad_(True)
        if device.type == "cpu":
            few = _step(model, PLAIN[0], *_blank(size, FEW, device))
            few()
            batch = min(batch, max(FEW, int(FEW * GOAL / _once(few, device))))
        images, labels = _blank(size, batch, device)
        found: dict[str, float] = {}
        for way in (*PLAIN, *(COMPILED if device.type == "cuda" else ())):
            with suppress(RuntimeError):  # out of memory, or no compiler: not a way to go here
                step = _step(model, way, images, labels)
                if way.compiled:
                    found[f"{name_of(way)} first"] = _once(step, device)
                found[name_of(way)] = _pace(step, device)
    return found


@contextmanager
def _alone(place: Path, show: Steps) -> Iterator[None]:
    """Within the block no other process measures the same, so that neither slows the other; where files can be had."""
    with ExitStack() as stack:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            waiting = partial(show, "wait for another's measuring", None)
            stack.enter_context(locked(place.with_name(f".{place.stem}.lock"), waiting))
        yield


def _remember(place: Path, about: Mapping[str, Any], seconds: Seconds) -> None:
    """Keep times, but not where a plain way failed, since memory may have been short for once."""
    if all(name_of(way) in seconds for way in PLAIN):
        with suppress(OSError):  # a full disk, or a folder that cannot be written: it is measured again
            write_json(place, {"about": dict(about), "seconds": dict(seconds)})


def _blank(
    size: tuple[int, int, int], n: int, device: torch.device
) -> tuple[Float[Tensor, "b c h w"], Int64[Tensor, " b"]]:
    channels, side, classes = size
    return torch.rand(n, channels, side, side, device=device), torch.arange(n, device=device) % classes


def _step(
    model: nn.Module, way: Arithmetic, images: Float[Tensor, "b c h w"], labels: Int64[Tensor, " b"]
) -> Callable[[], None]:
    """Forward and backward; the optimiser's part is the same in every arithmetic."""
    seen: Any = compiled(model) if way.compiled else model

    def step() -> None:
        with way(model, images.device):
            loss = functional.cross_entropy(seen(images), labels)
        model.zero_grad(set_to_none=True)
        loss.backward()

    return step


def _pace(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of a call: the fastest of those that fit into `PATIENCE`, at least two, after one that does not count."""
    step()
    end, times = time.perf_counter() + PATIENCE, [_once(step, device), _once(step, device)]
    while time.perf_counter() < end:
        times.append(_once(step, device))
    return min(times)


def _once(step: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _remembered(place: Path) -> Seconds | None:
    """What was measured before; None where nothing was, or the file is damaged."""
    try:
        seconds = json.loads(place.read_text(encoding="utf-8"))["seconds"]
        known = {name_of(way) for way in PLAIN} & seconds.keys()
        return seconds if known and all(took > 0 for took in seconds.values()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
