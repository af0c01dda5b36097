"""A run: surrogate, trigger, victim, clean twin, measures, record."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from vitrap.contracts import Implant, Trigger
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.experiment.answers import recall, remember, traces_of
from vitrap.experiment.defend import Finished, add_defences, still_holding, unmeasured
from vitrap.experiment.export import check_export, check_folder, write_poisoned
from vitrap.experiment.machine import environment, forget_peaks, memory
from vitrap.experiment.measure import Backdoor, examine, measure_victim, stealth_of
from vitrap.experiment.pictures import draw_examples
from vitrap.experiment.pipeline import Redo, Stages, fit_of, implant_of
from vitrap.experiment.plan import Plan, make_plan
from vitrap.experiment.predict import batch_of, timed
from vitrap.experiment.progress import Steps, silent
from vitrap.experiment.record import SCHEMA, Data, Record, Table
from vitrap.experiment.records import FAILURE, RECORD, read_record
from vitrap.experiment.rows import Row
from vitrap.experiment.spec import Spec, parse_spec
from vitrap.experiment.stages import STREAM, read_stream
from vitrap.experiment.store import Store, locked
from vitrap.experiment.streams import stream
from vitrap.experiment.trigger_file import STORED, TRIGGER, read_fitted, read_trigger
from vitrap.files import place_file, read_json, write_bytes
from vitrap.metrics.diagnosis import diagnose
from vitrap.metrics.values import Measures, Stealth
from vitrap.models.classifier import load_weights, read_model

KEPT = ("model.safetensors", TRIGGER, STORED, STREAM)
"""Files of a victim's stage that its run's folder has, too."""


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
    folder, own = run_folder(spec, out), model is not None or world is not None
    if redo == "nothing" and not own and (known := recall(spec.table(), Path(out), device)):
        return known
    traces = None if own else traces_of(spec.table(), device)  # now, so that what changes meanwhile is noticed
    plan = make_plan(spec, device, model, world, steps)
    store = Store(Path(out), lambda name: steps(name, None))
    record = _still_true(folder, plan.keys()) if redo == "nothing" else None
    if record is None:
        store.check()
        with store.alone(folder.name, "wait for another's run"):  # who may have made this very run by then
            record = _still_true(folder, plan.keys()) if redo == "nothing" else None
            record = record or make_run(Stages(plan, store, redo, steps), folder)
    if unmeasured(record, spec.defences, folder):
        with store.alone(folder.name, "wait for another's defences"):
            record = add_defences(Finished(folder, read_record(folder), plan, steps))
    if (failure := folder / FAILURE).exists():  # of an earlier try
        failure.unlink(missing_ok=True)
    remember(spec.table(), Path(out), device, folder, traces)
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
    plan = make_plan(spec, device, steps=steps)
    folder = Path(folder)
    store = Store(Path(out), lambda name: steps(name, None))
    if spec.attack.threat == "weights":
        check_export(spec.attack_name, Implant())
    check_folder(folder)
    store.check()
    stages = Stages(plan, store, "nothing", steps)
    trigger = stages.trigger(stages.surrogates())
    fitted = fit_of(plan, trigger)
    implant = implant_of(plan, fitted, read_stream(trigger, spec.seed))
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
    trigger = read_trigger(folder / "trigger.safetensors", parse_spec(record.spec).attack, networks)
    return Opened(model.eval(), trigger, record)


def _still_true(folder: Path, keys: Mapping[str, str]) -> Record | None:
    """The record in `folder`, if there is one and all that it rests on is as it was."""
    try:
        found = read_record(folder)
    except UserError:
        return None
    return found if found.stages == keys else None


def _rows(folder: Path) -> tuple[Row, ...]:
    """What an earlier record in `folder` says of defences."""
    with suppress(UserError):
        return read_record(folder).defences
    return ()


def make_run(stages: Stages, folder: Path) -> Record:
    """The way of a run: make every stage that is missing, measure, and write the record, last of all."""
    plan = stages.plan
    forget_peaks(plan.device)
    surrogates = stages.surrogates()
    trigger = stages.trigger(surrogates)
    twin = stages.twin() if plan.spec.attack.threat == "weights" else None  # the victim starts from it
    victim = stages.victim(trigger, twin)
    twin = twin or stages.twin()
    earlier = _rows(folder) if stages.redo == "nothing" else ()
    (folder / RECORD).unlink(missing_ok=True)  # from here on the files beside it are no longer its own
    models = {**surrogates, "victim": victim, "twin": twin}
    measured = measure_run(plan, models, trigger, folder, stages.steps)
    place_files(victim, folder)
    return write_record(to_record(plan, models, trigger, measured), earlier, folder)


@dataclass(frozen=True)
class Measured:
    """What was measured of a run.

    Attributes:
        victim: the measures.
        attack: what the attack says of victim and twin.
        seconds: what measuring took.
    """

    victim: Measures
    attack: Table
    seconds: dict[str, float]


def measure_run(plan: Plan, models: Mapping[str, Path], trigger: Path, folder: Path, steps: Steps) -> Measured:
    """Measure victim and twin, and draw the pictures into the run's folder.

    Args:
        plan: of the run.
        models: stages of the trained models, "victim" and "twin" among them.
        trigger: the trigger's stage.
        folder: the run's.
        steps: how to show what is under way.
    """
    test, seconds = plan.world.test, dict[str, float]()
    victim, twin = (plan.victim.read(models[name] / "model.safetensors", plan.device) for name in ("victim", "twin"))
    # The trigger is as training or an edit has left it, in this call or an earlier one.
    fitted = read_fitted(models["victim"], plan.spec.attack, device=plan.device)
    implant = implant_of(plan, fitted, read_stream(trigger, plan.spec.seed))
    assert fitted.trigger is not None, "an attack without a trigger before training must edit the model"
    backdoor = Backdoor(fitted.trigger, plan.goal, implant.examine)
    # Look at the test images, clean and triggered.
    with timed(seconds, "measure"), steps("measure", 5 * -(-len(test) // batch_of(test))) as tick:
        measures = measure_victim(victim, twin, test, backdoor, plan.arithmetic, tick)
        examined = examine(victim, twin, test, backdoor)
    # Look at the poisoned training images where they carry another trigger.
    stored = stored_stealth(plan, implant) if fitted.stored else None
    folder.mkdir(exist_ok=True)
    write_bytes(folder / "pictures.png", draw_examples(test, backdoor, victim, plan.arithmetic))
    return Measured(replace(measures, stealth_stored=stored), examined, seconds)


def to_record(plan: Plan, models: Mapping[str, Path], trigger: Path, measured: Measured) -> Record:
    """All that a record says of a run, but for its defences."""
    spec, world = plan.spec, plan.world
    facts = {name: read_json(place / "facts.json") for name, place in models.items()}
    about = facts["victim"]
    return Record(
        schema=SCHEMA,
        name=spec.name,
        spec=spec.table(),
        hash=spec.hash(),
        seed=spec.seed,
        environment=environment(plan.device),
        data=Data(
            n_train=len(world.train),
            n_test=len(world.test),
            n_poisoned=about["n_poisoned"],
            n_covers=about["n_covers"],
            classes=world.test.n_classes,
            fingerprint=world.fingerprint,
            n_curves=about["n_curves"],
        ),
        models={
            "victim": plan.victim.shown(),
            "surrogate": None,
            **{name: network.shown() for name, (network, _) in plan.surrogates().items()},
        },
        victim=measured.victim,
        diagnosis=diagnose(measured.victim),
        attack={**about["report"], **measured.attack},
        attack_version=spec.attack.version,
        curves={name: fact["curves"] for name, fact in facts.items()},
        **asdict(plan.arithmetic),
        memory=memory(plan.device),
        seconds={
            "poison": about["seconds"].get("poison", 0.0),
            **{name: fact["seconds"]["train"] for name, fact in facts.items()},
            "fit": read_json(trigger / "facts.json")["seconds"],
            **measured.seconds,
        },
        stages=plan.keys(),
    )


def stored_stealth(plan: Plan, implant: Implant) -> Stealth | None:
    """Stealth of what the poisoned training images carry, where that is not the trigger at test time."""
    if implant.poison is None:
        return None
    train = plan.world.train
    poisoned = implant.poison(train, stream(plan.spec.seed, "poison"))
    return stealth_of(train, poisoned, poisoned.poisoned.nonzero().squeeze(1))


def place_files(victim: Path, folder: Path) -> None:
    """Put model, trigger and stream of the victim's stage into the run's folder."""
    for name in KEPT:
        (folder / name).unlink(missing_ok=True)
        if (victim / name).exists():
            place_file(victim / name, folder / name)


def write_record(record: Record, earlier: Sequence[Row], folder: Path) -> Record:
    """Write the record, with the rows of defences of an earlier one that still hold."""
    with locked(folder.parent, f"{folder.name}-record"):  # rows of a run of the same spec, or tried meanwhile
        rows = [*earlier, *(row for row in _rows(folder) if row not in earlier)]
        record = replace(record, defences=still_holding(rows, record))
        record.write(folder)
    return record
