"""`ImageSet`, a data set as 8-bit pixels in memory or mapped from a file, and `Batch`, what a model sees of it."""

import ctypes
import mmap
import operator
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vitrap.errors import UserError
from vitrap.files import named_errors
from vitrap.memory import memory_limit
from vitrap.tensors.pixels import to_bytes

Images = Float[Tensor, "b c h w"]
Gathered = UInt8[Tensor, "b c native_h native_w"]
"""Clean pixels of a batch at native size: on the set's device, or on the host if the set is mapped."""
GPU_SHARE = 1 / 4
"""The share of a GPU's memory that the pixels of a set may take by default; assumed."""
CHUNK = 256  # images at a time where a whole set is gone through: 0.2 GB each at 224 px


@dataclass(frozen=True)
class Batch:
    """A batch of images as the model sees them, with labels and the positions of poison.

    The lengths of the positions are known on the host, without waiting for the device.

    Attributes:
        images: the images, augmented, with their triggers.
        labels: the labels to train on.
        poison_at: positions of the poisoned images in the batch.
        rest_at: positions of all other images.
        cover_at: positions of the covers, images with a trigger that do not count as poison; `rest_at` has them, too.
    """

    images: Images
    labels: Int64[Tensor, " b"]
    poison_at: Int64[Tensor, " p"]
    rest_at: Int64[Tensor, " q"]
    cover_at: Int64[Tensor, " r"]


@dataclass(frozen=True)
class ImageSet:
    """A whole data set as 8-bit pixels: in memory, on one device, or mapped from a file.

    Images with a trigger are in a second tensor, `stamped`, at working size, so that a set and its poisoned copy share
    the clean pixels. Not all of them count as poison: covers carry a trigger, too, but keep their label, so that the
    model learns which triggers to ignore.

    Attributes:
        pixels: the clean images at native size; of a mapped set, all images of the file, on the host: a permuted view,
            since the file has them as `k h w c`.
        labels: the labels to train on, in [0, n_classes).
        index: each image's position in the set that it was first read from.
        n_classes: number of classes, whether or not each is present.
        size: working resolution in pixels: the size of what `images` returns and triggers see.
        stamped_row: each image's row in `stamped`, or -1 for images without a trigger; None where no image has one.
        stamped: the images with a trigger, at working size.
        stamped_is_cover: which of `stamped` are covers; None where all are poison.
        groups: images of one group show the same thing (a GTSRB track); None where unknown.
        classes: names of the classes; () where unknown.
        pixel_row: each image's row in the mapped `pixels`, on the host; None where the set is in memory.
    """

    pixels: UInt8[Tensor, "k c h w"]
    labels: Int64[Tensor, " n"]
    index: Int64[Tensor, " n"]
    n_classes: int
    size: int
    stamped_row: Int64[Tensor, " n"] | None = None
    stamped: UInt8[Tensor, "m c s s"] | None = None
    stamped_is_cover: Bool[Tensor, " m"] | None = None
    groups: Int64[Tensor, " n"] | None = None
    classes: tuple[str, ...] = ()
    pixel_row: Int64[Tensor, " n"] | None = None

    @classmethod
    def of(cls, pixels: Tensor, labels: Tensor, n_classes: SupportsIndex | None = None) -> "ImageSet":
        """Make a set of square images at their own size.

        Args:
            pixels: the images, uint8 `n c s s`, from 0 to 255.
            labels: their classes, integers `n` from 0, on the same device.
            n_classes: number of classes; None for one more than the greatest label, if each has an image.

        Raises:
            UserError: pixels or labels are something else, or do not fit together.
        """
        _check_pixels(pixels)
        _check_labels(labels, pixels)
        numbers = labels.long()
        classes = _count_classes(numbers, n_classes)
        return cls(pixels, numbers, torch.arange(len(numbers), device=numbers.device), classes, pixels.shape[-1])

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where batches are made; all tensors are there, except the pixels of a mapped set."""
        return self.labels.device

    @property
    def channels(self) -> int:
        """Number of colour channels."""
        return self.pixels.shape[1]

    @property
    def poisoned(self) -> Bool[Tensor, " n"]:
        """Mask of the poisoned images."""
        return self._touched & ~self.covers

    @property
    def covers(self) -> Bool[Tensor, " n"]:
        """Mask of the covers: images that carry a trigger but do not count as poison."""
        if self.stamped_row is None or self.stamped_is_cover is None or not len(self.stamped_is_cover):
            return torch.zeros_like(self.labels, dtype=torch.bool)
        return self._touched & self.stamped_is_cover[self.stamped_row.clamp(min=0)]

    @property
    def _touched(self) -> Bool[Tensor, " n"]:
        """Mask of all images that carry a trigger."""
        return torch.zeros_like(self.labels, dtype=torch.bool) if self.stamped_row is None else self.stamped_row >= 0

    def images(self, rows: Int64[Tensor, " b"], bare: bool = False, pixels: Gathered | None = None) -> Images:
        """The images of `rows` in [0, 1] at working size.

        The host does not wait for the device if `rows` are where the pixels are.

        Args:
            rows: row numbers, on any device.
            bare: whether to leave the triggers out.
            pixels: `self.gather(rows)`; None to gather them now.
        """
        # Clean pixels, scaled to [0, 1]; contiguous, since another memory format may round differently.
        sent = (self.gather(rows) if pixels is None else pixels).to(self.device, non_blocking=True)
        x = sent.contiguous() / 255
        if x.shape[-2:] != (self.size, self.size):
            x = functional.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True).clamp_(0, 1)
        if bare or self.stamped_row is None or self.stamped is None or not len(self.stamped):
            return x
        # Images with a trigger are taken from `stamped` instead.
        stamped_row = self.stamped_row[rows.to(self.device, non_blocking=True)]
        stamped = self.stamped.index_select(0, stamped_row.clamp(min=0)) / 255
        return torch.where((stamped_row >= 0)[:, None, None, None], stamped, x)

    def gather(self, rows: Int64[Tensor, " b"]) -> Gathered:
        """The clean pixels of `rows`; of a mapped set they are on the host, in memory from which a GPU copies directly.

        A mapped set is read with NumPy, by the calling thread alone: torch's threads are left to the model.
        """
        if self.pixel_row is None:
            return self.pixels.index_select(0, rows.to(self.device, non_blocking=True))
        stored = self.pixels.permute(0, 2, 3, 1).numpy()
        assert stored.flags.c_contiguous, "a mapped set's pixels are k h w c in the file; NumPy would copy them all"
        shape = (len(rows), *stored.shape[1:])
        found = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        wanted = self.pixel_row[rows.cpu()].numpy()
        _read_ahead(stored, wanted)
        stored.take(wanted, 0, found.numpy(), "clip")  # with "raise", NumPy would write to a buffer first
        return found.permute(0, 3, 1, 2)

    def batch(
        self,
        rows: Int64[Tensor, " b"],
        marks: "Marks | None" = None,
        bare: bool = False,
        pixels: Gathered | None = None,
    ) -> Batch:
        """The batch of `rows`: images, labels, and which of them are poisoned or covers.

        Args:
            rows: row numbers, on any device.
            marks: `self.marks()`; None to fetch them, which waits for the device.
            bare: whether to leave the triggers out.
            pixels: `self.gather(rows)`; None to gather them now.
        """
        # Positions are found on the host, so that their number is known without waiting for the device.
        known = marks or self.marks()
        here = rows.cpu()
        poisoned = known.poisoned[here]
        masks = (poisoned, ~poisoned, known.covers[here])
        positions = (mask.nonzero().squeeze(1).to(self.device, non_blocking=True) for mask in masks)
        there = rows.to(self.device, non_blocking=True)
        images = self.images(there, bare, self.gather(rows) if pixels is None else pixels)
        return Batch(images, self.labels[there], *positions)

    def marks(self) -> "Marks":
        """The masks of poison and covers on the CPU; fetched once, so that no batch waits for the device."""
        return Marks(self.poisoned.cpu(), self.covers.cpu())

    def row_batches(self, batch_size: int) -> Iterator[Int64[Tensor, " b"]]:
        """All row numbers in order, in batches."""
        return iter(torch.arange(len(self), device=self.device).split(batch_size))

    def take(self, rows: Int64[Tensor, " k"]) -> "ImageSet":
        """The subset of `rows`, in that order; no pixel of a mapped set is copied."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        return replace(
            self,
            pixels=self.pixels[rows] if self.pixel_row is None else self.pixels,
            labels=self.labels[rows],
            index=self.index[rows],
            stamped_row=pick(self.stamped_row),
            groups=pick(self.groups),
            pixel_row=None if self.pixel_row is None else self.pixel_row[rows.cpu()],
        )

    def stamp(
        self,
        rows: Int64[Tensor, " m"],
        stamped: UInt8[Tensor, "m c s s"],
        labels: Int64[Tensor, " m"],
        cover: bool = False,
    ) -> "ImageSet":
        """A copy of the set in which the images of `rows` are replaced by `stamped`, with `labels`.

        Args:
            rows: row numbers, without repeats.
            stamped: the images with their trigger, at working size.
            labels: their labels.
            cover: whether they are covers, which do not count as poison.

        Raises:
            ValueError: an image of `rows` carries a trigger already, which would be lost.
        """
        if self._touched[rows].any():
            raise ValueError("an image carries a trigger already; stamp each image once")
        stamped_row = torch.full_like(self.labels, -1) if self.stamped_row is None else self.stamped_row.clone()
        before = 0 if self.stamped is None else len(self.stamped)
        stamped_row[rows] = torch.arange(before, before + len(rows), device=self.device)
        relabelled = self.labels.clone()
        relabelled[rows] = labels
        is_cover = torch.full((len(rows),), cover, device=self.device)
        if self.stamped is not None:
            none = torch.zeros(before, dtype=torch.bool, device=self.device)
            earlier = none if self.stamped_is_cover is None else self.stamped_is_cover
            stamped = torch.cat([self.stamped, stamped])
            is_cover = torch.cat([earlier, is_cover])
        return replace(self, labels=relabelled, stamped_row=stamped_row, stamped=stamped, stamped_is_cover=is_cover)

    def unmarked(self) -> "ImageSet":
        """The set as a defender sees it: the same images at working size, without the masks of poison and covers.

        If the set is mapped, or takes more memory than the limit, the result is mapped from a temporary file.
        """
        if self.stamped_row is None:
            return self
        n = len(self)
        side = self.size
        mapped = self.pixel_row is not None or n * self.channels * side**2 > pixels_limit(self.device)
        if mapped:
            pixels = scratch(n, side, side, self.channels).permute(0, 3, 1, 2)
        else:
            pixels = torch.empty((n, self.channels, side, side), dtype=torch.uint8, device=self.device)
        for rows in self.row_batches(CHUNK):
            pixels[rows.to(pixels.device)] = to_bytes(self.images(rows)).to(pixels.device)
        pixel_row = torch.arange(n) if mapped else None
        return replace(self, pixels=pixels, stamped_row=None, stamped=None, stamped_is_cover=None, pixel_row=pixel_row)

    def to(self, device: torch.device | str) -> "ImageSet":
        """The set on another device; the pixels of a mapped set stay on the host."""
        stays = () if self.pixel_row is None else ("pixels", "pixel_row")
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor) and k not in stays}
        return replace(self, **moved)


@dataclass(frozen=True)
class Marks:
    """The masks of poisoned images and of covers of a set, on the CPU."""

    poisoned: Bool[Tensor, " n"]
    covers: Bool[Tensor, " n"]


def _check_pixels(pixels: Tensor) -> None:
    """Refuse what is no `uint8 n c s s`."""
    if not isinstance(pixels, Tensor):
        raise UserError(f"pixels are of type {type(pixels).__name__}, not torch.Tensor; give torch.as_tensor(pixels)")
    _check_dense("pixels", pixels)
    if pixels.dtype != torch.uint8:
        raise UserError(f"pixels are {pixels.dtype}, not torch.uint8; store them as 0 to 255 in 8 bits")
    if pixels.ndim != 4 or pixels.shape[2] != pixels.shape[3] or 0 in pixels.shape[1:]:
        last = pixels.ndim == 4 and pixels.shape[1] == pixels.shape[2]
        remedy = "put channels second: pixels.permute(0, 3, 1, 2)" if last else "crop or resize them to squares"
        raise UserError(f"pixels have shape {tuple(pixels.shape)}, not n c s s; {remedy}")


def _check_labels(labels: Tensor, pixels: Tensor) -> None:
    """Refuse what is no integer for each image."""
    if not isinstance(labels, Tensor):
        raise UserError(f"labels are of type {type(labels).__name__}, not torch.Tensor; give torch.as_tensor(labels)")
    _check_dense("labels", labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise UserError(f"labels are {labels.dtype}, not integers; give class numbers")
    if labels.shape != pixels.shape[:1]:
        raise UserError(f"labels have shape {tuple(labels.shape)} for {len(pixels)} images; give one number an image")
    if labels.device != pixels.device:
        raise UserError(f"labels are on {labels.device}, pixels on {pixels.device}; put both on one device")


def _count_classes(labels: Int64[Tensor, " n"], given: SupportsIndex | None) -> int:
    """The number of classes, as it is given or as the labels say.

    Raises:
        UserError: the labels are no class numbers, are beyond the given number, or do not say what it is.
    """
    if isinstance(given, bool) or not (given is None or isinstance(given, SupportsIndex)):
        raise UserError(f"n_classes = {given!r} is of type {type(given).__name__}; give a whole number")
    n_classes = None if given is None else operator.index(given)
    if n_classes is not None and n_classes < 1:
        raise UserError(f"n_classes = {n_classes} is out of range; give at least 1")
    if not len(labels):
        if n_classes is None:
            raise UserError("a set without images does not say how many classes there are; give n_classes")
        return n_classes
    low = int(labels.min())
    high = int(labels.max())
    if low < 0:
        raise UserError(f"labels hold {low}; number classes from 0")
    if n_classes is None:
        if (empty := _first_gap(labels)) is not None:
            raise UserError(f"labels reach {high}, but no image has {empty}; renumber them from 0, or give n_classes")
        return high + 1
    if high >= n_classes:
        raise UserError(f"labels hold {high}, with {n_classes} classes; number them from 0, or give a larger n_classes")
    return n_classes


def _check_dense(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that has no numbers, or not all of them, in memory."""
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "meta" if tensor.is_meta else "sparse"
        raise UserError(f"{name} are a {kind} tensor; give a dense one with numbers in it")


def _first_gap(numbers: Int64[Tensor, " n"]) -> int | None:
    """The least whole number below the maximum that is not among `numbers`, which are 0 or more."""
    found = numbers.unique()  # sorted
    gaps = found != torch.arange(len(found), device=found.device)
    return int(gaps.nonzero()[0]) if gaps.any() else None


def misshapen(images: Tensor, wanted: str) -> UserError:
    """The error for images whose shape is not the one that is `wanted`, "b x 3 x 32 x 32" say."""
    came = " x ".join(str(side) for side in images.shape)
    return UserError(f"images have shape {came}; expected {wanted}; resize them, or add a batch axis with images[None]")


def pixels_limit(device: torch.device) -> int:
    """The number of bytes that the pixels of a set may take on a device.

    Raises:
        UserError: `$VITRAP_MEMORY` is no amount of memory.
    """
    if device.type != "cuda":
        return memory_limit()
    return memory_limit(int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory))


def scratch(*shape: int) -> UInt8[Tensor, "..."]:
    """An 8-bit tensor that is mapped from a nameless temporary file in $TMPDIR; the file is gone with the tensor.

    Raises:
        OSError: the disk is full.
    """
    # The file's name is removed at the end of the block; the system keeps its content while it is mapped.
    with tempfile.NamedTemporaryFile() as file, named_errors(Path(file.name)):
        # Take the space now: if the disk is full this raises an error, where a later write would kill the process.
        if hasattr(os, "posix_fallocate") and prod(shape):
            os.posix_fallocate(file.fileno(), 0, prod(shape))
        return torch.from_file(file.name, shared=True, size=prod(shape), dtype=torch.uint8).view(shape)


def _read_ahead(stored: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
    """Tell the system to read these rows of a mapped array, and no others, from disk at once.

    Otherwise it reads megabytes around each page as it is first used, one after another, and training waits until most
    of the file has been read. This does nothing where the system takes no such advice.
    """
    if not hasattr(mmap, "MADV_WILLNEED"):
        return
    starts = stored.ctypes.data + rows * stored.strides[0]
    pages = starts - starts % mmap.PAGESIZE
    lengths = starts + stored.strides[0] - pages
    # PyDLL keeps Python's global lock: giving it up and taking it back for each row would slow the training thread.
    advise = ctypes.PyDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for page, length in zip(pages.tolist(), lengths.tolist(), strict=True):
        advise(page, length, mmap.MADV_WILLNEED)  # if this fails, reading is slower but correct
