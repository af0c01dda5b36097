"""Batches gathered ahead: the same training bit for bit, errors where they belong, and no thread left over."""

import threading
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from vitrap.images import ImageSet, scratch
from vitrap.train.arithmetic import Arithmetic
from vitrap.train.loop import Learner, Streams, make_learner, next_batch, train
from vitrap.train.prefetch import AHEAD, prefetched
from vitrap.train.recipe import Recipe

N, CLASSES, SIZE = 50, 3, 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def streams(device: str = "cpu") -> Streams:
    return Streams(generator(), torch.Generator(device).manual_seed(1), generator(2), generator(3))


def learner(recipe: Recipe, device: str = "cpu") -> Learner:
    """Its network is not asked."""
    return make_learner(nn.Linear(1, CLASSES), recipe, None, streams(device), Arithmetic())


def resident() -> ImageSet:
    pixels = torch.randint(256, (N, 3, SIZE, SIZE), generator=generator(7), dtype=torch.uint8)
    clean = ImageSet(pixels, torch.arange(N) % CLASSES, torch.arange(N), CLASSES, SIZE)
    stamped = torch.zeros(5, 3, SIZE, SIZE, dtype=torch.uint8)
    return clean.stamp(torch.arange(0, N, 10), stamped, torch.zeros(5, dtype=torch.int64))


def mapped() -> ImageSet:
    data, file = resident(), scratch(N, SIZE, SIZE, 3)
    place = torch.randperm(N, generator=generator(3))
    file[place] = data.pixels.permute(0, 2, 3, 1)
    return replace(data, pixels=file.permute(0, 3, 1, 2), pixel_row=place)


def trained(data: ImageSet, **changes) -> tuple[Tensor, dict[str, list[float]]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, CLASSES))
    recipe = Recipe(2, 16, lr=1e-2, warmup=0.1, crop=2, flip=True)
    curves = train(model, data, recipe, streams(), **changes)
    return torch.cat([w.detach().flatten() for w in model.parameters()]), curves


def gatherers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("gather")]


def test_a_mapped_set_trains_to_the_same_weights() -> None:
    (weights, curves), (others, more) = trained(resident()), trained(mapped())
    assert torch.equal(weights, others)
    assert curves == more
    assert not gatherers()


def test_batches_come_in_order_a_few_ahead_of_their_use() -> None:
    data, gathered = mapped(), []
    order = torch.arange(N).split(8)
    gather = ImageSet.gather
    with (
        patch.object(ImageSet, "gather", lambda self, rows: gathered.append(len(rows)) or gather(self, rows)),
        prefetched(data, order) as batches,
    ):
        for i, (rows, pixels) in enumerate(batches):
            assert torch.equal(rows, order[i])
            assert torch.equal(pixels, gather(data, rows))
            assert len(gathered) <= i + 1 + AHEAD
    assert i == len(order) - 1
    assert len(gathered) == len(order)


def test_a_set_in_memory_needs_no_thread() -> None:
    data = resident()
    with prefetched(data, torch.arange(N).split(8)) as batches:
        assert not gatherers()
        assert all(torch.equal(pixels, data.pixels[rows]) for rows, pixels in batches)


def test_what_fails_in_the_thread_is_raised_in_the_trainer() -> None:
    with patch.object(ImageSet, "gather", side_effect=OSError("disk gone")), pytest.raises(OSError, match="disk gone"):
        trained(mapped())
    assert not gatherers()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_no_thread_outlives_a_training_that_ends_early(error: type[BaseException]) -> None:
    def tick() -> None:
        assert gatherers()
        raise error

    with pytest.raises(error) as caught:
        trained(mapped(), tick=tick)
    assert caught.value.__traceback__ is not None, "it would keep the loop's frame"
    assert not gatherers()


def test_a_step_reads_nothing_back_from_the_device() -> None:
    """On the meta device reading anything is an error; rows and pixels are on the host."""
    data = mapped()
    there = data.to("meta")
    for rows in torch.arange(N).split(20):
        batch = next_batch(learner(Recipe(1, 20, crop=2, flip=True)), there, rows, data.marks(), there.gather(rows))
        assert batch.images.device.type == batch.labels.device.type == "meta"
        assert len(batch.poison_at) == int(data.poisoned[rows].sum())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_host_never_waits() -> None:
    data = mapped()
    there, maker, marks = data.to("cuda"), learner(Recipe(1, 10), "cuda"), data.marks()
    with prefetched(there, torch.arange(N).split(10)) as batches:
        for i, (rows, pixels) in enumerate(batches):
            if i == 1:  # the first sets libraries up
                torch.cuda.set_sync_debug_mode("error")
            next_batch(maker, there, rows, marks, pixels)
    torch.cuda.set_sync_debug_mode("default")
