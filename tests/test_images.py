"""A set mapped from a file: the same images as in memory, pixels on the host, and nothing read back from the device.

And what `ImageSet.of` makes of pixels and labels.
"""

import ctypes
import mmap
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.waiting import wait_until
from vitrap import images
from vitrap.errors import UserError
from vitrap.images import ImageSet, scratch
from vitrap.tensors.pixels import to_bytes

N, CLASSES = 12, 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(n: int, side: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (n, 3, side, side), generator=generator(seed), dtype=torch.uint8)


def pair(size: int = 8, poisoned: bool = True) -> tuple[ImageSet, ImageSet]:
    """A set in memory and the same one mapped, as every second image of a file, last first."""
    pixels = drawn(N, 8)
    labels, index = torch.arange(N) % CLASSES, torch.arange(N)
    resident = ImageSet(pixels, labels, index, CLASSES, size, groups=index // 2)
    file, place = scratch(2 * N, 8, 8, 3), torch.arange(2 * N - 1, 0, -2)
    file[place] = pixels.permute(0, 2, 3, 1)
    mapped = replace(resident, pixels=file.permute(0, 3, 1, 2), pixel_row=place)
    if not poisoned:
        return resident, mapped
    rows, stamped, wanted = torch.tensor([7, 2]), drawn(2, size, seed=1), torch.tensor([0, 0])
    return resident.stamp(rows, stamped, wanted), mapped.stamp(rows, stamped, wanted)


def same(one: ImageSet, other: ImageSet) -> None:
    rows = torch.randperm(len(one), generator=generator())
    assert torch.equal(one.gather(rows), other.gather(rows))
    for bare in (False, True):
        assert torch.equal(one.images(rows, bare), other.images(rows, bare))
        a, b = one.batch(rows, bare=bare), other.batch(rows, bare=bare, pixels=other.gather(rows))
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))
    assert other.images(rows).is_contiguous(), "another memory format may round otherwise"
    for name in ("labels", "index", "groups"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("size", [8, 12, 5])
@pytest.mark.parametrize("poisoned", [False, True])
def test_a_mapped_set_has_the_same_images(size: int, poisoned: bool) -> None:
    resident, mapped = pair(size, poisoned)
    same(resident, mapped)
    assert torch.equal(resident.poisoned, mapped.poisoned)


def test_a_part_of_a_mapped_set_shares_its_pixels() -> None:
    resident, mapped = pair(12)
    rows = torch.tensor([9, 2, 7, 0])
    part = mapped.take(rows)
    same(resident.take(rows), part)
    same(resident.take(rows).take(torch.tensor([1, 3])), part.take(torch.tensor([1, 3])))
    assert part.pixels is mapped.pixels


def test_a_mapped_set_without_its_mask_is_mapped() -> None:
    resident, mapped = pair(12)
    bare = mapped.unmarked()
    assert bare.pixel_row is not None
    assert (bare.stamped_row, bare.stamped) == (None, None)
    everything = torch.arange(N)
    assert torch.equal(to_bytes(bare.images(everything)), to_bytes(mapped.images(everything)))
    same(resident.unmarked(), bare)


def test_on_another_device_the_pixels_stay_and_nothing_is_read_back() -> None:
    """The meta device has no content: whoever waited for a value of it would get an error."""
    _, mapped = pair(12)
    there = mapped.to("meta")
    assert there.pixels is mapped.pixels
    assert there.pixel_row is mapped.pixel_row
    assert {t.device.type for t in (there.labels, there.index, there.stamped_row, there.stamped)} == {"meta"}
    rows = torch.tensor([3, 7, 2])
    batch = there.batch(rows, mapped.marks(), pixels=there.gather(rows))
    assert (batch.images.device.type, batch.images.shape) == ("meta", (3, 3, 12, 12))
    assert batch.poison_at.shape == (2,)
    assert there.images(rows, bare=True).device.type == "meta"
    assert there.take(rows).images(torch.tensor([0])).device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_batches_are_made_of_host_pixels_without_waiting() -> None:
    resident, mapped = pair(12)
    here, there = resident.to("cuda"), mapped.to("cuda")
    rows = torch.tensor([3, 7, 2])
    known, pixels = mapped.marks(), there.gather(rows)
    assert pixels.is_pinned()
    assert torch.cuda.memory_allocated() < there.pixels.numel() * 100
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = there.batch(rows, known, pixels=pixels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.images, here.images(rows))
    assert torch.equal(there.images(rows.cuda()), here.images(rows.cuda()))


def test_pixels_in_another_order_are_refused_rather_than_copied_whole() -> None:
    resident, _ = pair(poisoned=False)
    with pytest.raises(AssertionError, match="k h w c in the file"):
        replace(resident, pixel_row=torch.arange(N)).gather(torch.tensor([1]))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs a way to empty the page cache")
def test_asked_for_rows_are_read_into_memory_and_no_others(tmp_path: Path) -> None:
    """Rows that begin and end within pages, as those of an npy file do; the page cache says what it holds."""
    page, start, rows, n = mmap.PAGESIZE, 128, np.array([5, 90, 40]), 100
    length = 5 * page // 2
    path = tmp_path / "pixels"
    path.write_bytes(bytes(start + length * n))
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = mmap.mmap(file.fileno(), 0)
    stored = np.frombuffer(mapped, np.uint8, offset=start).reshape(n, length, 1, 1)
    file_at = stored.ctypes.data - start

    def held() -> set[int]:
        state = (ctypes.c_ubyte * (len(mapped) // page))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(file_at), ctypes.c_size_t(page * len(state)), state) == 0
        return set(np.flatnonzero(np.array(state) & 1).tolist())

    if held():
        pytest.skip("the file system keeps its pages")
    bounds = [(start + row * length, start + (row + 1) * length - 1) for row in rows.tolist()]
    wanted = {number for first, last in bounds for number in range(first // page, last // page + 1)}
    images._read_ahead(stored, rows)
    wait_until(lambda: wanted <= held())  # the disk answers when it can
    assert held() == wanted


def test_on_a_gpu_a_set_may_take_a_quarter_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.delenv("VITRAP_MEMORY", raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (images.pixels_limit(cpu), images.pixels_limit(gpu)) == (4 * 2**30, 20 * 2**30)
    monkeypatch.setenv("VITRAP_MEMORY", "1GB")
    assert (images.pixels_limit(cpu), images.pixels_limit(gpu)) == (10**9, 10**9)


def square(n: int = 6) -> Tensor:
    return drawn(n, 4)


NUMBERED = torch.arange(6) % 3
ODD = {
    "floats": (square() / 255, NUMBERED, None, "pixels are torch.float32, not torch.uint8"),
    "wide integers": (square().int(), NUMBERED, None, "pixels are torch.int32"),
    "channels last": (
        square().permute(0, 2, 3, 1),
        NUMBERED,
        None,
        r"\(6, 4, 4, 3\), not n c s s; put channels second",
    ),
    "oblong": (square()[..., :2], NUMBERED, None, r"\(6, 3, 4, 2\), not n c s s; crop or resize"),
    "one image": (square()[0], NUMBERED[:1], None, "not n c s s"),
    "no channel": (square()[:, :0], NUMBERED, None, "not n c s s"),
    "no pixel": (square()[..., :0, :0], NUMBERED, None, "not n c s s"),
    "float labels": (square(), NUMBERED.float(), None, "labels are torch.float32, not integers"),
    "masks as labels": (square(), NUMBERED.bool(), None, "labels are torch.bool"),
    "one-hot labels": (square(), torch.eye(3).long()[NUMBERED], None, r"labels have shape \(6, 3\) for 6 images"),
    "few labels": (square(), NUMBERED[:5], None, r"labels have shape \(5,\) for 6 images"),
    "one label": (square(1), torch.tensor(0), None, r"labels have shape \(\) for 1 images"),
    "without numbers": (square().to("meta"), NUMBERED, None, "pixels are a meta tensor; give a dense one"),
    "labels without numbers": (square(), NUMBERED.to("meta"), None, "labels are a meta tensor"),
    "sparse": (square().to_sparse(), NUMBERED, None, "pixels are a sparse tensor"),
    "sparse labels": (square(), NUMBERED.to_sparse(), None, "labels are a sparse tensor"),
    "from 1": (square(), NUMBERED + 1, None, "labels reach 3, but no image has 0; renumber them"),
    "a gap": (square(), 2 * NUMBERED, None, "labels reach 4, but no image has 1; .* or give n_classes"),
    "a marker": (square(), torch.tensor([0, 1, 2, 3, 4, 255]), None, "labels reach 255, but no image has 5"),
    "a great marker": (square(), torch.tensor([0, 1, 2, 3, 4, 10**6]), None, "labels reach 1000000, but"),
    "a boolean": (square(), NUMBERED, True, "n_classes = True is of type bool"),
    "below 0": (square(), NUMBERED - 1, None, "labels hold -1; number classes from 0"),
    "below 0, narrow": (square(), (NUMBERED - 1).to(torch.int8), 3, "labels hold -1"),
    "beyond the classes": (square(), NUMBERED, 2, "labels hold 2, with 2 classes"),
    "no class": (square(), NUMBERED, 0, "n_classes = 0 is out of range"),
    "nothing": (square(0), NUMBERED[:0], None, "give n_classes"),
}


@pytest.mark.parametrize("name", ODD)
def test_pixels_and_labels_that_do_not_fit_are_refused_in_a_line(name: str) -> None:
    pixels, labels, n_classes, message = ODD[name]
    with pytest.raises(UserError, match=message) as caught:
        ImageSet.of(pixels, labels, n_classes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize("channels", [1, 3])
def test_labels_of_any_integers_and_images_of_any_channels_make_a_set(kind: torch.dtype, channels: int) -> None:
    found = ImageSet.of(square()[:, :channels], NUMBERED.to(kind))
    assert found.labels.dtype == torch.int64
    assert (found.n_classes, found.size, len(found)) == (3, 4, 6)
    assert len(ImageSet.of(square(0), NUMBERED[:0], 3)) == 0
    assert ImageSet.of(square(), 2 * NUMBERED, np.int64(5)).n_classes == 5
