"""Training in each arithmetic over plain PyTorch (fp32, fused attention), and which of them `vitrap tune` would choose.

The plain loop is `benchmarks.training`'s. Compiled training is timed without its compilation, which the note has.
"""

import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.compare import Figure, Scale, in_turns
from benchmarks.subjects import CLASSES, SIZE, image_set, network
from benchmarks.training import Bare, streams
from vitrap.experiment.tune import PLAIN, fastest, name_of, time_ways
from vitrap.train.arithmetic import Arithmetic
from vitrap.train.loop import train
from vitrap.train.recipe import Recipe

BATCH = 64
LONG = 10_000
"""Steps of a training, for the choice."""
NETWORKS = {
    "dim 64, depth 3, patch 8": {"patch_size": 8, "depth": 3, "embed_dim": 64, "num_heads": 4},
    "dim 96, depth 4, patch 8": {"patch_size": 8, "depth": 4, "embed_dim": 96, "num_heads": 3},
    "dim 96, depth 4, patch 4": {"patch_size": 4, "depth": 4, "embed_dim": 96, "num_heads": 3},
    "dim 192, depth 6, patch 4": {"patch_size": 4, "depth": 6, "embed_dim": 192, "num_heads": 3},
}
ALSO_COMPILED = "dim 96, depth 4, patch 8"


def figures(scale: Scale) -> Iterator[Figure]:
    """Every arithmetic for every network; compilation, which takes half a minute, for one."""
    for name, settings in NETWORKS.items():
        sized = replace(scale, network=tuple(settings.items()), batch=BATCH)
        device = torch.device(scale.device)
        chosen = fastest(time_ways(network(sized), (3, SIZE, CLASSES), BATCH, device), LONG)
        best = replace(chosen, compiled=True)
        for way in (*PLAIN, *((best,) if name == ALSO_COMPILED else ())):
            yield figure(name, way, sized, "; what vitrap tune chooses" if way == chosen else "")


def figure(name: str, way: Arithmetic, scale: Scale, note: str) -> Figure:
    """One network in one arithmetic."""
    data, recipe = image_set(scale.steps * scale.batch, scale.device), Recipe(epochs=1, batch_size=scale.batch)
    mine, bare = network(scale), Bare(network(scale), replace(recipe, precision="fp32"))
    my_streams, other_streams = streams(scale.device), streams(scale.device)

    def ours() -> None:
        train(mine, data, recipe, my_streams, arithmetic=way)

    def plain() -> None:
        bare.train(data.pixels, data.labels, other_streams.order, other_streams.augmentation)

    start = time.perf_counter()
    ours()
    if way.compiled:
        note += f"; compiled in {time.perf_counter() - start:.0f} s"
    times = in_turns(ours, plain, scale)
    return Figure(
        "arithmetic", f"{name}: {name_of(way)}", *times, speed=True, note=f"{scale.steps} steps of {BATCH}{note}"
    )
