"""Measuring what a defence makes of a victim, beside what it makes of the clean twin. Nothing here chooses anything.

The defender sees a `Suspect`; trigger, goal, mask and test set stay on this side.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vitrap.contracts import (
    Flagged,
    Goal,
    ImageSet,
    Judged,
    Outcome,
    OutcomeKind,
    Repaired,
    Retrain,
    Screen,
    Suspect,
    Trigger,
)
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.experiment.named import Named
from vitrap.experiment.predict import BATCH, every_row, predict, spread, timed, triggered
from vitrap.experiment.record import to_table
from vitrap.experiment.rows import FilterRow, JudgementRow, RepairRow, Row, ScreenRow, Verdict
from vitrap.experiment.scores import ByKind, Scores
from vitrap.experiment.streams import stream
from vitrap.metrics.accuracy import attack_success, clean_accuracy, robust_accuracy
from vitrap.metrics.detection import above, auroc, defence_effectiveness, threshold_at
from vitrap.metrics.interval import rate
from vitrap.metrics.values import Rate, Rates
from vitrap.train.arithmetic import Arithmetic

KINDS: dict[OutcomeKind, type[Outcome]] = {
    "screen": Screen,
    "repair": Repaired,
    "filter": Flagged,
    "judgement": Judged,
}
FPRS = (0.01, 0.05, 0.10)
Table = dict[str, Any]
Seconds = dict[str, float]
Tick = Callable[[], None]
Facts = TypeVar("Facts")
Made = TypeVar("Made", bound=Outcome)


@dataclass(frozen=True)
class TwinAccuracy:
    """The clean twin's accuracy before and after its repair."""

    before: Rate
    after: Rate


@runtime_checkable
class Remember(Protocol):
    """Gives the facts of a defence on the clean twin: those that another attack's run kept, or what `find` yields."""

    def __call__(self, asked: Named, kind: type[Facts], find: Callable[[], Facts]) -> Facts:
        """The facts, of the dataclass `kind`."""
        ...


def remember_nothing(asked: Named, kind: type[Facts], find: Callable[[], Facts]) -> Facts:
    """Find the facts anew."""
    return find()


@dataclass(frozen=True)
class Case:
    """A victim and its clean twin, with all it takes to measure a defence on them.

    Attributes:
        victim: the backdoored model, ready.
        twin: the clean one, ready.
        trigger: what is done to an image at test time.
        goal: what triggered images should be classified as.
        poison: makes the training set as it is stored for the victim: the clean one where nothing stored is poisoned.
        world: the data.
        seed: the run's.
        arithmetic: how victim and twin compute.
        retrain: what a defender trains the network anew with.
        train_kept: trains the network on what a filter kept.
        remember: keeps what does not depend on the attack.
    """

    victim: nn.Module
    twin: nn.Module
    trigger: Trigger
    goal: Goal
    poison: Callable[[], ImageSet]
    world: World
    seed: int
    arithmetic: Arithmetic
    retrain: Retrain
    train_kept: Callable[[ImageSet], nn.Module]
    remember: Remember = remember_nothing

    @cached_property
    def poisoned(self) -> ImageSet:
        """The victim's training set, with its mask."""
        return self.poison()

    @cached_property
    def attacked(self) -> ImageSet:
        """The whole test set, triggered."""
        return triggered(self.world.test, self.trigger)

    @cached_property
    def before(self) -> Rates:
        """The victim as it is."""
        return self.rates(self.victim, lambda: None)

    def suspect(self, model: nn.Module, train: ImageSet | None, name: str) -> Suspect:
        """What the defender `name` sees; its random stream is the same for victim and twin."""
        return Suspect(
            model,
            clean=self.world.clean,
            n_classes=self.world.train.n_classes,
            generator=stream(self.seed, f"defence {name}"),
            train=train,
            compute=self.arithmetic,
            retrain=None if train is None else self.retrain,
        )

    def rates(self, model: nn.Module, tick: Tick) -> Rates:
        """CDA, ASR and RA of a model, on the whole test set."""
        true = self.world.test.labels
        clean = predict(model, self.world.test, self.arithmetic, tick)
        fired = predict(model, self.attacked, self.arithmetic, tick)
        return Rates(
            cda=clean_accuracy(clean, true),
            asr=attack_success(fired, true, self.goal),
            ra=robust_accuracy(fired, true, self.goal),
        )


def measure_defence(asked: Named, case: Case, tick: Tick) -> tuple[Row, Scores | None]:
    """One row of a record: what a defence is, what it took, and what it makes of victim and twin; a screen's scores."""
    defence = asked.method
    seconds: Seconds = {}
    # Apply it to the victim: the row states how long this takes.
    train = case.poisoned.unmarked() if defence.needs_train else None
    with timed(seconds, "apply"):
        outcome = checked(asked, defence.apply(case.suspect(case.victim, train, asked.name)))
    tick()
    about = {
        "name": asked.name,
        "params": to_table(defence),
        "version": defence.version,
        "seconds": seconds,
        "layer": outcome.layer,
        "report": dict(outcome.report),
    }
    # Apply it to the clean twin, and measure both.
    if isinstance(outcome, Screen):
        return measure_screen(about, outcome, apply_to_twin(asked, Screen, case, tick), case, asked.screened, tick)
    if isinstance(outcome, Flagged):
        return measure_filter(about, outcome, apply_to_twin(asked, Flagged, case, tick), case, tick), None
    # What a repair or a judgement makes of the twin does not depend on the attack.
    if isinstance(outcome, Repaired):

        def repaired_twin() -> TwinAccuracy:
            return repair_facts(apply_to_twin(asked, Repaired, case, tick), case, tick)

        return measure_repair(about, outcome, case.remember(asked, TwinAccuracy, repaired_twin), case, tick), None

    def judged_twin() -> Verdict:
        return judge(apply_to_twin(asked, Judged, case, tick))

    return measure_judgement(about, outcome, case.remember(asked, Verdict, judged_twin), case), None


def apply_to_twin(asked: Named, kind: type[Made], case: Case, tick: Tick) -> Made:
    """What the defence makes of the clean twin, with the same random stream as of the victim."""
    train = case.world.train if asked.method.needs_train else None
    outcome = checked(asked, asked.method.apply(case.suspect(case.twin, train, asked.name)))
    tick()
    assert isinstance(outcome, kind)
    return outcome


def checked(asked: Named, outcome: Screen | Repaired | Flagged | Judged) -> Screen | Repaired | Flagged | Judged:
    """The outcome, if it is of the kind that the defence says, and a judgement in finite numbers.

    Raises:
        UserError: it is not.
    """
    wanted = KINDS[asked.method.kind]
    if not isinstance(outcome, wanted):
        raise UserError(
            f"defence {asked.name} calls itself a {asked.method.kind} and came to a {type(outcome).__name__}, not to a"
            f" {wanted.__name__}; mend its kind"
        )
    if isinstance(outcome, Judged):
        numbers = [outcome.score, *([] if outcome.by_class is None else outcome.by_class.tolist())]
        if not all(map(math.isfinite, numbers)):
            raise UserError(f"defence {asked.name} judges by a score that is no finite number; it says nothing here")
    return outcome


def measure_screen(  # noqa: PLR0913 - both outcomes, and what they are measured with
    about: Table, on_victim: Screen, on_twin: Screen, case: Case, screened: int, tick: Tick
) -> tuple[ScreenRow, Scores]:
    """Score held-out, clean and triggered images for victim and twin; AUROC, and TPR and FPR at held-out thresholds."""
    test, held_out = case.world.test, case.world.threshold
    # Choose the images of each kind, spread evenly over all there are.
    counting = case.goal.counts(test.labels).nonzero().squeeze(1)
    chosen = [spread(some, screened) for some in (every_row(held_out), every_row(test), counting)]
    rows = ByKind(*chosen)
    # Score them.
    with timed(about["seconds"], "score"):
        victims = score_kinds(on_victim, case.victim, case, rows, tick)
    twins = score_kinds(on_twin, case.twin, case, rows, tick)
    # See which of the triggered ones the victim falls for.
    said = predict(case.victim, case.attacked.take(rows.triggered), case.arithmetic)
    hits = said == case.goal.labels(test.labels[rows.triggered])
    index = ByKind(held_out.index[rows.held_out].cpu(), test.index[rows.clean].cpu(), test.index[rows.triggered].cpu())
    scores = Scores(victims, twins, index, hits.cpu())
    return screen_row({**about, "screened": screened}, scores), scores


def screen_row(about: Table, scores: Scores) -> ScreenRow:
    """A screen's row, of its scores alone."""
    held, clean, fired = scores.victim.held_out, scores.victim.clean, scores.victim.triggered
    hits = fired[scores.hits]
    # Thresholds come from held-out images, for victim and twin each from its own.
    cuts = {f"{fpr:.2f}": threshold_at(held, fpr) for fpr in FPRS}
    twin_cuts = {f"{fpr:.2f}": threshold_at(scores.twin.held_out, fpr) for fpr in FPRS}
    return ScreenRow(
        **about,
        auroc=auroc(fired, clean),
        tpr_at_fpr={fpr: rate(above(fired, cut)) for fpr, cut in cuts.items()},
        tied_at_fpr={fpr: rate(fired.double() == cut) for fpr, cut in cuts.items()},
        fpr_on_test={fpr: rate(above(clean, cut)) for fpr, cut in cuts.items()},
        auroc_on_hits=auroc(hits, clean),
        tpr_at_fpr_on_hits={fpr: rate(above(hits, cut)) for fpr, cut in cuts.items()},
        auroc_clean_model=auroc(scores.twin.triggered, scores.twin.clean),
        fpr_on_clean_model={fpr: rate(above(scores.twin.clean, cut)) for fpr, cut in twin_cuts.items()},
        n_threshold=len(held),
    )


@torch.no_grad()
def score_kinds(screen: Screen, model: nn.Module, case: Case, rows: ByKind, tick: Tick) -> ByKind:
    """The screen's scores of the chosen images of each kind, computed as `model` computes; on the CPU."""
    with case.arithmetic(model, case.world.test.device):
        return ByKind(
            score_images(screen, case.world.threshold, rows.held_out, tick),
            score_images(screen, case.world.test, rows.clean, tick),
            score_images(screen, case.attacked, rows.triggered, tick),
        )


def score_images(screen: Screen, data: ImageSet, rows: Int64[Tensor, " k"], tick: Tick) -> Float[Tensor, " k"]:
    """The screen's scores of some images of a set."""
    found = []
    for some in rows.split(BATCH):
        found.append(screen.score(data.images(some)).float())
        tick()
    return torch.cat(found).cpu()


def measure_repair(about: Table, on_victim: Repaired, on_twin: TwinAccuracy, case: Case, tick: Tick) -> RepairRow:
    """CDA, ASR and RA before and after, DER, and what the repair costs a clean model."""
    # The victim as it was,
    before = case.before
    # and repaired.
    with timed(about["seconds"], "predict"):
        after = case.rates(on_victim.model, tick)
    return RepairRow(
        **about,
        **vars(after),
        before=before,
        der=defence_effectiveness(before.asr.value, after.asr.value, before.cda.value, after.cda.value),
        cda_clean_model=on_twin.after,
        cda_clean_model_before=on_twin.before,
    )


def repair_facts(on_twin: Repaired, case: Case, tick: Tick) -> TwinAccuracy:
    """The clean twin's accuracy before and after its repair."""
    true = case.world.test.labels
    before = clean_accuracy(predict(case.twin, case.world.test, case.arithmetic, tick), true)
    after = clean_accuracy(predict(on_twin.model, case.world.test, case.arithmetic, tick), true)
    return TwinAccuracy(before, after)


def measure_filter(about: Table, on_victim: Flagged, on_twin: Flagged, case: Case, tick: Tick) -> FilterRow:
    """AUROC, TPR and FPR against the true mask; CDA, ASR and RA after training without what was flagged."""
    # Compare scores and flags with the mask: covers count as no poison, and there may be no poison at all.
    mask = case.poisoned.poisoned
    if on_victim.flagged.all():
        raise UserError(f"all {len(mask)} training images are flagged, and none is left to train on; flag fewer")
    area = auroc(on_victim.score[mask].float(), on_victim.score[~mask].float())
    # Train the network on what is left, and see how much of the backdoor that one has.
    kept = case.poisoned.take((~on_victim.flagged).nonzero().squeeze(1))
    with timed(about["seconds"], "retrain"):
        retrained = case.train_kept(kept)
    after = case.rates(retrained, tick)
    return FilterRow(
        **about,
        auroc=area,
        tpr=rate(on_victim.flagged[mask]),
        fpr=rate(on_victim.flagged[~mask]),
        n_flagged=int(on_victim.flagged.sum()),
        cda_retrained=after.cda,
        asr_retrained=after.asr,
        ra_retrained=after.ra,
        fpr_on_clean_model=rate(on_twin.flagged),
    )


def measure_judgement(about: Table, on_victim: Judged, on_twin: Verdict, case: Case) -> JudgementRow:
    """The score of victim and clean twin, whether each is above the paper's threshold, and the classes suspected."""
    verdict = judge(on_victim)
    # The classes that the goal leads to. All-to-all leads to every class, and any suspicion would be right.
    true = torch.arange(case.world.test.n_classes)
    wanted = set(case.goal.labels(true[case.goal.counts(true)]).tolist())
    right = None if len(wanted) == len(true) else verdict.suspected in wanted
    twins = {f"{key}_clean_model": value for key, value in vars(on_twin).items()}
    return JudgementRow(**about, **vars(verdict), threshold=on_victim.threshold, suspects_target=right, **twins)


def judge(judged: Judged) -> Verdict:
    """What a judgement says of one model."""
    return Verdict(
        judged.score,
        judged.score > judged.threshold,
        judged.suspected[0] if judged.suspected else None,
        tuple(judged.suspected),
        None if judged.by_class is None else tuple(judged.by_class.tolist()),
    )
