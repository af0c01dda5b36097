"""Time to first result: `vitrap run` without a spec, in a fresh folder, over the three trainings alone.

Ours is the whole command in a process of its own: start-up, data, surrogate, victim and clean twin, poison, measures,
pictures, record. Plain is the three trainings alone, by the bare loop, in a process that is up already.
"""

import subprocess
import sys
from collections.abc import Iterator
from tempfile import TemporaryDirectory

from benchmarks.compare import Figure, Scale, alternate
from benchmarks.training import Bare, streams
from vitrap.experiment.plan import Plan, make_plan
from vitrap.experiment.spec import load_spec
from vitrap.models.classifier import Classifier

TRAININGS = 3  # surrogate, victim, clean twin
WITHIN = 90.0  # seconds, on two cores


def figures(scale: Scale) -> Iterator[Figure]:
    """The embedded default with the scale's overrides."""
    plan = make_plan(load_spec(None, scale.run), "cpu")
    times = alternate(lambda: first_result(scale.run), lambda: trainings(plan), scale.runs)
    note = " ".join(["vitrap run", *scale.run])
    yield Figure("first_result", "embedded default over its three trainings", *times, within=WITHIN, note=note)


def first_result(overrides: tuple[str, ...]) -> None:
    """A run from nothing."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "vitrap.cli.main", "run", *overrides, "--out", folder, "--device", "cpu"]
        subprocess.run(command, check=True, capture_output=True)


def trainings(plan: Plan) -> None:
    """The three trainings of a run, all on the clean images."""
    data = plan.world.train
    for seed in range(TRAININGS):
        model, chances = plan.victim.build(seed), streams("cpu")
        assert isinstance(model, Classifier)
        Bare(model, plan.spec.recipe).train(data.pixels, data.labels, chances.order, chances.augmentation)
