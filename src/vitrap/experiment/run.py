"""`run`: carries a spec out, from surrogate and trigger to victim, clean twin, measures and record."""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from vitrap.contracts import Implant
from vitrap.data.sources import World
from vitrap.errors import UserError, some_of
from vitrap.experiment.answers import recall, remember, traces_of
from vitrap.experiment.checksums import MODEL, run_damage, write_checksums
from vitrap.experiment.defence_rows import Row
from vitrap.experiment.defend import FinishedRun, add_defences, recorded_threads, still_holding, unmeasured
from vitrap.experiment.facts import ModelFacts, TriggerFacts, read_facts
from vitrap.experiment.machine import computing_threads, environment, memory, reset_peaks
from vitrap.experiment.measure import Backdoor, examine, measure_victim, measuring_ticks, stealth_of
from vitrap.experiment.pictures import draw_examples
from vitrap.experiment.places import keep_places
from vitrap.experiment.plan import Plan, make_plan
from vitrap.experiment.predict import timed
from vitrap.experiment.progress import MEASURE, Progress, no_progress
from vitrap.experiment.record import RECORD, SCHEMA, Data, Record
from vitrap.experiment.records import EARLIER, FAILURE, read_record
from vitrap.experiment.spec import Spec
from vitrap.experiment.stages import STREAM, Redo, StageFolders, Stages, implant_of, read_stream, stored_set
from vitrap.experiment.store import Store, locked
from vitrap.experiment.trigger_file import STORED, TRIGGER, read_fitted
from vitrap.files import DRAFTS, place_file, write_bytes
from vitrap.formats import Table
from vitrap.metrics.diagnosis import diagnose
from vitrap.metrics.values import Measures, Stealth

DAMAGED = "record.damaged"
"""File in a run's folder: a record that could not be read, when the run was made anew."""
RUN_FILES = (MODEL, TRIGGER, STORED, STREAM)
"""Files that a run's folder shares with the stage of its victim."""
PICTURES = "pictures.png"
log = logging.getLogger(__name__)


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
    # Look for the record of such a run first. A network or data from outside leave no trace to look for.
    table = spec.located_table() if model is None and world is None else {}
    if table and redo == "nothing" and (known := recall(table, folder.parent, device, threads)):
        return known
    # These traces are taken before a file is read, so that one that changes during the run makes them invalid.
    traces = traces_of(table, device) if table else None
    check_threads(folder, threads, redo)
    # The folder must take what is to be made; where there is a record, perhaps nothing is.
    if redo != "nothing" or not os.path.exists(folder / RECORD):
        Store(folder.parent).check(folder.name)
    with computing_threads(threads_of(folder) if threads is None else threads):
        # Open the data, and check all that can be checked before work starts.
        plan = make_plan(spec, device, model, world, progress)
        record = complete_record(plan, folder, redo, progress)
    remember(table, folder.parent, device, folder, traces)
    return record


def run_folder(spec: Spec, out: str | Path) -> Path:
    """The folder of a spec's run below `out`: the spec's name and hash."""
    return Path(out) / f"{spec.name}-{spec.hash()}"


def complete_record(plan: Plan, folder: Path, redo: Redo, progress: Progress) -> Record:
    """The record of a planned run with all its defences: what is missing of it is made."""
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
            # The record is read again, for another process may have added rows while we waited.
            record = add_defences(FinishedRun(folder, read_record(folder), plan, progress))
    # The run has succeeded, so the failure of an earlier try no longer stands.
    if (failure := folder / FAILURE).exists():
        failure.unlink(missing_ok=True)
    keep_places(folder.parent, plan.spec)
    return record


def make_run(stages: Stages, folder: Path) -> Record:
    """Make every stage that is missing, measure victim and twin, and write the record last of all."""
    plan = stages.plan
    # The record states the memory that this run takes, so the peaks of earlier runs of this process are cleared.
    reset_peaks(plan.device)
    # Each surrogate, the trigger, the clean twin and the victim is a stage: a folder that is made where it is missing.
    folders = stages.make_all()
    measured = measure_run(plan, folders, stages.progress)
    record = build_record(plan, folders, measured)
    # No record stands beside files of another run: an earlier one goes first, and the new one comes last.
    folder.mkdir(exist_ok=True)
    set_record_aside(folder, keep_rows=stages.redo == "nothing")
    place_files(folders.models["victim"], measured.pictures, folder)
    return write_record(record, folder)


@dataclass(frozen=True)
class Measured:
    """What was measured of a run.

    Attributes:
        measures: accuracy and success rates of victim and twin, and the trigger's stealth.
        attack: what the attack itself reports of victim and twin.
        seconds: how long measuring took.
        pictures: the content of `pictures.png`.
    """

    measures: Measures
    attack: Table
    seconds: dict[str, float]
    pictures: bytes


def measure_run(plan: Plan, folders: StageFolders, progress: Progress) -> Measured:
    """Measure victim and twin, and draw the pictures.

    Args:
        plan: the run's plan.
        folders: the folders of its stages.
        progress: displays how far measuring is.
    """
    test = plan.world.test
    seconds: dict[str, float] = {}
    victim = plan.victim.read(folders.models["victim"] / MODEL, plan.device)
    twin = plan.victim.read(folders.models["twin"] / MODEL, plan.device)
    # The victim's stage has the final trigger: training along, or an edit of the model, may have changed it.
    fitted = read_fitted(folders.models["victim"], plan.spec.attack, plan.device)
    implant = implant_of(plan, fitted, read_stream(folders.trigger, plan.spec.seed))
    assert fitted.trigger is not None, "an attack without a trigger before training must edit the model"
    backdoor = Backdoor(fitted.trigger, plan.goal, implant.examine)
    # Both models classify all test images, clean and triggered, and the attack may report numbers of its own.
    with timed(seconds, "measure"), progress(MEASURE, measuring_ticks(test)) as tick:
        measures = measure_victim(victim, twin, test, backdoor, plan.arithmetic, tick)
        examined = examine(victim, twin, test, backdoor)
    # Where poisoned training images carry another trigger than test images, its stealth is measured, too.
    stored = stored_stealth(plan, implant) if fitted.stored else None
    pictures = draw_examples(test, backdoor, victim, plan.arithmetic)
    return Measured(replace(measures, stealth_stored=stored), examined, seconds, pictures)


def build_record(plan: Plan, folders: StageFolders, measured: Measured) -> Record:
    """The record of a run, still without rows of defences."""
    spec, world = plan.spec, plan.world
    facts = {role: read_facts(folder, ModelFacts) for role, folder in folders.models.items()}
    victim = facts["victim"]
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
            n_poisoned=victim.n_poisoned,
            n_covers=victim.n_covers,
            classes=world.test.n_classes,
            fingerprint=world.fingerprint,
            n_curves=victim.n_curves,
            passed_over=some_of(world.passed_over) if world.passed_over else "",
        ),
        models={
            "victim": plan.victim.for_record(),
            "surrogate": None,
            **{name: surrogate.network.for_record() for name, surrogate in plan.surrogates.items()},
        },
        victim=measured.measures,
        diagnosis=diagnose(measured.measures, world.test.n_classes),
        attack={**victim.report, **measured.attack},
        attack_version=spec.attack.version,
        curves={role: each.curves for role, each in facts.items()},
        **asdict(plan.arithmetic),
        memory=memory(plan.device),
        seconds={
            "poison": victim.poison_seconds,
            **{role: each.seconds for role, each in facts.items()},
            "fit": read_facts(folders.trigger, TriggerFacts).seconds,
            **measured.seconds,
        },
        stages=plan.keys(),
    )


def stored_stealth(plan: Plan, implant: Implant) -> Stealth | None:
    """Stealth of the poisoned training images; None where the attack poisons none."""
    if implant.poison is None:
        return None
    train = plan.world.train
    train_set = stored_set(implant, train, plan.spec.seed)
    return stealth_of(train, train_set, train_set.poisoned.nonzero().squeeze(1))


def set_record_aside(folder: Path, keep_rows: bool) -> None:
    """Remove the record in a run's folder; where its rows of defences are kept, it stays under another name.

    Drafts that a killed process has left there go, too: whoever is here is the only one to write.
    """
    # The record has a lock of its own, within that of the run: `defend` adds rows under it.
    with locked(folder.parent, f"{folder.name}-record"):
        for draft in folder.glob(DRAFTS):
            draft.unlink()
        if not keep_rows:
            (folder / EARLIER).unlink(missing_ok=True)
            (folder / RECORD).unlink(missing_ok=True)
        elif (folder / RECORD).exists():
            (folder / RECORD).replace(folder / EARLIER)


def place_files(victim_folder: Path, pictures: bytes, folder: Path) -> None:
    """Put the files of the victim's stage and the pictures into the run's folder, and their checksums."""
    write_bytes(folder / PICTURES, pictures)
    for name in RUN_FILES:
        if (victim_folder / name).exists():
            place_file(victim_folder / name, folder / name)
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


def _defence_rows(folder: Path) -> tuple[Row, ...]:
    """The rows of defences of the record in `folder`, or of the earlier one; none where neither can be read."""
    for name in (RECORD, EARLIER):
        with suppress(UserError):
            return read_record(folder, name).defences
    return ()


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
    before = threads_of(folder)
    if redo == "nothing" and threads is not None and before not in (None, threads):
        raise UserError(
            f"run {str(folder)!r} was made with threads = {before}, and its figures hold for that number; leave out"
            f" --threads {threads}, choose another --out, or make it anew, without its rows of defences, with --force"
        )


def threads_of(folder: Path) -> int | None:
    """The number of threads that the run in `folder` was made with; None where there is no run, or it had a GPU."""
    try:
        return recorded_threads(read_record(folder))
    except UserError:
        return None
