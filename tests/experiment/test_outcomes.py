"""What is measured of each kind of outcome, against the same figures worked out another way."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from sklearn.metrics import accuracy_score, roc_auc_score
from torch import Tensor, nn

from tests.experiment.conftest import Runs
from vitrap.contracts import Flagged, ImageSet, Judged, Outcome, Repaired, Screen, Suspect
from vitrap.experiment.defend import Finished
from vitrap.experiment.outcomes import FPRS, Case, anew, measure_defence
from vitrap.experiment.plan import make_plan
from vitrap.experiment.progress import silent
from vitrap.metrics.interval import wilson
from vitrap.tensors.pixels import round8


@pytest.fixture(scope="module")
def case(runs: Runs) -> Case:
    """The BadNets run, opened."""
    return open_case(runs, "badnets")


def open_case(runs: Runs, name: str) -> Case:
    plan = make_plan(runs.specs[name], "cpu")
    return replace(Finished(runs.folder(name), runs.records[name], plan, silent).case(), remember=anew)


@dataclass(frozen=True)
class Made:
    """A defence that does what a test says, and notes what it was shown."""

    outcome: Callable[[Suspect], Outcome]
    seen: list[Suspect]
    kind: str = "screen"
    needs_train: bool = False
    needs_attention: ClassVar[bool] = False
    card: ClassVar[Any] = None

    def apply(self, suspect: Suspect) -> Outcome:
        self.seen.append(suspect)
        return self.outcome(suspect)


def row(case: Case, outcome: Callable[[Suspect], Outcome], kind: str, needs_train: bool = False) -> dict[str, Any]:
    made: Any = Made(outcome, [], kind, needs_train)
    return measure_defence("made", made, case, lambda: None)


def test_the_case_is_the_runs_own(runs: Runs, case: Case) -> None:
    cda, asr, ra = case.rates(case.victim, lambda: None)
    victim = runs.records["badnets"].victim
    assert (cda, asr, ra) == (victim["cda"], victim["asr"], victim["ra"])
    assert case.rates(case.twin, lambda: None)[:2] == (victim["cda_clean_model"], victim["asr_clean_model"])
    assert int(case.poisoned.poisoned.sum()) == runs.records["badnets"].data["n_poisoned"]


def test_a_defender_sees_model_and_clean_images_and_no_more(case: Case) -> None:
    seen: list[Suspect] = []
    made: Any = Made(lambda s: Judged(0.0, 1.0), seen, "judgement")
    measure_defence("made", made, case, lambda: None)
    assert [s.model for s in seen] == [case.victim, case.twin]
    assert [s.generator.initial_seed() for s in seen] == [seen[0].generator.initial_seed()] * 2
    for suspect in seen:
        assert set(vars(suspect)) == {"model", "clean", "n_classes", "generator", "train"}
        assert suspect.clean is case.world.clean
        assert suspect.train is None


def test_a_filter_sees_the_training_set_without_its_mask(case: Case) -> None:
    seen: list[Suspect] = []

    def flag(suspect: Suspect) -> Flagged:
        assert suspect.train is not None
        n = len(suspect.train)
        return Flagged(torch.zeros(n), torch.zeros(n, dtype=torch.bool))

    made: Any = Made(flag, seen, "filter", needs_train=True)
    measure_defence("made", made, replace(case, retrain=lambda kept: case.twin), lambda: None)
    poisoned, clean = (s.train for s in seen)
    assert poisoned is not None
    assert clean is case.world.train
    assert poisoned.slot is None
    assert poisoned.stamped is None
    rows = torch.arange(len(poisoned))
    assert torch.equal(poisoned.images(rows), round8(case.poisoned.images(rows)))
    assert torch.equal(poisoned.labels, case.poisoned.labels)


# ---- screens


def blue(images: Tensor) -> Tensor:
    return images[:, 2].mean((1, 2)) + images[:, 0, 0].sum(1)


def test_a_screen_is_measured_as_scikit_learn_would(case: Case) -> None:
    found = row(case, lambda s: Screen(blue), "screen")
    test, counts = case.world.test, case.implant.goal.counts(case.world.test.labels)
    clean = blue(test.images(torch.arange(len(test))))
    fired = blue(round8(case.implant.trigger(test.images(torch.arange(len(test))))))[counts]
    held = blue(case.world.threshold.images(torch.arange(len(case.world.threshold))))
    truth = [1] * len(fired) + [0] * len(clean)
    assert found["auroc"]["value"] == pytest.approx(roc_auc_score(truth, torch.cat([fired, clean]).numpy()))
    assert (found["auroc"]["n_triggered"], found["auroc"]["n_clean"]) == (len(fired), len(clean))
    assert found["n_threshold"] == len(held)
    for fpr in FPRS:
        cut = held.sort(descending=True).values[int(fpr * len(held))]
        assert found["tpr_at_fpr"][f"{fpr:.2f}"] == vars(wilson(int((fired > cut).sum()), len(fired)))
        assert found["fpr_on_test"][f"{fpr:.2f}"] == vars(wilson(int((clean > cut).sum()), len(clean)))


def test_what_hits_is_measured_apart(case: Case) -> None:
    """A network that gives the target to whatever is bright above, and a screen that sees just that."""
    target = int(case.implant.goal.labels(torch.zeros(1, dtype=torch.int64)))

    class Above(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits = torch.zeros(len(images), 10)
            logits[:, target] = images[:, 0, :4].mean((1, 2)) - 0.3
            return logits

    model = Above().eval()
    found = row(replace(case, victim=model), lambda s: Screen(lambda x: x[:, 0, :4].mean((1, 2))), "screen")
    test, goal = case.world.test, case.implant.goal
    fired = round8(case.implant.trigger(test.images(torch.arange(len(test)))))[goal.counts(test.labels)]
    hits = int((model(fired).argmax(1) == target).sum())
    assert 0 < hits < len(fired)
    assert found["auroc_on_hits"]["n_triggered"] == hits
    assert found["auroc_on_hits"]["value"] > found["auroc"]["value"]
    assert {rate["n"] for rate in found["tpr_at_fpr_on_hits"].values()} == {hits}


def test_the_twin_has_its_own_thresholds(case: Case) -> None:
    def apply(suspect: Suspect) -> Screen:
        return Screen(blue if suspect.model is case.victim else lambda x: torch.arange(len(x)).float() * 0 + 7)

    found = row(case, apply, "screen")
    assert found["auroc_clean_model"]["value"] == 0.5
    assert {rate["value"] for rate in found["fpr_on_clean_model"].values()} == {0.0}
    assert found["auroc"]["value"] != 0.5


# ---- repairs


def test_a_repair_that_does_nothing(case: Case) -> None:
    found = row(case, lambda s: Repaired(copy.deepcopy(s.model)), "repair")
    assert found["der"] == 0.5
    assert {k: found[k] for k in ("cda", "asr", "ra")} == found["before"]
    assert found["cda_clean_model"] == found["cda_clean_model_before"]


def test_a_repair_is_measured_before_and_after(case: Case) -> None:
    class Silent(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.eye(10)[torch.full((len(images),), 5)]

    found = row(case, lambda s: Repaired(Silent().eval()), "repair")
    test, goal = case.world.test, case.implant.goal
    fives = accuracy_score(test.labels.numpy(), torch.full((len(test),), 5).numpy())
    assert found["cda"]["value"] == found["cda_clean_model"]["value"] == pytest.approx(fives)
    assert found["asr"]["value"] == 0
    counts = goal.counts(test.labels)
    assert found["ra"]["value"] == pytest.approx((test.labels[counts] == 5).double().mean().item())
    fall = found["before"]["asr"]["value"] - max(0, found["before"]["cda"]["value"] - fives)
    assert found["der"] == pytest.approx((fall + 1) / 2)


# ---- filters


def test_a_filter_that_knows_everything(case: Case) -> None:
    kept: list[ImageSet] = []

    def apply(suspect: Suspect) -> Flagged:
        mask = case.poisoned.poisoned if suspect.model is case.victim else torch.arange(len(case.world.train)) < 3
        return Flagged(mask.float(), mask)

    def retrain(images: ImageSet) -> nn.Module:
        kept.append(images)
        return case.twin

    found = row(replace(case, retrain=retrain), apply, "filter", needs_train=True)
    assert found["auroc"]["value"] == found["tpr"]["value"] == 1
    assert found["fpr"]["value"] == 0
    assert found["n_flagged"] == found["tpr"]["n"] == int(case.poisoned.poisoned.sum())
    assert not kept[0].poisoned.any()
    assert len(kept[0]) == len(case.world.train) - found["n_flagged"]
    cda, asr, ra = case.rates(case.twin, lambda: None)
    assert (found["cda_retrained"], found["asr_retrained"], found["ra_retrained"]) == (cda, asr, ra)
    assert found["fpr_on_clean_model"] == vars(wilson(3, len(case.world.train)))
    assert set(found["seconds"]) == {"apply", "retrain"}


# ---- judgements


@pytest.mark.parametrize("suspected", [None, 0, 4])
def test_a_judgement(case: Case, suspected: int | None) -> None:
    def apply(suspect: Suspect) -> Judged:
        return Judged(0.9 if suspect.model is case.victim else 0.2, 0.5, suspected, "head", {"steps": 3.0})

    found = row(case, apply, "judgement")
    assert (found["score"], found["score_clean_model"], found["threshold"]) == (0.9, 0.2, 0.5)
    assert (found["backdoored"], found["backdoored_clean_model"]) == (True, False)
    assert found["suspects_target"] is (suspected == 0)
    assert (found["layer"], found["report"]) == ("head", {"steps": 3.0})
    assert found["seconds"]["apply"] >= 0


def test_nothing_of_the_run_changes(runs: Runs, case: Case) -> None:
    before = {k: v.clone() for k, v in case.victim.state_dict().items()}
    row(case, lambda s: Screen(blue), "screen")
    assert all(torch.equal(v, before[k]) for k, v in case.victim.state_dict().items())
    assert Path(runs.folder("badnets") / "record.json").exists()
