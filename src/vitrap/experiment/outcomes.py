"""Measuring what a defence makes of a victim, beside what it makes of the clean twin. Nothing here chooses anything.

The defender sees a `Suspect`; trigger, goal, mask and test set stay on this side.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

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
from vitrap.experiment.scores import ByKind, Scores
from vitrap.experiment.streams import stream
from vitrap.metrics.accuracy import attack_success, clean_accuracy, robust_accuracy
from vitrap.metrics.detection import above, auroc, defence_effectiveness, threshold_at
from vitrap.metrics.interval import rate
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
Remember = Callable[[Named, Callable[[], Table]], Table]
"""The facts of a defence on the clean twin: those that another attack's run kept, or what the call now yields."""


def remember_nothing(asked: Named, find: Callable[[], Table]) -> Table:
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
    def before(self) -> tuple[Table, Table, Table]:
        """CDA, ASR and RA of the victim as it is."""
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

    def rates(self, model: nn.Module, tick: Tick) -> tuple[Table, Table, Table]:
        """CDA, ASR and RA of a model, on the whole test set."""
        true = self.world.test.labels
        clean = predict(model, self.world.test, self.arithmetic, tick)
        fired = predict(model, self.attacked, self.arithmetic, tick)
        cda = clean_accuracy(clean, true)
        asr = attack_success(fired, true, self.goal)
        ra = robust_accuracy(fired, true, self.goal)
        return asdict(cda), asdict(asr), asdict(ra)


def measure_defence(asked: Named, case: Case, tick: Tick) -> tuple[Table, Scores | None]:
    """One row of a record: what a defence is, what it took, and what it makes of victim and twin; a screen's scores."""
    defence = asked.method
    seconds: Seconds = {}
    # Apply it to the victim: the row states how long this takes.
    train = case.poisoned.unmarked() if defence.needs_train else None
    with timed(seconds, "apply"):
        outcome = checked(asked, defence.apply(case.suspect(case.victim, train, asked.name)))
    tick()
    # Apply it to the clean twin. A repair or a judgement comes to the same there whatever the attack was.
    on_twin: Any
    if find := TWIN_FACTS.get(defence.kind):
        on_twin = case.remember(asked, lambda: find(apply_to_twin(asked, case, tick), case, tick))
    else:
        on_twin = apply_to_twin(asked, case, tick)
    # Measure both.
    if isinstance(outcome, Screen):
        found, scores = measure_screen(outcome, on_twin, case, asked.screened, seconds, tick)
    else:
        found, scores = MEASURES[defence.kind](outcome, on_twin, case, seconds, tick), None
    about = {"name": asked.name, "params": asdict(defence), "kind": defence.kind, "version": defence.version}
    return {**about, "seconds": seconds, "layer": outcome.layer, "report": dict(outcome.report), **found}, scores


def apply_to_twin(asked: Named, case: Case, tick: Tick) -> Outcome:
    """What the defence makes of the clean twin, with the same random stream as of the victim."""
    train = case.world.train if asked.method.needs_train else None
    outcome = checked(asked, asked.method.apply(case.suspect(case.twin, train, asked.name)))
    tick()
    return outcome


def checked(asked: Named, outcome: Outcome) -> Outcome:
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
    on_victim: Screen, on_twin: Screen, case: Case, screened: int, seconds: Seconds, tick: Tick
) -> tuple[Table, Scores]:
    """Score held-out, clean and triggered images for victim and twin; AUROC, and TPR and FPR at held-out thresholds."""
    test, held_out = case.world.test, case.world.threshold
    # Choose the images of each kind, spread evenly over all there are.
    counting = case.goal.counts(test.labels).nonzero().squeeze(1)
    chosen = [spread(some, screened) for some in (every_row(held_out), every_row(test), counting)]
    rows = ByKind(*chosen)
    # Score them.
    with timed(seconds, "score"):
        victims = score_kinds(on_victim, case.victim, case, rows, tick)
    twins = score_kinds(on_twin, case.twin, case, rows, tick)
    # See which of the triggered ones the victim falls for.
    said = predict(case.victim, case.attacked.take(rows.triggered), case.arithmetic)
    hits = said == case.goal.labels(test.labels[rows.triggered])
    index = ByKind(held_out.index[rows.held_out].cpu(), test.index[rows.clean].cpu(), test.index[rows.triggered].cpu())
    scores = Scores(victims, twins, index, hits.cpu())
    return {**screen_measures(scores), "screened": screened}, scores


def screen_measures(scores: Scores) -> Table:
    """What a row says of a screen: of the scores alone."""
    held, clean, fired = scores.victim.held_out, scores.victim.clean, scores.victim.triggered
    hits = fired[scores.hits]
    # Thresholds come from held-out images, for victim and twin each from its own.
    cuts = {f"{fpr:.2f}": threshold_at(held, fpr) for fpr in FPRS}
    twin_cuts = {f"{fpr:.2f}": threshold_at(scores.twin.held_out, fpr) for fpr in FPRS}
    return {
        "auroc": asdict(auroc(fired, clean)),
        "tpr_at_fpr": {fpr: asdict(rate(above(fired, cut))) for fpr, cut in cuts.items()},
        "tied_at_fpr": {fpr: asdict(rate(fired.double() == cut)) for fpr, cut in cuts.items()},
        "fpr_on_test": {fpr: asdict(rate(above(clean, cut))) for fpr, cut in cuts.items()},
        "auroc_on_hits": asdict(auroc(hits, clean)),
        "tpr_at_fpr_on_hits": {fpr: asdict(rate(above(hits, cut))) for fpr, cut in cuts.items()},
        "auroc_clean_model": asdict(auroc(scores.twin.triggered, scores.twin.clean)),
        "fpr_on_clean_model": {fpr: asdict(rate(above(scores.twin.clean, cut))) for fpr, cut in twin_cuts.items()},
        "n_threshold": len(held),
    }


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


def measure_repair(on_victim: Repaired, on_twin: Table, case: Case, seconds: Seconds, tick: Tick) -> Table:
    """CDA, ASR and RA before and after, DER, and what the repair costs a clean model."""
    # The victim as it was,
    cda_before, asr_before, ra_before = case.before
    # and repaired.
    with timed(seconds, "predict"):
        cda, asr, ra = case.rates(on_victim.model, tick)
    return {
        "cda": cda,
        "asr": asr,
        "ra": ra,
        "before": {"cda": cda_before, "asr": asr_before, "ra": ra_before},
        "der": defence_effectiveness(asr_before["value"], asr["value"], cda_before["value"], cda["value"]),
        "cda_clean_model": on_twin["after"],
        "cda_clean_model_before": on_twin["before"],
    }


def repair_facts(on_twin: Repaired, case: Case, tick: Tick) -> Table:
    """The clean twin's accuracy before and after its repair."""
    true = case.world.test.labels
    before = clean_accuracy(predict(case.twin, case.world.test, case.arithmetic, tick), true)
    after = clean_accuracy(predict(on_twin.model, case.world.test, case.arithmetic, tick), true)
    return {"before": asdict(before), "after": asdict(after)}


def measure_filter(on_victim: Flagged, on_twin: Flagged, case: Case, seconds: Seconds, tick: Tick) -> Table:
    """AUROC, TPR and FPR against the true mask; CDA, ASR and RA after training without what was flagged."""
    # Compare scores and flags with the mask: covers count as no poison, and there may be no poison at all.
    mask = case.poisoned.poisoned
    if on_victim.flagged.all():
        raise UserError(f"all {len(mask)} training images are flagged, and none is left to train on; flag fewer")
    area = auroc(on_victim.score[mask].float(), on_victim.score[~mask].float())
    # Train the network on what is left, and see how much of the backdoor that one has.
    kept = case.poisoned.take((~on_victim.flagged).nonzero().squeeze(1))
    with timed(seconds, "retrain"):
        retrained = case.train_kept(kept)
    cda, asr, ra = case.rates(retrained, tick)
    return {
        "auroc": asdict(area),
        "tpr": asdict(rate(on_victim.flagged[mask])),
        "fpr": asdict(rate(on_victim.flagged[~mask])),
        "n_flagged": int(on_victim.flagged.sum()),
        "cda_retrained": cda,
        "asr_retrained": asr,
        "ra_retrained": ra,
        "fpr_on_clean_model": asdict(rate(on_twin.flagged)),
    }


def measure_judgement(on_victim: Judged, on_twin: Table, case: Case, seconds: Seconds, tick: Tick) -> Table:
    """The score of victim and clean twin, whether each is above the paper's threshold, and the classes suspected."""
    said = judgement_facts(on_victim, case, tick)
    # The classes that the goal leads to. All-to-all leads to every class, and any suspicion would be right.
    true = torch.arange(case.world.test.n_classes)
    wanted = set(case.goal.labels(true[case.goal.counts(true)]).tolist())
    right = None if len(wanted) == len(true) else said["suspected"] in wanted
    twins = {f"{key}_clean_model": value for key, value in on_twin.items()}
    return {**said, "threshold": on_victim.threshold, "suspects_target": right, **twins}


def judgement_facts(judged: Judged, case: Case, tick: Tick) -> Table:
    """What a judgement says of one model."""
    return {
        "score": judged.score,
        "backdoored": judged.score > judged.threshold,
        "suspected": judged.suspected[0] if judged.suspected else None,
        "suspected_classes": list(judged.suspected),
        "by_class": None if judged.by_class is None else judged.by_class.tolist(),
    }


TWIN_FACTS: dict[OutcomeKind, Callable[..., Table]] = {"repair": repair_facts, "judgement": judgement_facts}
"""What is remembered of an outcome on the clean twin; the other kinds look at triggered images, or are cheap."""
MEASURES: dict[OutcomeKind, Callable[..., Table]] = {
    "repair": measure_repair,
    "filter": measure_filter,
    "judgement": measure_judgement,
}
"""One function a kind takes the outcome on the victim and that on the twin; a screen's gives its scores, too."""
