"""How a pretrained network is fine-tuned best: `python docs/studies/fine_tuning.py`, twenty minutes on one core.

The recipe of specs/pretrained/ageb_cifar10.toml on 2,000 clean images, changed in one thing at a time, and measured on
the hold-out: clean accuracy after the last step, of the weights as they are and of their moving average. Writes
results/choice/fine_tuning.json, from which docs/make.py makes the table.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import vitrap
from vitrap.experiment.network import network_of
from vitrap.experiment.predict import predict
from vitrap.experiment.streams import ambient, training_streams
from vitrap.metrics.accuracy import clean_accuracy
from vitrap.train.arithmetic import default_arithmetic
from vitrap.train.loop import train

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "specs" / "pretrained" / "ageb_cifar10.toml"
RESULT = ROOT / "results" / "choice" / "fine_tuning.json"
CHANGES = {
    "as it is": (),
    "head's rate ten times as high": ("recipe.head_lr=5e-3",),
    "drop path 0.1": ("model.drop_path_rate=0.1",),
    "one rate for all layers": ("recipe.layer_decay=1.0",),
    "layer decay 0.75": ("recipe.layer_decay=0.75",),
    "layer decay 0.5": ("recipe.layer_decay=0.5",),
    "one rate for all layers, 1e-4": ("recipe.layer_decay=1.0", "recipe.lr=1e-4"),
}
DECAY = 0.98
"""Of the moving average, over some fifty of 120 steps."""


def measured(*changes: str) -> dict[str, Any]:
    """CDA on the hold-out of the weights as they are, and of their moving average."""
    spec = vitrap.load_spec(SPEC, ["data.limit=2000", *changes])
    world = vitrap.open_data(spec.data.name, spec.data.size, spec.data.limit, holdout=spec.data.holdout)
    model = network_of(spec.model, world).build(spec.seed)
    arithmetic = default_arithmetic(spec.recipe.precision, torch.device("cpu"))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    with ambient(spec.seed, "dropout"):
        streams = training_streams(spec.seed, torch.device("cpu"))
        train(
            model,
            world.train,
            spec.recipe,
            streams,
            tick=lambda: average.update_parameters(model),
            arithmetic=arithmetic,
        )
    held = world.choose
    return {
        name: asdict(clean_accuracy(predict(each.eval(), held, arithmetic), held.labels))
        for name, each in (("weights", model), ("average", average.module))
    }


def main() -> None:
    """Measure every change, writing after each."""
    found = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    for name, changes in CHANGES.items():
        if name not in found:
            found[name] = measured(*changes)
            RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
