"""A run: surrogate, implant, victim, clean twin, measures, record."""

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrap.contracts import Access, Implant, Trigger
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.experiment.measure import BATCH, measure_victim
from vitrap.experiment.pictures import draw_examples
from vitrap.experiment.record import SCHEMA, Record, environment, read_record
from vitrap.experiment.spec import Spec, parse_spec
from vitrap.experiment.stages import (
    Plan,
    Progress,
    carries,
    clean_model,
    plan_run,
    read_network,
    silent,
    train_victim,
)
from vitrap.experiment.store import Stage, Store, code_digest, place_file, write_bytes
from vitrap.experiment.streams import SURROGATE_SEED, stream
from vitrap.experiment.trigger_file import read_trigger, save_trigger
from vitrap.models.vit import read_vit

MEASURE_CODE = ("metrics", "experiment/measure.py", "experiment/record.py")


@dataclass(frozen=True)
class Finished:
    """What a run leaves behind: model and trigger, ready, and the record."""

    model: nn.Module
    trigger: Trigger
    record: Record


@dataclass
class Clock:
    """Seconds by name of what was timed."""

    seconds: dict[str, float]

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def run(
    spec: Spec, out: str | Path = "runs", *, device: str = "auto", force: bool = False, force_all: bool = False,
    progress: Progress = silent, model: nn.Module | None = None, world: World | None = None,
) -> Record:
    """Do what a spec says, or answer from the record of an equal run.

    Args:
        spec: what to run.
        out: folder of runs and stages.
        device: "auto", "cpu", "cuda" or "cuda:N".
        force: make victim and record anew.
        force_all: make every stage anew.
        progress: how to show what is under way.
        model: any network over images in [0, 1], in place of the spec's: victim and twin start from its weights.
        world: any data, in place of the spec's.

    Raises:
        UserError: something about the spec, the data or the folder is wrong; nothing has been written.
    """
    plan = plan_run(spec, device, model, world)
    store = Store(Path(out))
    folder = store.root / f"{spec.name}-{spec.hash()}"
    stages = stage_keys(plan)
    if not (force or force_all) and (found := _still_true(folder, stages)):
        return found
    store.check()
    folder.mkdir(exist_ok=True)
    clock = Clock({})
    implant, surrogate = fit(plan, store, progress, clock, force_all)
    victim = store.stage(plan.victim_stage(surrogate), partial(train_victim, plan, implant, progress),
                         force or force_all)
    twin, _ = clean_model(plan, store, plan.victim, spec.seed, "train the clean twin", progress, force_all)
    save_trigger(implant.trigger, spec.params, folder / "trigger.safetensors", vitrap=json.dumps(carries(spec)))
    place_file(victim / "model.safetensors", folder / "model.safetensors")
    record = _measure(plan, implant, (victim, twin), clock, progress, folder, stages)
    record.write(folder)
    return record


def fit(plan: Plan, store: Store, progress: Progress, clock: Clock, force: bool) -> tuple[Implant, str | None]:
    """The implant of the spec's attack, and the key of the surrogate that it looked at."""
    surrogate, key = None, None
    if plan.spec.params.needs_surrogate:
        network = plan.surrogate
        if network.checkpoint is not None:
            surrogate = network.build(0, plan.device).eval().requires_grad_(False)
            key = network.depends()["checkpoint"]
        else:
            place, key = clean_model(plan, store, network, SURROGATE_SEED, "train the surrogate", progress, force)
            surrogate = read_network(network, place / "model.safetensors", plan.device)
    with clock.time("fit"), progress(f"fit {plan.spec.attack}", None):
        access = Access(plan.world.train, surrogate, stream(plan.spec.seed, "attack"))
        return plan.spec.params.fit(access), key


def stage_keys(plan: Plan) -> dict[str, str]:
    """The keys of everything that the record rests on."""
    surrogate = None
    if plan.spec.params.needs_surrogate:
        network = plan.surrogate
        surrogate = (network.depends()["checkpoint"] if network.checkpoint is not None
                     else plan.clean_stage(network, SURROGATE_SEED).key)
    keys = {"surrogate": surrogate, "victim": plan.victim_stage(surrogate).key,
            "twin": plan.clean_stage(plan.victim, plan.spec.seed).key}
    return {**{k: v for k, v in keys.items() if v}, "measure": Stage("measure", {
        **keys, "code": code_digest(*MEASURE_CODE)}).key}


def open_run(folder: str | Path, *, model: nn.Module | None = None,
             networks: dict[str, nn.Module] | None = None) -> Finished:
    """Bring a finished run back: its model, its trigger and its record.

    Args:
        folder: the run's folder.
        model: where the victim was a network of your own, that network; it gets the victim's weights.
        networks: where the trigger holds networks of your own, those, by field name.

    Raises:
        UserError: the folder holds no finished run, or a file of it is damaged.
    """
    folder = Path(folder)
    record = read_record(folder)
    if model is not None:
        from safetensors.torch import load_model

        load_model(model, str(folder / "model.safetensors"))
    else:
        model = read_vit(folder / "model.safetensors")
    trigger = read_trigger(folder / "trigger.safetensors", parse_spec(record.spec).params, networks)
    return Finished(model.eval(), trigger, record)


def _still_true(folder: Path, stages: dict[str, str]) -> Record | None:
    """The record in `folder`, if there is one and all it rests on is as it was."""
    try:
        found = read_record(folder)
    except UserError:
        return None
    return found if found.stages == stages else None


def _measure(plan: Plan, implant: Implant, places: tuple[Path, Path], clock: Clock, progress: Progress,
             folder: Path, stages: dict[str, str]) -> Record:
    spec, test = plan.spec, plan.world.test
    victim, twin = (read_network(plan.victim, place / "model.safetensors", plan.device) for place in places)
    batches = -(-len(test) // BATCH)
    with clock.time("measure"), progress("measure", 5 * batches) as tick:
        measures = measure_victim(victim, twin, test, implant, plan.precision, tick)
    with clock.time("pictures"):
        write_bytes(folder / "pictures.png", draw_examples(test, implant, victim))
    facts = [json.loads((place / "facts.json").read_text(encoding="utf-8")) for place in places]
    seconds: dict[str, Any] = {**facts[0]["seconds"], "twin": facts[1]["seconds"], **clock.seconds}
    return Record(
        schema=SCHEMA, name=spec.name, spec=spec.table(), hash=spec.hash(), seed=spec.seed,
        environment=environment(plan.device),
        data={"n_train": len(plan.world.train), "n_test": len(test), "n_poisoned": facts[0]["n_poisoned"],
              "classes": plan.world.train.n_classes, "fingerprint": plan.world.fingerprint},
        victim=measures, attack=dict(implant.report),
        curves={"victim": facts[0]["curves"], "twin": facts[1]["curves"]},
        precision=plan.precision, memory=_memory(plan.device), seconds=seconds, stages=stages,
    )


def _memory(device: torch.device) -> dict[str, int | None]:
    kilo = 1 if sys.platform == "darwin" else 1024
    return {"host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo,
            "device_peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None}
