"""The summary's figures, by hand."""

from typing import Any

import pytest

from tests.report.made import found, record, to_record
from vitrap.report.page.summary import (
    Run,
    attack_label,
    number,
    over_seeds,
    text,
    to_runs,
)


def runs(*records: dict[str, Any]) -> tuple[Run, ...]:
    return to_runs([found(one) for one in records])


def test_a_line_has_effect_psnr_and_verdict() -> None:
    (run,) = runs(record(asr=0.95, asr_twin=0.02, psnr=25.0))
    assert run.effect == pytest.approx(93.0)
    assert (run.psnr, run.faults, run.poison_rate) == (25.0, (), 0.1)
    assert (run.anchor, run.attack, run.data) == ("run-000000000000", "badnets", "cifar10")


def test_faults_are_those_of_the_verdict() -> None:
    (run,) = runs(record(asr=0.5, asr_twin=0.1, cda=0.8, cda_twin=0.9, psnr=12.0))
    assert run.verdict.count(";") == 2
    assert run.faults == ("the trigger is not embedded", "clean images suffer", "the trigger shows")


@pytest.mark.parametrize(
    ("changes", "backdoor"),
    [({}, True), ({"psnr": 12.0}, True), ({"cda": 0.8}, True), ({"asr": 0.4}, False), ({"cda_twin": 0.1}, False)],
)
def test_only_some_faults_leave_no_backdoor(changes: dict[str, float], backdoor: bool) -> None:
    (run,) = runs(record(**changes))
    assert run.backdoor == backdoor


def test_lines_are_ordered_by_attack_data_name_and_seed() -> None:
    ordered = runs(
        record("b", "badnets", 1, 1),
        record("z", "ageb", 0, 2),
        record("b", "badnets", 0, 3),
        record("a", "badnets", 5, 4),
    )
    assert [(r.record.name, r.record.seed) for r in ordered] == [("z", 0), ("a", 5), ("b", 0), ("b", 1)]


def test_settings_that_all_share_are_left_out() -> None:
    first, second = runs(record(lr=0.1), record(seed=1, number=1, lr=0.2))
    assert (first.differs, second.differs) == (("lr 0.1",), ("lr 0.2",))


def test_an_attack_is_compared_with_runs_of_its_own() -> None:
    one, other = record("a", "ageb"), record("b", "badnets", number=1)
    one["spec"]["attack"]["tau"] = 0.5
    assert [run.differs for run in runs(one, other)] == [(), ()]
    third = record("c", "ageb", number=2)
    third["spec"]["attack"]["tau"] = 0.7
    assert [run.differs for run in runs(one, other, third)] == [("tau 0.5",), ("tau 0.7",), ()]


def test_settings_of_one_name_keep_their_tables() -> None:
    one, other = record(lr=0.1), record(lr=0.2, number=1)
    one["spec"]["attack"]["lr"], other["spec"]["attack"]["lr"] = 1, 2
    assert {run.differs for run in runs(one, other)} == {
        ("attack.lr 1", "recipe.lr 0.1"),
        ("attack.lr 2", "recipe.lr 0.2"),
    }


def test_another_model_is_called_a_model() -> None:
    other = record(number=1)
    other["spec"]["model"]["name"] = "deit_tiny_patch16_224"
    assert [run.differs for run in runs(record(), other)] == [
        ("model vit_tiny_patch16_224",),
        ("model deit_tiny_patch16_224",),
    ]


def test_an_absent_setting_is_a_difference() -> None:
    one, other = record(), record(number=1)
    one["spec"]["data"]["limit"] = 500
    assert sorted(run.differs for run in runs(one, other)) == [(), ("limit 500",)]


def test_the_setting_of_an_attack_is_part_of_its_name() -> None:
    assert attack_label(to_record(record(attack="megatron", setting="clean-label"))) == "megatron clean-label"


def test_anchors_are_plain_and_stand_once() -> None:
    odd = record(number=2)
    odd["hash"] = '"><script>'
    anchors = [run.anchor for run in runs(record(), record(), odd)]
    assert sorted(anchors) == ["run-000000000000", "run-000000000000-2", "run-nr2"]


def test_mean_and_deviation_over_seeds_by_hand() -> None:
    group = [record(seed=seed, number=seed, asr=asr) for seed, asr in ((0, 0.8), (1, 0.9), (2, 1.0))]
    (spread,) = over_seeds(runs(*group, record("other", number=9, lr=5.0)))
    assert spread.seeds == (0, 1, 2)
    mean, deviation = spread.measures["asr"]
    assert (mean, deviation) == (pytest.approx(90.0), pytest.approx(10.0))
    assert spread.measures["effect"][0] == pytest.approx(88.0)
    assert spread.measures["psnr"] == (25.0, 0.0)


def test_one_seed_twice_is_no_spread() -> None:
    assert over_seeds(runs(record(), record())) == ()


def test_names_do_not_part_seeds_but_settings_do() -> None:
    assert len(over_seeds(runs(record("a"), record("b", seed=1, number=1)))) == 1
    assert over_seeds(runs(record("a"), record("a", seed=1, number=1, lr=0.5))) == ()


@pytest.mark.parametrize(
    ("value", "shown"), [(1e-5, "1e-05"), (3, "3"), ([None, 0.25], "none, 0.25"), ("a", "a"), ({"a": 1}, "{'a': 1}")]
)
def test_values_as_text(value: Any, shown: str) -> None:
    assert text(value) == shown


@pytest.mark.parametrize("value", [None, True, "1", float("nan"), float("inf"), [1]])
def test_what_is_no_number(value: Any) -> None:
    assert number(value) is None
