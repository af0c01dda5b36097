"""`defend`: tries defences on a finished run, and adds a row for each to the run's record.

A defence that the record has a row of already is not measured again. How one is measured is in measure_defences.py.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from vitrap import registry
from vitrap.contracts import ImageSet
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.experiment.checksums import MODEL, check_run
from vitrap.experiment.code import code_digest, defending_code, training_code
from vitrap.experiment.defence_rows import Row, ScreenRow, lacks_scores, row_settings
from vitrap.experiment.defence_spec import DefenceSpec
from vitrap.experiment.facts import read_facts, write_facts
from vitrap.experiment.machine import computing_threads
from vitrap.experiment.measure_defences import Evaluation, Result, measure_defence
from vitrap.experiment.network import first_image
from vitrap.experiment.places import found_again
from vitrap.experiment.plan import Plan, make_plan, training_steps
from vitrap.experiment.progress import DEFEND, Progress, no_progress
from vitrap.experiment.record import Record
from vitrap.experiment.records import read_record
from vitrap.experiment.retraining import Retraining
from vitrap.experiment.scores import Scores, drop_unnamed, scores_file, write_scores
from vitrap.experiment.spec import digest, parse_defence, parse_spec
from vitrap.experiment.stages import Stages, backdoor_notice, implant_of, make_model, read_stream, stored_set
from vitrap.experiment.store import Stage, Store, key_of, locked
from vitrap.experiment.trigger_file import TRIGGER, read_fitted, try_out
from vitrap.formats import Table
from vitrap.metrics.diagnosis import backdoor_faults
from vitrap.train.arithmetic import Arithmetic

KEY = re.compile(r"[0-9a-f]{16}")
"""What the key of a stage looks like."""
SAME_ASR = 0.01
"""By how much the ASR, when measured again, may differ from the record's."""


def defend(  # noqa: PLR0913 - a front door: its parameters are the options
    folder: str | Path,
    defences: Sequence[DefenceSpec],
    *,
    device: str = "auto",
    data: str | None = None,
    progress: Progress = no_progress,
    model: nn.Module | None = None,
    world: World | None = None,
) -> Record:
    """Try defences on a finished run, and add a row for each to its record as soon as it is measured.

    A row that the record has already is not measured again. If the process is killed, the record is as it was after
    the last complete row. On a CPU, torch computes with as many threads as in the run.

    Args:
        folder: the run's folder.
        defences: the defences with their settings, such as `load_defence("strip", ["overlays=50"])`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        data: where the run's data are by now, as `imagefolder:PATH` or `npy:PATH`; None where they have not moved.
        progress: displays what is being done.
        model: your own network, if the run's victim was one.
        world: your own data, if the run had some.

    Raises:
        UserError: the folder holds no finished run, its data or twin are no longer there, or a defence does not suit
            the model. The record is as it was.
    """
    folder = Path(folder)
    record = read_record(folder)
    missing = unmeasured(record, defences, folder)
    if not missing:
        return record
    Store(folder.parent).check(folder.name, "copy it to where it can be written, and defend the copy")
    check_run(folder)
    # Find the files that its spec names, which may have moved.
    spec = found_again(parse_spec(record.spec), record.contents, folder.parent, data)
    place = spec.paths["data.name"].place if world is None and "data.name" in spec.paths else None
    if place is not None and not place.exists():
        raise UserError(f"the data of run {str(folder)!r} are not at {str(place)!r}; say with --data where they are")
    # Plan the run as its record has it; it is not attacked again, so no surrogate is needed.
    spec = replace(spec, name=record.name, defences=missing, recipe=replace(spec.recipe, precision=record.precision))
    with computing_threads(recorded_threads(record)):
        plan = make_plan(spec, device, model, world, progress, with_surrogates=False)
        # On the same kind of device, compute as the run did.
        if record.environment.device_kind == plan.device.type:
            plan = replace(plan, arithmetic=recorded_arithmetic(record, plan.arithmetic))
        check_data(plan, record, folder)
        return add_defences(FinishedRun(folder, record, plan, progress))


def check_data(plan: Plan, record: Record, folder: Path) -> None:
    """Refuse other data than the run's: their figures would not belong to it.

    Raises:
        UserError: naming both fingerprints.
    """
    found, wanted = plan.world.fingerprint, record.data.fingerprint
    if found != wanted:
        raise UserError(
            f"the data of run {str(folder)!r} are not here: {plan.world.name!r} has fingerprint {found[:12]}, the"
            f" record says {wanted[:12]}; bring them back, or say with --data where they are"
        )


def recorded_threads(record: Record) -> int | None:
    """The number of threads that a run was made with; None where it had a GPU, or its record does not say."""
    made = record.environment
    return made.threads or None if made.device_kind == "cpu" else None


def recorded_arithmetic(record: Record, default: Arithmetic) -> Arithmetic:
    """The arithmetic of a run by its record. Older records do not name the attention; they get the default."""
    attention = default.attention if record.attention == "" else record.attention
    return replace(default, attention=attention, compiled=record.compiled)


def unmeasured(record: Record, defences: Sequence[DefenceSpec], folder: Path) -> tuple[DefenceSpec, ...]:
    """The defences still to be measured: without a row, with a row of other code, or with one whose scores are gone."""
    missing = {}
    for defence in defences:
        row = find_row(record, defence)
        if row is None or lacks_scores(row, folder):
            missing[row_key(record, defence)] = defence
    return tuple(missing.values())


def find_row(record: Record, defence: DefenceSpec) -> Row | None:
    """The row of a defence with these very settings and today's code; None if the record has none."""
    key = row_key(record, defence)
    return next((row for row in record.defences if row.key == key), None)


def row_key(record: Record, defence: DefenceSpec) -> str:
    """A hash of all that a row rests on: victim, twin, and the defence's settings, version and code."""
    models = {name: key for name, key in record.stages.items() if name != "measure"}
    attack = inspect.getfile(registry.get("attacks", record.spec["attack"]["name"]))
    code = {"defence": defence_code(defence.method), "attack": code_digest(attack)}
    depends = {"defence": defence.table(), "version": defence.method.version, "code": code}
    return key_of({**models, **depends})


def defence_code(defence: Any) -> str:
    """A digest of the code of a defence and of how it is measured."""
    return defending_code(inspect.getfile(type(defence)))


def still_holding(rows: Sequence[Row], record: Record) -> tuple[Row, ...]:
    """Those rows of an earlier record that rest on the models of `record` and on today's code."""
    kept = []
    for row in rows:
        with suppress(UserError):  # a defence or a setting that is no longer known
            if row.key == row_key(record, parse_defence({"name": row.name, **row_settings(row)})):
                kept.append(row)
    return tuple(kept)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run on disk, whose plan has defences to be measured.

    Attributes:
        folder: the run's folder.
        record: the record in that folder.
        plan: the run's plan, with the defences.
        progress: displays what is being done.
    """

    folder: Path
    record: Record
    plan: Plan
    progress: Progress

    def evaluation(self) -> Evaluation:
        """Load victim, twin, trigger and data, with which defences are measured."""
        plan, seed = self.plan, self.plan.spec.seed
        # Load the models that the run trained.
        victim = plan.victim.read(self.folder / MODEL, plan.device)
        twin = plan.victim.read(self._twin() / MODEL, plan.device)
        # Load the trigger that it made, and have the attack say how that gets into a training set.
        fitted = read_fitted(self.folder, plan.spec.attack, plan.device)
        assert fitted.trigger is not None, "a run without its trigger is refused before"
        try_out(fitted.trigger, first_image(plan.world).to(plan.device), self.folder / TRIGGER)
        implant = implant_of(plan, fitted, read_stream(self.folder, seed))
        return Evaluation(
            victim,
            twin,
            trigger=fitted.trigger,
            goal=plan.goal,
            poison=partial(stored_set, implant, plan.world.train, seed),
            world=plan.world,
            seed=seed,
            arithmetic=plan.arithmetic,
            retrain=Retraining(plan.victim, plan.spec.recipe, seed, plan.device, plan.arithmetic, self.progress),
            train_on_kept=self._train_on_kept,
            result_on_twin=self._result_on_twin,
        )

    def check(self, evaluation: Evaluation) -> None:
        """Refuse a run whose trigger works differently today, since the attack's code has changed.

        Raises:
            UserError: the ASR differs from the record's by more than another device's rounding may change.
        """
        found, wanted = evaluation.before.asr.value, self.record.victim.asr.value
        if abs(found - wanted) > SAME_ASR:
            raise UserError(
                f"the trigger of run {str(self.folder)!r} has an ASR of {found:.4f}, and the record says {wanted:.4f}:"
                " its attack's code has changed since; run its spec again"
            )

    def _twin(self) -> Path:
        """The folder of the twin's stage; one that is gone or damaged is trained again if it would come out equal."""
        key = self.record.stages.get("twin", "")
        if not KEY.fullmatch(key):
            raise UserError(
                f"the record of run {str(self.folder)!r} does not say which clean twin it was measured beside; run its"
                " spec again with --force"
            )
        if place := self._store.find("clean", key):
            return place
        if self.plan.twin_stage().key != key:
            place = self._store.root / "stages" / f"clean-{key}"
            raise UserError(
                f"the clean twin of run {str(self.folder)!r} is gone or damaged ({str(place)!r}), and code, data or"
                " libraries have changed since; run its spec again"
            )
        return Stages(self.plan, self._store, "nothing", self.progress).twin()

    def _train_on_kept(self, kept: ImageSet) -> nn.Module:
        """Train the victim's network on what a filter kept, as a stage."""
        plan = self.plan
        depends: dict[str, Any] = {
            **plan.twin_stage().depends,
            "victim": self.record.stages.get("victim"),
            "kept": digest(kept.index.tolist()),
            "code": training_code(inspect.getfile(type(plan.spec.attack))),
        }
        bar = self.progress("train without what was flagged", training_steps(plan.spec, len(kept)))
        make = partial(make_model, plan, plan.twin, kept, backdoor_notice(plan.spec, "retrained"), bar)
        place = self._store.find_or_make(Stage("retrained", depends), make)
        return plan.victim.read(place / MODEL, plan.device)

    def _result_on_twin(self, defence: DefenceSpec, kind: type[Result], measure: Callable[[], Result]) -> Result:
        """What a defence makes of the twin, kept as a stage that the runs of all attacks on this twin share."""
        depends = {
            "twin": self.record.stages["twin"],
            "defence": defence.table(),
            "version": defence.method.version,
            "seed": self.plan.spec.seed,
            "device": self.plan.device.type,
            "arithmetic": asdict(self.plan.arithmetic),
            "threads": self.plan.threads,
            "code": defence_code(defence.method),
        }

        def make(folder: Path) -> None:
            write_facts(folder, measure())

        return read_facts(self._store.find_or_make(Stage("defended", depends), make), kind)

    @property
    def _store(self) -> Store:
        return Store(self.folder.parent, lambda name: self.progress(name, None))


def add_defences(run: FinishedRun) -> Record:
    """Measure those defences of the plan that the record lacks, and write each row as soon as it is measured."""
    record = run.record
    missing = unmeasured(record, run.plan.spec.defences, run.folder)
    if not missing:
        return record
    # Load victim, twin and trigger, and see that the trigger still works as the record says.
    evaluation = run.evaluation()
    with run.progress("measure the victim", None):
        run.check(evaluation)
    for defence in missing:
        with run.progress(f"{DEFEND} {defence.name}", None) as tick:
            row, scores = measure_defence(defence, evaluation, tick)
        # A defence gets no credit for a victim without a backdoor.
        faults = backdoor_faults(record.victim, record.data.classes)
        record = add_row(run.folder, replace(row, key=row_key(record, defence), no_backdoor=faults), scores)
    return record


def add_row(folder: Path, row: Row, scores: Scores | None = None) -> Record:
    """Put a row into the record of a run, in place of a row of the same defence with the same settings."""
    with locked(folder.parent, f"{folder.name}-record"):
        # Another process may have added a row since the record was read last.
        record = read_record(folder)
        # A screen's scores are written first, so that no row names a file that is not there.
        if scores is not None:
            assert isinstance(row, ScreenRow)
            row = replace(row, scores=scores_file(row.name, row.key))
            write_scores(folder, row, scores, backdoor_notice(parse_spec(record.spec), "scores"))
        others = [other for other in record.defences if name_and_settings(other) != name_and_settings(row)]
        record = replace(record, defences=(*others, row))
        record.write(folder)
        # Scores of rows that were replaced, or that went with an earlier record, are removed.
        drop_unnamed(folder, record.defences)
    return record


def name_and_settings(row: Row) -> tuple[str, Table]:
    """The defence's name and all its settings, by which rows of a record are told apart."""
    return row.name, row_settings(row)
