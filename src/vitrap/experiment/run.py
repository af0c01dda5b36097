"""A run: surrogate, implant, victim, clean twin, measures, record."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from vitrap.contracts import Access, Fitted, Implant, Trigger
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.experiment.defend import Finished, add_defences, still_holding, unmeasured
from vitrap.experiment.export import check_export, check_folder, write_poisoned
from vitrap.experiment.machine import environment, forget_peaks, memory
from vitrap.experiment.measure import Backdoor, examine, measure_victim, stealth_of
from vitrap.experiment.pictures import draw_examples
from vitrap.experiment.plan import Network, Plan, make_plan, training_steps
from vitrap.experiment.predict import batch_of, timed
from vitrap.experiment.progress import Steps, silent
from vitrap.experiment.record import SCHEMA, Record, Table, read_record
from vitrap.experiment.records import FAILURE
from vitrap.experiment.spec import Spec, parse_spec
from vitrap.experiment.stages import STREAM, make_clean, make_trigger, make_victim, read_stream
from vitrap.experiment.store import Store, locked, place_file, read_json, write_bytes
from vitrap.experiment.streams import stream
from vitrap.experiment.trigger_file import STORED, TRIGGER, read_fitted, read_trigger
from vitrap.metrics.diagnosis import diagnose
from vitrap.models.classifier import load_weights, read_model

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
    if unmeasured(record, spec.defences, folder):
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
        UserError: something about the spec, the data or a folder is wrong, or the attack has no poisoned set to write,
            which may be known only once it is fitted; no folder has been made.
    """
    plan, folder = make_plan(spec, device, steps=steps), Path(folder)
    store = Store(Path(out), lambda name: steps(name, None))
    if spec.params.threat == "weights":
        check_export(spec.attack, Implant())
    check_folder(folder)
    store.check()
    runner = _Runner(plan, store, "nothing", steps)
    fitted = runner.fit()
    implant = runner.implant(fitted, runner.stream())
    with steps("poison the training set", None) as tick:
        write_poisoned(plan, fitted, implant, folder, tick)


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
        model = read_model(folder / "model.safetensors")
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
        """Make every stage that is missing, measure, and write the record, last of all."""
        forget_peaks(self.plan.device)
        plan, spec = self.plan, self.plan.spec
        fitted = self.fit()
        generator = self.stream()
        implant = self.implant(fitted, generator)
        if spec.params.threat == "weights":  # the victim starts from the twin
            self._clean(plan.victim, spec.seed, "twin")
        victim = self.made["victim"] = self.store.stage(
            plan.victim_stage(),
            partial(make_victim, plan, fitted, implant, generator, self.made, self.steps),
            self.redo != "nothing",
        )
        self._clean(plan.victim, spec.seed, "twin")
        # From here on the trigger is as training or an edit has left it, in this call or an earlier one.
        fitted = self._fitted(victim)
        implant = self.implant(fitted, self.stream())
        rows = _rows(folder) if self.redo == "nothing" else []
        (folder / "record.json").unlink(missing_ok=True)  # from here on the files beside it are no longer its own
        assert fitted.trigger is not None, "an attack without a trigger before training must edit the model"
        stored = self._stored(implant) if fitted.stored else None
        record = self._measure(Backdoor(fitted.trigger, plan.goal, implant.examine), stored, folder)
        for name in ("model.safetensors", TRIGGER, STORED, STREAM):
            (folder / name).unlink(missing_ok=True)
            if (victim / name).exists():
                place_file(victim / name, folder / name)
        with locked(folder / ".record.lock"):  # rows of a run of the same spec, or tried meanwhile
            rows += [row for row in _rows(folder) if row not in rows]
            record = replace(record, defences=still_holding(rows, record))
            record.write(folder)
        return record

    def fit(self) -> Fitted:
        """The attack's triggers from their stage, which is made with the surrogates that the attack asks for."""
        plan = self.plan
        for name, (network, seed) in plan.surrogates().items():
            if network.checkpoint is None:
                self._clean(network, seed, name)

        def make(folder: Path) -> None:
            ready = {name: self._surrogate(name, network) for name, (network, _) in plan.surrogates().items()}
            other = plan.other.train if plan.other else None
            access = Access(
                plan.world.train,
                ready.get("surrogate"),
                stream(plan.spec.seed, "attack"),
                ready.get("test_surrogate"),
                other,
            )
            make_trigger(plan, access, self.steps(f"fit {plan.spec.attack}", None), folder)

        place = self.made["trigger"] = self.store.stage(plan.trigger_stage(), make, self.redo == "all")
        facts = read_json(place / "facts.json")
        self.seconds["fit"] = facts["seconds"]
        return replace(self._fitted(place), report=facts["report"])

    def stream(self) -> torch.Generator:
        """The attacker's random stream, where `fit` ended."""
        return read_stream(self.made["trigger"], self.plan.spec.seed)

    def implant(self, fitted: Fitted, generator: torch.Generator) -> Implant:
        """How the trigger gets into the victim; what is drawn for it comes from `generator`."""
        plan = self.plan
        other = plan.other.train if plan.other else None
        return plan.spec.params.implant(Access(plan.world.train, None, generator, other=other), fitted)

    def _fitted(self, place: Path) -> Fitted:
        """The triggers in a stage's folder."""
        return read_fitted(place, self.plan.spec.params, device=self.plan.device)

    def _surrogate(self, name: str, network: Network) -> nn.Module:
        """A surrogate, ready and frozen."""
        if network.checkpoint is not None:
            return network.build(0, self.plan.device).requires_grad_(False)
        return network.read(self.made[name] / "model.safetensors", self.plan.device)

    def _clean(self, network: Network, seed: int, name: str) -> Path:
        """The folder of a clean model's stage; asked for again, the same."""
        if name in self.made:
            return self.made[name]
        steps = training_steps(self.plan.spec, len(self.plan.world.train))
        show = self.steps(f"train the {name.replace('_', ' ')}", steps)
        make = partial(make_clean, self.plan, network, seed, show)
        self.made[name] = self.store.stage(self.plan.clean_stage(network, seed), make, self.redo == "all")
        return self.made[name]

    def _stored(self, implant: Implant) -> Table | None:
        """Stealth of what the poisoned training images carry, where that is not the trigger at test time."""
        if implant.poison is None:
            return None
        train = self.plan.world.train
        poisoned = implant.poison(train, stream(self.plan.spec.seed, "poison"))
        return stealth_of(train, poisoned, poisoned.poisoned.nonzero().squeeze(1))

    def _measure(self, backdoor: Backdoor, stored: Table | None, folder: Path) -> Record:
        """Measure victim and twin, and say it all in a record."""
        plan, test = self.plan, self.plan.world.test
        victim, twin = (
            plan.victim.read(self.made[name] / "model.safetensors", plan.device) for name in ("victim", "twin")
        )
        with timed(self.seconds, "measure"), self.steps("measure", 5 * -(-len(test) // batch_of(test))) as tick:
            measures = measure_victim(victim, twin, test, backdoor, plan.arithmetic, tick)
            examined = examine(victim, twin, test, backdoor)
        folder.mkdir(exist_ok=True)
        write_bytes(folder / "pictures.png", draw_examples(test, backdoor, victim, plan.arithmetic))
        models = {name: place for name, place in self.made.items() if name != "trigger"}
        facts = {name: read_json(place / "facts.json") for name, place in models.items()}
        about = facts["victim"]
        surrogates = {name: network.shown() for name, (network, _) in plan.surrogates().items()}
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
                "n_poisoned": about["n_poisoned"],
                "n_covers": about["n_covers"],
                "classes": test.n_classes,
                "fingerprint": plan.world.fingerprint,
                "n_curves": about["n_curves"],
            },
            models={"victim": plan.victim.shown(), "surrogate": None, **surrogates},
            diagnosis=diagnose(measures),
            victim={**measures, **({"stealth_stored": stored} if stored else {})},
            attack={**about["report"], **examined},
            attack_version=plan.spec.params.version,
            curves={name: fact["curves"] for name, fact in facts.items()},
            **asdict(plan.arithmetic),
            memory=memory(plan.device),
            seconds={
                "poison": about["seconds"].get("poison", 0.0),
                **{name: fact["seconds"]["train"] for name, fact in facts.items()},
                **self.seconds,
            },
            stages=plan.keys(),
        )
