"""Measures a defence: applies it to victim and clean twin, and compares its outcomes with the truth.

The defence itself sees a `Suspect` only. Trigger, goal, mask and test set stay with `Evaluation`, and nothing here
chooses anything. `measure_defence` makes the row of the record; there is one `measure_` function for each kind.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar, runtime_checkable

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
from vitrap.experiment.defence_rows import FilterRow, JudgementRow, RepairRow, Row, ScreenRow, Verdict
from vitrap.experiment.defence_spec import DefenceSpec
from vitrap.experiment.predict import BATCH, every_row, predict, spread, timed, triggered
from vitrap.experiment.record import to_table
from vitrap.experiment.scores import ByKind, Scores
from vitrap.experiment.streams import stream
from vitrap.formats import Table
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
"""False positive rates at which a screen's true positive rate is measured."""
Seconds = dict[str, float]
Tick = Callable[[], None]
Result = TypeVar("Result")
Made = TypeVar("Made", bound=Outcome)


@dataclass(frozen=True)
class TwinAccuracy:
    """The clean twin's accuracy before and after its repair."""

    before: Rate
    after: Rate


@runtime_checkable
class TwinCache(Protocol):
    """Returns what a defence makes of the clean twin, which does not depend on the attack.

    It may come from a store, where the run of another attack has left it; else `measure` is called.
    """

    def __call__(self, defence: DefenceSpec, kind: type[Result], measure: Callable[[], Result]) -> Result:
        """The result, an instance of the dataclass `kind`."""
        ...


def measure_each_time(defence: DefenceSpec, kind: type[Result], measure: Callable[[], Result]) -> Result:
    """Measure the result, and store nothing."""
    return measure()


@dataclass(frozen=True)
class Evaluation:
    """A victim and its clean twin in memory, with the truth by which a defence on them is measured.

    Attributes:
        victim: the backdoored model, frozen and in evaluation mode.
        twin: the clean model, likewise.
        trigger: fires at test time.
        goal: which label triggered images should get.
        poison: returns the training set as stored for the victim; the clean one where the attack stores no poison.
        world: the data.
        seed: the run's seed.
        arithmetic: how victim and twin compute.
        retrain: trains the network again for a defender.
        train_on_kept: trains the network on what a filter kept.
        result_on_twin: returns what a defence makes of the twin, if possible without measuring it again.
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
    train_on_kept: Callable[[ImageSet], nn.Module]
    result_on_twin: TwinCache = measure_each_time

    @cached_property
    def poisoned(self) -> ImageSet:
        """The victim's training set, with the mask of its poison."""
        return self.poison()

    @cached_property
    def attacked(self) -> ImageSet:
        """The whole test set, triggered."""
        return triggered(self.world.test, self.trigger)

    @cached_property
    def before(self) -> Rates:
        """CDA, ASR and RA of the victim before any defence."""
        return self.rates(self.victim, lambda: None)

    def suspect(self, model: nn.Module, train: ImageSet | None, name: str) -> Suspect:
        """What the defence `name` sees of a model; its random stream is the same for victim and twin."""
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


def measure_defence(defence: DefenceSpec, evaluation: Evaluation, tick: Tick) -> tuple[Row, Scores | None]:
    """The row of a defence in the record and, of a screen, its scores of single images."""
    method = defence.method
    seconds: Seconds = {}
    # Apply it to the victim, and take the time. A training set is shown without the mask of its poison.
    train = evaluation.poisoned.unmarked() if method.needs_train else None
    with timed(seconds, "apply"):
        outcome = checked(defence, method.apply(evaluation.suspect(evaluation.victim, train, defence.name)))
    tick()
    # What the rows of all kinds begin with; measuring adds the seconds of its own steps.
    about = {
        "name": defence.name,
        "params": to_table(method),
        "version": method.version,
        "seconds": seconds,
        "layer": outcome.layer,
        "report": dict(outcome.report),
    }
    # Apply it to the clean twin, too, and measure both outcomes as their kind asks.
    if isinstance(outcome, Screen):
        screened_twin = apply_to_twin(defence, Screen, evaluation, tick)
        return measure_screen(about, outcome, screened_twin, evaluation, defence.screened, tick)
    if isinstance(outcome, Flagged):
        filtered_twin = apply_to_twin(defence, Flagged, evaluation, tick)
        return measure_filter(about, outcome, filtered_twin, evaluation, tick), None
    # What a repair or a judgement makes of the twin does not depend on the attack. The functions below are called only
    # if no earlier run has stored it.
    if isinstance(outcome, Repaired):

        def repair_twin() -> TwinAccuracy:
            return twin_accuracy(apply_to_twin(defence, Repaired, evaluation, tick), evaluation, tick)

        accuracy = evaluation.result_on_twin(defence, TwinAccuracy, repair_twin)
        return measure_repair(about, outcome, accuracy, evaluation, tick), None

    def judge_twin() -> Verdict:
        return judge(apply_to_twin(defence, Judged, evaluation, tick))

    verdict = evaluation.result_on_twin(defence, Verdict, judge_twin)
    return measure_judgement(about, outcome, verdict, evaluation), None


def apply_to_twin(defence: DefenceSpec, kind: type[Made], evaluation: Evaluation, tick: Tick) -> Made:
    """The defence's outcome for the clean twin, with the same random stream as for the victim."""
    train = evaluation.world.train if defence.method.needs_train else None
    outcome = checked(defence, defence.method.apply(evaluation.suspect(evaluation.twin, train, defence.name)))
    tick()
    assert isinstance(outcome, kind)
    return outcome


def checked(
    defence: DefenceSpec, outcome: Screen | Repaired | Flagged | Judged
) -> Screen | Repaired | Flagged | Judged:
    """The outcome, if it is of the kind that the defence announces and its scores are finite.

    Raises:
        UserError: it is not.
    """
    wanted = KINDS[defence.method.kind]
    if not isinstance(outcome, wanted):
        raise UserError(
            f"defence {defence.name} calls itself a {defence.method.kind} and came to a {type(outcome).__name__}, not"
            f" to a {wanted.__name__}; mend its kind"
        )
    if isinstance(outcome, Judged):
        check_scores(defence.name, torch.tensor(outcome.score), outcome.by_class)
    if isinstance(outcome, Flagged):
        check_scores(defence.name, outcome.score)
    return outcome


def check_scores(name: str, *scores: Tensor | None) -> None:
    """Refuse scores of the defence `name` of which one is not finite; None is passed over.

    Raises:
        UserError: one is not.
    """
    if not all(some.isfinite().all() for some in scores if some is not None):
        raise UserError(f"defence {name} came to a score that is no finite number; it says nothing of this model")


def measure_screen(  # noqa: PLR0913 - both outcomes, and what they are measured with
    about: Table, on_victim: Screen, on_twin: Screen, evaluation: Evaluation, screened: int, tick: Tick
) -> tuple[ScreenRow, Scores]:
    """Score held-out, clean and triggered images, and measure AUROC, and TPR and FPR at held-out thresholds."""
    test = evaluation.world.test
    held_out = evaluation.world.threshold
    # Choose the images of each kind, spread evenly over all there are.
    counting = evaluation.goal.counts(test.labels).nonzero().squeeze(1)
    chosen = [spread(some, screened) for some in (every_row(held_out), every_row(test), counting)]
    rows = ByKind(*chosen)
    # Score them, the victim's with its own screen and the twin's with the one that was fitted to the twin.
    with timed(about["seconds"], "score"):
        victims = score_kinds(on_victim, evaluation.victim, evaluation, rows, tick)
    twins = score_kinds(on_twin, evaluation.twin, evaluation, rows, tick)
    check_scores(about["name"], *vars(victims).values(), *vars(twins).values())
    # A triggered image is a hit if the victim gives it the label that the attacker wants.
    predicted = predict(evaluation.victim, evaluation.attacked.take(rows.triggered), evaluation.arithmetic)
    hits = predicted == evaluation.goal.labels(test.labels[rows.triggered])
    # The scores are kept with each image's position in its data set, so that other screens can be paired with them.
    index = ByKind(held_out.index[rows.held_out].cpu(), test.index[rows.clean].cpu(), test.index[rows.triggered].cpu())
    scores = Scores(victims, twins, index, hits.cpu())
    return screen_row({**about, "screened": screened}, scores), scores


def screen_row(about: Table, scores: Scores) -> ScreenRow:
    """A screen's row, computed from its scores alone."""
    held_out, clean, fired = scores.victim.held_out, scores.victim.clean, scores.victim.triggered
    hits = fired[scores.hits]
    # Thresholds come from the scores of held-out images: the victim's from the victim's, the twin's from the twin's.
    thresholds = {f"{fpr:.2f}": threshold_at(held_out, fpr) for fpr in FPRS}
    twin_thresholds = {f"{fpr:.2f}": threshold_at(scores.twin.held_out, fpr) for fpr in FPRS}
    return ScreenRow(
        **about,
        auroc=auroc(fired, clean),
        tpr_at_fpr={fpr: rate(above(fired, t)) for fpr, t in thresholds.items()},
        tied_at_fpr={fpr: rate(fired.double() == t) for fpr, t in thresholds.items()},
        fpr_on_test={fpr: rate(above(clean, t)) for fpr, t in thresholds.items()},
        auroc_on_hits=auroc(hits, clean),
        tpr_at_fpr_on_hits={fpr: rate(above(hits, t)) for fpr, t in thresholds.items()},
        auroc_clean_model=auroc(scores.twin.triggered, scores.twin.clean),
        fpr_on_clean_model={fpr: rate(above(scores.twin.clean, t)) for fpr, t in twin_thresholds.items()},
        n_threshold=len(held_out),
    )


@torch.no_grad()
def score_kinds(screen: Screen, model: nn.Module, evaluation: Evaluation, rows: ByKind, tick: Tick) -> ByKind:
    """The screen's scores of the chosen images of each kind, computed as `model` computes; on the CPU."""
    with evaluation.arithmetic(model, evaluation.world.test.device):
        return ByKind(
            score_images(screen, evaluation.world.threshold, rows.held_out, tick),
            score_images(screen, evaluation.world.test, rows.clean, tick),
            score_images(screen, evaluation.attacked, rows.triggered, tick),
        )


def score_images(screen: Screen, data: ImageSet, rows: Int64[Tensor, " k"], tick: Tick) -> Float[Tensor, " k"]:
    """The screen's scores of some images of a set."""
    found = []
    for some in rows.split(BATCH):
        found.append(screen.score(data.images(some)).float())
        tick()
    return torch.cat(found).cpu()


def measure_repair(
    about: Table, on_victim: Repaired, on_twin: TwinAccuracy, evaluation: Evaluation, tick: Tick
) -> RepairRow:
    """CDA, ASR and RA of the victim before and after its repair, DER, and the clean twin's accuracy likewise."""
    before = evaluation.before
    with timed(about["seconds"], "predict"):
        after = evaluation.rates(on_victim.model, tick)
    return RepairRow(
        **about,
        **vars(after),
        before=before,
        der=defence_effectiveness(before.asr.value, after.asr.value, before.cda.value, after.cda.value),
        cda_clean_model=on_twin.after,
        cda_clean_model_before=on_twin.before,
    )


def twin_accuracy(on_twin: Repaired, evaluation: Evaluation, tick: Tick) -> TwinAccuracy:
    """The clean twin's accuracy before and after its repair."""
    true = evaluation.world.test.labels
    before = clean_accuracy(predict(evaluation.twin, evaluation.world.test, evaluation.arithmetic, tick), true)
    after = clean_accuracy(predict(on_twin.model, evaluation.world.test, evaluation.arithmetic, tick), true)
    return TwinAccuracy(before, after)


def measure_filter(about: Table, on_victim: Flagged, on_twin: Flagged, evaluation: Evaluation, tick: Tick) -> FilterRow:
    """AUROC, TPR and FPR against the true mask, and CDA, ASR and RA after training without the flagged images."""
    # Compare scores and flags with the mask. Covers count as clean, and there may be no poison at all.
    mask = evaluation.poisoned.poisoned
    if on_victim.flagged.all():
        raise UserError(f"all {len(mask)} training images are flagged, and none is left to train on; flag fewer")
    area = auroc(on_victim.score[mask].float(), on_victim.score[~mask].float())
    # Train the network on the images that are left, and measure how much of the backdoor it has.
    kept = evaluation.poisoned.take((~on_victim.flagged).nonzero().squeeze(1))
    with timed(about["seconds"], "retrain"):
        retrained = evaluation.train_on_kept(kept)
    after = evaluation.rates(retrained, tick)
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


def measure_judgement(about: Table, on_victim: Judged, on_twin: Verdict, evaluation: Evaluation) -> JudgementRow:
    """The verdicts on victim and clean twin, and whether the suspected class is one that the attacker wants."""
    verdict = judge(on_victim)
    # The classes that the goal leads to. All-to-all leads to every class, and any suspicion would be right.
    true = torch.arange(evaluation.world.test.n_classes)
    wanted = set(evaluation.goal.labels(true[evaluation.goal.counts(true)]).tolist())
    right = None if len(wanted) == len(true) else verdict.suspected in wanted
    twins = {f"{key}_clean_model": value for key, value in vars(on_twin).items()}
    return JudgementRow(**about, **vars(verdict), threshold=on_victim.threshold, suspects_target=right, **twins)


def judge(judged: Judged) -> Verdict:
    """The verdict on one model: whether its score is above the threshold, and which classes are suspected."""
    return Verdict(
        judged.score,
        judged.score > judged.threshold,
        judged.suspected[0] if judged.suspected else None,
        tuple(judged.suspected),
        None if judged.by_class is None else tuple(judged.by_class.tolist()),
    )
