"""What is measured of each kind of outcome, against the same figures worked out another way."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from sklearn.metrics import accuracy_score, roc_auc_score
from torch import Tensor, nn

from tests.experiment.conftest import Runs
from tests.report import made
from tests.report.made import to_row
from tests.test_docs import keys_of_rows
from vitrap.contracts import (
    AllToAll,
    AllToOne,
    Flagged,
    Goal,
    ImageSet,
    Judged,
    Outcome,
    Repaired,
    Screen,
    SourceToTarget,
    Suspect,
)
from vitrap.data.sources import World, open_data
from vitrap.errors import UserError
from vitrap.experiment.defence_spec import DefenceSpec
from vitrap.experiment.defend import FinishedRun
from vitrap.experiment.measure_defences import FPRS, Evaluation, measure_defence, measure_each_time
from vitrap.experiment.plan import make_plan
from vitrap.experiment.progress import no_progress
from vitrap.experiment.scores import ByKind, Scores, read_scores, scores_file, write_scores
from vitrap.metrics.detection import auroc
from vitrap.metrics.interval import wilson
from vitrap.metrics.values import Auroc, Rate, Rates
from vitrap.report.tables import defence_measures
from vitrap.tensors.pixels import round8, to_bytes
from vitrap.train.arithmetic import Arithmetic

POISONED = torch.arange(5, 15)
COVERS = torch.arange(20, 24)
LABEL = 0


class Linear(nn.Module):
    """Some network, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = nn.Linear(3 * 16 * 16, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1))


@dataclass(frozen=True)
class Corner:
    """Lightens a corner."""

    value: float = 0.8

    def __call__(self, images: Tensor) -> Tensor:
        marked = images.clone()
        marked[..., :6, :6] = self.value
        return marked


def poisoned(world: World) -> ImageSet:
    """Ten images are poison, and four are covers."""
    train = world.train

    def stamped(rows: Tensor) -> Tensor:
        return to_bytes(Corner()(train.images(rows)))

    train = train.stamp(POISONED, stamped(POISONED), torch.full_like(POISONED, LABEL))
    return train.stamp(COVERS, stamped(COVERS), world.train.labels[COVERS], cover=True)


def not_at_all(*args: Any, **kwargs: Any) -> nn.Module:
    raise AssertionError("nothing is trained here")


@pytest.fixture(scope="module")
def case() -> Evaluation:
    """Two networks that were never trained, and a trigger."""
    world = open_data("digits", limit=100)
    victim, twin = (Linear(seed).eval().requires_grad_(False) for seed in (0, 1))
    return Evaluation(
        victim,
        twin,
        trigger=Corner(),
        goal=AllToOne(LABEL),
        poison=lambda: poisoned(world),
        world=world,
        seed=3,
        arithmetic=Arithmetic(),
        retrain=not_at_all,
        train_on_kept=not_at_all,
    )


def open_case(runs: Runs, name: str) -> Evaluation:
    plan = make_plan(runs.specs[name], "cpu")
    return replace(
        FinishedRun(runs.folder(name), runs.records[name], plan, no_progress).evaluation(),
        result_on_twin=measure_each_time,
    )


@dataclass(frozen=True)
class Made:
    """A defence that does what a test says, and notes what it was shown."""

    outcome: Callable[[Suspect], Outcome]
    seen: list[Suspect] = field(default_factory=list)
    kind: str = "screen"
    needs_train: bool = False
    needs_attention: ClassVar[bool] = False
    card: ClassVar[Any] = None
    version: ClassVar[int] = 7

    def apply(self, suspect: Suspect) -> Outcome:
        self.seen.append(suspect)
        return self.outcome(suspect)


def measured(
    case: Evaluation,
    outcome: Callable[[Suspect], Outcome],
    kind: str,
    needs_train: bool = False,
    screened: int = 1000,
) -> tuple[Any, Scores | None]:
    method: Any = Made(outcome, [], kind, needs_train)
    return measure_defence(DefenceSpec("made", method, screened), case, lambda: None)


def row(case: Evaluation, outcome: Callable[[Suspect], Outcome], kind: str, needs_train: bool = False) -> Any:
    return measured(case, outcome, kind, needs_train)[0]


def test_the_case_is_the_runs_own(runs: Runs) -> None:
    case = open_case(runs, "badnets")
    victim = runs.records["badnets"].victim
    assert case.rates(case.victim, lambda: None) == Rates(victim.cda, victim.asr, victim.ra)
    twin = case.rates(case.twin, lambda: None)
    assert (twin.cda, twin.asr) == (victim.cda_clean_model, victim.asr_clean_model)
    assert int(case.poisoned.poisoned.sum()) == runs.records["badnets"].data.n_poisoned
    row(case, lambda s: Screen(blue), "screen")
    assert (runs.folder("badnets") / "record.json").exists()


def test_a_defender_sees_model_and_clean_images_and_no_more(case: Evaluation) -> None:
    seen: list[Suspect] = []
    method: Any = Made(lambda s: Judged(0.0, 1.0), seen, "judgement")
    measure_defence(DefenceSpec("made", method), case, lambda: None)
    assert [s.model for s in seen] == [case.victim, case.twin]
    assert [s.generator.initial_seed() for s in seen] == [seen[0].generator.initial_seed()] * 2
    for suspect in seen:
        assert set(vars(suspect)) == {"model", "clean", "n_classes", "generator", "train", "compute", "retrain"}
        assert suspect.clean is case.world.clean
        assert suspect.compute is case.arithmetic
        assert suspect.train is None
        assert suspect.retrain is None


def test_a_filter_sees_the_training_set_without_its_mask(case: Evaluation) -> None:
    seen: list[Suspect] = []

    def flag(suspect: Suspect) -> Flagged:
        assert suspect.train is not None
        n = len(suspect.train)
        return Flagged(torch.zeros(n), torch.zeros(n, dtype=torch.bool))

    method: Any = Made(flag, seen, "filter", needs_train=True)
    measure_defence(DefenceSpec("made", method), replace(case, train_on_kept=lambda kept: case.twin), lambda: None)
    unmarked, clean = (s.train for s in seen)
    assert unmarked is not None
    assert clean is case.world.train
    assert unmarked.stamped_row is None
    assert unmarked.stamped is None
    assert unmarked.stamped_is_cover is None
    rows = torch.arange(len(unmarked))
    assert torch.equal(unmarked.images(rows), round8(case.poisoned.images(rows)))
    assert torch.equal(unmarked.labels, case.poisoned.labels)
    assert [s.retrain for s in seen] == [not_at_all] * 2


def test_a_defence_is_applied_outside_of_any_autocast(case: Evaluation) -> None:
    """In bf16 the model answers in bf16 within `computing()`, where the scores are made, and nowhere else."""
    kinds: list[torch.dtype] = []

    def look(suspect: Suspect, images: Tensor) -> Tensor:
        kinds.append(suspect.model(images).dtype)
        return images.mean((1, 2, 3))

    def apply(suspect: Suspect) -> Screen:
        images = suspect.clean.images(torch.arange(2))
        look(suspect, images)
        with suspect.computing():
            look(suspect, images)
        return Screen(lambda x: look(suspect, x))

    row(replace(case, arithmetic=Arithmetic("bf16")), apply, "screen")
    assert kinds[:4] == [torch.float32, torch.bfloat16] * 2
    assert set(kinds[4:]) == {torch.bfloat16}


def test_a_row_says_what_a_defence_is(case: Evaluation) -> None:
    found = row(case, lambda s: Judged(0.9, 0.5, (), None, "head", {"steps": 3.0}), "judgement")
    assert (found.name, found.kind, found.version) == ("made", "judgement", 7)
    assert found.params["needs_train"] is False
    assert (found.layer, found.report) == ("head", {"steps": 3.0})
    assert found.seconds["apply"] >= 0


def flag_none(suspect: Suspect) -> Outcome:
    assert suspect.train is not None
    return Flagged(torch.zeros(len(suspect.train)), torch.zeros(len(suspect.train), dtype=torch.bool))


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        ("screen", lambda s: Screen(blue)),
        ("repair", lambda s: Repaired(copy.deepcopy(s.model))),
        ("filter", flag_none),
        ("judgement", lambda s: Judged(0.9, 0.5)),
    ],
)
def test_a_row_has_the_keys_that_its_page_lists(
    case: Evaluation, kind: str, outcome: Callable[[Suspect], Outcome]
) -> None:
    found = row(replace(case, train_on_kept=lambda kept: case.twin), outcome, kind, kind == "filter")
    listed = keys_of_rows()
    assert {part.name for part in fields(found)} == listed["every"] | listed[kind]


# ---- screens


def blue(images: Tensor) -> Tensor:
    return images[:, 2].mean((1, 2)) + images[:, 0, 0].sum(1)


def resolved(rates: dict[str, Rate | None]) -> list[Rate]:
    """The rates at thresholds that the held-out images resolve."""
    return [rate for rate in rates.values() if rate is not None]


def test_a_screen_is_measured_as_scikit_learn_would(case: Evaluation) -> None:
    found = row(case, lambda s: Screen(blue), "screen")
    test, counts = case.world.test, case.goal.counts(case.world.test.labels)
    clean = blue(test.images(torch.arange(len(test))))
    fired = blue(round8(case.trigger(test.images(torch.arange(len(test))))))[counts]
    held = blue(case.world.threshold.images(torch.arange(len(case.world.threshold))))
    truth = [1] * len(fired) + [0] * len(clean)
    assert found.auroc.value == pytest.approx(roc_auc_score(truth, torch.cat([fired, clean]).numpy()))
    assert (found.auroc.n_triggered, found.auroc.n_clean) == (len(fired), len(clean))
    assert (found.n_threshold, found.screened) == (len(held), 1000)
    assert list(found.unresolved) == ["0.01"]
    assert found.tpr_at_fpr["0.01"] is None
    for fpr in FPRS[1:]:
        cut = held.sort(descending=True).values[int(fpr * len(held))]
        assert found.tpr_at_fpr[f"{fpr:.2f}"] == wilson(int((fired > cut).sum()), len(fired))
        assert found.fpr_on_test[f"{fpr:.2f}"] == wilson(int((clean > cut).sum()), len(clean))


def test_ties_with_the_threshold_are_said(case: Evaluation) -> None:
    """A screen that gives its highest score to every triggered image, and to a fifth of the held-out ones as well."""

    def coarse(images: Tensor) -> Tensor:
        return (images[:, 2].mean((1, 2)) > 0.0).float()

    held = coarse(case.world.threshold.images(torch.arange(len(case.world.threshold))))
    found = row(case, lambda s: Screen(coarse), "screen")
    assert held.mean() > max(FPRS)
    assert {rate.value for rate in resolved(found.tpr_at_fpr)} == {0.0}
    assert {rate.value for rate in resolved(found.tied_at_fpr)} == {1.0}
    assert ("  more that tie with the threshold", "100.00 %") in [
        (name, value[:8]) for name, value, *_ in defence_measures(found)
    ]


def test_what_hits_is_measured_apart(case: Evaluation) -> None:
    """A network that gives the target to whatever is bright above, and a screen that sees just that."""

    class Above(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits = torch.zeros(len(images), 10)
            logits[:, 1] = 0.01
            logits[:, LABEL] = images[:, 0, :4].mean((1, 2)) - 0.4
            return logits

    model = Above().eval()
    found, scores = measured(
        replace(case, victim=model), lambda s: Screen(lambda x: x[:, 0, :4].mean((1, 2))), "screen"
    )
    test = case.world.test
    fired = round8(case.trigger(test.images(torch.arange(len(test)))))[case.goal.counts(test.labels)]
    hits = model(fired).argmax(1) == LABEL
    assert 0 < int(hits.sum()) < len(fired)
    assert scores is not None
    assert torch.equal(scores.hits, hits)
    assert found.auroc_on_hits.n_triggered == int(hits.sum())
    assert found.auroc_on_hits.value > found.auroc.value
    assert {rate.n for rate in resolved(found.tpr_at_fpr_on_hits)} == {int(hits.sum())}


def test_the_twin_has_its_own_thresholds(case: Evaluation) -> None:
    def apply(suspect: Suspect) -> Screen:
        return Screen(blue if suspect.model is case.victim else lambda x: torch.arange(len(x)).float() * 0 + 7)

    found = row(case, apply, "screen")
    assert found.auroc_clean_model.value == 0.5
    assert {rate.value for rate in resolved(found.fpr_on_clean_model)} == {0.0}
    assert found.auroc.value != 0.5


def test_how_many_images_a_screen_scores_is_asked_for(case: Evaluation) -> None:
    scored: list[int] = []

    def score(images: Tensor) -> Tensor:
        scored.append(len(images))
        return blue(images)

    found, scores = measured(case, lambda s: Screen(score), "screen", screened=20)
    assert sum(scored) == 2 * 3 * 20  # victim and twin; held out, clean and triggered
    assert found.screened == found.n_threshold == 20
    assert (found.auroc.n_triggered, found.auroc.n_clean) == (20, 20)
    assert scores is not None
    assert {len(part) for part in (*vars(scores.victim).values(), *vars(scores.twin).values())} == {20}


def test_each_score_is_kept_with_its_row(case: Evaluation) -> None:
    def apply(suspect: Suspect) -> Screen:
        return Screen(blue if suspect.model is case.victim else lambda x: -blue(x))

    _, scores = measured(case, apply, "screen", screened=30)
    assert scores is not None
    test, held = case.world.test, case.world.threshold
    assert scores.index.clean.dtype == torch.int64
    assert scores.victim.clean.dtype == torch.float32
    for kind, data in (("held_out", held), ("clean", test), ("triggered", case.attacked)):
        index = getattr(scores.index, kind)
        place = {int(number): i for i, number in enumerate(data.index)}
        wanted = blue(data.images(torch.tensor([place[int(number)] for number in index])))
        assert torch.equal(getattr(scores.victim, kind), wanted)
        assert torch.equal(getattr(scores.twin, kind), -wanted)
    labels = dict(zip(test.index.tolist(), test.labels.tolist(), strict=True))
    assert LABEL not in {labels[int(number)] for number in scores.index.triggered}


def ranks(scores: Tensor) -> Tensor:
    return scores.argsort().argsort().double()


def test_screens_are_combined_from_their_files_without_a_model(case: Evaluation, tmp_path: Path) -> None:
    rows = []
    for name, score in (("blue", blue), ("red", lambda images: images[:, 0].mean((1, 2)))):
        found, scores = measured(case, lambda s, score=score: Screen(score), "screen", screened=50)
        assert scores is not None
        rows.append(replace(found, name=name, params={}, scores=scores_file(name, "0" * 16)))
        write_scores(tmp_path, rows[-1], scores, {"backdoor": True})
    one, other = (read_scores(tmp_path, found) for found in rows)
    for found, scores in zip(rows, (one, other), strict=True):
        assert auroc(scores.victim.triggered, scores.victim.clean) == found.auroc
        assert auroc(scores.victim.triggered[scores.hits], scores.victim.clean) == found.auroc_on_hits
        assert auroc(scores.twin.triggered, scores.twin.clean) == found.auroc_clean_model
    assert torch.equal(one.index.triggered, other.index.triggered)
    mean = sum(ranks(torch.cat([s.victim.triggered, s.victim.clean])) for s in (one, other)) / 2
    together = auroc(mean[:50], mean[50:])
    truth = [1] * 50 + [0] * 50
    assert together.value == pytest.approx(roc_auc_score(truth, mean.numpy()))
    apart = one.victim.triggered - other.victim.triggered  # a pair an image
    test = case.attacked
    place = {int(number): i for i, number in enumerate(test.index)}
    images = test.images(torch.tensor([place[int(number)] for number in one.index.triggered]))
    assert torch.equal(apart, blue(images) - images[:, 0].mean((1, 2)))


def test_a_file_of_scores_says_that_it_belongs_to_a_backdoor(case: Evaluation, tmp_path: Path) -> None:
    found, scores = measured(case, lambda s: Screen(blue), "screen", screened=20)
    assert scores is not None
    kept = replace(found, params={"n": 1}, scores=scores_file("odd/na me", "f" * 16))
    write_scores(tmp_path, kept, scores, {"backdoor": True})
    assert [p.name for p in (tmp_path / "scores").glob("*.safetensors")] == [f"odd_na_me-{'f' * 16}.safetensors"]
    with safe_open(tmp_path / kept.scores, "pt") as file:
        about = file.metadata()
    assert about["vitrap"] == '{"backdoor": true}'
    assert about["defence"] == "made"
    assert json.loads(about["settings"]) == {"n": 1, "screened": 20}


def test_scores_that_cannot_be_read(case: Evaluation, tmp_path: Path) -> None:
    screen = to_row(made.screen("strip"))
    with pytest.raises(UserError, match="'fine_tune' is a repair, and only a screen scores images"):
        read_scores(tmp_path, to_row(made.repair("fine_tune")))
    with pytest.raises(UserError, match="'strip' was measured before scores were kept; defend the run with it again"):
        read_scores(tmp_path, screen)
    with pytest.raises(UserError, match="missing or damaged .* defend the run with 'strip' again"):
        read_scores(tmp_path, replace(screen, scores="scores/gone.safetensors"))
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="missing or damaged"):
        read_scores(tmp_path, replace(screen, scores="scores/bad.safetensors"))


def test_scores_with_a_flipped_bit_are_refused(tmp_path: Path) -> None:
    screen = replace(to_row(made.screen("strip")), scores=f"scores/strip-{'0' * 16}.safetensors")
    victim, twin, index = (ByKind(torch.ones(2), torch.ones(3), torch.ones(4)) for _ in range(3))
    write_scores(tmp_path, screen, Scores(victim, twin, index, torch.ones(4, dtype=torch.bool)), {})
    read_scores(tmp_path, screen)
    file = tmp_path / screen.scores
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="missing or damaged .* defend the run with 'strip' again"):
        read_scores(tmp_path, screen)


# ---- repairs


def test_a_repair_that_does_nothing(case: Evaluation) -> None:
    found = row(case, lambda s: Repaired(copy.deepcopy(s.model)), "repair")
    assert found.der == 0.5
    assert Rates(found.cda, found.asr, found.ra) == found.before
    assert found.cda_clean_model == found.cda_clean_model_before


def test_a_repair_is_measured_before_and_after(case: Evaluation) -> None:
    class Silent(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.eye(10)[torch.full((len(images),), 5)]

    found = row(case, lambda s: Repaired(Silent().eval()), "repair")
    test, goal = case.world.test, case.goal
    fives = accuracy_score(test.labels.numpy(), torch.full((len(test),), 5).numpy())
    twins = accuracy_score(test.labels.numpy(), case.twin(test.images(torch.arange(len(test)))).argmax(1).numpy())
    assert found.cda.value == found.cda_clean_model.value == pytest.approx(fives)
    assert found.cda_clean_model_before.value == pytest.approx(twins)
    assert found.asr.value == 0
    counts = goal.counts(test.labels)
    assert found.ra.value == pytest.approx((test.labels[counts] == 5).double().mean().item())
    fall = found.before.asr.value - max(0, found.before.cda.value - fives)
    assert found.der == pytest.approx((fall + 1) / 2)


# ---- what is remembered of the twin


def repaired(suspect: Suspect) -> Outcome:
    return Repaired(copy.deepcopy(suspect.model))


def judged(suspect: Suspect) -> Outcome:
    return Judged(0.9, 0.5, (3, 1), torch.arange(10.0))


@pytest.mark.parametrize(("kind", "outcome"), [("repair", repaired), ("judgement", judged)])
def test_a_second_attack_on_a_twin_does_not_apply_the_defence_to_it_again(
    case: Evaluation, kind: str, outcome: Callable[[Suspect], Outcome]
) -> None:
    kept: dict[str, Any] = {}

    def remember(asked: DefenceSpec, kind: type[Any], find: Callable[[], Any]) -> Any:
        if asked.name not in kept:
            kept[asked.name] = find()
        assert isinstance(kept[asked.name], kind)
        return kept[asked.name]

    method: Any = Made(outcome, [], kind)
    first = measure_defence(DefenceSpec("made", method), replace(case, result_on_twin=remember), lambda: None)[0]
    other = replace(case, victim=Linear(2).eval(), result_on_twin=remember)
    second = measure_defence(DefenceSpec("made", method), other, lambda: None)[0]
    assert [suspect.model for suspect in method.seen] == [case.victim, case.twin, other.victim]
    twins = [key for key in vars(first) if "clean_model" in key]
    assert twins
    assert [vars(first)[key] for key in twins] == [vars(second)[key] for key in twins]


@pytest.mark.parametrize("kind", ["screen", "filter"])
def test_screens_and_filters_are_applied_to_the_twin_anew(case: Evaluation, kind: str) -> None:
    def apply(suspect: Suspect) -> Outcome:
        if kind == "screen":
            return Screen(blue)
        return Flagged(torch.zeros(len(case.world.train)), torch.zeros(len(case.world.train), dtype=torch.bool))

    def remember(*args: object) -> Any:
        raise AssertionError("remembered")

    found = row(
        replace(case, result_on_twin=remember, train_on_kept=lambda kept: case.twin), apply, kind, kind == "filter"
    )
    assert found.auroc.value >= 0


# ---- filters


def test_a_filter_that_knows_everything(case: Evaluation) -> None:
    kept: list[ImageSet] = []

    def apply(suspect: Suspect) -> Flagged:
        mask = case.poisoned.poisoned if suspect.model is case.victim else torch.arange(len(case.world.train)) < 3
        return Flagged(mask.float(), mask)

    def train_kept(images: ImageSet) -> nn.Module:
        kept.append(images)
        return case.twin

    found = row(replace(case, train_on_kept=train_kept), apply, "filter", needs_train=True)
    assert found.auroc.value == found.tpr.value == 1
    assert found.fpr.value == 0
    assert found.n_flagged == found.tpr.n == len(POISONED)
    assert not kept[0].poisoned.any()
    assert int(kept[0].covers.sum()) == len(COVERS)
    assert len(kept[0]) == len(case.world.train) - found.n_flagged
    assert Rates(found.cda_retrained, found.asr_retrained, found.ra_retrained) == case.rates(case.twin, lambda: None)
    assert found.fpr_on_clean_model == wilson(3, len(case.world.train))
    assert set(found.seconds) == {"apply", "retrain"}


def test_covers_count_as_no_poison(case: Evaluation) -> None:
    """To flag all that carries a trigger is to flag four images for nothing."""

    def apply(suspect: Suspect) -> Flagged:
        flagged = case.poisoned.poisoned | case.poisoned.covers
        return Flagged(flagged.float(), flagged)

    found = row(replace(case, train_on_kept=lambda kept: case.twin), apply, "filter", needs_train=True)
    n = len(case.world.train)
    assert found.fpr == wilson(len(COVERS), n - len(POISONED))
    assert found.auroc.value == pytest.approx(1 - 0.5 * len(COVERS) / (n - len(POISONED)))


def test_a_filter_where_nothing_is_poisoned(case: Evaluation) -> None:
    def apply(suspect: Suspect) -> Flagged:
        assert suspect.train is case.world.train
        flagged = torch.arange(len(case.world.train)) < 4
        return Flagged(flagged.float(), flagged)

    clean = replace(case, poison=lambda: case.world.train, train_on_kept=lambda kept: case.twin)
    found = row(clean, apply, "filter", needs_train=True)
    assert found.auroc == Auroc(0.5, 0.0, 1.0, 0, 100)
    assert found.tpr == Rate(0.0, 0.0, 1.0, 0)
    assert found.fpr == wilson(4, 100)


def test_a_repair_may_retrain(case: Evaluation) -> None:
    """What comes back of a retraining is what is measured; of the twin it is on the clean set."""
    trained: list[tuple[ImageSet, int | None]] = []

    def retrain(images: ImageSet, objective: Any = None, epochs: int | None = None) -> nn.Module:
        trained.append((images, epochs))
        return case.twin

    def apply(suspect: Suspect) -> Repaired:
        assert suspect.train is not None
        assert suspect.retrain is not None
        return Repaired(suspect.retrain(suspect.train.take(torch.arange(50)), epochs=2))

    found = row(replace(case, retrain=retrain), apply, "repair", needs_train=True)
    assert [epochs for _, epochs in trained] == [2, 2]
    assert [images.stamped_row for images, _ in trained] == [None, None]
    assert int((trained[0][0].labels != trained[1][0].labels).sum()) > 0  # the poisoned labels, and the true ones
    assert found.cda == found.cda_clean_model == found.cda_clean_model_before


# ---- judgements


@pytest.mark.parametrize("suspected", [(), (0,), (4, 0)])
def test_a_judgement(case: Evaluation, suspected: tuple[int, ...]) -> None:
    def apply(suspect: Suspect) -> Judged:
        if suspect.model is case.victim:
            return Judged(0.9, 0.5, suspected, torch.arange(10) / 8)
        return Judged(0.2, 0.5, (2, 1))

    found = row(case, apply, "judgement")
    assert (found.score, found.score_clean_model, found.threshold) == (0.9, 0.2, 0.5)
    assert (found.backdoored, found.backdoored_clean_model) == (True, False)
    assert found.suspected == (suspected[0] if suspected else None)
    assert found.suspected_classes == suspected
    assert found.by_class == (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.125)
    assert found.suspects_target is (suspected == (0,))
    assert (found.suspected_clean_model, found.suspected_classes_clean_model) == (2, (2, 1))
    assert found.by_class_clean_model is None


@pytest.mark.parametrize("judged", [Judged(float("inf"), 2.0), Judged(1.0, 2.0, (), torch.tensor([0.0, float("nan")]))])
def test_a_judgement_that_is_no_number_says_so(case: Evaluation, judged: Judged) -> None:
    with pytest.raises(UserError, match="made came to a score that is no finite number"):
        row(case, lambda suspect: judged, "judgement")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["screen", "filter"])
def test_scores_that_are_no_numbers_say_so(case: Evaluation, kind: str, number: float) -> None:
    def apply(suspect: Suspect) -> Outcome:
        if kind == "screen":
            return Screen(lambda images: blue(images) * number)
        assert suspect.train is not None
        score = torch.zeros(len(suspect.train))
        score[3] = number
        return Flagged(score, score > 0)

    with pytest.raises(UserError, match="defence made came to a score that is no finite number"):
        row(case, apply, kind, needs_train=kind == "filter")


def test_an_outcome_of_another_kind_than_the_defence_says(case: Evaluation) -> None:
    with pytest.raises(UserError, match="made calls itself a screen and came to a Repaired, not to a Screen"):
        row(case, repaired, "screen")


@pytest.mark.parametrize(
    ("goal", "suspected", "right"),
    [
        (AllToAll(10), 4, None),  # every class is a target: no suspicion could be wrong
        (SourceToTarget(3, 5), 5, True),
        (SourceToTarget(3, 5), 3, False),
    ],
)
def test_what_a_judgement_suspects_is_held_against_the_goal(
    case: Evaluation, goal: Goal, suspected: int, right: bool | None
) -> None:
    found = row(replace(case, goal=goal), lambda s: Judged(0.9, 0.5, (suspected,)), "judgement")
    assert found.suspects_target is right


def test_nothing_of_the_victim_changes(case: Evaluation) -> None:
    before = {k: v.clone() for k, v in case.victim.state_dict().items()}
    row(case, lambda s: Screen(blue), "screen")
    assert all(torch.equal(v, before[k]) for k, v in case.victim.state_dict().items())
