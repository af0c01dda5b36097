"""A set mapped from a file: the same images as in memory, pixels on the host, and nothing read back from the device."""

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
    mapped = replace(resident, pixels=file.permute(0, 3, 1, 2), place=place)
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
    assert bare.place is not None
    assert (bare.slot, bare.stamped) == (None, None)
    everything = torch.arange(N)
    assert torch.equal(to_bytes(bare.images(everything)), to_bytes(mapped.images(everything)))
    same(resident.unmarked(), bare)


def test_on_another_device_the_pixels_stay_and_nothing_is_read_back() -> None:
    """The meta device has no content: whoever waited for a value of it would get an error."""
    _, mapped = pair(12)
    there = mapped.to("meta")
    assert there.pixels is mapped.pixels
    assert there.place is mapped.place
    assert {t.device.type for t in (there.labels, there.index, there.slot, there.stamped)} == {"meta"}
    rows = torch.tensor([3, 7, 2])
    batch = there.batch(rows, mapped.marks(), pixels=there.gather(rows))
    assert (batch.images.device.type, batch.images.shape) == ("meta", (3, 3, 12, 12))
    assert batch.poisoned.shape == (2,)
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
        replace(resident, place=torch.arange(N)).gather(torch.tensor([1]))


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
