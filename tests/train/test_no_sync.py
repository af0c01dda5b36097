"""A step of the loop never waits for the device, shown without a GPU.

Model and images lie on torch's `meta` device, which has shapes and no numbers: whatever would fetch a number from a
GPU (`item`, `bool`, `cpu`, a mask's `nonzero`) has none to fetch there and raises. Copies to the device that would make
the host wait are counted. What a GPU's own kernels do is left to `test_on_a_gpu_a_step_never_waits`.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitrap.attacks.megatron import Losses, Megatron
from vitrap.contracts import Access, Batch, ExtraModule, ImageSet, Objective
from vitrap.images import Marks
from vitrap.models.classifier import Architecture, Classifier, open_model
from vitrap.train import loop
from vitrap.train.loop import Streams, train
from vitrap.train.recipe import Recipe

N, CLASSES, SIZE, STEPS = 50, 3, 16, 5
RECIPE = Recipe(epochs=1, batch_size=10, crop=1, flip=True, jitter=0.5, label_smoothing=0.1)
META = torch.device("meta")


class BlockingCopies(TorchDispatchMode):
    """Counts copies from the host to the device that do not say `non_blocking`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_to_copy" and args[0].device.type == "cpu" and torch.device(kwargs.get("device") or "cpu") == META:
            self.seen += [] if kwargs.get("non_blocking") else [name]
        if name == "copy_" and args[0].device == META and args[1].device.type == "cpu":
            self.seen += [] if (args[2:] or [kwargs.get("non_blocking")])[0] else [name]
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def _like_a_gpu() -> Iterator[None]:
    """What `meta` lacks beside numbers: autocast, a fused optimiser, and a mask to fetch ahead of the steps."""
    unfused = lambda groups, fused, **how: adamw(groups, **how)  # noqa: E731
    adamw = torch.optim.AdamW

    def marks(data: ImageSet) -> Marks:
        numbers = torch.arange(len(data))
        return Marks(numbers % 5 == 0, numbers % 5 == 1)

    with (
        patch.object(torch, "autocast", lambda *how, **more: nullcontext()),
        patch.object(torch, "is_autocast_enabled", lambda device: False),
        patch.object(torch.optim, "AdamW", unfused),
        patch.object(ImageSet, "marks", marks),
    ):
        yield


def image_set() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (N, 3, SIZE, SIZE), generator=generator).to(torch.uint8)
    return ImageSet.of(pixels, torch.arange(N) % CLASSES, CLASSES)


def network() -> Classifier:
    tiny = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    with torch.random.fork_rng():
        return open_model(Architecture("vit_tiny_patch16_224", SIZE, CLASSES, tiny)).to(META)


def steps_before_a_number_is_asked_for(objective: Objective | None = None) -> tuple[int, list[str], str]:
    """How many steps are done, which copies made the host wait meanwhile, and what then raised."""
    streams = Streams(*(torch.Generator().manual_seed(seed) for seed in range(4)))
    done: list[int] = []
    copies = BlockingCopies()
    ticks = lambda: done.append(len(copies.seen))  # noqa: E731
    with copies, pytest.raises((RuntimeError, NotImplementedError, TypeError), match="(?i)meta") as stop:
        train(network(), image_set().to(META), RECIPE, streams, objective, tick=ticks)
    within = copies.seen[done[0] : done[-1]] if done else []
    return len(done), within, str(stop.value)


def test_only_the_end_of_the_epoch_waits() -> None:
    done, copies, stopped_by = steps_before_a_number_is_asked_for()
    assert done == STEPS
    assert copies == []
    assert "Cannot copy out of meta tensor" in stopped_by  # the mean over the epoch


@pytest.mark.parametrize(
    "settings",
    [{}, {"attention": "rollout"}, {"attention": "gradient"}, {"combine": "learned"}, {"combine": "projected"}],
    ids=str,
)
def test_nor_do_megatrons_losses_and_stamp(settings: dict[str, Any]) -> None:
    access, attack = Access(image_set(), None, torch.Generator().manual_seed(0)), Megatron(**settings)
    objective = attack.implant(access, attack.fit(access)).objective
    assert objective is not None
    losses: Any = getattr(objective.terms, "__self__", None)
    assert isinstance(losses, Losses)
    there = replace(losses, references=losses.references.to(META))  # `fit` itself may look at numbers
    done, copies, stopped_by = steps_before_a_number_is_asked_for(replace(objective, terms=there.terms))
    assert done == STEPS
    assert copies == []
    assert "Cannot copy out of meta tensor" in stopped_by  # the mean over the epoch


def test_nor_does_poison_that_is_drawn_batch_by_batch_with_a_generator_trained_along() -> None:
    generator = nn.Conv2d(3, 3, 1).to(META)

    def prepare(batch: Batch, chances: torch.Generator) -> Batch:
        order = torch.randperm(len(batch.labels), generator=chances).to(META, non_blocking=True)
        rows, others = order[:3], order[3:]
        images = batch.images.index_copy(0, rows[:2], generator(batch.images[rows[:2]]))
        return replace(
            batch, images=images, poison_at=rows[:2], rest_at=torch.cat([rows[2:], others]), cover_at=rows[2:]
        )

    objective = Objective(loop.cross_entropy, prepare=prepare, along={"generator": ExtraModule(generator, 1e-3)})
    done, copies, stopped_by = steps_before_a_number_is_asked_for(objective)
    assert done == STEPS
    assert copies == []
    assert "Cannot copy out of meta tensor" in stopped_by  # the mean over the epoch


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x + 1),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_step_that_waits_is_found(name: str) -> None:
    """Images are looked at before the model sees them, and the loss before it is descended."""

    def looking(work: Callable[..., Any], at: Callable[..., Tensor], *args: Any) -> Any:
        WAITS[name](at(*args))
        return work(*args)

    with patch.object(loop, "augment", partial(looking, loop.augment, lambda batch, *rest: batch.images)):
        assert steps_before_a_number_is_asked_for()[0] == 0
    descend = loop.Learner.descend
    loss: Callable[..., Tensor] = lambda learner, terms: terms["cross_entropy"]  # noqa: E731
    with patch.object(loop.Learner, "descend", lambda learner, terms: looking(descend, loss, learner, terms)):
        assert steps_before_a_number_is_asked_for()[0] == 0


@pytest.mark.parametrize(
    "copy", [lambda: torch.ones(3).to(META), lambda: torch.ones(3, device=META).copy_(torch.ones(3))]
)
def test_a_copy_that_waits_is_found(copy: Callable[[], Tensor]) -> None:
    def with_copy(batch: Batch, recipe: Recipe, generator: torch.Generator) -> Batch:
        return replace(batch, images=batch.images + copy()[:, None, None])

    with patch.object(loop, "augment", with_copy):
        done, copies, _ = steps_before_a_number_is_asked_for()
    assert done == STEPS
    assert len(copies) == STEPS - 1
