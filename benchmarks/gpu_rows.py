"""The rows of `benchmarks.gpu`: matrix rate, checks, training steps, the trigger, models together.

A part yields rows as a name and what to call for it, so that a row that fails stops no other.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks import together
from benchmarks.compare import Figure, Scale, alternate, in_turns, seconds
from benchmarks.operations import Waits, best_rate, matrix_rate, training_operations
from benchmarks.poisoning import BATCH as POISONED
from benchmarks.training import Bare, streams
from vitrap.attacks.ageb import Ageb, Erosion
from vitrap.contracts import AllToOne, ImageSet
from vitrap.data.poison import poison_set
from vitrap.data.sources import open_data
from vitrap.experiment.plan import Network
from vitrap.models.classifier import Architecture, Classifier
from vitrap.sweeps.sweep import cores
from vitrap.train.arithmetic import default_arithmetic
from vitrap.train.loop import train
from vitrap.train.recipe import Recipe

CLASSES = 10
MFU_32, MFU_224 = 35.0, 50.0
"""Wanted model FLOP utilisation in per cent: ViT-S at 32 px, ViT-B/16 at 224 px."""
TRIGGERED, TRIGGER_SECONDS = 50_000, 10.0
COMPILING = 45.0
"""Seconds that a compiled row may take; it is left out where the parts to come need them."""
NEEDS_GPU = "needs a GPU"


@dataclass(frozen=True)
class Bench:
    """Where and how much is measured.

    Attributes:
        device: "cpu" or "cuda".
        small: tiny networks, the same code.
        until: the monotonic time at which all must be done.
        ahead: seconds that the parts to come need of it.
    """

    device: str
    small: bool
    until: float
    ahead: float = 0.0

    @property
    def on_gpu(self) -> bool:
        """Whether there is one."""
        return self.device != "cpu"

    @property
    def left(self) -> float:
        """Seconds that this part may still take."""
        return self.until - self.ahead - time.monotonic()

    @property
    def scale(self) -> Scale:
        """How long turns last and how many there are."""
        if self.small:
            return Scale(steps=2, repeats=2, least=0.0, device=self.device)
        return Scale(steps=16, repeats=3, least=0.3, device=self.device)

    def judged(self, kept: bool) -> bool | None:
        """A bound that is meant for a GPU and whole networks: None elsewhere."""
        return kept if self.on_gpu and not self.small else None


@dataclass(frozen=True)
class Found:
    """One row.

    Attributes:
        part: which part it belongs to.
        name: what was measured.
        values: named figures, the unit in the name.
        figure: the comparison with a plain baseline in turns; None where there is none.
        wanted: a bound in words, "" for none.
        met: whether it is kept; None where that was not measured.
        note: what else should be known.
        failed: whether the row could not be measured.
    """

    part: str
    name: str
    values: Mapping[str, float] = field(default_factory=dict)
    figure: Figure | None = None
    wanted: str = ""
    met: bool | None = None
    note: str = ""
    failed: bool = False

    def table(self) -> dict[str, Any]:
        """The row as JSON has it."""
        return {**vars(self), "values": dict(self.values), "figure": self.figure.table() if self.figure else None}


Row = tuple[str, Callable[[], Found]]


def vit_s(depth: int, small: bool) -> Architecture:
    """ViT-S at 32 px with patches of 4, or a tiny stand-in."""
    whole = {"patch_size": 4, "embed_dim": 384, "num_heads": 6, "depth": depth}
    tiny = {"patch_size": 8, "embed_dim": 64, "num_heads": 2, "depth": 2}
    return Architecture("vit_small_patch16_224", 32, CLASSES, tiny if small else whole)


def vit_b(small: bool) -> Architecture:
    """ViT-B/16 at 224 px, or a tiny stand-in at 64."""
    if small:
        return Architecture("vit_base_patch16_224", 64, CLASSES, {"embed_dim": 64, "num_heads": 2, "depth": 2})
    return Architecture("vit_base_patch16_224", 224, CLASSES)


def build(architecture: Architecture, seed: int, device: str) -> Classifier:
    """The network with fresh weights."""
    model = Network(architecture).build(seed, device)
    assert isinstance(model, Classifier)
    return model


def noise(n: int, size: int, device: str) -> ImageSet:
    """So many images of noise with random labels, made where they are used."""
    chance = torch.Generator(device).manual_seed(0)
    pixels = torch.randint(256, (n, 3, size, size), generator=chance, device=device, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (n,), generator=chance, device=device)
    return ImageSet.of(pixels, labels, CLASSES)


# ---- peak


@cache
def rates(device: str, small: bool) -> dict[int, tuple[float, ...]]:
    """Matrix rates by size, measured once."""
    return matrix_rate(device, (256, 512) if small else (4096, 8192, 16384))


def peak(bench: Bench) -> Iterator[Row]:
    """The device's own bf16 matrix rate, by size; the best of the medians is what steps are measured against."""

    def row() -> Found:
        found = rates(bench.device, bench.small)
        size, _ = best_rate(found)
        values = {f"TFLOP/s at {n}": median(each) / 1e12 for n, each in found.items()}
        spread = ", ".join(f"{n}: {min(each) / 1e12:.4g} to {max(each) / 1e12:.4g}" for n, each in found.items())
        return Found("peak", "bf16 product of square matrices", values, note=f"best at {size}; turns {spread}")

    yield "bf16 product of square matrices", row


# ---- check


def check(bench: Bench) -> Iterator[Row]:
    """Right before fast."""
    yield "SGD in fp32, GPU against CPU", partial(same_as_cpu, bench)
    yield "what waits for the device", partial(waiting, bench)
    yield "bf16's losses against fp32's", partial(near_fp32, bench)


def same_as_cpu(bench: Bench) -> Found:
    """Four steps from the same weights over the same batches: how far the two changes of the weights are apart."""
    name, wanted = "SGD in fp32, GPU against CPU", "<= 0.001"
    if not bench.on_gpu:
        return Found("check", name, wanted=wanted, note="apart over the length of the change")
    data, changes = noise(64, 32, "cpu"), []
    recipe = Recipe(epochs=1, batch_size=16, optimizer="sgd", lr=0.01, precision="fp32")
    for device in ("cpu", bench.device):
        model = build(vit_s(7, bench.small), 0, device)
        before = nn.utils.parameters_to_vector(model.parameters()).detach().cpu()
        with torch.backends.cudnn.flags(enabled=False):  # whose convolutions are TF32 by default
            train(model, data.to(device), recipe, streams(device))
        changes.append(nn.utils.parameters_to_vector(model.parameters()).detach().cpu() - before)
    apart = ((changes[1] - changes[0]).norm() / changes[0].norm()).item()
    return Found("check", name, {"apart": apart}, wanted=wanted, met=apart <= 1e-3, note="over the change's length")


def waiting(bench: Bench) -> Found:
    """Operations between the first step and the last that make the host wait."""
    steps, data = 8, noise(8 * 16, 32, bench.device)
    recipe = Recipe(epochs=1, batch_size=16, crop=4, flip=True, jitter=0.5)
    model, done, seen = build(vit_s(7, bench.small), 0, bench.device), [], Waits()

    def tick() -> None:
        done.append(len(seen.seen))
        if bench.on_gpu:
            torch.cuda.set_sync_debug_mode("error" if len(done) < steps else "default")

    try:
        with seen:
            train(model, data, recipe, streams(bench.device), tick=tick)
    finally:
        if bench.on_gpu:
            torch.cuda.set_sync_debug_mode("default")
    found = done[-1] - done[0]
    note = "torch's sync debug mode was on" if bench.on_gpu else "counted by name; a GPU's own look at it is missing"
    return Found("check", "what waits for the device", {"operations": found}, wanted="0", met=found == 0, note=note)


def near_fp32(bench: Bench) -> Found:
    """The embedded digits in both precisions: the greatest relative distance of the epochs' losses."""
    data = open_data("digits", device=bench.device).train
    shape = {"patch_size": 4, "depth": 3, "embed_dim": 64, "num_heads": 4}
    network, curves = Architecture("vit_small_patch16_224", 16, CLASSES, shape), []
    recipe = Recipe(epochs=2 if bench.small else 6, batch_size=64)
    for precision in ("fp32", "bf16"):
        way = default_arithmetic(precision, data.device)
        curves.append(train(build(network, 0, bench.device), data, recipe, streams(bench.device), arithmetic=way))
    exact, near = (curve["cross_entropy"] for curve in curves)
    apart = max(abs(a - b) / a for a, b in zip(exact, near, strict=True))
    note = f"{recipe.epochs} epochs of digits, loss {exact[0]:.3g} to {exact[-1]:.3g} in fp32, {near[-1]:.3g} in bf16"
    name = "bf16's losses against fp32's"
    return Found("check", name, {"apart": apart}, wanted="<= 0.02", met=apart <= 0.02, note=note)


# ---- step


@dataclass(frozen=True)
class Case:
    """A training step to time: a network, images a step, and whether it is compiled."""

    name: str
    network: Architecture
    batch: int
    wanted: float
    compiled: bool = False


def step(bench: Bench) -> Iterator[Row]:
    """Operations, which need no device; steps; what augmentation adds; compiled steps while there is time."""
    for depth in (7, 9, 12):
        yield f"ViT-S/4, depth {depth}", partial(operations, f"ViT-S/4, depth {depth}", vit_s(depth, small=False))
    yield "ViT-B/16 at 224 px", partial(operations, "ViT-B/16 at 224 px", vit_b(small=False))
    tiny = "stand-in for " if bench.small else ""
    sizes = (16, 32) if bench.small else (512, 1024)
    plain = [
        Case(f"{tiny}ViT-S/4, depth {d}", vit_s(d, bench.small), b, MFU_32)
        for d, b in product((7,) if bench.small else (7, 9, 12), sizes)
    ]
    large = Case(f"{tiny}ViT-B/16 at 224 px", vit_b(bench.small), 4 if bench.small else 256, MFU_224)
    for case in (*plain, large):
        yield f"{case.name}, batch {case.batch}", partial(timed, bench, case)
    yield "crop, flip and jitter", partial(augmented, bench, plain[1])
    for case in (plain[1], large, *plain[3::2]):
        yield f"{case.name}, batch {case.batch}, compiled", partial(timed, bench, replace(case, compiled=True))


def operations(name: str, network: Architecture) -> Found:
    """What an image costs in a training step, counted."""
    gflop = training_operations(network) / 1e9
    return Found("step", f"{name}, operations", {"GFLOP an image": gflop}, note="forward and backward, counted")


def timed(bench: Bench, case: Case) -> Found:
    """Our loop in bf16 over the bare one, with what both make of the device."""
    name = f"{case.name}, batch {case.batch}" + ", compiled" * case.compiled
    if case.compiled and bench.left < COMPILING:
        return Found("step", name, note="left out: no time")
    torch.compiler.reset()  # what earlier rows compiled counts towards torch's limit
    scale = replace(bench.scale, steps=bench.scale.steps // 2) if case.network.size > 32 else bench.scale
    data = noise(scale.steps * case.batch, case.network.size, bench.device)
    recipe = Recipe(epochs=1, batch_size=case.batch, precision="bf16")
    mine, bare = build(case.network, 0, bench.device), Bare(build(case.network, 0, bench.device), recipe)
    way = replace(default_arithmetic("bf16", data.device), compiled=case.compiled)
    chances, others = streams(bench.device), streams(bench.device)

    def ours() -> None:
        train(mine, data, recipe, chances, arithmetic=way)

    def plain() -> None:
        bare.train(data.pixels, data.labels, others.order, others.augmentation)

    first = seconds(ours, bench.device)
    memory = peak_memory(ours, bench)
    times = in_turns(ours, plain, scale)
    figure = Figure("step", name, *times, speed=True)
    values = {**utilisation(bench, case.network, len(data), figure), **memory}
    note = f"{scale.steps} steps a turn; first call {first:.1f} s"
    kept = bench.judged(values["MFU, %"] >= case.wanted)
    return Found("step", name, values, figure, f"MFU >= {case.wanted:g} %", kept, note)


def utilisation(bench: Bench, network: Architecture, images: int, figure: Figure) -> dict[str, float]:
    """Images a second, and model operations a second over the device's matrix rate, ours and plain."""
    work, (_, top) = training_operations(network), best_rate(rates(bench.device, bench.small))
    ours, plain = (images / took for took in figure.seconds)
    return {
        "images/s": ours,
        "TFLOP/s": ours * work / 1e12,
        "MFU, %": 100 * ours * work / top,
        "plain MFU, %": 100 * plain * work / top,
    }


def peak_memory(work: Callable[[], None], bench: Bench) -> dict[str, float]:
    """GB of device memory that `work` takes at most; nothing on a CPU."""
    if not bench.on_gpu:
        return {}
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return {"device memory, GB": torch.cuda.max_memory_allocated() / 1e9}


def augmented(bench: Bench, case: Case) -> Found:
    """A step with crop, flip and jitter over one without."""
    scale = bench.scale
    data = noise(scale.steps * case.batch, case.network.size, bench.device)
    recipe = Recipe(epochs=1, batch_size=case.batch, precision="bf16")
    changed = replace(recipe, crop=4, flip=True, jitter=0.5)
    model, chances = build(case.network, 0, bench.device), streams(bench.device)
    times = in_turns(lambda: train(model, data, changed, chances), lambda: train(model, data, recipe, chances), scale)
    name = f"{case.name}, batch {case.batch}, with crop, flip and jitter over without"
    return Found("step", name, figure=Figure("step", name, *times))


# ---- trigger


def trigger(bench: Bench) -> Iterator[Row]:
    """AGEB's trigger on a whole training set, as a run poisons it."""
    yield "AGEB's trigger", partial(stamped, bench)


def stamped(bench: Bench) -> Found:
    """The trigger over a forward pass of the surrogate alone over the same images, both in fp32."""
    n = 64 if bench.small else TRIGGERED
    data, surrogate = noise(n, 32, bench.device), build(vit_s(7, bench.small), 1, bench.device)
    implanted = Erosion(surrogate.eval().requires_grad_(False), Ageb())
    rows, goal = torch.arange(n, device=bench.device), AllToOne(0)

    def ours() -> None:
        poison_set(data, rows, implanted, goal, "dirty")

    @torch.no_grad()
    def plain() -> None:
        for some in rows.split(POISONED):
            surrogate(data.images(some))

    name = f"AGEB's trigger, {n} images"
    ours()
    plain()
    figure = Figure("trigger", name, *alternate(ours, plain, bench.scale.repeats, device=bench.device))
    took = figure.seconds[0]
    values = {"seconds": took, "images/s": n / took}
    kept = bench.judged(took <= TRIGGER_SECONDS)
    return Found("trigger", name, values, figure, f"<= {TRIGGER_SECONDS:g} s for {TRIGGERED} images", kept)


# ---- together


def models_together(bench: Bench) -> Iterator[Row]:
    """1, 2, 4 and 8 models at once, every way over one after another; on a GPU a process a model, else one a core."""
    most = 2 if bench.small else 8
    scale = replace(bench.scale, steps=2 if bench.small else 4, least=0.0)
    workers = most if bench.on_gpu else cores()
    for name, network in together.SUBJECTS.items():
        with together.crew(network, most, workers, 1, scale) as advance:
            counts = [k for k in (1, 2, 4, 8) if k <= most] if name == "study" else [most]
            for count in counts:
                alone = together.Trainees(network, range(count), scale)
                ways: dict[str, Callable[[], together.Advance]] = {"stacked": lambda a=alone: together.Stack(a).advance}
                ways["on streams"] = lambda a=alone: together.Streams(a).advance
                ways["in processes"] = lambda k=count: partial(advance, k)
                for way, start in ways.items():
                    title = f"{name}, {count} model{'s' * (count > 1)} {way}"
                    yield title, partial(at_once, bench, title, start, (alone, scale))


def at_once(
    bench: Bench, name: str, start: Callable[[], together.Advance], alone: tuple[together.Trainees, Scale]
) -> Found:
    """One way of training several models, over one after another."""
    if "streams" in name and not bench.on_gpu:
        return Found("together", name, note=NEEDS_GPU)
    figure = together.compare(name, start(), *alone, note="")
    steps, (ours, plain) = alone[1].steps, figure.seconds
    values = {"steps/s of each model": steps / ours, "one after another": steps / plain}
    return Found("together", name, values, figure, note=f"{steps} steps of {together.BATCH} a turn")
