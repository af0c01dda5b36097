"""What limits AGEB on a pretrained network: `python docs/studies/pretrained.py RUNS`, ten minutes on one core.

RUNS holds what `vitrap sweep specs/studies/pretrained_strength.toml --out RUNS` made. On its hold-out: how well the
masks of two surrogates agree, and which part of the trigger the victim has learned. Writes
results/limits/pretrained.json, from which docs/make.py makes the tables.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitrap
from vitrap.attacks.ageb import Ageb, Erosion
from vitrap.contracts import ImageSet
from vitrap.experiment.opened_run import OpenedRun
from vitrap.experiment.predict import batch_of, predict, spread, triggered
from vitrap.experiment.run import run_folder
from vitrap.metrics.accuracy import attack_success
from vitrap.metrics.agreement import overlap, rank_correlation
from vitrap.models.classifier import read_model
from vitrap.sweeps.grid import load_sweep
from vitrap.train.arithmetic import default_arithmetic

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "results" / "limits" / "pretrained.json"
SWEEP = ROOT / "specs" / "studies" / "pretrained_strength.toml"
WHOLE, PROBE = "element 5 px, α 0.4, c 12", "surrogate: linear probe"
"""Titles of the runs that are looked at."""
IMAGES = 500


def opened(runs: Path, title: str) -> OpenedRun:
    """The finished run of a case."""
    (point,) = (point for point in load_sweep(SWEEP).points if point.settings["title"] == title)
    return vitrap.open_run(run_folder(point.spec, runs))


def surrogates(runs: Path) -> tuple[OpenedRun, dict[str, nn.Module]]:
    """The run whose backdoor is looked at, and networks that its trigger could be computed with."""
    whole, probe = opened(runs, WHOLE), opened(runs, PROBE)
    assert isinstance(whole.trigger, Erosion)
    assert isinstance(probe.trigger, Erosion)
    twin = read_model(runs / "stages" / f"clean-{whole.record.stages['twin']}" / "model.safetensors")
    networks = {
        "the surrogate, fine-tuned": whole.trigger.surrogate,
        "fine-tuned with another seed": twin.eval().requires_grad_(False),
        "linear probe": probe.trigger.surrogate,
        "the victim itself": whole.model.requires_grad_(False),
    }
    return whole, networks


def maps_of(network: nn.Module, settings: Ageb, images: ImageSet) -> tuple[Tensor, Tensor]:
    """Masks and gradients of images, on the pixel grid."""
    trigger = Erosion(network, settings)
    parts = [images.images(rows) for rows in images.row_batches(batch_of(images))]
    return torch.cat([trigger.mask(some) for some in parts]), torch.cat([trigger.gradient(some) for some in parts])


def coarse(maps: Tensor) -> Tensor:
    """Maps on the grid of tokens that they are up-sampled from."""
    return nn.functional.adaptive_avg_pool2d(maps, 7)


def agreement(networks: Mapping[str, nn.Module], settings: Ageb, images: ImageSet) -> dict[str, Any]:
    """How the surrogate's masks and gradients agree with those of every other network, and with pixels at random."""
    (first, network), *others = networks.items()
    masks, gradients = maps_of(network, settings, images)
    by_chance = maps_of(network, replace(settings, select="random"), images)[0]
    found = {"pixels at random": {"overlap": summary(overlap(masks, by_chance)), "rank correlation": None}}
    for name, other in others:
        their_masks, their_gradients = maps_of(other, settings, images)
        found[name] = {
            "overlap": summary(overlap(masks, their_masks)),
            "rank correlation": summary(rank_correlation(coarse(gradients), coarse(their_gradients))),
        }
    return {"between": first, "and": found}


def summary(values: Tensor) -> dict[str, float]:
    """Mean and standard deviation over images."""
    return {"mean": values.mean().item(), "sd": values.std().item(), "n": len(values)}


def parts(whole: OpenedRun, networks: Mapping[str, nn.Module], images: ImageSet) -> dict[str, Any]:
    """ASR of the victim, and of its twin, where only a part of the trigger fires, or another surrogate's."""
    assert isinstance(whole.trigger, Erosion)
    settings = whole.trigger.settings
    surrogate, twin, probe, _ = networks.values()
    triggers = {
        "as in training": whole.trigger,
        "without the signal": Erosion(surrogate, replace(settings, signal=0.0)),
        "the signal alone": Erosion(surrogate, replace(settings, alpha=1.0)),
        "pixels at random": Erosion(surrogate, replace(settings, select="random")),
        "all pixels": Erosion(surrogate, replace(settings, tau=0.0)),
        "by a surrogate of another seed": Erosion(twin, settings),
        "by a linear probe": Erosion(probe, settings),
    }
    goal, arithmetic = settings.goal_for(images.n_classes), default_arithmetic("bf16", images.device)
    found: dict[str, Any] = {}
    for name, trigger in triggers.items():
        fired = triggered(images, trigger)
        found[name] = {
            role: asdict(attack_success(predict(model, fired, arithmetic), images.labels, goal))
            for role, model in (("victim", whole.model), ("twin", twin))
        }
    return found


def main(runs: str) -> None:
    """Measure, then write."""
    whole, networks = surrogates(Path(runs))
    assert isinstance(whole.trigger, Erosion)
    data = whole.record.spec["data"]
    held = vitrap.open_data(data["name"], data["size"], data["limit"], holdout=data["holdout"]).choose
    some = held.take(spread(torch.arange(len(held)), IMAGES))
    found = {
        "agreement": agreement(networks, whole.trigger.settings, some),
        "parts": parts(whole, networks, held),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
