"""`tune`: times a spec's training in each arithmetic on this machine, and writes the fastest into the spec's recipe."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from vitrap.errors import UserError
from vitrap.experiment.plan import make_plan, training_steps
from vitrap.experiment.progress import Progress, no_progress
from vitrap.experiment.spec import load_spec
from vitrap.files import check_file, write_bytes
from vitrap.train.arithmetic import Arithmetic, compiled

PLAIN = (
    Arithmetic("fp32", "fused"), Arithmetic("fp32", "eager"), Arithmetic("bf16", "fused"), Arithmetic("bf16", "eager"),
)  # fmt: skip
"""The ways to compute that are timed, the plainest first."""
COMPILED = (Arithmetic("bf16", "fused", compiled=True),)
"""Timed on a GPU only. On a CPU a compilation takes longer than it saves in a training of minutes:
`python -m benchmarks arithmetic`."""
CLEARLY = 1.1
"""A plainer way is chosen unless another is so many times as fast, so that noise does not decide between equals."""
STEP_SECONDS = 0.1
"""How long a step in plain arithmetic should take; the batch is cut to that on a CPU."""
TIMING_SECONDS = 0.3
"""How long each way is timed."""
FEW = 2
"""Least images in a timed batch; with so many, the size of the batch is estimated."""
Seconds = Mapping[str, float]


@dataclass(frozen=True)
class Tuned:
    """The times that were measured, and the arithmetic to use.

    Attributes:
        seconds: duration of a training step, by `name_of` the way. Of the compiled way there is also the duration of
            the first step, under its name with " first" at the end.
        arithmetic: the plainest way that is not clearly slower than the fastest.
    """

    seconds: Seconds
    arithmetic: Arithmetic


def tune(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    device: str = "auto",
    progress: Progress = no_progress,
    write: bool = True,
) -> Tuned:
    """Time the training of a spec's victim in each arithmetic, and write the choice into the spec's `[recipe]`.

    Args:
        path: the spec's TOML file; its comments and all else stay as they are.
        overrides: `key=value`, for the measuring alone.
        device: "auto", "cpu", "cuda" or "cuda:N".
        progress: displays that steps are being timed.
        write: False to measure only.

    Raises:
        UserError: the spec is wrong or cannot be written, or no training step fits the device's memory.
    """
    spec = load_spec(path, overrides)
    if write:
        check_file(Path(path), f"spec {str(path)!r}", "copy it to where it can be, or give --dry-run")
    plan = make_plan(spec, device, progress=progress, with_surrogates=False)
    train = plan.world.train
    size = (train.channels, train.size, train.n_classes)
    # How fast a network trains does not depend on its weights.
    network = replace(plan.victim, checkpoint=None, weights=None, pretrained=False)
    with progress("time a training step in each arithmetic", None):
        seconds = time_ways(network.build(spec.seed, plan.device), size, spec.recipe.batch_size, plan.device)
    found = Tuned(seconds, fastest(seconds, training_steps(spec, len(train))))
    if write:
        text = Path(path).read_text(encoding="utf-8-sig")
        write_bytes(Path(path), with_recipe(text, asdict(found.arithmetic)).encode())
    return found


def with_recipe(text: str, settings: Mapping[str, Any]) -> str:
    """A TOML text with these settings in its `[recipe]`, and all else as it was."""
    import tomlkit

    document = tomlkit.parse(text)
    recipe = document.setdefault("recipe", tomlkit.table())
    for key, value in settings.items():
        recipe[key] = value
    return tomlkit.dumps(document)


def fastest(seconds: Seconds, steps: int) -> Arithmetic:
    """The plainest arithmetic that is not clearly slower than the fastest, over a training of so many steps.

    Args:
        seconds: as in `Tuned`.
        steps: the number of steps of the training.

    Raises:
        UserError: no way could be timed.
    """
    whole = {way: seconds[name_of(way)] * steps for way in (*PLAIN, *COMPILED) if name_of(way) in seconds}
    # A training compiles twice: for whole batches, and for the last batch of an epoch.
    whole |= {way: took + 2 * seconds.get(f"{name_of(way)} first", 0.0) for way, took in whole.items() if way.compiled}
    if not whole:
        raise UserError("not one training step fits the device's memory; lower recipe.batch_size")
    least = min(whole.values())
    return next(way for way, took in whole.items() if took <= CLEARLY * least)


def name_of(way: Arithmetic) -> str:
    """An arithmetic in words.

    >>> name_of(Arithmetic("bf16", "fused", compiled=True))
    'bf16 fused compiled'
    """
    return " ".join(part for part in (way.precision, way.attention, "compiled" if way.compiled else "") if part)


def time_ways(model: nn.Module, size: tuple[int, int, int], batch: int, device: torch.device) -> dict[str, float]:
    """Time a step of training in each arithmetic, on random images; returns seconds by `name_of` the way.

    On a CPU the batch is cut so that a step takes about `STEP_SECONDS`; on a GPU it is the training's own.

    Args:
        model: the network, any weights; it stays as it is.
        size: channels and side of its images in pixels, and number of its classes.
        batch: images in a batch of the training.
        device: where to compute.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = deepcopy(model).to(device).train().requires_grad_(True)
        if device.type == "cpu":
            few = _step(model, PLAIN[0], *_blank(size, FEW, device))
            few()
            batch = min(batch, max(FEW, int(FEW * STEP_SECONDS / _once(few, device))))
        images, labels = _blank(size, batch, device)
        found: dict[str, float] = {}
        for way in (*PLAIN, *(COMPILED if device.type == "cuda" else ())):
            with suppress(RuntimeError):  # out of memory, or no compiler: this way is left out
                step = _step(model, way, images, labels)
                if way.compiled:
                    found[f"{name_of(way)} first"] = _once(step, device)
                found[name_of(way)] = _pace(step, device)
    return found


def _blank(
    size: tuple[int, int, int], n: int, device: torch.device
) -> tuple[Float[Tensor, "b c h w"], Int64[Tensor, " b"]]:
    channels, side, classes = size
    return torch.rand(n, channels, side, side, device=device), torch.arange(n, device=device) % classes


def _step(
    model: nn.Module, way: Arithmetic, images: Float[Tensor, "b c h w"], labels: Int64[Tensor, " b"]
) -> Callable[[], None]:
    """Forward and backward; the optimiser's part is the same in every arithmetic."""
    forward: Any = compiled(model) if way.compiled else model

    def step() -> None:
        with way(model, images.device):
            loss = functional.cross_entropy(forward(images), labels)
        model.zero_grad(set_to_none=True)
        loss.backward()

    return step


def _pace(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of the fastest of all calls within `TIMING_SECONDS`, of at least two; one call before them warms up."""
    step()
    end = time.perf_counter() + TIMING_SECONDS
    times = [_once(step, device), _once(step, device)]
    while time.perf_counter() < end:
        times.append(_once(step, device))
    return min(times)


def _once(step: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
