"""Several small models trained at once, over the same models one after another.

One after another is a step of the training loop for each model in turn, in one process that has all threads. Against
it: the models stacked into one and stepped by torch.func's vmap; processes with a share of the models each; on a GPU,
a CUDA stream for each model. The loop's own parts make every step. Starting processes and stacking weights is left
out: a training lasts minutes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional

from benchmarks.compare import Figure, Scale, in_turns
from benchmarks.subjects import image_set
from vitrap.contracts import Batch, ImageSet
from vitrap.experiment.plan import Network
from vitrap.models.classifier import Architecture
from vitrap.sweeps.sweep import cores
from vitrap.train.arithmetic import default_arithmetic
from vitrap.train.loop import Streams as Chances
from vitrap.train.loop import make_learner, next_batch, plain_step
from vitrap.train.recipe import Recipe

MODELS = 4
IMAGES = 1024
BATCH = 64
NAME = "vit_tiny_patch16_224"
SUBJECTS = {
    "study": Architecture(NAME, 32, 10, {"patch_size": 8, "depth": 4, "embed_dim": 96, "num_heads": 3}),
    "digits": Architecture(NAME, 16, 10, {"patch_size": 4, "depth": 3, "embed_dim": 64, "num_heads": 4}),
}
"""The networks of specs/study.toml and of the embedded default, by name."""
Advance = Callable[[], object]


def figures(scale: Scale) -> Iterator[Figure]:
    """Every way on this machine's cores, for both networks."""
    threads, workers = torch.get_num_threads(), cores()
    for name, network in SUBJECTS.items():
        alone = Trainees(network, range(MODELS), scale)
        note = f"{MODELS} models, {scale.steps} steps of {BATCH} each"
        compared = partial(compare, alone=alone, scale=scale)
        yield compared(f"{name}, one after another on one thread", partial(on_threads, 1, alone.advance), note=note)
        yield compared(f"{name}, stacked", Stack(alone).advance, note=note)
        for each in sorted({1, threads}):
            with crew(network, MODELS, workers, each, scale) as advance:
                title = f"{name}, {workers} processes of {each} thread" + "s" * (each > 1)
                yield compared(title, partial(advance, MODELS), note=f"{note}; the start of processes left out")


def compare(name: str, ours: Advance, alone: "Trainees", scale: Scale, note: str) -> Figure:
    """A way of training several models over one after another, in throughput."""
    times = in_turns(ours, alone.advance, scale)
    figure = Figure("together", name, *times, speed=True, note=note)
    rates = (len(alone.all) * scale.steps / took for took in figure.seconds)
    return replace(figure, note="{}; {:.0f} over {:.0f} model steps/s".format(note, *rates))


def on_threads(threads: int, work: Advance) -> None:
    """Do `work` with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        work()
    finally:
        torch.set_num_threads(before)


class Trainee:
    """One model in training, a step at a time."""

    def __init__(self, network: Architecture, seed: int, data: ImageSet) -> None:
        self.model = Network(network).build(seed, data.device).train()
        self.data, self.recipe = data, Recipe(batch_size=BATCH)
        self.order = torch.Generator().manual_seed(seed)
        augmentation = torch.Generator(data.device).manual_seed(seed)
        self.marks = data.marks()
        chances = Chances(self.order, augmentation, self.order, self.order)
        self.learner = make_learner(self.model, self.recipe, None, chances, default_arithmetic("auto", data.device))

    def step(self) -> None:
        """As the training loop does it."""
        plain_step(self.learner, self.batch(draw(self.data, self.recipe, self.order)))

    def batch(self, rows: Tensor) -> Batch:
        """The images of `rows`, as the training loop makes them."""
        return next_batch(self.learner, self.data, rows, self.marks)


def draw(data: ImageSet, recipe: Recipe, order: torch.Generator) -> Tensor:
    """The rows of a batch, on the CPU."""
    return torch.randint(len(data), (recipe.batch_size,), generator=order)


class Trainees:
    """A model a seed, one after another."""

    def __init__(self, network: Architecture, seeds: Sequence[int], scale: Scale) -> None:
        whole = image_set(IMAGES, scale.device)
        every = whole.size // network.size
        data = replace(whole, pixels=whole.pixels[:, :, ::every, ::every].contiguous(), size=network.size)
        self.all = [Trainee(network, seed, data) for seed in seeds]
        self.steps = scale.steps

    def advance(self, count: int | None = None) -> None:
        """All steps of the first model, then of the next; of the first `count`, or of all."""
        for trainee in self.all[:count]:
            for _ in range(self.steps):
                trainee.step()


class Streams:
    """The same, each model on a CUDA stream of its own: the host asks for a step of each in turn."""

    def __init__(self, trainees: Trainees) -> None:
        self.trainees = trainees
        self.streams = [torch.cuda.Stream() for _ in trainees.all]

    def advance(self) -> None:
        """A step of each, again and again."""
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream())
        for _ in range(self.trainees.steps):
            for trainee, stream in zip(self.trainees.all, self.streams, strict=True):
                with torch.cuda.stream(stream):
                    trainee.step()
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)


class Stack:
    """The same models as one: every weight stacked, one forward and backward pass, one optimiser for all."""

    def __init__(self, trainees: Trainees) -> None:
        models = [deepcopy(trainee.model) for trainee in trainees.all]
        self.weights, self.buffers = stack_module_state(models)
        self.skeleton = models[0].to("meta")
        first, self.steps, self.count = trainees.all[0], trainees.steps, len(models)
        self.data, self.recipe, self.batch = first.data, first.recipe, first.batch
        self.orders = [trainee.order.clone_state() for trainee in trainees.all]
        self.optimiser = stacked_optimiser(first.learner.optimiser, first.model, self.weights)
        arithmetic = default_arithmetic("auto", self.data.device)
        on_cpu = self.data.device.type == "cpu"  # where vmap has no rule for fused attention
        self.arithmetic = replace(arithmetic, attention="eager") if on_cpu else arithmetic

    def advance(self) -> None:
        """All steps of all models."""
        with self.arithmetic.attending(self.skeleton):
            for _ in range(self.steps):
                self.step()

    def step(self) -> None:
        """One step of every model, each with a batch of its own."""
        rows = torch.cat([draw(self.data, self.recipe, order) for order in self.orders])
        batch = self.batch(rows)
        with self.arithmetic.autocast(self.data.device):
            each = batch.images.unflatten(0, (self.count, -1))
            logits = vmap(self._logits, randomness="different")(self.weights, self.buffers, each)
            losses = functional.cross_entropy(logits.flatten(0, 1), batch.labels, reduction="none")
        self.optimiser.zero_grad(set_to_none=True)
        losses.unflatten(0, (self.count, -1)).mean(1).sum().backward()
        clip_each([weight.grad for weight in self.weights.values() if weight.grad is not None], self.recipe.clip)
        self.optimiser.step()

    def _logits(self, weights: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(self.skeleton, (weights, buffers), (images,))


def stacked_optimiser(
    single: torch.optim.Optimizer, model: nn.Module, weights: dict[str, Tensor]
) -> torch.optim.Optimizer:
    """The optimiser of one model, for the stacked weights of many: AdamW treats every number by itself."""
    stacked = {id(weight): weights[name] for name, weight in model.named_parameters()}
    groups = [
        {"params": [stacked[id(w)] for w in group["params"]], "weight_decay": group["weight_decay"]}
        for group in single.param_groups
    ]
    return torch.optim.AdamW(groups, lr=single.param_groups[0]["lr"], fused=True)


def clip_each(gradients: Sequence[Tensor], limit: float) -> None:
    """Shorten each model's gradient to `limit`, as `clip_grad_norm_` does for one."""
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    factors = (limit / (norms + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))


@contextmanager
def crew(
    network: Architecture, models: int, workers: int, threads: int, scale: Scale
) -> Iterator[Callable[[int], None]]:
    """Worker processes that share `models` out; yields what makes all steps of the first so many of them."""
    context = get_context("spawn")
    shares = [range(number, models, workers) for number in range(workers)]
    lines: list[Connection] = []
    hands: list[BaseProcess] = []
    for share in shares:
        ours, theirs = context.Pipe()
        lines.append(ours)
        hands.append(context.Process(target=serve, args=(theirs, network, share, threads, scale), daemon=True))
        hands[-1].start()
        theirs.close()  # so that a worker's death ends the line

    def advance(count: int) -> None:
        for line, share in zip(lines, shares, strict=True):
            line.send(len([seed for seed in share if seed < count]))
        for line in lines:
            line.recv()

    try:
        for line in lines:
            line.recv()
        yield advance
    finally:
        for line in lines:
            line.close()
        for hand in hands:
            hand.join()


def serve(line: Connection, network: Architecture, seeds: Sequence[int], threads: int, scale: Scale) -> None:
    """A worker's life: as often as it is told a number, all steps of so many of its models; until the line ends."""
    torch.set_num_threads(threads)
    trainees = Trainees(network, seeds, scale)
    line.send(None)
    with suppress(EOFError):
        while True:
            trainees.advance(line.recv())
            if scale.device != "cpu":
                torch.cuda.synchronize()
            line.send(None)
