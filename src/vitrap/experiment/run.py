"""`run`: carries a spec out, from surrogate and trigger to victim, clean twin, measures and record.

Also `poison`, which writes the poisoned training set alone, and `open_run`, which loads a finished run.
"""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import nn

from vitrap.contracts import Implant, Trigger
from vitrap.data.sources import World
from vitrap.errors import UserError, some_of
from vitrap.experiment.answers import answer
from vitrap.experiment.checksums import check_run, run_damage, write_checksums
from vitrap.experiment.defence_rows import Row
from vitrap.experiment.defend import FinishedRun, add_defences, recorded_threads, still_holding, unmeasured
from vitrap.experiment.export import check_export, check_new, write_poisoned
from vitrap.experiment.machine import computing_threads, environment, memory, reset_peaks
from vitrap.experiment.measure import Backdoor, examine, measure_victim, stealth_of
from vitrap.experiment.pictures import draw_examples
from vitrap.experiment.places import keep_places
from vitrap.experiment.plan import Plan, make_plan
from vitrap.experiment.predict import batch_of, timed
from vitrap.experiment.progress import Progress, no_progress
from vitrap.experiment.record import RECORD, SCHEMA, Data, Record, Table
from vitrap.experiment.records import EARLIER, FAILURE, read_record
from vitrap.experiment.spec import Spec, parse_spec
from vitrap.experiment.stages import STREAM, Redo, Stages, fit_of, implant_of, read_stream
from vitrap.experiment.store import Store, locked
from vitrap.experiment.streams import stream
from vitrap.experiment.trigger_file import STORED, TRIGGER, read_fitted, read_trigger, try_out
from vitrap.files import DRAFTS, place_file, read_json, write_bytes
from vitrap.metrics.diagnosis import diagnose
from vitrap.metrics.values import Measures, Stealth
from vitrap.models.classifier import Classifier, load_weights, read_model
from vitrap.probe import check_type

DAMAGED = "record.damaged"
"""File in a run's folder: a record that could not be read, when the run was made anew."""
RUN_FILES = ("model.safetensors", TRIGGER, STORED, STREAM)
"""Files that a run's folder shares with the stage of its victim."""
PICTURES = "pictures.png"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedRun:
    """A finished run as a user loads it from its folder, to try the victim and its trigger.

    Attributes:
        model: the victim, in evaluation mode.
        trigger: fires on images at test time.
        record: what was measured.
    """

    model: nn.Module
    trigger: Trigger
    record: Record


def run(  # noqa: PLR0913 - the front door: its parameters are the options
    spec: Spec,
    out: str | Path = "runs",
    *,
    device: str = "auto",
    threads: int | None = None,
    redo: Redo = "nothing",
    progress: Progress = no_progress,
    model: nn.Module | None = None,
    world: World | None = None,
) -> Record:
    """Carry out a spec, or return the record of an equal run that was made before.

    Args:
        spec: what to run.
        out: folder of runs and stages.
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: how many threads torch computes with on a CPU, which decides the last digits of the figures; None for
            as many as the run in the folder had or, where there is none, for torch's default.
        redo: "nothing" uses all that is stored, "victim" makes victim and record again, "all" every stage.
        progress: displays what the run is doing.
        model: any network over images in [0, 1], in place of the spec's: victim and twin start from its weights.
        world: any data, in place of the spec's.

    Raises:
        UserError: something about the spec, the data or the folder is wrong; nothing has been written.
    """
    folder = run_folder(spec, out)

    def make() -> Record:
        check_threads(folder, threads, redo)
        # The folder must take what is to be made; where there is a record, perhaps nothing is.
        if redo != "nothing" or not os.path.exists(folder / RECORD):
            Store(folder.parent).check(folder.name)
        with computing_threads(_threads_of(folder) if threads is None else threads):
            # Open the data, and check all that can be checked before work starts.
            plan = make_plan(spec, device, model, world, progress)
            return _carry_out(plan, folder, redo, progress)

    # A network or data from outside have no file whose size and time could be asked for.
    if model is not None or world is not None:
        return make()
    return answer(spec.located_table(), Path(out), device, threads, make, ask=redo == "nothing")


def _carry_out(plan: Plan, folder: Path, redo: Redo, progress: Progress) -> Record:
    """Make the record of a planned run, or complete the one that is there."""
    store = Store(folder.parent, lambda name: progress(name, None))
    # A record whose keys are those of the plan is still the answer, if the files beside it are whole.
    record = _valid_record(folder, plan.keys()) if redo == "nothing" else None
    if record is None:
        store.check(folder.name)
        with store.alone(folder.name, "wait for another's run"):
            # Another process may have made this very run while we waited for it.
            record = _valid_record(folder, plan.keys()) if redo == "nothing" else None
            if record is None:
                _tell_damage(folder)
                record = make_run(Stages(plan, store, redo, progress), folder)
    # Defences accumulate on a record: only those that it lacks are measured.
    if unmeasured(record, plan.spec.defences, folder):
        store.check(folder.name)
        with store.alone(folder.name, "wait for another's defences"):
            record = add_defences(FinishedRun(folder, read_record(folder), plan, progress))
    # The run has succeeded, so the failure of an earlier try no longer stands.
    if (failure := folder / FAILURE).exists():
        failure.unlink(missing_ok=True)
    keep_places(folder.parent, plan.spec)
    return record


def poison(
    spec: Spec, folder: str | Path, out: str | Path = "runs", *, device: str = "auto", progress: Progress = no_progress
) -> None:
    """Write the poisoned training set of a spec for other tools: exactly the images that `run` trains the victim on.

    Args:
        spec: which attack on which data.
        folder: a new folder for the files.
        out: folder of stages, where runs find the surrogate and the trigger that are made here.
        device: "auto", "cpu", "cuda" or "cuda:N".
        progress: displays what is being done.

    Raises:
        UserError: something about the spec, the data or a folder is wrong, or the attack has no poisoned set to write,
            which may be known only once it is fitted; no folder has been made.
    """
    with computing_threads(_threads_of(run_folder(spec, out))):
        _write_poison(spec, Path(folder), Path(out), device, progress)


def _write_poison(spec: Spec, folder: Path, out: Path, device: str, progress: Progress) -> None:
    """Make a spec's trigger, and write the training set that it poisons."""
    store = Store(out, lambda name: progress(name, None))
    check_new(folder)
    store.check()
    # Open the data, and check all that can be checked before work starts.
    plan = make_plan(spec, device, progress=progress)
    # An attack that edits weights poisons no image, whatever its trigger: it is refused before that is fitted.
    if spec.attack.threat == "weights":
        check_export(spec.attack_name, Implant())
    # Make the trigger, or take it from the store.
    stages = Stages(plan, store, "nothing", progress)
    surrogates = stages.surrogates()
    trigger = stages.trigger(surrogates)
    # Poison with the random stream that a run's victim would be poisoned with.
    fitted = fit_of(plan, trigger)
    implant = implant_of(plan, fitted, read_stream(trigger, spec.seed))
    with progress("poison the training set", None) as tick:
        write_poisoned(plan, fitted, implant, folder, tick)


def run_folder(spec: Spec, out: str | Path) -> Path:
    """The folder of a spec's run below `out`: the spec's name and hash."""
    return Path(out) / f"{spec.name}-{spec.hash()}"


def open_run(
    folder: str | Path, *, model: nn.Module | None = None, networks: Mapping[str, nn.Module] | None = None
) -> OpenedRun:
    """Load a finished run: its model, its trigger and its record.

    Args:
        folder: the run's folder.
        model: your own network, if the victim was one; it gets the victim's weights.
        networks: your own networks, if the trigger holds any, by field name.

    Raises:
        UserError: the folder holds no finished run, or a file of it is missing or damaged.
    """
    folder = Path(folder)
    record = read_record(folder)
    check_run(folder)
    if model is None:
        model = read_model(folder / "model.safetensors")
    else:
        check_type(model, nn.Module, "model")
        load_weights(model, folder / "model.safetensors")
    place = folder / TRIGGER
    trigger = read_trigger(place, parse_spec(record.spec).attack, networks)
    if isinstance(model, Classifier):
        shape = (1, len(model.mean), model.architecture.size, model.architecture.size)
        try_out(trigger, torch.linspace(0, 1, prod(shape)).view(shape), place)
    return OpenedRun(model.eval(), trigger, record)


def _valid_record(folder: Path, keys: Mapping[str, str]) -> Record | None:
    """The record in `folder` if its keys, which cover all that it rests on, are these and its files are whole."""
    with suppress(UserError):
        found = read_record(folder)
        if found.stages == keys and not run_damage(folder):
            return found
    return None


def _tell_damage(folder: Path) -> None:
    """Log that a finished run is made anew because files of it are missing or damaged, if that is so.

    A damaged record is kept under another name: its rows of defences might be of use.
    """
    if not (folder / RECORD).exists():
        return
    try:
        read_record(folder)
    except UserError as error:
        os.replace(folder / RECORD, folder / DAMAGED)
        log.warning("vitrap: %s; it is kept as %s, and made anew without its rows of defences", error, DAMAGED)
        return
    if wrong := run_damage(folder):
        log.warning("vitrap: run %r is damaged (%s); it is made anew", str(folder), wrong)


def check_threads(folder: Path, threads: int | None, redo: Redo) -> None:
    """Refuse another number of threads than that of the run that is there: its record and its rows would be lost.

    Raises:
        UserError: naming both numbers.
    """
    before = _threads_of(folder)
    if redo == "nothing" and threads is not None and before not in (None, threads):
        raise UserError(
            f"run {str(folder)!r} was made with threads = {before}, and its figures hold for that number; leave out"
            f" --threads {threads}, choose another --out, or make it anew, without its rows of defences, with --force"
        )


def _threads_of(folder: Path) -> int | None:
    """The number of threads that the run in `folder` was made with; None where there is no run, or it had a GPU."""
    try:
        return recorded_threads(read_record(folder))
    except UserError:
        return None


def _defence_rows(folder: Path) -> tuple[Row, ...]:
    """The rows of defences of the record in `folder`, or of the earlier one; none where neither can be read."""
    for name in (RECORD, EARLIER):
        with suppress(UserError):
            return read_record(folder, name).defences
    return ()


def make_run(stages: Stages, folder: Path) -> Record:
    """Make every stage that is missing, measure victim and twin, and write the record last of all."""
    plan = stages.plan
    # The record states the memory that this run takes, so the peaks of earlier runs of this process are cleared.
    reset_peaks(plan.device)
    # Train the attacker's surrogates, and fit the trigger with their help.
    surrogates = stages.surrogates()
    trigger = stages.trigger(surrogates)
    # Train the clean twin, and then the victim, which starts from the twin where the attacker edits weights alone.
    twin = stages.twin()
    victim = stages.victim(trigger, twin)
    models = {**surrogates, "victim": victim, "twin": twin}
    measured = measure_run(plan, models, trigger, stages.progress)
    record = build_record(plan, models, trigger, measured)
    # No record stands beside files of another run: an earlier one goes first, and the new one comes last.
    folder.mkdir(exist_ok=True)
    set_record_aside(folder, keep_rows=stages.redo == "nothing")
    place_files(victim, measured.pictures, folder)
    return write_record(record, folder)


@dataclass(frozen=True)
class Measured:
    """What was measured of a run.

    Attributes:
        victim: accuracy and success rates of victim and twin, and the trigger's stealth.
        attack: what the attack itself reports of victim and twin.
        seconds: how long measuring took.
        pictures: the content of `pictures.png`.
    """

    victim: Measures
    attack: Table
    seconds: dict[str, float]
    pictures: bytes


def measure_run(plan: Plan, models: Mapping[str, Path], trigger: Path, progress: Progress) -> Measured:
    """Measure victim and twin, and draw the pictures.

    Args:
        plan: the run's plan.
        models: folders of the trained models' stages, by role; "victim" and "twin" are among them.
        trigger: folder of the trigger's stage.
        progress: displays how far measuring is.
    """
    test = plan.world.test
    seconds: dict[str, float] = {}
    victim = plan.victim.read(models["victim"] / "model.safetensors", plan.device)
    twin = plan.victim.read(models["twin"] / "model.safetensors", plan.device)
    # The victim's stage has the final trigger: training along, or an edit of the model, may have changed it.
    fitted = read_fitted(models["victim"], plan.spec.attack, device=plan.device)
    implant = implant_of(plan, fitted, read_stream(trigger, plan.spec.seed))
    assert fitted.trigger is not None, "an attack without a trigger before training must edit the model"
    backdoor = Backdoor(fitted.trigger, plan.goal, implant.examine)
    # Both models classify all test images, clean and triggered, and the attack may report numbers of its own.
    ticks = 5 * -(-len(test) // batch_of(test))
    with timed(seconds, "measure"), progress("measure", ticks) as tick:
        measures = measure_victim(victim, twin, test, backdoor, plan.arithmetic, tick)
        examined = examine(victim, twin, test, backdoor)
    # Where poisoned training images carry another trigger than test images, its stealth is measured, too.
    stored = stored_stealth(plan, implant) if fitted.stored else None
    pictures = draw_examples(test, backdoor, victim, plan.arithmetic)
    return Measured(replace(measures, stealth_stored=stored), examined, seconds, pictures)


def build_record(plan: Plan, models: Mapping[str, Path], trigger: Path, measured: Measured) -> Record:
    """The record of a run, still without rows of defences."""
    spec, world = plan.spec, plan.world
    facts = {name: read_json(place / "facts.json") for name, place in models.items()}
    about = facts["victim"]
    return Record(
        schema=SCHEMA,
        name=spec.name,
        spec=spec.table(),
        contents=spec.contents(),
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
            passed_over=some_of(world.passed_over) if world.passed_over else "",
        ),
        models={
            "victim": plan.victim.shown(),
            "surrogate": None,
            **{name: network.shown() for name, (network, _) in plan.surrogates().items()},
        },
        victim=measured.victim,
        diagnosis=diagnose(measured.victim, world.test.n_classes),
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
    """Stealth of the poisoned training images; None where the attack poisons none."""
    if implant.poison is None:
        return None
    train = plan.world.train
    poisoned = implant.poison(train, stream(plan.spec.seed, "poison"))
    return stealth_of(train, poisoned, poisoned.poisoned.nonzero().squeeze(1))


def set_record_aside(folder: Path, keep_rows: bool) -> None:
    """Remove the record in a run's folder; where its rows of defences are kept, it stays under another name.

    Drafts that a killed process has left there go, too: whoever is here is the only one to write.
    """
    with locked(folder.parent, f"{folder.name}-record"):
        for draft in folder.glob(DRAFTS):
            draft.unlink()
        if not keep_rows:
            (folder / EARLIER).unlink(missing_ok=True)
            (folder / RECORD).unlink(missing_ok=True)
        elif (folder / RECORD).exists():
            (folder / RECORD).replace(folder / EARLIER)


def place_files(victim: Path, pictures: bytes, folder: Path) -> None:
    """Put the files of the victim's stage and the pictures into the run's folder, and their checksums."""
    write_bytes(folder / PICTURES, pictures)
    for name in RUN_FILES:
        if (victim / name).exists():
            place_file(victim / name, folder / name)
        else:  # an earlier run may have had it
            (folder / name).unlink(missing_ok=True)
    write_checksums(folder, [name for name in (*RUN_FILES, PICTURES) if (folder / name).exists()])


def write_record(record: Record, folder: Path) -> Record:
    """Write the record, with those rows of defences of an earlier record that still hold."""
    with locked(folder.parent, f"{folder.name}-record"):
        record = replace(record, defences=still_holding(_defence_rows(folder), record))
        record.write(folder)
        # The new record is read first, so an earlier one that stays does no harm.
        with suppress(OSError):
            (folder / EARLIER).unlink(missing_ok=True)
    return record
