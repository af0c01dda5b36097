"""Do attention gradients agree? `python docs/studies/agreement.py RUNS PRETRAINED`, a few minutes on one core.

RUNS holds what `vitrap sweep specs/studies/ageb_other_surrogate.toml --out RUNS` made, PRETRAINED what `vitrap run
specs/pretrained/ageb_gtsrb.toml --out PRETRAINED` did. On held-out images of GTSRB: how well masks and gradients of the
surrogate that poisons agree with those of other networks. Writes results/limits/agreement.json, from which docs/make.py
makes the table.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import vitrap
from vitrap.attacks.ageb import Ageb, Erosion
from vitrap.contracts import ImageSet
from vitrap.experiment.predict import batch_of, spread
from vitrap.experiment.run import run_folder
from vitrap.metrics.agreement import overlap, rank_correlation
from vitrap.sweeps.grid import load_sweep
from vitrap.tensors.patches import above_quantile, top_scores_like
from vitrap.tensors.pixels import hashed_noise

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "results" / "limits" / "agreement.json"
SWEEP = ROOT / "specs" / "studies" / "ageb_other_surrogate.toml"
PRETRAINED = ROOT / "specs" / "pretrained" / "ageb_gtsrb.toml"
IMAGES, SAME = 500, "the same"


def surrogates(runs: Path, pretrained: Path) -> Iterator[tuple[int, str, nn.Module]]:
    """Seed, name and network of everybody who could compute the trigger at test time."""
    for point in load_sweep(SWEEP).points:
        trigger = vitrap.open_run(run_folder(point.spec, runs)).trigger
        assert isinstance(trigger, Erosion)
        yield point.spec.seed, point.settings["title"], trigger.surrogate
    trigger = vitrap.open_run(run_folder(vitrap.load_spec(PRETRAINED), pretrained)).trigger
    assert isinstance(trigger, Erosion)
    yield 0, "pretrained, patches of 14 px of 98", trigger.surrogate


def gradients(network: nn.Module, settings: Ageb, images: ImageSet) -> Tensor:
    """The attention gradient of each image on the pixel grid of the small networks."""
    parts = [Erosion(network, settings).gradient(images.images(rows)) for rows in images.row_batches(batch_of(images))]
    return torch.cat(parts)


def held_out(size: int | None) -> ImageSet:
    """The same images for every network, at its own size."""
    spec = load_sweep(SWEEP).points[0].spec
    held = vitrap.open_data(spec.data.name, size, spec.data.limit, holdout=spec.data.holdout).choose
    return held.take(spread(torch.arange(len(held)), IMAGES))


def summary(values: Tensor) -> dict[str, float]:
    """Mean and standard deviation over images."""
    return {"mean": values.mean().item(), "sd": values.std().item(), "n": len(values)}


def main(runs: str, pretrained: str) -> None:
    """Hold every network against the one that poisons in the run of its seed, then write."""
    small = held_out(None)
    settings = load_sweep(SWEEP).points[0].spec.attack
    assert isinstance(settings, Ageb)
    found: dict[str, list[dict[str, Any]]] = {}
    poisoner: dict[int, Tensor] = {}

    def compare(name: str, seed: int, maps: Tensor, masks: Tensor) -> None:
        ours = poisoner[seed]
        measured = {
            "overlap": summary(overlap(above_quantile(ours, settings.tau), masks)),
            "rank correlation": summary(rank_correlation(ours, maps)),
        }
        found.setdefault(name, []).append({"seed": seed, **measured})

    pixels = small.images(torch.arange(len(small)))
    for seed, name, network in surrogates(Path(runs), Path(pretrained)):
        large = small if "pretrained" not in name else held_out(98)
        maps = functional.interpolate(gradients(network, settings, large)[:, None], small.size, mode="area")[:, 0]
        masks = above_quantile(maps, settings.tau)
        if name == SAME:
            poisoner[seed] = maps
            noise = hashed_noise(pixels)
            compare("pixels at random", seed, noise, top_scores_like(masks, noise))
        else:
            compare(name, seed, maps, masks)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        compare("surrogates of other runs", one, poisoner[other], above_quantile(poisoner[other], settings.tau))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
