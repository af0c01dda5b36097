"""Peak host memory of a whole run on a set of CIFAR-10's shape at 224 px, over the pixels that the run must hold.

The run is a command in a process of its own, on the CPU, with a network so small that the images decide. It must hold
the clean images at 32 px, and at 224 px the poisoned training images and every test image with the trigger.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.compare import Figure, Scale

NATIVE, SIZE, CLASSES = 32, 224, 10
TRAIN = 5  # times the scale's images, which are the test set
WITHIN = 8e9  # bytes
RUNS = 1  # of minutes each, and peaks hardly differ
RUN = (
    "attack.name=badnets", f"data.size={SIZE}", "model.name=vit_tiny_patch16_224", "model.patch_size=56",
    "model.depth=1", "model.embed_dim=32", "model.num_heads=2", "recipe.epochs=1", "recipe.batch_size=256",
    "recipe.precision=fp32",
)  # fmt: skip


def figures(scale: Scale) -> Iterator[Figure]:
    """The peak that the record states."""
    with TemporaryDirectory() as own:
        write_set(Path(own, "set"), scale.images)
        words = [*RUN, f"data.name=npy:{own}/set", *scale.run]
        peaks, held = zip(*(peak(words, Path(own, f"runs{turn}")) for turn in range(RUNS)), strict=True)
    note = f"vitrap run, {TRAIN * scale.images} + {scale.images} images of {NATIVE} px at {SIZE} px; " + " ".join(RUN)
    yield Figure("memory", "peak of a run over its pixels", peaks, held, within=WITHIN, unit="bytes", note=note)


def write_set(folder: Path, n: int) -> None:
    """Random images in the cache format."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for part, count in (("train", TRAIN * n), ("test", n)):
        pixels = generator.integers(0, 256, (count, NATIVE, NATIVE, 3), dtype=np.uint8)
        np.save(folder / f"{part}_images.npy", pixels, allow_pickle=False)
        np.save(folder / f"{part}_labels.npy", np.arange(count) % CLASSES, allow_pickle=False)


def peak(words: list[str], out: Path) -> tuple[float, float]:
    """Bytes of host memory that a run took at most, and of the pixels that it must hold."""
    command = [sys.executable, "-m", "vitrap.cli.main", "run", *words, "--out", str(out), "--device", "cpu"]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = out.glob("*/record.json")
    record = json.loads(path.read_text("utf-8"))
    data, native, working = record["data"], 3 * NATIVE**2, 3 * SIZE**2
    clean, stamped = data["n_train"] + data["n_test"], data["n_poisoned"] + data["n_test"]
    return float(record["memory"]["host_peak_bytes"]), float(clean * native + stamped * working)
