"""Measuring what a defence makes of a victim, beside what it makes of the clean twin. Nothing here chooses anything.

The defender sees a `Suspect`; trigger, goal, mask and test set stay on this side.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vitrap.contracts import (
    Defence,
    Flagged,
    ImageSet,
    Implant,
    Judged,
    Outcome,
    OutcomeKind,
    Repaired,
    Screen,
    Suspect,
)
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.experiment.measure import BATCH, every_row, predict, spread, timed, triggered
from vitrap.experiment.streams import stream
from vitrap.metrics.accuracy import attack_success, clean_accuracy, robust_accuracy
from vitrap.metrics.detection import above, auroc, defence_effectiveness, threshold_at
from vitrap.metrics.interval import rate
from vitrap.train.arithmetic import Arithmetic

SCREENED = 1000
"""A screen scores so many images of each kind (held out, clean, triggered), spread evenly over their sets."""
FPRS = (0.01, 0.05, 0.10)
Table = dict[str, Any]
Seconds = dict[str, float]
Tick = Callable[[], None]
Retrain = Callable[[ImageSet], nn.Module]
"""A training set to the model that the run's recipe, seed and first weights make of it."""
Remember = Callable[[str, Defence, Callable[[], Table]], Table]
"""What was measured of a defence on the clean twin, or what the call now measures: attacks share their twins."""


OnTwin = Callable[[Callable[[Outcome], Table]], Table]
"""Applies the defence to the clean twin, where need be, and measures that outcome."""


def anew(name: str, defence: Defence, measure: Callable[[], Table]) -> Table:
    """Remember nothing."""
    return measure()


@dataclass(frozen=True)
class Case:
    """A victim and its clean twin, with all it takes to measure a defence on them.

    Attributes:
        victim: the backdoored model, ready.
        twin: the clean one, ready.
        implant: trigger and goal; the poison.
        world: the data.
        seed: the run's.
        arithmetic: how victim and twin compute.
        retrain: trains anew, for filters.
        remember: keeps what does not depend on the attack.
    """

    victim: nn.Module
    twin: nn.Module
    implant: Implant
    world: World
    seed: int
    arithmetic: Arithmetic
    retrain: Retrain
    remember: Remember = anew

    @cached_property
    def poisoned(self) -> ImageSet:
        """The victim's training set, with its mask."""
        return self.implant.poison(self.world.train, stream(self.seed, "poison"))

    @cached_property
    def attacked(self) -> ImageSet:
        """The whole test set, triggered."""
        return triggered(self.world.test, self.implant.trigger)

    @cached_property
    def before(self) -> tuple[Table, Table, Table]:
        """CDA, ASR and RA of the victim as it is."""
        return self.rates(self.victim, lambda: None)

    def suspect(self, model: nn.Module, train: ImageSet | None, name: str) -> Suspect:
        """What the defender `name` sees; its random stream is the same for victim and twin."""
        world = self.world
        return Suspect(model, world.clean, world.train.n_classes, stream(self.seed, f"defence {name}"), train)

    def rates(self, model: nn.Module, tick: Tick) -> tuple[Table, Table, Table]:
        """CDA, ASR and RA of a model, on the whole test set."""
        true, goal = self.world.test.labels, self.implant.goal
        clean = predict(model, self.world.test, self.arithmetic, tick)
        fired = predict(model, self.attacked, self.arithmetic, tick)
        measured = (clean_accuracy(clean, true), attack_success(fired, true, goal), robust_accuracy(fired, true, goal))
        return asdict(measured[0]), asdict(measured[1]), asdict(measured[2])


def measure_defence(name: str, defence: Defence, case: Case, tick: Tick) -> Table:
    """One row of a record: what the defence `name` is, what it took, and what it makes of victim and twin."""
    train = (case.poisoned.unmarked(), case.world.train) if defence.needs_train else (None, None)
    seconds: Seconds = {}
    settings: Any = defence

    def on(model: nn.Module, train: ImageSet | None) -> Outcome:
        with case.arithmetic(model, case.world.test.device):
            outcome = defence.apply(case.suspect(model, train, name))
        tick()
        return outcome

    def on_twin(measure: Callable[[Outcome], Table]) -> Table:
        if defence.kind in ("screen", "filter"):  # looks at triggered images, or is cheap
            return measure(on(case.twin, train[1]))
        return case.remember(name, defence, lambda: measure(on(case.twin, train[1])))

    with timed(seconds, "apply"):
        outcome = on(case.victim, train[0])
    found = MEASURES[defence.kind](outcome, on_twin, case, seconds, tick)
    about = {"name": name, "params": asdict(settings), "kind": defence.kind, "seconds": seconds}
    return {**about, "layer": outcome.layer, "report": dict(outcome.report), **found}


def measure_screen(screen: Screen, on_twin: OnTwin, case: Case, seconds: Seconds, tick: Tick) -> Table:
    """AUROC, and TPR and FPR at thresholds that held-out clean images set; the same on the clean twin."""
    test, attacked, goal = case.world.test, case.attacked, case.implant.goal
    fired_rows = spread(goal.counts(test.labels).nonzero().squeeze(1), SCREENED)
    clean_rows, held_rows = (spread(every_row(data), SCREENED) for data in (test, case.world.threshold))

    def scores(which: Screen, model: nn.Module) -> list[Float[Tensor, " n"]]:
        sets = ((case.world.threshold, held_rows), (test, clean_rows), (attacked, fired_rows))
        with torch.no_grad(), case.arithmetic(model, test.device):
            return [score_images(which, data, rows, tick) for data, rows in sets]

    with timed(seconds, "score"):
        held, clean, fired = scores(screen, case.victim)

    def twins(other: Any) -> Table:
        held, clean, fired = scores(other, case.twin)
        cuts = {f"{fpr:.2f}": threshold_at(held, fpr) for fpr in FPRS}
        return {
            "auroc_clean_model": asdict(auroc(fired, clean)),
            "fpr_on_clean_model": {fpr: asdict(rate(above(clean, cut))) for fpr, cut in cuts.items()},
        }

    said = predict(case.victim, attacked.take(fired_rows), case.arithmetic)
    hits = fired[said == goal.labels(test.labels[fired_rows])]
    cuts = {f"{fpr:.2f}": threshold_at(held, fpr) for fpr in FPRS}
    return {
        "auroc": asdict(auroc(fired, clean)),
        "tpr_at_fpr": {fpr: asdict(rate(above(fired, cut))) for fpr, cut in cuts.items()},
        "fpr_on_test": {fpr: asdict(rate(above(clean, cut))) for fpr, cut in cuts.items()},
        "auroc_on_hits": asdict(auroc(hits, clean)),
        "tpr_at_fpr_on_hits": {fpr: asdict(rate(above(hits, cut))) for fpr, cut in cuts.items()},
        **on_twin(twins),
        "n_threshold": len(held),
    }


def score_images(screen: Screen, data: ImageSet, rows: Int64[Tensor, " k"], tick: Tick) -> Float[Tensor, " k"]:
    """The screen's scores of some images of a set."""
    found = []
    for some in rows.split(BATCH):
        found.append(screen.score(data.images(some)).float())
        tick()
    return torch.cat(found)


def measure_repair(repaired: Repaired, on_twin: OnTwin, case: Case, seconds: Seconds, tick: Tick) -> Table:
    """CDA, ASR and RA before and after, DER, and what the repair costs a clean model."""
    cda_before, asr_before, ra_before = case.before
    with timed(seconds, "predict"):
        cda, asr, ra = case.rates(repaired.model, tick)

    def twins(other: Any) -> Table:
        clean = [predict(model, case.world.test, case.arithmetic, tick) for model in (case.twin, other.model)]
        before, after = (asdict(clean_accuracy(said, case.world.test.labels)) for said in clean)
        return {"cda_clean_model": after, "cda_clean_model_before": before}

    return {
        "cda": cda,
        "asr": asr,
        "ra": ra,
        "before": {"cda": cda_before, "asr": asr_before, "ra": ra_before},
        "der": defence_effectiveness(asr_before["value"], asr["value"], cda_before["value"], cda["value"]),
        **on_twin(twins),
    }


def measure_filter(found: Flagged, on_twin: OnTwin, case: Case, seconds: Seconds, tick: Tick) -> Table:
    """AUROC, TPR and FPR against the true mask; CDA, ASR and RA after training without what was flagged."""

    def twins(other: Any) -> Table:
        return {"fpr_on_clean_model": asdict(rate(other.flagged))}

    mask = case.poisoned.poisoned
    if found.flagged.all():
        raise UserError(
            f"all {len(found.flagged)} training images are flagged, and none is left to train on; flag fewer"
        )
    kept = case.poisoned.take((~found.flagged).nonzero().squeeze(1))
    with timed(seconds, "retrain"):
        retrained = case.retrain(kept)
    cda, asr, ra = case.rates(retrained, tick)
    return {
        "auroc": asdict(auroc(found.score[mask].float(), found.score[~mask].float())),
        "tpr": asdict(rate(found.flagged[mask])),
        "fpr": asdict(rate(found.flagged[~mask])),
        "n_flagged": int(found.flagged.sum()),
        "cda_retrained": cda,
        "asr_retrained": asr,
        "ra_retrained": ra,
        **on_twin(twins),
    }


def measure_judgement(judged: Judged, on_twin: OnTwin, case: Case, seconds: Seconds, tick: Tick) -> Table:
    """The score of victim and clean twin, and whether each is above the paper's threshold."""
    wanted = case.implant.goal.labels(torch.zeros(1, dtype=torch.int64)).item()

    def twins(other: Any) -> Table:
        return {
            "score_clean_model": other.score,
            "backdoored_clean_model": other.score > other.threshold,
            "suspected_clean_model": other.suspected,
        }

    return {
        "score": judged.score,
        "threshold": judged.threshold,
        "backdoored": judged.score > judged.threshold,
        "suspected": judged.suspected,
        "suspects_target": judged.suspected == wanted,
        **on_twin(twins),
    }


MEASURES: dict[OutcomeKind, Callable[..., Table]] = {
    "screen": measure_screen,
    "repair": measure_repair,
    "filter": measure_filter,
    "judgement": measure_judgement,
}
