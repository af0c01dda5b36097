"""A run: surrogate, implant, victim, clean twin, measures, record."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from torch import nn

from vitrap.contracts import Access, Implant, Trigger
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.experiment.defend import Finished, add_defences, still_holding, unmeasured
from vitrap.experiment.export import check_folder, write_poisoned
from vitrap.experiment.machine import environment, forget_peaks, memory
from vitrap.experiment.measure import BATCH, examine, measure_victim, timed
from vitrap.experiment.pictures import draw_examples
from vitrap.experiment.plan import Network, Plan, make_plan, training_steps
from vitrap.experiment.progress import Steps, silent
from vitrap.experiment.record import SCHEMA, Record, Table, read_record
from vitrap.experiment.records import FAILURE
from vitrap.experiment.spec import Spec, parse_spec
from vitrap.experiment.stages import carries, make_clean, make_trigger, make_victim
from vitrap.experiment.store import Store, locked, place_file, write_bytes
from vitrap.experiment.streams import SURROGATE_SEED, stream
from vitrap.experiment.trigger_file import read_trigger, save_trigger
from vitrap.models.vit import load_weights, read_vit

Redo = Literal["nothing", "victim", "all"]


@dataclass(frozen=True)
class Opened:
    """What a run leaves behind: model and trigger, ready, and the record."""

    model: nn.Module
    trigger: Trigger
    record: Record


def run(  # noqa: PLR0913 - the front door: its parameters are the options
    spec: Spec,
    out: str | Path = "runs",
    *,
    device: str = "auto",
    redo: Redo = "nothing",
    steps: Steps = silent,
    model: nn.Module | None = None,
    world: World | None = None,
) -> Record:
    """Do what a spec says, or answer from the record of an equal run.

    Args:
        spec: what to run.
        out: folder of runs and stages.
        device: "auto", "cpu", "cuda" or "cuda:N".
        redo: "victim" makes victim and record anew, "all" every stage.
        steps: how to show what is under way.
        model: any network over images in [0, 1], in place of the spec's: victim and twin start from its weights.
        world: any data, in place of the spec's.

    Raises:
        UserError: something about the spec, the data or the folder is wrong; nothing has been written.
    """
    plan = make_plan(spec, device, model, world, steps)
    folder = run_folder(spec, out)
    store = Store(Path(out), lambda name: steps(name, None))
    record = _still_true(folder, plan.keys()) if redo == "nothing" else None
    if record is None:
        store.check()
        with store.alone(folder.name, "wait for another's run"):  # who may have made this very run by then
            record = _still_true(folder, plan.keys()) if redo == "nothing" else None
            record = record or _Runner(plan, store, redo, steps).run(folder)
    if unmeasured(record, spec.defences):
        with store.alone(folder.name, "wait for another's defences"):
            record = add_defences(Finished(folder, read_record(folder), plan, steps))
    if (failure := folder / FAILURE).exists():  # of an earlier try
        failure.unlink(missing_ok=True)
    return record


def poison(
    spec: Spec, folder: str | Path, out: str | Path = "runs", *, device: str = "auto", steps: Steps = silent
) -> None:
    """Write the poisoned training set of a spec, for other tools; exactly what `run` trains the victim on.

    Args:
        spec: which attack on which data.
        folder: a new folder for the files.
        out: folder of stages, where a surrogate is shared with runs.
        device: "auto", "cpu", "cuda" or "cuda:N".
        steps: how to show what is under way.

    Raises:
        UserError: something about the spec, the data or a folder is wrong; nothing has been written.
    """
    plan, folder = make_plan(spec, device, steps=steps), Path(folder)
    store = Store(Path(out), lambda name: steps(name, None))
    check_folder(folder)
    store.check()
    implant = _Runner(plan, store, "nothing", steps).implant()
    with steps("poison the training set", None) as tick:
        write_poisoned(plan, implant, folder, tick)


def run_folder(spec: Spec, out: str | Path) -> Path:
    """Where a spec's run is kept below `out`."""
    return Path(out) / f"{spec.name}-{spec.hash()}"


def open_run(
    folder: str | Path, *, model: nn.Module | None = None, networks: Mapping[str, nn.Module] | None = None
) -> Opened:
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
    if model is None:
        model = read_vit(folder / "model.safetensors")
    else:
        load_weights(model, folder / "model.safetensors")
    trigger = read_trigger(folder / "trigger.safetensors", parse_spec(record.spec).params, networks)
    return Opened(model.eval(), trigger, record)


def _still_true(folder: Path, keys: Mapping[str, str]) -> Record | None:
    """The record in `folder`, if there is one and all that it rests on is as it was."""
    try:
        found = read_record(folder)
    except UserError:
        return None
    return found if found.stages == keys else None


def _rows(folder: Path) -> list[Table]:
    """What an earlier record in `folder` says of defences."""
    with suppress(UserError):
        return read_record(folder).defences
    return []


@dataclass(frozen=True)
class _Runner:
    plan: Plan
    store: Store
    redo: Redo
    steps: Steps
    seconds: dict[str, float] = field(default_factory=dict)
    made: dict[str, Path] = field(default_factory=dict)

    def run(self, folder: Path) -> Record:
        forget_peaks(self.plan.device)
        plan, spec = self.plan, self.plan.spec
        implant = self.implant()
        make = partial(make_victim, plan, implant, self.steps)
        victim = self.made["victim"] = self.store.stage(plan.victim_stage(), make, self.redo != "nothing")
        self._clean(plan.victim, spec.seed, "twin")
        rows = _rows(folder) if self.redo == "nothing" else []
        (folder / "record.json").unlink(missing_ok=True)  # from here on the files beside it are no longer its own
        record = self._measure(implant, folder)
        place_file(victim / "model.safetensors", folder / "model.safetensors")
        save_trigger(
            implant.trigger, spec.params, folder / "trigger.safetensors", vitrap=json.dumps(carries(spec, "trigger"))
        )
        with locked(folder / ".record.lock"):  # rows of a run of the same spec, or tried meanwhile
            rows += [row for row in _rows(folder) if row not in rows]
            record = replace(record, defences=still_holding(rows, record))
            record.write(folder)
        return record

    def implant(self) -> Implant:
        """Fit the attack, with the surrogate it asks for."""
        surrogate, network = None, self.plan.surrogate
        if network is not None and network.checkpoint is not None:
            surrogate = network.build(0, self.plan.device).requires_grad_(False)
        elif network is not None:
            place = self._clean(network, SURROGATE_SEED, "surrogate")
            surrogate = network.read(place / "model.safetensors", self.plan.device)
        attack, seed = self.plan.spec.params, self.plan.spec.seed
        access = Access(self.plan.world.train, surrogate, stream(seed, "attack"))
        show = self.steps(f"fit {self.plan.spec.attack}", None)
        if not getattr(attack, "optimises", False):
            with timed(self.seconds, "fit"), show:
                return attack.fit(access)
        make = partial(make_trigger, self.plan, access, show)
        place = self.store.stage(self.plan.trigger_stage(), make, self.redo == "all")  # other victims share it
        facts = json.loads((place / "facts.json").read_text("utf-8"))
        self.seconds["fit"] = facts["seconds"]
        trigger = read_trigger(place / "trigger.safetensors", attack)
        implant = attack.fit(replace(access, generator=stream(seed, "attack"), trigger=trigger))
        return replace(implant, report=facts["report"])

    def _clean(self, network: Network, seed: int, name: str) -> Path:
        """The folder of a clean model's stage."""
        show = self.steps(f"train the {name}", training_steps(self.plan.spec, len(self.plan.world.train)))
        make = partial(make_clean, self.plan, network, seed, show)
        self.made[name] = self.store.stage(self.plan.clean_stage(network, seed), make, self.redo == "all")
        return self.made[name]

    def _measure(self, implant: Implant, folder: Path) -> Record:
        plan, test = self.plan, self.plan.world.test
        victim, twin = (
            plan.victim.read(self.made[name] / "model.safetensors", plan.device) for name in ("victim", "twin")
        )
        with timed(self.seconds, "measure"), self.steps("measure", 5 * -(-len(test) // BATCH)) as tick:
            measures = measure_victim(victim, twin, test, implant, plan.arithmetic, tick)
            examined = examine(victim, twin, test, implant)
        folder.mkdir(exist_ok=True)
        write_bytes(folder / "pictures.png", draw_examples(test, implant, victim, plan.arithmetic))
        facts = {name: json.loads((place / "facts.json").read_text("utf-8")) for name, place in self.made.items()}
        trained = {name: fact["seconds"]["train"] for name, fact in facts.items()}
        return Record(
            schema=SCHEMA,
            name=plan.spec.name,
            spec=plan.spec.table(),
            hash=plan.spec.hash(),
            seed=plan.spec.seed,
            environment=environment(plan.device),
            data={
                "n_train": len(plan.world.train),
                "n_test": len(test),
                "n_poisoned": facts["victim"]["n_poisoned"],
                "classes": test.n_classes,
                "fingerprint": plan.world.fingerprint,
                "n_curves": facts["victim"]["n_curves"],
            },
            models={"victim": plan.victim.shown(), "surrogate": plan.surrogate.shown() if plan.surrogate else None},
            victim=measures,
            attack={**implant.report, **examined},
            curves={name: fact["curves"] for name, fact in facts.items()},
            **asdict(plan.arithmetic),
            memory=memory(plan.device),
            seconds={"poison": facts["victim"]["seconds"]["poison"], **trained, **self.seconds},
            stages=plan.keys(),
        )
