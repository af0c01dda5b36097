"""Making the stages of a run: a clean model (surrogate or twin) and a victim, each a folder with weights and facts."""

import json
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from vitrap.contracts import Access, Goal, ImageSet, Implant, Objective
from vitrap.experiment.measure import every_row, predict, spread, triggered
from vitrap.experiment.plan import Network, Plan, training_steps
from vitrap.experiment.progress import Steps, Tick
from vitrap.experiment.spec import Spec
from vitrap.experiment.store import write_json
from vitrap.experiment.streams import ambient, stream, training_streams
from vitrap.experiment.trigger_file import save_trigger
from vitrap.metrics.accuracy import attack_success, clean_accuracy
from vitrap.models.vit import ViT, save_vit
from vitrap.train.arithmetic import Arithmetic
from vitrap.train.loop import train

WATCHED = 500
"""Curves count at most so many held-out images, spread evenly."""


def make_clean(plan: Plan, network: Network, seed: int, show: AbstractContextManager[Tick], folder: Path) -> None:
    """Train a network on the clean training set into `folder`."""
    start = time.perf_counter()
    model = network.build(seed, plan.device)
    curves = _train(plan, model, plan.world.train, seed, None, show, _watch(plan))
    _keep(model, folder, {"curves": curves, "seconds": {"train": time.perf_counter() - start}}, {"role": "clean"})


def make_retrained(plan: Plan, kept: ImageSet, show: AbstractContextManager[Tick], folder: Path) -> None:
    """Train the victim's network on what a filter kept, with cross-entropy, as the defender would."""
    start = time.perf_counter()
    model = plan.victim.build(plan.spec.seed, plan.device)
    curves = _train(plan, model, kept, plan.spec.seed, None, show)
    facts = {
        "curves": curves,
        "seconds": {"train": time.perf_counter() - start},
        "n_poisoned": int(kept.poisoned.sum()),
    }
    _keep(model, folder, facts, carries(plan.spec, "retrained"))


def make_trigger(plan: Plan, access: Access, show: AbstractContextManager[Tick], folder: Path) -> None:
    """Optimise the attack's trigger into `folder`, with what `fit` says of it."""
    spec, start = plan.spec, time.perf_counter()
    with show:
        implant = spec.params.fit(access)
    carried = json.dumps(carries(spec, "trigger"))
    save_trigger(implant.trigger, spec.params, folder / "trigger.safetensors", vitrap=carried)
    write_json(folder / "facts.json", {"report": dict(implant.report), "seconds": time.perf_counter() - start})


def make_victim(plan: Plan, implant: Implant, steps: Steps, folder: Path) -> None:
    """Poison the training set, train on it, edit the result, all into `folder`."""
    spec, start = plan.spec, time.perf_counter()
    with steps("poison the training set", None):
        poisoned = implant.poison(plan.world.train, stream(spec.seed, "poison"))
    middle = time.perf_counter()
    model = plan.victim.build(spec.seed, plan.device)
    show = steps("train the victim", training_steps(spec, len(plan.world.train)))
    watch = _watch(plan, implant)
    curves = _train(plan, model, poisoned, spec.seed, implant.objective, show, watch)
    if implant.edit is not None:
        model = implant.edit(model)
    seconds = {"poison": middle - start, "train": time.perf_counter() - middle}
    counted = {"n_poisoned": int(poisoned.poisoned.sum()), "n_curves": watch.counts()}
    _keep(model, folder, {"curves": curves, "seconds": seconds, **counted}, carries(spec, "victim"))


def carries(spec: Spec, role: Literal["victim", "trigger", "retrained", "poisoned set"]) -> dict[str, Any]:
    """What the metadata of every file that belongs to a backdoor, or may, say of it; no defence is part of that."""
    return {
        "role": role,
        "backdoor": True,
        "attack": spec.attack,
        "warning": f"{role} of a backdoor ({spec.attack}), implanted for research; not to be deployed",
        "spec": {k: v for k, v in spec.table().items() if k not in ("name", "defences")},
    }


@dataclass(frozen=True)
class Watch:
    """CDA and, of a victim, ASR on held-out images after each epoch, for the curves: nothing is chosen by them."""

    held: ImageSet
    arithmetic: Arithmetic
    goal: Goal | None = None
    fired: ImageSet | None = None

    def counts(self) -> dict[str, int]:
        """How many images each curve counts; one that would count none is left out."""
        counting = int(self.goal.counts(self.held.labels).sum()) if self.goal else 0
        return {name: n for name, n in {"cda": len(self.held), "asr": counting}.items() if n}

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Each curve's next value."""
        found, true = {}, self.held.labels
        if len(true):
            found["cda"] = clean_accuracy(predict(model, self.held, self.arithmetic), true).value
        if self.goal and self.fired and "asr" in self.counts():
            found["asr"] = attack_success(predict(model, self.fired, self.arithmetic), true, self.goal).value
        return found


def _watch(plan: Plan, implant: Implant | None = None) -> Watch:
    held = plan.world.choose
    held = held.take(spread(every_row(held), WATCHED))
    if implant is None or not len(held):
        return Watch(held, plan.arithmetic)
    return Watch(held, plan.arithmetic, implant.goal, triggered(held, implant.trigger))


def _train(  # noqa: PLR0913 - as `train`
    plan: Plan,
    model: nn.Module,
    data: ImageSet,
    seed: int,
    objective: Objective | None,
    show: AbstractContextManager[Tick],
    watch: Watch | None = None,
) -> dict[str, list[float]]:
    with show as tick, ambient(seed, "dropout", plan.device):
        streams = training_streams(seed, plan.device)
        return train(model, data, plan.spec.recipe, streams, objective, tick, watch, plan.arithmetic)


def _keep(model: nn.Module, folder: Path, facts: dict[str, Any], carried: dict[str, Any]) -> None:
    write_json(folder / "facts.json", facts)
    metadata = {"vitrap": json.dumps(carried)}
    if isinstance(model, ViT):
        save_vit(model, folder / "model.safetensors", **metadata)
        return
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    save_file({k: v for k, v in weights.items() if isinstance(v, torch.Tensor)}, folder / "model.safetensors", metadata)
