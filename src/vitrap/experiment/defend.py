"""Defences on a finished run: each becomes a row of its record, measured once and then answered from there."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import nn

from vitrap import registry
from vitrap.contracts import Access, ImageSet, Implant
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.experiment.code import code_digest, defending_code, training_code
from vitrap.experiment.named import Named
from vitrap.experiment.outcomes import Case, Facts, measure_defence
from vitrap.experiment.plan import Plan, make_plan, training_steps
from vitrap.experiment.progress import Steps, silent
from vitrap.experiment.record import Record, Table, to_table
from vitrap.experiment.records import read_record
from vitrap.experiment.rows import Row, ScreenRow, lacks_scores, row_settings
from vitrap.experiment.scores import Scores, drop_unnamed, scores_file, write_scores
from vitrap.experiment.spec import digest, parse_defence, parse_spec
from vitrap.experiment.stages import Retraining, carries, make_clean, make_retrained, read_stream
from vitrap.experiment.store import Stage, Store, locked
from vitrap.experiment.streams import stream
from vitrap.experiment.trigger_file import read_fitted
from vitrap.files import write_json
from vitrap.train.arithmetic import Arithmetic

SAME_ASR = 0.01
"""By how much the ASR measured again may differ from the record's."""


def defend(  # noqa: PLR0913 - a front door: its parameters are the options
    folder: str | Path,
    defences: Sequence[Named],
    *,
    device: str = "auto",
    steps: Steps = silent,
    model: nn.Module | None = None,
    world: World | None = None,
) -> Record:
    """Try defences on a finished run and add what they do to its record, each as soon as it is measured.

    What the record says already is not measured again. Killed at any moment, the record is whole.

    Args:
        folder: the run's.
        defences: which, with their settings: `load_defence("strip", ["overlays=50"])`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        steps: how to show what is under way.
        model: where the run's victim was a network from outside, that network.
        world: where its data were from outside, those.

    Raises:
        UserError: the folder holds no finished run, its data or twin are no longer there, or a defence does not suit
            the model. The record is as it was.
    """
    folder = Path(folder)
    record = read_record(folder)
    missing = unmeasured(record, defences, folder)
    if not missing:
        return record
    spec = replace(parse_spec(record.spec), name=record.name, defences=missing)
    spec = replace(spec, recipe=replace(spec.recipe, precision=record.precision))
    plan = make_plan(spec, device, model, world, steps, attacking=False)  # the trigger is there
    if record.environment.device_kind == plan.device.type:
        plan = replace(plan, arithmetic=recorded(record, plan.arithmetic))
    found, wanted = plan.world.fingerprint, record.data.fingerprint
    if found != wanted:
        raise UserError(
            f"the data of run {str(folder)!r} are not here: {plan.world.name!r} has fingerprint {found[:12]}, the"
            f" record says {wanted[:12]}; bring them back, or hand them in as world=..."
        )
    return add_defences(Finished(folder, record, plan, steps))


def recorded(record: Record, usual: Arithmetic) -> Arithmetic:
    """How the models of a run compute; as is usual, where the record is too old to say."""
    attention = usual.attention if record.attention == "" else record.attention
    return replace(usual, attention=attention, compiled=record.compiled)


def unmeasured(record: Record, defences: Sequence[Named], folder: Path) -> tuple[Named, ...]:
    """Those that the record has no row of, one that rests on other code than today's, or one whose scores are gone."""
    missing = {}
    for defence in defences:
        row = find_row(record, defence)
        if row is None or lacks_scores(row, folder):
            missing[row_key(record, defence)] = defence
    return tuple(missing.values())


def find_row(record: Record, defence: Named) -> Row | None:
    """What the record says of a defence with these very settings, by today's code; None if it says nothing."""
    key = row_key(record, defence)
    return next((row for row in record.defences if row.key == key), None)


def row_key(record: Record, defence: Named) -> str:
    """A hash of all that a row rests on: victim, twin, the defence's settings, version and code."""
    models = {name: key for name, key in record.stages.items() if name != "measure"}
    attack = inspect.getfile(registry.get("attacks", record.spec["attack"]["name"]))
    code = {"defence": defence_code(defence.method), "attack": code_digest(attack)}
    depends = {"defence": defence.table(), "version": defence.method.version, "code": code}
    return Stage("defence", {**models, **depends}).key


def defence_code(defence: Any) -> str:
    """A digest of the code that a defence and its measuring use."""
    return defending_code(inspect.getfile(type(defence)))


def still_holding(rows: Sequence[Row], record: Record) -> tuple[Row, ...]:
    """Of an earlier record's rows, those that rest on the models of `record` and on today's code."""
    kept = []
    for row in rows:
        with suppress(UserError):  # a defence or a setting that is no longer known
            if row.key == row_key(record, parse_defence({"name": row.name, **row_settings(row)})):
                kept.append(row)
    return tuple(kept)


@dataclass(frozen=True)
class Finished:
    """A finished run and the plan that it came from, whose defences are to be measured."""

    folder: Path
    record: Record
    plan: Plan
    steps: Steps

    def case(self) -> Case:
        """Victim, twin, trigger and data, ready."""
        plan, seed = self.plan, self.plan.spec.seed
        # Read what the run trained.
        victim = plan.victim.read(self.folder / "model.safetensors", plan.device)
        twin = plan.victim.read(self._twin() / "model.safetensors", plan.device)
        # Read the trigger that it made, and have the attack say how that gets into a training set.
        attack, train = plan.spec.attack, plan.world.train
        fitted = read_fitted(self.folder, attack, device=plan.device)
        if fitted.trigger is None:
            place = self.folder / "trigger.safetensors"
            raise UserError(f"trigger file {str(place)!r} is missing or damaged; run its spec again")
        other = plan.other.train if plan.other else None
        implant = attack.implant(Access(train, None, read_stream(self.folder, seed), other=other), fitted)
        return Case(
            victim,
            twin,
            trigger=fitted.trigger,
            goal=attack.goal_for(train.n_classes),
            poison=partial(stored_set, implant, train, seed),
            world=plan.world,
            seed=seed,
            arithmetic=plan.arithmetic,
            retrain=Retraining(plan.victim, plan.spec.recipe, seed, plan.device, plan.arithmetic, self.steps),
            train_kept=self._train_kept,
            remember=self._remember,
        )

    def check(self, case: Case) -> None:
        """Refuse a run whose trigger no longer does what it did, since an attack's code may have changed since.

        Raises:
            UserError: the ASR is not the record's, give or take what another device's rounding may do.
        """
        found, wanted = case.before.asr.value, self.record.victim.asr.value
        if abs(found - wanted) > SAME_ASR:
            raise UserError(
                f"the trigger of run {str(self.folder)!r} has an ASR of {found:.4f}, and the record says {wanted:.4f}:"
                " its attack's code has changed since; run its spec again"
            )

    def _twin(self) -> Path:
        """The twin's stage, made anew if it was deleted and would come out the same."""
        key, stage = self.record.stages["twin"], self.plan.twin_stage()
        place = self._store.root / "stages" / f"clean-{key}"
        if place.exists():
            return place
        if stage.key != key:
            raise UserError(
                f"the clean twin of run {str(self.folder)!r} is gone ({str(place)!r}), and code, data or libraries have"
                " changed since; run its spec again"
            )
        show = self.steps("train the twin", training_steps(self.plan.spec, len(self.plan.world.train)))
        return self._store.stage(stage, partial(make_clean, self.plan, self.plan.victim, self.plan.spec.seed, show))

    def _train_kept(self, kept: ImageSet) -> nn.Module:
        """The victim's network, trained on what a filter kept: a stage."""
        plan = self.plan
        depends: dict[str, Any] = {
            **plan.twin_stage().depends,
            "victim": self.record.stages["victim"],
            "kept": digest(kept.index.tolist()),
            "code": training_code(inspect.getfile(type(plan.spec.attack))),
        }
        steps = training_steps(plan.spec, len(kept))
        make = partial(make_retrained, plan, kept, self.steps("train without what was flagged", steps))
        place = self._store.stage(Stage("retrained", depends), make)
        return plan.victim.read(place / "model.safetensors", plan.device)

    def _remember(self, asked: Named, kind: type[Facts], find: Callable[[], Facts]) -> Facts:
        """A stage of what a defence makes of the twin, which other attacks' runs share."""
        depends = {
            "twin": self.record.stages["twin"],
            "defence": asked.table(),
            "version": asked.method.version,
            "seed": self.plan.spec.seed,
            "device": self.plan.device.type,
            "arithmetic": asdict(self.plan.arithmetic),
            "code": defence_code(asked.method),
        }

        def make(folder: Path) -> None:
            write_json(folder / "facts.json", to_table(find()))

        place = self._store.stage(Stage("defended", depends), make)
        return TypeAdapter(kind).validate_json((place / "facts.json").read_bytes(), strict=True)

    @property
    def _store(self) -> Store:
        return Store(self.folder.parent, lambda name: self.steps(name, None))


def stored_set(implant: Implant, train: ImageSet, seed: int) -> ImageSet:
    """The training set as it is stored for a victim: as it was, where nothing stored is poisoned."""
    return train if implant.poison is None else implant.poison(train, stream(seed, "poison"))


def add_defences(run: Finished) -> Record:
    """Measure the plan's defences that the record lacks, one after the other, each written as soon as it is known."""
    record, missing = run.record, unmeasured(run.record, run.plan.spec.defences, run.folder)
    if not missing:
        return record
    case = run.case()
    with run.steps("measure the victim", None):
        run.check(case)
    for asked in missing:
        with run.steps(f"defend with {asked.name}", None) as tick:
            row, scores = measure_defence(asked, case, tick)
        record = add_row(run.folder, replace(row, key=row_key(record, asked)), scores)
    return record


def add_row(folder: Path, row: Row, scores: Scores | None = None) -> Record:
    """Put a row into the record of a run, in place of one of the same defence with the same settings.

    A screen's scores are in the run's folder before the row is.
    """
    with locked(folder.parent, f"{folder.name}-record"):
        record = read_record(folder)  # anew: another process may have added a row
        if scores is not None:
            assert isinstance(row, ScreenRow)
            row = replace(row, scores=scores_file(row.name, row.key))
            write_scores(folder, row, scores, carries(parse_spec(record.spec), "scores"))
        others = [other for other in record.defences if identity(other) != identity(row)]
        record = replace(record, defences=(*others, row))
        record.write(folder)
        drop_unnamed(folder, record.defences)  # of rows that were replaced, or went with an earlier record
    return record


def identity(row: Row) -> tuple[str, Table]:
    """What tells rows of a record apart: the defence's name and all settings."""
    return row.name, row_settings(row)
