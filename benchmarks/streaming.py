"""Training from a mapped set over training from memory, and over a DataLoader, on as many pixels as Tiny ImageNet's.

100,000 smooth random images of 64 px in an npy file, and a ViT so small that loading shows: patches of 16, two blocks
of width 64. Every turn is a whole epoch. With a cold page cache, the file's pages are dropped before each of our turns.
Where a file is larger than the memory, most rows come from the disk in every epoch: then its pages are dropped before
every few images, in both turns, and plain is `take` from the bare memory map.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from benchmarks.compare import Figure, Scale, Work, alternate
from benchmarks.subjects import NAME
from benchmarks.training import decay_groups, schedule, streams
from vitrap.contracts import ImageSet
from vitrap.experiment.plan import Network
from vitrap.models.classifier import Architecture, Classifier
from vitrap.train.arithmetic import Arithmetic
from vitrap.train.loop import make_learner, next_batch, train
from vitrap.train.prefetch import prefetched
from vitrap.train.recipe import Recipe

SIZE = 64
CLASSES = 200
SETS = 10  # times the scale's images
TURNS = 3  # at most: each is an epoch
FROM_DISK = 4  # in so many of the scale's images, those gathered from the disk: a bare map is slow
DROPPED = 500  # images between one emptying of the page cache and the next
WORKERS = 2  # of the DataLoader
NETWORK = {"patch_size": 16, "depth": 2, "embed_dim": 64, "num_heads": 2}
WANTED = 0.9


def figures(scale: Scale) -> Iterator[Figure]:
    """Batches alone, training with a warm and a cold page cache, and beside a DataLoader."""
    with TemporaryDirectory() as own:
        path = Path(own, "images.npy")
        write_images(path, SETS * scale.images)
        recipe = Recipe(epochs=1, batch_size=scale.batch, precision="fp32", crop=0, flip=False)
        resident = in_memory(path, scale.device)
        pairs: dict[str, tuple[Work, Work, float | None]] = {
            "batches alone, mapped over in memory": (
                lambda: batches(mapped(path, scale.device), recipe),
                lambda: batches(resident, recipe),
                None,
            ),
            "training, mapped over in memory": (
                lambda: epoch(mapped(path, scale.device), recipe),
                lambda: epoch(resident, recipe),
                WANTED,
            ),
            "training, mapped with a cold page cache over in memory": (
                lambda: epoch(mapped(path, scale.device, cold=True), recipe),
                lambda: epoch(resident, recipe),
                WANTED,
            ),
            f"training, mapped over a DataLoader with {WORKERS} workers": (
                lambda: epoch(mapped(path, scale.device), recipe),
                lambda: plain_epoch(path, recipe, scale.device),
                None,
            ),
        }
        if hasattr(os, "posix_fadvise"):
            rows = torch.randperm(len(resident))[: scale.images // FROM_DISK].split(DROPPED)
            pairs["batches alone, from the disk, over a bare memory map"] = (
                lambda: from_disk(path, rows, scale.batch, ours=True),
                lambda: from_disk(path, rows, scale.batch, ours=False),
                None,
            )
        for name, (ours, plain, wanted) in pairs.items():
            times = alternate(ours, plain, min(TURNS, scale.repeats), device=scale.device)
            note = (
                f"{len(resident)} images of {SIZE} px in {path.stat().st_size / 1e9:.2f} GB, batches of {scale.batch}"
            )
            yield Figure("streaming", name, *times, at_least=wanted, speed=True, note=note)


def write_images(path: Path, n: int) -> None:
    """So many smooth random images as uint8 `n h w 3`."""
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(n, SIZE, SIZE, 3))
    generator = torch.Generator().manual_seed(0)
    for some in torch.arange(n).split(1000):
        coarse = torch.rand(len(some), 3, 8, 8, generator=generator)
        fine = functional.interpolate(coarse, SIZE, mode="bilinear") * 255
        out[some.numpy()] = fine.to(torch.uint8).permute(0, 2, 3, 1).numpy()
    out.flush()


def mapped(path: Path, device: str, cold: bool = False) -> ImageSet:
    """The images, mapped from the file, whose pages are dropped from memory where `cold`."""
    if cold and hasattr(os, "posix_fadvise"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    stored = torch.from_numpy(np.load(path, mmap_mode="c"))
    numbers = torch.arange(len(stored))
    data = ImageSet(stored.permute(0, 3, 1, 2), numbers % CLASSES, numbers, CLASSES, SIZE, pixel_row=numbers)
    return data.to(device)


def in_memory(path: Path, device: str) -> ImageSet:
    """The same images in memory, as a run keeps them."""
    pixels = torch.from_numpy(np.load(path)).permute(0, 3, 1, 2).contiguous()
    numbers = torch.arange(len(pixels))
    return ImageSet(pixels, numbers % CLASSES, numbers, CLASSES, SIZE).to(device)


def network(device: str) -> Classifier:
    """The small ViT, as it is before training."""
    model = Network(Architecture(NAME, SIZE, CLASSES, NETWORK)).build(0, device)
    assert isinstance(model, Classifier)
    return model


def epoch(data: ImageSet, recipe: Recipe) -> None:
    """Train a fresh network on all images."""
    train(network(str(data.device)), data, recipe, streams(str(data.device)))


def batches(data: ImageSet, recipe: Recipe) -> None:
    """Make all batches of an epoch."""
    chances, known = streams(str(data.device)), data.marks()
    learner = make_learner(nn.Linear(1, 1), recipe, None, chances, Arithmetic())  # the network is not asked
    order = torch.randperm(len(data), generator=chances.order).split(recipe.batch_size)
    with prefetched(data, order) as coming:
        for rows, pixels in coming:
            next_batch(learner, data, rows, known, pixels)


def from_disk(path: Path, rows: Sequence[Tensor], batch: int, ours: bool) -> None:
    """Gather batches of rows, as a mapped set does or bare; the page cache is emptied before each part."""
    for part in rows:
        data = mapped(path, "cpu", cold=True)
        bare = data.pixels.permute(0, 2, 3, 1).numpy()
        for some in part.split(batch):
            if ours:
                data.gather(some)
            else:
                bare.take(some.numpy(), 0)


class Stored(Dataset[tuple[Tensor, int]]):
    """The file as PyTorch's users read it: an image at a time."""

    def __init__(self, path: Path) -> None:
        self.pixels = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return torch.from_numpy(np.array(self.pixels[row])).permute(2, 0, 1), row % CLASSES


def plain_epoch(path: Path, how: Recipe, device: str) -> None:
    """A bare loop over a DataLoader, with the same model and optimiser."""
    model, order = network(device), streams(device).order
    body, mean, std = model.body, model.mean, model.std
    loader = DataLoader(
        Stored(path), how.batch_size, shuffle=True, num_workers=WORKERS, pin_memory=device != "cpu", generator=order
    )
    optimiser = torch.optim.AdamW(decay_groups(body, how.weight_decay), lr=how.lr, fused=True)
    body.train()
    for step, (pixels, labels) in enumerate(loader):
        for group in optimiser.param_groups:
            group["lr"] = how.lr * schedule(step / len(loader), how.warmup)
        x = pixels.to(device, non_blocking=True).float() / 255
        logits = body((x - mean) / std)
        wanted = labels.to(device, non_blocking=True)
        loss = functional.cross_entropy(logits, wanted, label_smoothing=how.label_smoothing)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(body.parameters(), how.clip)
        optimiser.step()
